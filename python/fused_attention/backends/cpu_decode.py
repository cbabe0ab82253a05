"""Decoding by the C++ kernels: few rows read the cache where it lies, more of them a copy in the query's dtype."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..cache import Cache, DecodeInputs, DecodeSpec, PagedKVCache
from ..layout import rows_contiguous
from ..spec import Device, Inputs, Outputs
from . import cpu, reference_decode
from .params import _C, Call, call_of, describe, put_outputs

MOST_ROWS = 16  # of a query that reads a cache in place (csrc/params.h); more of them pay for a copy


def supports(spec: DecodeSpec, device: Device) -> str | None:
    """None if these kernels run `spec` on `device`, otherwise the reason why not."""
    return cpu.supports(spec.attention(spec.capacity, spec.dtype), device)


def reads_in_place(spec: DecodeSpec) -> bool:
    """Whether keys and values are read where they lie."""
    return torch.float64 not in (spec.dtype, spec.kv_dtype) and spec.rows <= MOST_ROWS


def _writes(spec: DecodeSpec) -> bool:
    """Whether the kernels append the new tokens: those that are stored as they come."""
    as_they_come = spec.kv_dtype == spec.dtype and not spec.rotary_dim
    return spec.appends and spec.heads > 0 and as_they_come and reads_in_place(spec)


def _launch(call: Call, out: Outputs, tree_mask: Tensor | None) -> Outputs:
    assert _C is not None
    call.args["threads"] = torch.get_num_threads()
    if tree_mask is not None:
        call.put_broadcast("tree", tree_mask)
    _C.attention_forward(call.args)
    return out


@functools.lru_cache(maxsize=1024)
def _described(spec: DecodeSpec) -> dict[str, Any]:
    """The arguments of every step like this one, but for the number of keys."""
    return describe(spec.attention(spec.capacity, spec.dtype))


def _in_place(spec: DecodeSpec, cache: Cache, x: DecodeInputs, columns: int) -> Outputs:
    call = Call(_described(spec) | {"N": columns})
    for name, t in (("q", rows_contiguous(x.query)), ("k", cache.key), ("v", cache.value)):
        call.put(name, t)
    if _writes(spec):
        assert x.key is not None and x.value is not None
        call.put("new_k", rows_contiguous(x.key))
        call.put("new_v", rows_contiguous(x.value))
    if x.alibi_slopes is not None:
        call.put_broadcast("alibi", x.alibi_slopes.to(torch.float32))
    if x.sinks is not None:
        call.put("sinks", x.sinks.to(spec.lse_dtype))
    call.args |= {"lengths": cache.lengths.data_ptr(), "long_lengths": cache.lengths.dtype == torch.int64}
    if cache.key_scale is not None and cache.value_scale is not None:
        call.put("k_scale", cache.key_scale)
        call.put("v_scale", cache.value_scale)
    if isinstance(cache, PagedKVCache):
        table = rows_contiguous(cache.block_table)
        call.put_address("table", table)
        call.args |= {"table_step": table.stride(0), "pages": cache.num_pages, "page_size": cache.page_size}
    out = put_outputs(call, spec.attention(spec.capacity, spec.dtype), Inputs(x.query, cache.key, cache.value))
    return _launch(call, out, x.tree_mask)


def _gathered(spec: DecodeSpec, cache: Cache, x: DecodeInputs, columns: int) -> Outputs:
    """Codes become float32, in which they are exact."""
    dtype = spec.lse_dtype if spec.quantised else spec.dtype
    key, value = reference_decode.dense(cache, columns, dtype)
    lengths = cache.lengths.long()
    inputs = Inputs(x.query.to(dtype), key, value, None, None, x.alibi_slopes, x.sinks, lengths)
    attention = spec.attention(columns, dtype)
    call = call_of(attention, inputs)
    out = _launch(call, put_outputs(call, attention, inputs), x.tree_mask)
    return out._replace(output=out.output.to(spec.dtype))


def forward(spec: DecodeSpec, cache: Cache, x: DecodeInputs) -> Outputs:
    """One step of decoding: append, then attend."""
    new = 0
    if _writes(spec):
        new = spec.rows
    else:
        x = x._replace(query=reference_decode.append(spec, cache, x))
    # The kernels' order of summation may follow the number of columns, which must not follow the rest of the batch.
    columns = spec.capacity
    if not spec.batch_invariant:
        columns = min(columns, reference_decode.longest(cache) + new)
    return (_in_place if reads_in_place(spec) else _gathered)(spec, cache, x, columns)
