"""Which rows see which keys, when a rank's rows meet the keys of another: plain integers, no tensor.

A sequence is cut into parts; a rank holds one or two of them (`sharding.py`). Row i sees key j of its own sequence iff

    -left <= j - i <= right        causal: right = 0

For rows from position r0 on and keys from k0 on this is -left + (r0 - k0) <= j' - i' <= right + (r0 - k0) in local
indices. Kernels know windows around the main diagonal: rows and keys that see nothing are cut off until both sides lie
at or beyond it.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .sharding import Layout, parts_of

Span = tuple[int, int]


@dataclass(frozen=True)
class Problem:
    """What is attended to, of the whole sequence. length: of the rows and keys of one rank, the same on all ranks where
    positions count. starts: where the packed sequences start, from 0 to the total; None: one sequence."""

    world: int
    layout: Layout
    length: int
    causal: bool = False
    left: int | None = None
    right: int | None = None
    starts: tuple[int, ...] | None = None

    @property
    def positional(self) -> bool:
        """Whether it matters where a token stands."""
        return self.causal or self.left is not None or self.right is not None or self.starts is not None

    @property
    def reach(self) -> int | None:
        """How far to the right a row sees."""
        return 0 if self.causal else self.right


@dataclass(frozen=True)
class Block:
    """One call of attention. rows and keys: local spans, None is all. starts: packed sequences inside the spans, the
    same for rows and keys. part: the rows see other keys too."""

    rows: Span | None
    keys: Span | None
    causal: bool = False
    left: int | None = None
    right: int | None = None
    starts: tuple[int, ...] | None = None
    part: bool = True

    @property
    def full(self) -> bool:
        """Every row sees every key."""
        return not self.causal and self.left is self.right is self.starts is None


def steps(p: Problem) -> int:
    """How many ranks' keys a rank must meet, its own first, then those of the ranks before it."""
    if p.layout == "contiguous" and p.reach == 0 and p.left is not None and p.length:
        return min(p.world, 1 + -(-p.left // p.length))
    return p.world


@functools.lru_cache(maxsize=4096)
def blocks(p: Problem, rank: int, other: int) -> tuple[Block, ...]:
    """The calls in which the rows of `rank` see keys of `other`."""
    if not p.positional:
        return (Block(None, None, part=p.world > 1),)
    own, theirs = parts_of(rank, p.world, p.layout), parts_of(other, p.world, p.layout)
    simple = p.causal and p.left is p.starts is None
    if simple and rank == other and 0 not in own:
        return (Block(None, None, causal=True),)  # a rank's parts are in order
    # The first part's rows see no other: kept apart, they are not `part`.
    size = p.length // len(own)
    found: list[Block] = []
    for i, row_part in enumerate(own):
        for j, key_part in enumerate(theirs):
            shift = (i * size - row_part * size, j * size - key_part * size)
            found += _meet(p, row_part * size, key_part * size, size, shift)
    return tuple(_merged(found))


def _meet(p: Problem, row_start: int, key_start: int, size: int, shift: Span) -> Iterator[Block]:
    """Blocks of one part of rows and one of keys; shift: from positions to local indices."""
    ends = (row_start + size, key_start + size)
    inner: list[int] = []
    for s, e in _sequences(p, row_start, key_start, size):
        rows, keys = (max(s, row_start), min(e, ends[0])), (max(s, key_start), min(e, ends[1]))
        if row_start == key_start and s >= row_start and e <= ends[0] and p.starts is not None:
            inner = inner or [s]
            inner.append(e)
            continue
        block = _dense(p, rows, keys, (s, e))
        if block is not None:
            yield _moved(block, shift)
    if inner:
        span = (inner[0], inner[-1])
        starts = tuple(n - inner[0] for n in inner)
        yield _moved(Block(span, span, p.causal, p.left, p.right, starts, part=False), shift)


def _sequences(p: Problem, row_start: int, key_start: int, size: int) -> Iterator[Span]:
    """The sequences with tokens in both parts, those without tokens left out."""
    if p.starts is None:
        yield 0, p.world * p.length
        return
    first, last = max(row_start, key_start), min(row_start, key_start) + size - 1
    if first > last:  # different parts: only a sequence that reaches from one into the other
        first, last = last, first
        i = bisect_right(p.starts, first) - 1
        if p.starts[i + 1] > last:
            yield p.starts[i], p.starts[i + 1]
        return
    for i in range(bisect_right(p.starts, first) - 1, bisect_right(p.starts, last)):
        if p.starts[i] < p.starts[i + 1]:
            yield p.starts[i], p.starts[i + 1]


def _dense(p: Problem, rows: Span, keys: Span, sequence: Span) -> Block | None:
    """Rows and keys of one sequence, in positions; None where no row sees a key."""
    (r0, r1), (k0, k1) = rows, keys
    low = None if p.left is None else r0 - k0 - p.left
    high = None if p.reach is None else r0 - k0 + p.reach
    if high is not None and high < 0:  # the first rows see nothing
        r0, low, high = r0 - high, None if low is None else low - high, 0
    if low is not None and low > 0:  # nobody sees the first keys
        k0, low, high = k0 + low, 0, None if high is None else high - low
    if low is not None:
        r1 = min(r1, r0 + (k1 - k0) - low)
    if high is not None:
        k1 = min(k1, k0 + (r1 - r0) + high)
    if r0 >= r1 or k0 >= k1:
        return None
    left = None if low is None or r1 - r0 - 1 <= -low else -low
    right = None if high is None or k1 - k0 - 1 <= high else high
    begin = sequence[0] if p.left is None else max(sequence[0], r0 - p.left)
    end = sequence[1] if p.reach is None else min(sequence[1], r1 + p.reach)
    part = begin < k0 or end > k1
    return Block((r0, r1), (k0, k1), right == 0, left, None if right == 0 else right, None, part)


def _moved(block: Block, shift: Span) -> Block:
    assert block.rows is not None and block.keys is not None
    rows = (block.rows[0] + shift[0], block.rows[1] + shift[0])
    return replace(block, rows=rows, keys=(block.keys[0] + shift[1], block.keys[1] + shift[1]))


def _merged(found: list[Block]) -> list[Block]:
    """Fewer and larger calls: full blocks side by side, or one under the other, become one."""
    merged: list[Block] = []
    for block in found:
        for i, other in enumerate(merged):
            joined = _join(other, block)
            if joined is not None:
                merged[i] = joined
                break
        else:
            merged.append(block)
    return merged


def _join(a: Block, b: Block) -> Block | None:
    if not (a.full and b.full and a.part and b.part):
        return None
    assert a.rows is not None and a.keys is not None and b.rows is not None and b.keys is not None
    if a.rows == b.rows and a.keys[1] == b.keys[0]:
        return replace(a, keys=(a.keys[0], b.keys[1]))
    if a.keys == b.keys and a.rows[1] == b.rows[0]:
        return replace(a, rows=(a.rows[0], b.rows[1]))
    return None
