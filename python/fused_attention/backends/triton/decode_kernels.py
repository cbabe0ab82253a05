"""Decoding: a few rows of queries against a long cache, split along the keys (Dao et al., "Flash-Decoding", 2023).

For every sequence and key/value head, split s goes through its share of the keys with an online softmax:

    s_j = scores(q k_j);  t_s = max_j s_j;  l_s = sum_j exp(s_j - t_s);  acc_s = sum_j exp(s_j - t_s) v_j
    t = max_s t_s;  l = sum_s l_s exp(t_s - t) + exp(sink - t);  output = sum_s acc_s exp(t_s - t) / l;  lse = t + log l

Rows: the query heads that share a key/value head and their M queries stand in one tile, row r is query r % M of head
r // M of the group, so that every key is read once for all of them. Row i sees key j if j <= length - M + i and, in a
window, j >= length - M + i - left; under a tree mask as tree.py says.

Keys: a dense cache is [B, HK, capacity, D]; a paged one [pages, HK, PAGE, D], key j of sequence b in row j % PAGE of
page table[b, j // PAGE]. A quantised cache holds codes, int8 or the bits of float8 e4m3; they are exact in the query's
dtype and enter the products as they are, the key's scale multiplies its column of scores and the value's scale its
column of weights.

A page that does not exist, and a sequence that is longer than its cache, give NaN: a GPU cannot refuse them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tiles import INF, LOG2E, dot, tanh
from .tree import depth_of, reach

# Float16 has no small numbers: a column of weights is brought to the unit of the tile's largest scale, times this.
BOOST = tl.constexpr(2.0**14)


class Table(NamedTuple):
    """The block table, int32 [B, max_pages]."""

    p: Any
    b: Any
    pages: Any  # how many pages there are


class Store(NamedTuple):
    """A cache; b is the stride of a sequence or, where paged, of a page."""

    key: Any  # View [., HK, ., D]
    value: Any
    key_scale: Any  # View [., HK, .] or None
    value_scale: Any
    table: Any  # Table or None
    lengths: Any  # [B] int32 or int64
    dropped: Any  # [B] likewise, or None: tokens that stood before the first one
    capacity: Any
    PAGE: Any  # constexpr; 0 for a dense cache
    KIND: Any  # constexpr: "float", "int8", "e4m3"
    NATIVE: Any  # constexpr: the chip converts e4m3 itself


class Problem(NamedTuple):
    """One call."""

    query: Any  # View [B, H, M, D]
    slopes: Any  # View of [B, H] or None
    sinks: Any  # [H] or None
    rows: Any  # M
    group: Any  # H / HK
    heads: Any  # H
    batch: Any  # B
    scale: Any
    softcap: Any  # or None
    left: Any  # keys left of the diagonal that are visible, or None
    tree: Any  # Tree or None
    D: Any  # constexpr
    DV: Any  # constexpr
    EXACT: Any  # constexpr: float32, where the last bits count
    PRECISION: Any  # constexpr: of products of float32: "ieee", "tf32"


class Partial(NamedTuple):
    """What the splits leave behind, float32."""

    acc: Any  # [B, H, M, splits, DV]
    top_total: Any  # [B, H, M, splits, 2]


class Rows(NamedTuple):
    """A tile of rows, [BLOCK_M] each but for b and length."""

    b: Any
    h: Any  # query head
    m: Any  # query
    there: Any  # false past the last row, where h and m repeat others
    length: Any
    center: Any  # the row's position, the last key that it sees
    slope: Any  # ALiBi's


class Keys(NamedTuple):
    """Where a tile of keys lies, [BLOCK_N] each."""

    block: Any  # sequence (scalar) or page
    row: Any  # in it
    exists: Any


@triton.jit
def place(cache, b, n, wanted):
    """Where keys n of sequence b lie."""
    if cache.PAGE == 0:
        return Keys(b, n.to(tl.int64), wanted)
    else:
        page = tl.load(cache.table.p + b * cache.table.b + n // cache.PAGE, mask=wanted, other=-1)
        exists = (page >= 0) & (page < cache.table.pages)
        return Keys(page.to(tl.int64), (n % cache.PAGE).to(tl.int64), exists)


@triton.jit
def load_tile(view, head, keys, d, DIM: tl.constexpr):
    """Dims d [BLOCK_D] of rows of the storage, [BLOCK_N, BLOCK_D]; 0 past DIM and where there is nothing."""
    p = view.p + head * view.h + (keys.block * view.b + keys.row * view.m)[:, None] + d[None, :]
    return tl.load(p, mask=keys.exists[:, None] & (d < DIM)[None, :], other=0)


@triton.jit
def load_scale(view, head, keys):
    """The scales of a tile's tokens, float32 [BLOCK_N]."""
    return tl.load(view.p + head * view.h + keys.block * view.b + keys.row * view.m, mask=keys.exists, other=0.0)


