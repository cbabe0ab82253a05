"""Incremental inference: a few rows of queries against a cache of keys and values, which grows in place.

What is new is appended first; then, where row i of a sequence stands at position lengths - M + i,

    output = attention(rope(query), K, V, key_lengths=lengths, causal="bottom_right")
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import cpu_decode, cuda_decode, reference_decode, triton
from .cache import Cache, DecodeInputs, DecodeSpec, KVCache, PagedKVCache, check_step, describe, refuse
from .dispatch import choose, requested
from .functional import AttentionResult, any_autocast, autocast, is_traced
from .layout import output_like
from .spec import Device, Options, Outputs, Window, check_options, readable, window_sides

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
    page = cache.window if isinstance(cache, KVCache) else (cache.page_size, cache.num_pages, cache.block_table.shape)
    held = (type(cache), cache.key.shape, cache.value.shape, cache.kv_dtype, page)
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


# --- the function ---------------------------------------------------------------------------------------------------


def decode_attention(
    query: Tensor,
    cache: Cache,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    rope: tuple[Tensor, Tensor, bool] | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    tree_mask: Tensor | None = None,
    batch_invariant: bool = False,
    return_lse: bool = False,
    chunk: int | None = None,
) -> Tensor | AttentionResult:
    """Attention of the last M tokens of every sequence to what its cache holds, new tokens appended first.

    Row i of sequence b stands at position lengths[b] - M + i and sees the keys up to there. A sequence of length 0
    gives zeros and lse -inf. Not differentiable: an input that requires grad is an error unless under
    `torch.no_grad()`. Nothing synchronises with a GPU, so that a CUDA graph can hold a step; what cannot be checked
    there without looking (a sequence longer than its cache, a page that does not exist, a position outside the tables)
    gives NaN in the rows that it concerns.

    Args:
        query: [B, H, M, D]; float32, bfloat16, float16 or float64; any M, made for a few rows.
        cache: a `KVCache` or `PagedKVCache` for B sequences, in the query's dtype, a narrower one that is exact in it,
            int8 or float8_e4m3fn. A rolling one forgets, and one that a pool manages takes pages, as tokens come.
        key: [B, HK, M, D], new tokens to append in place, at positions lengths[b] .. lengths[b] + M - 1; the lengths
            grow by M. None: nothing is appended.
        value: [B, HK, M, DV], likewise.
        rope: (cos, sin, interleaved), tables [L, R/2] float32 with R <= D: the first R dims of query and new key are
            rotated at their positions, pairs (i, i + R/2) or, interleaved, (2i, 2i + 1), in float32 and before
            rounding (Su et al., "RoFormer", 2021). What the cache holds is rotated already. Tokens that a rolling cache
            has forgotten are counted.
        alibi_slopes: [H] or [B, H]; -slope * distance is added.
        sinks: [H]; exp(sink) joins the softmax's denominator.
        window: (left, right): keys farther left than this from a row's position are hidden; None is open. What lies to
            the right is hidden by causality.
        softcap: scores become softcap * tanh(scores / softcap).
        scale: multiplies QK^T; default 1 / sqrt(D).
        tree_mask: bool [B|1, M, M]: row i sees row j of the last M tokens if tree_mask[b, i, j], and every token
            before them: drafted tokens that branch (Miao et al., "SpecInfer", 2023). The diagonal is True. Row i then
            stands at position lengths[b] - M + (how many of the M it sees beside itself), its depth in the tree, by
            which `rope`, `window` and `alibi_slopes` count. `cache.keep` keeps the accepted ones.
        batch_invariant: rows are bit-equal whatever else is in the batch: the number of splits of the keys follows
            from the capacity alone.
        return_lse: also return the log-sum-exp of the scores.
        chunk: append and attend so many tokens at a time, as for a prompt whose scores or whose copy of a quantised or
            paged cache would be too large at once; without new tokens it changes nothing. None: all at once, but no
            more than a rolling cache has room for beside its window.

    Returns:
        The output [B, H, M, DV] in the query's dtype and memory order, or an `AttentionResult` with lse [B, H, M],
        float32 (float64 for float64 queries), if `return_lse` is set.

    Raises:
        ArgumentError: (a ValueError) a shape, dtype, device or value is wrong; nothing was written.
        TypeError: an argument has the wrong type.
        BackendError: the backend named by `use_backend` does not support the call.
    """
    left, right = window_sides(window)
    cos, sin, interleaved = _rope(rope)
    if any_autocast():
        query, key, value = autocast(query, key, value)
    if isinstance(alibi_slopes, Tensor) and alibi_slopes.dim() == 1:
        alibi_slopes = alibi_slopes[None]
    x = DecodeInputs(query, key, value, cos, sin, alibi_slopes, sinks, tree_mask)
    options = Options(window_left=left, window_right=right, softcap=softcap, scale=scale)
    options = options._replace(batch_invariant=batch_invariant)
    if isinstance(cache, PagedKVCache):
        cache.refresh()
    spec, run = _select(cache, x, options, interleaved)
    chunk = _chunk(cache, x, chunk)
    with torch.no_grad():
        out = _in_chunks(run, spec, cache, x, chunk)
    return AttentionResult(out.output, out.lse, None) if return_lse else out.output


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


def _rope(rope: object) -> tuple[Tensor | None, Tensor | None, bool]:
    if rope is None:
        return None, None, False
    if not isinstance(rope, (tuple, list)) or len(rope) != 3:
        raise TypeError(f"rope: got {type(rope).__name__}, expected (cos, sin, interleaved) or None")
    return rope[0], rope[1], rope[2]
