"""What a call of `decode_attention` has to satisfy, and what it then is."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import FLOAT_DTYPES, Inputs, Options, check_options, check_vector, need_tensor, readable, shape_of
from .call import DecodeInputs, DecodeSpec
from .dense import KVCache
from .paged import PagedKVCache
from .storage import refuse, storable

Cache = KVCache | PagedKVCache


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


def _check_window(cache: Cache, left: int | None) -> None:
    """What a cache forgets, no row may want to see."""
    if cache.window is not None and (left is None or left > cache.window):
        refuse("window[0] (left)", left, f"at most the cache's window, {cache.window}")


def _check_values(cache: Cache, x: DecodeInputs, left: int | None) -> None:
    """Lengths, room and page ids, on a CPU, where looking at them costs no synchronisation."""
    if not readable(cache.lengths) or not cache.batch:
        return
    rows = x.query.shape[2]
    appended = 0 if x.key is None else rows
    lengths = cache.lengths.tolist()
    low, high = min(lengths), max(lengths)
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


def check_step(cache: Cache, x: DecodeInputs, o: Options) -> None:
    """What may change from step to step: who requires grad, and what the cache holds."""
    _check_no_gradients(cache, x)
    if isinstance(cache, PagedKVCache) and x.key is None:
        cache.check_window(x.query.shape[2], o.window_left)
    _check_values(cache, x, o.window_left)


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
    rolling = isinstance(cache, KVCache) and cache.window is not None
    _check_window(cache, o.window_left)
    check_step(cache, x, o)
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
