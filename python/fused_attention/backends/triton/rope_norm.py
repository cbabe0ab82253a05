"""RMS norm per head, then rotary embedding, of query and key in one launch; forward and backward.

    forward     r = 1 / sqrt(mean(x^2) + eps);  n = x * r * weight;  (a, b) = a pair of n's first R dims
                y = (a cos - b sin, b cos + a sin);  the other dims of n pass through
    backward    dn = (da cos + db sin, db cos - da sin);  g = dn * weight;  u = x * r
                dx = r * (g - u * mean(g u));  dweight = sum over rows of dn * u

(Zhang & Sennrich, "Root mean square layer normalization", 2019; Henry et al., "Query-key normalization for
transformers", 2020; Su et al., "RoFormer", 2021.)

query [B, H, M, D] and key [B, HK, N, D] lie in memory in any order with D innermost. Their rows (b, h, m) are numbered
through in that order, b outermost; the first programs take query's rows, the others key's, BLOCK_M rows at a time. A
row is held as its parts: a [HALF], b [HALF] and the dims that pass through, REST = D - 2 HALF. Where a weight wants a
gradient, each program of the backward pass goes through many blocks and writes one row of partial sums, which are
added up afterwards in a fixed order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layout import output_like, rows_contiguous
from ..reference_ops import Tables
from .launch import Launch, compile_options, run
from .tiles import View


class Side(NamedTuple):
    """The rows of query or of key, and what is read and written for them."""

    x: View | None  # [B, H, S, D]; in the backward pass only where a weight is given
    dy: View | None  # backward only
    y: View  # y, or dx in the backward pass
    weight: Any  # [D] or None
    partial: Any  # float32 [programs, D], where the weight wants a gradient
    count: Any  # B H S
    outer: Any  # sizes of the two dims below b in memory order: (H, S), or (S, H) if heads_inner
    inner: Any
    programs: Any
    heads_inner: Any  # constexpr


class Turn(NamedTuple):
    """The tables [L, HALF] with their row strides, and positions [B|1, S]."""

    cos: Any
    cos_row: Any
    sin: Any
    sin_row: Any
    length: Any  # L
    positions: Any  # None: a token's index is its position
    position_b: Any
    position_s: Any


class Parts(NamedTuple):
    """Rows in their three parts; a part without dims is a masked column, or the number 0 for rest."""

    a: Any  # [BLOCK_M, BLOCK_HALF]
    b: Any  # [BLOCK_M, BLOCK_HALF]
    rest: Any  # [BLOCK_M, BLOCK_REST]


class Shape(NamedTuple):
    """Constexprs: which dims the parts are."""

    D: Any
    HALF: Any
    REST: Any
    BLOCK_HALF: Any
    BLOCK_REST: Any
    ROTATED: Any
    INTERLEAVED: Any


@triton.jit
def _rows(side, block, BLOCK_M: tl.constexpr, WIDE: tl.constexpr):
    """b, h, s of a block's rows and which of them there are. [BLOCK_M] each, int64."""
    # A division by 64-bit numbers costs ten times one by 32-bit numbers: only where there are that many rows.
    r = (tl.cast(block, tl.int64) if WIDE else block) * BLOCK_M + tl.arange(0, BLOCK_M)
    inner = (r % side.inner).to(tl.int64)
    above = r // side.inner
    outer = (above % side.outer).to(tl.int64)
    b = (above // side.outer).to(tl.int64)
    present = r < side.count
    if side.heads_inner:
        return b, inner, outer, present
    return b, outer, inner, present


@triton.jit
def _pointers(t, b, h, s):
    """To dim 0 of rows of t. [BLOCK_M, 1]"""
    return t.p + (b * t.b + h * t.h + s * t.m)[:, None]


@triton.jit
def _load_parts(row, present, shape):
    """Rows in float32, 0 where there is nothing. row: pointers to dim 0, [BLOCK_M, 1]."""
    if shape.INTERLEAVED:
        # Both of a pair come in one read of what lies side by side.
        d = tl.arange(0, 2 * shape.BLOCK_HALF)[None, :]
        x = tl.load(row + d, mask=present[:, None] & (d < 2 * shape.HALF), other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (present.shape[0], shape.BLOCK_HALF, 2)))
    else:
        d = tl.arange(0, shape.BLOCK_HALF)[None, :]
        there = present[:, None] & (d < shape.HALF)
        a = tl.load(row + d, mask=there, other=0.0).to(tl.float32)
        b = tl.load(row + shape.HALF + d, mask=there, other=0.0).to(tl.float32)
    rest = 0.0
    if shape.REST > 0:
        d = tl.arange(0, shape.BLOCK_REST)[None, :]
        there = present[:, None] & (d < shape.REST)
        rest = tl.load(row + 2 * shape.HALF + d, mask=there, other=0.0).to(tl.float32)
    return Parts(a, b, rest)


