"""Tree masks in the decoding kernels: which of the last M tokens of a sequence see each other, and where they stand.

first = length - M;   row i sees key j if j < first or tree[i, j - first]
token first + i stands at position first + depth, its depth being how many of the M it sees beside itself
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference_decode import depths


class Tree(NamedTuple):
    """The mask, bool [B, M, M], and depths, int32 [B, M], contiguous but for a batch stride of 0 where there is one."""

    p: Any
    b: Any
    depth: Any
    depth_b: Any
    rows: Any  # M


def tree_of(mask: Tensor | None) -> Tree | None:
    """A mask [B|1, M, M] as the kernels see it."""
    if mask is None:
        return None
    mask, depth = mask.contiguous(), depths(mask).to(torch.int32)
    batch, rows, _ = mask.shape
    return Tree(mask, 0 if batch == 1 else rows * rows, depth, 0 if batch == 1 else rows, rows)


@triton.jit
def depth_of(tree, b, i, there):
    """The depths of tokens i of the tree, 0 where there is none."""
    return tl.load(tree.depth + b * tree.depth_b + i, mask=there, other=0)


@triton.jit
def reach(tree, rows, n):
    """Whether rows see keys n by their positions, and how far away these stand, [BLOCK_M, BLOCK_N] each.

    A row that stands before the first key, because its sequence is shorter than the tree, sees nothing.
    """
    if tree is None:
        distance = rows.center[:, None] - n[None, :]
        visible = distance >= 0
    else:
        first = rows.length - tree.rows
        new = n - first
        inside = (new >= 0) & (n < rows.length)
        p = tree.p + rows.b * tree.b + rows.m[:, None] * tree.rows + new[None, :]
        visible = tl.load(p, mask=inside[None, :], other=1).to(tl.int1)
        visible = visible & (n < rows.length)[None, :] & (first + rows.m >= 0)[:, None]
        at = tl.where(new < 0, n, first + depth_of(tree, rows.b, new, inside))
        distance = tl.abs(rows.center[:, None] - at[None, :])
    return visible, distance
