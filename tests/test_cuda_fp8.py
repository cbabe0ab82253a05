"""The kernels for sm_90a that multiply in float8 e4m3, in the PTX emulator.

The tolerance rule is applied to what the codes stand for: `ref` is float64 attention over the rounded inputs, `same`
the recipe in plain PyTorch (tests/fp8_recipe.py), which rounds the weights to e4m3, as eager code in the inputs' dtype
does not. Beside it stands how far the result is from attention over the inputs as they were.
"""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attention as fa
from fused_attention import philox
from fused_attention.backends import cuda, reference
from fused_attention.parity.problems import Case, make
from fused_attention.spec import AttentionSpec, Inputs, Options, Outputs, make_spec

from . import cuda_support
from .cuda_support import Emulator, emulated, needs_kernels, needs_nvcc
from .fp8_recipe import Expected, expected
from .numerics import assert_close
from .test_cuda_emulated import DTYPES, INF, NAN, Say
from .test_cuda_emulated import grouped as cuda_grouped

pytestmark = [pytest.mark.emulator, needs_kernels, needs_nvcc]
grouped = functools.partial(cuda_grouped, group="fp8")


@pytest.fixture(autouse=True)
def _poisoned_memory(poison: None) -> None:
    """torch.empty holds NaN here, so that what a kernel does not write is seen."""


def run(
    x: Inputs, o: Options, monkeypatch: pytest.MonkeyPatch, seeds: Any = (0,), processors: int = 3
) -> tuple[AttentionSpec, Any, Emulator]:
    spec = make_spec(x, o._replace(precision="fp8"))
    with emulated(monkeypatch, seeds, arch=90, processors=processors) as emulator:
        out = cuda.forward(spec, x)
    assert {kernel[:4] for kernel, _ in emulator.reports} <= {"fp8_"}
    return spec, out, emulator


def l2(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm()) if wanted.norm() else 0.0


def check(spec: AttentionSpec, x: Inputs, out: Any) -> tuple[Expected, str]:
    """The rule; returns what was expected and the figures in words."""
    want = expected(spec, x)
    figures = assert_close(out.output, want.same, want.exact, name="output")
    assert_close(out.lse, want.same_lse, want.lse, name="lse")
    return want, (
        f"relative L2 error {figures['relative_l2']:.4f} against the codes, {l2(out.output, want.unquantised):.4f} "
        "against the inputs"
    )


# fmt: off
CASES = [
    Case("D64", (1, 2, 2, 150, 300, 64, 64)),
    Case("D128", (1, 2, 2, 150, 300, 128, 128)),
    Case("D256", (1, 2, 1, 150, 200, 256, 256)),
    Case("causal-D64", (2, 2, 2, 203, 203, 64, 64), causal="top_left"),
    Case("causal-D128", (1, 4, 2, 140, 270, 128, 128), causal="bottom_right"),
    Case("causal-D256", (1, 2, 2, 140, 140, 256, 256), causal="top_left"),
    Case("window", (1, 2, 2, 300, 300, 64, 64), causal="top_left", window=(50, None)),
    Case("window-both", (1, 2, 1, 200, 330, 128, 128), window=(20, 33)),
    Case("grouped-few-rows-D64", (2, 8, 2, 40, 150, 64, 64)),
    Case("grouped-few-rows-D128", (1, 4, 1, 40, 150, 128, 128), causal="bottom_right"),
    Case("grouped-few-rows-D256", (1, 4, 2, 33, 150, 256, 256)),
    Case("one-row", (1, 4, 2, 1, 203, 64, 64)),
    Case("one-key", (1, 2, 2, 113, 1, 128, 128)),
    Case("odd-dims", (1, 2, 1, 113, 203, 72, 40), causal="bottom_right"),
    Case("rows-of-odd-bytes", (1, 2, 2, 65, 129, 17, 33)),
    Case("head-dim-160", (1, 2, 2, 65, 129, 160, 192)),
    Case("lengths", (3, 2, 2, 70, 290, 64, 64), key_lengths=True, nan_hidden=True),
    Case("lengths-dead-causal", (3, 2, 2, 70, 150, 128, 128), key_lengths=True, dead=True, causal="bottom_right"),
    Case("packed", (4, 4, 2, 200, 290, 64, 64), packed=((5, 0, 200, 9), (5, 3, 290, 0)), causal="bottom_right"),
    Case("packed-D128", (3, 4, 2, 65, 140, 128, 128), packed=((65, 1, 0), (140, 2, 5)), window=(30, 9)),
    Case("packed-D256", (3, 2, 2, 130, 70, 256, 256), packed=((130, 1, 20), (70, 2, 50)), causal="top_left"),
    Case("sinks", (1, 2, 2, 70, 150, 64, 64), sinks=True),
    Case("very-negative-logits", (1, 2, 2, 70, 150, 64, 64), shift=3.0),
    Case("projection", (1, 2, 2, 150, 150, 64, 64), layout="qkv", causal="top_left"),
    Case("expanded", (2, 2, 2, 70, 70, 64, 64), layout="expanded"),
    Case("softcap", (1, 2, 2, 140, 150, 64, 64), softcap=3.0, causal="top_left"),
    Case("softcap-D128", (1, 2, 2, 140, 150, 128, 128), softcap=5.0, causal="top_left"),
    Case("softcap-D256", (1, 2, 2, 70, 150, 256, 256), softcap=5.0),
    Case("negative-scale", (1, 2, 2, 70, 150, 64, 64), scale=-0.2),
    Case("mask", (2, 2, 2, 70, 150, 64, 64), mask="bool:b1mn", dead=True),
    Case("bias", (1, 2, 2, 70, 150, 128, 128), bias="half:1hmn"),
    Case("alibi", (1, 2, 2, 70, 150, 64, 64), alibi="h", causal="bottom_right"),
    Case("dropout", (1, 2, 2, 70, 150, 64, 64), dropout_p=0.3),
    *(Case(f"all-options-D{d}", (1, 4, 2, 61, 170, d, d - 8), causal="bottom_right", window=(60, 5), softcap=4.0,
           mask="bool:11mn", bias="half:1hmn", alibi="bh", sinks=True, key_lengths=True, dropout_p=0.1)
      for d in (64, 128, 256)),
]
# fmt: on
FP16 = ("D64", "D128", "D256", "all-options-D64", "all-options-D128", "all-options-D256", "packed")