@triton.jit
def _store_parts(row, x, present, shape):
    kind = row.dtype.element_ty
    if shape.INTERLEAVED:
        d = tl.arange(0, 2 * shape.BLOCK_HALF)[None, :]
        both = tl.reshape(tl.join(x.a.to(kind), x.b.to(kind)), (present.shape[0], 2 * shape.BLOCK_HALF))
        tl.store(row + d, both, mask=present[:, None] & (d < 2 * shape.HALF))
    else:
        d = tl.arange(0, shape.BLOCK_HALF)[None, :]
        there = present[:, None] & (d < shape.HALF)
        tl.store(row + d, x.a.to(kind), mask=there)
        tl.store(row + shape.HALF + d, x.b.to(kind), mask=there)
    if shape.REST > 0:
        d = tl.arange(0, shape.BLOCK_REST)[None, :]
        tl.store(row + 2 * shape.HALF + d, x.rest.to(kind), mask=present[:, None] & (d < shape.REST))


@triton.jit
def _load_weight(weight, shape):
    """The weight as parts of one row, [1, ...]."""
    # Read in one dimension: a block [1, D] would spread over all warps, and force that layout upon the rows.
    d = tl.arange(0, shape.BLOCK_HALF)
    step = 2 if shape.INTERLEAVED else 1
    a = tl.load(weight + d * step, mask=d < shape.HALF, other=0.0).to(tl.float32)
    b = tl.load(weight + (1 if shape.INTERLEAVED else shape.HALF) + d * step, mask=d < shape.HALF, other=0.0)
    d = tl.arange(0, shape.BLOCK_REST)
    rest = tl.load(weight + 2 * shape.HALF + d, mask=d < shape.REST, other=0.0).to(tl.float32)
    return Parts(a[None, :], b.to(tl.float32)[None, :], rest[None, :])


@triton.jit
def _times(x, y):
    return Parts(x.a * y.a, x.b * y.b, x.rest * y.rest)


@triton.jit
def _scaled(x, f):
    """f: a number for each row, [BLOCK_M, 1]."""
    return Parts(x.a * f, x.b * f, x.rest * f)


@triton.jit
def _mean(x, y, shape):
    """Over D, of x * y. [BLOCK_M, 1]"""
    total = tl.sum(x.a * y.a + x.b * y.b, 1)
    if shape.REST > 0:
        total += tl.sum(x.rest * y.rest, 1)
    return (total / shape.D)[:, None]


@triton.jit
def _inverse_rms(x, eps, shape):
    return 1.0 / tl.sqrt_rn(_mean(x, x, shape) + eps)  # [BLOCK_M, 1]


@triton.jit
def _cos_sin(turn, b, s, present, shape):
    """[BLOCK_M, BLOCK_HALF] each; NaN for a position outside the table."""
    position = s
    if turn.positions is not None:
        position = tl.load(turn.positions + b * turn.position_b + s * turn.position_s, mask=present, other=0)
        position = position.to(tl.int64)
    inside = (position >= 0) & (position < turn.length)
    d = tl.arange(0, shape.BLOCK_HALF)[None, :]
    wanted = present[:, None] & (d < shape.HALF)
    there = wanted & inside[:, None]
    cos = tl.load(turn.cos + (position * turn.cos_row)[:, None] + d, mask=there, other=0.0)
    sin = tl.load(turn.sin + (position * turn.sin_row)[:, None] + d, mask=there, other=0.0)
    outside = wanted & (inside[:, None] == 0)
    return tl.where(outside, float("nan"), cos), tl.where(outside, float("nan"), sin)


@triton.jit
def _forward(side, turn, eps, block, BLOCK_M: tl.constexpr, WIDE: tl.constexpr, shape):
    b, h, s, present = _rows(side, block, BLOCK_M, WIDE)
    n = _load_parts(_pointers(side.x, b, h, s), present, shape)
    if side.weight is not None:
        n = _times(_scaled(n, _inverse_rms(n, eps, shape)), _load_weight(side.weight, shape))
    if shape.ROTATED:
        cos, sin = _cos_sin(turn, b, s, present, shape)
        n = Parts(n.a * cos - n.b * sin, n.b * cos + n.a * sin, n.rest)
    _store_parts(_pointers(side.y, b, h, s), n, present, shape)


