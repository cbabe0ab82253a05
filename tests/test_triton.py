"""Every option of the Triton kernels, forward and backward, by the tolerance rule, in the interpreter or on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import fused_attention as fa
from fused_attention.backends import reference
from fused_attention.backends.triton import backward, configs, forward
from fused_attention.spec import Inputs, Options, make_spec

from .cases import CASES as ALL
from .cases import LARGE, Case, check, make
from .triton_support import DEVICE, INTERPRETED, needs_triton

pytestmark = [pytest.mark.triton, needs_triton]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# The interpreter takes some seconds for what a GPU does in microseconds.
VALUES = 2048 if INTERPRETED else 16384


def _values(case: Case) -> int:
    """A row or a column alone has few numbers: those are drawn as often as for the other backends."""
    return 16384 if min(case.sizes[3:5]) < 4 else VALUES


def _fewer_heads(case: Case) -> Case:
    b, h, hk, *rest = case.sizes
    return replace(case, sizes=(b, h // 2, hk // 2, *rest)) if INTERPRETED and hk % 2 == 0 else case


CASES = [_fewer_heads(case) for case in ALL]
BY_NAME = {case.name: case for case in CASES}
TELLING = ("plain", "everything", "gqa-8:2", "packed-everything", "lengths-nan")


@pytest.fixture(autouse=True)
def _poisoned_memory(poison: None) -> None:
    """torch.empty holds NaN here, so that what a kernel does not write is seen."""


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_option(case: Case, dtype: str) -> None:
    check(case, "triton", DTYPES[dtype], _values(case), DEVICE)


@pytest.mark.parametrize("case", [c for c in CASES if not INTERPRETED or c.name in TELLING], ids=str)
def test_option_in_bfloat16(case: Case) -> None:
    check(case, "triton", torch.bfloat16, VALUES, DEVICE)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_larger_shape(case: Case, dtype: str) -> None:
    check(case, "triton", DTYPES[dtype], _values(case), DEVICE)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the configs choose descriptors themselves")
@pytest.mark.parametrize("name", ["plain", "D64-DV64", "mqa-6:1", "packed-bottom_right", "lengths-nan-dead-causal"])
def test_tensor_descriptors_and_separate_key_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only some chips' configs choose: tiles through descriptors, dK and dV one after the other."""
    other = configs.Config(32, 32, 4, 1, descriptors=True, together=False)
    for kernel in ("forward", "key_gradient", "query_gradient"):
        monkeypatch.setattr(configs, kernel, lambda arch, spec: other)
    # Another batch size, so that no plan made with the usual configs is found again.
    case = BY_NAME[name]
    check(replace(case, sizes=(case.sizes[0] if case.packed else 3, *case.sizes[1:])), "triton", torch.float16, VALUES)


@pytest.mark.parametrize("options", [Options(causal="top_left"), Options(window_left=3, window_right=4), Options()])
def test_values_that_are_not_finite_reach_only_rows_that_see_them(options: Options) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 70, 16) for _ in range(3))
    mask = torch.rand(1, 1, 70, 70) > 0.4
    for row, value in ((5, float("nan")), (40, float("inf")), (41, float("-inf")), (69, float("inf"))):
        v[:, :, row, row % 16] = value
    x = Inputs(q, k, v, mask=mask if options == Options() else None)
    spec = make_spec(x, options)
    got = forward(spec, Inputs(*(None if t is None else t.to(DEVICE) for t in x))).output.cpu()  # type: ignore[arg-type]
    expected = reference.forward(spec, x).output
    assert not expected.isfinite().all() and expected.isfinite().any()
    torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.parametrize("name", ["bias-float:1hmn", "packed-everything"])
def test_two_runs_give_the_same_bits(name: str) -> None:
    x, o = make(BY_NAME[name], torch.float16)
    x = Inputs(*(None if t is None else t.to(DEVICE) for t in x))  # type: ignore[arg-type]
    names = frozenset({"query", "key", "value", "bias" if x.bias is not None else "sinks"})
    spec = replace(make_spec(x, o), gradients=names)

    def run() -> dict[str, Any]:
        out = forward(spec, x)
        grads = backward(spec, x, out, (torch.ones_like(out.output), torch.ones_like(out.lse), None))
        return {"output": out.output, "lse": out.lse, **grads}

    first, second = run(), run()
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_rows_do_not_depend_on_the_batch() -> None:
    q, k, v = (torch.randn(3, 4, 40, 16, device=DEVICE) for _ in range(3))
    whole = forward(make_spec(Inputs(q, k, v), Options(batch_invariant=True)), Inputs(q, k, v)).output
    one = Inputs(q[1:2], k[1:2], v[1:2])
    assert torch.equal(forward(make_spec(one, Options(batch_invariant=True)), one).output, whole[1:2])


def test_through_the_public_function() -> None:
    q, k, v = (torch.randn(1, 4, 20, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    with fa.use_backend("triton"):
        fa.attention(q, k, v, causal="top_left", softcap=5.0).square().sum().backward()
    found = [t.grad for t in (q, k, v)]
    for t in (q, k, v):
        t.grad = None
    with fa.use_backend("reference"):
        fa.attention(q, k, v, causal="top_left", softcap=5.0).square().sum().backward()
    for t, grad in zip((q, k, v), found, strict=True):
        torch.testing.assert_close(grad, t.grad, atol=2e-5, rtol=2e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: captures a CUDA graph")
def test_cuda_graph_captures_forward_and_backward() -> None:
    q, k, v = (torch.randn(2, 4, 200, 64, device="cuda", dtype=torch.float16, requires_grad=True) for _ in range(3))

    def step() -> tuple[torch.Tensor, ...]:
        out = fa.attention(q, k, v, causal="top_left")
        return (out, *torch.autograd.grad(out.square().sum(), (q, k, v)))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for t in (q, k, v):
            t.copy_(torch.randn_like(t))
    graph.replay()
    for got, expected in zip(captured, step(), strict=True):
        assert torch.equal(got, expected)