@pytest.mark.parametrize(
    ("case", "dtype"), [p for c in CASES for p in grouped("bf16 fp16" if c.name in FP16 else "bf16", c)]
)
def test_parity_with_the_recipe(case: Case, dtype: str, monkeypatch: pytest.MonkeyPatch, say: Say) -> None:
    x, options = make(case, DTYPES[dtype])
    spec, out, _ = run(x, options, monkeypatch)
    assert out.output.dtype == DTYPES[dtype] and out.lse.dtype == torch.float32
    _, figures = check(spec, x, out)
    say(f"fp8 {case} {dtype}: {figures}")


RAGGED = [
    Case("D64", (1, 2, 1, 140, 270, 64, 64), causal="bottom_right", window=(150, None)),
    Case("D128", (1, 2, 1, 140, 270, 128, 128), causal="bottom_right"),
    Case("D256", (1, 1, 1, 140, 150, 256, 256), causal="top_left"),
    Case("packed", (3, 2, 1, 65, 140, 64, 64), packed=((65, 1, 0), (140, 2, 5)), causal="bottom_right"),
    Case("few-rows", (2, 4, 2, 33, 150, 128, 128)),
    Case("all-options", (1, 2, 1, 61, 77, 40, 24), causal="bottom_right", window=(30, 5), softcap=4.0,
         mask="bool:11mn", bias="half:1hmn", alibi="bh", sinks=True, key_lengths=True, dropout_p=0.1),
]  # fmt: skip


@pytest.mark.parametrize(("case", "dtype"), [p for case in RAGGED for p in grouped("bf16", case)])
def test_every_schedule_gives_the_same_bits(case: Case, dtype: str, monkeypatch: pytest.MonkeyPatch, say: Say) -> None:
    x, options = make(case, DTYPES[dtype])
    spec, out, emulator = run(x, options, monkeypatch, range(8))
    check(spec, x, out)
    say(f"{case} {dtype}\n{emulator.summary()}")


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize(("d", "dtype"), [p for d in (64, 128, 256) for p in grouped("bf16 fp16", d, name=f"D{d}")])
def test_accuracy(d: int, dtype: str, outliers: bool, monkeypatch: pytest.MonkeyPatch, say: Say) -> None:
    """Against attention over the inputs: as far as the recipe, and within the rounding of one number of e4m3, 2^-4.

    outliers: one number of a thousand is ten times as large.
    """
    torch.manual_seed(0)
    spread = 1 + 9 * (torch.rand(3, 1, 2, 300, d) < 0.001) if outliers else torch.ones(())
    x = Inputs(*(torch.randn(3, 1, 2, 300, d) * spread).to(DTYPES[dtype]))
    spec, out, _ = run(x, Options(causal="top_left"), monkeypatch)
    want = expected(spec, x)
    error, recipe = l2(out.output, want.unquantised), l2(want.same, want.unquantised)
    kind = "with outliers" if outliers else "normal"
    say(f"fp8 D{d} {dtype} {kind}: relative L2 error {error:.4f} against float64 over the inputs; recipe {recipe:.4f}")
    assert error < 2**-4 and error < 1.05 * recipe


