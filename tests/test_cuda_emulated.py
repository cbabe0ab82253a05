"""The CUDA kernels, compiled for sm_80 and run in the PTX emulator, by the tolerance rule: forward, backward, decoding.

No race may be reported, and every schedule must give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fused_attention import philox
from fused_attention.backends import cuda, cuda_decode, reference
from fused_attention.spec import Inputs, Options, make_spec

from . import test_decode
from .cases import CASES, LARGE, Case, check
from .cuda_support import emulated, needs_kernels, needs_nvcc

pytestmark = [pytest.mark.emulator, needs_kernels, needs_nvcc]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
NAN, INF = float("nan"), float("inf")
Say = Callable[[str], None]


@pytest.fixture(autouse=True)
def _poisoned_memory(poison: None) -> None:
    """torch.empty holds NaN here, so that what a kernel does not write is seen."""


def grouped(dtypes: str, *values: object, name: str = "", group: str = "cuda") -> list[Any]:
    """Parameters with each dtype; those of a dtype run in one process under pytest-xdist, which compiles them once."""
    return [
        pytest.param(
            *values, dtype, marks=pytest.mark.xdist_group(f"{group}-{dtype}"), id=f"{name or values[0]}-{dtype}"
        )
        for dtype in dtypes.split()
    ]


def _values(case: Case) -> int:
    """A row or a column alone has few numbers: those are drawn more often (`cases.draws`)."""
    return 16384 if min(case.sizes[3:5]) < 4 else 2048


def _runs_here(case: Case) -> Case | None:
    """The backend refuses larger heads and block maps (tests/test_block_maps.py sees the latter)."""
    refused = max(case.sizes[5:]) > cuda.MAX_HEAD_DIM or case.block_map is not None
    return None if refused else replace(case, weights=None)


# --- forward and backward --------------------------------------------------------------------------------------------

# What all kernels of a dtype have in common is looked at in bfloat16.
FP16 = ("plain", "M113xN203", "M239xN1", "D64-DV64", "gqa-8:2", "packed-everything", "lengths-nan", "everything",
        "bias-half:1hmn", "mask-hiding:bhmn", "dropout", "softcap", "layout-qkv", "very-negative-logits")  # fmt: skip
OPTIONS = [
    param
    for case in filter(None, map(_runs_here, [*CASES, *LARGE]))
    for param in grouped("bf16 fp16" if case.name in FP16 else "bf16", case)
]


@pytest.mark.parametrize(("case", "dtype"), OPTIONS)
def test_option(case: Case, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with emulated(monkeypatch):
        check(case, "cuda", DTYPES[dtype], _values(case))


# fmt: off
RAGGED = [
    *(Case(f"M{m}xN{n}", (1, 2, 1, m, n, 64, 64)) for m, n in ((1, 1), (3, 3), (33, 1), (113, 203))),
    Case("M239xN1", (1, 1, 1, 239, 1, 64, 64)),
    Case("M799xN3", (1, 1, 1, 799, 3, 32, 32)),
    Case("causal-M113xN203", (1, 2, 1, 113, 203, 64, 64), causal="bottom_right", window=(50, None)),
    Case("D24-DV40", (1, 2, 2, 65, 70, 24, 40), causal="top_left"),
    Case("D100-DV33", (1, 1, 1, 37, 65, 100, 33), sinks=True),
    Case("D128", (1, 1, 1, 140, 70, 128, 128), causal="top_left"),
    Case("packed", (3, 2, 1, 65, 70, 64, 64), packed=((65, 1, 0), (70, 2, 5)), causal="bottom_right"),
    Case("all-options", (1, 2, 1, 61, 77, 40, 24), causal="bottom_right", window=(30, 5), softcap=4.0,
         mask="bool:11mn", bias="half:1hmn", alibi="bh", sinks=True, key_lengths=True, dropout_p=0.1),
]
# fmt: on


@pytest.mark.parametrize(("case", "dtype"), [p for case in RAGGED for p in grouped("bf16", case)])
def test_every_schedule_gives_the_same_bits(case: Case, dtype: str, monkeypatch: pytest.MonkeyPatch, say: Say) -> None:
    with emulated(monkeypatch, range(8)) as emulator:
        check(case, "cuda", DTYPES[dtype], values=1)
    say(f"{case} {dtype}\n{emulator.summary()}")


WIDE = [
    Case(f"D{d}-DV{dv}", (1, 2, 1, 67, 90, d, dv), causal="top_left")
    for d, dv in ((160, 160), (192, 128), (224, 200), (256, 256))
]


@pytest.mark.parametrize(("case", "dtype"), [p for case in WIDE for p in grouped("bf16 fp16", case)])
def test_wide_heads(case: Case, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with emulated(monkeypatch):
        check(case, "cuda", DTYPES[dtype], _values(case))


# Rows of 24 bytes, an offset of 2 bytes, and packed rows as a projection leaves them.
def _views(dtype: torch.dtype) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    wide = torch.randn(3, 1, 2, 50, 40).to(dtype)
    projection = torch.randn(1, 50, 3, 2, 32).to(dtype).permute(2, 0, 3, 1, 4)
    return {
        "12 dims": tuple(wide[..., :12].contiguous()),  # type: ignore[dict-item]
        "odd offset": tuple(wide[..., 1:33]),  # type: ignore[dict-item]
        "projection": tuple(projection),  # type: ignore[dict-item]
    }


@pytest.mark.parametrize(("name", "dtype"), [p for n in _views(torch.float16) for p in grouped("bf16", n)])
def test_views_are_read_and_written_in_place(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    q, k, v = _views(DTYPES[dtype])[name]
    x = Inputs(q, k, v)
    spec = replace(make_spec(x, Options()), gradients=frozenset({"query", "key", "value"}))
    with emulated(monkeypatch):
        out = cuda.forward(spec, x)
        grads = cuda.backward(spec, x, out, (torch.ones_like(out.output), None, None))
    if name == "projection":
        assert out.output.transpose(1, 2).is_contiguous()  # [B, S, H, D], for the next projection
    expected = reference.forward(spec, x)
    wanted = reference.backward(spec, x, expected, (torch.ones_like(expected.output), None, None))
    torch.testing.assert_close(out.output, expected.output, atol=2e-2, rtol=2e-2)
    for n in grads:
        torch.testing.assert_close(grads[n], wanted[n], atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize(("p", "dtype"), [param for p in (0.1, 0.999, 1.0) for param in grouped("bf16", p)])
@pytest.mark.parametrize("columns", [5, 130])
def test_dropout_draws_the_mask_bit_for_bit(
    columns: int, p: float, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With equal scores and the unit vectors as values, the output shows the mask itself."""
    b, h, rows = 2, 2, 67
    zeros = torch.zeros(b, h, rows, 8, dtype=DTYPES[dtype])
    unit = torch.eye(columns, dtype=DTYPES[dtype]).expand(b, h, -1, -1)
    x = Inputs(zeros, zeros[:, :, :1].expand(-1, -1, columns, -1), unit, seed=torch.tensor([0x7EDCBA9876543210]))
    with emulated(monkeypatch):
        out = cuda.forward(make_spec(x, Options(dropout_p=p)), x).output
    assert x.seed is not None
    assert torch.equal(out != 0, philox.keep_mask(x.seed, p, torch.arange(b), h, rows, columns))


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        p
        for name, o in {
            "causal": Options(causal="top_left"),
            "window": Options(window_left=3, window_right=4),
            "mask": Options(),
            "dropout": Options(dropout_p=0.3),
        }.items()
        for p in grouped("bf16 fp16", o, name=name)
    ],
)
def test_values_that_are_not_finite_reach_only_rows_that_see_them(
    options: Options, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 70, 16).to(DTYPES[dtype]) for _ in range(3))
    mask = torch.rand(1, 1, 70, 70) > 0.4 if options.causal is None and options.window_left is None else None
    for row, value in ((5, NAN), (40, INF), (41, -INF), (69, INF)):
        v[:, :, row, row % 16] = value
    k[:, :, 50] = NAN
    x = Inputs(q, k, v, mask=mask, seed=torch.tensor([5]) if options.dropout_p else None)
    spec = make_spec(x, options)
    with emulated(monkeypatch):
        got = cuda.forward(spec, x).output
    expected = reference.forward(spec, x).output
    assert not expected.isfinite().all() and expected.isfinite().any()
    torch.testing.assert_close(got, expected, equal_nan=True, atol=1e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("hidden", "dtype"), [p for n in ("by a mask", "by causality") for p in grouped("bf16 fp16", n)]
)
def test_what_is_hidden_does_not_reach_the_gradients(hidden: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in keys that nobody sees, and in rows that see nothing."""
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(1, 2, 70, 24).to(DTYPES[dtype]) for _ in range(4))
    mask, options, dead, unseen = None, Options(), slice(5, 6), torch.zeros(70, dtype=torch.bool)
    if hidden == "by a mask":
        unseen = torch.rand(70) < 0.3
        mask = (~unseen).expand(1, 1, 70, 70).clone()
        mask[..., dead, :] = False
    else:
        k, v, options, dead = k[:, :, :40], v[:, :, :40], Options(causal="bottom_right"), slice(0, 30)
    clean = Inputs(q, k, v, mask=mask)
    spoiled = Inputs(*(t.clone() for t in (q, k, v)), mask=mask)
    bad = dout.clone()
    spoiled.query[:, :, dead], bad[:, :, dead] = NAN, NAN
    if mask is not None:
        spoiled.key[:, :, unseen], spoiled.value[:, :, unseen] = NAN, INF
    spec = replace(make_spec(clean, options), gradients=frozenset({"query", "key", "value"}))
    found = []
    for x, g in ((clean, dout), (spoiled, bad)):
        with emulated(monkeypatch):
            out = cuda.forward(spec, x)
            found.append({"output": out.output, **cuda.backward(spec, x, out, (g, None, None))})
    # Where a row is dead the clean dout does not count either.
    for n, t in found[0].items():
        assert torch.equal(t, found[1][n]), n


# --- decoding --------------------------------------------------------------------------------------------------------

F16, BF16, I8, F8 = torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn


def _decode_cases() -> list[object]:
    found: list[object] = []
    for case in test_decode.CASES:
        b, h, hk, m, d, dv = case.sizes
        codes = case.kv_dtype if case.kv_dtype in (I8, F8) else None
        case = replace(case, sizes=(b, h, hk, m, min(d, 256), min(dv, 200)), kv_dtype=codes)
        wide = max(case.sizes[4:]) > 128
        dtypes = "bf16 fp16" if codes and not wide or case.name in ("plain", "splits") else "bf16"
        found += grouped(dtypes, case)
    return found


@pytest.mark.parametrize(("case", "dtype"), _decode_cases())
def test_decoding(case: test_decode.Case, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_decode, "_processors", lambda index: 24)
    with emulated(monkeypatch):
        test_decode.check(replace(case, dtype=DTYPES[dtype]), "cuda")


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        p
        for case in (
            test_decode.Case("D64", (2, 8, 2, 3, 64, 64), capacity=300, window=(200, 0)),
            test_decode.Case("paged", (2, 4, 1, 1, 128, 128), capacity=700, page=16, sinks=True, rope=(64, False)),
            test_decode.Case("paged-int8", (2, 4, 1, 2, 128, 96), capacity=300, page=16, kv_dtype=I8, softcap=5.0),
            test_decode.Case("e4m3", (2, 4, 2, 1, 64, 64), capacity=600, kv_dtype=F8, alibi="bh"),
        )
        for p in grouped("bf16", case)
    ],
)
def test_every_schedule_of_decoding(
    case: test_decode.Case, dtype: str, monkeypatch: pytest.MonkeyPatch, say: Say
) -> None:
    monkeypatch.setattr(cuda_decode, "_processors", lambda index: 8)
    with emulated(monkeypatch, range(8)) as emulator:
        test_decode.check(replace(case, dtype=DTYPES[dtype]), "cuda")
    say(f"decoding {case} {dtype}\n{emulator.summary()}")