@triton.jit
def widen(codes, dtype: tl.constexpr, cache):
    """What is stored, in the query's dtype, exactly."""
    if cache.KIND == "float":
        return codes.to(dtype)
    elif cache.KIND == "int8":
        if dtype == tl.float16:
            # The bits of 1152 + code: 1024 has a unit of 1. Conversions run at a quarter of the rate of this.
            bits = (codes.to(tl.int16) & 0xFF) ^ 0x6480
            return bits.to(tl.float16, bitcast=True) - 1152.0
        else:
            return codes.to(dtype)
    elif cache.NATIVE:
        x = codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
        if dtype != tl.float16:  # from float16 to bfloat16 at once: a quarter of the rate again
            x = x.to(tl.float32).to(dtype)
        return x
    else:
        # seeeemmm, spread by its sign, moved to where float32 has sign, exponent and mantissa; 120 is the difference
        # of the biases, and the product is exact for subnormals too.
        bits = (codes.to(tl.int32) << 20) & -0x78100000  # 0x87F00000
        x = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
        return tl.where(tl.abs(x) == 480.0, float("nan"), x).to(dtype)


@triton.jit
def power_of_two(x):
    """The power of two below a number, and its inverse; 1 for 0."""
    bits = x.to(tl.int32, bitcast=True) & 0x7F800000
    bits = tl.where(bits == 0, 127 << 23, bits)
    return bits.to(tl.float32, bitcast=True), ((254 << 23) - bits).to(tl.float32, bitcast=True)


@triton.jit
def add_products(x, cache, rows, head, keys, d0, s, CHUNK: tl.constexpr):
    """s and the products of dims d0 .. d0 + CHUNK of query and keys."""
    d = d0 + tl.arange(0, CHUNK)
    q = load_query(x, rows, d)
    return dot(q, widen(load_tile(cache.key, head, keys, d, x.D), q.dtype, cache).T, s, x.PRECISION)


@triton.jit
def products(x, cache, rows, head, q, keys, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr):
    """q k for a tile of keys, [BLOCK_M, BLOCK_N]; CHUNK dims of the query stand in registers at a time."""
    s = tl.zeros([q.shape[0], BLOCK_N], tl.float32)
    if CHUNK == q.shape[1]:
        k = load_tile(cache.key, head, keys, tl.arange(0, CHUNK), x.D)
        s = dot(q, widen(k, q.dtype, cache).T, s, x.PRECISION)
    elif x.EXACT:  # and of the keys, which are operands of fused multiply-adds or very wide
        for d0 in tl.range(0, q.shape[1], CHUNK):
            s = add_products(x, cache, rows, head, keys, d0, s, CHUNK)
    else:  # unrolled, so that the loop over tiles, which is pipelined, stays the innermost
        for d0 in tl.static_range(0, q.shape[1], CHUNK):
            s = add_products(x, cache, rows, head, keys, d0, s, CHUNK)
    return s


