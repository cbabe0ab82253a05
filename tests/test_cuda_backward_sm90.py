"""The gradient kernels for sm_90a, run in the PTX emulator after the forward kernels, by the tolerance rule.

No race may be reported, and every schedule must give the same bits.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fused_attention.backends import cuda
from fused_attention.spec import AttentionSpec, Inputs, Options, Outputs, make_spec

from .cases import CASES, LARGE, Case, check
from .cuda_support import Emulator, emulated, needs_kernels, needs_nvcc
from .test_cuda_emulated import DTYPES, FP16, INF, NAN, RAGGED, Say, _runs_here, _values, grouped

pytestmark = [pytest.mark.emulator, needs_kernels, needs_nvcc]

PROCESSORS = 3  # of the pretended chip: what the forward kernels share their blocks among
ALL = frozenset({"query", "key", "value"})


@pytest.fixture(autouse=True)
def _poisoned_memory(poison: None) -> None:
    """torch.empty holds NaN here, so that what a kernel does not write is seen."""


def gradient_kernels(emulator: Emulator) -> set[str]:
    """Those of dQ, dK and dV that have run."""
    return {name for name, _ in emulator.reports if name.startswith(("query_", "key_", "value_"))}


def only_hopper(emulator: Emulator) -> bool:
    return all("_sm90_" in name for name in gradient_kernels(emulator))


# The copy engine wants rows at multiples of 16 bytes, and some of them.
ON_SM80 = ("D1-DV1", "D1-DV7", "D5-DV3", "D17-DV33", "D100-DV33", "empty-rows", "empty-keys")
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
    assert only_hopper(emulator) == (case.name not in ON_SM80)
    say(f"{case} {dtype}\n{emulator.summary()}")


# fmt: off
WIDE = [
    *(Case(f"D{d}-DV{dv}", (1, 2, 1, 200, 300, d, dv), causal="bottom_right")
      for d, dv in ((64, 64), (96, 128), (160, 256))),
    *(Case(f"all-options-D{d}", (1, 2, 1, 150, 170, d, d - 8), causal="bottom_right", window=(60, 5), softcap=4.0,
           mask="bool:11mn", bias="half:1hmn", alibi="bh", sinks=True, key_lengths=True, dropout_p=0.1)
      for d in (64, 128, 256)),
]
# fmt: on


@pytest.mark.parametrize(("case", "dtype"), [p for case in WIDE for p in grouped("bf16 fp16", case)])
def test_wide_heads(case: Case, dtype: str, monkeypatch: pytest.MonkeyPatch, say: Say) -> None:
    """Several tiles of every kind, and more of them than there are stages."""
    with emulated(monkeypatch, range(2), arch=90, processors=PROCESSORS) as emulator:
        check(case, "cuda", DTYPES[dtype], values=1)
    assert only_hopper(emulator)
    say(f"{case} {dtype}\n{emulator.summary()}")


def _forward(spec: AttentionSpec, x: Inputs, monkeypatch: pytest.MonkeyPatch) -> Outputs:
    with emulated(monkeypatch, arch=90, processors=PROCESSORS):
        return cuda.forward(spec, x)


def _gradients(
    spec: AttentionSpec, x: Inputs, out: Outputs, dout: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, torch.Tensor], Emulator]:
    with emulated(monkeypatch, range(2), arch=90, processors=PROCESSORS) as emulator:
        return cuda.backward(spec, x, out, (dout, None, None)), emulator


@pytest.mark.parametrize("d", [24, 128, 256])
@pytest.mark.parametrize(
    ("hidden", "dtype"), [p for n in ("by a mask", "by causality") for p in grouped("bf16 fp16", n)]
)
def test_what_is_hidden_does_not_reach_the_gradients(
    hidden: str, dtype: str, d: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in keys that nobody sees, and in rows that see nothing."""
    torch.manual_seed(0)
    n = 150
    q, k, v, dout = (torch.randn(1, 2, n, d).to(DTYPES[dtype]) for _ in range(4))
    mask, options, dead, unseen = None, Options(), slice(5, 6), torch.zeros(n, dtype=torch.bool)
    if hidden == "by a mask":
        unseen = torch.rand(n) < 0.3
        mask = (~unseen).expand(1, 1, n, n).clone()
        mask[..., dead, :] = False
    else:
        k, v, options, dead = k[:, :, :90], v[:, :, :90], Options(causal="bottom_right"), slice(0, 60)
    clean = Inputs(q, k, v, mask=mask)
    spoiled = Inputs(*(t.clone() for t in (q, k, v)), mask=mask)
    bad = dout.clone()
    spoiled.query[:, :, dead], bad[:, :, dead] = NAN, NAN
    if mask is not None:
        spoiled.key[:, :, unseen], spoiled.value[:, :, unseen] = NAN, INF
    spec = replace(make_spec(clean, options), gradients=ALL)
    out = _forward(spec, clean, monkeypatch)  # for both: what is taken with care may differ in the last bit
    wanted, _ = _gradients(spec, clean, out, dout, monkeypatch)
    found, emulator = _gradients(spec, spoiled, out, bad, monkeypatch)
    assert only_hopper(emulator)
    for name, t in wanted.items():
        assert t.isfinite().all() and torch.equal(t, found[name]), name


