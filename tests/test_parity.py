"""Every option on every backend at hand, forward and backward, by the tolerance rule."""

from __future__ import annotations

import pytest
import torch

from .cases import CASES, LARGE, Case, check

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
BACKENDS = ["cpu", "reference"]


@pytest.fixture(autouse=True)
def _poisoned_memory(poison: None) -> None:
    """torch.empty holds NaN here, so that what a kernel does not write is seen."""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_option(case: Case, dtype: str, backend: str) -> None:
    check(case, backend, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_larger_shape(case: Case, dtype: str) -> None:
    check(case, "cpu", DTYPES[dtype])


@pytest.mark.fast
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_most_telling_cases(dtype: str) -> None:
    for case in CASES:
        if case.name in ("plain", "everything", "gqa-8:2", "bias-float:1hmn", "packed-everything", "lengths-nan"):
            check(case, "cpu", DTYPES[dtype])
