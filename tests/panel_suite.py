"""The kernels on packed panels, forward and backward, by the tolerance rule.

test_panels.py runs this file in a process of its own, in which FUSED_ATTENTION_CPU_ISA names the variant: avx512_bf16
and amx where the processor has what they need, and amx_emulated, the kernels of amx with its tiles in plain C++.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

import fused_attention as fa
from fused_attention.backends import cpu, reference
from fused_attention.spec import Inputs, Options, make_spec

from .cases import CASES, LARGE, Case, check
from .numerics import assert_close

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
TYPES = HALF | {"fp32": torch.float32}

# More keys and rows than one item of work has (128 by 32), and more than one block of rows of the backward pass (128).
# fmt: off
LONG = [
    Case("long-full", (1, 2, 2, 160, 513, 72, 40)),
    Case("long-causal-gqa", (1, 4, 2, 300, 300, 64, 64), causal="top_left"),
    Case("long-bottom-right", (2, 4, 2, 200, 413, 64, 64), causal="bottom_right"),
    Case("long-more-rows", (1, 2, 2, 413, 200, 32, 32), causal="bottom_right"),
    Case("long-window", (1, 2, 2, 333, 333, 64, 64), window=(70, 20)),
    Case("long-window-causal", (1, 1, 1, 520, 520, 32, 32), window=(200, 0), causal="top_left"),
    Case("long-window-0-0", (1, 2, 2, 300, 300, 32, 32), window=(0, 0)),
    Case("long-negative-scale", (1, 2, 2, 150, 300, 64, 64), scale=-0.2, causal="top_left"),
    Case("long-scale-zero", (1, 2, 2, 150, 300, 64, 64), scale=0.0),
    Case("long-lengths", (3, 2, 2, 140, 390, 64, 64), key_lengths=True, causal="bottom_right"),
    Case("long-lengths-nan", (2, 2, 1, 140, 390, 64, 64), key_lengths=True, nan_hidden=True),
    Case("long-sinks", (1, 4, 4, 150, 400, 64, 64), sinks=True),
    Case("long-softcap", (1, 2, 2, 150, 300, 64, 64), softcap=2.0, causal="top_left"),
    Case("long-bias", (1, 2, 2, 140, 290, 64, 64), bias="half:1hmn"),
    Case("long-mask", (1, 2, 2, 140, 290, 64, 64), mask="bool:11mn", dead=True),
    Case("long-alibi", (1, 2, 2, 140, 290, 64, 64), alibi="h", causal="bottom_right"),
    Case("long-dropout", (1, 2, 2, 140, 290, 64, 64), dropout_p=0.2, causal="top_left"),
    Case("long-weights", (1, 2, 2, 140, 290, 64, 64), weights="mean", causal="bottom_right"),
    Case("long-weights-heads", (2, 4, 2, 140, 290, 64, 64), weights="heads", sinks=True, key_lengths=True,
         causal="bottom_right"),
    Case("long-weights-mask", (1, 4, 4, 100, 390, 64, 64), weights="mean", mask="bool:11mn", dead=True, alibi="h",
         softcap=4.0, dropout_p=0.2),
    Case("long-weights-blocks", (1, 2, 2, 140, 390, 64, 64), weights="heads", block_map="1h:0.4:64x96",
         window=(150, 40)),
    Case("long-bias-scale-zero", (1, 2, 2, 140, 290, 64, 64), bias="half:1hmn", scale=0.0, causal="top_left"),
    Case("long-very-negative-logits", (1, 2, 2, 150, 300, 64, 64), shift=3.0),
    *(Case(f"long-packed-{c}", (4, 4, 2, 300, 300, 64, 64), packed=((300, 5, 0, 150), (300, 170, 40, 129)), causal=c)
      for c in (None, "bottom_right")),
    *(Case(f"long-blocks-{m}", (1, 4, 2, 300, 413, 64, 64), block_map=m) for m in
      ("1h:0.4:32x32", "1h:0.4:64x96", "11:0.5:128x128", "1h:0.4:48x64")),  # the last: not for tiles of 32 rows
    Case("long-blocks-causal", (2, 2, 2, 300, 300, 64, 64), block_map="bh:0.5:96x64", causal="top_left"),
    Case("long-blocks-whole-rows", (1, 2, 2, 200, 120, 64, 64), block_map="1h:0.5:64x32", dead=True),
    Case("long-blocks-general", (1, 2, 2, 140, 390, 64, 64), block_map="1h:0.6:32x64", softcap=2.0, bias="half:1hmn",
         dropout_p=0.2, weights="mean", window=(150, 40)),
    Case("long-blocks-nan", (2, 2, 1, 140, 390, 64, 64), block_map="1h:0.5:64x64", nan_hidden=True),
    Case("long-D512", (1, 1, 1, 140, 200, 512, 512)),
    Case("long-batch-invariant", (2, 2, 2, 150, 300, 64, 64), batch_invariant=True),
]
# fmt: on


@pytest.fixture(autouse=True)
def _poisoned_memory(poison: None) -> None:
    """torch.empty holds NaN here."""


def test_the_variant_is_the_one_asked_for() -> None:
    assert cpu.info()["isa"] == os.environ["FUSED_ATTENTION_CPU_ISA"] in ("avx512_bf16", "amx", "amx_emulated")


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", CASES + LARGE + LONG, ids=str)
def test_case(case: Case, dtype: str) -> None:
    check(case, "cpu", HALF[dtype])


# Six products of the emulated tiles take their time: of float32 those cases that take the tiles for certain.
@pytest.mark.parametrize("case", [c for c in LONG if not c.nan_hidden and c.weights is None], ids=str)
def test_float32_in_three_parts(case: Case) -> None:
    check(case, "cpu", torch.float32)


def test_float32_that_has_no_parts() -> None:
    """Numbers so small that their last part is none take the vector kernels: nothing of them is lost."""
    for size in (1e-32, 1e-38):
        q, k, v = _inputs(40, 200, torch.float32)
        v = v.clamp(-1, 1) * size
        out = fa.attention(q, k, v, causal="bottom_right")
        assert isinstance(out, Tensor)
        weights = torch.softmax(
            (q.double() @ k.double().repeat_interleave(2, 1).mT / 8).masked_fill(
                torch.ones(40, 200, dtype=torch.bool).triu(161), float("-inf")
            ),
            -1,
        )
        exact = weights @ v.double().repeat_interleave(2, 1)
        torch.testing.assert_close(out / size, (exact / size).float(), rtol=1e-4, atol=1e-5)


def test_float64_takes_the_vector_kernels() -> None:
    for case in CASES:
        if case.name in ("plain", "everything"):
            check(case, "cpu", torch.float64)


def _inputs(m: int, n: int, dtype: torch.dtype, b: int = 2, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(b, 4, m, 64, generator=g).to(dtype)
    k, v = (torch.randn(b, 2, n, 64, generator=g).to(dtype) for _ in range(2))
    return [q, k, v]


def _dout(query: Tensor) -> Tensor:
    """What comes in for the output, which has the query's shape here."""
    return torch.randn(query.shape, generator=torch.Generator().manual_seed(9)).to(query.dtype)


