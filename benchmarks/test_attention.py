"""scaled_dot_product_attention and PyTorch's, a group per shape: `pytest benchmarks/test_attention.py`."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from .contest import attention_contest
from .shapes import ATTENTION, AttentionShape

CASES = [(shape, backward) for shape in ATTENTION for backward in (False, True)[: 1 + shape.backward]]


@pytest.mark.parametrize("who", ["ours", "torch"])
@pytest.mark.parametrize(("shape", "backward"), CASES, ids=str)
def test_attention(benchmark: BenchmarkFixture, shape: AttentionShape, backward: bool, who: str) -> None:
    contest = attention_contest(shape, backward)
    contest.check()
    benchmark.group = contest.name
    benchmark(getattr(contest, who))
