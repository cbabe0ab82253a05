"""The plan of ring attention against the definition: every visible pair of row and key is in one block, no other is."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from fused_attention.context_parallel import blocks as plan
from fused_attention.context_parallel.ring import _Sum
from fused_attention.context_parallel.sharding import Layout, all_parts, parts_of

pytestmark = pytest.mark.fast

WINDOWS: list[tuple[int | None, int | None]] = [
    (None, None), (0, 0), (1, None), (3, None), (5, 2), (None, 1), (8, 8), (0, 9), (11, 0), (100, 100)
]  # fmt: skip
PACKED = [None, (24,), (1,) * 24, (5, 0, 7, 12), (3, 20, 1), (12, 12), (0, 23, 1, 0)]


def _visible(p: plan.Problem) -> np.ndarray:
    total = p.world * p.length
    i, j = np.arange(total)[:, None], np.arange(total)
    seen = np.ones((total, total), bool)
    if p.left is not None:
        seen &= j >= i - p.left
    if p.right is not None:
        seen &= j <= i + p.right
    if p.causal:
        seen &= j <= i
    if p.starts is not None:
        sequence = np.searchsorted(p.starts, np.arange(total), side="right")
        seen &= sequence[:, None] == sequence[None, :]
    return seen


def _positions(p: plan.Problem, rank: int) -> np.ndarray:
    parts = parts_of(rank, p.world, p.layout)
    size = p.length // len(parts)
    return np.concatenate([np.arange(part * size, (part + 1) * size) for part in parts])


def _inside(block: plan.Block, rows: int, keys: int) -> np.ndarray:
    """Which local rows and keys a call of attention pairs, by its own rules."""
    seen = np.zeros((rows, keys), bool)
    (r0, r1), (k0, k1) = block.rows or (0, rows), block.keys or (0, keys)
    spans = [(r0, r1, k0, k1)]
    if block.starts is not None:
        pairs = itertools.pairwise(block.starts)
        spans = [(r0 + a, r0 + b, k0 + a, k0 + b) for a, b in pairs]
    for a, b, c, d in spans:
        i, j = np.arange(b - a)[:, None], np.arange(d - c)
        part = np.ones((b - a, d - c), bool)
        if block.causal:
            part &= j <= i
        if block.left is not None:
            part &= j >= i - block.left
        if block.right is not None:
            part &= j <= i + block.right
        assert block.left is None or block.left >= 0
        assert block.right is None or block.right >= 0
        seen[a:b, c:d] |= part
    return seen


def _check(p: plan.Problem) -> None:
    visible, covered = _visible(p), np.zeros((p.world * p.length,) * 2, int)
    for rank in range(p.world):
        rows = _positions(p, rank)
        for step in range(p.world):
            other = (rank - step) % p.world
            keys = _positions(p, other)
            calls = plan.blocks(p, rank, other)
            assert step < plan.steps(p) or not calls, "a step too few"
            for block in calls:
                pairs = _inside(block, p.length, p.length)
                covered[np.ix_(rows, keys)] += pairs
                if not block.part:  # its rows see nothing else
                    span = slice(*(block.rows or (0, p.length)))
                    assert (visible[rows[span]].sum(1) == pairs[span].sum(1)).all(), block
    assert np.array_equal(covered, visible.astype(int))


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_visible_pair_is_in_one_block(world: int, layout: Layout) -> None:
    for window, causal, lengths in itertools.product(WINDOWS, (False, True), PACKED):
        starts = None if lengths is None else tuple(int(n) for n in np.cumsum([0, *lengths]))
        _check(plan.Problem(world, layout, 24 // world, causal, *window, starts))


def test_zigzag_balances_causal_work() -> None:
    for world in (2, 4, 8):
        p = plan.Problem(world, "zigzag", 16, causal=True)
        visible = _visible(p)
        work = {int(visible[_positions(p, rank)].sum()) for rank in range(world)}
        assert len(work) == 1
        assert sorted(all_parts(world, "zigzag")) == list(range(2 * world))
        calls = [len(plan.blocks(p, rank, other)) for rank in range(world) for other in range(world)]
        assert max(calls) <= 3 and sum(calls) == world * world + 2  # one call a step, but for the first part's own rows


def test_a_near_window_ends_the_round_early() -> None:
    near: dict[str, Any] = {"length": 8, "causal": True}
    assert [plan.steps(plan.Problem(4, "contiguous", left=n, **near)) for n in (0, 1, 8, 9, 16, 99)] == [
        1,
        2,
        2,
        3,
        3,
        4,
    ]
    assert plan.steps(plan.Problem(4, "zigzag", left=1, **near)) == 4
    assert plan.steps(plan.Problem(4, "contiguous", left=1, right=0, length=8)) == 2


def test_rows_that_saw_nothing_merge_without_nan() -> None:
    query, inf = torch.zeros(1, 1, 3, 2), float("inf")
    merged = _Sum(query, 2, torch.float32)
    empty, lse = torch.zeros(1, 1, 3, 2), torch.tensor([[[-inf, -inf, -inf]]])
    merged.add(None, empty, lse)
    output, own_lse, _ = merged.result(query)
    assert torch.equal(output, empty) and torch.equal(own_lse, lse)
    merged.add(None, torch.ones(1, 1, 3, 2), torch.tensor([[[0.5, -inf, -300.0]]]))
    merged.add((1, 3), 3 * torch.ones(1, 1, 2, 2), torch.tensor([[[-inf, -300.0]]]))
    output, own_lse, _ = merged.result(query)
    expected = torch.tensor([0.5, -inf, -300.0 + float(np.log(2.0))])
    torch.testing.assert_close(own_lse.flatten(), expected)
    torch.testing.assert_close(output[0, 0, :, 0], torch.tensor([1.0, 0.0, 2.0]))