def _both(tensors: list[Tensor], dout: Tensor | None = None, **options: object) -> list[Tensor]:
    """Output and gradients; no gradient comes in for lse."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    with fa.use_backend("cpu"):
        out = fa.attention(*leaves, **options)  # type: ignore[arg-type]
    assert isinstance(out, Tensor)
    return [out.detach(), *torch.autograd.grad(out, leaves, _dout(tensors[0]) if dout is None else dout)]


def _assert_right(tensors: list[Tensor]) -> None:
    """Output and gradients of plain attention against float64."""
    found = _both(tensors)
    spec = make_spec(Inputs(*tensors, *(None,) * 8), Options())  # type: ignore[arg-type]
    dout = _dout(tensors[0])

    def plain(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        out = reference.forward(spec, Inputs(*leaves, *(None,) * 8), compute_dtype=dtype).output  # type: ignore[arg-type]
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]

    exact = [t.double() for t in tensors]
    leaves = [t.requires_grad_() for t in exact]
    group = tensors[0].shape[1] // tensors[1].shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in leaves[1:])
    out = torch.softmax(leaves[0] @ k.mT / tensors[0].shape[-1] ** 0.5, -1) @ v
    wanted = [out.detach(), *torch.autograd.grad(out, leaves, dout.double())]
    for name, a, b, c in zip(("output", "query", "key", "value"), found, plain(tensors[0].dtype), wanted, strict=True):
        assert_close(a, b, c, grad=name != "output", name=name)


@pytest.mark.parametrize("dtype", TYPES)
def test_scores_that_grow_along_the_keys(dtype: str) -> None:
    """Each block of keys has larger scores than the one before: what was summed shrinks each time."""
    q, k, v = _inputs(70, 600, torch.float32)
    q, k = q.abs(), k.abs() * torch.linspace(0.01, 4.0, 600)[:, None]
    _assert_right([t.to(TYPES[dtype]) for t in (q, k, v)])


@pytest.mark.parametrize("dtype", TYPES)
def test_scores_that_fall_along_the_keys(dtype: str) -> None:
    q, k, v = _inputs(70, 600, torch.float32)
    q, k = q.abs(), k.abs() * torch.linspace(4.0, 0.01, 600)[:, None]
    _assert_right([t.to(TYPES[dtype]) for t in (q, k, v)])


@pytest.mark.parametrize("dtype", TYPES)
def test_a_nan_that_is_seen_comes_out(dtype: str) -> None:
    for which in range(3):
        tensors = _inputs(40, 200, TYPES[dtype])
        tensors[which][1, -1, 17, 5] = float("nan")
        out = fa.attention(*tensors)
        with fa.use_backend("reference"):
            expected = fa.attention(*tensors)
        assert isinstance(out, Tensor) and isinstance(expected, Tensor)
        assert torch.equal(out.isnan(), expected.isnan()) and out.isnan().any() and not out.isnan().all()


@pytest.mark.parametrize("options", [{"causal": "bottom_right"}, {"softcap": 3.0, "window": (100, 30)}], ids=str)
def test_thread_count_does_not_change_a_bit(options: dict[str, object]) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        tensors = _inputs(270, 530, torch.bfloat16)
        expected = _both(tensors, **options)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(_both(tensors, **options), expected, strict=True)), threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", TYPES)
def test_rows_that_see_one_key_have_no_gradient_of_their_scores(dtype: str) -> None:
    """The weight is 1 whatever the score: exactly 0, as in plain PyTorch, not what rounding leaves of dP - delta."""
    out, dq, dk, dv = _both(_inputs(300, 300, TYPES[dtype]), window=(0, 0))
    assert not dq.any() and not dk.any() and dv.any() and out.any()


def test_batch_invariant_rows_are_bit_equal() -> None:
    tensors = _inputs(150, 300, torch.bfloat16, b=9)
    dout = _dout(tensors[0])
    whole = _both(tensors, dout, causal="top_left", batch_invariant=True)
    for part in (slice(0, 1), slice(4, 6)):
        alone = _both([t[part] for t in tensors], dout[part], causal="top_left", batch_invariant=True)
        assert all(torch.equal(a, b[part]) for a, b in zip(alone, whole, strict=True))


def test_only_what_needs_a_gradient_gets_one() -> None:
    tensors = _inputs(40, 200, torch.bfloat16)
    all_of_them = _both(tensors)
    for which in range(3):
        leaves = [t.detach().requires_grad_(i == which) for i, t in enumerate(tensors)]
        out = fa.attention(*leaves)
        assert isinstance(out, Tensor)
        (grad,) = torch.autograd.grad(out, leaves[which], _dout(tensors[0]))
        assert torch.equal(grad, all_of_them[1 + which])
