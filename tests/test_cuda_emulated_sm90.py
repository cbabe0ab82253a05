"""The CUDA kernels for sm_90a, run in the PTX emulator, by the tolerance rule.

No race may be reported, and every schedule must give the same bits. CTAs stay: a launch has as many as the pretended
chip has multiprocessors, far fewer than blocks.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attention import dispatch, philox
from fused_attention.backends import cuda, reference
from fused_attention.spec import AttentionSpec, Device, Inputs, Options, Outputs, make_spec

from .cases import CASES, LARGE, Case, check
from .cuda_support import Emulator, emulated, needs_kernels, needs_nvcc
from .test_cuda_emulated import DTYPES, FP16, INF, NAN, RAGGED, Say, _runs_here, _values
from .test_cuda_emulated import grouped as cuda_grouped

pytestmark = [pytest.mark.emulator, needs_kernels, needs_nvcc]

PROCESSORS = 3


class _Forward:
    """The backend without gradients."""

    forward = staticmethod(cuda.forward)

    @staticmethod
    def supports(spec: AttentionSpec, device: Device) -> str | None:
        return "forward only" if spec.gradients else cuda.supports(spec, device)

    @staticmethod
    def backward(spec: AttentionSpec, x: Inputs, out: Outputs, grads: Any) -> dict[str, Tensor]:
        return {}


@pytest.fixture(autouse=True)
def _listed(monkeypatch: pytest.MonkeyPatch, poison: None) -> None:
    """torch.empty holds NaN here, so that what a kernel does not write is seen."""
    monkeypatch.setitem(dispatch.BACKENDS, "cuda", _Forward)  # type: ignore[arg-type]


grouped = functools.partial(cuda_grouped, group="sm90")


def only_hopper(emulator: Emulator) -> bool:
    return all(kernel.startswith("forward_sm90_") for kernel, _ in emulator.reports)


# The copy engine wants rows at multiples of 16 bytes, and some keys.
ON_SM80 = ("D1-DV1", "D1-DV7", "D5-DV3", "D17-DV33", "empty-keys")
OPTIONS = [
    param
    for case in filter(None, map(_runs_here, [*CASES, *LARGE]))
    for param in grouped("bf16 fp16" if case.name in FP16 else "bf16", case)
]


@pytest.mark.parametrize(("case", "dtype"), OPTIONS)
def test_option(case: Case, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with emulated(monkeypatch, arch=90, processors=PROCESSORS) as emulator:
        check(case, "cuda", DTYPES[dtype], _values(case))
    assert only_hopper(emulator) == (case.name not in ON_SM80)


@pytest.mark.parametrize(("case", "dtype"), [p for case in RAGGED for p in grouped("bf16", case)])
def test_every_schedule_gives_the_same_bits(case: Case, dtype: str, monkeypatch: pytest.MonkeyPatch, say: Say) -> None:
    with emulated(monkeypatch, range(8), arch=90, processors=PROCESSORS) as emulator:
        check(case, "cuda", DTYPES[dtype], values=1)
    say(f"{case} {dtype}\n{emulator.summary()}")


# fmt: off
WIDE = [
    *(Case(f"D{d}-DV{dv}", (1, 4, 2, 200, 300, d, dv), causal="bottom_right") for d, dv in ((96, 128), (160, 256))),
    *(Case(f"grouped-D{d}", (2, 4, 2, 40, 150, d, d)) for d in (128, 256)),
    *(Case(f"all-options-D{d}", (1, 2, 1, 150, 170, d, d - 8), causal="bottom_right", window=(60, 5), softcap=4.0,
           mask="bool:11mn", bias="half:1hmn", alibi="bh", sinks=True, key_lengths=True, dropout_p=0.1)
      for d in (128, 256)),
]
# fmt: on


@pytest.mark.parametrize(("case", "dtype"), [p for case in WIDE for p in grouped("bf16 fp16", case)])
def test_wide_heads(case: Case, dtype: str, monkeypatch: pytest.MonkeyPatch, say: Say) -> None:
    with emulated(monkeypatch, range(2), arch=90, processors=PROCESSORS) as emulator:
        check(case, "cuda", DTYPES[dtype], values=1)
    assert only_hopper(emulator)
    say(f"{case} {dtype}\n{emulator.summary()}")


def _projection(dtype: torch.dtype) -> Inputs:
    """Packed rows as a projection leaves them."""
    q, k, v = torch.randn(1, 50, 3, 2, 32).to(dtype).permute(2, 0, 3, 1, 4)
    return Inputs(q, k, v)


@pytest.mark.parametrize("dtype", grouped("bf16", name="projection"))
def test_views_are_read_and_written_in_place(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = _projection(DTYPES[dtype])
    spec = make_spec(x, Options())
    with emulated(monkeypatch, arch=90) as emulator:
        out = cuda.forward(spec, x).output
    assert only_hopper(emulator) and out.transpose(1, 2).is_contiguous()  # [B, S, H, D], for the next projection
    torch.testing.assert_close(out, reference.forward(spec, x).output, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [p for o in (Options(causal="top_left"), Options(softcap=9.0)) for p in grouped("bf16", o, name=str(o.causal))],
)
def test_the_share_of_each_processor_does_not_matter(
    options: Options, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x = Inputs(*(torch.randn(2, 3, 300, 64).to(DTYPES[dtype]) for _ in range(3)))
    spec = make_spec(x, options)
    found = []
    for processors in (1, 4, 7, 100):
        with emulated(monkeypatch, arch=90, processors=processors):
            found.append(cuda.forward(spec, x))
    assert all(torch.equal(f.output, found[0].output) and torch.equal(f.lse, found[0].lse) for f in found)
    torch.testing.assert_close(found[0].output, reference.forward(spec, x).output, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", grouped("bf16", name="long"))
def test_heads_that_do_not_fit_into_the_cache_together(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are sorted by work among fewer heads then; the keys past the diagonal change nothing."""
    torch.manual_seed(0)
    rows, columns = 300, 110_000
    q, k, v = (torch.randn(1, 3, n, 64).to(DTYPES[dtype]) for n in (rows, columns, columns))
    found = []
    for n in (columns, rows):
        x = Inputs(q, k[:, :, :n], v[:, :, :n])
        with emulated(monkeypatch, arch=90, processors=PROCESSORS) as emulator:
            found.append(cuda.forward(make_spec(x, Options(causal="top_left")), x).output)
        assert only_hopper(emulator)
    assert found[0].isfinite().all() and torch.equal(*found)


