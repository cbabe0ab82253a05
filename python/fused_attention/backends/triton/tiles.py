"""What every attention kernel is made of: views, rows of a tile, scores, matrix products, the dropout mask.

A tensor and its strides stand together in a `View`; `None` in place of a tensor or an option is known when the kernel
is compiled, so that what is absent costs nothing. A tile lies either way, [BLOCK_M, BLOCK_N] or transposed: functions
take row and column numbers that broadcast against it ([BLOCK_M, 1] and [1, BLOCK_N], or the reverse).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .launch import INTERPRETED as _interpreted

INTERPRETED = tl.constexpr(_interpreted)
LOG2E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(float("inf"))


class View(NamedTuple):
    """A tensor [B, H, M, D] (or [B, H, M, N]): its pointer and strides, 0 where it broadcasts.

    The last stride is that of rows in the tensors [..., D], which are contiguous in D.
    """

    p: Any
    b: Any
    h: Any
    m: Any
    n: Any = 0  # masks, biases and weights only


class Problem(NamedTuple):
    """One call as the kernels see it; None where an option is absent."""

    query: View
    key: View
    value: View
    mask: View | None  # bool or floating
    bias: View | None
    slopes: View | None  # ALiBi, float32 [B, H]
    sinks: Any  # float32 [H]
    key_lengths: Any  # int64 [B]
    starts_q: Any  # int64 [B + 1], packed sequences
    starts_k: Any
    seed: Any  # int64 [1]
    blocks: View | None  # bool, which blocks of scores are visible; every tile lies in one of them
    rows: Any  # M
    columns: Any  # N
    heads: Any  # H
    batch: Any  # B
    scale: Any
    softcap: Any
    left: Any  # keys left of the diagonal that are visible
    right: Any  # right of it; 0 if causal
    threshold: Any  # dropout: kept iff the word, with its top bit flipped, is at least this as a signed number
    keep_factor: Any  # 1 / (1 - p)
    block_rows: Any  # of a block of `blocks`
    block_columns: Any
    group: Any  # constexpr: query heads that share a key head
    D: Any  # constexpr: head dims as tensors are read, multiples of ALIGN
    DV: Any  # constexpr
    head_dim: Any  # constexpr: as they are written
    value_dim: Any  # constexpr
    bottom_right: Any  # constexpr
    raw: Any  # constexpr: scores are the bare products, and the scale is left to the exponent
    exact: Any  # constexpr: float32, where the last bits count
    precision: Any  # constexpr: of products of float32: "ieee", "tf32"
    chunk: Any  # constexpr: head dims that a product takes at a time, or 0 for all
    split: Any  # constexpr: tiles that are visible as a whole have a loop of their own, without mask arithmetic


class Sequence(NamedTuple):
    """One element of the batch."""

    b: Any
    slot: Any  # its place in query, key and value: b, or 0 where sequences are packed
    row_start: Any  # of a packed sequence
    key_start: Any
    rows: Any
    columns: Any
    diagonal: Any  # the key on the diagonal of row 0


@triton.jit
def sequence(x, b):
    """Where element b of the batch lies and how long it is."""
    slot, row_start, key_start = b, 0, 0
    rows, columns = x.rows, x.columns
    if x.starts_q is not None:
        slot = 0
        row_start = tl.load(x.starts_q + b)
        key_start = tl.load(x.starts_k + b)
        rows = (tl.load(x.starts_q + b + 1) - row_start).to(tl.int32)
        columns = (tl.load(x.starts_k + b + 1) - key_start).to(tl.int32)
    if x.key_lengths is not None:
        columns = tl.load(x.key_lengths + b).to(tl.int32)
    diagonal = 0
    if x.bottom_right:
        diagonal = columns - rows
    return Sequence(b, slot, row_start, key_start, rows, columns, diagonal)


@triton.jit
def rows_of(view, b, h, start, m, d):
    """Pointers to rows start + m of head h, [rows, D]; h may be a scalar or one per row.

    What is scalar is added first: in a loop over `start` the offsets within the tile stay the same.
    """
    base = view.p + tl.cast(b, tl.int64) * view.b + tl.cast(h, tl.int64) * view.h + tl.cast(start, tl.int64) * view.m
    return base + (tl.cast(m, tl.int64) * view.m + d)


@triton.jit
def load_tile(view, descriptor, b, slot, h, start, i, limit, D: tl.constexpr, BLOCK: tl.constexpr,
              BLOCK_D: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Rows i .. i + BLOCK of a sequence that begins at `start`, [BLOCK, BLOCK_D].

    0 past D. MASKED: the tile may reach past `limit`; what is read there must not matter (0 through pointers, the next
    rows or 0 through a descriptor).
    """
    r = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    if descriptor is not None:
        tile = descriptor.load([slot, h, tl.cast(start + i, tl.int32), 0]).reshape(BLOCK, BLOCK_D)
    else:
        p = rows_of(view, b, h, start + i, r[:, None], d[None, :])
        if MASKED:
            tile = tl.load(p, mask=(i + r < limit)[:, None] & (d < D)[None, :], other=0.0)
        elif D == BLOCK_D:
            tile = tl.load(p)
        else:
            tile = tl.load(p, mask=(d < D)[None, :], other=0.0)
    return tile