@triton.jit
def _gradient(side, turn, eps, block, BLOCK_M: tl.constexpr, WIDE: tl.constexpr, shape):
    """Writes dx of one block; returns its terms of dweight. [BLOCK_M, ...]"""
    b, h, s, present = _rows(side, block, BLOCK_M, WIDE)
    dn = _load_parts(_pointers(side.dy, b, h, s), present, shape)
    if shape.ROTATED:
        cos, sin = _cos_sin(turn, b, s, present, shape)
        dn = Parts(dn.a * cos + dn.b * sin, dn.b * cos - dn.a * sin, dn.rest)
    dx, terms = dn, dn
    if side.weight is not None:
        x = _load_parts(_pointers(side.x, b, h, s), present, shape)
        r = _inverse_rms(x, eps, shape)
        g = _times(dn, _load_weight(side.weight, shape))
        f = r * r * _mean(g, x, shape)
        dx = Parts(r * (g.a - x.a * f), r * (g.b - x.b * f), r * (g.rest - x.rest * f))
        terms = _times(dn, _scaled(x, r))  # rows that are not there hold 0 and add nothing
    _store_parts(_pointers(side.y, b, h, s), dx, present, shape)
    return terms


@triton.jit
def _process(side, turn, eps, pid, BLOCK_M: tl.constexpr, WIDE: tl.constexpr, BACKWARD: tl.constexpr, shape):
    if not BACKWARD:
        _forward(side, turn, eps, pid, BLOCK_M, WIDE, shape)
    elif side.partial is None:
        _gradient(side, turn, eps, pid, BLOCK_M, WIDE, shape)
    else:
        # The sums stay spread over the rows of the block until the end: one reduction a program, not one a block.
        a = tl.zeros([BLOCK_M, shape.BLOCK_HALF], tl.float32)
        b = tl.zeros([BLOCK_M, shape.BLOCK_HALF], tl.float32)
        rest = tl.zeros([BLOCK_M, shape.BLOCK_REST], tl.float32)
        for block in range(pid, tl.cdiv(side.count, BLOCK_M), side.programs):
            terms = _gradient(side, turn, eps, block, BLOCK_M, WIDE, shape)
            a += terms.a
            b += terms.b
            rest += terms.rest
        sums = Parts(tl.sum(a, 0)[None, :], tl.sum(b, 0)[None, :], tl.sum(rest, 0)[None, :])
        row = side.partial + tl.cast(pid, tl.int64) * shape.D + tl.zeros([1, 1], tl.int32)
        _store_parts(row, sums, tl.full([1], 1, tl.int1), shape)


@triton.jit
def rope_norm_kernel(
    query, key, turn, eps, shape,
    BLOCK_M: tl.constexpr, WIDE: tl.constexpr, BACKWARD: tl.constexpr, QUERY: tl.constexpr, KEY: tl.constexpr,
):  # fmt: skip
    """Programs of query come first. QUERY, KEY: whether there is one."""
    pid = tl.program_id(0)
    if not KEY:
        _process(query, turn, eps, pid, BLOCK_M, WIDE, BACKWARD, shape)
    elif not QUERY:
        _process(key, turn, eps, pid, BLOCK_M, WIDE, BACKWARD, shape)
    else:
        if pid < query.programs:
            _process(query, turn, eps, pid, BLOCK_M, WIDE, BACKWARD, shape)
        else:
            _process(key, turn, eps, pid - query.programs, BLOCK_M, WIDE, BACKWARD, shape)


# --- launcher -------------------------------------------------------------------------------------------------------

MAX_DIM = 8192  # a row is held in registers: 16 values a thread in 16 warps


class Given(NamedTuple):
    """What is read for query or for key [B, H, S, D]; nothing at all where there is none."""

    x: Tensor | None = None  # in the backward pass only where a weight is given
    weight: Tensor | None = None
    dy: Tensor | None = None  # makes it the backward pass
    weight_gradient: bool = False


class Made(NamedTuple):
    """y, or dx in the backward pass; and the partial sums [programs, D] of dweight, where they were asked for."""

    y: Tensor | None
    partial: Tensor | None


class Config(NamedTuple):
    BLOCK_M: int
    warps: int
    programs: int  # of a side in the backward pass, where they write partial sums


