"""Each cache over whole histories: growing, rolling, forking, cut and reordered, against all tokens at once."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attention import steps
from fused_attention.backends import reference_decode
from fused_attention.cache import Cache, KVCache, PagedKVCache
from fused_attention.decode import decode_attention
from fused_attention.dispatch import use_backend
from fused_attention.functional import AttentionResult

from .numerics import assert_close
from .test_decode import BF16, EVERYWHERE, F8, F16, F32, I8, TRITON, on, references
from .triton_support import DEVICE, needs_triton

H, HK, D, DV, B, LEFT = 4, 2, 16, 8, 3, 6

MODELS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "window-rope": {"window": (LEFT, 0), "rope": (16, False)},
    "rope-partial-alibi": {"rope": (6, True), "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 1.0])},
    "sinks-softcap": {"softcap": 3.0, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "window-all": {
        "window": (LEFT - 1, None),
        "softcap": 4.0,
        "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0]),
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 1.0]),
        "rope": (8, False),
    },
}
STORES = {
    "fp32": (F32, F32),
    "bf16": (BF16, BF16),
    "fp16": (F16, F16),
    "fp32-over-bf16": (F32, BF16),
    "fp32-int8": (F32, I8),
    "bf16-int8": (BF16, I8),
    "bf16-fp8": (BF16, F8),
    "fp16-fp8": (F16, F8),
}
# What happens: so many tokens are appended, each sequence is cut by so many, or the beams are reordered. The sequences
# have other lengths after the first cut; they fill pages and outgrow the rolling cache's storage several times.
HISTORY: list[tuple[str, Any]] = [
    *(("append", 11), ("cut", [3, 0, 5]), ("append", 1), ("reorder", [2, 0, 2]), ("append", 1), ("append", 4)),
    *(("cut", [3, 1, 0]), ("append", 1), ("reorder", [0, 0, 1]), ("append", 1), ("append", 3), ("append", 1)),
]


class Told:
    """One sequence as it was told: all its queries and tokens, and what came out, [1, H, t, .]."""

    def __init__(self) -> None:
        self.parts: dict[str, Tensor] = {}

    def add(self, **new: Tensor) -> None:
        for name, t in new.items():
            self.parts[name] = torch.cat([self.parts[name], t], 2) if name in self.parts else t

    def cut(self, n: int) -> None:
        self.parts = {name: t[:, :, : t.shape[2] - n] for name, t in self.parts.items()}

    @property
    def length(self) -> int:
        return self.parts["key"].shape[2]


def _cache(kind: str, dtype: torch.dtype, kv_dtype: torch.dtype, device: str) -> Cache:
    if kind == "paged":
        cache = PagedKVCache.managed(40, 16, HK, 4, D, DV, dtype, kv_dtype, device)
        cache.add(B)
        return cache
    if kind == "rolling":  # rows of the window, and 5 more
        return KVCache.allocate(B, HK, LEFT + 5, D, DV, dtype, kv_dtype, device, window=LEFT)
    return KVCache.allocate(B, HK, 12, D, DV, dtype, kv_dtype, device)


def _tell(kind: str, model: str, store: str, backend: str) -> tuple[Cache, list[Told], dict[str, Any]]:
    """Go through the history with one cache."""
    g = torch.Generator().manual_seed(7)
    dtype, kv_dtype = STORES[store]
    device = DEVICE if backend == "triton" else "cpu"
    options = dict(MODELS[model])
    if "rope" in options:
        width, interleaved = options["rope"]
        angles = torch.rand(40, width // 2, generator=g) * 7
        options["rope"] = (angles.cos(), angles.sin(), interleaved)
    if "sinks" in options:
        options["sinks"] = options["sinks"].to(dtype)
    cache, told = _cache(kind, dtype, kv_dtype, device), [Told() for _ in range(B)]
    placed = on(device, options)
    for what, how in HISTORY:
        if what == "append":
            q, k, v = (torch.randn(B, h, how, d, generator=g).to(dtype) for h, d in ((H, D), (HK, D), (HK, DV)))
            if isinstance(cache, KVCache) and kind == "dense":
                cache.reserve(max(t.length if t.parts else 0 for t in told) + how)
            with use_backend(backend):
                out = decode_attention(
                    q.to(device), cache, k.to(device), v.to(device), return_lse=True, batch_invariant=True, **placed
                )
            assert isinstance(out, AttentionResult) and out.lse is not None
            for b, t in enumerate(told):
                one = slice(b, b + 1)
                lse = out.lse[one, ..., None].cpu()
                t.add(query=q[one], key=k[one], value=v[one], output=out.output[one].cpu(), lse=lse)
        elif what == "cut":
            for t, n in zip(told, how, strict=True):
                t.cut(n)
            cache.truncate([t.length for t in told])
        else:
            told = [copy.deepcopy(told[i]) for i in how]
            cache.reorder(how)
    return cache, told, options


def _expected(told: Told, store: str, options: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Plain eager code and exact values for all tokens at once, from a plain cache that holds them all."""
    dtype, kv_dtype = STORES[store]
    whole = KVCache.allocate(1, HK, told.length, D, DV, dtype, kv_dtype)
    tokens = {n: told.parts[n] for n in ("query", "key", "value")}
    with use_backend("reference"):
        decode_attention(cache=whole, **tokens, **options)
    return references(whole, {"query": tokens["query"], **options})