@triton.jit
def load_rows(view, b, h, start, m, alive, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows start + m, [BLOCK_M, BLOCK_D]; 0 past D and for rows that are not alive."""
    d = tl.arange(0, BLOCK_D)
    at = alive[:, None] & (d < D)[None, :]
    return tl.load(rows_of(view, b, h, start, m[:, None], d[None, :]), mask=at, other=0.0)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in float32; PRECISION concerns float32 operands: "ieee" or "tf32"."""
    if INTERPRETED:
        # numpy has no bfloat16. It sums in an order that depends on how the operands lie, where a chip's fused
        # multiply-adds take one order, so that a score has the same bits in every kernel: here by rounding once.
        acc += tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def chunked(x, a, a_head, a_start, a_rows, a_limit, b, b_head, b_start, b_rows, b_limit, seq, D: tl.constexpr,
            BLOCK_D: tl.constexpr):  # fmt: skip
    """a b^T, [len(a_rows), len(b_rows)], a few of the head dims at a time and from memory.

    IEEE products of float32 are fused multiply-adds that hold both operands in registers over all dims taken at once.
    """
    total = tl.zeros([a_rows.shape[0], b_rows.shape[0]], tl.float32)
    for d0 in tl.range(0, BLOCK_D, x.chunk, num_stages=1):
        d = (d0 + tl.arange(0, x.chunk))[None, :]
        p_a = rows_of(a, seq.b, a_head, a_start, a_rows[:, None], d)
        p_b = rows_of(b, seq.b, b_head, b_start, b_rows[:, None], d)
        left = tl.load(p_a, mask=(a_rows < a_limit)[:, None] & (d < D), other=0.0)
        right = tl.load(p_b, mask=(b_rows < b_limit)[:, None] & (d < D), other=0.0)
        total = dot(left, right.T, total, x.precision)
    return total


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    """tanh from exp2. EXACT: to float32's last bits everywhere, by the odd series where 1 - e cancels."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    y = (1.0 - e) / (1.0 + e)
    if EXACT:
        x2 = x * x
        series = -1382.0 / 155925.0
        series = series * x2 + 62.0 / 2835.0
        series = series * x2 - 17.0 / 315.0
        series = series * x2 + 2.0 / 15.0
        series = series * x2 - 1.0 / 3.0
        small = tl.abs(x)
        y = tl.where(small < 0.25, small + small * x2 * series, y)
    return tl.where(x < 0, -y, y)


@triton.jit
def exponent(x):
    """What turns a difference of scores into the argument of exp2."""
    factor = LOG2E
    if x.raw:
        factor = x.scale * LOG2E
    return factor


@triton.jit
def term(view, seq, h, m, n, MASKED: tl.constexpr):
    """The tile of a mask or bias at rows m, all of which exist, and keys n."""
    p = view.p + tl.cast(seq.b, tl.int64) * view.b + tl.cast(h, tl.int64) * view.h
    p += tl.cast(m, tl.int64) * view.m + tl.cast(n, tl.int64) * view.n
    if MASKED:
        t = tl.load(p, mask=n < seq.columns, other=0)
    else:
        t = tl.load(p)
    return t


@triton.jit
def add_term(s, t):
    """A bool mask hides; of a floating term -inf hides, also what is NaN, and the rest is added."""
    if t.dtype == tl.int1:
        s = tl.where(t, s, -INF)
    else:
        t = t.to(tl.float32)
        s = tl.where(t == -INF, -INF, s + t)
    return s


@triton.jit
def capped(x, s):
    """From the products q k to scores before anything is added, in units of `exponent`."""
    if not x.raw:
        s = s * x.scale
    if x.softcap is not None:
        s = x.softcap * tanh(s / x.softcap, x.exact)
    return s


@triton.jit
def hidden(x, s, seq, h, m, n, MASKED: tl.constexpr):
    """Add ALiBi, mask and bias; -inf where hidden. MASKED: some keys of the tile may be hidden by position."""
    center = m + seq.diagonal
    if x.slopes is not None:
        slope = tl.load(x.slopes.p + tl.cast(seq.b, tl.int64) * x.slopes.b + tl.cast(h, tl.int64) * x.slopes.h)
        s -= slope * tl.abs(center - n).to(tl.float32)
    if x.mask is not None:
        s = add_term(s, term(x.mask, seq, h, m, n, MASKED))
    if x.bias is not None:
        s = add_term(s, term(x.bias, seq, h, m, n, MASKED))
    if MASKED:
        visible = n < seq.columns
        if x.left is not None:
            visible &= n >= center - x.left
        if x.right is not None:
            visible &= n <= center + x.right
        s = tl.where(visible, s, -INF)
    return s


@triton.jit
def shown(x, seq, h, m0, n0):
    """Whether the block map shows the tile that begins at row m0 and key n0."""
    p = x.blocks.p + tl.cast(seq.b, tl.int64) * x.blocks.b + tl.cast(h, tl.int64) * x.blocks.h
    p += tl.cast(m0 // x.block_rows, tl.int64) * x.blocks.m + tl.cast(n0 // x.block_columns, tl.int64) * x.blocks.n
    return tl.load(p)


@triton.jit
def kept(x, b, h, m, n0, BLOCK_N: tl.constexpr):
    """Dropout's decision for rows m [BLOCK_M, 1] and keys n0 .. n0 + BLOCK_N: bool [BLOCK_M, BLOCK_N].

    One Philox block has four words, for four neighbouring keys; n0 is a multiple of 4.
    """
    seed = tl.load(x.seed)
    block = n0 // 4 + tl.arange(0, BLOCK_N // 4)[None, :]
    zero = tl.zeros_like(block + m)  # [BLOCK_M, BLOCK_N / 4]
    w0, w1, w2, w3 = tl.philox(seed, block + zero, m + zero, h + zero, b + zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [..., 2, 2], the last index the lower bit of the key
    words = words.reshape(m.shape[0], BLOCK_N)
    return (words ^ 0x80000000).to(tl.int32, bitcast=True) >= x.threshold


@triton.jit
def finite(t):
    """t where it is finite, else 0: 0 * NaN must not reach a sum."""
    return tl.where(tl.abs(t.to(tl.float32)) < INF, t, 0.0).to(t.dtype)


@triton.jit
def spoiled(t):
    """Whether a tile [rows, D] holds NaN or infinities."""
    return tl.max(((tl.abs(t) < INF) == 0).to(tl.int32)) > 0


@triton.jit
def key_range(x, seq, first, last, BLOCK_N: tl.constexpr):
    """Which tiles of keys rows first .. last see: begin, full_begin, full_end, end, multiples of BLOCK_N but for end.

    Tiles in begin .. full_begin and full_end .. end are hidden in part by position, those between are wholly visible,
    those outside are not visited.
    """
    begin, full_begin = 0, 0
    end, full_end = seq.columns, seq.columns
    if x.left is not None:
        begin = tl.maximum(first + seq.diagonal - x.left, 0) // BLOCK_N * BLOCK_N
        full_begin = (tl.maximum(last + seq.diagonal - x.left, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    if x.right is not None:
        end = tl.minimum(end, last + seq.diagonal + x.right + 1)
        full_end = tl.minimum(full_end, first + seq.diagonal + x.right + 1)
    full_end = tl.maximum(full_end, 0) // BLOCK_N * BLOCK_N
    full_begin = tl.minimum(full_begin, tl.maximum(end, begin))
    return begin, full_begin, tl.maximum(full_end, full_begin), end


@triton.jit
def row_range(x, seq, n0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which tiles of rows see keys n0 .. n0 + BLOCK_N: as `key_range`, with BLOCK_M."""
    first, last = n0 - seq.diagonal, tl.minimum(n0 + BLOCK_N, seq.columns) - 1 - seq.diagonal
    begin, full_begin = 0, 0
    end, full_end = seq.rows, seq.rows
    if x.right is not None:
        begin = tl.maximum(first - x.right, 0) // BLOCK_M * BLOCK_M
        full_begin = (tl.maximum(last - x.right, 0) + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    if x.left is not None:
        end = tl.minimum(end, last + x.left + 1)
        full_end = tl.minimum(full_end, first + x.left + 1)
    # A tile that reaches past the last key is never wholly visible; one beyond it is not visible at all.
    full_end = tl.where(n0 + BLOCK_N > seq.columns, 0, tl.maximum(full_end, 0) // BLOCK_M * BLOCK_M)
    end = tl.where(n0 < seq.columns, end, 0)
    full_begin = tl.minimum(full_begin, tl.maximum(end, begin))
    return begin, full_begin, tl.maximum(full_end, full_begin), end
