"""The definitions of `fused_softmax` and `rope_qk_norm`: plain eager PyTorch, differentiable to any order.

    fused_softmax   y = softmax(softcap(scale * x) + mask) over the last dimension, softcap(s) = c tanh(s / c)
    rope_qk_norm    n = x * rsqrt(mean(x^2) + eps) * weight,  y = rotation of n's first R dimensions

What the kernels compute is measured against this module. The gradients stand here too, as formulas that can be
differentiated again: second derivatives of the kernels go through them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import memory_order
from ..spec import Causal


class Softmax(NamedTuple):
    """The options of `fused_softmax`."""

    scale: float = 1.0
    softcap: float | None = None
    causal: Causal | None = None


class Tables(NamedTuple):
    """What a rotation reads: cos and sin [L, R/2]; positions [B|1, S] of integers, None for 0, 1, 2, ..."""

    cos: Tensor
    sin: Tensor
    positions: Tensor | None
    interleaved: bool  # pairs (0, 1), (2, 3), ... instead of (0, R/2), (1, R/2 + 1), ...


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """In which dtype values of `dtype` are computed with."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- softmax ------------------------------------------------------------------------------------------------------


def diagonal(o: Softmax, rows: int, columns: int) -> int:
    """The column on row 0's diagonal."""
    return columns - rows if o.causal == "bottom_right" else 0


def _visible(scores: Tensor, mask: Tensor | None, o: Softmax) -> Tensor | None:
    """Which entries take part, broadcastable to `scores`; None where all do. A floating mask is in its final dtype."""
    visible = None
    if o.causal is not None:
        rows, columns = scores.shape[-2:]
        row = torch.arange(rows, device=scores.device)[:, None]
        visible = torch.arange(columns, device=scores.device) <= row + diagonal(o, rows, columns)
    if mask is not None:
        shown = mask if mask.dtype == torch.bool else mask != float("-inf")
        visible = shown if visible is None else visible & shown
    return visible


def softmax(scores: Tensor, mask: Tensor | None, o: Softmax, compute_dtype: torch.dtype | None = None) -> Tensor:
    """The row softmax, contiguous, in the dtype of `scores`.

    scores [..., M, N]; mask bool or floating, broadcastable to it. compute_dtype: default `accumulator`; the tensors'
    own dtype gives what plain eager code in that dtype gives.
    """
    acc = compute_dtype or accumulator(scores.dtype)
    term = mask if mask is None or mask.dtype == torch.bool else mask.to(acc)
    visible = _visible(scores, term, o)
    s = scores.to(acc)
    if visible is not None:
        s = torch.where(visible, s, 0.0)  # what is hidden may hold NaN, whose derivative is NaN too
    s = s * o.scale
    if o.softcap is not None:
        s = o.softcap * torch.tanh(s / o.softcap)
    if term is not None and term.dtype != torch.bool:
        assert visible is not None
        s = s + torch.where(visible, term, 0.0)
    if visible is not None:
        s = s.masked_fill(~visible, float("-inf"))
    alive = (s != float("-inf")).any(-1, keepdim=True)
    y = torch.where(alive, torch.softmax(torch.where(alive, s, 0.0), -1), 0.0)
    if visible is not None:
        y = y.masked_fill(~visible, 0.0)  # stops a gradient that comes in for a hidden entry
    return y.to(scores.dtype).contiguous()


def softmax_gradients(y: Tensor, dy: Tensor, scores: Tensor | None, o: Softmax) -> tuple[Tensor, Tensor]:
    """dx and ds (before the derivatives of softcap and scale, the mask's gradient) from the output y.

    scores: needed with a softcap only. Entries that are hidden have y = 0, and nothing of theirs is used.
    """
    acc = accumulator(y.dtype)
    hidden = y == 0
    wide, dy = y.to(acc), torch.where(hidden, 0.0, dy.to(acc))
    ds = wide * (dy - (wide * dy).sum(-1, keepdim=True))
    dx = ds * o.scale
    if o.softcap is not None:
        assert scores is not None
        t = torch.tanh(torch.where(hidden, 0.0, scores.to(acc)) * o.scale / o.softcap)
        dx = dx * (1.0 - t * t)
    return dx.to(y.dtype), ds


def sum_to(ds: Tensor, like: Tensor) -> Tensor:
    """The gradient of a mask that was broadcast: summed in a fixed order, in float32 or float64."""
    return ds.sum_to_size(like.shape).to(like.dtype)


# --- RMS norm and rotary embedding ----------------------------------------------------------------------------------


def table_rows(table: Tensor, positions: Tensor | None, length: int) -> Tensor:
    """The row of a table for every token, [B|1, 1, S, R/2]; NaN for a position outside the table."""
    if positions is None:
        return table[:length][None, None]
    inside = (positions >= 0) & (positions < table.shape[0])
    rows = table[positions.long().clamp(0, table.shape[0] - 1)]
    return torch.where(inside[..., None], rows, float("nan"))[:, None]


def rotate(x: Tensor, tables: Tables, inverse: bool = False) -> Tensor:
    """(a, b) -> (a cos - b sin, b cos + a sin) for the pairs among the first R dims of x [B, H, S, D]."""
    half = tables.cos.shape[-1]
    cos = table_rows(tables.cos, tables.positions, x.shape[2]).to(x.dtype)
    sin = table_rows(tables.sin, tables.positions, x.shape[2]).to(x.dtype)
    if inverse:
        sin = -sin
    if tables.interleaved:
        a, b = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = x[..., :half], x[..., half : 2 * half]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((turned, x[..., 2 * half :]), -1) if 2 * half < x.shape[-1] else turned


def _in_order_of(x: Tensor, y: Tensor) -> Tensor:
    """y in x's dtype and memory order."""
    if torch.compiler.is_compiling():  # strides that are symbols cannot be sorted
        return torch.empty_like(x).copy_(y)
    order, back = memory_order(x)
    return y.to(x.dtype).permute(order).contiguous().permute(back)


def rope_norm(
    x: Tensor, weight: Tensor | None, tables: Tables | None, eps: float, compute_dtype: torch.dtype | None = None
) -> Tensor:
    """RMS norm over D (where a weight is given), then the rotation (where tables are). x [B, H, S, D], weight [D]."""
    acc = compute_dtype or accumulator(x.dtype)
    n = x.to(acc)
    if weight is not None:
        n = n * torch.rsqrt(n.square().mean(-1, keepdim=True) + eps) * weight.to(acc)
    return _in_order_of(x, n if tables is None else rotate(n, tables))


def rope_norm_gradients(
    x: Tensor, dy: Tensor, weight: Tensor | None, tables: Tables | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """dx and dweight. x's values are used only where a weight is given; the rotation is orthogonal."""
    acc = accumulator(x.dtype)
    dn = dy.to(acc)
    if tables is not None:
        dn = rotate(dn, tables, inverse=True)
    if weight is None:
        return _in_order_of(x, dn), None
    wide = x.to(acc)
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    unit, g = wide * r, dn * weight.to(acc)
    dx = r * (g - unit * (g * unit).mean(-1, keepdim=True))
    return _in_order_of(x, dx), (dn * unit).sum((0, 1, 2)).to(weight.dtype)
