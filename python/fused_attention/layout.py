"""In which order the dimensions of a tensor lie in memory: of an output, and of what kernels read."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def memory_order(query: Tensor) -> tuple[list[int], list[int]]:
    """The order in which the dimensions of [B, H, M, D] lie in memory, outermost first, and the permutation back."""
    order = _order(query.shape, query.stride())
    return order, [order.index(d) for d in range(4)]


def _order(sizes: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
    # A dimension of size 1 or an expanded one carries no order of its own: outermost, it never splits the others.
    return sorted(range(3), key=lambda d: (0 if sizes[d] == 1 or strides[d] == 0 else 1, -strides[d])) + [3]


def _strides(sizes: tuple[int, ...], strides: tuple[int, ...], shape: tuple[int, ...]) -> list[int]:
    """Of a dense tensor of `shape` in the memory order of a tensor with these sizes and strides."""
    found, step = [0] * 4, 1
    for d in reversed(_order(sizes, strides)):
        found[d] = step
        step *= max(shape[d], 1)
    return found


_known_strides = functools.lru_cache(maxsize=4096)(_strides)


def output_like(query: Tensor, batch: int, value_dim: int) -> Tensor:
    """An uninitialised output [batch, H, M, value_dim] whose dimensions lie in memory in the query's order.

    A query that is a strided view of a projection [M, B, 3, H, D] gives an output laid out as [M, B, H, value_dim],
    which the next projection reads without a copy.
    """
    sizes = query.shape
    shape = (batch, sizes[1], sizes[2], value_dim)
    if query.is_contiguous():
        return torch.empty_like(query) if shape == sizes else query.new_empty(shape)
    try:
        strides = _known_strides(sizes, query.stride(), shape)
    except TypeError:  # symbols of torch.compile cannot be hashed
        strides = _strides(sizes, query.stride(), shape)
    return torch.empty_strided(shape, strides, dtype=query.dtype, device=query.device)


def rows_contiguous(t: Tensor) -> Tensor:
    """Kernels read rows of unit stride; a tensor laid out otherwise is copied."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def split_heads(t: Tensor, heads: int, batch_first: bool) -> Tensor:
    """[B, S, H D], or [S, B, H D] without `batch_first`, as a view [B, H, S, D]."""
    return t.unflatten(-1, (heads, -1)).permute((0, 2, 1, 3) if batch_first else (1, 2, 0, 3))


def merge_heads(t: Tensor, batch_first: bool) -> Tensor:
    """The other way round; a view where `t` lies in memory as what is returned."""
    return t.permute((0, 2, 1, 3) if batch_first else (2, 0, 1, 3)).flatten(-2)


def split_joint(qkv: Tensor, heads: int, batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as views [B, H, S, D] of one projection [B, S, 3 H D] or [S, B, 3 H D]."""
    q, k, v = (split_heads(t, heads, batch_first) for t in qkv.unflatten(-1, (3, -1)).unbind(-2))
    return q, k, v