@triton.jit
def scores(x, cache, rows, head, q, n0, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr):
    """The scores of keys n0 .. n0 + BLOCK_N, -inf where hidden, [BLOCK_M, BLOCK_N]; and where these keys lie."""
    n = n0 + tl.arange(0, BLOCK_N)
    wanted = n < rows.length
    if x.left is not None:  # what the window has left behind may be gone
        wanted &= n >= rows.length - x.rows - x.left
    keys = place(cache, rows.b, n, wanted)
    s = products(x, cache, rows, head, q, keys, BLOCK_N, CHUNK)
    if cache.key_scale is not None or cache.PAGE > 0:
        factor = tl.full([BLOCK_N], x.scale, tl.float32)
        if cache.key_scale is not None:
            factor *= load_scale(cache.key_scale, head, keys)
        if cache.PAGE > 0:
            factor = tl.where(keys.exists, factor, float("nan"))
        s *= factor[None, :]
    else:
        s *= x.scale
    if x.softcap is not None:
        s = x.softcap * tanh(s / x.softcap, x.EXACT)
    visible, distance = reach(x.tree, rows, n)
    if x.slopes is not None:
        s -= rows.slope[:, None] * distance.to(tl.float32)
    if x.left is not None:
        visible &= distance <= x.left
    return tl.where(visible, s, -INF), keys


@triton.jit
def attend(x, cache, rows, head, q, lo, hi, BLOCK_N: tl.constexpr, BLOCK_DV: tl.constexpr, CHUNK: tl.constexpr,
           STAGES: tl.constexpr):  # fmt: skip
    """The online softmax over keys lo .. hi.

    A hidden key has weight 0, but 0 * NaN is NaN: values that are not finite spoil acc, for `rescue` to mend.
    """
    BLOCK_M: tl.constexpr = q.shape[0]
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], -INF, tl.float32)
    dv = tl.arange(0, BLOCK_DV)
    for n0 in tl.range(lo, hi, BLOCK_N, num_stages=STAGES):
        s, keys = scores(x, cache, rows, head, q, n0, BLOCK_N, CHUNK)
        new_top = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(new_top == -INF, 0.0, new_top)
        p = tl.exp2((s - shift[:, None]) * LOG2E)
        fade = tl.exp2((top - shift) * LOG2E)
        total = total * fade + tl.sum(p, 1)
        top = new_top
        acc = acc * fade[:, None]
        v = widen(load_tile(cache.value, head, keys, dv, x.DV), q.dtype, cache)
        if cache.value_scale is None:
            acc = dot(p.to(q.dtype), v, acc, x.PRECISION)
        elif q.dtype == tl.float16:
            scale = load_scale(cache.value_scale, head, keys)
            unit, inverse = power_of_two(tl.max(tl.where(scale < INF, scale, 0.0), 0))
            w = (p * (scale * (inverse * BOOST))[None, :]).to(q.dtype)
            acc += dot(w, v, tl.zeros([BLOCK_M, BLOCK_DV], tl.float32), x.PRECISION) * (unit * (1.0 / BOOST))
        else:
            w = p * load_scale(cache.value_scale, head, keys)[None, :]
            acc = dot(w.to(q.dtype), v, acc, x.PRECISION)
    return acc, total, top


@triton.jit
def rescue(x, cache, rows, head, q, top, lo, hi, BLOCK_N: tl.constexpr, BLOCK_DV: tl.constexpr, CHUNK: tl.constexpr):
    """acc once more, the slow way: one key after the other, so that rows that do not see a key do not meet it."""
    acc = tl.zeros([q.shape[0], BLOCK_DV], tl.float32)
    dv = tl.arange(0, BLOCK_DV)
    shift = tl.where(top == -INF, 0.0, top)[:, None]
    for n0 in tl.range(lo, hi, BLOCK_N, num_stages=1):
        s, _ = scores(x, cache, rows, head, q, n0, BLOCK_N, CHUNK)
        w = tl.where(s == -INF, -1.0, tl.exp2((s - shift) * LOG2E))  # -1: not seen
        for j in tl.range(0, tl.minimum(hi - n0, BLOCK_N), num_stages=1):
            weight = tl.sum(tl.where((tl.arange(0, BLOCK_N) == j)[None, :], w, 0.0), 1)[:, None]  # [BLOCK_M, 1]
            n = n0 + j + tl.zeros([1], tl.int32)
            keys = place(cache, rows.b, n, n < hi)
            v = widen(load_tile(cache.value, head, keys, dv, x.DV), tl.float32, cache)  # [1, BLOCK_DV]
            if cache.value_scale is not None:
                v *= load_scale(cache.value_scale, head, keys)[:, None]
            acc += tl.where(weight < 0.0, 0.0, weight * v)
    return acc


