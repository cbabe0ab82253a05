"""The drop-in for `torch.nn.MultiheadAttention`.

    q, k, v = query Wq^T + bq, key Wk^T + bk, value Wv^T + bv          one GEMM where the three are one tensor
    output  = concat_h(softmax(q_h k_h^T / sqrt(d) + masks) v_h) Wo^T + bo

Layout: a projection gives [N, L, 3, H, d] (or [L, N, 3, H, d]); q, k and v are views [N, H, L, d] of it, and
the attention's output lies in memory as [N, L, H, d] (or [L, N, H, d]), which is what `out_proj` reads. No
activation is transposed or copied on the way.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import attention, varlen_attention
from ..layout import merge_heads
from ..projected import Projection, projected_attention
from ..spec import Causal
from . import nested


class _FastPathRefusal:
    """A stand-in that makes `torch.overrides.has_torch_function` true: PyTorch's way to decline a fast path."""

    requires_grad = True

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
        return NotImplemented


class _InProjBias:
    """`in_proj_bias`, which also answers for us when `torch.nn.TransformerEncoder.forward` asks.

    In eval mode without gradients that method packs a right-padded batch into a NestedTensor and pads its
    result with zeros, so the rows of padded positions are lost before any layer runs. It decides by flags
    fixed when the encoder was built, possibly before this module was put into it, and by whether any weight
    of its first layer overrides `__torch_function__`. The second test is the only one that can be answered
    from here, and an answer given to everybody would break every other reader of the bias: hence the look at
    who is asking. Being a non-data descriptor it leaves setting, deleting and instance attributes (pruning,
    weight norm) as they are. Under `torch.compile` the encoder does not pack (unless built with
    `mask_check=False`), and nothing is done.
    """

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        if module is None:
            return self
        if not torch.compiler.is_compiling():
            caller = sys._getframe(1)
            if caller.f_code.co_name == "forward" and isinstance(
                caller.f_locals.get("self"), torch.nn.TransformerEncoder
            ):
                return _FastPathRefusal
        parameters = module._parameters
        if "in_proj_bias" not in parameters:
            raise AttributeError("in_proj_bias")
        return parameters["in_proj_bias"]