@pytest.mark.parametrize("dtype", grouped("bf16", name="rounds"))
def test_more_rounds_than_are_remembered_apart(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that is spoiled is taken again, and with it the one 1024 rounds before."""
    torch.manual_seed(0)
    x = Inputs(*(torch.randn(1030, 1, 2, 64).to(DTYPES[dtype]) for _ in range(3)))
    x.value[-1, :, 1] = INF
    spec = make_spec(x, Options(causal="top_left"))
    with emulated(monkeypatch, arch=90, processors=1):
        got = cuda.forward(spec, x).output
    assert got[-1, :, 0].isfinite().all()
    torch.testing.assert_close(got, reference.forward(spec, x).output, equal_nan=True, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(("p", "dtype"), [param for p in (0.1, 0.999, 1.0) for param in grouped("bf16", p)])
@pytest.mark.parametrize("columns", [5, 64, 130])
def test_dropout_draws_the_mask_bit_for_bit(
    columns: int, p: float, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With equal scores and the unit vectors as values, the output shows the mask itself."""
    b, h, rows = 2, 2, 67
    zeros = torch.zeros(b, h, max(rows, columns), 8, dtype=DTYPES[dtype])
    # Rows of values lie 136 numbers apart, as the copy engine wants them.
    unit = torch.eye(136, dtype=DTYPES[dtype])[:columns, :columns].expand(b, h, -1, -1)
    x = Inputs(zeros[:, :, :rows], zeros[:, :, :columns], unit, seed=torch.tensor([0x7EDCBA9876543210]))
    with emulated(monkeypatch, arch=90) as emulator:
        out = cuda.forward(make_spec(x, Options(dropout_p=p)), x).output
    assert x.seed is not None and only_hopper(emulator)
    assert torch.equal(out != 0, philox.keep_mask(x.seed, p, torch.arange(b), h, rows, columns))


NOT_FINITE = {
    "causal": Options(causal="top_left"),
    "window": Options(window_left=3, window_right=4),
    "mask": Options(),
    "dropout": Options(dropout_p=0.3),
}


@pytest.mark.parametrize("d", [16, 80, 256])
@pytest.mark.parametrize(
    ("name", "dtype"), [p for name in NOT_FINITE for p in grouped("bf16 fp16" if name == "causal" else "bf16", name)]
)
def test_values_that_are_not_finite_reach_only_rows_that_see_them(
    name: str, dtype: str, d: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    n = 200
    q, k, v = (torch.randn(1, 2, n, d).to(DTYPES[dtype]) for _ in range(3))
    for row, value in ((5, NAN), (40, INF), (41, -INF), (139, INF)):
        v[:, :, row, row % 16] = value
    k[:, :, 150] = NAN
    mask = torch.rand(1, 1, n, n) > 0.4 if name == "mask" else None
    x = Inputs(q, k, v, mask=mask, seed=torch.tensor([5]) if name == "dropout" else None)
    spec = make_spec(x, NOT_FINITE[name])
    with emulated(monkeypatch, range(2), arch=90, processors=3) as emulator:  # a CTA has blocks of either kind
        got = cuda.forward(spec, x).output
    assert only_hopper(emulator)
    expected = reference.forward(spec, x).output
    assert not expected.isfinite().all() and (expected.isfinite().any() or name in ("mask", "dropout"))
    torch.testing.assert_close(got, expected, equal_nan=True, atol=1e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", grouped("bf16", name="neighbours"))
def test_neighbouring_sequences_do_not_see_each_other(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile of a packed sequence reaches into the next one, whose numbers are not finite here."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 170, 64).to(DTYPES[dtype]) for _ in range(3))
    for t in (q, k, v):
        t[:, :, 70:] = NAN
    offsets = torch.tensor([0, 70, 170])
    x = Inputs(q, k, v, cu_seqlens_q=offsets, cu_seqlens_k=offsets)
    spec = make_spec(x, Options(causal="top_left"))
    with emulated(monkeypatch, arch=90, processors=2) as emulator:
        out = cuda.forward(spec, x)
    assert only_hopper(emulator)
    assert out.output[:, :, :70].isfinite().all() and out.output[:, :, 70:].isnan().all()
    alone = Inputs(*(t[:, :, :70] for t in (q, k, v)))
    expected = reference.forward(make_spec(alone, Options(causal="top_left")), alone)
    torch.testing.assert_close(out.output[:, :, :70], expected.output, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(out.lse[:, :, :70], expected.lse)
