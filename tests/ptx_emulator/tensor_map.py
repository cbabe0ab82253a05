"""Tensor maps as `cuTensorMapEncodeTiled` makes them, in the emulator's own layout, and the memory of arrays."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

MAGIC = 0x70616D726F736E65  # as in cpp/asynchronous.h
TYPES = {"float16": 0, "bfloat16": 1, "float32": 7, "int32": 8}  # Format in cpp/ptx.h, for reductions


def memory_of(array: Any) -> tuple[int, int]:
    """Address and bytes of a NumPy array or CPU tensor, gaps between its elements included."""
    if hasattr(array, "data_ptr"):
        if array.device.type != "cpu":
            raise ValueError(f"the tensor is on {array.device}, expected the CPU")
        span = sum((n - 1) * s for n, s in zip(array.shape, array.stride(), strict=True)) + 1 if array.numel() else 0
        return array.data_ptr(), span * array.element_size()
    if hasattr(array, "__array_interface__"):
        steps = [(n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)]
        low, high = sum(min(0, s) for s in steps), sum(max(0, s) for s in steps)
        return array.__array_interface__["data"][0] + low, high - low + array.itemsize if array.size else 0
    raise TypeError(f"got {type(array).__name__}, expected a NumPy array or a tensor")


class TensorMap:
    """A tensor map; sizes, box and strides have the innermost dimension first, as cuTensorMapEncodeTiled has them.

    Args:
        array: NumPy array or CPU tensor, of 1 to 5 dimensions; the last is contiguous.
        box: elements of a copy in each dimension.
        sizes: of the tensor; those of `array` where not given.
        strides_bytes: of all dimensions but the innermost; those of `array` where not given.
        swizzle: 128, 64, 32 or 0 bytes.
        element_strides: take each n-th element of the box; 1 where not given.
        oob_fill: 0 or "zeros", 1 or "nan": what elements outside of the tensor become.

    Raises:
        ValueError: what the hardware would refuse.
    """

    def __init__(self, array: Any, box: Sequence[int], sizes: Sequence[int] | None = None,
                 strides_bytes: Sequence[int] | None = None, swizzle: int = 0,
                 element_strides: Sequence[int] | None = None, oob_fill: int | str = 0) -> None:  # fmt: skip
        address, length = memory_of(array)
        self.memory = (address, address + length)
        if hasattr(array, "data_ptr"):
            size, steps = array.element_size(), [s * array.element_size() for s in array.stride()]
        else:
            size, steps = array.itemsize, list(array.strides)
        sizes = list(sizes if sizes is not None else reversed(array.shape))
        strides = list(strides_bytes if strides_bytes is not None else reversed(steps[:-1]))
        jumps = list(element_strides or [1] * len(sizes))
        self._check(address, size, sizes, strides, list(box), jumps, swizzle)
        fives = [[*v, *[1] * (5 - len(v))] for v in ([size, *strides], sizes, box, jumps)]
        type_ = TYPES.get(str(array.dtype).removeprefix("torch."), 255)
        last = (len(sizes), size, type_, swizzle or 16, int(oob_fill in (1, "nan")))
        packed = struct.pack("<QQ5Q5I5I5I5B", MAGIC, address, *(n for five in fives for n in five), *last)
        self._bytes = packed.ljust(128, b"\0")

    @staticmethod
    def _check(address: int, size: int, sizes: list[int], strides: list[int], box: list[int], jumps: list[int],
               swizzle: int) -> None:  # fmt: skip
        rank, row = len(sizes), box[0] * size
        rules = [
            (1 <= rank <= 5, f"{rank} dimensions, expected 1 to 5"),
            (len(strides) == rank - 1, f"{len(strides)} strides for {rank} dimensions"),
            (len(box) == rank and all(1 <= b <= 256 for b in box), f"a box of {box}, expected 1 to 256 a dimension"),
            (len(jumps) == rank and all(1 <= j <= 8 for j in jumps), f"element strides of {jumps}, expected 1 to 8"),
            (all(1 <= n < 1 << 32 for n in sizes), f"sizes of {sizes}"),
            (address % 16 == 0, f"the address {address:#x} is not aligned to 16 bytes"),
            (all(s % 16 == 0 for s in strides), f"strides of {strides} bytes, expected multiples of 16"),
            (swizzle in (0, 32, 64, 128), f"a swizzle of {swizzle}, expected 0, 32, 64 or 128"),
            (not swizzle or row <= swizzle, f"rows of {row} bytes in a swizzle of {swizzle}"),
            (row % 16 == 0, f"rows of {row} bytes, expected a multiple of 16"),
        ]
        for holds, why in rules:
            if not holds:
                raise ValueError(f"tensor map: {why}")

    def __bytes__(self) -> bytes:
        return self._bytes