def _histories() -> list[Any]:
    """Every cache, model and store on the backends that take milliseconds; of Triton, whose interpreter takes seconds
    for each step and cuts off instead of rounding to bfloat16, each cache with everything, and another model."""
    found = []
    for kind in ("dense", "rolling", "paged"):
        # A model without a window sees what a rolling cache forgets: test_cache_errors.py has the refusal.
        models = [m for m in MODELS if kind != "rolling" or "window" in MODELS[m]]
        found += [pytest.param(kind, m, s, b) for m in models for s in STORES for b in ("cpu", "reference")]
        some = [("window-all", "fp16-fp8"), (models[0], "fp32")]
        found += [pytest.param(kind, m, s, "triton", marks=[pytest.mark.triton, needs_triton]) for m, s in some]
    return found


@pytest.mark.parametrize(("kind", "model", "store", "backend"), _histories())
@pytest.mark.usefixtures("poison")
def test_a_history_equals_all_tokens_at_once(kind: str, model: str, store: str, backend: str) -> None:
    cache, told, options = _tell(kind, model, store, backend)
    seen = cache.positions if isinstance(cache, KVCache) else cache.lengths
    assert seen.tolist() == [t.length for t in told]
    expected = [_expected(t, store, options) for t in told]
    for name in ("output", "lse"):
        got = torch.cat([t.parts[name].flatten() for t in told])
        same, exact = (torch.cat([e[name][i].flatten() for e in expected]) for i in range(2))
        assert_close(got, same, exact, name=name)
    if isinstance(cache, KVCache) and cache.dropped is not None:
        assert cache.capacity == LEFT + 5 and (cache.dropped > 0).all(), "nothing was forgotten: no test of it"


@EVERYWHERE
@pytest.mark.parametrize("kind", ["dense", "rolling", "paged"])
def test_rows_are_bit_equal_alone_and_in_a_batch(kind: str, backend: str) -> None:
    """With batch_invariant: a sequence of a history told again alone, by another cache of the same capacity."""
    cache, told, options = _tell(kind, "window-all", "fp32", backend)
    device = DEVICE if backend == "triton" else "cpu"
    q, k, v = (torch.randn(B, h, 1, d).to(device) for h, d in ((H, D), (HK, D), (HK, DV)))
    placed = on(device, options)
    singles: list[Cache] = []
    for b in range(B):
        if isinstance(cache, PagedKVCache):
            alone: Cache = copy.deepcopy(cache)
            assert isinstance(alone, PagedKVCache)
            singles.append(alone.select([alone.sequences[b]]))
        else:
            names = ("key", "value", "lengths", "key_scale", "value_scale", "dropped")
            rows = {n: getattr(cache, n)[b : b + 1].clone() for n in names if getattr(cache, n) is not None}
            singles.append(replace(cache, **rows))
    with use_backend(backend):
        together = decode_attention(q, cache, k, v, batch_invariant=True, **placed)
        for b, one in enumerate(singles):
            s = slice(b, b + 1)
            alone_out = decode_attention(q[s], one, k[s], v[s], batch_invariant=True, **placed)
            assert torch.equal(alone_out, together[s])  # type: ignore[arg-type]


# --- dense ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_dtype", [F32, I8, F8], ids=str)
def test_growing_keeps_tokens_and_layout(kv_dtype: torch.dtype) -> None:
    cache = KVCache.allocate(2, HK, 4, D, DV, F32, kv_dtype)
    cache = replace(cache, key=cache.key.transpose(1, 2).contiguous().transpose(1, 2))
    q, k, v = torch.randn(2, H, 4, D), torch.randn(2, HK, 4, D), torch.randn(2, HK, 4, DV)
    before = decode_attention(q, cache, k, v)
    cache.reserve(5)
    assert cache.capacity == 6, "at least half as much again"
    cache.reserve(3)
    assert cache.capacity == 6
    assert cache.key.stride()[1:3] == (D, HK * D), "the order of the dimensions in memory changed"
    assert torch.equal(decode_attention(q, cache), before)  # type: ignore[arg-type]
    moved = 0
    for tokens in range(7, 1000):
        old = cache.capacity
        cache.reserve(tokens)
        moved += old if cache.capacity != old else 0
    assert moved < 3 * cache.capacity, "growing token by token moves each token a bounded number of times"


