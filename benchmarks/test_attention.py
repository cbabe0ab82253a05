"""Attention and its peers, a group per shape: `pytest benchmarks/test_attention.py`."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fused_attention.bench.contest import attention_contest
from fused_attention.bench.shapes import SUITES, AttentionShape

SHAPES = [shape for shape in SUITES["models"] if isinstance(shape, AttentionShape)]


@pytest.mark.parametrize("who", ["ours", "torch"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(benchmark: BenchmarkFixture, shape: AttentionShape, who: str) -> None:
    contest = attention_contest(shape, ["torch"], torch.device("cpu"))
    contest.check()
    benchmark.group = shape.name
    benchmark(contest.runs[who])
