"""Checks of one argument that know nothing of the call it belongs to: how an error is worded, and pairs of numbers."""

from __future__ import annotations

import torch
from torch import Tensor

Window = tuple[int | None, int | None]


class ArgumentError(ValueError, RuntimeError):
    """A bad argument. Both a `ValueError` and the `RuntimeError` that PyTorch raises for the same mistake."""


def shape_of(tensor: Tensor) -> str:
    return "[" + ", ".join(map(str, tensor.shape)) + "]"


def need(ok: bool, name: str, was: object, expected: str) -> None:
    if not ok:
        raise ArgumentError(f"{name}: got {was}, expected {expected}")


def need_tensor(name: str, value: object, optional: bool = True) -> None:
    if value is None and optional:
        return
    if not isinstance(value, Tensor):
        kind = "a Tensor or None" if optional else "a Tensor"
        raise TypeError(f"{name}: got {type(value).__name__}, expected {kind}")


def number(name: str, value: object, expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: got {type(value).__name__} {value!r}, expected {expected}")
    return float(value)


def as_offsets(name: str, t: Tensor | None) -> Tensor | None:
    """Lengths or offsets of any integer dtype as int64; what is no tensor is left for `make_spec` to refuse."""
    if t is None or not isinstance(t, Tensor) or t.dtype == torch.int64:
        return t
    if t.dtype in (torch.int32, torch.int16, torch.uint8):
        return t.long()
    raise ArgumentError(f"{name}.dtype: got {t.dtype}, expected an integer dtype (int32 or int64)")


def window_sides(window: Window | None) -> Window:
    """(left, right); None is open on both sides."""
    if window is None:
        return (None, None)
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window: got {window!r}, expected (left, right), each an int of at least 0 or None")
    return (window[0], window[1])


def block_sides(block_size: object) -> tuple[int | None, int | None]:
    """(rows, keys) of a block, or (None, None) for None."""
    if block_size is None:
        return (None, None)
    if not isinstance(block_size, (tuple, list)) or len(block_size) != 2:
        raise TypeError(f"block_size: got {block_size!r}, expected (rows, keys) of a block, each an int of at least 1")
    for name, side in (("block_size[0] (rows)", block_size[0]), ("block_size[1] (keys)", block_size[1])):
        if isinstance(side, bool) or not isinstance(side, (int, torch.SymInt)):
            raise TypeError(f"{name}: got {side!r}, expected an int of at least 1")
    return (block_size[0], block_size[1])
