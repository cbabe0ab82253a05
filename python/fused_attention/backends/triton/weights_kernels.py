"""Attention weights, and the gradient of a mask or bias: kernels whose results are as large as the scores.

weights = Z exp(scores - shift) / sum, per head or averaged over heads, a tile at a time: what is averaged is never
held per head. shift and sum are the forward kernel's own, because exp(scores - lse) with a rounded lse is off by
the rounding error of lse.

dBias = sum of dS over the dimensions in which the bias broadcasts, in a fixed order: each program sums its share of
the repetitions one after the other, and the shares are added in order afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .backward_kernels import probabilities, score_gradient
from .forward_kernels import block_of, load_keys, products
from .tiles import INF, LOG2E, chunked, dot, exponent, kept, key_range, load_rows, rows_of, sequence, shown


@triton.jit
def tile_pointers(view, b, h, m, n):
    """Pointers into [B, H, M, N]; m and n broadcast against each other."""
    base = view.p + tl.cast(b, tl.int64) * view.b + tl.cast(h, tl.int64) * view.h
    return base + tl.cast(m, tl.int64) * view.m + tl.cast(n, tl.int64) * view.n


@triton.jit
def weights_tile(x, seq, b, head, m, exists, n0, shift, inverse, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """The weights of one head at rows m and keys n0 .. n0 + BLOCK_N, [BLOCK_M, BLOCK_N]."""
    q = load_rows(x.query, b, head, seq.row_start, m, exists, x.D, BLOCK_D)
    s = products(x, seq, head, head // x.group, m[:, None], q, n0, None, BLOCK_N, True)
    t = tl.load(rows_of(shift, b, head, seq.row_start, m, 0))[:, None]
    if x.exact:
        p = tl.exp2((s - t) * exponent(x))
    else:
        p = tl.exp2(s * exponent(x) - t * LOG2E)
    p = p * tl.load(rows_of(inverse, b, head, seq.row_start, m, 0))[:, None]
    if x.threshold is not None:
        p = tl.where(kept(x, b, head, m[:, None], n0, BLOCK_N), p * x.keep_factor, 0.0)
    return p


@triton.jit
def weights_kernel(x, weights, shift, inverse, row_blocks, key_blocks, MEAN: tl.constexpr, BLOCK_M: tl.constexpr,
                   BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """weights [B, M, N] (MEAN; a head stride of 0) or [B, H, M, N]; shift and inverse = 1 / sum [B, H, M]."""
    i = tl.program_id(0)
    n0, m0, rest = i % key_blocks * BLOCK_N, i // key_blocks % row_blocks * BLOCK_M, i // key_blocks // row_blocks
    heads = 1 if MEAN else x.heads
    first, b = rest % heads, rest // heads
    seq = sequence(x, b)
    r = m0 + tl.arange(0, BLOCK_M)
    m = tl.minimum(r, seq.rows - 1)
    n = n0 + tl.arange(0, BLOCK_N)
    exists = r < seq.rows
    begin, full_begin, full_end, end = key_range(x, seq, m0, tl.minimum(m0 + BLOCK_M, seq.rows) - 1, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if (n0 >= begin) & (n0 < end):
        for head in range(first, first + (x.heads if MEAN else 1)):
            if x.blocks is None:
                total += weights_tile(x, seq, b, head, m, exists, n0, shift, inverse, BLOCK_N, BLOCK_D)
            else:
                if shown(x, seq, head, m0, n0):
                    total += weights_tile(x, seq, b, head, m, exists, n0, shift, inverse, BLOCK_N, BLOCK_D)
    if MEAN:
        total = total / x.heads
    at = exists[:, None] & (n < x.columns)[None, :]
    tl.store(tile_pointers(weights, b, first, m[:, None], n[None, :]), total.to(weights.p.dtype.element_ty), mask=at)


@triton.jit
def weight_dots(x, seq, b, head, m, q, n0, row_lse, dweights, BLOCK_N: tl.constexpr):
    """sum_j weights dW over keys n0 .. n0 + BLOCK_N, [BLOCK_M]."""
    n = n0 + tl.arange(0, BLOCK_N)[None, :]
    s = products(x, seq, head, head // x.group, m[:, None], q, n0, None, BLOCK_N, True)
    w = probabilities(x, s, row_lse, head, 1, False)
    if x.threshold is not None:
        w = tl.where(kept(x, b, head, m[:, None], n0, BLOCK_N), w * x.keep_factor, 0.0)
    dw = tl.load(tile_pointers(dweights, b, head, m[:, None], n), mask=n < seq.columns, other=0.0).to(tl.float32)
    return tl.sum(tl.where(s == -INF, 0.0, w * dw), 1)


@triton.jit
def weights_delta_kernel(x, delta, lse, dweights, row_blocks, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                         BLOCK_D: tl.constexpr):  # fmt: skip
    """delta += sum_j weights dW, [B, H, M]."""
    b, head, block = block_of(x, None, row_blocks, x.heads, 0)
    seq = sequence(x, b)
    r = block * BLOCK_M + tl.arange(0, BLOCK_M)
    m = tl.minimum(r, seq.rows - 1)
    row_lse = tl.load(rows_of(lse, b, head, seq.row_start, m, 0))
    alive = row_lse != -INF
    row_lse = tl.where(alive, row_lse, INF)[:, None]
    q = load_rows(x.query, b, head, seq.row_start, m, alive, x.D, BLOCK_D)
    last = tl.minimum(block * BLOCK_M + BLOCK_M, seq.rows) - 1
    begin, full_begin, full_end, end = key_range(x, seq, block * BLOCK_M, last, BLOCK_N)
    total = tl.zeros([BLOCK_M], tl.float32)
    for n0 in range(begin, end, BLOCK_N):
        if x.blocks is None:
            total += weight_dots(x, seq, b, head, m, q, n0, row_lse, dweights, BLOCK_N)
        else:
            if shown(x, seq, head, block * BLOCK_M, n0):
                total += weight_dots(x, seq, b, head, m, q, n0, row_lse, dweights, BLOCK_N)
    if dweights.h == 0:  # averaged over heads
        total = total / x.heads
    p_delta = rows_of(delta, b, head, seq.row_start, m, 0)
    tl.store(p_delta, tl.load(p_delta) + total, mask=r < seq.rows)


@triton.jit
def additive_gradient_kernel(x, grad, repeats, chunk, lse, delta, dlse, dout, dweights, row_blocks, key_blocks,
                             WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                             BLOCK_DV: tl.constexpr):  # fmt: skip
    """The gradient of a mask or bias: grad.p float32 [shares, B', H', M', N'], each primed size full or 1.

    repeats = (batches, heads, row blocks, key blocks) to sum over: 1 each where the size is full. One program sums
    `chunk` of their product, in order, into one tile.
    """
    batches, heads, repeated_rows, repeated_keys = repeats
    i = tl.program_id(0)
    # The tile of the gradient, from the innermost dimension outwards, then the share.
    stored_keys, stored_rows = key_blocks // repeated_keys, row_blocks // repeated_rows
    key_block = i % stored_keys
    row_block = i // stored_keys % stored_rows
    h = i // stored_keys // stored_rows % (x.heads // heads)
    rest = i // stored_keys // stored_rows // (x.heads // heads)
    b, share = rest % (x.batch // batches), rest // (x.batch // batches)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    steps = batches * heads * repeated_rows * repeated_keys
    for step in range(share * chunk, tl.minimum(share * chunk + chunk, steps)):
        m0 = (row_block + step // repeated_keys % repeated_rows) * BLOCK_M
        n0 = (key_block + step % repeated_keys) * BLOCK_N
        head = h + step // repeated_keys // repeated_rows % heads
        seq = sequence(x, b + step // repeated_keys // repeated_rows // heads)
        begin, full_begin, full_end, end = key_range(x, seq, m0, tl.minimum(m0 + BLOCK_M, seq.rows) - 1, BLOCK_N)
        visible = (n0 >= begin) & (n0 < end)
        if x.blocks is not None:
            visible = visible & shown(x, seq, head, m0, n0)
        if visible:
            r = m0 + tl.arange(0, BLOCK_M)
            m = tl.minimum(r, seq.rows - 1)
            row_lse = tl.load(rows_of(lse, seq.b, head, seq.row_start, m, 0))
            alive = (row_lse != -INF) & (r < seq.rows)
            row_lse = tl.where(alive, row_lse, INF)[:, None]
            row_delta = tl.load(rows_of(delta, seq.b, head, seq.row_start, m, 0))[:, None]
            q = load_rows(x.query, seq.b, head, seq.row_start, m, alive, x.D, BLOCK_D)
            do = load_rows(dout, seq.b, head, seq.row_start, m, alive, x.DV, BLOCK_DV)
            n = n0 + tl.arange(0, BLOCK_N)[None, :]
            s = products(x, seq, head, head // x.group, m[:, None], q, n0, None, BLOCK_N, True)
            if x.chunk == 0:
                v = load_keys(x.value, None, seq, head // x.group, n0, x.DV, BLOCK_N, BLOCK_DV, True)
                dp = dot(do, v.T, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), x.precision)
            else:
                dp = chunked(x, dout, head, seq.row_start, m, seq.rows, x.value, head // x.group, seq.key_start,
                             n0 + tl.arange(0, BLOCK_N), seq.columns, seq, x.DV, BLOCK_DV)  # fmt: skip
            keep = None
            if x.threshold is not None:
                keep = kept(x, seq.b, head, m[:, None], n0, BLOCK_N)
            p = probabilities(x, s, row_lse, head, 1, WHOLE)
            total += score_gradient(x, p, dp, row_delta, dlse, s, dweights, seq, head, m[:, None], n, keep, 1, WHOLE,
                                    True)  # fmt: skip
    base = grad.p + tl.cast(share, tl.int64) * grad.share
    base += tl.cast(b, tl.int64) * grad.b + tl.cast(h, tl.int64) * grad.h
    m = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    n = key_block * BLOCK_N + tl.arange(0, BLOCK_N)
    if grad.M == 1 and grad.N == 1:
        tl.store(base, tl.sum(tl.sum(total, 1), 0))
    elif grad.M == 1:
        tl.store(base + n, tl.sum(total, 0), mask=n < grad.N)
    elif grad.N == 1:
        tl.store(base + m, tl.sum(total, 1), mask=m < grad.M)
    else:
        at = (m < grad.M)[:, None] & (n < grad.N)[None, :]
        tl.store(base + tl.cast(m, tl.int64)[:, None] * grad.N + n[None, :], total, mask=at)