# What a mistake in the layout would look like: (pattern, replacement) in the PTX of the forward kernel.
_REGISTERS = r"(wgmma\.mma_async[^;]*\}, \{)(%r\d+), (%r\d+), (%r\d+), (%r\d+)(\})"
PLANTED = {
    "registers of A swapped": (_REGISTERS, r"\1\2, \4, \3, \5\6"),
    "bytes of A swapped": (r"(cvt\.rn\.satfinite\.e4m3x2\.f32 low), (%[rf]\d+), (%[rf]\d+)", r"\1, \3, \2"),
    "halves of A swapped": (r"\{low, high\}", "{high, low}"),
    "products not waited for": (r"wgmma\.wait_group\.sync\.aligned 0", "wgmma.wait_group.sync.aligned 1"),
    "another format": (r"e4m3\.e4m3", "e5m2.e4m3"),
}


@pytest.mark.parametrize(("bug", "dtype"), [p for bug in PLANTED for p in grouped("bf16", bug, name=bug)])
def test_a_planted_bug_is_caught(bug: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern, replacement = PLANTED[bug]
    ptx = cuda_support.ptx

    def edited(source: str, *defines: str) -> str:
        if source != "forward_fp8_sm90":
            return ptx(source, *defines)
        text, count = re.subn(pattern, replacement, ptx(source, *defines))
        assert count, "the pattern is not there"
        return text

    x, options = make(Case("", (1, 2, 2, 150, 300, 64, 64)), DTYPES[dtype])
    with monkeypatch.context() as patch:
        patch.setattr(cuda_support, "ptx", edited)
        patch.setattr(cuda_support, "module", cuda_support.module.__wrapped__)
        with pytest.raises(AssertionError, match="allowed|infinities|not finite|race|other bits"):
            spec, out, _ = run(x, options, monkeypatch, range(2))
            check(spec, x, out)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        p
        for case in (
            Case("no-keys", (2, 4, 2, 130, 0, 256, 256)),
            Case("no-keys-in-any-sequence", (2, 4, 2, 130, 0, 256, 256), packed=((5, 130), (0, 0))),
            Case("no-rows", (2, 2, 2, 0, 7, 64, 64)),
            Case("no-batch", (0, 2, 2, 5, 7, 64, 64)),
        )
        for p in grouped("bf16", case)
    ],
)
def test_nothing_to_multiply(case: Case, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros, and lse -inf, as without a precision."""
    x, options = make(case, DTYPES[dtype])
    with emulated(monkeypatch, arch=90) as emulator:
        out = cuda.forward(make_spec(x, options._replace(precision="fp8")), x)
    assert (out.output == 0).all() and (out.lse == -INF).all()
    assert len(emulator.reports) == (case.name.startswith("no-keys"))


# --- numbers that are not finite ----------------------------------------------------------------------------------

NOT_FINITE = {
    "causal": Options(causal="top_left"),
    "window": Options(window_left=3, window_right=4),
    "mask": Options(),
    "dropout": Options(dropout_p=0.3),
}


@pytest.mark.parametrize("d", [16, 80, 256])
@pytest.mark.parametrize(("name", "dtype"), [p for name in NOT_FINITE for p in grouped("bf16", name)])
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
    spec, out, _ = run(x, NOT_FINITE[name], monkeypatch, range(2))
    want = reference.forward(replace(spec, precision=None), x).output
    assert not want.isfinite().all() and (want.isfinite().any() or name in ("mask", "dropout"))
    for special in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(special(out.output), special(want))
    finite = want.isfinite()
    assert l2(out.output[finite], want[finite].double()) < 0.08


@pytest.mark.parametrize("dtype", grouped("bf16", name="infinite keys"))
def test_an_infinity_in_query_or_key_counts_as_nan(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 140, 64).to(DTYPES[dtype]) for _ in range(3))
    q[:, :, 20, 3], k[:, :, 100, 7] = INF, -INF
    _, out, _ = run(Inputs(q, k, v), Options(causal="top_left"), monkeypatch)
    spoiled = torch.zeros(140, dtype=torch.bool)
    spoiled[20], spoiled[100:] = True, True
    assert torch.equal(out.output.isnan().all(-1)[0, 0], spoiled) and torch.equal(out.lse.isnan()[0, 0], spoiled)


@pytest.mark.parametrize("dtype", grouped("bf16", name="neighbours"))
def test_neighbouring_sequences_do_not_see_each_other(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile of a packed sequence reaches into the next one, whose numbers are not finite here."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 170, 64).to(DTYPES[dtype]) for _ in range(3))
    alone = Inputs(*(t[:, :, :70].clone() for t in (q, k, v)))
    for t in (q, k, v):
        t[:, :, 70:] = NAN
    offsets = torch.tensor([0, 70, 170])
    _, out, _ = run(Inputs(q, k, v, cu_seqlens_q=offsets, cu_seqlens_k=offsets), Options(), monkeypatch)
    assert out.output[:, :, 70:].isnan().all()
    spec = make_spec(alone, Options(precision="fp8"))
    check(spec, alone, Outputs(out.output[:, :, :70], out.lse[:, :, :70], None))


@pytest.mark.parametrize("dtype", grouped("bf16", name="magnitudes"))
def test_blocks_of_other_magnitudes(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that sees small values alone keeps its precision beside a block of large ones."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 384, 64) for _ in range(3))
    k[:, :, :128], q[:, :, ::2] = 0.0, -8.0
    k[:, :, 128:256], v[:, :, 128:256] = 8.0, v[:, :, 128:256] * 2.0**20
    v[:, :, 256:] *= 2.0**-20
    k[:, :, 256:] -= 8.0
    x = Inputs(*(t.to(DTYPES[dtype]) for t in (q, k, v)))
    spec, out, _ = run(x, Options(), monkeypatch)
    want, rows = expected(spec, x).exact, slice(0, None, 2)
    assert want[:, :, rows].abs().max() < 1e-3 and want[:, :, 1::2].abs().max() > 1e3  # of the last block; of another
    assert l2(out.output[:, :, rows], want[:, :, rows]) < 2**-4


# --- the public function ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", grouped("bf16", name="public"))
def test_the_public_functions_take_it(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 140, 64).to(DTYPES[dtype]) for _ in range(3))
    offsets = torch.tensor([0, 140])
    with emulated(monkeypatch, arch=90) as emulator:
        dense = fa.attention(q, k, v, causal="top_left", return_lse=True, precision="fp8")
        packed = fa.varlen_attention(
            *(t[0].transpose(0, 1) for t in (q, k, v)), offsets, offsets, causal="top_left", precision="fp8"
        )
        traced = torch.compile(fa.attention, fullgraph=True, backend="eager")(
            q, k, v, causal="top_left", precision="fp8"
        )
        assert fa.explain(q, k, v, precision="fp8").backend == "cuda"
        with pytest.raises(fa.BackendError, match="no backend.*cuda: no gradients with products in fp8"):
            fa.attention(q.requires_grad_(), k, v, precision="fp8")
        later = torch.compile(fa.attention, fullgraph=True, backend="aot_eager")(q, k, v, precision="fp8")
        with pytest.raises(fa.BackendError, match="cuda: no gradients with products in fp8"):
            later.sum().backward()
    assert isinstance(packed, Tensor)
    assert torch.equal(packed.transpose(0, 1), dense.output[0]) and torch.equal(traced, dense.output)
    assert [k.partition("_sm90")[0] for k, _ in emulator.reports] == ["fp8_quantise", "fp8_forward"] * 4


@pytest.mark.parametrize("dtype", grouped("bf16", name="dropout"))
def test_dropout_draws_the_mask_bit_for_bit(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With equal scores and the unit vectors as values, the output shows the mask itself."""
    b, h, rows, columns = 2, 2, 67, 130
    zeros = torch.zeros(b, h, 130, 8, dtype=DTYPES[dtype])
    unit = torch.eye(columns, dtype=DTYPES[dtype]).expand(b, h, -1, -1)
    x = Inputs(zeros[:, :, :rows], zeros, unit, seed=torch.tensor([0x7EDCBA9876543210]))
    _, out, _ = run(x, Options(dropout_p=0.1), monkeypatch)
    assert x.seed is not None
    assert torch.equal(out.output != 0, philox.keep_mask(x.seed, 0.1, torch.arange(b), h, rows, columns))


@pytest.mark.parametrize("dtype", grouped("bf16", name="processors"))
def test_the_share_of_each_processor_does_not_matter(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = Inputs(*(torch.randn(2, 2, 300, 64).to(DTYPES[dtype]) for _ in range(3)))
    found = [run(x, Options(causal="top_left"), monkeypatch, processors=n)[1] for n in (1, 5, 100)]
    assert all(torch.equal(f.output, found[0].output) and torch.equal(f.lse, found[0].lse) for f in found)
