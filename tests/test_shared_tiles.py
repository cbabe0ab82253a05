"""Keys packed once for many blocks of rows: the same bits as where every block packs its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attention as fa
from fused_attention.parity.rule import compare

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
LENGTHS = [333, 129, 0, 1, 256]
ROWS, KEYS = 300, 333  # three blocks of rows or more, keys that end within a tile


def _inputs(dtype: torch.dtype, batch: int, heads: int, kv_heads: int, dim: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(batch, heads, ROWS, dim, generator=g, dtype=torch.float64)
    k, v = (torch.randn(batch, kv_heads, KEYS, dim, generator=g, dtype=torch.float64) for _ in range(2))
    return [t.to(dtype) for t in (q, k, v)]


def _options(kind: str, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    return {
        "full": {},
        "causal": {"causal": "top_left"},
        "lengths": {"causal": "bottom_right", "key_lengths": torch.tensor(LENGTHS)},
        "mask": {"mask": torch.rand(1, 1, ROWS, KEYS, generator=g) < 0.7},
        "bias": {"bias": torch.randn(batch, 1, 1, KEYS, generator=g).to(dtype), "softcap": 5.0},
        "weights": {"return_weights": "heads", "causal": "top_left"},
    }[kind]


def _of_one(options: dict[str, Any], b: int) -> dict[str, Any]:
    """The options of batch element b alone."""
    return {n: o[b : b + 1] if isinstance(o, Tensor) and o.shape[0] > 1 else o for n, o in options.items()}


def _results(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [t for t in (found.output, found.weights) if t is not None]


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["full", "causal", "lengths", "mask", "bias", "weights"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_head_alone_has_the_same_bits(dtype: torch.dtype, kind: str) -> None:
    """A head alone has too few blocks of rows for its tiles to be shared; eight on one have not."""
    batch, heads, kv_heads, dim = 5, 8, 1, 40
    q, k, v = _inputs(dtype, batch, heads, kv_heads, dim)
    options = _options(kind, batch, dtype)
    for b, end in enumerate({"causal": [ROWS] * batch, "lengths": LENGTHS}.get(kind, [])):
        k[b, :, end:], v[b, :, end:] = float("nan"), float("nan")
    together = _results(fa.attention(q, k, v, **options))
    for b in range(batch):
        for h in range(heads):
            key = h // (heads // kv_heads)
            one = (q[b : b + 1, h : h + 1], k[b : b + 1, key : key + 1], v[b : b + 1, key : key + 1])
            for whole, alone in zip(together, _results(fa.attention(*one, **_of_one(options, b))), strict=True):
                assert torch.equal(whole[b, h], alone[0, 0]), (b, h)


@pytest.mark.parametrize("weights", [None, "mean", "heads"])
def test_waves_of_heads(weights: Any) -> None:
    """On one thread 45 key heads of 512 keys are more than one wave, and the last is not full."""
    before = torch.get_num_threads()
    g = torch.Generator().manual_seed(2)
    q = torch.randn(3, 45, 512, 64, generator=g)
    k, v = (torch.randn(3, 15, 512, 64, generator=g) for _ in range(2))
    try:
        torch.set_num_threads(1)
        one = _results(fa.attention(q, k, v, causal="top_left", return_weights=weights))
        torch.set_num_threads(2)
        two = _results(fa.attention(q, k, v, causal="top_left", return_weights=weights))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    for b, h in ((0, 0), (1, 22), (2, 44)):
        scores = (q[b, h].double() @ k[b, h // 3].double().T / 8).masked_fill(
            torch.ones(512, 512).triu(1) > 0, -torch.inf
        )
        exact = scores.softmax(-1)
        plain = (q[b, h] @ k[b, h // 3].T / 8).masked_fill(torch.ones(512, 512).triu(1) > 0, -torch.inf).softmax(-1)
        found = compare(one[0][b, h], plain @ v[b, h // 3], exact @ v[b, h // 3].double(), grad=False)
        assert found["error"] <= found["allowed"]
        if weights == "heads":
            found = compare(one[1][b, h], plain, exact, grad=False)
            assert found["error"] <= found["allowed"]
