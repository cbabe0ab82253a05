"""Modules under torch.compile, export, AOTInductor, checkpointing and autocast; the ops that carry them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fused_attention as fa

pytestmark = [
    pytest.mark.filterwarnings("error::fused_attention.FallbackWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]

E, H = 16, 4


class Block(nn.Module):
    """x -> x + attention(x), for one of the modules."""

    def __init__(self, attention: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = attention
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.attention, nn.MultiheadAttention):
            return x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.attention(x)


MODULES: dict[str, Callable[[], Block]] = {
    "MultiheadAttention": lambda: Block(fa.MultiheadAttention(E, H, batch_first=True)),
    "MultiHeadAttention": lambda: Block(fa.MultiHeadAttention(E, H)),
    "SelfAttention": lambda: Block(fa.SelfAttention(E, E)),
    "GroupedQueryAttention": lambda: Block(
        fa.GroupedQueryAttention(E, H, 2, causal="top_left", rope=fa.RotaryEmbedding(E // H), qk_norm_eps=1e-6)
    ),
}


def make(name: str) -> Block:
    torch.manual_seed(0)
    return MODULES[name]()


@pytest.mark.parametrize("name", MODULES)
def test_lengths_and_batches_do_not_recompile(name: str) -> None:
    torch.compiler.reset()
    block = make(name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=True)
    compiled(torch.randn(2, 7, E, requires_grad=True))
    once = counter.frame_count
    for shape in ((2, 5), (3, 9), (4, 33), (5, 70)):
        x = torch.randn(*shape, E, requires_grad=True)
        out, expected = compiled(x), block(x)
        torch.testing.assert_close(out, expected)
        (mine,), (theirs,) = (torch.autograd.grad(y.square().sum(), x) for y in (out, expected))
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == once > 0


@pytest.mark.parametrize("name", MODULES)
def test_exported_once_for_every_length(name: str) -> None:
    block = make(name)
    sizes = ({0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", min=2, max=512)},)
    program = torch.export.export(block, (torch.randn(2, 9, E),), dynamic_shapes=sizes).module()
    for shape in ((2, 9), (3, 33), (5, 2)):
        x = torch.randn(*shape, E)
        torch.testing.assert_close(program(x), block(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MultiheadAttention", "GroupedQueryAttention"])
def test_aot_inductor(name: str, tmp_path: Path) -> None:
    """A package that is compiled ahead of time calls the same kernels, for every length."""
    block = make(name).eval()
    sizes = ({0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", min=2, max=512)},)
    with torch.no_grad():
        program = torch.export.export(block, (torch.randn(2, 9, E),), dynamic_shapes=sizes)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "block.pt2"))
        package = torch._inductor.aoti_load_package(path)
        for shape in ((2, 9), (3, 33)):
            x = torch.randn(*shape, E)
            torch.testing.assert_close(package(x), block(x))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_checkpointing_gives_the_same_gradients(name: str, reentrant: bool) -> None:
    """With dropout, which is drawn again as it was."""
    block = make(name)
    if hasattr(block.attention, "dropout"):
        block.attention.dropout = 0.5
    found = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        x = torch.ones(2, 7, E, requires_grad=True) * torch.arange(7.0)[:, None].sin()
        x.retain_grad()
        block.zero_grad()
        run(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in block.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", MODULES)
def test_autocast_inside_a_graph(name: str) -> None:
    torch.compiler.reset()
    block, x = make(name), torch.randn(2, 7, E)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = compiled(x), block(x)
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)


def _operands(count: int, **options: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 4, 5, 8, generator=generator).requires_grad_(options.get("grad", False)) for _ in range(count)
    ]


_OPTIONS = ("top_left", None, None, None, None, 0.0, False, None, None, None, None, None, None)
SAMPLES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "attention": lambda: (*_operands(3, grad=True), *(None,) * 9, *_OPTIONS),
    "attention_backward": lambda: (
        *_operands(1),
        *(None,) * 2,
        *fa.attention(*_operands(3), causal="top_left", return_lse=True)[:2],
        *_operands(3),
        *(None,) * 9,
        *_OPTIONS,
        "query,key,value",
    ),
    "decode": lambda: (
        *_operands(3),
        *(None,) * 5,  # tables, slopes, sinks, tree
        *(torch.zeros(2, 4, 9, 8) for _ in range(2)),
        torch.tensor([3, 4], dtype=torch.int32),
        *(None,) * 7,  # scales, pages, window, softcap, scale
        False,
        False,
        None,
    ),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_every_op_is_sound(name: str) -> None:
    registered = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("fused_attention::")}
    assert registered == set(SAMPLES), "an op without a sample here"
    torch.library.opcheck(getattr(torch.ops.fused_attention, name).default, SAMPLES[name]())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("kind", MODULES)
def test_jit_trace(kind: str, grad: bool) -> None:
    """What is traced on one input answers for another: no result is a constant."""
    module = MODULES[kind]()
    x, y = torch.randn(2, 3, 5, E).unbind()
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(torch.jit.trace(module, (x,), check_trace=False)(y), module(y))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("function", [fa.attention, fa.scaled_dot_product_attention])
def test_jit_trace_of_functions(function: Callable[..., Any], grad: bool) -> None:
    q, other = torch.randn(2, 2, H, 5, 8).unbind()
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(lambda t: function(t, t, t), (q,), check_trace=False)
        torch.testing.assert_close(traced(other), function(other, other, other))
