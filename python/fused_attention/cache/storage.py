"""How tokens are stored: dtypes, scales, and what dense and paged caches have in common.

A cache holds keys and values in a floating dtype, or quantised to int8 or float8_e4m3fn with one float32 scale per
token and head:

    x ~ scale * stored,    scale = max|x| / 127 (int8) or max|x| / 448 (float8_e4m3fn), 1 where x is all zero

A token that holds NaN or Inf gets the scale NaN: it comes back as NaN. What lies past a sequence's length is never
read, so storage need not be initialised.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..spec import FLOAT_DTYPES, ArgumentError, need_tensor, readable, shape_of

# The largest magnitude that is stored, to which a token's largest is scaled.
LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
KV_DTYPES = (*FLOAT_DTYPES, *LIMITS)


STORED = ("key", "value", "key_scale", "value_scale")


def refuse(name: str, was: object, expected: str) -> NoReturn:
    """Raise the error of a bad argument."""
    raise ArgumentError(f"{name}: got {was}, expected {expected}")


def storable(dtype: torch.dtype, kv_dtype: torch.dtype) -> bool:
    """Whether a cache of kv_dtype serves queries of dtype: what it holds must be exact in the query's dtype."""
    if dtype not in FLOAT_DTYPES:
        return False
    return kv_dtype == dtype or kv_dtype in LIMITS or (kv_dtype.itemsize == 2 and dtype.itemsize > 2)


def storage_dtype(dtype: torch.dtype | None, kv_dtype: torch.dtype | None) -> torch.dtype:
    dtype = torch.get_default_dtype() if dtype is None else dtype
    kv_dtype = dtype if kv_dtype is None else kv_dtype
    if kv_dtype not in KV_DTYPES or not storable(dtype, kv_dtype):
        refuse("kv_dtype", kv_dtype, f"{dtype}, a narrower dtype that is exact in it, int8 or float8_e4m3fn")
    return kv_dtype


def empty(lead: tuple[int, int, int], dims: tuple[int, int], dtype: torch.dtype, device: Any) -> dict[str, Any]:
    """Uninitialised key, value and scales."""
    for name, size in (("head_dim", dims[0]), ("value_dim", dims[1])):
        if size < 1:
            refuse(name, size, "at least 1")
    tensors: dict[str, Any] = {
        "key": in_large_pages(torch.empty(*lead, dims[0], dtype=dtype, device=device)),
        "value": in_large_pages(torch.empty(*lead, dims[1], dtype=dtype, device=device)),
    }
    if dtype in LIMITS:
        for name in ("key_scale", "value_scale"):
            tensors[name] = torch.empty(lead, dtype=torch.float32, device=device)
    return tensors


def in_large_pages(t: Tensor) -> Tensor:
    """The tensor, of which the system is told, before anything is written, that it had better lie in pages of 2 MiB.

    Reading rows in other places than one behind another means looking up pages, and decoding does little else: it took
    1.05 to 1.8 times as long in pages of 4 KiB. Advice to Linux, on a CPU; where it is not taken, nothing is lost.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or type(t) is not Tensor or t.device.type != "cpu" or torch.compiler.is_compiling():
        return t
    size = 2 << 20
    first, last = -(-t.data_ptr() // size) * size, (t.data_ptr() + t.nbytes) // size * size
    if first < last:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice)
    return t


def bits(t: Tensor) -> Tensor:
    """A tensor that can be indexed: float8 has no such operations."""
    return t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t


def indices(name: str, value: Any, device: torch.device) -> Tensor:
    """A list or tensor of integers as int64 [n] on a device; a list goes there without waiting for it.

    Raises:
        ArgumentError: it is something else.
    """
    if not isinstance(value, Tensor):
        if not isinstance(value, (list, tuple, range)) or any(
            isinstance(i, bool) or not isinstance(i, int) for i in value
        ):
            raise TypeError(f"{name}: got {value!r}, expected a tensor or a list of integers")
        value = torch.tensor(list(value), dtype=torch.int64)
    if value.dim() != 1 or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        refuse(name, f"{value.dtype} {shape_of(value)}", "integers [n]")
    return value.to(device, torch.int64, non_blocking=True)


def chosen_rows(rows: Any, batch: int, last: object, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which of the last `last` tokens each sequence keeps: indices [B, A], and how many of them count, [B].

    rows: [B, A] integers in which -1 fills up, or a list of B lists.

    Raises:
        ArgumentError: it is something else, or, where the values can be looked at, an index is not in 0 .. last - 1.
    """
    if isinstance(last, bool) or not isinstance(last, int):
        raise TypeError(f"last: got {last!r}, expected an int")
    if last < 0:
        refuse("last", last, "at least 0")
    if not isinstance(rows, Tensor):
        if not isinstance(rows, (list, tuple)) or not all(isinstance(r, (list, tuple, range)) for r in rows):
            raise TypeError(f"rows: got {rows!r}, expected integers [B, A] or a list of lists of integers")
        width = max(map(len, rows), default=0)
        filled = [i for r in rows for i in (*r, *(-1,) * (width - len(r)))]
        rows = indices("rows", filled, device).view(len(rows), width)
    if rows.dim() != 2 or rows.shape[0] != batch or rows.is_floating_point() or rows.dtype == torch.bool:
        refuse("rows", f"{rows.dtype} {shape_of(rows)}", f"integers [B, A] or a list of B lists, B = {batch}")
    rows = rows.to(device, torch.int64, non_blocking=True)
    counted = rows >= 0
    if readable(rows):
        if bool((rows >= last).any() | (rows < -1).any()):
            refuse("rows", rows.tolist(), f"indices in 0 .. {last - 1}")
        if rows.shape[1] and bool((counted[:, 1:] & ~counted[:, :-1]).any()):
            refuse("rows", rows.tolist(), "-1 only behind what is kept")
        if rows.shape[1] > last:
            refuse("rows", f"{rows.shape[1]} of them", f"at most {last}")
    return rows.clamp(0, max(last - 1, 0)), counted.sum(1)


