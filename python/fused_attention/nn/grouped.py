"""The attention layer of today's decoders: grouped heads, rotary positions, QK-norm, window, sinks, caches.

    q, k, v = x Wq^T, x Wk^T, x Wv^T                        one GEMM: the three weights are one parameter
    q, k    = rotation of RMSNorm(q), RMSNorm(k)            one launch
    output  = concat_h(attention(q_h, k_g(h), v_g(h))) Wo^T

Layout: the projection gives [B, S, H + 2 HK, D]; q, k and v are views [B, H or HK, S, D] of it, and the attention's
output lies in memory as [B, S, H, D], which is what `o_proj` reads. No key or value is repeated for the heads that
share it, and no activation is transposed in memory.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..cache import Cache, KVCache, PagedKVCache
from ..decode import decode_attention
from ..functional import AttentionResult, attention
from ..ops import rope_qk_norm
from ..spec import ArgumentError, Causal, Options, WeightsMode, Window, check_options, shape_of, window_sides
from .positions import Constants, RotaryEmbedding, alibi_slopes, check_positions, positive_number, whole_number

NeedWeights = bool | Literal["mean", "heads"]


def _bad(name: str, was: object, expected: str) -> ArgumentError:
    return ArgumentError(f"{name}: got {was}, expected {expected}")


class GroupedQueryAttention(nn.Module):
    """Attention with projections; H query heads share HK key/value heads (Ainslie et al., "GQA", 2023).

    Parameters: `qkv_proj` (rows of q, then k, then v), `o_proj`, and where asked for `q_norm.weight`, `k_norm.weight`
    and `sinks`. With `context_dim` it is cross-attention, with `q_proj` and `kv_proj` in place of `qkv_proj`. One
    parameter is one GEMM, forward and backward, and one name for optimizers and sharding; `load_state_dict` also takes
    the separate `q_proj`, `k_proj` and `v_proj` of Llama-style checkpoints, and `separate_state_dict` gives them back.

    Args:
        embed_dim: E, features of input and output.
        num_heads: H.
        num_kv_heads: HK, which divides H; default H. 1 is multi-query attention.
        head_dim: D; default E / H.
        context_dim: features of the context to attend to; None: self-attention.
        qkv_bias, o_bias: whether the projections have a bias.
        qk_norm_eps: RMS-normalise every head of q and k, with learned weights and this epsilon; None: no norm.
        rope: turns q and k; may be shared by layers. Self-attention only.
        causal, window, softcap, scale: as in `attention`. For a right-padded batch use causal="top_left"; a cache needs
            either alignment, and means "bottom_right", which is the same where a sequence attends to itself.
        sinks: a learned logit per head joins the softmax's denominator (gpt-oss).
        alibi: add ALiBi's distance penalty, with `alibi_slopes(H)`.
        dropout: probability that an attention weight is dropped in training.

    Raises:
        ArgumentError: (a ValueError) an option is out of range, or options exclude each other.
        TypeError: an option has the wrong type.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        context_dim: int | None = None,
        qkv_bias: bool = False,
        o_bias: bool = False,
        qk_norm_eps: float | None = None,
        rope: RotaryEmbedding | None = None,
        causal: Causal | None = None,
        window: Window | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        sinks: bool = False,
        alibi: bool = False,
        dropout: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = whole_number("embed_dim", embed_dim)
        self.num_heads = whole_number("num_heads", num_heads)
        self.num_kv_heads = num_heads if num_kv_heads is None else whole_number("num_kv_heads", num_kv_heads)
        if num_heads % self.num_kv_heads:
            raise _bad("num_kv_heads", self.num_kv_heads, f"a divisor of num_heads, {num_heads}")
        if head_dim is None and embed_dim % num_heads:
            raise _bad("num_heads", num_heads, f"a divisor of embed_dim, {embed_dim}, or a head_dim")
        self.head_dim = embed_dim // num_heads if head_dim is None else whole_number("head_dim", head_dim)
        self.context_dim = None if context_dim is None else whole_number("context_dim", context_dim)
        check_options(Options(causal, *window_sides(window), softcap, scale, dropout))
        for name, flag in (("qkv_bias", qkv_bias), ("o_bias", o_bias), ("sinks", sinks), ("alibi", alibi)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name}: got {type(flag).__name__}, expected a bool")
        self.causal, self.window, self.softcap, self.scale, self.dropout = causal, window, softcap, scale, dropout
        self._check_rope(rope)
        self.rope = rope
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        width, kv_width = num_heads * self.head_dim, 2 * self.num_kv_heads * self.head_dim
        if self.context_dim is None:
            self.qkv_proj = nn.Linear(embed_dim, width + kv_width, bias=qkv_bias, **factory)
        else:
            self.q_proj = nn.Linear(embed_dim, width, bias=qkv_bias, **factory)
            self.kv_proj = nn.Linear(self.context_dim, kv_width, bias=qkv_bias, **factory)
        self.o_proj = nn.Linear(width, embed_dim, bias=o_bias, **factory)
        self.q_norm: nn.RMSNorm | None = None
        self.k_norm: nn.RMSNorm | None = None
        if qk_norm_eps is not None:
            positive_number("qk_norm_eps", qk_norm_eps)
            self.q_norm = nn.RMSNorm(self.head_dim, qk_norm_eps, **factory)
            self.k_norm = nn.RMSNorm(self.head_dim, qk_norm_eps, **factory)
        self.sinks = nn.Parameter(torch.zeros(num_heads, **factory)) if sinks else None
        self.alibi = alibi
        self._constants = Constants()

    def _check_rope(self, rope: object) -> None:
        if rope is None:
            return
        if not isinstance(rope, RotaryEmbedding):
            raise TypeError(f"rope: got {type(rope).__name__}, expected a RotaryEmbedding or None")
        if self.context_dim is not None:
            raise _bad("rope", "a RotaryEmbedding", "None with context_dim: q and k stand in different sequences")
        if rope.head_dim != self.head_dim:
            raise _bad("rope", f"one for head_dim {rope.head_dim}", f"head_dim {self.head_dim}")

    def extra_repr(self) -> str:
        options = {n: getattr(self, n) for n in ("causal", "window", "softcap", "scale", "alibi", "dropout")}
        given = "".join(f", {n}={v!r}" for n, v in options.items() if v)
        return f"{self.embed_dim}, heads={self.num_heads}:{self.num_kv_heads}, head_dim={self.head_dim}{given}"

    # --- weights under other names ----------------------------------------------------------------------------------

    def _fused(self) -> tuple[str, dict[str, int]]:
        """The fused projection and the rows of its parts, in order."""
        rows, kv_rows = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        both = {"k_proj": kv_rows, "v_proj": kv_rows}
        return ("qkv_proj", {"q_proj": rows, **both}) if self.context_dim is None else ("kv_proj", both)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        name, parts = self._fused()
        for kind in ("weight", "bias"):
            keys = [f"{prefix}{part}.{kind}" for part in parts]
            if all(key in state_dict for key in keys):
                state_dict[f"{prefix}{name}.{kind}"] = torch.cat([state_dict.pop(key) for key in keys])
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def separate_state_dict(self) -> dict[str, Tensor]:
        """The `state_dict` with `q_proj`, `k_proj` and `v_proj` as Llama-style checkpoints have them: views."""
        name, parts = self._fused()
        found: dict[str, Tensor] = {}
        for key, t in self.state_dict().items():
            if not key.startswith(f"{name}."):
                found[key] = t
                continue
            kind = key.removeprefix(f"{name}.")
            pieces = t.split(list(parts.values()))
            found |= {f"{part}.{kind}": piece for part, piece in zip(parts, pieces, strict=True)}
        return found

    # --- forward ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        key_lengths: Tensor | None = None,
        cache: Cache | None = None,
        need_weights: NeedWeights = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from x to itself, to `context`, or to what `cache` holds with x appended.

        Args:
            x: [B, S, E].
            context: [B, N, context_dim], if and only if the module has a context_dim; else keys come from x, N = S.
            positions: [S] or [B, S] integers, where rope takes the tokens to stand; default 0, 1, 2, ..., with a cache
                after what it holds.
            mask, bias: as in `attention`, broadcastable to [B, H, S, N]; a bool mask shows where it is True.
            key_padding_mask: [B, N] bool; True hides the key, as in `torch.nn.MultiheadAttention`.
            key_lengths: [B] integers; keys at and past the length are hidden.
            cache: a `KVCache` or `PagedKVCache` with room for S more tokens, which are appended in place. S is 1 for a
                step of decoding; a prompt may come whole or in chunks. Takes no mask, bias, key_padding_mask or
                key_lengths (after a right-padded prompt subtract the padding from `cache.lengths`), gives no weights,
                and has no derivative: call it under `torch.no_grad()`.
            need_weights: also return the attention weights, True or "mean" averaged over heads, "heads" per head.

        Returns:
            [B, S, E], or that and the weights [B, S, N] or [B, H, S, N].

        Raises:
            ArgumentError: (a ValueError) a shape, dtype, device or value is wrong, or arguments exclude each other.
            TypeError: an argument has the wrong type.
        """
        self._check_inputs(x, context, positions)
        if cache is not None:
            refused = {
                "mask": mask is not None,
                "bias": bias is not None,
                "key_padding_mask": key_padding_mask is not None,
                "key_lengths": key_lengths is not None,
                "need_weights": need_weights is not False,
            }
            self._check_cached(cache, refused)
            attended = self._decode(*self._project(x, context), cache, positions)
            return self._output(attended)
        mask, bias = _with_padding(key_padding_mask, mask, bias, x if context is None else context)
        which = _weights_mode(need_weights)
        query, key, value = self._project(x, context)
        query, key = self._turn(query, key, positions)
        result = attention(
            query,
            key,
            value,
            mask=mask,
            bias=bias,
            alibi_slopes=self._slopes(query),
            sinks=self._local(self.sinks),
            key_lengths=key_lengths,
            causal=self.causal,
            window=self.window,
            softcap=self.softcap,
            scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
            return_weights=which,
        )
        attended = result.output if isinstance(result, AttentionResult) else result
        output = self._output(attended)
        if not isinstance(result, AttentionResult):
            return output
        assert result.weights is not None
        return output, result.weights

    def _project(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, S, D], k and v [B, HK, N, D]: views of one product for each input."""
        heads, shared = self.num_heads, self.num_kv_heads
        if context is None:
            parts = self.qkv_proj(x).unflatten(-1, (heads + 2 * shared, self.head_dim)).transpose(1, 2)
            query, key, value = parts.split((heads, shared, shared), 1)
            return query, key, value
        query = self.q_proj(x).unflatten(-1, (heads, self.head_dim)).transpose(1, 2)
        key, value = self.kv_proj(context).unflatten(-1, (2 * shared, self.head_dim)).transpose(1, 2).split(shared, 1)
        return query, key, value

    def _output(self, attended: Tensor) -> Tensor:
        return self.o_proj(attended.transpose(1, 2).flatten(-2))  # a view: it lies in memory as [B, S, H, D]

    def _local(self, parameter: Any) -> Any:
        """A parameter of the heads that this process has: `parallel.py` spreads them over several."""
        return parameter

    def _turn(
        self, query: Tensor, key: Tensor, positions: Tensor | None, length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """QK-norm and rotation, in one pass."""
        cos = sin = rows = None
        if self.rope is not None:
            cos, sin, rows = self.rope.tables_for(query, positions, length)
        if self.q_norm is None or self.k_norm is None:
            if cos is None:
                return query, key
            normed: dict[str, Any] = {}
        else:
            weights = {"query_weight": self._local(self.q_norm.weight), "key_weight": self._local(self.k_norm.weight)}
            normed = {**weights, "eps": self.q_norm.eps}
        interleaved = self.rope is not None and self.rope.interleaved
        turned = rope_qk_norm(query, key, cos, sin, positions=rows, interleaved=interleaved, **normed)
        assert turned[0] is not None and turned[1] is not None
        return turned[0], turned[1]

    def _decode(self, query: Tensor, key: Tensor, value: Tensor, cache: Cache, positions: Tensor | None) -> Tensor:
        tables: tuple[Tensor, Tensor, bool] | None = None
        # The "dynamic" law is taken at the cache's capacity, so that all keys in it are turned alike.
        capacity = cache.capacity
        rolls = isinstance(cache, KVCache) and cache.window is not None  # past any table of `capacity` rows
        plain = self.q_norm is None and positions is None and query.dtype != torch.float64 and not rolls
        if self.rope is not None and plain:
            # The append turns q and k itself, in the same launch, at positions that it knows.
            tables = (*self.rope.tables(capacity, query.device), self.rope.interleaved)
        else:
            if self.rope is not None and positions is None:
                row = torch.arange(query.shape[2], device=query.device)
                seen = cache.positions if isinstance(cache, KVCache) else cache.lengths
                positions = seen[:, None] + row
            query, key = self._turn(query, key, positions, capacity)
        output = decode_attention(
            query,
            cache,
            key,
            value,
            rope=tables,
            alibi_slopes=self._slopes(query),
            sinks=self._local(self.sinks),
            window=self.window,
            softcap=self.softcap,
            scale=self.scale,
        )
        assert isinstance(output, Tensor)
        return output

    def _slopes(self, like: Tensor) -> Tensor | None:
        if not self.alibi:
            return None
        return self._constants.get(like.device, None, lambda: alibi_slopes(self.num_heads, device=like.device))

    # --- checks -----------------------------------------------------------------------------------------------------

    def _check_inputs(self, x: Tensor, context: Tensor | None, positions: Tensor | None) -> None:
        _check_tokens("x", x, self.embed_dim, self.o_proj.weight)
        if (context is None) != (self.context_dim is None):
            was = "None" if context is None else "a Tensor"
            raise _bad("context", was, f"what context_dim={self.context_dim} says: self-attention has none")
        if context is not None:
            assert self.context_dim is not None
            _check_tokens("context", context, self.context_dim, self.o_proj.weight)
            if context.shape[0] != x.shape[0]:
                raise _bad("context", f"batch size {context.shape[0]}", f"x's batch size {x.shape[0]}")
        if positions is not None and self.rope is None:
            raise _bad("positions", "a Tensor", "None without rope")
        check_positions(positions, x.shape[0], x.shape[1])

    def _check_cached(self, cache: object, refused: dict[str, bool]) -> None:
        if not isinstance(cache, (KVCache, PagedKVCache)):
            raise TypeError(f"cache: got {type(cache).__name__}, expected a KVCache, a PagedKVCache or None")
        if self.context_dim is not None:
            raise _bad("cache", "a cache", "None with context_dim: what it appends is x's own")
        if self.causal is None:
            raise _bad("cache", "a cache", "None without causal: a cache holds what came before")
        if self.training and self.dropout > 0.0:
            raise _bad("cache", f"a cache in training with dropout={self.dropout}", "eval(): decoding drops nothing")
        for name, given in refused.items():
            if given:
                raise _bad(name, "a value", "nothing beside cache")


def _check_tokens(name: str, t: object, width: int, like: Tensor) -> None:
    """like: a parameter, whose device and, but for autocast, dtype the tokens must have."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: got {type(t).__name__}, expected a Tensor")
    if t.is_nested:
        raise _bad(name, "a nested tensor", f"a dense one [B, S, {width}]; `attention` takes nested tensors")
    if t.dim() != 3 or t.shape[2] != width:
        raise _bad(name, f"shape {shape_of(t)}", f"[B, S, {width}]")
    if t.device != like.device:
        raise _bad(f"{name}.device", t.device, f"the module's {like.device}")
    if t.dtype != like.dtype and not (t.is_floating_point() and torch.is_autocast_enabled(t.device.type)):
        raise _bad(f"{name}.dtype", t.dtype, f"the module's {like.dtype}")


def _weights_mode(need_weights: object) -> WeightsMode | None:
    if need_weights is True or need_weights == "mean":
        return "mean"
    if need_weights == "heads":
        return "heads"
    if need_weights is False:
        return None
    kind = ArgumentError if isinstance(need_weights, str) else TypeError
    raise kind(f"need_weights: got {need_weights!r}, expected a bool, 'mean' or 'heads'")


def _with_padding(
    padding: Tensor | None, mask: Tensor | None, bias: Tensor | None, keys: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """mask and bias with the padding in the slot that is free; nothing is expanded to [B, H, S, N]."""
    if padding is None:
        return mask, bias
    if not isinstance(padding, Tensor):
        raise TypeError(f"key_padding_mask: got {type(padding).__name__}, expected a Tensor or None")
    if padding.dtype != torch.bool:
        raise _bad("key_padding_mask.dtype", padding.dtype, "torch.bool")
    if tuple(padding.shape) != tuple(keys.shape[:2]):
        raise _bad("key_padding_mask", f"shape {shape_of(padding)}", f"[B, N] = {list(keys.shape[:2])}")
    hidden = padding[:, None, None, :]
    if mask is None:
        return ~hidden, bias
    if bias is not None:
        raise _bad("key_padding_mask", "a tensor beside mask and bias", "None: hide the keys in mask, or key_lengths")
    return mask, torch.zeros_like(hidden, dtype=keys.dtype).masked_fill(hidden, float("-inf"))
