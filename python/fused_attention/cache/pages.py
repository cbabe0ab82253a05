"""Which page holds whose tokens: counted on the host, in plain Python, so that nothing waits for a device.

A sequence is a list of pages and a length; token t lies in row t % page_size of its page t // page_size. A page may
belong to several sequences, which is counted. Forked sequences share all their pages; who appends to a page that is
shared and not full first gets a copy of it (copy-on-write), full pages stay shared. Under a window a sequence gives up
the pages that no later row looks at; in their places in its list stands NO_PAGE.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from .storage import refuse

NO_PAGE = -1


@dataclass
class Sequence:
    """Pages in the order of their tokens. There may be more of them than the length needs: room taken in advance.

    gone: so many of the first pages were given up behind a window.
    """

    pages: list[int] = field(default_factory=list)
    length: int = 0
    gone: int = 0


class PagePool:
    """Pages and the sequences that hold them. Each method does all that it is asked for, or raises and does nothing.

    Raises (every method that takes one):
        ArgumentError: no such sequence, one that was freed, twice the same, or too few free pages.

    window: how many tokens left of its own a row may look at; None: all of them.
    """

    def __init__(self, num_pages: int, page_size: int, window: int | None = None) -> None:
        for name, n, least in (("num_pages", num_pages, 1), ("page_size", page_size, 1), ("window", window, 0)):
            if n is None and name == "window":
                continue
            if isinstance(n, bool) or not isinstance(n, int):
                raise TypeError(f"{name}: got {n!r}, expected an int")
            if n < least:
                refuse(name, n, f"at least {least}")
        self.num_pages, self.page_size, self.window = num_pages, page_size, window
        self._free = list(range(num_pages - 1, -1, -1))  # the last one is taken first
        self._holders = [0] * num_pages
        self._sequences: dict[int, Sequence] = {}
        self._next = 0  # ids are not used twice, so that a freed one is known

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def sequences(self) -> list[int]:
        """Ids in the order of their making."""
        return list(self._sequences)

    def _of(self, sequence: int) -> Sequence:
        if isinstance(sequence, bool) or not isinstance(sequence, int):
            raise TypeError(f"sequence: got {sequence!r}, expected the id of a sequence, an int")
        found = self._sequences.get(sequence)
        if found is None:
            freed = 0 <= sequence < self._next
            refuse("sequence", f"{sequence}, which was freed" if freed else sequence, "the id of a sequence")
        return found

    def check(self, sequences: SequenceOf[int]) -> None:
        """Ids that exist, none of them twice."""
        for sequence in sequences:
            self._of(sequence)
        twice = [i for i, n in Counter(sequences).items() if n > 1]
        if twice:
            refuse("sequences", f"{twice[0]} twice", "every sequence once: it is written in place")

    def length(self, sequence: int) -> int:
        """How many tokens a sequence holds."""
        return self._of(sequence).length

    def pages(self, sequence: int) -> list[int]:
        """The pages of a sequence, in the order of its tokens."""
        return self._of(sequence).pages

    def forgotten(self, sequence: int) -> int:
        """How many tokens a sequence has given up behind the window."""
        return self._of(sequence).gone * self.page_size

    def least(self, sequence: int) -> int:
        """So many of its tokens a sequence has to keep for the next row's window, unless it keeps none."""
        s = self._of(sequence)
        return s.gone * self.page_size + self.window if s.gone and self.window is not None else 0

    def holders(self, page: int) -> int:
        """How many sequences hold a page."""
        return self._holders[page]

    def _needed(self, length: int) -> int:
        return -(-length // self.page_size)

    def _release(self, pages: list[int]) -> None:
        for page in reversed(pages):
            if page == NO_PAGE:
                continue
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)

    def _add(self, sequence: Sequence) -> int:
        self._sequences[self._next] = sequence
        self._next += 1
        return self._next - 1

    def add(self) -> int:
        """A new, empty sequence."""
        return self._add(Sequence())

    def fork(self, sequence: int, tokens: int | None = None) -> int:
        """A new sequence that shares the first `tokens` tokens (None: all) of another one. Takes no page."""
        parent = self._of(sequence)
        length = parent.length if tokens is None else self._checked(tokens, sequence)
        return self._add(self._share(parent, length))

    def _share(self, parent: Sequence, length: int) -> Sequence:
        """What begins with the same tokens and holds the same pages."""
        pages = parent.pages[: self._needed(length)]
        for page in pages:
            if page != NO_PAGE:
                self._holders[page] += 1
        return Sequence(pages, length, parent.gone if length else 0)

    def free(self, sequence: int) -> None:
        """Give the sequence up, and the pages that no other one holds."""
        self._release(self._of(sequence).pages)
        del self._sequences[sequence]

    def _checked(self, tokens: int, sequence: int) -> int:
        if isinstance(tokens, bool) or not isinstance(tokens, int):
            raise TypeError(f"tokens: got {tokens!r}, expected an int")
        least, length = self.least(sequence), self.length(sequence)
        if tokens and not least <= tokens <= length or tokens < 0:
            refuse(
                "tokens", tokens, f"{f'0 or {least}' if least else 0} .. {length}, the length of sequence {sequence}"
            )
        return tokens

    def truncate(self, sequences: SequenceOf[int], tokens: SequenceOf[int]) -> None:
        """Keep the first tokens[i] tokens of each sequence; pages past them are given up."""
        self.check(sequences)
        for sequence, n in zip(sequences, tokens, strict=True):
            self._checked(n, sequence)
        for sequence, n in zip(sequences, tokens, strict=True):
            s = self._of(sequence)
            self._release(s.pages[self._needed(n) :])
            s.pages, s.length, s.gone = s.pages[: self._needed(n)], n, s.gone if n else 0

    def own(self, sequences: SequenceOf[int], spans: SequenceOf[tuple[int, int]]) -> list[tuple[int, int]]:
        """Let each sequence alone hold the pages of its tokens spans[i][0] .. spans[i][1], which it has: they are about
        to be written.

        Returns:
            Pages to copy before, (from, to).
        """
        self.check(sequences)
        shared: list[tuple[Sequence, int]] = []
        leaving = Counter[int]()
        for s, (first, end) in zip(map(self._of, sequences), spans, strict=True):
            for slot in range(first // self.page_size, self._needed(end) if end > first else 0):
                if self._holders[s.pages[slot]] - leaving[s.pages[slot]] > 1:  # the last who shares it may keep it
                    leaving[s.pages[slot]] += 1
                    shared.append((s, slot))
        self._need_free(len(shared))
        return [self._copy(s, slot) for s, slot in shared]

    def _need_free(self, pages: int) -> None:
        if pages > len(self._free):
            refuse("cache", f"{pages} more pages needed", f"at most the {len(self._free)} of {self.num_pages} free")

    def _copy(self, s: Sequence, slot: int) -> tuple[int, int]:
        """A page of its own for a sequence in place of a shared one."""
        old, s.pages[slot] = s.pages[slot], self._take()
        self._release([old])
        return old, s.pages[slot]

    def make_room(self, sequences: SequenceOf[int], rows: int) -> list[tuple[int, int]]:
        """Take what `rows` more tokens of each sequence need; their lengths stay as they are. What lies behind the
        window of the first of them is given up before.

        Returns:
            Pages to copy before anything is appended, (from, to).
        """
        self.check(sequences)
        wanted, leaving = 0, Counter[int]()
        shared: list[Sequence] = []
        behind = [self._behind(s) if rows else s.gone for s in map(self._of, sequences)]
        for s, gone in zip(map(self._of, sequences), behind, strict=True):
            leaving.update(s.pages[s.gone : gone])
        freed = sum(self._holders[page] == n for page, n in leaving.items())
        for s in map(self._of, sequences):
            wanted += max(self._needed(s.length + rows) - len(s.pages), 0)
            if rows and s.length % self.page_size:
                page = s.pages[s.length // self.page_size]
                if self._holders[page] - leaving[page] > 1:  # the last of those who share it here may keep it
                    leaving[page] += 1
                    shared.append(s)
        self._need_free(wanted + len(shared) - freed)
        for s, gone in zip(map(self._of, sequences), behind, strict=True):
            self._release(s.pages[s.gone : gone])
            s.pages[s.gone : gone] = [NO_PAGE] * (gone - s.gone)
            s.gone = gone
        copies = [self._copy(s, s.length // self.page_size) for s in shared]
        for s in map(self._of, sequences):
            while len(s.pages) < self._needed(s.length + rows):
                s.pages.append(self._take())
        return copies

    def _behind(self, s: Sequence) -> int:
        """How many of the first pages no row from the next token on looks at."""
        if self.window is None:
            return 0
        return max(s.gone, (s.length - self.window) // self.page_size)

    def _take(self) -> int:
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def advance(self, sequences: SequenceOf[int], rows: int) -> None:
        """Count `rows` tokens more, for which room was made."""
        for s in map(self._of, sequences):
            if self._needed(s.length + rows) > len(s.pages):
                refuse("rows", rows, "at most as many as there is room for")
        for s in map(self._of, sequences):
            s.length += rows

    def reorder(self, sequences: SequenceOf[int], order: SequenceOf[int]) -> None:
        """sequences[i] becomes what sequences[order[i]] was. Takes no page."""
        self.check(sequences)
        if len(order) != len(sequences) or any(not 0 <= i < len(sequences) for i in order):
            refuse("beam_idx", list(order), f"{len(sequences)} indices in 0 .. {len(sequences) - 1}")
        before = [self._of(s) for s in sequences]
        after = [self._share(before[i], before[i].length) for i in order]
        for s in before:
            self._release(s.pages)
        self._sequences.update(zip(sequences, after, strict=True))