@pytest.mark.parametrize("dtype", grouped("bf16", name="neighbours"))
def test_neighbouring_sequences_do_not_reach_the_gradients(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile of a packed sequence reaches into the next one, whose numbers are not finite here."""
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(1, 2, 170, 64).to(DTYPES[dtype]) for _ in range(4))
    for t in (q, k, v, dout):
        t[:, :, 70:] = NAN
    offsets = torch.tensor([0, 70, 170])
    x = Inputs(q, k, v, cu_seqlens_q=offsets, cu_seqlens_k=offsets)
    spec = replace(make_spec(x, Options(causal="top_left")), gradients=ALL)
    out = _forward(spec, x, monkeypatch)
    found, emulator = _gradients(spec, x, out, dout, monkeypatch)
    assert only_hopper(emulator)
    alone = Inputs(*(t[:, :, :70] for t in (q, k, v)))
    spec = replace(make_spec(alone, Options(causal="top_left")), gradients=ALL)
    first = Outputs(out.output[:, :, :70], out.lse[:, :, :70].contiguous(), None)
    wanted, _ = _gradients(spec, alone, first, dout[:, :, :70], monkeypatch)
    for name, t in wanted.items():
        assert torch.equal(t, found[name][:, :, :70]), name
        assert found[name][:, :, 70:].isnan().any(), name


@pytest.mark.parametrize("d", [64, 256])
@pytest.mark.parametrize("dtype", grouped("bf16", name="alone"))
def test_each_gradient_alone_is_that_of_all_together(dtype: str, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head dim of 256 has a launch for dK and one for dV."""
    torch.manual_seed(0)
    x = Inputs(*(torch.randn(1, 2, 140, d).to(DTYPES[dtype]) for _ in range(3)))
    dout = torch.randn(1, 2, 140, d).to(DTYPES[dtype])
    spec = make_spec(x, Options(causal="top_left"))
    out = _forward(spec, x, monkeypatch)
    wanted, emulator = _gradients(replace(spec, gradients=ALL), x, out, dout, monkeypatch)
    assert len(gradient_kernels(emulator)) == (3 if d == 256 else 2)
    for name in sorted(ALL):
        found, emulator = _gradients(replace(spec, gradients=frozenset({name})), x, out, dout, monkeypatch)
        assert torch.equal(found[name], wanted[name]) and only_hopper(emulator)
        assert len(gradient_kernels(emulator)) == 1


@pytest.mark.parametrize("dtype", grouped("bf16", name="unaligned"))
def test_what_the_copy_engine_cannot_read_goes_to_the_kernels_for_sm80(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An output gradient at an odd address: the gradients alone change kernels, and stay the same within rounding."""
    torch.manual_seed(0)
    x = Inputs(*(torch.randn(1, 2, 70, 64).to(DTYPES[dtype]) for _ in range(3)))
    wide = torch.randn(1, 2, 70, 72).to(DTYPES[dtype])
    spec = replace(make_spec(x, Options()), gradients=ALL)
    out = _forward(spec, x, monkeypatch)
    found, emulator = _gradients(spec, x, out, wide[..., 1:65], monkeypatch)
    assert gradient_kernels(emulator) == {f"{name}_sm80_{dtype}_d64" for name in ("query_gradient", "key_gradients")}
    wanted, emulator = _gradients(spec, x, out, wide[..., 1:65].contiguous(), monkeypatch)
    assert only_hopper(emulator)
    for name, t in wanted.items():
        torch.testing.assert_close(found[name], t, atol=2e-2, rtol=2e-2)
