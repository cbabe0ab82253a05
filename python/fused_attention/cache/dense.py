"""A dense cache: one block of rows per sequence, which can grow, roll under a window, be cut and be reordered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..layout import memory_order
from ..spec import need_tensor, readable, shape_of
from .storage import STORED, Storage, bits, chosen_rows, empty, in_large_pages, indices, refuse, storage_dtype


def _like(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised tensor of another shape whose dimensions lie in memory as those of t."""
    order, back = memory_order(t) if t.dim() == 4 else ([0, 1, 2], [0, 1, 2])
    return in_large_pages(t.new_empty([shape[d] for d in order])).permute(back)


@dataclass(eq=False)
class KVCache(Storage):
    """A dense cache: every sequence owns `capacity` rows. Its tensors are written in place.

    With a `window` it rolls: when it is full, all but the newest `window` tokens of each sequence are forgotten, and
    what is kept moves to the front. Positions keep counting: token t of sequence b lies in row t - dropped[b]. Each
    token is moved once for every `capacity - window` tokens that are appended.

    key: [B, HK, capacity, D]; float32, bfloat16, float16, float64, int8 or float8_e4m3fn; any strides with a contiguous
        last dimension.
    value: [B, HK, capacity, DV] in the same dtype.
    lengths: [B] int32 or int64, contiguous, on the same device: how many tokens each sequence holds.
    key_scale, value_scale: [B, HK, capacity] float32 for int8 and float8_e4m3fn, else None.
    window: how many tokens left of the newest a row may look at; less than the capacity. None: nothing is forgotten.
    dropped: [B] as lengths, with a window: how many tokens each sequence has forgotten; default zeros.
    most: with a window: at most how many tokens any sequence holds, counted on the host so that nothing waits for a
        device; default what `lengths` says, which is looked at once. Who writes `lengths` on a GPU writes this too.

    Raises:
        ArgumentError: a shape, dtype, device or value is wrong.
    """

    key: Tensor
    value: Tensor
    lengths: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None
    window: int | None = None
    dropped: Tensor | None = None
    most: int | None = None

    def __post_init__(self) -> None:
        self._check_storage("[B, HK, capacity, D]")
        if self.lengths.shape[0] != self.key.shape[0]:
            refuse("lengths", f"shape {shape_of(self.lengths)}", f"[B] = [{self.key.shape[0]}]")
        if self.window is None:
            if self.dropped is not None:
                refuse("dropped", "a Tensor", "None without a window")
            return
        if isinstance(self.window, bool) or not isinstance(self.window, int):
            raise TypeError(f"window: got {self.window!r}, expected an int or None")
        if not 0 <= self.window < self.capacity:
            refuse("window", self.window, f"0 .. {self.capacity - 1}, less than the capacity {self.capacity}")
        need_tensor("dropped", self.dropped)
        if self.dropped is None:
            self.dropped = torch.zeros_like(self.lengths)
        d = self.dropped
        if (d.dtype, d.shape, d.device) != (self.lengths.dtype, self.lengths.shape, self.lengths.device):
            refuse("dropped", f"{d.dtype} {shape_of(d)} on {d.device}", "the dtype, shape and device of lengths")
        if self.most is None:
            self.most = self.longest()

    @property
    def capacity(self) -> int:
        """How many tokens a sequence can hold."""
        return self.key.shape[2]

    @property
    def positions(self) -> Tensor:
        """How many tokens each sequence has seen, forgotten ones too, [B]: where its next token will stand."""
        return self.lengths.clone() if self.dropped is None else self.lengths + self.dropped

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
        window: int | None = None,
    ) -> KVCache:
        """An empty cache.

        Args:
            batch, kv_heads, capacity, head_dim: B, HK, the tokens each sequence can hold, D.
            value_dim: DV; default D.
            dtype: of the queries that will be asked; default torch's default dtype.
            kv_dtype: what is stored; default `dtype`. int8 and float8_e4m3fn quantise.
            device: default torch's default device.
            window: roll, and keep this many tokens. At most `capacity - window` are appended at a time.
        """
        stored = storage_dtype(dtype, kv_dtype)
        dims = (head_dim, head_dim if value_dim is None else value_dim)
        tensors = empty((batch, kv_heads, capacity), dims, stored, device)
        lengths = torch.zeros(batch, dtype=torch.int32, device=tensors["key"].device)
        return cls(lengths=lengths, window=window, most=None if window is None else 0, **tensors)

    def longest(self) -> int:
        """The length of the longest sequence; looks at `lengths`, and so waits for a GPU."""
        return max(self.lengths.tolist(), default=0)

    def _rows_in_use(self) -> int:
        """So many rows hold all tokens; the capacity where looking would wait for a device."""
        return min(max(self.longest(), 0), self.capacity) if readable(self.lengths) else self.capacity

    def reserve(self, capacity: int) -> None:
        """Have room for at least `capacity` tokens a sequence: new storage, in the same order of dimensions, of at
        least 1.5 times the old one, so that growing token by token moves each token a bounded number of times.

        Tensors that a CUDA graph has captured are no longer the cache's afterwards.
        """
        if isinstance(capacity, bool) or not isinstance(capacity, int):
            raise TypeError(f"capacity: got {capacity!r}, expected an int")
        if capacity <= self.capacity:
            return
        rows, used = max(capacity, self.capacity * 3 // 2), self._rows_in_use()
        for name in STORED:
            t = getattr(self, name)
            if t is None:
                continue
            grown = _like(t, (*t.shape[:2], rows, *t.shape[3:]))
            grown[:, :, :used].copy_(t[:, :, :used])
            setattr(self, name, grown)

    def reset(self) -> None:
        """Forget everything."""
        self.lengths.zero_()
        if self.dropped is not None:
            self.dropped.zero_()
            self.most = 0

    def truncate(self, tokens: int | Tensor | list[int]) -> None:
        """Forget all from position `tokens` on, as when drafted tokens were rejected: `truncate(positions - n)`.

        A rolling cache has to keep its window: what a roll has forgotten cannot come back. On a GPU, where looking
        would synchronise, a sequence cut too far is lost: it gives NaN until `reset`.

        Args:
            tokens: how many tokens each sequence keeps, counted from its first, forgotten ones too; one number for all
                or [B]. What is shorter already stays as it is.
        """
        if isinstance(tokens, bool):
            raise TypeError(f"tokens: got {tokens!r}, expected integers")
        keep = torch.tensor(tokens) if isinstance(tokens, int) else indices("tokens", tokens, self.lengths.device)
        if keep.dim() and keep.shape != self.lengths.shape:
            refuse("tokens", f"{keep.shape[0]} numbers", f"one, or one for each of the {self.batch} sequences")
        dropped = 0 if self.dropped is None else self.dropped
        length = torch.minimum(self.lengths.long(), keep.to(self.lengths.device, non_blocking=True) - dropped)
        least = self._least()
        bad = length < least
        if readable(self.lengths) and bad.any():
            b = int(bad.nonzero()[0])
            most, seen = int((least + dropped)[b]), int(self.positions[b])
            refuse("tokens", int(keep.expand_as(length)[b]), f"{most} .. {seen} for sequence {b}")
        self.lengths.copy_(torch.where(bad, self.capacity + 1, length))

    def _least(self) -> Tensor:
        """How many tokens each sequence has to keep, [B]: where some were forgotten, those that a row may look at."""
        least = torch.zeros_like(self.lengths, dtype=torch.int64)
        if self.dropped is not None and self.window is not None:
            least = torch.where(self.dropped > 0, torch.minimum(self.lengths.long(), least + self.window), least)
        return least

    def keep(self, rows: Tensor | list[list[int]], last: int) -> None:
        """Of the last `last` tokens of every sequence keep only these, in this order: the accepted ones of a tree of
        drafted tokens. Keys stay as they were rotated: at their depth in the tree, which is where they stand now.

        Args:
            rows: indices in 0 .. last - 1 for each sequence: lists, or integers [B, A] in which -1 fills up. A rolling
                cache has to keep its window.
            last: how many tokens are in question. On a GPU, where looking would synchronise, a sequence that holds
                fewer, or that lost its window, is lost: it gives NaN until `reset`.
        """
        index, count = chosen_rows(rows, self.batch, last, self.lengths.device)
        first, least = self.lengths.long() - last, self._least()
        bad = (first < 0) | (first + count < least) | (self.lengths > self.capacity)
        if readable(self.lengths) and bad.any():
            b = int(bad.nonzero()[0])
            if first[b] < 0:
                refuse("last", last, f"at most the {int(self.lengths[b])} tokens of sequence {b}")
            refuse("rows", f"{int(count[b])} of them", f"at least {int(least[b] - first[b])} for sequence {b}")
        first = first.clamp(0, max(self.capacity - index.shape[1], 0))[:, None]
        source, target = first + index, first + torch.arange(index.shape[1], device=index.device)
        batch = torch.arange(self.batch, device=index.device)[:, None]
        source = source.clamp(max=max(self.capacity - 1, 0))
        for t in self._stored():
            t[batch, :, target] = t[batch, :, source]
        self.lengths.copy_(torch.where(bad, self.capacity + 1, first[:, 0] + count))

    def reorder(self, beam_idx: Tensor | list[int]) -> None:
        """Sequence i becomes what sequence beam_idx[i] was; more or fewer of them make the batch larger or smaller.

        Args:
            beam_idx: [B'] integers in 0 .. B - 1. On a GPU, where looking would synchronise, another one gives a
                sequence that is NaN.
        """
        index = indices("beam_idx", beam_idx, self.lengths.device)
        bad = None
        if readable(index):
            chosen = index.tolist()
            for i in chosen:
                if not 0 <= i < self.batch:
                    refuse("beam_idx", i, f"indices in 0 .. {self.batch - 1}")
            if chosen == list(range(self.batch)):
                return
        else:
            bad = (index < 0) | (index >= self.batch)
            index = index.clamp(0, max(self.batch - 1, 0))
        if not self.batch:
            return
        self._take(index)
        if bad is not None:
            self.lengths.masked_fill_(bad, self.capacity + 1)

    def _take(self, index: Tensor) -> None:
        """Sequence i becomes what sequence index[i] was: in place where there are as many as before."""
        used, same = self._rows_in_use(), len(index) == self.batch
        for name in STORED:
            t = getattr(self, name)
            if t is not None:
                held = bits(t)[:, :, :used]
                taken = held.index_select(0, index)
                if not same:
                    t = _like(t, (len(index), *t.shape[1:]))
                    held = bits(t)[:, :, :used]
                    setattr(self, name, t)
                held.copy_(taken)
        for name in ("lengths", "dropped"):
            t = getattr(self, name)
            if t is not None:
                setattr(self, name, t.copy_(t[index]) if same else t[index])

    def make_room(self, rows: int) -> None:
        """Let a rolling cache forget what it must before `rows` tokens are appended; `decode_attention` does so itself.

        Before a step that a CUDA graph replays, which runs no Python, the caller does it, with `advance` afterwards.

        Raises:
            ArgumentError: more rows than the capacity leaves beside the window.
        """
        if self.window is None:
            return
        if rows > self.capacity - self.window:
            refuse("key", f"{rows} tokens", f"at most capacity - window = {self.capacity - self.window} at a time")
        if readable(self.lengths):
            self.most = self.longest()
        assert self.most is not None
        if self.most + rows > self.capacity:
            self._roll(self.window)
            self.most = min(self.most, self.window)

    def advance(self, rows: int) -> None:
        """Count, on the host, tokens that were appended."""
        if self.most is not None:
            self.most += rows

    def _roll(self, window: int) -> None:
        """Forget all but the newest `window` tokens of each sequence."""
        assert self.dropped is not None
        lost = self.lengths > self.capacity  # what `truncate` has given up stays so
        drop = (self.lengths - window).clamp_(min=0).masked_fill_(lost, 0)
        row = torch.arange(window, device=drop.device) + drop.long()[:, None]  # [B, window]
        for t in self._stored():
            index = row[:, None] if t.dim() == 3 else row[:, None, :, None]
            t[:, :, :window].copy_(t.gather(2, index.expand(*t.shape[:2], window, *t.shape[3:])))
        self.lengths.sub_(drop)
        self.dropped.add_(drop)