@triton.jit
def share(x, length, split, splits, BLOCK_N: tl.constexpr):
    """The keys lo .. hi of one split: tiles are dealt out evenly over what this sequence's rows see."""
    begin = 0
    if x.left is not None:
        begin = tl.maximum(length - x.rows - x.left, 0) // BLOCK_N * BLOCK_N
    each = tl.cdiv(tl.cdiv(length - begin, BLOCK_N), splits) * BLOCK_N
    lo = tl.minimum(begin + split * each, length)
    return lo, tl.minimum(lo + each, length)


@triton.jit
def finish(acc, total, top, sink, lost):
    """Output [BLOCK_M, BLOCK_DV] and lse [BLOCK_M]; a row that saw nothing gives 0 and -inf."""
    dead = (top == -INF) & (total == 0.0)  # NaN scores leave the maximum at -inf too, and a sum of NaN
    shift = tl.where(top == -INF, 0.0, top)
    if sink is not None:
        higher = tl.maximum(shift, sink)
        fade = tl.exp2((shift - higher) * LOG2E)
        total = total * fade + tl.exp2((sink - higher) * LOG2E)
        acc = acc * fade[:, None]
        shift = higher
    total = tl.where(dead, 1.0, total)
    total = tl.where(lost, float("nan"), total)
    lse = tl.where(dead & (lost == 0), -INF, shift + tl.log(total))
    return acc / total[:, None], lse


@triton.jit
def held(cache, b):
    """A sequence's length, and whether that is more than the cache holds."""
    length = tl.load(cache.lengths + b)
    return tl.maximum(tl.minimum(length, cache.capacity), 0).to(tl.int32), length > cache.capacity


@triton.jit
def row_offset(view, h, m):
    """Where rows m of heads h begin within a sequence, [BLOCK_M, 1]."""
    return (h.to(tl.int64) * view.h + m.to(tl.int64) * view.m)[:, None]


@triton.jit
def load_query(x, rows, d):
    """Dims d of the rows, [BLOCK_M, BLOCK_D]."""
    p = x.query.p + rows.b * x.query.b + row_offset(x.query, rows.h, rows.m) + d[None, :]
    return tl.load(p, mask=rows.there[:, None] & (d < x.D)[None, :], other=0.0)


