"""Row softmax with scale, softcap, mask and causality, forward and backward.

    forward     s = softcap * tanh(scale * x / softcap) + mask;  y = exp(s - max s) / sum exp(s - max s)
    backward    ds = y * (dy - sum y dy);  dx = scale * (1 - tanh^2) * ds

x, y, dy, dx, ds are [B, H, M, N]; the mask has stride 0 where it broadcasts. The rows of all (b, h, m) are numbered
through, m fastest; a program takes BLOCK_M of them that follow each other. A row of up to MAX_BLOCK columns is held in
registers and read once. A longer one is read twice, BLOCK_N columns at a time: for its maximum and sum (Milakov &
Gimelshein, "Online normalizer calculation for softmax", 2018), then for the values.

The backward pass needs no mask: y is 0 exactly where an entry is hidden (or too small for its gradient to be seen),
and there nothing of x or dy is used. x itself is read only for the softcap.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference_ops import Softmax, diagonal
from .launch import Launch, compile_options, run
from .tiles import LOG2E, View, tanh


class Rows(NamedTuple):
    """The rows that are numbered through, and where causality ends in them."""

    count: Any  # B H M
    heads: Any  # H
    length: Any  # M
    columns: Any  # N
    diagonal: Any  # the last visible column of row m is m + diagonal; None without causality


@triton.jit
def _indices(rows, BLOCK_M: tl.constexpr, WIDE: tl.constexpr):
    """b, h, m of this program's rows, and which of them there are. [BLOCK_M] each, int64."""
    # A division by 64-bit numbers costs ten times one by 32-bit numbers: only where there are that many rows.
    pid = tl.program_id(0)
    r = (pid.to(tl.int64) if WIDE else pid) * BLOCK_M + tl.arange(0, BLOCK_M)
    m = (r % rows.length).to(tl.int64)
    outer = r // rows.length
    return (outer // rows.heads).to(tl.int64), (outer % rows.heads).to(tl.int64), m, r < rows.count


@triton.jit
def _pointers(t, b, h, m, n):
    """[BLOCK_M, BLOCK_N]"""
    return t.p + (b * t.b + h * t.h + m * t.m)[:, None] + (n.to(tl.int64) * t.n)[None, :]


@triton.jit
def _read(rows, m, present, n):
    """Entries that are read: those that exist, without what causality hides. [BLOCK_M, BLOCK_N]"""
    read = present[:, None] & (n < rows.columns)[None, :]
    if rows.diagonal is not None:
        # By whole groups of 16: a border inside a vector of entries would make single reads of all of them.
        read = read & ((n // 16 * 16)[None, :] <= m[:, None] + rows.diagonal)
    return read


@triton.jit
def _stop(rows, m):
    """Where a row's visible columns end. BLOCK_M is 1 where this is used."""
    stop = tl.full([], 0, tl.int32) + rows.columns
    if rows.diagonal is not None:
        stop = tl.minimum(stop, tl.max(m, 0).to(tl.int32) + rows.diagonal + 1)
    return stop


@triton.jit
def _scores(x, mask, rows, b, h, m, present, n, scale, softcap, EXACT: tl.constexpr):
    """s, -inf where an entry is hidden. [BLOCK_M, BLOCK_N]"""
    read = _read(rows, m, present, n)
    s = tl.load(_pointers(x, b, h, m, n), mask=read, other=0.0).to(tl.float32) * scale
    if softcap is not None:
        s = softcap * tanh(s / softcap, EXACT)
    visible = read
    if rows.diagonal is not None:
        visible = visible & (n[None, :] <= m[:, None] + rows.diagonal)
    if mask is not None:
        if mask.p.dtype.element_ty == tl.int1:
            visible = visible & tl.load(_pointers(mask, b, h, m, n), mask=read, other=0).to(tl.int1)
        else:
            term = tl.load(_pointers(mask, b, h, m, n), mask=read, other=0.0).to(tl.float32)
            visible = visible & (term != float("-inf"))
            s += term
    return tl.where(visible, s, float("-inf"))


@triton.jit
def _finite(top):
    """What to subtract: a row that shows nothing has the maximum -inf, and -inf - -inf is NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def softmax_kernel(
    x, mask, y, rows, scale, softcap,
    EXACT: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    b, h, m, present = _indices(rows, BLOCK_M, WIDE)
    n = tl.arange(0, BLOCK_N)
    if ONE_BLOCK:
        s = _scores(x, mask, rows, b, h, m, present, n, scale, softcap, EXACT)  # [BLOCK_M, BLOCK_N]
        e = tl.exp2((s - _finite(tl.max(s, 1))[:, None]) * LOG2E)
        total = tl.sum(e, 1)  # 0 if and only if the row shows nothing
        value = e / tl.where(total == 0.0, 1.0, total)[:, None]
        there = present[:, None] & (n < rows.columns)[None, :]
        tl.store(_pointers(y, b, h, m, n), value.to(y.p.dtype.element_ty), mask=there)
    else:
        stop = _stop(rows, m)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # per lane, added up after the loop
        for start in range(0, stop, BLOCK_N):
            s = _scores(x, mask, rows, b, h, m, present, start + n, scale, softcap, EXACT)  # [BLOCK_M, BLOCK_N]
            new_top = tl.maximum(top, tl.max(s, 1))
            shift = _finite(new_top)
            total = total * tl.exp2((top - shift) * LOG2E)[:, None] + tl.exp2((s - shift[:, None]) * LOG2E)
            top = new_top
        row_total = tl.sum(total, 1)
        divisor = tl.where(row_total == 0.0, 1.0, row_total)
        for start in range(0, rows.columns, BLOCK_N):
            s = _scores(x, mask, rows, b, h, m, present, start + n, scale, softcap, EXACT)
            value = tl.exp2((s - _finite(top)[:, None]) * LOG2E) / divisor[:, None]
            there = present[:, None] & (start + n < rows.columns)[None, :]
            tl.store(_pointers(y, b, h, m, start + n), value.to(y.p.dtype.element_ty), mask=there)


@triton.jit
def _output_and_gradient(y, dy, rows, b, h, m, present, n):
    """y and dy, both 0 where an entry is hidden. [BLOCK_M, BLOCK_N]"""
    read = _read(rows, m, present, n)
    value = tl.load(_pointers(y, b, h, m, n), mask=read, other=0.0).to(tl.float32)
    gradient = tl.load(_pointers(dy, b, h, m, n), mask=read, other=0.0).to(tl.float32)
    return value, tl.where(value == 0.0, 0.0, gradient)


@triton.jit
def _store_gradients(x, dx, ds, rows, b, h, m, present, n, value, gradient, delta, scale, softcap, EXACT: tl.constexpr):
    there = present[:, None] & (n < rows.columns)[None, :]  # [BLOCK_M, BLOCK_N]
    g = value * (gradient - delta[:, None])
    if ds is not None:
        tl.store(_pointers(ds, b, h, m, n), g.to(ds.p.dtype.element_ty), mask=there)
    if dx is not None:
        if softcap is not None:
            s = tl.load(_pointers(x, b, h, m, n), mask=_read(rows, m, present, n), other=0.0).to(tl.float32) * scale
            t = tanh(tl.where(value == 0.0, 0.0, s) / softcap, EXACT)
            g *= 1.0 - t * t
        tl.store(_pointers(dx, b, h, m, n), (g * scale).to(dx.p.dtype.element_ty), mask=there)


@triton.jit
def softmax_backward_kernel(
    x, y, dy, dx, ds, rows, scale, softcap,
    EXACT: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    b, h, m, present = _indices(rows, BLOCK_M, WIDE)
    n = tl.arange(0, BLOCK_N)
    if ONE_BLOCK:
        value, gradient = _output_and_gradient(y, dy, rows, b, h, m, present, n)  # [BLOCK_M, BLOCK_N]
        delta = tl.sum(value * gradient, 1)
        _store_gradients(x, dx, ds, rows, b, h, m, present, n, value, gradient, delta, scale, softcap, EXACT)
    else:
        products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, _stop(rows, m), BLOCK_N):
            value, gradient = _output_and_gradient(y, dy, rows, b, h, m, present, start + n)
            products += value * gradient
        delta = tl.sum(products, 1)
        for start in range(0, rows.columns, BLOCK_N):
            value, gradient = _output_and_gradient(y, dy, rows, b, h, m, present, start + n)
            _store_gradients(
                x, dx, ds, rows, b, h, m, present, start + n, value, gradient, delta, scale, softcap, EXACT
            )  # fmt: skip


# --- launcher -------------------------------------------------------------------------------------------------------

MAX_BLOCK = 8192  # columns of a row that is held in registers


class Config(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    warps: int
    one_block: bool


def softmax_config(arch: str | None, columns: int) -> Config:
    """Rows and columns of a program. The kernels wait for memory alone, so all of it is about bytes in flight."""
    # Entries a thread: 16 keep several reads of 16 bytes in flight. On gfx942, where a wavefront has 64 threads, every
    # entry of a row of odd length has a mask of its own in two of 102 scalar registers: 4.
    amd = arch is not None and arch.startswith("gfx")
    lanes, each = (64, 4) if amd else (32, 16)
    if columns > MAX_BLOCK:
        # 256 threads leave room for several programs, each with a row, on a multiprocessor; the loop holds sums too.
        block_n = 1024 if amd else 2048
        return Config(1, block_n, 256 // lanes, False)
    # At least 8 columns: 32 bytes of float32 is what memory hands out.
    block_n = max(8, triton.next_power_of_2(columns))
    # Short rows share a program of 128 threads; a row of MAX_BLOCK has 512 (1024 on gfx942) for itself.
    block_m = max(1, 128 * each // block_n)
    return Config(block_m, block_n, min(max(128, block_m * block_n // each), 1024) // lanes, True)


def _four(t: Tensor) -> Tensor:
    return t[(None,) * (4 - t.dim())] if t.dim() < 4 else t


def _view(t: Tensor | None, shape: torch.Size, index: tuple[int, ...]) -> View | None:
    """`t` broadcast to `shape` by stride 0, as [B, H, M, N]; `index` picks an element of what stands further out."""
    if t is None:
        return None
    t = t.expand(shape)[index]  # a view: nothing is copied
    return View(t, *(0 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)))


def _unit_rows(t: Tensor) -> Tensor:
    """Rows are read with stride 1, or all from one place as a gradient that was broadcast; others are copied."""
    return t if t.stride(-1) in (0, 1) or t.shape[-1] == 1 else t.contiguous()


def _launches(
    kernel: Any,
    tensors: tuple[Tensor | None, ...],
    like: Tensor,
    o: Softmax,
    arch: str | None,
) -> list[Launch]:
    """One launch for each element of the dimensions beyond four."""
    if like.numel() == 0:
        return []
    shape = _four(like).shape
    _, heads, length, columns = shape[-4:]
    count = like.numel() // columns // shape[:-4].numel()
    c = softmax_config(arch, columns)
    rows = Rows(count, heads, length, columns, None if o.causal is None else diagonal(o, length, columns))
    options = {
        "EXACT": like.dtype == torch.float32,
        "WIDE": count + c.BLOCK_M >= 2**31,
        "BLOCK_M": c.BLOCK_M,
        "BLOCK_N": c.BLOCK_N,
        "ONE_BLOCK": c.one_block,
    } | compile_options(arch, c.warps)
    grid = (triton.cdiv(count, c.BLOCK_M),)
    launches = []
    for index in itertools.product(*(range(n) for n in shape[:-4])):
        views = (_view(t, shape, index) for t in tensors)
        launches.append(Launch(kernel, grid, (*views, rows, o.scale, o.softcap), options))
    return launches


def forward_launches(scores: Tensor, mask: Tensor | None, o: Softmax, arch: str | None) -> tuple[list[Launch], Tensor]:
    """The launches of the forward pass and y, contiguous, that they fill. scores [..., M, N]."""
    y = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    return _launches(softmax_kernel, (_unit_rows(scores), mask, y), scores, o, arch), y


class Needs(NamedTuple):
    """Which gradients are wanted; mask is the tensor itself."""

    scores: bool
    mask: Tensor | None


def backward_launches(
    scores: Tensor | None, y: Tensor, dy: Tensor, o: Softmax, needs: Needs, arch: str | None
) -> tuple[list[Launch], Tensor | None, Tensor | None]:
    """The launches, dx (None if not wanted) and ds [..., M, N] (for the mask's gradient). scores: with a softcap."""
    dx = torch.empty_like(y) if needs.scores else None
    ds = None
    if needs.mask is not None:
        # A mask of y's own shape gets its gradient as it is; another is summed, so its terms are kept in float32.
        dtype = needs.mask.dtype if needs.mask.shape == y.shape else torch.float32
        ds = torch.empty(y.shape, dtype=dtype, device=y.device)
    x = None if scores is None or o.softcap is None else _unit_rows(scores)
    return _launches(softmax_backward_kernel, (x, y, _unit_rows(dy), dx, ds), y, o, arch), dx, ds


def forward(scores: Tensor, mask: Tensor | None, o: Softmax, arch: str | None) -> Tensor:
    """y = softmax(softcap(scale * scores) + mask), contiguous."""
    launches, y = forward_launches(scores, mask, o, arch)
    run(launches, y)
    return y


def backward(
    scores: Tensor | None, y: Tensor, dy: Tensor, o: Softmax, needs: Needs, arch: str | None
) -> tuple[Tensor | None, Tensor | None]:
    """dx, and ds that the mask's gradient is summed from."""
    launches, dx, ds = backward_launches(scores, y, dy, o, needs, arch)
    run(launches, y)
    return dx, ds
