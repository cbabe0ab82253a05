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