class Storage:
    """What the two caches have in common. key and value are [*, HK, *, D] and [*, HK, *, DV]."""

    key: Tensor
    value: Tensor
    lengths: Tensor
    key_scale: Tensor | None
    value_scale: Tensor | None

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.key.shape[1]

    @property
    def head_dim(self) -> int:
        return self.key.shape[3]

    @property
    def value_dim(self) -> int:
        return self.value.shape[3]

    @property
    def kv_dtype(self) -> torch.dtype:
        """What a number is stored as."""
        return self.key.dtype

    def _stored(self) -> list[Tensor]:
        """Keys, values and, where there are, scales: what is indexed by sequence or page, head and row."""
        return [bits(t) for name in STORED if (t := getattr(self, name)) is not None]

    def _check_storage(self, layout: str) -> None:
        key = self.key
        for name in ("key", "value", "lengths"):
            need_tensor(name, getattr(self, name), optional=False)
        for name in ("key", "value"):
            t = getattr(self, name)
            if t.layout != torch.strided or t.dim() != 4:
                refuse(name, f"{t.layout} {shape_of(t)}", f"a strided tensor {layout}")
            if t.dtype not in KV_DTYPES or t.dtype != key.dtype:
                refuse(f"{name}.dtype", t.dtype, "float32, bfloat16, float16, float64, int8 or float8_e4m3fn, as key")
            if t.shape[1] < 1 or t.shape[3] < 1 or t.shape[:3] != key.shape[:3]:
                refuse(name, f"shape {shape_of(t)}", f"{layout}, at least one head and dim, and sizes that agree")
            if t.stride(3) != 1 and t.shape[3] > 1:
                refuse(name, f"a last dimension of stride {t.stride(3)}", "a contiguous last dimension")
            if any(s == 0 and n > 1 for s, n in zip(t.stride(), t.shape, strict=True)):
                refuse(name, "an expanded tensor", "one with memory of its own: it is written in place")
        for name in ("key_scale", "value_scale"):
            t = getattr(self, name)
            need_tensor(name, t)
            if (t is not None) != (key.dtype in LIMITS):
                refuse(name, "None" if t is None else "a Tensor", f"scales for int8 and float8, not for {key.dtype}")
            if t is not None and (t.dtype != torch.float32 or t.shape != key.shape[:3]):
                refuse(name, f"{t.dtype} {shape_of(t)}", f"float32 {shape_of(key[..., 0])}")
        if self.lengths.dtype not in (torch.int32, torch.int64) or self.lengths.dim() != 1:
            refuse("lengths", f"{self.lengths.dtype} {shape_of(self.lengths)}", "int32 or int64 [B]")
        if not self.lengths.is_contiguous():
            refuse("lengths", f"a stride of {self.lengths.stride(0)}", "a contiguous tensor")
        for name in ("value", "lengths", "key_scale", "value_scale"):
            t = getattr(self, name)
            if t is not None and t.device != key.device:
                refuse(f"{name}.device", t.device, f"key's {key.device}")
