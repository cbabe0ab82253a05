"""The forward kernel: output = softmax(scores) V and lse, one block of rows per program, every option in one kernel.

Over tiles of keys, with the running maximum t and sum l of each row (Milakov and Gimelshein, "Online normalizer
calculation for softmax", 2018; Dao et al., "FlashAttention", 2022):

    s = scores(q k^T);  t' = max(t, max_j s);  p = exp(s - t');  l = l exp(t - t') + sum_j p
    acc = acc exp(t - t') + dropout(p) v;      at the end  output = acc / l,  lse = t + log l

Rows of a block are queries of one head or, where queries are few, of all heads that share a key head (PACK): row r is
query r % M of the head r // M of the group, so that K and V are read once for all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    INF,
    LOG2E,
    capped,
    chunked,
    dot,
    exponent,
    hidden,
    kept,
    key_range,
    load_tile,
    rows_of,
    sequence,
    shown,
    spoiled,
)


@triton.jit
def load_keys(view, descriptor, seq, kv_head, n0, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
              MASKED: tl.constexpr):  # fmt: skip
    """Keys or values n0 .. n0 + BLOCK_N, [BLOCK_N, BLOCK_D]."""
    return load_tile(view, descriptor, seq.b, seq.slot, kv_head, seq.key_start, n0, seq.columns, D, BLOCK_N, BLOCK_D,
                     MASKED)  # fmt: skip


@triton.jit
def products(x, seq, head, kv_head, m, q, n0, keys, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):
    """The tile of scores of rows m and keys n0 .. n0 + BLOCK_N, in units of `exponent`.

    head and m: [BLOCK_M, 1] (head may be a scalar); q [BLOCK_M, BLOCK_D].
    """
    n = n0 + tl.arange(0, BLOCK_N)
    if x.chunk == 0:
        k = load_keys(x.key, keys, seq, kv_head, n0, x.D, BLOCK_N, q.shape[1], MASKED)
        s = dot(q, k.T, tl.zeros([q.shape[0], BLOCK_N], tl.float32), x.precision)
    else:
        s = chunked(x, x.query, head, seq.row_start, m.reshape(q.shape[0]), seq.rows, x.key, kv_head, seq.key_start, n,
                    seq.columns, seq, x.D, q.shape[1])  # fmt: skip
    return hidden(x, capped(x, s), seq, head, m, n[None, :], MASKED)


@triton.jit
def attend_tile(x, seq, head, kv_head, m, q, acc, total, top, n0, keys, values, BLOCK_N: tl.constexpr,
                MASKED: tl.constexpr):  # fmt: skip
    """One step of the online softmax, over keys n0 .. n0 + BLOCK_N."""
    HIDES: tl.constexpr = MASKED or x.mask is not None or x.bias is not None
    factor = exponent(x)
    s = products(x, seq, head, kv_head, m, q, n0, keys, BLOCK_N, MASKED)  # [BLOCK_M, BLOCK_N]
    new_top = tl.maximum(top, tl.max(s, 1))
    shift = new_top
    if HIDES:  # a row that has seen nothing: -inf - -inf would be NaN
        shift = tl.where(new_top == -INF, 0.0, new_top)
    if x.exact:  # subtract first: the largest weight is exactly 1
        p = tl.exp2((s - shift[:, None]) * factor)
    else:  # one fused multiply-add per score
        p = tl.exp2(s * factor - (shift * factor)[:, None])
    fade = tl.exp2((top - shift) * factor)
    total = total * fade + tl.sum(p, 1)
    if x.threshold is not None:
        p = tl.where(kept(x, seq.b, head, m, n0, BLOCK_N), p, 0.0)
    v = load_keys(x.value, values, seq, kv_head, n0, x.DV, BLOCK_N, acc.shape[1], MASKED)
    acc = dot(p.to(v.dtype), v, acc * fade[:, None], x.precision)
    return acc, total, new_top


@triton.jit
def attend(x, seq, head, kv_head, m, m0, q, acc, total, top, lo, hi, keys, values, BLOCK_N: tl.constexpr,
           MASKED: tl.constexpr, SPECIALIZE: tl.constexpr):  # fmt: skip
    """The online softmax over the tiles of keys lo .. hi; q [BLOCK_M, BLOCK_D], head and m [BLOCK_M, 1] or scalar.

    m0: the first row, for the block map. A hidden key has weight 0, but 0 * NaN is NaN: values that are not finite
    spoil acc, for `rescue` to mend.
    """
    for n0 in tl.range(lo, hi, BLOCK_N, warp_specialize=SPECIALIZE):
        if x.blocks is None:
            acc, total, top = attend_tile(x, seq, head, kv_head, m, q, acc, total, top, n0, keys, values, BLOCK_N,
                                          MASKED)  # fmt: skip
        else:
            if shown(x, seq, head, m0, n0):
                acc, total, top = attend_tile(x, seq, head, kv_head, m, q, acc, total, top, n0, keys, values, BLOCK_N,
                                              MASKED)  # fmt: skip
    return acc, total, top


@triton.jit
def rescue(x, seq, head, kv_head, m, m0, q, acc, top, begin, end, keys, BLOCK_N: tl.constexpr):
    """acc once more, the slow way: one key after the other, so that rows that do not see a key do not meet it."""
    acc = tl.zeros_like(acc)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, acc.shape[1])
    shift = tl.where(top == -INF, 0.0, top)[:, None]
    for n0 in tl.range(begin, end, BLOCK_N, num_stages=1):
        s = products(x, seq, head, kv_head, m, q, n0, keys, BLOCK_N, True)
        if x.blocks is not None:
            s = tl.where(shown(x, seq, head, m0, n0), s, -INF)
        w = tl.where(s == -INF, -1.0, tl.exp2((s - shift) * exponent(x)))  # [BLOCK_M, BLOCK_N], -1: not seen
        if x.threshold is not None:
            w = tl.where(kept(x, seq.b, head, m, n0, BLOCK_N), w, tl.minimum(w, 0.0))
        for j in tl.range(0, tl.minimum(end - n0, BLOCK_N), num_stages=1):
            weight = tl.sum(tl.where((n == j)[None, :], w, 0.0), 1)[:, None]  # [BLOCK_M, 1]
            v = tl.load(rows_of(x.value, seq.b, kv_head, seq.key_start + n0, j, d), mask=d < x.DV, other=0.0)
            acc += tl.where(weight < 0.0, 0.0, weight * v.to(tl.float32)[None, :])
    return acc


@triton.jit
def find(ends, slot, STEPS: tl.constexpr):
    """The first i with ends[i] > slot, by bisection over 2^STEPS numbers."""
    low = 0
    for step in tl.static_range(STEPS):
        half = 1 << (STEPS - 1 - step)
        low += tl.where(tl.load(ends + low + half - 1) <= slot, half, 0)
    return low


@triton.jit
def block_of(x, schedule, row_blocks, heads, STEPS: tl.constexpr):
    """Which element of the batch, head and block of rows this program works on.

    Dense: blocks of one head follow each other, so that they share K and V in the L2 cache, the last rows first: under
    causality they see the most keys. Packed: sequences in the order of the schedule, longest first, all heads of a
    block side by side, so that one long sequence starts first and does not hold up the end.
    """
    i = tl.program_id(0)
    if schedule is None:
        b, head, block = i // row_blocks // heads, i // row_blocks % heads, row_blocks - 1 - i % row_blocks
    else:
        slot = i // heads
        place = find(schedule.ends, slot, STEPS)
        after = tl.load(schedule.ends + place).to(tl.int32)  # blocks of this sequence and of those before it
        b, head, block = tl.load(schedule.order + place).to(tl.int32), i % heads, after - 1 - slot
    return b, head, block


@triton.jit
def forward_kernel(x, out, lse, stats, keys, values, schedule, row_blocks, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PACK: tl.constexpr, STEPS: tl.constexpr,
                   SPECIALIZE: tl.constexpr):  # fmt: skip
    """out [B, H, M, DV], lse [B, H, M]; stats None or two views like lse: each row's shift and 1 / sum."""
    heads = x.heads // x.group if PACK else x.heads
    if schedule is not None:
        if tl.program_id(0) >= heads * tl.load(schedule.ends + schedule.batch - 1).to(tl.int32):
            return
    b, first_head, block = block_of(x, schedule, row_blocks, heads, STEPS)
    seq = sequence(x, b)
    m0 = block * BLOCK_M
    r = m0 + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    if PACK:
        exists = r < seq.rows * x.group
        r = tl.minimum(r, seq.rows * x.group - 1)
        m, head, kv_head = r % seq.rows, first_head * x.group + r // seq.rows, first_head
        begin, full_begin, full_end, end = key_range(x, seq, 0, seq.rows - 1, BLOCK_N)
        head_of_row = head[:, None]
    else:
        exists = r < seq.rows
        m, head, kv_head = tl.minimum(r, seq.rows - 1), first_head, first_head // x.group
        last = tl.minimum(m0 + BLOCK_M, seq.rows) - 1
        begin, full_begin, full_end, end = key_range(x, seq, m0, last, BLOCK_N)
        head_of_row = head
    # Rows past the end repeat the last one and are not stored.
    p_query = rows_of(x.query, seq.b, head_of_row, seq.row_start, m[:, None], d[None, :])
    q = tl.load(p_query, mask=(d < x.D)[None, :], other=0.0)  # [BLOCK_M, BLOCK_D]

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], -INF, tl.float32)
    first = begin
    if x.split:
        if x.left is not None:
            acc, total, top = attend(x, seq, head_of_row, kv_head, m[:, None], m0, q, acc, total, top, begin,
                                     full_begin, keys, values, BLOCK_N, True, False)  # fmt: skip
        acc, total, top = attend(x, seq, head_of_row, kv_head, m[:, None], m0, q, acc, total, top, full_begin,
                                 full_end, keys, values, BLOCK_N, False, SPECIALIZE)  # fmt: skip
        first = full_end
    acc, total, top = attend(x, seq, head_of_row, kv_head, m[:, None], m0, q, acc, total, top, first, end, keys,
                             values, BLOCK_N, True, False)  # fmt: skip
    if spoiled(acc):
        acc = rescue(x, seq, head_of_row, kv_head, m[:, None], m0, q, acc, top, begin, end, keys, BLOCK_N)

    dead = (top == -INF) & (total == 0.0)  # where all scores are NaN the sum is NaN
    if x.raw:
        top = top * x.scale
    shift = tl.where(dead, 0.0, top)
    if x.sinks is not None:
        sink = tl.load(x.sinks + head)
        higher = tl.maximum(shift, sink)
        fade = tl.exp2((shift - higher) * LOG2E)
        total = total * fade + tl.exp2((sink - higher) * LOG2E)
        acc = acc * fade[:, None]
        shift = higher
    total = tl.where(dead, 1.0, total)
    if x.threshold is not None:
        acc = acc * x.keep_factor

    p_lse = rows_of(lse, seq.b, head, seq.row_start, m, 0)
    tl.store(p_lse, tl.where(dead, -INF, shift + tl.log(total)), mask=exists)
    if stats is not None:
        tl.store(rows_of(stats[0], seq.b, head, seq.row_start, m, 0), shift, mask=exists)
        tl.store(rows_of(stats[1], seq.b, head, seq.row_start, m, 0), 1.0 / total, mask=exists)
    dv = tl.arange(0, BLOCK_DV)
    p_out = rows_of(out, seq.b, head_of_row, seq.row_start, m[:, None], dv[None, :])
    at = exists[:, None] & (dv < x.value_dim)[None, :]
    tl.store(p_out, (acc / total[:, None]).to(out.p.dtype.element_ty), mask=at)
