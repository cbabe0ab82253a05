"""`scaled_dot_product_attention`: torch's function of that name, served by `attention`.

    output = softmax(scale * Q K^T + attn_mask) V

Everything here is views: tensors of other ranks become [B, H, S, D], broadcast dimensions get stride 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_variadic

from .functional import attention, varlen_attention
from .spec import ArgumentError
from .varlen import from_nested, to_nested

_MASK_DTYPES = (torch.bool, torch.float32)
_AUTOCAST_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, same arguments, results and types of errors.

    Where torch's own code paths disagree with each other, this function has one meaning: `attn_mask` and `is_causal`
    given together both apply, a row that sees no key gives zeros, a mask of any rank up to the inputs' broadcasts, and
    key and value of different lengths raise.

    Args:
        query: [*, H, M, D], any number of leading dimensions, also [H, M, D] and [M, D]. float32, bfloat16, float16 or
            float64. A nested tensor [B, H, *, D] works where key and value are nested too and there is no mask.
        key: [*, HK, N, D]. Leading dimensions and heads broadcast.
        value: [*, HV, N, DV].
        attn_mask: bool (True is visible), or float32 or the query's dtype (added to the scores); broadcastable to
            [*, H, M, N]. Or a `torch.nn.attention.bias.CausalBias`.
        dropout_p: probability that a weight is zeroed.
        is_causal: row i sees the keys 0 .. i (the top-left alignment).
        scale: multiplies QK^T; default 1 / sqrt(D).
        enable_gqa: HK and HV may each be a divisor of H; where HK != HV, key and value are repeated to their least
            common multiple (a copy, unless the count was 1).

    Returns:
        [*, H, M, DV], laid out in memory in the query's order of dimensions.

    Raises:
        ArgumentError: (a ValueError and a RuntimeError) a shape, dtype, device or value is wrong.
        TypeError: an argument has the wrong type.
    """
    if has_torch_function_variadic(query, key, value, attn_mask):
        return _overridden(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        raise _not_a_tensor(query=query, key=key, value=value)
    if type(is_causal) is not bool:
        raise TypeError(f"is_causal: got {type(is_causal).__name__}, expected a bool")
    if type(enable_gqa) is not bool:
        raise TypeError(f"enable_gqa: got {type(enable_gqa).__name__}, expected a bool")
    if type(dropout_p) is not float:
        dropout_p = _as_float("dropout_p", dropout_p)
    if scale is not None and type(scale) is not float:
        scale = _as_float("scale", scale)
    if attn_mask is not None:
        _check_mask(attn_mask, query)
    causal = "top_left" if is_causal else None
    if query.is_nested or key.is_nested or value.is_nested:
        return _nested(query, key, value, attn_mask, enable_gqa, causal=causal, scale=scale, dropout_p=dropout_p)
    q, k, v = query.shape, key.shape, value.shape
    try:
        same = len(q) == len(k) == len(v) == 4 and q[0] == k[0] == v[0] and q[1] == k[1] == v[1]
        if same and q[3] and v[3]:
            return attention(query, key, value, mask=attn_mask, causal=causal, scale=scale, dropout_p=dropout_p)
        return _any_shape(query, key, value, attn_mask, enable_gqa, causal=causal, scale=scale, dropout_p=dropout_p)
    except ArgumentError as error:
        raise _renamed(error) from None


def _renamed(error: ArgumentError) -> ArgumentError:
    """`attention` calls the mask `mask`; here it is `attn_mask`."""
    text = str(error)
    return ArgumentError(f"attn_{text}") if text.startswith("mask") else error


def _not_a_tensor(**tensors: object) -> TypeError:
    name, value = next((n, t) for n, t in tensors.items() if not isinstance(t, Tensor))
    return TypeError(f"{name}: got {type(value).__name__}, expected a Tensor")


def _as_float(name: str, value: Any) -> float:
    if isinstance(value, (str, bytes, complex)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: got {type(value).__name__} {value!r}, expected a number")
    return float(value)


def _check_mask(attn_mask: Tensor, query: Tensor) -> None:
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask: got {type(attn_mask).__name__}, expected a Tensor or None")
    dtype = attn_mask.dtype
    if dtype in _MASK_DTYPES or dtype == query.dtype:
        return
    # autocast casts the query and the mask alike
    cast = dtype in _AUTOCAST_DTYPES and query.dtype in _AUTOCAST_DTYPES
    if not (cast and torch.is_autocast_enabled(query.device.type)):
        raise ArgumentError(f"attn_mask.dtype: got {dtype}, expected bool, float32 or query's {query.dtype}")


def _overridden(
    query: Any, key: Any, value: Any, attn_mask: Any, dropout_p: float, is_causal: bool, scale: Any, enable_gqa: bool
) -> Any:
    """A tensor-like argument with `__torch_function__`, or an active torch function mode."""
    from torch.nn.attention.bias import CausalBias

    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    mode = has_torch_function((None,))  # None has no method of its own: only a mode answers
    if not mode and isinstance(attn_mask, CausalBias) and not has_torch_function((query, key, value)):
        if is_causal:
            raise ArgumentError("is_causal: got True with a CausalBias as attn_mask, expected False")
        return _causal_bias(query, key, value, attn_mask, dropout_p=dropout_p, **options)
    jagged = any(isinstance(t, Tensor) and t.is_nested for t in (query, key, value))
    if not mode and jagged:
        with torch._C.DisableTorchFunctionSubclass():
            return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    tensors = (query, key, value, attn_mask)
    options |= {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal}
    return handle_torch_function(scaled_dot_product_attention, tensors, query, key, value, **options)


def _causal_bias(query: Tensor, key: Tensor, value: Tensor, bias: Any, **options: Any) -> Tensor:
    """The alignment comes from the variant; the bias itself is never built."""
    from torch.nn.attention.bias import CausalVariant

    if bias.variant == CausalVariant.UPPER_LEFT:  # its sizes do not matter: row i sees keys 0 .. i
        return scaled_dot_product_attention(query, key, value, is_causal=True, **options)
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        raise _not_a_tensor(query=query, key=key, value=value)
    dropout_p, scale = (options[n] if options[n] is None else _as_float(n, options[n]) for n in ("dropout_p", "scale"))
    sizes, needed = [bias.seq_len_q, bias.seq_len_kv], [query.shape[-2], key.shape[-2]]
    if sizes != needed:
        raise ArgumentError(f"attn_mask: got a lower-right CausalBias for lengths {sizes}, expected {needed}")
    common: dict[str, Any] = {"causal": "bottom_right", "scale": scale, "dropout_p": dropout_p}
    return _any_shape(query, key, value, None, options["enable_gqa"], **common)


# --- shapes -------------------------------------------------------------------------------------------------------


def _broadcast(what: str, *sizes: tuple[int, ...]) -> tuple[int, ...]:
    rank = max(len(s) for s in sizes)
    padded = [(1,) * (rank - len(s)) + tuple(s) for s in sizes]
    found: list[int] = []
    for column in zip(*padded, strict=True):
        wanted = [n for n in column if n != 1]
        if any(n != wanted[0] for n in wanted):
            shapes = ", ".join(str(list(s)) for s in sizes)
            raise ArgumentError(f"{what}: got {shapes}, expected shapes that broadcast")
        found.append(wanted[0] if wanted else 1)
    return tuple(found)


def _heads(tensors: tuple[Tensor, Tensor, Tensor], enable_gqa: bool) -> tuple[int, int]:
    """How many heads the query and (jointly) key and value are to have."""
    hq, hk, hv = (t.shape[-3] if t.dim() > 2 else 1 for t in tensors)
    if not enable_gqa:
        (heads,) = _broadcast("query, key, value heads (enable_gqa=False)", (hq,), (hk,), (hv,))
        return heads, 1 if hk == hv == 1 else heads
    for name, t, count in (("key", tensors[1], hk), ("value", tensors[2], hv)):
        if t.dim() < 3 or tensors[0].dim() < 3:
            raise IndexError(f"{name}: got {t.dim()} dimensions, expected a heads dimension with enable_gqa=True")
        if count == 0 and hq != 0 or count != 0 and hq % count != 0:
            raise ArgumentError(f"{name}: got {count} heads, expected a divisor of query's {hq} heads")
    return hq, math.lcm(hk, hv)


def _repeat_heads(t: Tensor, heads: int) -> Tensor:
    """[B, h, S, D] with h <= heads a divisor of it: head i reads i // (heads // h)."""
    have = t.shape[1]
    if have == heads:
        return t
    return t.expand(-1, heads, -1, -1) if have == 1 else t.repeat_interleave(heads // have, dim=1)


def _any_shape(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool, **options: Any
) -> Tensor:
    """Any rank of at least 2, broadcast leading dimensions, grouped heads, and head dims of 0."""
    tensors = (query, key, value)
    for name, t in zip(("query", "key", "value"), tensors, strict=True):
        if t.dim() < 2:
            raise ArgumentError(f"{name}: got {t.dim()} dimensions {list(t.shape)}, expected at least 2")
    lead = _broadcast("query, key, value leading dimensions", *(tuple(t.shape[:-3]) for t in tensors))
    heads, kv_heads = _heads(tensors, enable_gqa)
    rank = max(t.dim() for t in tensors)
    parts = [_flatten(t, lead) for t in tensors]
    q, k, v = (_repeat_heads(t, n) for t, n in zip(parts, (heads, kv_heads, kv_heads), strict=True))
    if attn_mask is not None:
        attn_mask = _flatten_mask(attn_mask, lead, rank)
    value_dim = v.shape[3]
    if q.shape[3] == k.shape[3] == 0:  # all scores are 0, whatever the scale
        q, k, options["scale"] = torch.nn.functional.pad(q, (0, 1)), torch.nn.functional.pad(k, (0, 1)), 1.0
    if value_dim == 0:
        v = torch.nn.functional.pad(v, (0, 1))
    out = attention(q, k, v, mask=attn_mask, **options)[..., :value_dim]  # [B, H, M, DV]
    rows = out.shape[-2:]
    return out.reshape(*lead, heads, *rows) if rank > 2 else out.reshape(rows)


def _flatten(t: Tensor, lead: tuple[int, ...]) -> Tensor:
    """[*lead or broadcast, h, S, D] as [B, h, S, D]; a copy only where several leading dimensions do not merge."""
    own = t.shape[-3:] if t.dim() > 2 else (1, *t.shape)
    return t.expand(*lead, *own).reshape(math.prod(lead), *own)


def _flatten_mask(mask: Tensor, lead: tuple[int, ...], rank: int) -> Tensor:
    """A mask with all its broadcast dimensions kept at size 1 where the leading ones allow it."""
    if mask.dim() > rank:
        raise ArgumentError(f"attn_mask: got {mask.dim()} dimensions {list(mask.shape)}, expected at most {rank}")
    batch, own = tuple(mask.shape[:-3]), tuple(mask.shape[-3:])
    if len(lead) <= 1 or math.prod(batch) == 1:
        return mask.reshape(own) if math.prod(batch) == 1 else mask
    if _broadcast("attn_mask leading dimensions", batch, lead) != lead:
        raise ArgumentError(f"attn_mask: got leading dimensions {list(batch)}, expected to broadcast to {list(lead)}")
    return mask.expand(*lead, *own).reshape(math.prod(lead), *own)


# --- nested tensors -------------------------------------------------------------------------------------------------


def _nested(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool, **options: Any
) -> Tensor:
    """Nested tensors as packed sequences, and the result in the query's layout."""
    x = from_nested(query, key, value, {"attn_mask": attn_mask})
    q, k, v = x.query, x.key, x.value
    heads, kv_heads = _heads((q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)), enable_gqa)
    q, k, v = (
        _repeat_heads(t[None].transpose(1, 2), n).transpose(1, 2)[0]
        for t, n in ((q, heads), (k, kv_heads), (v, kv_heads))
    )
    out = varlen_attention(q, k, v, x.cu_seqlens_q, x.cu_seqlens_k, **options)  # [T, H, DV]
    assert isinstance(out, Tensor)
    return to_nested(out, x.cu_seqlens_q, query)
