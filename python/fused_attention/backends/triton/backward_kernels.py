"""The backward kernels: gradients recomputed from lse, every sum in a fixed order (Dao et al., "FlashAttention", 2022).

With P = exp(scores - lse), Z the dropout mask times 1 / (1 - p), and what comes in for output, lse and weights:

    delta = sum_d output dO - dlse [+ sum_j weights dW]          one per row
    dP = Z (dO V^T + dW);   dS = P (dP - delta);   the softcap's derivative 1 - (capped / c)^2 follows
    dV = (Z P)^T dO;   dK = scale dS^T Q;   dQ = scale dS K

dK and dV: a program per tile of keys, over all rows of all query heads that read it; tiles lie transposed,
[BLOCK_N, BLOCK_M], so that P^T and dS^T are left operands. dQ: a program per tile of rows.

A weight of 0 times NaN is NaN: what is not finite in a hidden key, or in a row that sees nothing, spoils a sum. A sum
that is not finite is taken again with care (CLEAN), so that the usual loops need none.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward_kernels import block_of, load_keys
from .tiles import (
    INF,
    LOG2E,
    capped,
    chunked,
    dot,
    exponent,
    finite,
    hidden,
    kept,
    key_range,
    load_rows,
    load_tile,
    row_range,
    rows_of,
    sequence,
    shown,
    spoiled,
)


@triton.jit
def delta_kernel(x, out, lse, dout, dlse, delta, schedule, row_blocks, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
                 STEPS: tl.constexpr):  # fmt: skip
    """delta = sum_d output dO - dlse, [B, H, M]; 0 for rows that see no key, whatever comes in for them."""
    if schedule is not None:
        if tl.program_id(0) >= x.heads * tl.load(schedule.ends + schedule.batch - 1).to(tl.int32):
            return
    b, head, block = block_of(x, schedule, row_blocks, x.heads, STEPS)
    seq = sequence(x, b)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_DV)
    exists = m < seq.rows
    at = exists[:, None] & (d < x.value_dim)[None, :]
    total = tl.zeros([BLOCK_M], tl.float32)
    if dout is not None:
        o = tl.load(rows_of(out, b, head, seq.row_start, m[:, None], d[None, :]), mask=at, other=0.0)
        do = tl.load(rows_of(dout, b, head, seq.row_start, m[:, None], d[None, :]), mask=at, other=0.0)
        total += tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if dlse is not None:
        total -= tl.load(rows_of(dlse, b, head, seq.row_start, m, 0), mask=exists, other=0.0)
    dead = tl.load(rows_of(lse, b, head, seq.row_start, m, 0), mask=exists, other=0.0) == -INF
    tl.store(rows_of(delta, b, head, seq.row_start, m, 0), tl.where(dead, 0.0, total), mask=exists)


@triton.jit
def probabilities(x, s, lse, head, AXIS: tl.constexpr, WHOLE: tl.constexpr):
    """exp(s - lse) from scores in units of `exponent`; lse broadcasts, +inf for rows that have no weights.

    WHOLE: the tile holds all keys, along AXIS. Then the softmax is taken anew: where few keys share a row, its weights
    must add up to 1 beyond the rounding error of lse.
    """
    factor = exponent(x)
    if WHOLE:
        top = tl.max(s, AXIS, keep_dims=True)
        shift = tl.where(top == -INF, 0.0, top)
        p = tl.exp2((s - shift) * factor)
        total = tl.sum(p, AXIS, keep_dims=True)
        if x.sinks is not None:
            total += tl.exp2(tl.load(x.sinks + head) * LOG2E - shift * factor)
        p = tl.where(lse == INF, 0.0, p / tl.where(top == -INF, 1.0, total))
    elif x.exact:
        p = tl.exp2((s - lse) * factor)
    else:
        p = tl.exp2(s * factor - lse * LOG2E)
    return p


@triton.jit
def score_gradient(x, p, dp, delta, dlse, s, dweights, seq, head, m, n, keep, AXIS: tl.constexpr, WHOLE: tl.constexpr,
                   HIDES: tl.constexpr):  # fmt: skip
    """dS, before the scale and the softcap's derivative: the gradient of a bias. All tiles lie alike.

    WHOLE: the tile holds all keys, along AXIS; delta is then their own sum, so that dS cancels as it should.
    """
    if dweights is not None:
        pointer = dweights.p + tl.cast(seq.b, tl.int64) * dweights.b + tl.cast(head, tl.int64) * dweights.h
        pointer += tl.cast(m, tl.int64) * dweights.m + tl.cast(n, tl.int64) * dweights.n
        dw = tl.load(pointer, mask=n < seq.columns, other=0.0).to(tl.float32)
        if dweights.h == 0:  # averaged over heads
            dw = dw / x.heads
        dp += dw
    if x.threshold is not None:
        dp = tl.where(keep, dp * x.keep_factor, 0.0)
    if HIDES:  # a hidden value may be NaN
        dp = tl.where(s == -INF, 0.0, dp)
    if WHOLE:
        delta = tl.sum(p * dp, AXIS, keep_dims=True)
        if dlse is not None:
            delta -= tl.load(rows_of(dlse, seq.b, head, seq.row_start, m, 0))
    return p * (dp - delta)


@triton.jit
def through_softcap(x, ds, c):
    """The derivative of c tanh(s / c) from its value c; nothing without a softcap."""
    if x.softcap is not None:
        t = c / x.softcap
        ds = ds * (1.0 - t * t)
    return ds


@triton.jit
def key_gradient_tile(x, seq, head, kv_head, k, v, dk, dv, lse, delta, dlse, dout, dweights, queries, douts, m0, n0,
                      BLOCK_M: tl.constexpr, MASKED: tl.constexpr, WHOLE: tl.constexpr, CLEAN: tl.constexpr,
                      WANT_K: tl.constexpr, WANT_V: tl.constexpr):  # fmt: skip
    """Add to dk [BLOCK_N, BLOCK_D] and dv [BLOCK_N, BLOCK_DV], what is wanted of them, from rows m0 .. m0 + BLOCK_M."""
    BLOCK_N: tl.constexpr = k.shape[0]
    BLOCK_D: tl.constexpr = k.shape[1]
    BLOCK_DV: tl.constexpr = v.shape[1]
    HIDES: tl.constexpr = MASKED or x.mask is not None or x.bias is not None
    n = n0 + tl.arange(0, BLOCK_N)[:, None]
    r = m0 + tl.arange(0, BLOCK_M)
    m = tl.minimum(r, seq.rows - 1) if MASKED else r
    q = load_tile(x.query, queries, seq.b, seq.slot, head, seq.row_start, m0, seq.rows, x.D, BLOCK_M, BLOCK_D,
                  MASKED)  # fmt: skip
    do = load_tile(dout, douts, seq.b, seq.slot, head, seq.row_start, m0, seq.rows, x.DV, BLOCK_M, BLOCK_DV,
                   MASKED)  # fmt: skip
    row_lse = tl.load(rows_of(lse, seq.b, head, seq.row_start, m, 0))  # [BLOCK_M]
    row_delta = tl.load(rows_of(delta, seq.b, head, seq.row_start, m, 0))
    if HIDES:  # rows that see nothing, and rows past the end
        alive = (row_lse != -INF) & (r < seq.rows)
        row_lse = tl.where(alive, row_lse, INF)
        if CLEAN:
            q = tl.where(alive[:, None], q, 0.0).to(q.dtype)
            do = tl.where(alive[:, None], do, 0.0).to(do.dtype)
    if x.chunk == 0:
        c = dot(k, q.T, tl.zeros([BLOCK_N, BLOCK_M], tl.float32), x.precision)
    else:
        c = chunked(x, x.key, kv_head, seq.key_start, n0 + tl.arange(0, BLOCK_N), seq.columns, x.query, head,
                    seq.row_start, r, seq.rows, seq, x.D, BLOCK_D)  # fmt: skip
    c = capped(x, c)
    s = hidden(x, c, seq, head, m[None, :], n, MASKED)  # [BLOCK_N, BLOCK_M]
    p = probabilities(x, s, row_lse[None, :], head, 0, WHOLE)
    keep = None
    weights = p
    if x.threshold is not None:
        keep = kept(x, seq.b, head, m[:, None], n0, BLOCK_N).T
        weights = tl.where(keep, p, 0.0)
    if WANT_V:
        dv = dot(weights.to(do.dtype), do, dv, x.precision)
    if WANT_K:
        if x.chunk == 0:
            dp = dot(v, do.T, tl.zeros([BLOCK_N, BLOCK_M], tl.float32), x.precision)
        else:
            dp = chunked(x, x.value, kv_head, seq.key_start, n0 + tl.arange(0, BLOCK_N), seq.columns, dout, head,
                         seq.row_start, r, seq.rows, seq, x.DV, BLOCK_DV)  # fmt: skip
        ds = score_gradient(x, p, dp, row_delta[None, :], dlse, s, dweights, seq, head, m[None, :], n, keep, 0,
                            WHOLE, HIDES)  # fmt: skip
        dk = dot(through_softcap(x, ds, c).to(q.dtype), q, dk, x.precision)
    return dk, dv


@triton.jit
def key_gradient_rows(x, seq, kv_head, k, v, dk, dv, lse, delta, dlse, dout, dweights, queries, douts, lo, hi,
                      n0, BLOCK_M: tl.constexpr, MASKED: tl.constexpr, WHOLE: tl.constexpr, CLEAN: tl.constexpr,
                      WANT_K: tl.constexpr, WANT_V: tl.constexpr):  # fmt: skip
    """The same from rows lo .. hi of all heads of the group."""
    tiles = tl.cdiv(tl.maximum(hi - lo, 0), BLOCK_M)
    for i in tl.range(0, tiles * x.group):  # one loop over heads and rows: loads of the next head start in time
        head, m0 = kv_head, lo + i * BLOCK_M
        if x.group > 1:
            head, m0 = kv_head * x.group + i // tiles, lo + i % tiles * BLOCK_M
        if x.blocks is None:
            dk, dv = key_gradient_tile(x, seq, head, kv_head, k, v, dk, dv, lse, delta, dlse, dout, dweights, queries,
                                       douts, m0, n0, BLOCK_M, MASKED, WHOLE, CLEAN, WANT_K, WANT_V)  # fmt: skip
        else:
            if shown(x, seq, head, m0, n0):
                dk, dv = key_gradient_tile(x, seq, head, kv_head, k, v, dk, dv, lse, delta, dlse, dout, dweights,
                                           queries, douts, m0, n0, BLOCK_M, MASKED, WHOLE, CLEAN, WANT_K,
                                           WANT_V)  # fmt: skip
    return dk, dv


@triton.jit
def key_gradient_heads(x, seq, kv_head, k, v, dk, dv, lse, delta, dlse, dout, dweights, queries, douts, n0,
                       BLOCK_M: tl.constexpr, WHOLE: tl.constexpr, CLEAN: tl.constexpr, WANT_K: tl.constexpr,
                       WANT_V: tl.constexpr):  # fmt: skip
    """dk and dv over all rows of all heads of the group."""
    begin, full_begin, full_end, end = row_range(x, seq, n0, BLOCK_M, k.shape[0])
    if x.split and not CLEAN:
        if x.right is not None:
            dk, dv = key_gradient_rows(x, seq, kv_head, k, v, dk, dv, lse, delta, dlse, dout, dweights, queries, douts,
                                       begin, full_begin, n0, BLOCK_M, True, WHOLE, CLEAN, WANT_K,
                                       WANT_V)  # fmt: skip
        dk, dv = key_gradient_rows(x, seq, kv_head, k, v, dk, dv, lse, delta, dlse, dout, dweights, queries, douts,
                                   full_begin, full_end, n0, BLOCK_M, False, WHOLE, CLEAN, WANT_K,
                                   WANT_V)  # fmt: skip
        begin = full_end
    dk, dv = key_gradient_rows(x, seq, kv_head, k, v, dk, dv, lse, delta, dlse, dout, dweights, queries, douts, begin,
                               end, n0, BLOCK_M, True, WHOLE, CLEAN, WANT_K, WANT_V)  # fmt: skip
    return dk, dv


@triton.jit
def key_gradient_kernel(x, dkey, dvalue, lse, delta, dlse, dout, dweights, queries, douts, schedule, key_blocks,
                        WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                        BLOCK_DV: tl.constexpr, STEPS: tl.constexpr):  # fmt: skip
    """dK and dV, or only one of them where the other is None: the two do not fit together at the largest head dims."""
    kv_heads = x.heads // x.group
    if schedule is not None:
        if tl.program_id(0) >= kv_heads * tl.load(schedule.ends + schedule.batch - 1).to(tl.int32):
            return
    b, kv_head, block = block_of(x, schedule, key_blocks, kv_heads, STEPS)
    if schedule is None:  # the first keys first: under causality the most rows see them
        block = key_blocks - 1 - block
    seq = sequence(x, b)
    n0 = block * BLOCK_N
    # Keys past a length that stands in key_lengths have gradients too: zeros.
    stored = seq.columns if x.key_lengths is None else x.columns
    k = load_keys(x.key, None, seq, kv_head, n0, x.D, BLOCK_N, BLOCK_D, True)
    v = load_keys(x.value, None, seq, kv_head, n0, x.DV, BLOCK_N, BLOCK_DV, True)
    WANT_K: tl.constexpr = dkey is not None
    WANT_V: tl.constexpr = dvalue is not None
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # what is not wanted costs nothing
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    dk, dv = key_gradient_heads(x, seq, kv_head, k, v, dk, dv, lse, delta, dlse, dout, dweights, queries, douts, n0,
                                BLOCK_M, WHOLE, False, WANT_K, WANT_V)  # fmt: skip
    if spoiled(dk) or spoiled(dv):
        dk = tl.zeros_like(dk)
        dv = tl.zeros_like(dv)
        dk, dv = key_gradient_heads(x, seq, kv_head, k, v, dk, dv, lse, delta, dlse, dout, dweights, queries, douts,
                                    n0, BLOCK_M, WHOLE, True, WANT_K, WANT_V)  # fmt: skip
    n = n0 + tl.arange(0, BLOCK_N)
    if dkey is not None:
        d = tl.arange(0, BLOCK_D)
        p_dkey = rows_of(dkey, b, kv_head, seq.key_start + n0, tl.arange(0, BLOCK_N)[:, None], d[None, :])
        at = (n < stored)[:, None] & (d < x.head_dim)[None, :]
        tl.store(p_dkey, (dk * x.scale).to(dkey.p.dtype.element_ty), mask=at)
    if dvalue is not None:
        if x.threshold is not None:
            dv = dv * x.keep_factor
        d = tl.arange(0, BLOCK_DV)
        p_dvalue = rows_of(dvalue, b, kv_head, seq.key_start + n0, tl.arange(0, BLOCK_N)[:, None], d[None, :])
        at = (n < stored)[:, None] & (d < x.value_dim)[None, :]
        tl.store(p_dvalue, dv.to(dvalue.p.dtype.element_ty), mask=at)


@triton.jit
def query_gradient_tile(x, seq, head, m, q, do, dout, lse, delta, dlse, dq, dweights, keys, values, n0,
                        BLOCK_N: tl.constexpr, MASKED: tl.constexpr, WHOLE: tl.constexpr,
                        CLEAN: tl.constexpr):  # fmt: skip
    """Add to dq [BLOCK_M, BLOCK_D] from keys n0 .. n0 + BLOCK_N; lse and delta [BLOCK_M]."""
    BLOCK_M: tl.constexpr = q.shape[0]
    BLOCK_D: tl.constexpr = q.shape[1]
    BLOCK_DV: tl.constexpr = do.shape[1]
    HIDES: tl.constexpr = MASKED or x.mask is not None or x.bias is not None
    kv_head = head // x.group
    n = n0 + tl.arange(0, BLOCK_N)[None, :]
    k = load_keys(x.key, keys, seq, kv_head, n0, x.D, BLOCK_N, BLOCK_D, MASKED)
    v = load_keys(x.value, values, seq, kv_head, n0, x.DV, BLOCK_N, BLOCK_DV, MASKED)
    if x.chunk == 0:
        c = dot(q, k.T, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), x.precision)
    else:
        c = chunked(x, x.query, head, seq.row_start, m, seq.rows, x.key, kv_head, seq.key_start,
                    n0 + tl.arange(0, BLOCK_N), seq.columns, seq, x.D, BLOCK_D)  # fmt: skip
    c = capped(x, c)
    s = hidden(x, c, seq, head, m[:, None], n, MASKED)  # [BLOCK_M, BLOCK_N]
    p = probabilities(x, s, lse[:, None], head, 1, WHOLE)
    keep = None
    if x.threshold is not None:
        keep = kept(x, seq.b, head, m[:, None], n0, BLOCK_N)
    if x.chunk == 0:
        dp = dot(do, v.T, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), x.precision)
    else:
        dp = chunked(x, dout, head, seq.row_start, m, seq.rows, x.value, kv_head, seq.key_start,
                     n0 + tl.arange(0, BLOCK_N), seq.columns, seq, x.DV, BLOCK_DV)  # fmt: skip
    ds = score_gradient(x, p, dp, delta[:, None], dlse, s, dweights, seq, head, m[:, None], n, keep, 1, WHOLE,
                        HIDES)  # fmt: skip
    if CLEAN:
        k = finite(k)
    dq = dot(through_softcap(x, ds, c).to(k.dtype), k, dq, x.precision)
    return dq


@triton.jit
def query_gradient_keys(x, seq, head, m, m0, q, do, dout, lse, delta, dlse, dq, dweights, keys, values, lo, hi,
                        BLOCK_N: tl.constexpr, MASKED: tl.constexpr, WHOLE: tl.constexpr,
                        CLEAN: tl.constexpr):  # fmt: skip
    """The same from keys lo .. hi; m0 is the first row."""
    for n0 in tl.range(lo, hi, BLOCK_N):
        if x.blocks is None:
            dq = query_gradient_tile(x, seq, head, m, q, do, dout, lse, delta, dlse, dq, dweights, keys, values, n0,
                                     BLOCK_N, MASKED, WHOLE, CLEAN)  # fmt: skip
        else:
            if shown(x, seq, head, m0, n0):
                dq = query_gradient_tile(x, seq, head, m, q, do, dout, lse, delta, dlse, dq, dweights, keys, values,
                                         n0, BLOCK_N, MASKED, WHOLE, CLEAN)  # fmt: skip
    return dq


@triton.jit
def query_gradient_kernel(x, dquery, lse, delta, dlse, dout, dweights, keys, values, schedule, row_blocks,
                          WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                          BLOCK_DV: tl.constexpr, STEPS: tl.constexpr):  # fmt: skip
    """dQ, [B, H, M, D]."""
    if schedule is not None:
        if tl.program_id(0) >= x.heads * tl.load(schedule.ends + schedule.batch - 1).to(tl.int32):
            return
    b, head, block = block_of(x, schedule, row_blocks, x.heads, STEPS)
    seq = sequence(x, b)
    m0 = block * BLOCK_M
    r = m0 + tl.arange(0, BLOCK_M)
    m = tl.minimum(r, seq.rows - 1)
    d = tl.arange(0, BLOCK_D)
    row_lse = tl.load(rows_of(lse, b, head, seq.row_start, m, 0))
    row_delta = tl.load(rows_of(delta, b, head, seq.row_start, m, 0))
    alive = row_lse != -INF
    row_lse = tl.where(alive, row_lse, INF)
    q = load_rows(x.query, b, head, seq.row_start, m, alive, x.D, BLOCK_D)
    do = load_rows(dout, b, head, seq.row_start, m, alive, x.DV, BLOCK_DV)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    last = tl.minimum(m0 + BLOCK_M, seq.rows) - 1
    begin, full_begin, full_end, end = key_range(x, seq, m0, last, BLOCK_N)
    first = begin
    if x.split:
        if x.left is not None:
            dq = query_gradient_keys(x, seq, head, m, m0, q, do, dout, row_lse, row_delta, dlse, dq, dweights, keys,
                                     values, begin, full_begin, BLOCK_N, True, WHOLE, False)  # fmt: skip
        dq = query_gradient_keys(x, seq, head, m, m0, q, do, dout, row_lse, row_delta, dlse, dq, dweights, keys, values,
                                 full_begin, full_end, BLOCK_N, False, WHOLE, False)  # fmt: skip
        first = full_end
    dq = query_gradient_keys(x, seq, head, m, m0, q, do, dout, row_lse, row_delta, dlse, dq, dweights, keys, values,
                             first, end, BLOCK_N, True, WHOLE, False)  # fmt: skip
    if spoiled(dq):
        dq = tl.zeros_like(dq)
        dq = query_gradient_keys(x, seq, head, m, m0, q, do, dout, row_lse, row_delta, dlse, dq, dweights, keys, values,
                                 begin, end, BLOCK_N, True, WHOLE, True)  # fmt: skip
    p_dquery = rows_of(dquery, b, head, seq.row_start, m[:, None], d[None, :])
    at = (r < seq.rows)[:, None] & (d < x.head_dim)[None, :]
    tl.store(p_dquery, (dq * x.scale).to(dquery.p.dtype.element_ty), mask=at)
