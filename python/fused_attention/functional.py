"""The public functions: what goes in, what comes out, and in which shapes.

Formula (Vaswani et al., "Attention Is All You Need", 2017; the online softmax of Dao et al., "FlashAttention", 2022):

    output = softmax(softcap(scale * Q K^T) + alibi + mask + bias) V
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import autograd, dispatch, philox, varlen
from .spec import (
    AttentionSpec,
    Causal,
    Device,
    Inputs,
    Options,
    Outputs,
    Precision,
    WeightsMode,
    Window,
    as_offsets,
    block_sides,
    check_options,
    check_packed,
    make_spec,
    window_sides,
)
from .tracing import is_traced


class AttentionResult(NamedTuple):
    """What `attention` returns when more than the output was asked for.

    output: [B, H, M, DV]. lse: [B, H, M], natural log, float32 (float64 for float64 inputs), or None. weights:
    [B, M, N] ("mean") or [B, H, M, N] ("heads") in the query's dtype, or None.
    """

    output: Tensor
    lse: Tensor | None
    weights: Tensor | None


def _four_dims(t: Tensor | None) -> Tensor | None:
    """A mask or bias of fewer dimensions, with leading dimensions of size 1, as broadcasting has it."""
    if not isinstance(t, Tensor) or t.dim() >= 4:
        return t
    return t[(None,) * (4 - t.dim())]


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Cast float32 and half tensors to autocast's dtype, as torch does for its own attention."""
    device = next((t.device.type for t in tensors if isinstance(t, Tensor)), None)
    if device is None or device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    castable = (torch.float32, torch.float16, torch.bfloat16)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in castable else t for t in tensors)


def any_autocast() -> bool:
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


def _is_plain(x: Inputs) -> bool:
    """Whether `select_plain` can speak for a call: query, key and value alike, nothing else, and no transform."""
    q, k, v = x[:3]
    if not (x.plain and isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        return False
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        return False
    if not q.layout == k.layout == v.layout == torch.strided:
        return False
    return torch.autograd.forward_ad._current_level < 0 and torch._C._functorch.peek_interpreter_stack() is None


def _run(x: Inputs, o: Options) -> Outputs:
    if o.dropout_p and isinstance(x.query, Tensor):
        x = x._replace(seed=philox.draw_seed(x.query.device))
    if is_traced(x.query):
        return autograd.run_op(x, o)
    if _is_plain(x):
        check_options(o)  # before it is a key: True equals 1 there, and a list cannot be hashed
        q, k, v = x[:3]
        grad = torch.is_grad_enabled()
        needs = (grad and q.requires_grad, grad and k.requires_grad, grad and v.requires_grad)
        found = dispatch.select_plain((q.shape, k.shape, v.shape), q.dtype, q.device, needs, o, dispatch.requested())
        if found[1] != "reference":
            return autograd.run(*found, x)
    spec = make_spec(x, o)
    return autograd.run(spec, dispatch.select(spec, Device.of(x.query)).backend, x)


def gather(
    tensors: tuple[Any, ...],
    key_lengths: Tensor | None,
    block_map: Tensor | None = None,
) -> Inputs:
    """The tensors of one call as `make_spec` takes them: after autocast, with all dimensions they broadcast over."""
    if any_autocast():
        tensors = autocast(*tensors)
    query, key, value, mask, bias, alibi_slopes, sinks = tensors
    if isinstance(alibi_slopes, Tensor) and alibi_slopes.dim() == 1:
        alibi_slopes = alibi_slopes[None]
    lengths = as_offsets("key_lengths", key_lengths)
    terms = (_four_dims(mask), _four_dims(bias), alibi_slopes, sinks)
    return Inputs(query, key, value, *terms, lengths, block_map=_four_dims(block_map))


def _gather_packed(packed: varlen.Packed, alibi_slopes: Tensor | None, sinks: Tensor | None) -> Inputs:
    query, key, value, cu_seqlens_q, cu_seqlens_k = packed
    check_packed(query, key, value)
    x = gather((query, key, value, None, None, alibi_slopes, sinks), None)
    return x._replace(
        query=x.query.transpose(0, 1).unsqueeze(0),  # [1, H, T, D]
        key=x.key.transpose(0, 1).unsqueeze(0),
        value=x.value.transpose(0, 1).unsqueeze(0),
        cu_seqlens_q=as_offsets("cu_seqlens_q", cu_seqlens_q),
        cu_seqlens_k=as_offsets("cu_seqlens_k", cu_seqlens_k),
    )


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_lse: Literal[False] = False,
    return_weights: None = None,
    **options: Any,
) -> Tensor: ...


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_lse: bool = False,
    return_weights: WeightsMode | None = None,
    **options: Any,
) -> AttentionResult: ...


