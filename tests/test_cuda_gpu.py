"""The CUDA kernels on a GPU: the cases that the emulator runs, and what only a GPU can show."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fused_attention import attention, dispatch
from fused_attention.backends import cuda
from fused_attention.spec import Device, Inputs, Options, make_spec

from . import test_cuda_fp8, test_decode
from .cases import CASES, LARGE, Case, check, make
from .numerics import assert_close
from .test_cuda_emulated import WIDE, _runs_here

_gpu = torch.cuda.is_available()
_reason = cuda.unavailable(Device.of(torch.empty(0, device="cuda"))) if _gpu else "no GPU"
pytestmark = pytest.mark.skipif(_reason is not None, reason=f"the CUDA kernels do not run here: {_reason}")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True)
def _poisoned_memory(poison: None) -> None:
    """torch.empty holds NaN here, so that what a kernel does not write is seen."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*filter(None, map(_runs_here, [*CASES, *LARGE])), *WIDE], ids=str)
def test_option(case: Case, dtype: str) -> None:
    check(case, "cuda", DTYPES[dtype], device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [c for c in test_decode.CASES if max(c.sizes[4:]) <= 256], ids=str)
def test_decoding(case: test_decode.Case, dtype: str) -> None:
    codes = case.kv_dtype if case.kv_dtype in (torch.int8, torch.float8_e4m3fn) else None
    test_decode.check(replace(case, dtype=DTYPES[dtype], kv_dtype=codes), "cuda", device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", test_cuda_fp8.CASES, ids=str)
def test_float8(case: Case, dtype: str) -> None:
    """The output by the rule. The tensor cores sum float8 with fewer bits than lse is held to in the emulator."""
    x, options = make(case, DTYPES[dtype])
    spec = make_spec(x, options._replace(precision="fp8"))
    if reason := cuda.supports(spec, Device.of(torch.empty(0, device="cuda"))):
        pytest.skip(reason)
    out = cuda.forward(spec, Inputs(*(None if t is None else t.cuda() for t in x)))
    want = test_cuda_fp8.expected(spec, x)
    assert_close(out.output.cpu(), want.same, want.exact, name="output")
    assert torch.equal(out.lse.cpu().isfinite(), want.lse.isfinite())


def test_two_runs_give_the_same_bits() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 8, 700, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    bias = torch.randn(1, 8, 700, 700, device="cuda")
    x = Inputs(q, k, v, bias=bias)
    spec = make_spec(x._replace(**{n: getattr(x, n).requires_grad_() for n in ("query", "key", "value", "bias")}),
                     Options(causal="top_left"))  # fmt: skip

    def run() -> list[torch.Tensor]:
        with torch.no_grad():
            out = cuda.forward(spec, x)
            grads = cuda.backward(spec, x, out, (torch.ones_like(out.output), None, None))
        return [out.output, out.lse, *grads.values()]

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


def test_a_cuda_graph_holds_forward_and_backward() -> None:
    q, k, v = (torch.randn(2, 4, 200, 64, device="cuda", dtype=torch.float16, requires_grad=True) for _ in range(3))

    def step() -> tuple[torch.Tensor, ...]:
        with dispatch.use_backend("cuda"):
            out = attention(q, k, v, causal="top_left")
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
