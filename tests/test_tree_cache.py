"""Speculative decoding: a tree of drafted tokens is attended to at once, and its accepted branch kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attention.cache import Cache, DecodeInputs, KVCache, PagedKVCache, describe
from fused_attention.decode import decode_attention
from fused_attention.dispatch import use_backend
from fused_attention.spec import Device, Options
from fused_attention.steps import BACKENDS

from .test_decode import BF16, F8, F16, F32, I8

pytestmark = pytest.mark.fast

B, H, HK, D, DV, PAGE = 3, 4, 2, 16, 24, 4
# Prompt, then a tree: 0 has the children 1 and 2, 2 has 3 and 4, 4 has 5; 6 has no parent.
PARENTS = [-1, 0, 0, 2, 2, 4, -1]
ACCEPTED = [[0, 2, 4, 5], [], [6]]


def tree() -> Tensor:
    mask = torch.eye(len(PARENTS), dtype=torch.bool)
    for i, parent in enumerate(PARENTS):
        if parent >= 0:
            mask[i] |= mask[parent]
    return mask[None]


def tokens(g: torch.Generator, rows: int, dtype: torch.dtype, batch: int = B) -> dict[str, Tensor]:
    dims = {"query": (H, D), "key": (HK, D), "value": (HK, DV)}
    return {n: torch.randn(batch, h, rows, d, generator=g).to(dtype) for n, (h, d) in dims.items()}


def caches(kind: str, kv_dtype: torch.dtype | None, dtype: torch.dtype) -> Cache:
    if kind == "paged":
        cache = PagedKVCache.managed(40, 40, HK, PAGE, D, DV, dtype=dtype, kv_dtype=kv_dtype)
        cache.add(B)
        return cache
    return KVCache.allocate(B, HK, 40, D, DV, dtype=dtype, kv_dtype=kv_dtype, window=20 if kind == "rolling" else None)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("dtype", "kv_dtype"), [(F32, None), (BF16, None), (F16, I8), (F32, F8)], ids=str)
@pytest.mark.parametrize("kind", ["dense", "paged"])
def test_the_accepted_branch_is_as_if_decoded_alone(
    kind: str, dtype: torch.dtype, kv_dtype: torch.dtype | None, backend: str
) -> None:
    g = torch.Generator().manual_seed(0)
    angles = torch.rand(40, D // 2, generator=g) * 7
    options: dict[str, Any] = {"rope": (angles.cos(), angles.sin(), False), "softcap": 20.0}
    cache, prompt, draft, then = (
        caches(kind, kv_dtype, dtype),
        tokens(g, 9, dtype),
        tokens(g, 7, dtype),
        tokens(g, 1, dtype),
    )
    with use_backend(backend):
        decode_attention(cache=cache, **prompt, **options)
        drafted = decode_attention(cache=cache, **draft, tree_mask=tree(), **options)
        if kind == "paged":
            cache.keep(ACCEPTED, 7)
        else:
            cache.keep(torch.tensor([[*rows, *[-1] * (4 - len(rows))] for rows in ACCEPTED]), 7)
        assert cache.lengths.tolist() == [9 + len(rows) for rows in ACCEPTED]
        after = decode_attention(cache=cache, **then, **options)
        for b, rows in enumerate(ACCEPTED):
            alone = KVCache.allocate(1, HK, 40, D, DV, dtype=dtype, kv_dtype=kv_dtype)
            decode_attention(cache=alone, **{n: t[b : b + 1] for n, t in prompt.items()}, **options)
            for row in rows:
                one = {n: t[b : b + 1, :, row : row + 1] for n, t in draft.items()}
                out = decode_attention(cache=alone, **one, **options)
                torch.testing.assert_close(out, drafted[b : b + 1, :, row : row + 1])  # type: ignore[index]
            out = decode_attention(cache=alone, **{n: t[b : b + 1] for n, t in then.items()}, **options)
            torch.testing.assert_close(out, after[b : b + 1])  # type: ignore[index]


def test_a_rolling_cache_keeps_a_branch() -> None:
    g = torch.Generator().manual_seed(0)
    cache = caches("rolling", None, F32)
    with use_backend("cpu"):
        for _ in range(40):
            decode_attention(cache=cache, **tokens(g, 1, F32), window=(20, 0))
        draft = tokens(g, 7, F32)
        decode_attention(cache=cache, **draft, tree_mask=tree(), window=(20, 0))
    assert isinstance(cache, KVCache) and cache.dropped is not None
    held, length = copy.deepcopy(cache.key), int(cache.lengths[0])
    cache.keep(ACCEPTED, 7)
    assert cache.positions.tolist() == [40 + len(rows) for rows in ACCEPTED]
    for b, rows in enumerate(ACCEPTED):
        expected = [*range(length - 7), *(length - 7 + i for i in rows)]
        assert torch.equal(cache.key[b, :, : len(expected)], held[b, :, expected])


def test_a_fork_of_a_draft_stays_as_it_was() -> None:
    g = torch.Generator().manual_seed(0)
    cache = caches("paged", None, F32)
    assert isinstance(cache, PagedKVCache)
    with use_backend("reference"):
        decode_attention(cache=cache, **tokens(g, 9, F32))
        decode_attention(cache=cache, **tokens(g, 7, F32), tree_mask=tree())
        other = cache.fork(0)
        probe = tokens(g, 1, F32, 1)["query"]
        before = decode_attention(probe, cache.select([other]))
        cache.select([0, 1, 2]).keep(ACCEPTED, 7)
        assert torch.equal(before, decode_attention(probe, cache.select([other])))  # type: ignore[arg-type]
    assert [cache.pool.length(s) for s in (0, 1, 2, other)] == [13, 9, 10, 16]


def test_who_takes_trees() -> None:
    query = torch.zeros(B, H, 7, D)
    cache = caches("dense", None, F32)
    cache.lengths.fill_(9)
    spec = describe(cache, DecodeInputs(query, tree_mask=tree()), Options())
    reasons = {name: backend.supports(spec, Device("cuda", "sm_90")) for name, backend in BACKENDS.items()}
    assert reasons["cuda"] == "no tree masks" and reasons["reference"] is None
    assert BACKENDS["cpu"].supports(spec, Device("cpu")) is None