def attention(  # type: ignore[misc]  # the overloads leave the options to this signature
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    block_map: Tensor | None = None,
    block_size: tuple[int, int] | None = None,
    causal: Causal | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    batch_invariant: bool = False,
    return_lse: bool = False,
    return_weights: WeightsMode | None = None,
    precision: Precision | None = None,
) -> Tensor | AttentionResult:
    """Exact softmax attention with O(M + N) memory.

    A row that sees no key gives zeros, lse -inf and zero gradients. Keys that are hidden never reach the result, even
    where they hold NaN. The output lies in memory in the query's order of dimensions.

    Query, key and value may be nested tensors (`torch.nested`) [B, H, *, D] of either layout: packed sequences, without
    mask, bias, key_lengths, block_map and return_weights. Output and lse are then nested like the query.

    Args:
        query: [B, H, M, D]; float32, bfloat16, float16 or float64; any strides (a last dimension that is not
            contiguous is copied).
        key: [B, HK, N, D]; H is a multiple of HK: query head h reads key/value head h // (H // HK).
        value: [B, HK, N, DV].
        mask: bool (True is visible) or floating (added to the scores; -inf hides), broadcastable to [B, H, M, N].
        bias: floating, added to the scores, broadcastable to [B, H, M, N]; its gradient is deterministic.
        alibi_slopes: [H] or [B, H]; -slope * |diagonal - column| is added (Press et al., "ALiBi", 2022).
        sinks: [H]; exp(sink) joins the softmax's denominator (as in gpt-oss).
        key_lengths: [B] integers; keys at and past the length are hidden.
        block_map: bool [B|1, H|1, ceil(M / BM), ceil(N / BN)]; False hides a block of scores: row i and key j are in
            block (i // BM, j // BN). What kernels find hidden they do not read, and take no time for.
        block_size: (BM, BN), the rows and keys of a block of `block_map`. Any; kernels take multiples of 16 keys.
        causal: hide keys right of the diagonal. "top_left": row i's diagonal is key i (torch's `is_causal`);
            "bottom_right": key i + N - M (N is `key_lengths[b]` where given), for decoding.
        window: (left, right): hide keys farther than this from the diagonal; None is open. Without `causal` the
            diagonal is that of "top_left".
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2).
        scale: multiplies QK^T; default 1 / sqrt(D).
        dropout_p: probability that a weight is zeroed, from torch's generator; the others grow by 1 / (1 - p).
        batch_invariant: rows are bit-equal whatever else is in the batch.
        return_lse: also return the log-sum-exp of the scores.
        return_weights: also return the attention weights, averaged over heads ("mean") or per head ("heads").
        precision: None, products in the precision of the inputs; "fp8", in float8 e4m3: query, key and value, bfloat16
            or float16, are rounded to 4 bits with a scale for each block of 128 rows of a head, the weights likewise;
            on sm_90. "int8": query and key, not of float64, are rounded to 8 bits with a scale for each row, the key
            less its mean over the keys of its head; on processors with AMX or AVX-512's bfloat16 products. Both are
            forward only. An infinity in query, and with "fp8" in key, counts as NaN; other numbers that are not finite,
            or float32 keys or values below 2^-100 or above 2^127, make "int8" compute in the precision of the inputs.

    Returns:
        The output [B, H, M, DV], or an `AttentionResult` if `return_lse` or `return_weights` is set.

    Raises:
        ArgumentError: (a ValueError) a shape, dtype, device or value is wrong; nothing was launched.
        TypeError: an argument has the wrong type.
        BackendError: the backend named by `use_backend` does not support the call, or none does (`precision`).
    """
    if varlen.any_nested(query, key, value):
        refused: dict[str, object] = {"mask": mask, "bias": bias, "key_lengths": key_lengths}
        refused |= {"block_map": block_map, "block_size": block_size, "return_weights": return_weights}
        return _nested(
            varlen.from_nested(query, key, value, refused),
            query,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            causal=causal,
            window=window,
            softcap=softcap,
            scale=scale,
            dropout_p=dropout_p,
            batch_invariant=batch_invariant,
            return_lse=return_lse,
            precision=precision,
        )
    left, right = (None, None) if window is None else window_sides(window)
    x = gather((query, key, value, mask, bias, alibi_slopes, sinks), key_lengths, block_map)
    o = Options(causal, left, right, softcap, scale, dropout_p, batch_invariant, return_weights, precision=precision)
    out = _run(x, _with_blocks(o, block_size))
    if not return_lse and return_weights is None:
        return out.output
    return AttentionResult(out.output, out.lse if return_lse else None, out.weights)