def test_reset_empties() -> None:
    for cache in (KVCache.allocate(2, 1, 8, 4), KVCache.allocate(2, 1, 8, 4, window=3)):
        for _ in range(6):
            decode_attention(*_step(cache, 2), window=(3, 0))
            if cache.window is None and cache.longest() == 8:
                cache.reset()
        cache.reset()
        assert cache.lengths.tolist() == [0, 0] == cache.positions.tolist()


def _step(cache: Cache, rows: int) -> tuple[Any, ...]:
    shape = (cache.batch, cache.kv_heads, rows)
    q = torch.randn(*shape, cache.head_dim)
    return q, cache, torch.randn(*shape, cache.head_dim), torch.randn(*shape, cache.value_dim)


def test_beams_may_become_more_and_fewer() -> None:
    """One prompt, then three beams of it, then the best two."""
    cache = KVCache.allocate(1, HK, 12, D, DV, F32, I8)
    decode_attention(torch.randn(1, H, 5, D), cache, torch.randn(1, HK, 5, D), torch.randn(1, HK, 5, DV))
    query = torch.randn(1, H, 1, D)
    alone = decode_attention(query, cache)
    cache.reorder([0, 0, 0])
    out = decode_attention(query.expand(3, -1, -1, -1), cache)
    assert cache.batch == 3 and torch.equal(out, alone.expand(3, -1, -1, -1))  # type: ignore[union-attr,arg-type]
    cache.reorder(torch.tensor([2, 1]))
    assert cache.batch == 2 and cache.lengths.tolist() == [5, 5]


def test_reordering_the_same_number_of_beams_writes_in_place() -> None:
    cache = KVCache.allocate(3, HK, 12, D, DV)
    before = (cache.key.data_ptr(), cache.lengths.data_ptr())
    cache.reorder([1, 1, 0])
    assert (cache.key.data_ptr(), cache.lengths.data_ptr()) == before


def test_rolling_moves_each_token_once_for_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    rolls = []
    roll = KVCache._roll
    monkeypatch.setattr(KVCache, "_roll", lambda self, window: (rolls.append(window), roll(self, window)))
    cache = KVCache.allocate(1, 1, 64, 4, window=16)
    for _ in range(64 + 3 * 48):
        decode_attention(*_step(cache, 1), window=(16, 0))
    assert rolls == [16] * 3


