"""What one call of `decode_attention` is, without its data and with it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..spec import AttentionSpec, Window
from .storage import LIMITS


class DecodeInputs(NamedTuple):
    """The tensors of one call beside the cache.

    query [B, H, M, D]; key [B, HK, M, D] and value [B, HK, M, DV] to append, or None; cos, sin [L, R/2] float32;
    alibi_slopes [B|1, H]; sinks [H]; tree_mask [B|1, M, M] bool.
    """

    query: Tensor
    key: Tensor | None = None
    value: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    tree_mask: Tensor | None = None


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
    rolling: bool = False  # the cache has forgotten tokens: positions are counted from `dropped`
    tree: bool = False  # a mask says which of the last M tokens a row sees

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
        """The same call as attention over dense keys of `dtype`, `columns` of them; without what a tree mask hides."""
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
        causal=None if spec.tree else "bottom_right",
        window=spec.window,
        softcap=spec.softcap,
        batch_invariant=spec.batch_invariant,
        alibi_slopes=spec.alibi_slopes,
        sinks=spec.sinks,
        key_lengths=True,
    )
