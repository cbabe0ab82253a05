"""The backward pass over some of a row's keys, given the output and lse of all: what ring attention is made of.

Few keys are the hard case: where a row's keys fit into one tile, kernels take its softmax anew, which here would be
that of the wrong keys.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fused_attention.dispatch import BACKENDS
from fused_attention.parity.problems import exact64, moved, plain_gradients
from fused_attention.spec import Inputs, Options, Outputs, make_spec

from .cuda_support import emulated, needs_kernels, needs_nvcc
from .numerics import assert_close
from .triton_support import DEVICE, needs_triton

NAMES = ("query", "key", "value")


def check(backend: str, dtype: torch.dtype, device: str = "cpu", head_dim: int = 16) -> None:
    g = torch.Generator().manual_seed(0)
    sizes = [(2, 4, 40, head_dim), (2, 2, 37, head_dim), (2, 2, 37, head_dim)]
    x = Inputs(*(torch.randn(size, generator=g).to(dtype).requires_grad_() for size in sizes))
    o = Options(softcap=2.0)
    spec, kernel = make_spec(x, o), BACKENDS[backend]
    placed = moved(Inputs(*(None if t is None else t.detach() for t in x)), device)  # type: ignore[arg-type]
    out = kernel.forward(spec, placed)
    dout, dlse = (torch.randn(t.shape, generator=g).to(t.dtype) for t in (out.output, out.lse))
    found = {name: torch.zeros(getattr(x, name).shape, dtype=torch.float64) for name in NAMES}
    for begin, end in ((0, 12), (12, 22), (22, 37)):
        # Rows that none of a step's keys concern are not part of it; lse is a strided slice.
        for rows in (slice(0, 15), slice(15, 40)):
            keys = slice(begin, end)
            part = Inputs(placed.query[:, :, rows], placed.key[:, :, keys], placed.value[:, :, keys])
            of_part = replace(make_spec(part, o), gradients=frozenset(NAMES), part_of_keys=True)
            given = Outputs(out.output[:, :, rows], out.lse[:, :, rows], None)
            incoming = (dout.to(device)[:, :, rows], dlse.to(device)[:, :, rows], None)
            grads = kernel.backward(of_part, part, given, incoming)
            for name, span in (("query", rows), ("key", keys), ("value", keys)):
                found[name][:, :, span] += grads[name].cpu().double()
    _, same = plain_gradients(spec, x, (dout, dlse, None), dtype)
    _, exact = exact64(spec, x, (dout, dlse, None))
    for name in NAMES:
        assert_close(found[name].to(dtype), same[name], exact[name], grad=True, name=f"d{name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_on_a_cpu(backend: str, dtype: torch.dtype) -> None:
    check(backend, dtype)


@needs_triton
@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton(dtype: torch.dtype) -> None:
    check("triton", dtype, DEVICE)


@needs_kernels
@needs_nvcc
@pytest.mark.emulator
@pytest.mark.xdist_group("cuda-bf16")
@pytest.mark.parametrize("arch", [80, 90])
def test_cuda_emulated(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with emulated(monkeypatch, arch=arch) as emulator:
        check("cuda", torch.bfloat16, head_dim=64)
    assert any("gradient" in kernel and f"sm{arch}" in kernel for kernel, _ in emulator.reports)
