"""Key/value caches, dense and paged, and the vocabulary of decoding: one call's tensors and its description.

A cache holds keys and values in a floating dtype, or quantised to int8 or float8_e4m3fn with one float32 scale per
token and head:

    x ~ scale * stored,    scale = max|x| / 127 (int8) or max|x| / 448 (float8_e4m3fn), 1 where x is all zero

A token that holds NaN or Inf gets the scale NaN: it comes back as NaN. What lies past a sequence's length is never
read, so storage need not be initialised.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .spec import (
    FLOAT_DTYPES,
    ArgumentError,
    AttentionSpec,
    Window,
    need_tensor,
    shape_of,
)

# The largest magnitude that is stored, to which a token's largest is scaled.
LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
KV_DTYPES = (*FLOAT_DTYPES, *LIMITS)


def refuse(name: str, was: object, expected: str) -> NoReturn:
    """Raise the error of a bad argument."""
    raise ArgumentError(f"{name}: got {was}, expected {expected}")


def storable(dtype: torch.dtype, kv_dtype: torch.dtype) -> bool:
    """Whether a cache of kv_dtype serves queries of dtype: what it holds must be exact in the query's dtype."""
    if dtype not in FLOAT_DTYPES:
        return False
    return kv_dtype == dtype or kv_dtype in LIMITS or (kv_dtype.itemsize == 2 and dtype.itemsize > 2)


def _storage_dtype(dtype: torch.dtype | None, kv_dtype: torch.dtype | None) -> torch.dtype:
    dtype = torch.get_default_dtype() if dtype is None else dtype
    kv_dtype = dtype if kv_dtype is None else kv_dtype
    if kv_dtype not in KV_DTYPES or not storable(dtype, kv_dtype):
        refuse("kv_dtype", kv_dtype, f"{dtype}, a narrower dtype that is exact in it, int8 or float8_e4m3fn")
    return kv_dtype


def _empty(lead: tuple[int, int, int], dims: tuple[int, int], dtype: torch.dtype, device: Any) -> dict[str, Any]:
    """Uninitialised key, value and scales."""
    for name, size in (("head_dim", dims[0]), ("value_dim", dims[1])):
        if size < 1:
            refuse(name, size, "at least 1")
    tensors: dict[str, Any] = {
        "key": torch.empty(*lead, dims[0], dtype=dtype, device=device),
        "value": torch.empty(*lead, dims[1], dtype=dtype, device=device),
    }
    if dtype in LIMITS:
        for name in ("key_scale", "value_scale"):
            tensors[name] = torch.empty(lead, dtype=torch.float32, device=device)
    return tensors


class _Storage:
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