class MultiheadAttention(torch.nn.MultiheadAttention):
    """Multi-head attention with the constructor, the `state_dict` and the results of `torch.nn.MultiheadAttention`.

    What differs, all of it on purpose:

    - A row that may attend to nothing gets zeros from the attention (its output is `out_proj.bias`), zero
      weights and finite gradients, where PyTorch gives NaN in some modes.
    - Train, eval, no-grad and compiled run the same computation. PyTorch's inference fast path is never
      taken, in this module nor in a `torch.nn.TransformerEncoderLayer` around it; `_qkv_same_embed_dim`, by
      which that layer decides, therefore reads False once the module is built. `in_proj_weight` tells the
      same: it is None where the three projections have weights of their own.
    - `is_causal=True` without `attn_mask` raises in every mode.
    - Nested tensors (strided and jagged; `batch_first=True`) work in training too, and for cross attention.

    TorchScript (`torch.jit.script`) is not supported. The arguments are those of
    `torch.nn.MultiheadAttention`.
    """

    in_proj_bias = _InProjBias()

    @property
    def _qkv_same_embed_dim(self) -> bool:
        # The constructor asks before it makes the last projection and gets the true answer.
        return "out_proj" not in self._modules and bool(self.__dict__["_qkv_same_embed_dim"])

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, value: bool) -> None:
        self.__dict__["_qkv_same_embed_dim"] = value

    def _reset_parameters(self) -> None:
        """Draw new weights: the same numbers from the same seed as `torch.nn.MultiheadAttention`."""
        weights = (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        for weight in weights:
            if weight is not None:
                torch.nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            torch.nn.init.zeros_(self.in_proj_bias)
            torch.nn.init.zeros_(self.out_proj.bias)
        for bias in (self.bias_k, self.bias_v):
            if bias is not None:
                torch.nn.init.xavier_normal_(bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from `query` to `key` and `value`.

        Args:
            query: [L, N, E], or [N, L, E] with `batch_first`, or [L, E].
            key: [S, N, kdim], or [N, S, kdim] with `batch_first`, or [S, kdim].
            value: [S, N, vdim], or [N, S, vdim] with `batch_first`, or [S, vdim].
            key_padding_mask: [N, S], or [S] for unbatched input. Bool, True hides the key; or floating, added
                to the scores.
            need_weights: also return the attention weights.
            attn_mask: [L, S] or [N * num_heads, L, S]. Bool, True hides; or floating, added to the scores.
            average_attn_weights: return the mean of the weights over the heads rather than one set per head.
            is_causal: a promise that `attn_mask`, which must be given, is the causal mask. Where no weights
                and no padding mask are asked for, it is believed and the mask is not read.

        Returns:
            The output, shaped like `query`, and the weights or None. The weights are [N, L, S], not averaged
            [N, num_heads, L, S], without N for unbatched input; in training with dropout, the dropped ones.

        Raises:
            AssertionError, RuntimeError, TypeError: bad input, by the case as `torch.nn.MultiheadAttention`
            does.
        """
        if isinstance(query, torch.fx.Proxy):  # a leaf of symbolic tracing, as the modules of torch.nn are
            arguments = (query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            return query.tracer.create_proxy("call_module", query.tracer.path_of_module(self), arguments, {})
        _check_mask_types(key_padding_mask, attn_mask)
        if query.is_nested or key.is_nested or value.is_nested:
            if key_padding_mask is not None or attn_mask is not None:
                raise AssertionError("nested tensors know their lengths: they take no key_padding_mask or attn_mask")
            if is_causal:
                raise RuntimeError(_NEED_MASK)
            return self._forward_nested(query, key, value, need_weights, average_attn_weights)

        batched = F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)  # type: ignore[attr-defined]
        if is_causal and attn_mask is None:
            raise RuntimeError(_NEED_MASK)
        options = (need_weights, attn_mask, average_attn_weights, is_causal)
        if batched:
            return self._forward_dense(query, key, value, key_padding_mask, *options, self.batch_first)
        # One batch element; the three stay one tensor where they were one.
        query, key, value = _map_shared(lambda t: t.unsqueeze(0), query, key, value)
        padding = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        output, weights = self._forward_dense(query, key, value, padding, *options, True)
        return output.squeeze(0), None if weights is None else weights.squeeze(0)

    def _forward_dense(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average: bool,
        is_causal: bool,
        batch_first: bool,
    ) -> tuple[Tensor, Tensor | None]:
        trusted = is_causal and key_padding_mask is None and not need_weights
        attn_mask = None if trusted else attn_mask
        options = self._options("top_left" if trusted else None, need_weights, average)
        alone = query is key is value and attn_mask is None and key_padding_mask is None
        weight = self._joint_weight(query) if alone else None
        if weight is not None:
            first, last = Projection(weight, self.in_proj_bias), Projection(self.out_proj.weight, self.out_proj.bias)
            return projected_attention(query, first, last, self.num_heads, batch_first, **options)
        self._check_shapes(query, key, value, key_padding_mask, attn_mask, batch_first)
        order = (0, 2, 1, 3) if batch_first else (1, 2, 0, 3)
        q, k, v = (t.permute(order) for t in self._project(query, key, value))  # [N, H, L or S, d], views
        mask, bias = self._merge(attn_mask, key_padding_mask, q)
        k, v = self._extend(k, v)
        attended, weights = self._attend(q, k, v, mask, bias, options)
        return self._output(merge_heads(attended, batch_first)), weights  # merged [N, L, E] or [L, N, E], still a view

    def _options(self, causal: Causal | None, need_weights: bool, average: bool) -> dict[str, Any]:
        """What is asked of `attention` beside its tensors."""
        which = None if not need_weights else "mean" if average else "heads"
        return {"causal": causal, "dropout_p": self.dropout if self.training else 0.0, "return_weights": which}

    def _joint_weight(self, x: Tensor) -> Tensor | None:
        """`in_proj_weight` if one product with `x` gives query, key and value, and nothing is appended to them."""
        extended = self.add_zero_attn or self.bias_k is not None or self.bias_v is not None
        return None if extended or x.shape[-1] != self.embed_dim else self.in_proj_weight

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """The projections as views [..., H, d] of as few GEMM results as the inputs allow."""
        bias, weight, width = self.in_proj_bias, self.in_proj_weight, self.embed_dim
        inputs: tuple[Tensor, ...] = (query, key, value)
        weights: Any = (weight,)
        biases: Any = (bias,)
        parts: tuple[int, ...] = (1, 1, 1)  # how many of q, k and v each product gives
        if weight is not None and key is value:
            inputs, parts = ((query,), (3,)) if query is key else ((query, key), (1, 2))
        if len(parts) > 1:  # splitting into one part would only cost a copy of its gradient
            widths = [n * width for n in parts]
            separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            weights = separate if weight is None else weight.split(widths)
            biases = (None,) * len(parts) if bias is None else bias.split(widths)
        projected: list[Tensor] = []
        for x, w, b, n in zip(inputs, weights, biases, parts, strict=True):
            y = F.linear(x, w, b).unflatten(-1, (n, self.num_heads, self.head_dim))
            projected += y.unbind(-3)
        return projected

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        result = attention(q, k, v, mask=mask, bias=bias, **options)
        return (result, None) if isinstance(result, Tensor) else (result.output, result.weights)

    def _output(self, attended: Tensor) -> Tensor:
        return F.linear(attended, self.out_proj.weight, self.out_proj.bias)

    def _local(self, parameter: Any) -> Any:
        """A parameter of the heads that this process has: `parallel.py` spreads them over several."""
        return parameter

    def _extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the learned key and value of `add_bias_kv` and the zeros of `add_zero_attn`: [N, H, S + extra, d]."""
        if (self.bias_k is None) != (self.bias_v is None):
            raise AssertionError("bias_k and bias_v must both be set or both be None")
        if self.bias_k is None and not self.add_zero_attn:
            return k, v
        extended = []
        for t, row in ((k, self._local(self.bias_k)), (v, self._local(self.bias_v))):
            rows = [t]
            if row is not None:
                shape = (1, t.shape[1], 1, self.head_dim)
                rows.append(row.to(t.dtype).view(shape).expand(t.shape[0], -1, -1, -1))
            if self.add_zero_attn:
                rows.append(t.new_zeros(*t.shape[:2], 1, self.head_dim))
            extended.append(torch.cat(rows, 2))
        return extended[0], extended[1]

    def _merge(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """The two masks as `mask` and `bias` of `attention`, neither expanded over what it broadcasts.

        There True shows, here it hides; each slot takes one mask, so where both are bool the small one
        becomes floating.
        """
        n, h, rows, _ = q.shape
        attn, padding = attn_mask, key_padding_mask
        if attn is not None:
            attn = attn.view(n, h, rows, attn.shape[-1]) if attn.dim() == 3 else attn[None, None]
        if padding is not None:
            padding = padding[:, None, None, :]
            if padding.dtype == torch.bool and attn is not None and attn.dtype == torch.bool:
                zeros = torch.zeros_like(padding, dtype=q.dtype)
                padding = zeros.masked_fill(padding, float("-inf"))
        if attn is not None and padding is not None and padding.dtype == torch.bool:
            attn, padding = padding, attn  # the floating one adds as `bias`
        first, second = (padding, None) if attn is None else (attn, padding)
        _check_mask_dtype(attn_mask, key_padding_mask, q)
        extra = (self.bias_k is not None) + self.add_zero_attn
        return _visible(first, extra), _visible(second, extra)

    def _forward_nested(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool, average: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Packed sequences; weights, where wanted, come padded with zeros: [N, (H,) longest L, longest S]."""
        if not self.batch_first or self.bias_k is not None or self.add_zero_attn:
            raise AssertionError(
                "MultiheadAttention takes nested tensors only with batch_first=True, add_bias_kv=False and "
                "add_zero_attn=False"
            )
        packed = _map_shared(nested.unpack, query, key, value)
        nested.check(*packed, self.embed_dim)
        if not need_weights:
            q, k, v = self._project(*_map_shared(lambda p: p.values, *packed))
            dropout = self.dropout if self.training else 0.0
            attended = varlen_attention(q, k, v, packed[0].offsets, packed[1].offsets, dropout_p=dropout)
            assert isinstance(attended, Tensor)
            return packed[0].wrap(self._output(attended.flatten(-2))), None
        padded = _map_shared(lambda p: p.padded(), *packed)
        q, k, v = (t.transpose(1, 2) for t in self._project(*padded))  # [N, H, L or S, d]
        rows, keys = packed[0].valid(), packed[1].valid()
        mask = rows[:, None, :, None] & keys[:, None, None, :]
        attended, weights = self._attend(q, k, v, mask, None, self._options(None, True, average))
        attended = attended.transpose(1, 2).flatten(-2)[rows]
        return packed[0].wrap(self._output(attended)), weights

    def _check_shapes(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        batch_first: bool,
    ) -> None:
        """What `_mha_shape_check` leaves open: sizes. Error types and the start of each message are PyTorch's."""
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(
                f"was expecting embedding dimension of {self.embed_dim}, but got {query.shape[-1]} in query of "
                f"shape {tuple(query.shape)}"
            )
        if self.in_proj_weight is not None:
            if key.shape != value.shape:
                raise AssertionError(f"key shape {key.shape} does not match value shape {value.shape}")
        else:
            if key.shape[:2] != value.shape[:2]:
                raise AssertionError(
                    f"key's sequence and batch dims {key.shape[:2]} do not match value's {value.shape[:2]}"
                )
            for name, x, width in (("key", key, self.kdim), ("value", value, self.vdim)):
                if x.shape[-1] != width:
                    raise AssertionError(
                        f"expecting {name} weights shape of {(self.embed_dim, x.shape[-1])}, but got "
                        f"{(self.embed_dim, width)}: {name} has {x.shape[-1]} features, {name[0]}dim is {width}"
                    )
        axis = 0 if batch_first else 1
        n, rows, keys = query.shape[axis], query.shape[1 - axis], key.shape[1 - axis]
        if key.shape[axis] != n:
            raise RuntimeError(f"key has batch size {key.shape[axis]} where query has {n}")
        if key_padding_mask is not None:
            for dim, size in enumerate((n, keys)):
                if key_padding_mask.shape[dim] != size:
                    raise AssertionError(
                        f"Expected key_padded_mask.shape[{dim}] to be {size}, but got {key_padding_mask.shape[dim]}"
                    )
        if attn_mask is not None:
            right = (rows, keys) if attn_mask.dim() == 2 else (n * self.num_heads, rows, keys)
            if attn_mask.shape != right:
                raise RuntimeError(
                    f"The shape of the {attn_mask.dim()}D attn_mask is {attn_mask.shape}, but should be {right}."
                )


_NEED_MASK = (
    "Need attn_mask if specifying the is_causal hint: it only promises that attn_mask is the causal mask. "
    "torch.nn.Transformer.generate_square_subsequent_mask makes one."
)


def _map_shared(function: Any, query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
    """Apply a function to the three, once for those that are the same object."""
    q = function(query)
    k = q if key is query else function(key)
    v = k if value is key else q if value is query else function(value)
    return q, k, v


def _check_mask_types(key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> None:
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is not None and not torch.is_floating_point(mask) and mask.dtype != torch.bool:
            raise AssertionError(f"only bool and floating types of {name} are supported, got {mask.dtype}")
    dtypes = [m.dtype for m in (key_padding_mask, attn_mask) if m is not None]
    if len(set(dtypes)) == 2 and not torch.compiler.is_compiling():  # a warning would break the graph
        warnings.warn(
            "Support for mismatched key_padding_mask and attn_mask is deprecated. "
            f"Use same type for both instead (got {dtypes[0]} and {dtypes[1]}).",
            stacklevel=3,
        )


def _check_mask_dtype(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> None:
    """A floating mask is float32 or of the query's dtype, after the two are promoted; autocast takes any half too."""
    merged: torch.dtype | None = None
    for mask in (attn_mask, key_padding_mask):
        if mask is not None:
            dtype = q.dtype if mask.dtype == torch.bool else mask.dtype
            merged = dtype if merged is None else torch.promote_types(merged, dtype)
    if merged is None or merged in (q.dtype, torch.float32):
        return
    if merged != torch.float64 and torch.is_autocast_enabled(q.device.type):
        return
    raise RuntimeError(
        f"Expected a floating attn_mask or key_padding_mask of dtype float32 or {q.dtype}, the query's, got {merged}"
    )


def _visible(mask: Tensor | None, extra: int) -> Tensor | None:
    """A module's mask as `attention` takes it: bool turned around, `extra` keys that every row sees appended."""
    if mask is None:
        return None
    boolean = mask.dtype == torch.bool
    if boolean:
        mask = mask.logical_not()
    return F.pad(mask, (0, extra), value=True if boolean else 0.0) if extra else mask
