"""Malformed use of the caches: an error that names the argument, and a cache that is as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attention.backends import cuda_decode
from fused_attention.cache import Cache, DecodeInputs, KVCache, PagedKVCache, PagePool, describe
from fused_attention.decode import decode_attention
from fused_attention.spec import Device, Options

from .test_decode import F32, I8

pytestmark = pytest.mark.fast


def tokens(batch: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.ones(batch, h, rows, d) for h, d in ((4, 8), (2, 8), (2, 6)))
    return q, k, v


def step(cache: Cache, rows: int = 1, **options: Any) -> Any:
    q, k, v = tokens(cache.batch, rows)
    return decode_attention(q, cache, k, v, **options)


def dense(rows: int = 5) -> KVCache:
    cache = KVCache.allocate(2, 2, 16, 8, 6, kv_dtype=I8)
    step(cache, rows)
    return cache


def rolling(rows: int = 5, kv_dtype: torch.dtype = F32) -> KVCache:
    """Window 4 in storage of 8: after 9 tokens, positions 4 .. 8 are left."""
    cache = KVCache.allocate(2, 2, 8, 8, 6, kv_dtype=kv_dtype, window=4)
    for _ in range(rows):
        step(cache, window=(4, 0))
    return cache


def managed(rows: int = 5, sequences: int = 2, pages: int = 4) -> PagedKVCache:
    """Pages of 4 tokens, two of them taken by each sequence of 5."""
    cache = PagedKVCache.managed(12, pages, 2, 4, 8, 6)
    cache.add(sequences)
    step(cache, rows)
    return cache


def freed() -> PagedKVCache:
    cache = managed()
    cache.free(0)
    return cache


def forked() -> PagedKVCache:
    """Two of three share a page that is not full, and no page is free for a copy."""
    cache = managed()
    cache.fork(0)
    return cache


def other_batch() -> PagedKVCache:
    cache = managed()
    other = cache.select([0, 1])
    cache.free(1)
    return other


def unmanaged() -> PagedKVCache:
    return PagedKVCache.allocate(torch.zeros(2, 3, dtype=torch.int32), 4, 2, 4, 8, 6)


CALLS: list[tuple[str, Callable[[], Any], Callable[[Any], Any], type[Exception], str]] = [
    ("too few pages", managed, lambda c: step(c, 4), ValueError, "cache: got 2 more pages"),
    ("too few pages for copies", forked, step, ValueError, "cache: got 1 more"),
    ("a sequence longer than its table", lambda: managed(12, 1), step, ValueError, "cache.lengths: got 12 tokens"),
    ("fork of no sequence", managed, lambda c: c.fork(7), ValueError, "sequence: got 7"),
    ("fork of a negative id", managed, lambda c: c.fork(-1), ValueError, "sequence: got -1"),
    ("fork of a tensor", managed, lambda c: c.fork(torch.tensor(0)), TypeError, "sequence"),
    ("fork of a freed one", freed, lambda c: c.fork(0), ValueError, "sequence: got 0, which was freed"),
    ("fork of more than there is", managed, lambda c: c.fork(0, 6), ValueError, r"tokens: got 6, expected 0 \.\. 5"),
    ("fork of a fraction", managed, lambda c: c.fork(0, 1.5), TypeError, "tokens"),
    ("double free", freed, lambda c: c.free(0), ValueError, "sequence: got 0, which was freed"),
    ("free of no sequence", managed, lambda c: c.free(2), ValueError, "sequence: got 2"),
    ("select of a freed one", freed, lambda c: c.select([0]), ValueError, "sequence: got 0, which was freed"),
    ("select of one twice", managed, lambda c: c.select([1, 0, 1]), ValueError, "sequences: got 1 twice"),
    ("step of a batch with a freed one", other_batch, step, ValueError, "sequence: got 1, which was freed"),
    ("add of -1", managed, lambda c: c.add(-1), ValueError, "count"),
    ("add of True", managed, lambda c: c.add(True), TypeError, "count"),
    ("beams out of range", managed, lambda c: c.reorder([0, 2]), ValueError, "beam_idx"),
    ("beams of another number", managed, lambda c: c.reorder([0]), ValueError, "beam_idx"),
    ("beams that are fractions", managed, lambda c: c.reorder([0.0, 1.0]), TypeError, "beam_idx"),
    ("paged cut to -1", managed, lambda c: c.truncate(-1), ValueError, "tokens"),
    ("paged cut of another number", managed, lambda c: c.truncate([1, 2, 3]), ValueError, "tokens"),
    ("fork without a pool", unmanaged, lambda c: c.fork(0), ValueError, "cache"),
    ("add without a pool", unmanaged, lambda c: c.add(), ValueError, "cache"),
    ("dense beams out of range", dense, lambda c: c.reorder([0, 2]), ValueError, "beam_idx: got 2"),
    ("dense beams below 0", dense, lambda c: c.reorder(torch.tensor([0, -1])), ValueError, "beam_idx: got -1"),
    ("dense beams of 2 dims", dense, lambda c: c.reorder(torch.zeros(2, 2).long()), ValueError, "beam_idx"),
    ("dense beams of floats", dense, lambda c: c.reorder(torch.zeros(2)), ValueError, "beam_idx"),
    ("dense beams of bools", dense, lambda c: c.reorder([True, False]), TypeError, "beam_idx"),
    ("paged kept of more than there is", managed, lambda c: c.keep([[0], [0]], 6), ValueError, "last: got 6"),
    ("paged kept past the last", managed, lambda c: c.keep([[0], [3]], 3), ValueError, "rows"),
    ("kept without a pool", unmanaged, lambda c: c.keep([[0], [0]], 1), ValueError, "cache"),
    ("too few pages to keep", forked, lambda c: c.keep([[0], [0], [0]], 2), ValueError, "cache: got 1 more"),
    ("dense kept of more than there is", dense, lambda c: c.keep([[0], [0]], 6), ValueError, "last: got 6"),
    ("dense kept past the last", dense, lambda c: c.keep([[0], [3]], 3), ValueError, "rows"),
    ("dense kept before the first", dense, lambda c: c.keep([[0], [-2]], 3), ValueError, "rows"),
    ("dense kept of another number", dense, lambda c: c.keep([[0]], 3), ValueError, "rows"),
    ("dense kept twice over", dense, lambda c: c.keep([[0, 0, 1, 1], [0]], 3), ValueError, "rows: got 4"),
    ("dense kept with a gap", dense, lambda c: c.keep(torch.tensor([[0, 1], [-1, 1]]), 3), ValueError, "rows"),
    ("dense kept as floats", dense, lambda c: c.keep(torch.zeros(2, 1), 3), ValueError, "rows"),
    ("dense kept as numbers", dense, lambda c: c.keep([0, 1], 3), TypeError, "rows"),
    ("kept of a fraction", dense, lambda c: c.keep([[0], [0]], 1.5), TypeError, "last"),
    ("kept of -1", dense, lambda c: c.keep([[], []], -1), ValueError, "last"),
    ("kept less than the window", lambda: rolling(9), lambda c: c.keep([[0], [1, 2]], 3), ValueError, "rows: got 1 of"),
    ("dense cut to -1", dense, lambda c: c.truncate(-1), ValueError, "tokens: got -1"),
    ("dense cut of another number", dense, lambda c: c.truncate([1]), ValueError, "tokens"),
    ("dense cut to True", dense, lambda c: c.truncate(True), TypeError, "tokens"),
    ("room of a fraction", dense, lambda c: c.reserve(2.5), TypeError, "capacity"),
    ("cut into what is forgotten", lambda: rolling(9), lambda c: c.truncate(7), ValueError, r"tokens: got 7.*8 \.\. 9"),
    ("window wider than what is kept", rolling, lambda c: step(c, window=(5, 0)), ValueError, "window"),
    ("no window on a rolling cache", rolling, step, ValueError, "window"),
    ("rows whose window is gone", lambda: rolling(9),
     lambda c: decode_attention(tokens(2, 2)[0], c, window=(4, 0)), ValueError, "query: got 2 rows"),
    ("room for more than there is beside the window", rolling, lambda c: c.make_room(5), ValueError, "key: got 5"),
    ("rotation past the tables, forgotten tokens counted", lambda: rolling(9),
     lambda c: step(c, window=(4, 0), rope=(torch.ones(9, 4), torch.ones(9, 4), False)), ValueError, "rope"),
    ("chunk of 0", dense, lambda c: step(c, 2, chunk=0), ValueError, "chunk"),
    ("chunk of a fraction", dense, lambda c: step(c, 2, chunk=1.5), TypeError, "chunk"),
    ("a full cache in chunks", dense, lambda c: step(c, 12, chunk=2), ValueError, "cache.lengths"),
    ("a full pool in chunks", managed, lambda c: step(c, 5, chunk=2), ValueError, "cache: got 2 more pages"),
]  # fmt: skip


def _state(cache: Any) -> list[Any]:
    """All that a call could have changed; ids of sequences are not used twice, so the next one does not count."""
    found = [t.view(torch.uint8).clone() for t in cache._stored()] + [cache.lengths.clone()]
    found += [cache.dropped.clone()] if getattr(cache, "dropped", None) is not None else []
    pool = cache.managed_by.pool if getattr(cache, "managed_by", None) else None
    return [*found, copy.deepcopy({k: v for k, v in vars(pool).items() if k != "_next"}) if pool else None]


@pytest.mark.parametrize(("make", "use", "error", "message"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS])
def test_malformed(make: Callable[[], Any], use: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    cache = make()
    before = _state(cache)
    with pytest.raises(error, match=message):
        use(cache)
    for was, now in zip(before, _state(cache), strict=True):
        same = torch.equal(was, now) if isinstance(was, Tensor) else was == now
        assert same, "something was lost"


MADE: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("no pages", lambda: PagePool(0, 4), ValueError, "num_pages"),
    ("pages of no token", lambda: PagePool(4, 0), ValueError, "page_size"),
    ("half a page", lambda: PagePool(4, 0.5), TypeError, "page_size"),  # type: ignore[arg-type]
    ("no tokens", lambda: PagedKVCache.managed(0, 4, 2, 4, 8), ValueError, "max_tokens"),
    ("tokens that are no number", lambda: PagedKVCache.managed("8", 4, 2, 4, 8), TypeError, "max_tokens"),  # type: ignore[arg-type]
    ("window of the capacity", lambda: KVCache.allocate(1, 1, 8, 4, window=8), ValueError, "window"),
    ("negative window", lambda: KVCache.allocate(1, 1, 8, 4, window=-1), ValueError, "window"),
    ("window of a fraction", lambda: KVCache.allocate(1, 1, 8, 4, window=1.0), TypeError, "window"),  # type: ignore[arg-type]
    ("dropped without a window", lambda: replace(dense(), dropped=torch.zeros(2).int()), ValueError, "dropped"),
    ("dropped of another dtype", lambda: replace(rolling(), dropped=torch.zeros(2)), ValueError, "dropped"),
    ("dropped of another batch", lambda: replace(rolling(), dropped=torch.zeros(3).int()), ValueError, "dropped"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "name"), [c[1:] for c in MADE], ids=[c[0] for c in MADE])
def test_malformed_from_the_start(make: Callable[[], Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=rf"^{name}"):
        make()


def test_cutting_back_to_the_window_is_possible() -> None:
    cache = rolling(9)
    cache.truncate(8)
    assert cache.positions.tolist() == [8, 8] and cache.lengths.tolist() == [4, 4]
    step(cache, window=(4, 0))


def test_an_exhausted_pool_goes_on_when_pages_come_back() -> None:
    cache = managed()
    with pytest.raises(ValueError, match="free"):
        step(cache, 4)
    cache.free(1)
    step(cache, 7)
    assert cache.lengths.tolist() == [12] and cache.pool.free_pages == 1


def test_cuda_says_what_it_does_not_turn() -> None:
    """Its kernels know no forgotten tokens, which only a rotation counts."""
    cache = rolling()
    x = DecodeInputs(*tokens(2, 1))
    tables = x._replace(cos=torch.ones(20, 4), sin=torch.ones(20, 4))
    options = Options(window_left=4)
    turned = describe(cache, tables, options)
    assert "rolling" in str(cuda_decode.supports(turned, Device("cuda", "sm_80")))
    assert "rolling" not in str(cuda_decode.supports(describe(cache, x, options), Device("cuda", "sm_80")))
