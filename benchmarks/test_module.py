"""MultiheadAttention and PyTorch's, a group per shape: `pytest benchmarks/test_module.py`."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fused_attention.bench.contest import module_contest
from fused_attention.bench.shapes import SUITES, ModuleShape

SHAPES = [shape for shape in SUITES["models"] if isinstance(shape, ModuleShape)]


@pytest.mark.parametrize("who", ["ours", "torch"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_module(benchmark: BenchmarkFixture, shape: ModuleShape, who: str) -> None:
    contest = module_contest(shape, ["torch"], torch.device("cpu"))
    contest.check()
    benchmark.group = shape.name
    benchmark(contest.runs[who])
