"""Derivatives against finite differences, second derivatives, forward mode, and torch's own checks of the ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import fused_attention as fa
from fused_attention.spec import Inputs, Options

pytestmark = [
    pytest.mark.filterwarnings("ignore::fused_attention.FallbackWarning"),  # second derivatives use the reference
]


def _rand(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def _problem(name: str) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """A function of float64 tensors that all need gradients."""
    torch.manual_seed(0)
    q, k, v = _rand(2, 4, 5, 3), _rand(2, 2, 6, 3), _rand(2, 2, 6, 2)
    bias, sinks = _rand(1, 4, 5, 6), _rand(4)
    dead = torch.rand(2, 1, 5, 6) > 0.4
    dead[:, :, 2] = False
    hiding = torch.randn(5, 6, dtype=torch.float64)
    hiding[1, 3:] = float("-inf")
    seqs = torch.tensor([0, 2, 2, 5])
    simple: dict[str, dict[str, Any]] = {
        "plain": {},
        "causal": {"causal": "bottom_right"},
        "window": {"window": (2, 1), "causal": "bottom_right"},
        "softcap": {"softcap": 1.5},
        "dead": {"mask": dead},
        "float-mask": {"mask": hiding},
        "alibi": {"alibi_slopes": torch.rand(4)},
        "lengths": {"key_lengths": torch.tensor([3, 0])},
        "weights-heads": {"return_weights": "heads", "return_lse": True},
        "weights-mean": {"return_weights": "mean", "mask": dead},
        "blocks": {"block_map": torch.tensor([[True], [False], [True]])[None, None], "block_size": (2, 16)},
    }
    if name in simple:
        options = simple[name]

        def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
            out = fa.attention(q, k, v, **options)
            return out if isinstance(out, Tensor) else tuple(t for t in out if t is not None)

        return run, (q, k, v)
    if name == "bias-sinks":
        return lambda q, k, v, b, s: tuple(fa.attention(q, k, v, bias=b, sinks=s, return_lse=True)[:2]), (
            q, k, v, bias, sinks)  # fmt: skip
    if name == "broadcast-mask":
        return lambda q, k, v, b: fa.attention(q, k, v, mask=b, softcap=2.0), (q, k, v, _rand(2, 1, 1, 6))
    if name == "packed":
        return lambda q, k, v: fa.varlen_attention(q, k, v, seqs, seqs, causal="top_left"), (
            _rand(5, 4, 3), _rand(5, 2, 3), _rand(5, 2, 3))  # fmt: skip
    assert name == "dropout"

    def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(5)
        return fa.attention(q, k, v, dropout_p=0.4)

    return dropped, (q, k, v)


NAMES = [
    "plain", "causal", "window", "softcap", "dead", "float-mask", "alibi", "lengths", "weights-heads",
    "weights-mean", "blocks", "bias-sinks", "broadcast-mask", "packed", "dropout",
]  # fmt: skip


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str, backend: str) -> None:
    run, inputs = _problem(name)
    with fa.use_backend(backend):
        assert gradcheck(run, inputs, fast_mode=name != "plain")


@pytest.mark.parametrize("name", NAMES)
def test_gradgradcheck(name: str) -> None:
    run, inputs = _problem(name)
    with fa.use_backend("cpu"):
        assert gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["plain", "dead", "weights-heads", "bias-sinks"])
def test_forward_mode_agrees_with_reverse_mode(name: str) -> None:
    run, inputs = _problem(name)
    tangents = [torch.randn_like(t) for t in inputs]
    with forward_ad.dual_level():
        out = run(*(forward_ad.make_dual(t.detach(), d) for t, d in zip(inputs, tangents, strict=True)))
        first = out if isinstance(out, Tensor) else out[0]
        pushed = forward_ad.unpack_dual(first).tangent
    out = run(*inputs)
    first = out if isinstance(out, Tensor) else out[0]
    cotangent = torch.randn_like(first)
    pulled = torch.autograd.grad(first, inputs, cotangent, allow_unused=True)
    left = (pushed * cotangent).sum()
    right = torch.stack([(g * d).sum() for g, d in zip(pulled, tangents, strict=True) if g is not None]).sum()
    torch.testing.assert_close(left, right)


def test_functional_transforms() -> None:
    q, k, v = (torch.randn(3, 2, 5, 4, dtype=torch.float64) for _ in range(3))

    def loss(q: Tensor) -> Tensor:
        return fa.attention(q, k, v, causal="top_left").square().sum()

    expected = torch.autograd.grad(loss(q.requires_grad_()), q)[0]
    torch.testing.assert_close(torch.func.grad(loss)(q.detach()), expected)
    mapped = torch.func.vmap(lambda q, k, v: fa.attention(q[None], k[None], v[None])[0])(q, k, v)
    torch.testing.assert_close(mapped, fa.attention(q, k, v))


def test_only_what_needs_a_gradient_gets_one() -> None:
    q, k, v = (torch.randn(1, 2, 5, 4) for _ in range(3))
    k.requires_grad_()
    fa.attention(q, k, v).sum().backward()
    assert q.grad is None and v.grad is None and k.grad is not None
    q, v = q.requires_grad_(), v.requires_grad_()
    out = fa.attention(q, k, v)
    (dv,) = torch.autograd.grad(out.sum(), v)
    assert dv.shape == v.shape


@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck(needs_grad: bool) -> None:
    q, k, v = (torch.randn(2, 4, 5, 8, requires_grad=needs_grad) for _ in range(3))
    packed = tuple(torch.randn(1, 2, 6, 8, requires_grad=needs_grad) for _ in range(3))
    bias = torch.randn(1, 4, 5, 5, requires_grad=needs_grad)
    sinks = torch.randn(4, requires_grad=needs_grad)
    seqs, lengths = torch.tensor([0, 2, 6]), torch.tensor([5, 3])
    blocks = torch.tensor([[[[True], [False]]]])
    samples: list[tuple[Inputs, Options]] = [
        (Inputs(q, k, v), Options(causal="top_left")),
        (Inputs(q, k, v, bias=bias, sinks=sinks, key_lengths=lengths), Options(None, 2, 1, 5.0, 0.3, weights="mean")),
        (Inputs(q, k, v, seed=torch.tensor([7])), Options(dropout_p=0.5, weights="heads")),
        (Inputs(*packed, cu_seqlens_q=seqs, cu_seqlens_k=seqs), Options(max_seqlen_q=4, max_seqlen_k=4)),
        (Inputs(*(t.transpose(1, 2) for t in (q, k, v))), Options()),
        (Inputs(q, k, v, block_map=blocks), Options(block_rows=3, block_columns=16)),
    ]
    for inputs, options in samples:
        torch.library.opcheck(torch.ops.fused_attention.attention.default, (*inputs, *options))


@pytest.mark.parametrize("name", ["plain", "bias-sinks", "weights-mean", "packed", "blocks"])
def test_compiled_is_equal(name: str) -> None:
    run, inputs = _problem(name)

    def loss(*inputs: Tensor) -> Tensor:
        out = run(*inputs)
        outs = (out,) if isinstance(out, Tensor) else out
        return torch.stack([torch.where(o.isfinite(), o, 0.0).square().sum() for o in outs]).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    eager, traced = loss(*inputs), compiled(*inputs)
    torch.testing.assert_close(traced, eager)
    for a, b in zip(torch.autograd.grad(traced, inputs), torch.autograd.grad(eager, inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_with_dynamic_lengths_does_not_recompile() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda q: fa.attention(q, q, q, causal="top_left"), backend=counter, dynamic=True)
    for length in (5, 9, 33, 70):
        q = torch.randn(2, 3, length, 8)
        torch.testing.assert_close(compiled(q), fa.attention(q, q, q, causal="top_left"))
    assert counter.frame_count == 1


def test_exported_program_runs() -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return fa.attention(q, k, v, window=(3, 3))

    q, k, v = (torch.randn(2, 3, 9, 8) for _ in range(3))
    program = torch.export.export(Model(), (q, k, v))
    torch.testing.assert_close(program.module()(q, k, v), fa.attention(q, k, v, window=(3, 3)))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_casts_the_inputs_and_nothing_inside(backend: str) -> None:
    q, k, v = (torch.randn(2, 3, 9, 8, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16), fa.use_backend(backend):
        out = fa.attention(q, k, v)
    assert out.dtype == torch.bfloat16
    with fa.use_backend(backend):
        expected = fa.attention(*(t.detach().bfloat16() for t in (q, k, v)))
    assert isinstance(expected, Tensor) and torch.equal(out, expected)
    if backend == "reference":  # which rounds nothing between the products
        exact = fa.attention(*(t.detach().bfloat16().float() for t in (q, k, v)))
        torch.testing.assert_close(out.float(), exact, rtol=2**-8, atol=0)  # one rounding to bfloat16
    out.float().sum().backward()
    assert q.grad is not None and q.grad.dtype == torch.float32
