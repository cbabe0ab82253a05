"""Who decodes one call of `decode_attention`, and the steps of which it consists: make room, append and attend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import cpu_decode, cuda_decode, reference_decode, triton
from .cache import Cache, DecodeInputs, DecodeSpec, KVCache, PagedKVCache, check_step, describe, refuse
from .dispatch import choose, requested
from .layout import output_like
from .spec import Device, Options, Outputs, check_options, readable
from .tracing import is_traced, uncompiled

# --- backends -----------------------------------------------------------------------------------------------------


def _triton_supports(spec: DecodeSpec, device: Device) -> str | None:
    reason = triton.supports(spec.attention(spec.capacity, spec.dtype), device)
    if reason is not None:
        return reason
    from .backends.triton import decode

    return decode.supports_decode(spec, device)


def _triton(spec: DecodeSpec, cache: Cache, x: DecodeInputs) -> Outputs:
    from .backends.triton import decode

    return decode.forward(spec, cache, x)


Run = Callable[[DecodeSpec, Cache, DecodeInputs], Outputs]


class Backend(NamedTuple):
    """Who decodes: `supports` gives None or the reason why not."""

    supports: Callable[[DecodeSpec, Device], str | None]
    run: Run


# In order of preference; the reference refuses nothing.
BACKENDS = {
    "cpu": Backend(cpu_decode.supports, cpu_decode.forward),
    "cuda": Backend(cuda_decode.supports, cuda_decode.forward),
    "triton": Backend(_triton_supports, _triton),
    "reference": Backend(lambda spec, device: None, reference_decode.forward),
}


# Kinds of calls that have been validated, and who runs them.
_KNOWN: dict[Any, tuple[DecodeSpec, Run]] = {}
_MOST_KINDS = 4096


def _kind(cache: Cache, x: DecodeInputs, o: Options) -> Any:
    """All that decides about an eager call of query, key and value alone; None for another one."""
    q, k, v, *others = x
    if not isinstance(cache, (KVCache, PagedKVCache)) or not isinstance(q, Tensor) or is_traced(q):
        return None
    if any(t is not None for t in others):
        return None
    new: tuple[Any, ...] = ()
    if k is not None or v is not None:
        if not (isinstance(k, Tensor) and isinstance(v, Tensor)):
            return None
        new = (k.shape, k.dtype, k.layout, k.device, v.shape, v.dtype, v.layout, v.device)
    check_options(o)  # before it is a key: True equals 1 there, and a list cannot be hashed
    pages = None if isinstance(cache, KVCache) else (cache.page_size, cache.num_pages, cache.block_table.shape)
    held = (type(cache), cache.key.shape, cache.value.shape, cache.kv_dtype, cache.window, pages)
    return held, q.shape, q.dtype, q.layout, q.device, new, o, requested()


def _select(cache: Cache, x: DecodeInputs, o: Options, interleaved: bool) -> tuple[DecodeSpec, Run]:
    """Validate a call and choose who runs it: whole once per kind of call, then only what changes with every step."""
    kind = _kind(cache, x, o)
    if kind in _KNOWN:
        check_step(cache, x, o)
        return _KNOWN[kind]
    spec = describe(cache, x, o, interleaved)
    device = Device.of(x.query)
    chosen = choose(BACKENDS, lambda n: BACKENDS[n].supports(spec, device), "decodes with the eager reference", 4)
    found = spec, BACKENDS[chosen.backend].run
    if kind is not None and chosen.backend != "reference":  # which warns, every time
        if len(_KNOWN) >= _MOST_KINDS:
            _KNOWN.clear()
        _KNOWN[kind] = found
    return found


# --- a call ----------------------------------------------------------------------------------------------------------


@uncompiled  # a cache that counts on the host what it holds is in no graph; the others are traced as an op
def decode(cache: Cache, x: DecodeInputs, o: Options, interleaved: bool, chunk: int | None) -> Outputs:
    """Validate a call, append what is new to the cache and attend to what it then holds; no weights.

    Raises as `decode_attention` does.
    """
    if isinstance(cache, PagedKVCache):
        cache.refresh()
    spec, run = _select(cache, x, o, interleaved)
    chunk = _chunk(cache, x, chunk)
    with torch.no_grad():
        return _in_chunks(run, spec, cache, x, chunk)


def _chunk(cache: Cache, x: DecodeInputs, chunk: int | None) -> int:
    """How many rows to take at a time; 0: all of them."""
    if chunk is not None:
        if isinstance(chunk, bool) or not isinstance(chunk, int):
            raise TypeError(f"chunk: got {chunk!r}, expected an int or None")
        if chunk < 1:
            refuse("chunk", chunk, "at least 1")
    if x.key is None:
        return 0  # rows without keys are the last ones of what the cache holds: no part of them is
    if isinstance(cache, KVCache) and cache.window is not None:
        most = cache.capacity - cache.window
        chunk = most if chunk is None else min(chunk, most)
    if chunk is None or chunk >= x.query.shape[2]:
        return 0
    if x.tree_mask is not None:
        refuse("tree_mask", f"a Tensor for {x.query.shape[2]} rows", f"None where rows come {chunk} at a time")
    return chunk


def _in_chunks(run: Run, spec: DecodeSpec, cache: Cache, x: DecodeInputs, chunk: int) -> Outputs:
    """Make room, append and attend; `chunk` rows at a time, if it is not 0."""
    appended = spec.rows if spec.appends else 0
    if isinstance(cache, PagedKVCache):
        cache.make_room(appended)  # for all of them, or it raises before anything is written
    if not chunk:
        return _step(run, spec, cache, x)
    assert x.key is not None and x.value is not None
    output = output_like(x.query, spec.batch, spec.value_dim)
    lse = x.query.new_empty(x.query.shape[:3], dtype=spec.lse_dtype)
    for first in range(0, spec.rows, chunk):
        rows = slice(first, min(first + chunk, spec.rows))
        part = x._replace(query=x.query[:, :, rows], key=x.key[:, :, rows], value=x.value[:, :, rows])
        out = _step(run, replace(spec, rows=rows.stop - first), cache, part)
        output[:, :, rows], lse[:, :, rows] = out.output, out.lse
    return Outputs(output, lse, None)


def _step(run: Run, spec: DecodeSpec, cache: Cache, x: DecodeInputs) -> Outputs:
    appended = spec.rows if spec.appends else 0
    if isinstance(cache, KVCache):
        cache.make_room(appended)
        if spec.rolling and not appended and not readable(cache.lengths):
            cache = _unforgotten(spec, cache)
    out = run(spec, cache, x)
    cache.advance(appended)
    return out


def _unforgotten(spec: DecodeSpec, cache: KVCache) -> KVCache:
    """The cache without the sequences whose windows it no longer holds: longer than the capacity, they give NaN."""
    assert spec.window is not None and spec.window[0] is not None and cache.dropped is not None
    lost = (cache.dropped > 0) & (cache.lengths < spec.window[0] + spec.rows)
    return replace(cache, lengths=cache.lengths.masked_fill(lost, cache.capacity + 1))
