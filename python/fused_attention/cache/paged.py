"""A cache in pages: tables that somebody else fills, or that a pool fills as sequences come, fork, grow and go."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..spec import need_tensor, shape_of
from .pages import PagePool
from .storage import Storage, chosen_rows, empty, indices, refuse, storage_dtype


class Batch:
    """The sequences of a pool that decode together, one a row of the block table, and what the device knows of them."""

    def __init__(self, pool: PagePool, sequences: list[int]) -> None:
        self.pool = pool
        self.sequences = sequences
        self.tables: list[list[int]] = [[] for _ in sequences]
        self.lengths = [0] * len(sequences)


@dataclass(eq=False)
class PagedKVCache(Storage):
    """A cache in pages that sequences need not own side by side (Kwon et al., "PagedAttention", 2023).

    Token t of sequence b lies in row t % page_size of page block_table[b, t // page_size]. Made by `allocate`, which
    page is whose is for the caller to say, in `block_table`, before tokens are appended; sequences may share pages that
    neither appends to. Made by `managed`, a pool says so, and the methods below add, fork, cut and free sequences.

    key: [num_pages, HK, page_size, D]; dtypes and strides as in `KVCache`.
    value: [num_pages, HK, page_size, DV].
    block_table: [B, max_pages] int32; an entry that no visible token needs may hold anything.
    lengths: [B] int32 or int64.
    key_scale, value_scale: [num_pages, HK, page_size] float32 for int8 and float8_e4m3fn, else None.
    managed_by: which sequences of which pool these are; None without a pool.

    Raises:
        ArgumentError: a shape, dtype or device is wrong.
    """

    key: Tensor
    value: Tensor
    block_table: Tensor
    lengths: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None
    managed_by: Batch | None = None

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
        """Empty pages on the block table's device, which the caller deals out.

        Args:
            block_table: [B, max_pages] int32; kept, not copied, and may be filled in later.
            num_pages, kv_heads, page_size, head_dim: pages in all, HK, tokens a page, D.
            value_dim, dtype, kv_dtype: as in `KVCache.allocate`.
        """
        need_tensor("block_table", block_table, optional=False)
        stored = storage_dtype(dtype, kv_dtype)
        dims = (head_dim, head_dim if value_dim is None else value_dim)
        tensors = empty((num_pages, kv_heads, page_size), dims, stored, block_table.device)
        lengths = torch.zeros(block_table.shape[0], dtype=torch.int32, device=block_table.device)
        return cls(block_table=block_table, lengths=lengths, **tensors)

    @classmethod
    def managed(
        cls,
        max_tokens: int,
        num_pages: int,
        kv_heads: int,
        page_size: int,
        head_dim: int,
        value_dim: int | None = None,
        dtype: torch.dtype | None = None,
        kv_dtype: torch.dtype | None = None,
        device: Any = None,
        window: int | None = None,
    ) -> PagedKVCache:
        """Pages of a pool, and no sequence yet: see `add`.

        Args:
            max_tokens: that one sequence can hold, rounded up to whole pages.
            num_pages, kv_heads, page_size, head_dim: pages in all, HK, tokens a page, D.
            value_dim, dtype, kv_dtype, device: as in `KVCache.allocate`.
            window: how many tokens left of its own a row may look at; None: all of them. A sequence gives up the pages
                behind it when tokens are appended, and then holds at most window / page_size + 2 beside those of the
                new tokens.
        """
        pool = PagePool(num_pages, page_size, window)
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int):
            raise TypeError(f"max_tokens: got {max_tokens!r}, expected an int")
        if max_tokens < 1:
            refuse("max_tokens", max_tokens, "at least 1")
        table = torch.empty(0, -(-max_tokens // page_size), dtype=torch.int32, device=device)
        cache = cls.allocate(table, num_pages, kv_heads, page_size, head_dim, value_dim, dtype, kv_dtype)
        cache.managed_by = Batch(pool, [])
        return cache

    # --- sequences of a pool ---------------------------------------------------------------------------------------

    def _batch(self) -> Batch:
        if self.managed_by is None:
            refuse("cache", "pages that the caller deals out", "a cache made by PagedKVCache.managed")
        return self.managed_by

    @property
    def pool(self) -> PagePool:
        """Who counts the pages; its `free_pages` says how many are left."""
        return self._batch().pool

    @property
    def window(self) -> int | None:
        """How many tokens left of its own a row may look at, where a pool gives up the pages behind them."""
        return None if self.managed_by is None else self.managed_by.pool.window

    @property
    def sequences(self) -> list[int]:
        """The ids of the sequences that decode together, in the order of the rows of `block_table`."""
        return list(self._batch().sequences)

    def _decode_together(self, sequences: list[int]) -> None:
        """New tables for another batch."""
        self.managed_by = Batch(self.pool, sequences)
        shape, device = (len(sequences), self.block_table.shape[1]), self.block_table.device
        self.block_table = torch.full(shape, -1, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(len(sequences), dtype=self.lengths.dtype, device=device)
        self.refresh()

    def add(self, count: int = 1) -> list[int]:
        """New, empty sequences, which join the batch behind the others. Returns their ids."""
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"count: got {count!r}, expected an int")
        if count < 0:
            refuse("count", count, "at least 0")
        new = [self.pool.add() for _ in range(count)]
        self._decode_together(self.sequences + new)
        return new

    def fork(self, sequence: int, tokens: int | None = None) -> int:
        """A new sequence that shares the first `tokens` tokens (None: all) of another one and joins the batch; returns
        its id. Nothing is copied until one of the two appends to a page that is shared and not full: prefixes, beams.
        """
        new = self.pool.fork(sequence, tokens)
        self._decode_together([*self.sequences, new])
        return new

    def free(self, sequence: int) -> None:
        """Give a sequence up, with the pages that no other one holds. It leaves this batch; another batch that has it
        too is refused from then on."""
        self.pool.free(sequence)
        if sequence in self._batch().sequences:
            self._decode_together([s for s in self.sequences if s != sequence])

    def select(self, sequences: SequenceOf[int]) -> PagedKVCache:
        """The same pages and pool with another batch: these sequences, in this order."""
        self.pool.check(sequences)
        other = PagedKVCache(self.key, self.value, self.block_table, self.lengths, self.key_scale, self.value_scale)
        other.managed_by = self.managed_by
        other._decode_together(list(sequences))
        return other

    def reorder(self, beam_idx: Tensor | list[int]) -> None:
        """Row i of the batch becomes what row beam_idx[i] was; pages are shared, not copied.

        beam_idx: [B] integers in 0 .. B - 1. On a GPU it is looked at, which waits for it.
        """
        order = indices("beam_idx", beam_idx, torch.device("cpu")).tolist()
        self.pool.reorder(self.sequences, order)
        self.refresh()

    def truncate(self, tokens: int | SequenceOf[int]) -> None:
        """Forget all from position `tokens` on, one number for all sequences of the batch or one for each, as when
        drafted tokens were rejected; pages past it are given up. What is shorter already stays as it is. Where pages
        were given up behind a window, what it shows to the next row has to stay, or nothing, and all begins anew.
        """
        if isinstance(tokens, int):
            tokens = [tokens] * self.batch
        if len(tokens) != self.batch:
            refuse("tokens", f"{len(tokens)} numbers", f"one, or one for each of the {self.batch} sequences")
        pool = self.pool
        kept = [min(n, pool.length(s)) for n, s in zip(tokens, self.sequences, strict=True)]
        pool.truncate(self.sequences, kept)
        self.refresh()

    def keep(self, rows: Tensor | list[list[int]], last: int) -> None:
        """Of the last `last` tokens of every sequence keep only these, in this order, as `KVCache.keep` does. Pages
        that are shared and would be written are copied first; pages past the end are given up.

        Args:
            rows: indices in 0 .. last - 1 for each sequence: lists, or integers [B, A] in which -1 fills up. On a GPU
                they are looked at, which waits for it.
            last: how many tokens are in question.
        """
        pool, ids = self.pool, self.sequences
        index, count = (t.tolist() for t in chosen_rows(rows, self.batch, last, torch.device("cpu")))
        firsts = [pool.length(s) - last for s in ids]
        for b, first in enumerate(firsts):
            held = first + last - pool.forgotten(ids[b])
            if last > held:
                refuse("last", last, f"at most the {held} tokens of sequence {ids[b]}")
            if first + count[b] < pool.least(ids[b]):
                refuse("rows", f"{count[b]} of them", f"at least {pool.least(ids[b]) - first} for sequence {ids[b]}")
        ends = [first + n for first, n in zip(firsts, count, strict=True)]
        self._copy_pages(pool.own(ids, list(zip(firsts, ends, strict=True))))
        moves = [
            (*divmod(first + i, self.page_size), *divmod(first + a, self.page_size), b)
            for b, first in enumerate(firsts)
            for a, i in enumerate(index[b][: count[b]])
        ]
        if moves:
            places = [
                (pool.pages(ids[b])[slot], row, pool.pages(ids[b])[new_slot], new_row)
                for slot, row, new_slot, new_row, b in moves
            ]
            page, row, new_page, new_row = indices_of(places, self.key.device)
            for t in self._stored():
                t[new_page, :, new_row] = t[page, :, row]
        pool.truncate(ids, ends)
        self.refresh()

    def reset(self) -> None:
        """Empty the sequences of the batch."""
        self.truncate(0)

    # --- what decode_attention does ----------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Tell the device what has changed in the pool, by other batches too; waits for nothing."""
        if self.managed_by is None:
            return
        batch, pool = self.managed_by, self.managed_by.pool
        changed: list[tuple[int, int, int]] = []
        tables = [pool.pages(s) for s in batch.sequences]
        for b, (now, known) in enumerate(zip(tables, batch.tables, strict=True)):
            if now != known:
                changed += [(b, i, page) for i, page in enumerate(now) if i >= len(known) or known[i] != page]
        if changed:
            row, slot, page = indices_of(changed, self.block_table.device)
            self.block_table[row, slot] = page.int()
        batch.tables = [list(t) for t in tables]
        lengths = [pool.length(s) for s in batch.sequences]
        if lengths != batch.lengths:
            self.lengths.copy_(torch.tensor(lengths, dtype=self.lengths.dtype), non_blocking=True)
            batch.lengths = lengths

    def make_room(self, rows: int) -> None:
        """Take the pages that `rows` more tokens of each sequence need, copying what is shared and not full;
        `decode_attention` does so itself. Before a step that a CUDA graph replays, the caller does it, with `advance`
        afterwards.

        Raises:
            ArgumentError: a sequence has no room in its table, or there are not enough free pages; nothing was taken.
        """
        if self.managed_by is None:
            return
        batch = self.managed_by
        batch.pool.check(batch.sequences)
        most = max(map(batch.pool.length, batch.sequences), default=0)
        if most + rows > self.capacity:
            refuse("cache.lengths", f"{most} tokens and {rows} new ones", f"at most the capacity, {self.capacity}")
        self._copy_pages(batch.pool.make_room(batch.sequences, rows))
        self.refresh()

    def _copy_pages(self, copies: list[tuple[int, int]]) -> None:
        if copies:
            source, target = indices_of(copies, self.key.device)
            for t in self._stored():
                t.index_copy_(0, target, t.index_select(0, source))

    def advance(self, rows: int) -> None:
        """Count tokens that were appended; the device's `lengths` have counted them already."""
        if self.managed_by is not None and rows:
            self.managed_by.pool.advance(self.managed_by.sequences, rows)
            self.managed_by.lengths = [n + rows for n in self.managed_by.lengths]

    def check_window(self, rows: int, left: int | None) -> None:
        """The last rows, without new tokens, may look only at what is still there."""
        if self.window is None or left is None:
            return
        batch = self._batch()
        for s in batch.sequences:
            gone = batch.pool.forgotten(s)
            if gone and batch.pool.length(s) - rows - left < gone:
                refuse("query", f"{rows} rows", f"rows whose window sequence {s} has not given up, or a key beside it")

    def check_pages(self, ends: Tensor, rows: int, appended: int, left: int | None) -> None:
        """Every page that is read or written must exist, and none may be written for two sequences."""
        if self.managed_by is not None:
            return  # the pool's own doing
        table, size = self.block_table.long(), self.page_size
        slot = torch.arange(table.shape[1])
        used = slot < ((ends + size - 1) // size)[:, None]
        if left is not None:
            used &= slot >= ((ends - rows - left).clamp(min=0) // size)[:, None]
        bad = (used & ((table < 0) | (table >= self.num_pages))).nonzero()
        if bad.numel():
            b, i = bad[0].tolist()
            refuse(f"cache.block_table[{b}, {i}]", f"page {int(table[b, i])}", f"page ids in 0 .. {self.num_pages - 1}")
        if appended and self.batch > 1:
            written = used & (slot >= ((ends - appended) // size)[:, None])
            ids, counts = table[written].unique(return_counts=True)
            if (counts > 1).any():
                page = int(ids[counts > 1][0])
                refuse(
                    "cache.block_table", f"page {page} twice among those appended to", "pages that one sequence owns"
                )


def indices_of(rows: list[Any], device: torch.device) -> tuple[Tensor, ...]:
    """The columns of a list of tuples of integers as tensors on a device; waits for nothing."""
    return torch.tensor(rows, dtype=torch.int64).T.contiguous().to(device, non_blocking=True).unbind(0)