@triton.jit
def rows_of_tile(x, cache, b, head, tile, BLOCK_M: tl.constexpr):
    """The rows of one tile, and whether their sequence is longer than its cache."""
    r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m = r % x.rows
    h = tl.minimum(head * x.group + r // x.rows, x.heads - 1)
    length, lost = held(cache, b)
    slope = tl.zeros([BLOCK_M], tl.float32)
    if x.slopes is not None:
        slope = tl.load(x.slopes.p + b * x.slopes.b + h.to(tl.int64) * x.slopes.h).to(tl.float32)
    depth = m if x.tree is None else depth_of(x.tree, b, m, m >= 0)
    return Rows(b, h, m, r < x.rows * x.group, length, length - x.rows + depth, slope), lost


@triton.jit
def decode_kernel(x, cache, out, lse, partial, splits, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                  BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CHUNK: tl.constexpr,
                  STAGES: tl.constexpr):  # fmt: skip
    """One split of one sequence, key/value head and tile of rows. partial None: the one split writes the result."""
    pid = tl.program_id(0)
    b = (pid % x.batch).to(tl.int64)
    tiles = tl.cdiv(x.rows * x.group, BLOCK_M)
    tile, head = pid // x.batch % tiles, pid // x.batch // tiles
    rows, lost = rows_of_tile(x, cache, b, head, tile, BLOCK_M)
    q = load_query(x, rows, tl.arange(0, BLOCK_D))
    split = tl.program_id(1)
    lo, hi = share(x, rows.length, split, splits, BLOCK_N)
    head = head.to(tl.int64)
    acc, total, top = attend(x, cache, rows, head, q, lo, hi, BLOCK_N, BLOCK_DV, CHUNK, STAGES)
    if tl.max(tl.max((tl.abs(acc) < INF).to(tl.int32) ^ 1, 1), 0) > 0:
        acc = rescue(x, cache, rows, head, q, top, lo, hi, BLOCK_N, BLOCK_DV, CHUNK)

    dv = tl.arange(0, BLOCK_DV)
    stored = rows.there[:, None] & (dv < x.DV)[None, :]
    row = (b * x.heads + rows.h) * x.rows + rows.m  # [BLOCK_M], of [B, H, M]
    if partial is None:
        sink = None
        if x.sinks is not None:
            sink = tl.load(x.sinks + rows.h).to(tl.float32)
        result, log_sum = finish(acc, total, top, sink, lost)
        p_out = out.p + b * out.b + row_offset(out, rows.h, rows.m) + dv[None, :]
        tl.store(p_out, result.to(out.p.dtype.element_ty), mask=stored)
        tl.store(lse + row, log_sum, mask=rows.there)
    else:
        entry = row * splits + split
        tl.store(partial.top_total + entry * 2, top, mask=rows.there)
        tl.store(partial.top_total + entry * 2 + 1, total, mask=rows.there)
        tl.store(partial.acc + entry[:, None] * x.DV + dv[None, :], acc, mask=stored & (total != 0.0)[:, None])


@triton.jit
def combine_kernel(x, cache, out, lse, partial, splits, BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Merge the splits of one row, BLOCK_S at a time and in their order; the sink joins here, once."""
    row = tl.program_id(0).to(tl.int64)  # of [B, H, M]
    m = row % x.rows
    h = row // x.rows % x.heads
    b = row // x.rows // x.heads
    d = tl.arange(0, BLOCK_DV)
    s = tl.arange(0, BLOCK_S)
    top = tl.full([1], -INF, tl.float32)
    for first in range(0, splits, BLOCK_S):
        p_top = partial.top_total + (row * splits + first + s) * 2
        top = tl.maximum(top, tl.max(tl.load(p_top, mask=first + s < splits, other=-INF), 0))
    shift = tl.where(top == -INF, 0.0, top)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([1, BLOCK_DV], tl.float32)
    for first in range(0, splits, BLOCK_S):
        entry = row * splits + first + s
        inside = first + s < splits
        tops = tl.load(partial.top_total + entry * 2, mask=inside, other=-INF)  # [BLOCK_S]
        sums = tl.load(partial.top_total + entry * 2 + 1, mask=inside, other=0.0)
        fade = tl.exp2((tops - shift) * LOG2E)
        used = (sums != 0.0)[:, None] & (d < x.DV)[None, :]  # a split without keys has written no acc
        part = tl.load(partial.acc + entry[:, None] * x.DV + d[None, :], mask=used, other=0.0)
        total += tl.sum(sums * fade, 0)
        acc += tl.sum(part * fade[:, None], 0)[None, :]
    sink = None
    if x.sinks is not None:
        sink = tl.load(x.sinks + h).to(tl.float32)
    length, lost = held(cache, b)
    result, log_sum = finish(acc, total, top, sink, lost)
    p_out = out.p + b * out.b + h * out.h + m * out.m + d[None, :]
    tl.store(p_out, result.to(out.p.dtype.element_ty), mask=(d < x.DV)[None, :])
    tl.store(lse + row + tl.zeros([1], tl.int32), log_sum)
