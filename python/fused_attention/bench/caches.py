"""Decoding from a cache in bfloat16, beside caches of int8 and float8 and torch on dense tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backends.reference_decode import quantise
from ..cache import KVCache
from ..decode import decode_attention
from ..parity.rule import compare
from .shapes import CacheShape
from .timing import Run

# What a cache stores in fewer bits; "ours" stores the query's dtype.
STORED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class Data:
    """One query per sequence, dense keys and values, and caches that hold them."""

    def __init__(self, shape: CacheShape, device: torch.device) -> None:
        like: dict[str, Any] = {"dtype": shape.dtype, "device": device}
        sizes = (shape.batch, shape.kv_heads, shape.columns, shape.head_dim)
        lengths = torch.full((shape.batch,), shape.columns, dtype=torch.int32, device=device)
        self.query = torch.randn(shape.batch, shape.heads, 1, shape.head_dim, **like)
        self.key, self.value = torch.randn(sizes, **like), torch.randn(sizes, **like)
        self.caches = {"ours": KVCache(self.key, self.value, lengths)}
        for name, stored in STORED.items():
            (key, key_scale), (value, value_scale) = (quantise(t, stored) for t in (self.key, self.value))
            self.caches[name] = KVCache(key, value, lengths, key_scale, value_scale)

    def ours(self, name: str) -> Tensor:
        with torch.no_grad():
            found = decode_attention(self.query, self.caches[name])
        assert isinstance(found, Tensor)
        return found

    def torch(self, dtype: torch.dtype | None = None) -> Tensor:
        q, k, v = (t if dtype is None else t.to(dtype) for t in (self.query, self.key, self.value))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def cache_runs(
    shape: CacheShape, peers: Iterable[str], device: torch.device
) -> tuple[dict[str, Run], Callable[[], str | None]]:
    """The calls, "ours" first, and a check of ours that says what is wrong, or None."""
    torch.manual_seed(0)
    data = Data(shape, device)

    def check() -> str | None:
        found = compare(data.ours("ours"), data.torch(), data.torch(torch.float64), grad=False)
        return None if found["error"] <= found["allowed"] else f"{shape.name}: output is off by {found['error']:.3g}"

    runs: dict[str, Run] = {"ours": lambda: data.ours("ours")}
    if "torch" in peers:
        runs["torch"] = data.torch
    runs |= {name: lambda name=name: data.ours(name) for name in STORED}  # type: ignore[misc]
    return runs, check
