"""MultiheadAttention and PyTorch's, a group per shape: `pytest benchmarks/test_module.py`."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from .contest import module_contest
from .shapes import MODULE, ModuleShape

CASES = [(shape, mode) for shape in MODULE for mode in ("inference", "training")[: 1 + shape.backward]]


@pytest.mark.parametrize("who", ["ours", "torch"])
@pytest.mark.parametrize(("shape", "mode"), CASES, ids=str)
def test_module(benchmark: BenchmarkFixture, shape: ModuleShape, mode: str, who: str) -> None:
    contest = module_contest(shape, backward=mode == "training")
    contest.check()
    benchmark.group = contest.name
    benchmark(getattr(contest, who))
