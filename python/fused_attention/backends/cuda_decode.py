"""Decoding by the CUDA C++ kernels: append, attend in splits, combine. Nothing waits for the device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..cache import Cache, DecodeInputs, DecodeSpec, PagedKVCache
from ..layout import output_like, rows_contiguous
from ..spec import Device, Outputs
from . import cuda
from .params import Call

LEAST_KEYS = 256  # of a split: below, the partial results weigh as much as the keys read
FIXED_KEYS = 512  # of a split whose number follows from the capacity alone; 8k keys on 8 heads then fill 128 SMs
MOST_SPLITS = 128


def supports(spec: DecodeSpec, device: Device) -> str | None:
    """None if these kernels run `spec` on `device`, otherwise the reason why not."""
    if spec.tree:
        return "no tree masks"
    if spec.rolling and spec.rotary_dim:
        return "no rotation at the positions of a rolling cache"
    return cuda.supports(spec.attention(spec.capacity, spec.dtype), device)


def split_count(spec: DecodeSpec, processors: int) -> int:
    """Into how many parts the keys are split: the smallest number that fills the last wave of blocks nearly as well as
    any does. With batch_invariant a number that follows from the keys alone."""
    left = spec.window[0] if spec.window else None
    keys = spec.capacity if left is None else min(spec.capacity, left + spec.rows)
    if spec.batch_invariant:
        return max(1, min(MOST_SPLITS, keys // FIXED_KEYS))
    most = max(1, min(MOST_SPLITS, keys // LEAST_KEYS))
    blocks = max(1, spec.batch * spec.kv_heads * -(-spec.rows * spec.group // 16))

    def filled(splits: int) -> float:
        return blocks * splits / (-(-blocks * splits // processors) * processors)

    enough = 0.85 * max(map(filled, range(1, most + 1)))
    return next(n for n in range(1, most + 1) if filled(n) >= enough)


@functools.lru_cache(maxsize=16)
def _processors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _call(spec: DecodeSpec, cache: Cache) -> Call:
    """A call with the sizes and the cache."""
    call = Call({"B": spec.batch, "H": spec.heads, "HK": spec.kv_heads, "M": spec.rows})
    call.args |= {"D": spec.head_dim, "DV": spec.value_dim, "capacity": spec.capacity}
    for name, t in (("k", cache.key), ("v", cache.value), ("k_scale", cache.key_scale), ("v_scale", cache.value_scale)):
        if t is not None:
            call.put(name, t)
    if isinstance(cache, PagedKVCache):
        table = cache.block_table.contiguous()
        call.put_address("table", table)
        call.args |= {"table_step": table.stride(0), "pages": cache.num_pages, "page_size": cache.page_size}
    call.put_address("lengths", cache.lengths)
    call.args["long_lengths"] = cache.lengths.dtype == torch.int64
    return call


def _append(spec: DecodeSpec, cache: Cache, x: DecodeInputs) -> Tensor:
    """Write the new tokens, which the lengths count already; returns the query, turned where there are tables."""
    call, query = _call(spec, cache), x.query
    if x.key is not None and x.value is not None:
        call.put("key", rows_contiguous(x.key))
        call.put("value", rows_contiguous(x.value))
    if x.cos is not None and x.sin is not None:
        query = output_like(x.query, spec.batch, spec.head_dim)
        call.put("query", rows_contiguous(x.query))
        call.put("turned", query)
        call.put("cos", rows_contiguous(x.cos))
        call.put("sin", rows_contiguous(x.sin))
        call.args |= {"positions": x.cos.shape[0], "rotary_dim": spec.rotary_dim, "interleaved": spec.interleaved}
    cuda.run("append", call, x.query)
    return query


def attend(spec: DecodeSpec, cache: Cache, x: DecodeInputs, splits: int) -> Outputs:
    """Attention of x.query, already turned, to what the cache holds."""
    call = _call(spec, cache)
    call.args |= {"scale": spec.scale, "softcap": spec.softcap or 0.0, "splits": splits}
    if spec.window and spec.window[0] is not None:
        call.args["window_left"] = spec.window[0]
    call.put("q", rows_contiguous(x.query))
    if x.alibi_slopes is not None:
        call.put_broadcast("alibi", x.alibi_slopes.to(torch.float32))
    if x.sinks is not None:
        call.put("sinks", x.sinks.to(torch.float32))
    output = output_like(x.query, spec.batch, spec.value_dim)
    lse = x.query.new_empty(x.query.shape[:3], dtype=torch.float32)
    call.put("out", output)
    call.put("lse", lse)
    if splits > 1:
        call.put("partial", lse.new_empty(lse.numel(), splits, spec.value_dim))
        call.put("stats", lse.new_empty(lse.numel(), splits, 2))
    cuda.run("decode", call, x.query)
    return Outputs(output, lse, None)


def forward(spec: DecodeSpec, cache: Cache, x: DecodeInputs) -> Outputs:
    """Append the new tokens in place, then let the query attend."""
    if spec.appends:
        cache.lengths.add_(spec.rows)
    if spec.appends or spec.rotary_dim:
        x = x._replace(query=_append(spec, cache, x))
    return attend(spec, cache, x, split_count(spec, _processors(x.query.device.index)))