@dataclass(frozen=True, eq=False)
class KVCache(_Storage):
    """A dense cache: every sequence owns `capacity` rows. Its tensors are written in place.

    key: [B, HK, capacity, D]; float32, bfloat16, float16, float64, int8 or float8_e4m3fn; any strides with a contiguous
        last dimension.
    value: [B, HK, capacity, DV] in the same dtype.
    lengths: [B] int32 or int64, contiguous, on the same device: how many tokens each sequence holds;
        `lengths.zero_()` empties the cache.
    key_scale, value_scale: [B, HK, capacity] float32 for int8 and float8_e4m3fn, else None.

    Raises:
        ArgumentError: a shape, dtype or device is wrong.
    """

    key: Tensor
    value: Tensor
    lengths: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

    def __post_init__(self) -> None:
        self._check_storage("[B, HK, capacity, D]")
        if self.lengths.shape[0] != self.key.shape[0]:
            refuse("lengths", f"shape {shape_of(self.lengths)}", f"[B] = [{self.key.shape[0]}]")

    @property
    def capacity(self) -> int:
        """How many tokens a sequence can hold."""
        return self.key.shape[2]

    @classmethod
    def allocate(
        cls,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        value_dim: int | None = None,
        dtype: torch.dtype | None = None,
        kv_dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> KVCache:
        """An empty cache.

        Args:
            batch, kv_heads, capacity, head_dim: B, HK, the tokens each sequence can hold, D.
            value_dim: DV; default D.
            dtype: of the queries that will be asked; default torch's default dtype.
            kv_dtype: what is stored; default `dtype`. int8 and float8_e4m3fn quantise.
            device: default torch's default device.
        """
        stored = _storage_dtype(dtype, kv_dtype)
        dims = (head_dim, head_dim if value_dim is None else value_dim)
        tensors = _empty((batch, kv_heads, capacity), dims, stored, device)
        return cls(lengths=torch.zeros(batch, dtype=torch.int32, device=tensors["key"].device), **tensors)


@dataclass(frozen=True, eq=False)
class PagedKVCache(_Storage):
    """A cache in pages that sequences need not own side by side (Kwon et al., "PagedAttention", 2023).

    Token t of sequence b lies in row t % page_size of page block_table[b, t // page_size]. Which page is whose is for
    the caller to say, in `block_table`, before tokens are appended; sequences may share pages that neither appends to.

    key: [num_pages, HK, page_size, D]; dtypes and strides as in `KVCache`.
    value: [num_pages, HK, page_size, DV].
    block_table: [B, max_pages] int32; an entry that no visible token needs may hold anything.
    lengths: [B] int32 or int64.
    key_scale, value_scale: [num_pages, HK, page_size] float32 for int8 and float8_e4m3fn, else None.

    Raises:
        ArgumentError: a shape, dtype or device is wrong.
    """

    key: Tensor
    value: Tensor
    block_table: Tensor
    lengths: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

    def __post_init__(self) -> None:
        self._check_storage("[num_pages, HK, page_size, D]")
        table = self.block_table
        need_tensor("block_table", table, optional=False)
        if self.key.shape[0] < 1 or self.key.shape[2] < 1:
            refuse("key", f"shape {shape_of(self.key)}", "at least one page of at least one token")
        if table.dtype != torch.int32 or table.dim() != 2:
            refuse("block_table", f"{table.dtype} {shape_of(table)}", "int32 [B, max_pages]")
        if table.device != self.key.device:
            refuse("block_table.device", table.device, f"key's {self.key.device}")
        if self.lengths.shape[0] != table.shape[0]:
            refuse("lengths", f"shape {shape_of(self.lengths)}", f"[B] = [{table.shape[0]}], as block_table")

    @property
    def num_pages(self) -> int:
        return self.key.shape[0]

    @property
    def page_size(self) -> int:
        return self.key.shape[2]

    @property
    def capacity(self) -> int:
        """How many tokens a row of the block table can name."""
        return self.block_table.shape[1] * self.page_size

    @classmethod
    def allocate(
        cls,
        block_table: Tensor,
        num_pages: int,
        kv_heads: int,
        page_size: int,
        head_dim: int,
        value_dim: int | None = None,
        dtype: torch.dtype | None = None,
        kv_dtype: torch.dtype | None = None,
    ) -> PagedKVCache:
        """Empty pages on the block table's device.

        Args:
            block_table: [B, max_pages] int32; kept, not copied, and may be filled in later.
            num_pages, kv_heads, page_size, head_dim: pages in all, HK, tokens a page, D.
            value_dim, dtype, kv_dtype: as in `KVCache.allocate`.
        """
        need_tensor("block_table", block_table, optional=False)
        stored = _storage_dtype(dtype, kv_dtype)
        dims = (head_dim, head_dim if value_dim is None else value_dim)
        tensors = _empty((num_pages, kv_heads, page_size), dims, stored, block_table.device)
        lengths = torch.zeros(block_table.shape[0], dtype=torch.int32, device=block_table.device)
        return cls(block_table=block_table, lengths=lengths, **tensors)


Cache = KVCache | PagedKVCache


class DecodeInputs(NamedTuple):
    """The tensors of one call beside the cache.

    query [B, H, M, D]; key [B, HK, M, D] and value [B, HK, M, DV] to append, or None; cos, sin [L, R/2] float32;
    alibi_slopes [B|1, H]; sinks [H].
    """

    query: Tensor
    key: Tensor | None = None
    value: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True)
class DecodeSpec:
    """One decoding call without its data."""

    batch: int
    heads: int
    kv_heads: int
    rows: int  # M
    capacity: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype  # the query's
    kv_dtype: torch.dtype  # what is stored
    scale: float
    page_size: int | None = None  # None: a dense cache
    window: Window | None = None
    softcap: float | None = None
    alibi_slopes: bool = False
    sinks: bool = False
    appends: bool = False
    rotary_dim: int = 0  # R; 0: no rotation
    interleaved: bool = False
    batch_invariant: bool = False

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads

    @property
    def quantised(self) -> bool:
        return self.kv_dtype in LIMITS

    @property
    def lse_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def attention(self, columns: int, dtype: torch.dtype) -> AttentionSpec:
        """The same call as attention over dense keys of `dtype`, `columns` of them."""
        return _attention(self, columns, dtype)


@functools.lru_cache(maxsize=1024)
def _attention(spec: DecodeSpec, columns: int, dtype: torch.dtype) -> AttentionSpec:
    return AttentionSpec(
        batch=spec.batch,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        rows=spec.rows,
        columns=columns,
        head_dim=spec.head_dim,
        value_dim=spec.value_dim,
        dtype=dtype,
        scale=spec.scale,
        causal="bottom_right",
        window=spec.window,
        softcap=spec.softcap,
        batch_invariant=spec.batch_invariant,
        alibi_slopes=spec.alibi_slopes,
        sinks=spec.sinks,
        key_lengths=True,
    )