def rope_norm_config(arch: str | None, shape: Shape) -> Config:
    """Rows and warps of a program. The kernels wait for memory alone, so all of it is about bytes in flight."""
    # A wavefront has 64 threads on gfx9, a warp 32.
    lanes = 64 if arch is not None and arch.startswith("gfx") else 32
    width = triton.next_power_of_2(2 * shape.BLOCK_HALF.value + (shape.BLOCK_REST.value if shape.REST.value else 0))
    # 8 values a thread in 128 threads: at D 128 the backward pass, which holds x, dy, the sums, cos and sin, takes 70
    # registers, and 7 programs share a multiprocessor. On gfx942 4 a thread: a mask takes two of 102 scalar registers.
    block_m = max(1, (512 if lanes == 64 else 1024) // width)
    threads = min(max(128, width * block_m // 8), 512)
    # 1024 programs fill 132 multiprocessors 8 deep; the number follows from no chip's own count, so that weight
    # gradients have the same bits on chips of one kind.
    return Config(block_m, threads // lanes, 1024)


def _shape(head_dim: int, tables: Tables | None) -> Shape:
    rotated = tables is not None and tables.cos.shape[-1] > 0
    # Without a rotation the row is cut in two all the same, so that it is held in the same parts.
    half = tables.cos.shape[-1] if tables is not None and rotated else head_dim // 2
    rest = head_dim - 2 * half
    block_half, block_rest = (triton.next_power_of_2(max(n, 1)) for n in (half, rest))
    interleaved = tables is not None and rotated and tables.interleaved
    return Shape(*(tl.constexpr(v) for v in (head_dim, half, rest, block_half, block_rest, rotated, interleaved)))


def _view(t: Tensor) -> View:
    return View(t, *t.stride()[:3])


def _turn(tables: Tables | None) -> Turn | None:
    if tables is None or tables.cos.shape[-1] == 0:
        return None
    cos, sin, positions = rows_contiguous(tables.cos), rows_contiguous(tables.sin), tables.positions
    position_b = position_s = 0
    if positions is not None:
        position_b = positions.stride(0) if positions.shape[0] > 1 else 0
        position_s = positions.stride(1)
    return Turn(cos, cos.stride(0), sin, sin.stride(0), cos.shape[0], positions, position_b, position_s)


def _side(given: Given, config: Config) -> tuple[Side | None, Made]:
    """The rows are numbered in the memory order of x, and y lies in it; of dy where x is not needed."""
    like = given.x if given.x is not None else given.dy
    if like is None:
        return None, Made(None, None)
    batch, heads, length, dim = like.shape
    y = output_like(like, batch, dim)
    if like.numel() == 0:
        return None, Made(y, None)
    heads_inner = like.stride(1) < like.stride(2)
    count = like.numel() // dim
    programs, partial = triton.cdiv(count, config.BLOCK_M), None
    if given.weight_gradient:
        programs = min(programs, config.programs)
        partial = torch.empty(programs, dim, dtype=torch.float32, device=like.device)
    side = Side(
        x=None if given.x is None else _view(rows_contiguous(given.x)),
        dy=None if given.dy is None else _view(rows_contiguous(given.dy)),
        y=_view(y),
        weight=None if given.weight is None else given.weight.contiguous(),
        partial=partial,
        count=count,
        outer=length if heads_inner else heads,
        inner=heads if heads_inner else length,
        programs=programs,
        heads_inner=tl.constexpr(heads_inner),
    )
    return side, Made(y, partial)


def launches(
    query: Given, key: Given, tables: Tables | None, eps: float, arch: str | None
) -> tuple[list[Launch], Made, Made]:
    """The launch of the forward or of the backward pass, and what it fills for query and for key."""
    like = next(t for t in (query.x, query.dy, key.x, key.dy) if t is not None)
    shape = _shape(like.shape[3], tables)
    config = rope_norm_config(arch, shape)
    query_side, query_made = _side(query, config)
    key_side, key_made = _side(key, config)
    present = [side for side in (query_side, key_side) if side is not None]
    if not present:
        return [], query_made, key_made
    options = {
        "BLOCK_M": config.BLOCK_M,
        "WIDE": any(side.count + config.BLOCK_M >= 2**31 for side in present),
        "BACKWARD": query.dy is not None or key.dy is not None,
        "QUERY": query_side is not None,
        "KEY": key_side is not None,
    } | compile_options(arch, config.warps)
    args = (query_side, key_side, _turn(tables), eps, shape)
    grid = (sum(side.programs for side in present),)
    return [Launch(rope_norm_kernel, grid, args, options)], query_made, key_made


def rope_norm(query: Given, key: Given, tables: Tables | None, eps: float, arch: str | None) -> tuple[Made, Made]:
    """Run the forward pass, or the backward pass where a dy is given."""
    todo, query_made, key_made = launches(query, key, tables, eps, arch)
    where = query_made.y if query_made.y is not None else key_made.y
    assert where is not None
    run(todo, where)
    return query_made, key_made