# --- where nothing can be looked at -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", TRITON])
def test_what_is_forgotten_and_not_noticed_is_nan(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where looking would synchronise: cut too far, or asked for rows whose window is gone."""
    device = DEVICE if backend == "triton" else "cpu"
    monkeypatch.setattr("fused_attention.cache.dense.readable", lambda _: False)
    monkeypatch.setattr("fused_attention.cache.checks.readable", lambda _: False)
    monkeypatch.setattr(steps, "readable", lambda _: False)
    with use_backend(backend):
        cache = KVCache.allocate(2, 1, 8, 4, window=4, device=device)
        for _ in range(9):
            q, _, k, v = (t.to(device) if isinstance(t, Tensor) else t for t in _step(cache, 1))
            out = decode_attention(q, cache, k, v, window=(4, 0))
        assert cache.dropped is not None and cache.dropped.tolist() == [4, 4] and out.isfinite().all()  # type: ignore[union-attr]
        wide = decode_attention(torch.randn(2, 1, 2, 4, device=device), cache, window=(4, 0))
        assert wide.isnan().all(), "rows 7 and 8 see from token 3 on"  # type: ignore[union-attr]
        cache.truncate([9, 7])  # of tokens 4 .. 8 the second sequence keeps three, and had to keep four
        again = decode_attention(q, cache, k, v, window=(4, 0))
        assert again[0].isfinite().all() and again[1].isnan().all()  # type: ignore[index]
        cache.reorder([0, 7])
        again = decode_attention(q, cache, k, v, window=(4, 0))
        assert again[0].isfinite().all() and again[1].isnan().all()  # type: ignore[index]
        for _ in range(6):  # it stays lost when the cache rolls
            again = decode_attention(q, cache, k, v, window=(4, 0))
        assert again[0].isfinite().all() and again[1].isnan().all()  # type: ignore[index]
        cache.reset()
        assert decode_attention(q, cache, k, v, window=(4, 0)).isfinite().all()  # type: ignore[union-attr]


# --- pages ------------------------------------------------------------------------------------------------------------


@EVERYWHERE
def test_sequences_that_share_a_prefix(backend: str) -> None:
    """Two continuations of one prompt give what each gives alone, and the prompt's full pages are there once."""
    g = torch.Generator().manual_seed(1)
    device = DEVICE if backend == "triton" else "cpu"

    def tokens(n: int, rows: int) -> list[Tensor]:
        return [torch.randn(n, h, rows, d, generator=g).to(device) for h, d in ((H, D), (HK, D), (HK, DV))]

    def managed() -> PagedKVCache:
        return PagedKVCache.managed(64, 20, HK, 4, D, DV, kv_dtype=I8, device=device)

    prompt, more = tokens(1, 10), tokens(2, 5)
    cache = managed()
    (first,) = cache.add()
    with use_backend(backend):
        decode_attention(prompt[0], cache, *prompt[1:])
        second = cache.fork(first)
        assert cache.pool.free_pages == 17
        out = decode_attention(more[0], cache, *more[1:], batch_invariant=True)
        assert cache.pool.pages(first)[:2] == cache.pool.pages(second)[:2]
        assert cache.pool.free_pages == 20 - (2 + 2 + 2)
        for b in range(2):
            alone = managed()
            alone.add()
            decode_attention(prompt[0], alone, *prompt[1:])
            one = [t[b : b + 1] for t in more]
            assert torch.equal(decode_attention(one[0], alone, *one[1:], batch_invariant=True), out[b : b + 1])  # type: ignore[index,arg-type]


def test_batches_of_one_pool_see_each_others_tokens() -> None:
    cache = PagedKVCache.managed(16, 8, 1, 2, 4)
    a, b = cache.add(2)
    pair, single = cache.select([b, a]), cache.select([a])
    decode_attention(*_step(single, 3))
    decode_attention(*_step(pair, 2))
    decode_attention(*_step(single, 1))
    cache.refresh()
    assert cache.lengths.tolist() == [6, 2] and cache.block_table[0, :3].tolist() == cache.pool.pages(a)
    assert pair.lengths.tolist() == [2, 5], "what it knew when it last decoded"
    key, _ = reference_decode.dense(cache, 6, F32)
    assert len(key[0, 0].unique(dim=0)) == 6


def test_chunks_give_what_one_call_gives() -> None:
    """A prompt in chunks, dense and paged, and a query whose heads are interleaved in memory."""
    g = torch.Generator().manual_seed(2)
    q = torch.randn(2, 37, H, D, generator=g).transpose(1, 2)
    k, v = torch.randn(2, HK, 37, D, generator=g), torch.randn(2, HK, 37, DV, generator=g)
    paged = PagedKVCache.managed(64, 30, HK, 4, D, DV, kv_dtype=F8)
    paged.add(2)
    for cache in (KVCache.allocate(2, HK, 64, D, DV, kv_dtype=I8), paged):
        wanted = decode_attention(q, copy.deepcopy(cache), k, v, window=(9, 0), return_lse=True)
        got = decode_attention(q, cache, k, v, window=(9, 0), return_lse=True, chunk=5)
        assert isinstance(got, AttentionResult) and isinstance(wanted, AttentionResult)
        torch.testing.assert_close(got.output, wanted.output)
        torch.testing.assert_close(got.lse, wanted.lse)
        assert got.output.stride() == wanted.output.stride() and cache.lengths.tolist() == [37, 37]


def test_a_step_takes_pages_without_looking_at_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room, copies and tables are made on the host: nothing reads a tensor's values or waits for them."""
    cache = PagedKVCache.managed(64, 40, HK, 4, D, DV)
    (first,) = cache.add()
    decode_attention(torch.randn(1, H, 6, D), cache, torch.randn(1, HK, 6, D), torch.randn(1, HK, 6, DV))
    cache.fork(first)
    with monkeypatch.context() as m:
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero", "cpu", "numpy"):
            m.setattr(Tensor, name, lambda *_: pytest.fail("a value was looked at"))
        cache.make_room(7)
        cache.lengths.add_(7)
        cache.advance(7)
        rolling = KVCache.allocate(2, HK, 9, D, DV, window=4)
        m.setattr("fused_attention.cache.dense.readable", lambda _: False)
        for _ in range(7):
            rolling.make_room(3)
            rolling.lengths.add_(3)
            rolling.advance(3)
        rolling.reorder(torch.tensor([1, 0]))
        rolling.truncate(rolling.positions - 1)
    assert cache.lengths.tolist() == [13, 13] and rolling.positions.tolist() == [20, 20]
