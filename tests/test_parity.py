"""Every option on every backend at hand, forward and backward, by the tolerance rule."""

from __future__ import annotations

import pytest
import torch

from .cases import CASES, LARGE, Case, check

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
BACKENDS = ["cpu", "reference"]


# Few rows and many keys: the keys are split among tasks, and the parts of each row merged.
SPLIT = [
    Case("M1xN2100-gqa", (1, 8, 2, 1, 2100, 64, 64), causal="bottom_right"),
    Case("M2xN1700-mqa", (2, 12, 1, 2, 1700, 72, 40), causal="bottom_right", sinks=True, key_lengths=True),
    Case("M4xN1500-all", (2, 4, 2, 4, 1500, 40, 48), causal="bottom_right", window=(1100, 0), softcap=5.0, sinks=True,
         mask="float:b1mn", alibi="bh", key_lengths=True),
    Case("M8xN1100-bool", (1, 2, 2, 8, 1100, 64, 64), mask="bool:11mn"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _poisoned_memory(poison: None) -> None:
    """torch.empty holds NaN here, so that what a kernel does not write is seen."""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_option(case: Case, dtype: str, backend: str) -> None:
    check(case, backend, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LARGE + SPLIT, ids=str)
def test_larger_shape(case: Case, dtype: str) -> None:
    check(case, "cpu", DTYPES[dtype])


@pytest.mark.fast
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_most_telling_cases(dtype: str) -> None:
    for case in CASES:
        if case.name in ("plain", "everything", "gqa-8:2", "bias-float:1hmn", "packed-everything", "lengths-nan"):
            check(case, "cpu", DTYPES[dtype])
