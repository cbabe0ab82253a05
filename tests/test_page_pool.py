"""The pages of a pool against sequences that are plain lists, through random histories."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from fused_attention.backends import reference_decode
from fused_attention.cache import PagedKVCache, PagePool
from fused_attention.decode import decode_attention
from fused_attention.dispatch import use_backend
from fused_attention.spec import ArgumentError

PAGES, SIZE, MOST = 12, 3, 24  # pages, tokens a page, tokens a sequence


class Histories(RuleBasedStateMachine):
    """A sequence is a list of tokens, each a number of its own; the cache has to hold the same numbers.

    Batches other than the cache's own decode too, so that tables and lengths on the device fall behind the pool's.
    """

    ids: Bundle[int] = Bundle("ids")
    window: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.cache = PagedKVCache.managed(MOST, PAGES, 2, SIZE, 2, dtype=torch.float64, window=self.window)
        self.model: dict[int, list[float]] = {}
        self.token = 0.0

    def _needed(self, batch: list[int], rows: int) -> int:
        """Pages that appending takes: for new tokens, and for copies of pages that are shared and not full; less those
        that it gives up.
        """
        pool, needed = self.cache.pool, 0
        holders = {p: pool.holders(p) for s in batch for p in pool.pages(s) if p >= 0}
        for s in batch:
            pages, length = pool.pages(s), pool.length(s)
            behind = 0 if self.window is None or not rows else max(length - self.window, 0) // SIZE
            for page in pages[pool.forgotten(s) // SIZE : behind]:
                holders[page] -= 1
                needed -= not holders[page]
        for s in batch:
            pages, length = pool.pages(s), pool.length(s)
            needed += max(-(-(length + rows) // SIZE) - len(pages), 0)
            if rows and length % SIZE and holders[pages[length // SIZE]] > 1:
                holders[pages[length // SIZE]] -= 1
                needed += 1
        return needed

    def _lost(self, sequence: int, tokens: int | None) -> bool:
        """Whether the first `tokens` tokens end before a window of which something was given up."""
        gone = self.cache.pool.forgotten(sequence)
        return bool(tokens and gone and self.window is not None and tokens < gone + self.window)

    @rule(target=ids, count=st.integers(0, 2))
    def add(self, count: int) -> Any:
        new = self.cache.add(count)
        self.model |= {i: [] for i in new}
        return multiple(*new)

    @rule(target=ids, sequence=ids, share=st.none() | st.floats(0, 1))
    def fork(self, sequence: int, share: float | None) -> Any:
        if sequence not in self.model:
            with pytest.raises(ArgumentError, match="sequence"):
                self.cache.fork(sequence)
            return multiple()
        whole = self.model[sequence]
        tokens = None if share is None else int(share * len(whole))
        if self._lost(sequence, tokens):
            with pytest.raises(ArgumentError, match="tokens"):
                self.cache.fork(sequence, tokens)
            return multiple()
        new = self.cache.fork(sequence, tokens)
        self.model[new] = whole[:tokens]
        return new

    @rule(sequence=ids)
    def free(self, sequence: int) -> None:
        if sequence in self.model:
            self.cache.free(sequence)
            del self.model[sequence]
        else:
            with pytest.raises(ArgumentError, match="sequence.*freed"):
                self.cache.free(sequence)

    @rule(sequence=consumes(ids))
    def free_for_good(self, sequence: int) -> None:
        self.free(sequence)

    @rule(rows=st.integers(0, 5), data=st.data(), whole=st.booleans())
    def append(self, rows: int, data: st.DataObject, whole: bool) -> None:
        batch, cache = self.cache.sequences, self.cache
        if not whole and batch:
            batch = data.draw(st.lists(st.sampled_from(batch), unique=True))
            cache = cache.select(batch)
        new = torch.arange(self.token, self.token + len(batch) * rows, dtype=torch.float64).reshape(
            len(batch), 1, rows, 1
        )
        new = new.expand(len(batch), 2, rows, 2)
        looks = None if self.window is None else (self.window, 0)
        short = any(len(self.model[s]) + rows > MOST for s in batch)
        if short or self._needed(batch, rows) > cache.pool.free_pages:
            before = copy.deepcopy(vars(cache.pool))
            with use_backend("reference"), pytest.raises(ArgumentError, match="cache"):
                decode_attention(new, cache, new, -new, window=looks)
            assert vars(cache.pool) == before, "a refused call took something"
            return
        with use_backend("reference"):
            out = decode_attention(new, cache, new, -new, window=looks)
        assert isinstance(out, torch.Tensor) and not out.isnan().any()
        self.token += new[:, 0, :, 0].numel()
        for s, tokens in zip(batch, new[:, 0, :, 0].tolist(), strict=True):
            self.model[s] += tokens

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        ids = self.cache.sequences
        order = data.draw(st.lists(st.integers(0, max(len(ids) - 1, 0)), min_size=len(ids), max_size=len(ids)))
        self.cache.reorder(order)
        self.model |= {s: list(self.model[ids[i]]) for s, i in zip(ids, order, strict=True)}

    @rule(tokens=st.integers(0, 10))
    def truncate(self, tokens: int) -> None:
        if any(self._lost(s, min(tokens, len(self.model[s]))) for s in self.cache.sequences):
            before = copy.deepcopy(vars(self.cache.pool))
            with pytest.raises(ArgumentError, match="tokens"):
                self.cache.truncate(tokens)
            assert vars(self.cache.pool) == before
            return
        self.cache.truncate(tokens)
        for s in self.cache.sequences:
            del self.model[s][tokens:]

    @rule(last=st.integers(0, 4), data=st.data())
    def keep(self, last: int, data: st.DataObject) -> None:
        """The pages of another sequence, which shares them, stay as they are."""
        ids = self.cache.sequences
        rows = [data.draw(st.lists(st.integers(0, last - 1), max_size=last) if last else st.just([])) for _ in ids]
        pool, before = self.cache.pool, copy.deepcopy(vars(self.cache.pool))
        lost = any(self._lost(s, len(self.model[s]) - last + len(r)) for s, r in zip(ids, rows, strict=True))
        gone = any(len(self.model[s]) - pool.forgotten(s) < last for s in ids)
        if lost or gone or any(len(self.model[s]) < last for s in ids):
            with pytest.raises(ArgumentError, match="last|rows"):
                self.cache.keep(rows, last)
            assert vars(pool) == before
            return
        try:
            self.cache.keep(rows, last)
        except ArgumentError as error:
            assert "more pages needed" in str(error) and vars(pool) == before
            return
        for s, kept in zip(ids, rows, strict=True):
            tail = self.model[s][len(self.model[s]) - last :]
            self.model[s][len(self.model[s]) - last :] = [tail[i] for i in kept]

    @invariant()
    def holds_the_same_tokens(self) -> None:
        cache = self.cache
        cache.refresh()
        assert cache.sequences == list(self.model)
        assert cache.lengths.tolist() == [len(t) for t in self.model.values()]
        columns = max((len(t) for t in self.model.values()), default=0)
        key, value = reference_decode.dense(cache, columns, torch.float64)
        for b, tokens in enumerate(self.model.values()):
            gone = cache.pool.forgotten(cache.sequences[b])
            found = torch.cat([key[b, :, gone : len(tokens)], -value[b, :, gone : len(tokens)]])
            wanted = torch.tensor(tokens[gone:], dtype=torch.float64)[None, :, None].expand_as(found)
            assert torch.equal(found, wanted)

    @invariant()
    def no_page_is_lost(self) -> None:
        pool = self.cache.pool
        held = [p for s in pool.sequences for p in pool.pages(s) if p >= 0]
        assert [pool.holders(p) for p in range(PAGES)] == [held.count(p) for p in range(PAGES)]
        assert pool.free_pages + len(set(held)) == PAGES
        if not self.model:
            assert pool.free_pages == PAGES


Histories.TestCase.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestHistories = Histories.TestCase


class WindowedHistories(Histories):
    """Pages behind the window go, and whatever is refused for that changes nothing."""

    window = 4


WindowedHistories.TestCase.settings = Histories.TestCase.settings
TestWindowedHistories = WindowedHistories.TestCase


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("chunks", [[1] * 70, [23, 1, 1, 1, 30, 2, 12]], ids=["tokens", "chunks"])
def test_a_long_history_in_few_pages(chunks: list[int], kv_dtype: torch.dtype, backend: str) -> None:
    """What a window shows of 70 tokens, in pages that come back: as with all of them kept."""
    few = PagedKVCache.managed(80, 16, 2, SIZE, 8, kv_dtype=kv_dtype, window=10)
    all_kept = PagedKVCache.managed(80, 60, 2, SIZE, 8, kv_dtype=kv_dtype)
    generator = torch.Generator().manual_seed(0)
    for cache in (few, all_kept):
        cache.add(2)
    if len(chunks) < 70:
        few = PagedKVCache.managed(80, 40, 2, SIZE, 8, kv_dtype=kv_dtype, window=10)
        few.add(2)
    most = 0
    with use_backend(backend):
        for rows in chunks:
            q, k, v = (torch.randn(2, h, rows, 8, generator=generator) for h in (4, 2, 2))
            got, wanted = (decode_attention(q, c, k, v, window=(10, 0), softcap=9.0) for c in (few, all_kept))
            torch.testing.assert_close(got, wanted)
            again = decode_attention(q[:, :, -1:], few, window=(10, 0), softcap=9.0)
            torch.testing.assert_close(again, got[:, :, -1:])  # type: ignore[index]
            most = max(most, *(sum(p >= 0 for p in few.pool.pages(s)) for s in few.sequences))
    assert most <= 10 // SIZE + 2 + -(-max(chunks) // SIZE)
    assert few.lengths.tolist() == [70, 70]


def test_a_window_that_is_gone_is_refused() -> None:
    cache = PagedKVCache.managed(80, 16, 2, SIZE, 8, window=10)
    (sequence,) = cache.add()
    x = torch.randn(1, 2, 1, 8)
    for wide in (None, (11, 0)):
        with pytest.raises(ArgumentError, match=r"window\[0\] \(left\).*at most the cache's window, 10"):
            decode_attention(x, cache, x, x, window=wide)
    for _ in range(30):
        decode_attention(x, cache, x, x, window=(10, 0))
    assert cache.pool.forgotten(sequence) == 18 and cache.pool.least(sequence) == 28
    with pytest.raises(ArgumentError, match="query: got 5 rows"):
        decode_attention(x.expand(1, 2, 5, 8), cache, window=(10, 0))
    decode_attention(x.expand(1, 2, 2, 8), cache, window=(10, 0))
    with pytest.raises(ArgumentError, match="tokens: got 27, expected 0 or 28 .. 30"):
        cache.truncate(27)
    cache.reset()
    assert cache.pool.free_pages == 16 and cache.pool.forgotten(sequence) == 0
    with pytest.raises(ArgumentError, match="window: got -1, expected at least 0"):
        PagedKVCache.managed(80, 16, 2, SIZE, 8, window=-1)


def test_full_pages_stay_shared() -> None:
    """A fork takes no page; then each of three holders of a page that is not full but the last copies it."""
    pool = PagePool(8, 4)
    a = pool.add()
    assert pool.make_room([a], 10) == []
    pool.advance([a], 10)
    b, c = pool.fork(a), pool.fork(a, 9)
    assert pool.free_pages == 5 and [pool.holders(p) for p in pool.pages(a)] == [3, 3, 3]
    full, last = pool.pages(a)[:2], pool.pages(a)[2]
    copies = pool.make_room([a, b, c], 1)
    assert [source for source, _ in copies] == [last, last] and pool.pages(c)[2] == last
    assert [pool.pages(s)[:2] for s in (a, b, c)] == [full] * 3
    assert pool.free_pages == 3


def test_a_prefix_of_whole_pages_is_never_copied() -> None:
    pool = PagePool(8, 4)
    a = pool.add()
    pool.make_room([a], 11)
    pool.advance([a], 11)
    b = pool.fork(a, 8)
    assert pool.make_room([a, b], 1) == []
    assert pool.pages(b)[:2] == pool.pages(a)[:2] and pool.pages(b)[2] != pool.pages(a)[2]


def test_room_taken_in_advance_is_not_shared() -> None:
    """What make_room took for a step that never came belongs to one sequence, also after a fork and a reorder."""
    pool = PagePool(8, 4)
    a = pool.add()
    pool.make_room([a], 9)
    pool.advance([a], 2)
    b = pool.fork(a)
    assert len(pool.pages(a)) == 3 and len(pool.pages(b)) == 1
    pool.reorder([a, b], [1, 0])
    assert pool.free_pages == 7
    pool.free(a)
    pool.free(b)
    assert pool.free_pages == 8


def test_pages_are_owned_before_they_are_written() -> None:
    """Of three holders two copy the pages that hold tokens 5 .. 9; those before and behind stay shared."""
    pool = PagePool(9, 4)
    a = pool.add()
    pool.make_room([a], 14)
    pool.advance([a], 14)
    b = pool.fork(a)
    c = pool.fork(a)
    before = list(pool.pages(a))
    assert [old for old, _ in pool.own([a, b], [(5, 9), (5, 9)])] == before[1:3] * 2
    assert pool.pages(c) == before and pool.free_pages == 1
    assert [pool.holders(p) for p in before] == [3, 1, 1, 3]
    with pytest.raises(ArgumentError, match="cache: got 2 more pages needed"):
        pool.own([a, b, c], [(0, 2), (12, 14), (4, 4)])
    assert pool.own([c], [(4, 8)]) == [] and pool.free_pages == 1