def _with_blocks(o: Options, block_size: tuple[int, int] | None) -> Options:
    rows, columns = block_sides(block_size)
    return o if rows is columns is None else o._replace(block_rows=rows, block_columns=columns)


def _nested(x: varlen.Packed, like: Tensor, **options: Any) -> Tensor | AttentionResult:
    """`varlen_attention` on nested tensors, and the results nested as `like` is."""
    out = varlen_attention(*x, **options)
    if isinstance(out, Tensor):
        return varlen.to_nested(out, x.cu_seqlens_q, like)
    output, lse, _ = out
    assert lse is not None
    lse = varlen.to_nested(lse.transpose(0, 1), x.cu_seqlens_q, like)
    return AttentionResult(varlen.to_nested(output, x.cu_seqlens_q, like), lse, None)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    causal: Causal | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    batch_invariant: bool = False,
    return_lse: bool = False,
    precision: Precision | None = None,
) -> Tensor | AttentionResult:
    """`attention` over packed sequences of different lengths, none of which sees another.

    Args:
        query: [T, H, D], the sequences one after another.
        key: [TK, HK, D].
        value: [TK, HK, DV].
        cu_seqlens_q: [B + 1] integers, where each sequence starts in `query`; from 0 to T. A sequence may be empty.
        cu_seqlens_k: [B + 1] integers, likewise in `key` and `value`.
        max_seqlen_q: the longest query sequence; found from `cu_seqlens_q` when None.
        max_seqlen_k: the longest key sequence.
        alibi_slopes: [H] or [B, H].

    The other arguments and the errors are those of `attention`; alignments count within each sequence.

    Returns:
        The output [T, H, DV], or an `AttentionResult` with lse [H, T] if `return_lse` is set.
    """
    left, right = window_sides(window)
    x = _gather_packed(varlen.Packed(query, key, value, cu_seqlens_q, cu_seqlens_k), alibi_slopes, sinks)
    options = (causal, left, right, softcap, scale, dropout_p, batch_invariant, None)
    out = _run(x, Options(*options, max_seqlen_q, max_seqlen_k, precision=precision))
    output = out.output.squeeze(0).transpose(0, 1)
    return AttentionResult(output, out.lse.squeeze(0), None) if return_lse else output


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    block_map: Tensor | None = None,
    block_size: tuple[int, int] | None = None,
    causal: Causal | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    batch_invariant: bool = False,
    return_lse: bool = False,
    return_weights: WeightsMode | None = None,
    precision: Precision | None = None,
    device: str | None = None,
) -> dispatch.Explanation:
    """Which backend would run this call of `attention`, and why each other one would not. Nothing is computed.

    Takes the arguments of `attention`, and raises as it does.

    Args:
        device: as if the tensors were on another device, which need not be here: "cpu", "cuda:sm_90", "cuda:gfx942".

    Returns:
        An `Explanation`: `str()` of it is a table for people, `to_dict()` plain data for machines.
    """
    left, right = window_sides(window)
    if varlen.any_nested(query, key, value):
        refused: dict[str, object] = {"mask": mask, "bias": bias, "key_lengths": key_lengths}
        refused |= {"block_map": block_map, "block_size": block_size, "return_weights": return_weights}
        x = _gather_packed(varlen.from_nested(query, key, value, refused), alibi_slopes, sinks)
    else:
        x = gather((query, key, value, mask, bias, alibi_slopes, sinks), key_lengths, block_map)
    o = Options(causal, left, right, softcap, scale, dropout_p, batch_invariant, return_weights, precision=precision)
    spec = make_spec(x, _with_blocks(o, block_size))
    where = Device.of(x.query) if device is None else Device.parse(device)
    return dispatch.explain(spec, where, _notes(x, spec))


def _notes(x: Inputs, spec: AttentionSpec) -> list[str]:
    notes: list[str] = []
    for name in ("query", "key", "value"):
        t = getattr(x, name)
        if t.stride(-1) != 1 and t.shape[-1] > 1:
            notes.append(f"{name} is copied: its last dimension has stride {t.stride(-1)}, not 1")
    if spec.gradients:
        notes.append("a second derivative runs through the reference's graph, O(M N) memory")
    if spec.precision == "fp8":
        notes.append("query, key and value become float8 codes first, in memory of half their size")
    if spec.precision == "int8":
        notes.append("query and key become int8 codes first, with a scale for each row")
    if spec.weights:
        shape = (spec.batch, spec.rows, spec.columns)
        full = shape if spec.weights == "mean" else (spec.batch, spec.heads, *shape[1:])
        notes.append(f"the weights asked for are a tensor of {list(full)}, O(M N) memory")
    return notes
