"""Every row of the table of features, forward and backward, on every backend that says it supports it.

The table is the README's (`python -m fused_attention info --features`); a row without problems here is a failure, and
so is a backend whose answer for the problems is not its answer in the table. The CUDA kernels, which need a GPU or an
emulator, have suites of their own: test_cuda_emulated.py, test_cuda_emulated_sm90.py, test_cuda_backward_sm90.py. What
is run is counted per backend at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attention as fa
from fused_attention import cli
from fused_attention.dispatch import BACKENDS
from fused_attention.parity.features import FEATURES
from fused_attention.spec import make_spec

from .cases import Case, check, make
from .triton_support import DEVICE, INTERPRETED, needs_triton

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = {"fp32": FP32, "bf16": BF16, "fp16": FP16, "fp64": FP64}

_TELLING = (FEATURES["plain"][0], *FEATURES["everything at once"])
_LARGER = Case("576", (1, 2, 2, 19, 37, 576, 512))
# Per row of the table, its problems, and the dtypes that it is about if not all.
ROWS: dict[str, tuple[tuple[Case, ...], tuple[torch.dtype, ...]]] = {
    "bfloat16": (_TELLING, (BF16,)),
    "float16": (_TELLING, (FP16,)),
    "float32": (_TELLING, (FP32,)),
    "float64": (_TELLING, (FP64,)),
    "causal, top-left and bottom-right": ((*FEATURES["causal, top-left"], *FEATURES["causal, bottom-right"]), ()),
    "window, either side": (FEATURES["window"], ()),
    "bool mask, any broadcast": (FEATURES["bool mask"], ()),
    "float mask, with gradient": (FEATURES["float mask, with gradient"], ()),
    "bias, with deterministic gradient": (FEATURES["bias, with gradient"], ()),
    "key lengths": (FEATURES["key lengths"], ()),
    "block maps, sides of a multiple of 16": (FEATURES["block maps"], ()),
    "block maps, any sides": ((Case("10x10", (2, 4, 2, 70, 90, 16, 16), block_map="bh:0.5:10x10"),), ()),
    "packed sequences": (FEATURES["packed sequences"], ()),
    "grouped and multi-query heads": (FEATURES["grouped heads"], ()),
    "value dim other than head dim": (FEATURES["value dim other than head dim"], ()),
    "head dim up to 512": (sum((FEATURES[f"head dim {n}"] for n in (128, 256, 512)), ()), ()),
    "head dim above 512": ((_LARGER,), ()),
    "softcap": (FEATURES["softcap"], ()),
    "ALiBi": (FEATURES["ALiBi"], ()),
    "ALiBi slopes with gradient": (FEATURES["ALiBi"], ()),
    "sinks, with gradient": (FEATURES["sinks, with gradient"], ()),
    "dropout": (FEATURES["dropout"], ()),
    "attention weights, per head or averaged": (FEATURES["attention weights"], ()),
    "batch-invariant rows": (FEATURES["batch-invariant rows"], ()),
}
TRANSFORMS = "forward-mode AD, torch.func"
TRITON = pytest.param("triton", marks=[pytest.mark.triton, needs_triton])


@pytest.fixture(autouse=True)
def _poisoned_memory(poison: None) -> None:
    """torch.empty holds NaN here, so that what a kernel does not write is seen."""


def _dtypes(backend: str, only: tuple[torch.dtype, ...]) -> list[str]:
    """Those of the row that the backend has; of Triton, whose interpreter takes seconds a problem, fewer there."""
    found = [n for n, dtype in DTYPES.items() if not only or dtype in only]
    plain = cli._PLAIN
    found = [n for n in found if BACKENDS[backend].unsupported(replace(plain, dtype=DTYPES[n])) is None]
    return ["fp16"] if backend == "triton" and INTERPRETED and not only else found


def _smaller(case: Case) -> Case:
    """Half the heads."""
    b, h, hk, *rest = case.sizes
    return replace(case, sizes=(b, h // 2, hk // 2, *rest)) if hk % 2 == 0 and "bh" not in str(case.alibi) else case


def _answer(backend: str, case: Case, dtype: torch.dtype, wanted: frozenset[str]) -> str | None:
    """Why a backend does not run a problem, with the gradients that the row is about."""
    x, o = make(case, dtype)
    present = {n for n in wanted if getattr(x, n) is not None and getattr(x, n).is_floating_point()}
    return BACKENDS[backend].unsupported(replace(make_spec(x, o), gradients=frozenset({"query"} | present)))


def test_every_row_of_the_table_has_problems() -> None:
    assert {*ROWS, TRANSFORMS} == set(cli.FEATURES)


@pytest.mark.parametrize("backend", ["cpu", "reference", TRITON])
@pytest.mark.parametrize("row", ROWS)
def test_row(row: str, backend: str, say: Callable[[str], None], count: Callable[[str], None]) -> None:
    fields = cli.FEATURES[row]
    cases, only = ROWS[row]
    if backend == "triton" and INTERPRETED:
        cases = tuple(_smaller(case) for case in cases)
    wanted = frozenset(fields.get("gradients", ()))
    refusal = BACKENDS[backend].unsupported(replace(cli._PLAIN, **{**fields, "gradients": wanted | {"query"}}))
    if refusal is not None:
        assert all(_answer(backend, case, (*only, FP32)[0], wanted) for case in cases)
        say(f"{backend} does not run {row!r}: {refusal}")
        return
    names = _dtypes(backend, only)
    assert names, f"{backend} has no dtype for {row!r}"
    for case in cases:
        for name in names:
            assert _answer(backend, case, DTYPES[name], wanted) is None
            found = check(case, backend, DTYPES[name], 1024 if INTERPRETED else 8192, _device(backend))
            assert {"output", "lse", "dquery", "dkey", "dvalue", *(f"d{n}" for n in wanted)} <= found.keys() | _without(
                case
            )
    count(f"rows of the table of features run forward and backward on {backend}")


def _device(backend: str) -> str:
    return DEVICE if backend == "triton" else "cpu"


def _without(case: Case) -> set[str]:
    """Gradients that a problem of a row does not have: a bool mask beside a float one."""
    return {f"d{n}" for n in ("mask", "bias") if getattr(case, n) is None or str(getattr(case, n)).startswith("bool")}


def _tangents(x: Any) -> list[Tensor]:
    return [torch.randn(t.shape, dtype=t.dtype) for t in x]


@pytest.mark.parametrize("options", [{}, {"causal": "bottom_right", "softcap": 3.0}, {"window": (3, 2)}], ids=str)
def test_transforms(options: dict[str, Any], say: Callable[[str], None], count: Callable[[str], None]) -> None:
    """<J t, c> = <t, J^T c> for random t and c, in float64; kernels say why they take no part."""
    torch.manual_seed(0)
    x = [torch.randn(2, 4, n, 8, dtype=FP64) for n in (5, 7, 7)]
    tangents, cotangent = _tangents(x), torch.randn(2, 4, 5, 8, dtype=FP64)

    def f(*tensors: Tensor) -> Tensor:
        return fa.attention(*tensors, **options)  # type: ignore[return-value]

    with fa.use_backend("reference"):
        _, forward = torch.func.jvp(f, tuple(x), tuple(tangents))
        _, pull = torch.func.vjp(f, *x)
        with torch.autograd.forward_ad.dual_level():
            dual = f(*(torch.autograd.forward_ad.make_dual(t, d) for t, d in zip(x, tangents, strict=True)))
            also = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(also, forward)
    back = sum((t * g).sum() for t, g in zip(tangents, pull(cotangent), strict=True))
    torch.testing.assert_close((forward * cotangent).sum(), back)
    for name in ("cpu", "cuda", "triton"):
        refusal = BACKENDS[name].unsupported(replace(cli._PLAIN, transform="torch.func"))
        assert refusal
        if not options:
            say(f"{name} does not run {TRANSFORMS!r}: {refusal}")
    if not options:
        count("rows of the table of features run forward and backward on reference")
