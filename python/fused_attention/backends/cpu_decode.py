"""Decoding by the C++ kernels: few rows read the cache where it lies, more of them a copy in the query's dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache import Cache, DecodeInputs, DecodeSpec, PagedKVCache
from ..layout import rows_contiguous
from ..spec import AttentionSpec, Device, Inputs, Outputs
from . import cpu, reference_decode
from .params import _C, Call, call_of, put_outputs

MOST_ROWS = 16  # of a query that reads a cache in place (csrc/params.h); more of them pay for a copy


def supports(spec: DecodeSpec, device: Device) -> str | None:
    """None if these kernels run `spec` on `device`, otherwise the reason why not."""
    if spec.tree and (spec.window is not None or spec.alibi_slopes):
        return "no window and no ALiBi under a tree mask"
    return cpu.supports(spec.attention(spec.capacity, spec.dtype), device)


def reads_in_place(spec: DecodeSpec) -> bool:
    """Whether keys and values are read where they lie."""
    return torch.float64 not in (spec.dtype, spec.kv_dtype) and spec.rows <= MOST_ROWS


def _launch(attention: AttentionSpec, inputs: Inputs, x: DecodeInputs, call: Call) -> Outputs:
    assert _C is not None
    call.args["threads"] = torch.get_num_threads()
    if x.tree_mask is not None:
        call.put_broadcast("tree", x.tree_mask)
    out = put_outputs(call, attention, inputs)
    _C.attention_forward(call.args)
    return out


def _in_place(spec: DecodeSpec, cache: Cache, x: DecodeInputs, columns: int) -> Outputs:
    attention = spec.attention(columns, spec.dtype)
    lengths = cache.lengths.long()
    inputs = Inputs(x.query, cache.key, cache.value, alibi_slopes=x.alibi_slopes, sinks=x.sinks, key_lengths=lengths)
    call = call_of(attention, inputs)
    call.args["cached"] = True
    if cache.key_scale is not None and cache.value_scale is not None:
        call.put("k_scale", cache.key_scale)
        call.put("v_scale", cache.value_scale)
    if isinstance(cache, PagedKVCache):
        table = rows_contiguous(cache.block_table)
        call.put_address("table", table)
        call.args |= {"table_step": table.stride(0), "pages": cache.num_pages, "page_size": cache.page_size}
    return _launch(attention, inputs, x, call)


def _gathered(spec: DecodeSpec, cache: Cache, x: DecodeInputs, columns: int) -> Outputs:
    """Codes become float32, in which they are exact."""
    dtype = spec.lse_dtype if spec.quantised else spec.dtype
    key, value = reference_decode.dense(cache, columns, dtype)
    lengths = cache.lengths.long()
    inputs = Inputs(x.query.to(dtype), key, value, None, None, x.alibi_slopes, x.sinks, lengths)
    attention = spec.attention(columns, dtype)
    out = _launch(attention, inputs, x, call_of(attention, inputs))
    return out._replace(output=out.output.to(spec.dtype))


def attend(spec: DecodeSpec, cache: Cache, x: DecodeInputs) -> Outputs:
    """Attention of x.query, already rotated, to what the cache holds."""
    # The kernels' order of summation may follow the number of columns, which must not follow the rest of the batch.
    columns = spec.capacity if spec.batch_invariant else reference_decode.longest(cache)
    return (_in_place if reads_in_place(spec) else _gathered)(spec, cache, x, columns)


def forward(spec: DecodeSpec, cache: Cache, x: DecodeInputs) -> Outputs:
    """One step of decoding: append, then attend."""
    query: Tensor = reference_decode.append(spec, cache, x)
    return attend(spec, cache, x._replace(query=query))
