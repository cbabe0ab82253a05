"""Incremental inference: a few rows of queries against a cache of keys and values, which grows in place.

What is new is appended first; then, where row i of a sequence stands at position lengths - M + i,

    output = attention(rope(query), K, V, key_lengths=lengths, causal="bottom_right")
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .backends import cpu_decode, cuda_decode, reference_decode, triton
from .cache import Cache, DecodeInputs, DecodeSpec, KVCache, PagedKVCache, refuse, storable
from .dispatch import choose
from .functional import AttentionResult, any_autocast, autocast
from .layout import output_like
from .spec import (
    FLOAT_DTYPES,
    Device,
    Inputs,
    Options,
    Outputs,
    Window,
    check_options,
    check_vector,
    need_tensor,
    readable,
    shape_of,
    window_sides,
)

# --- checks ------------------------------------------------------------------------------------------------------


def _check_query(cache: Cache, query: Tensor) -> None:
    need_tensor("query", query, optional=False)
    if query.layout != torch.strided or query.dim() != 4:
        refuse("query", f"{query.layout} {shape_of(query)}", "a strided tensor [B, H, M, D]")
    if not storable(query.dtype, cache.kv_dtype):
        refuse("query.dtype", query.dtype, f"a floating dtype in which the cache's {cache.kv_dtype} is exact")
    if query.device != cache.key.device:
        refuse("query.device", query.device, f"the cache's {cache.key.device}")
    batch, heads, _, head_dim = query.shape
    if batch != cache.batch:
        refuse("query", f"batch size {batch} in {shape_of(query)}", f"the cache's batch size {cache.batch}")
    if heads % cache.kv_heads:
        refuse("query", f"{heads} heads in {shape_of(query)}", f"a multiple of the cache's {cache.kv_heads} heads")
    if head_dim != cache.head_dim:
        refuse("query", f"head dim {head_dim} in {shape_of(query)}", f"the cache's head dim {cache.head_dim}")


def _check_new(cache: Cache, x: DecodeInputs) -> None:
    if (x.key is None) != (x.value is None):
        given, missing = ("value", "key") if x.key is None else ("key", "value")
        refuse(missing, f"None beside a {given}", "both key and value, or neither")
    for name, t, dim in (("key", x.key, cache.head_dim), ("value", x.value, cache.value_dim)):
        need_tensor(name, t)
        if t is None:
            continue
        shape = (cache.batch, cache.kv_heads, x.query.shape[2], dim)
        if t.layout != torch.strided or tuple(t.shape) != shape:
            refuse(name, f"{t.layout} {shape_of(t)}", f"a strided tensor {list(shape)}, as query and the cache")
        if t.dtype != x.query.dtype:
            refuse(f"{name}.dtype", t.dtype, f"query's {x.query.dtype}")
        if t.device != x.query.device:
            refuse(f"{name}.device", t.device, f"query's {x.query.device}")


def _check_rope(x: DecodeInputs, interleaved: object) -> None:
    for name, t in (("rope[0] (cos)", x.cos), ("rope[1] (sin)", x.sin)):
        need_tensor(name, t, optional=False)
        assert t is not None and x.cos is not None
        if t.dtype != torch.float32 or t.dim() != 2 or t.shape != x.cos.shape:
            refuse(name, f"{t.dtype} {shape_of(t)}", "float32 [L, R/2], cos and sin alike")
        if not 1 <= t.shape[1] <= x.query.shape[3] // 2:
            refuse(name, f"shape {shape_of(t)}", f"[L, R/2] with R in 2 .. the head dim {x.query.shape[3]}")
        if t.device != x.query.device:
            refuse(f"{name}.device", t.device, f"query's {x.query.device}")
    if not isinstance(interleaved, bool):
        raise TypeError(f"rope[2] (interleaved): got {interleaved!r}, expected a bool")


def _check_tree(x: DecodeInputs) -> None:
    t = x.tree_mask
    need_tensor("tree_mask", t)
    if t is None:
        return
    batch, _, rows, _ = x.query.shape
    if t.dtype != torch.bool:
        refuse("tree_mask.dtype", t.dtype, "bool")
    if tuple(t.shape) not in ((batch, rows, rows), (1, rows, rows)):
        refuse("tree_mask", f"shape {shape_of(t)}", f"[B|1, M, M] = {[batch, rows, rows]}")
    if t.device != x.query.device:
        refuse("tree_mask.device", t.device, f"query's {x.query.device}")
    if readable(t) and not t.diagonal(dim1=1, dim2=2).all():
        b, i = (~t.diagonal(dim1=1, dim2=2)).nonzero()[0].tolist()
        refuse(f"tree_mask[{b}, {i}, {i}]", False, "True: every row sees itself")


def _check_no_gradients(cache: Cache, x: DecodeInputs) -> None:
    if not torch.is_grad_enabled():
        return
    for name, t in (*zip(DecodeInputs._fields, x, strict=True), ("cache.key", cache.key), ("cache.value", cache.value)):
        if t is not None and t.requires_grad:
            refuse(name, "a tensor that requires grad", "none: decode_attention has no derivative (torch.no_grad())")


def _check_window(cache: KVCache, left: int | None) -> None:
    """What a rolling cache forgets, no row may want to see."""
    assert cache.window is not None
    if left is None or left > cache.window:
        refuse("window[0] (left)", left, f"at most the rolling cache's window, {cache.window}")


def _check_values(cache: Cache, x: DecodeInputs, left: int | None) -> None:
    """Lengths, room and page ids, on a CPU, where looking at them costs no synchronisation."""
    if not readable(cache.lengths) or not cache.batch:
        return
    rows = x.query.shape[2]
    appended = 0 if x.key is None else rows
    low, high = (int(n) for n in cache.lengths.aminmax())
    if low < 0:
        refuse("cache.lengths", f"a length of {low}", "lengths of at least 0")
    rolling = isinstance(cache, KVCache) and cache.window is not None
    if high + (0 if rolling else appended) > cache.capacity:  # a rolling cache makes room
        was = f"{high} tokens and {appended} new ones" if appended else f"a length of {high}"
        refuse("cache.lengths", was, f"at most the capacity, {cache.capacity}")
    if rolling:
        assert isinstance(cache, KVCache) and cache.dropped is not None and left is not None
        high = int(cache.positions.max())
        if not appended and ((cache.dropped > 0) & (cache.lengths < left + rows)).any():
            refuse("query", f"{rows} rows", "rows whose window the rolling cache has not forgotten, or a key beside it")
    if x.cos is not None and high + appended > x.cos.shape[0]:
        refuse("rope", f"tables of {x.cos.shape[0]} positions", f"at least {high + appended}, the longest sequence")
    if isinstance(cache, PagedKVCache):
        cache.check_pages(cache.lengths.long() + appended, rows, appended, left)


def describe(cache: Cache, x: DecodeInputs, o: Options, interleaved: bool = False) -> DecodeSpec:
    """Validate one call and describe it; nothing is written.

    Raises:
        ArgumentError: a shape, dtype, device or value is wrong.
        TypeError: an argument is of the wrong Python type.
    """
    if not isinstance(cache, (KVCache, PagedKVCache)):
        raise TypeError(f"cache: got {type(cache).__name__}, expected a KVCache or a PagedKVCache")
    check_options(o)
    _check_query(cache, x.query)
    _check_new(cache, x)
    if x.cos is not None or x.sin is not None:
        _check_rope(x, interleaved)
    like = Inputs(x.query, x.query, x.query)
    batch, heads, rows, head_dim = x.query.shape
    check_vector("alibi_slopes", x.alibi_slopes, like, ((batch, heads), (1, heads)))
    check_vector("sinks", x.sinks, like, ((heads,),))
    for name, t in (("alibi_slopes", x.alibi_slopes), ("sinks", x.sinks)):
        if t is not None and t.dtype not in FLOAT_DTYPES:
            refuse(f"{name}.dtype", t.dtype, "a floating dtype")
    _check_tree(x)
    _check_no_gradients(cache, x)
    rolling = isinstance(cache, KVCache) and cache.window is not None
    if isinstance(cache, KVCache) and rolling:
        _check_window(cache, o.window_left)
    _check_values(cache, x, o.window_left)
    window = None if o.window_left is None and o.window_right is None else (o.window_left, o.window_right)
    return DecodeSpec(
        batch=batch,
        heads=heads,
        kv_heads=cache.kv_heads,
        rows=rows,
        capacity=cache.capacity,
        head_dim=head_dim,
        value_dim=cache.value_dim,
        dtype=x.query.dtype,
        kv_dtype=cache.kv_dtype,
        scale=head_dim**-0.5 if o.scale is None else float(o.scale),
        page_size=cache.page_size if isinstance(cache, PagedKVCache) else None,
        window=window,
        softcap=None if o.softcap is None else float(o.softcap),
        alibi_slopes=x.alibi_slopes is not None,
        sinks=x.sinks is not None,
        appends=x.key is not None,
        rotary_dim=0 if x.cos is None else 2 * x.cos.shape[1],
        interleaved=interleaved,
        batch_invariant=o.batch_invariant,
        rolling=rolling,
        tree=x.tree_mask is not None,
    )


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
    spec = describe(cache, x, options, interleaved)
    chunk = _chunk(cache, x, chunk)
    device = Device.of(query)
    chosen = choose(BACKENDS, lambda n: BACKENDS[n].supports(spec, device), "decodes with the eager reference", 3)
    with torch.no_grad():
        out = _in_chunks(BACKENDS[chosen.backend].run, spec, cache, x, chunk)
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
