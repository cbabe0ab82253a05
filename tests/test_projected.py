"""Self-attention with its projections in one call: right in every dtype, the same bits in training, else refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fused_attention as fa
from fused_attention.backends import cpu, params
from fused_attention.dispatch import FallbackWarning
from fused_attention.layout import split_joint
from fused_attention.parity.rule import compare
from fused_attention.projected import Projection, projected_attention

pytestmark = pytest.mark.skipif("error" in cpu.info(), reason="the C++ extension is not built")
LAYOUTS = pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "length first"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[cpu.Projected]]:
    """Those that did it all, whether it pays or not."""
    found: list[cpu.Projected] = []
    true = cpu.Projected.__call__

    def call(self: cpu.Projected, *args: Any) -> Any:
        found.append(self)
        return true(self, *args)

    monkeypatch.setattr(cpu, "projections_pay", lambda dtype, rows, width: rows > 0)
    monkeypatch.setattr(cpu.Projected, "__call__", call)
    yield found


def _problem(size: tuple[int, ...], width: int, dtype: torch.dtype = torch.float64, bias: bool = True) -> list[Any]:
    """x, and weight and bias twice."""
    g = torch.Generator().manual_seed(0)
    shapes = [(*size, width), (3 * width, width), (3 * width,), (width, width), (width,)]
    drawn = [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]
    for i in (1, 3):
        drawn[i] /= width**0.5
    found: list[Any] = [t.to(dtype) for t in drawn]
    return found if bias else [found[0], found[1], None, found[3], None]


def _one(tensors: list[Any], heads: int, batch_first: bool = True, **options: Any) -> tuple[Tensor, Tensor | None]:
    x, w1, b1, w2, b2 = tensors
    return projected_attention(x, Projection(w1, b1), Projection(w2, b2), heads, batch_first, **options)


def _plain(tensors: list[Any], heads: int, batch_first: bool, causal: bool) -> list[Tensor]:
    """In plain PyTorch: the output, and the weights of all heads."""
    x, w1, b1, w2, b2 = tensors
    q, k, v = split_joint(F.linear(x, w1, b1), heads, batch_first)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1) > 0, float("-inf"))
    weights = scores.softmax(-1)
    merged = (weights @ v).permute((0, 2, 1, 3) if batch_first else (2, 0, 1, 3)).flatten(2)
    return [F.linear(merged, w2, b2), weights]


def _check(found: list[Any], same: list[Any], exact: list[Any], grad: bool) -> None:
    for i, (out, plain, ref) in enumerate(zip(found, same, exact, strict=True)):
        if ref.dtype == out.dtype:  # float64 has nothing above it
            torch.testing.assert_close(out, ref, rtol=1e-12, atol=1e-12)
            continue
        figures = compare(out, plain, ref, grad)
        assert figures["error"] <= figures["allowed"], (i, figures)


@pytest.mark.fast
@LAYOUTS
@DTYPES
@pytest.mark.parametrize("causal", [None, "top_left"])
@pytest.mark.parametrize(
    ("size", "width", "heads"),
    [((1, 8), 64, 4), ((3, 5), 40, 5), ((2, 131), 96, 2), ((1, 1), 600, 4), ((2, 20), 33, 3)],
)
def test_values_and_gradients(
    size: tuple[int, int],
    width: int,
    heads: int,
    causal: Any,
    dtype: torch.dtype,
    batch_first: bool,
    calls: list[cpu.Projected],
) -> None:
    """By the tolerance rule, beside plain PyTorch; and whether gradients are wanted does not change a bit."""
    tensors = _problem(size, width, dtype)
    results = []
    for one, kind in ((True, dtype), (False, dtype), (False, torch.float64)):
        leaves = [t.to(kind).requires_grad_() for t in (t.detach() for t in tensors)]
        if one:
            found: list[Any] = list(_one(leaves, heads, batch_first, causal=causal, return_weights="heads"))
        else:
            found = _plain(leaves, heads, batch_first, causal is not None)
        g = torch.Generator().manual_seed(1)
        loss = sum((y * torch.randn(y.shape, generator=g).to(kind)).sum() for y in found)
        assert isinstance(loss, Tensor)
        results.append((found, list(torch.autograd.grad(loss, leaves))))
    for i, grad in enumerate((False, True)):
        _check(*(r[i] for r in results), grad=grad)  # type: ignore[misc]
    with torch.no_grad():
        again = _one(tensors, heads, batch_first, causal=causal, return_weights="heads")
    assert all(torch.equal(a, b) for a, b in zip(again, results[0][0], strict=True))
    assert len(calls) == 2


@pytest.mark.fast
@LAYOUTS
@DTYPES
def test_options(dtype: torch.dtype, batch_first: bool, calls: list[cpu.Projected]) -> None:
    tensors = _problem((2, 9), 32, dtype, bias=False)
    with torch.no_grad():
        alone, nothing = _one(tensors, 4, batch_first)
        output, mean = _one(tensors, 4, batch_first, return_weights="mean")
        same, exact = (
            _plain([t if t is None else t.to(d) for t in tensors], 4, batch_first, False)
            for d in (dtype, torch.float64)
        )
    assert nothing is None and mean is not None
    averaged = [[plain[0], plain[0], plain[1].mean(1)] for plain in (same, exact)]
    _check([alone, output, mean], *averaged, grad=False)
    assert len(calls) == 2


@pytest.mark.fast
def test_derivatives(calls: list[cpu.Projected]) -> None:
    tensors = [t.requires_grad_() for t in _problem((2, 3), 8)]

    def call(*leaves: Tensor) -> Any:
        return _one(list(leaves), 2, return_weights="mean")

    assert gradcheck(call, tensors) and gradgradcheck(call, tensors)
    assert calls


@pytest.mark.fast
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (0, 3), (1, 2, 4)], ids=str)
@pytest.mark.parametrize("loss_of", [(0,), (1,), (0, 1)], ids=["output", "weights", "both"])
def test_some_gradients(wanted: tuple[int, ...], loss_of: tuple[int, ...], calls: list[cpu.Projected]) -> None:
    found = []
    for f in (_one, lambda t, h, **o: _plain(t, h, True, False)):
        tensors = [t.requires_grad_(i in wanted) for i, t in enumerate(_problem((2, 7), 16))]
        results = f(tensors, 2, return_weights="heads")
        loss = sum(results[i].square().sum() for i in loss_of)
        if not loss.requires_grad:  # of the weights by the second projection
            found.append([None] * len(wanted))
            continue
        found.append(list(torch.autograd.grad(loss, [tensors[i] for i in wanted], allow_unused=True)))
    for mine, plain in zip(*found, strict=True):
        assert (mine is None or not mine.any()) if plain is None else torch.allclose(mine, plain)
    assert len(calls) == 1


@pytest.mark.fast
def test_what_goes_by_itself(calls: list[cpu.Projected]) -> None:
    """Three steps, with the same answer."""
    tensors = _problem((2, 9), 32, torch.float32)
    expected = _plain(tensors, 4, True, False)[0]
    with fa.use_backend("reference"):
        torch.testing.assert_close(_one(tensors, 4)[0], expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _one(tensors, 4)[0].dtype == torch.bfloat16
    strided = [tensors[0].transpose(0, 1).contiguous().transpose(0, 1), *tensors[1:]]
    torch.testing.assert_close(_one(strided, 4)[0], expected)
    turned = [tensors[0], tensors[1].t().contiguous().t(), *tensors[2:]]
    torch.testing.assert_close(_one(turned, 4)[0], expected)

    class Kind(Tensor):
        pass

    special = [*tensors[:3], tensors[3].as_subclass(Kind), tensors[4]]
    torch.testing.assert_close(_one(special, 4)[0].as_subclass(Tensor), expected)

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return function(*args, **(kwargs or {}))

    with Mode():
        torch.testing.assert_close(_one(tensors, 4)[0], expected)
    torch.manual_seed(0)
    _one(tensors, 4, dropout_p=0.5)
    with pytest.raises(RuntimeError):  # dtypes that differ, as of F.linear
        _one([tensors[0], tensors[1].double(), *tensors[2:]], 4)
    with pytest.raises(RuntimeError):  # sizes too
        _one([*tensors[:3], tensors[3][:, :16].contiguous(), tensors[4]], 4)
    primal = torch.autograd.forward_ad
    with primal.dual_level(), pytest.warns(FallbackWarning):
        dual = primal.make_dual(tensors[0], torch.ones_like(tensors[0]))
        assert primal.unpack_dual(_one([dual, *tensors[1:]], 4)[0]).tangent is not None
    assert not calls


@pytest.mark.fast
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_projection_alone(dtype: torch.dtype, threads: int) -> None:
    """Rows and columns of several tasks, slices of terms, and edges of all of them."""
    assert params._C is not None
    g = torch.Generator().manual_seed(0)
    code = params.DTYPE_CODES[dtype]
    for rows, width, out in ((1, 1, 1), (7, 31, 97), (33, 64, 192), (400, 40, 100), (50, 1100, 130), (193, 513, 96)):
        x, w, b = (torch.randn(s, generator=g).to(dtype) for s in ((rows, width), (out, width), (out,)))
        y = torch.full((rows, out), float("nan"), dtype=dtype)
        args = {"rows": rows, "in": width, "out": out, "threads": threads}
        args |= {n: (t.data_ptr(), code, t.stride(0)) for n, t in (("x", x), ("w", w), ("b", b), ("y", y))}
        params._C.linear(args)
        _check([y], [F.linear(x, w, b)], [F.linear(x.double(), w.double(), b.double())], grad=False)
        x[0, 0], w[0, 0] = float("inf"), 1.0
        params._C.linear(args)
        assert y[0, 0] == float("inf") and y[1:].isfinite().all()


@pytest.mark.fast
def test_the_module_uses_it_where_it_pays() -> None:
    if not cpu.projections_pay(torch.bfloat16, 8, 64):
        pytest.skip(f"the kernels for {cpu.info()['isa']} leave projections to PyTorch")
    module = fa.MultiheadAttention(64, 4, batch_first=True, dtype=torch.bfloat16)
    x = torch.randn(1, 8, 64, dtype=torch.bfloat16)
    output, _ = module(x, x, x)
    assert "Projected" in type(output.grad_fn).__name__
    assert not cpu.projections_pay(torch.float32, 10**6, 64) and not cpu.projections_pay(torch.float64, 8, 64)
    assert not cpu.projections_pay(torch.bfloat16, 0, 64)


OTHERS = [isa for key in ("isas", "isas_for_tests") for isa in cpu.info().get(key, []) if isa != cpu.info()["isa"]]


@pytest.mark.slow
@pytest.mark.parametrize("isa", OTHERS)
def test_on_the_other_instruction_sets(isa: str) -> None:
    files = [__file__, str(Path(__file__).with_name("test_shared_tiles.py"))]
    chosen = ["-m", "not slow", "-k", "projection_alone or head_alone or waves"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, *chosen]
    environment = os.environ | {"FUSED_ATTENTION_CPU_ISA": isa}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:]
