"""Second derivatives, forward mode and vmap of every option, in float64, and how `explain` announces them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fused_attention as fa

pytestmark = pytest.mark.filterwarnings("ignore::fused_attention.FallbackWarning")  # transforms use the reference

Run = Callable[..., Any]
B, H, HK, M, N, D, DV = 2, 4, 2, 5, 6, 3, 2


def _rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _hiding(*shape: int) -> Tensor:
    """A float mask that hides some entries, and all of the second row."""
    mask = _rand(*shape).masked_fill(torch.rand(*shape) > 0.6, float("-inf"))
    mask[..., 1, :] = float("-inf")
    return mask


def _dead(*shape: int) -> Tensor:
    mask = torch.rand(*shape) > 0.4
    mask[..., 2, :] = False
    return mask


EVERYTHING: dict[str, Any] = {"causal": "bottom_right", "window": (3, 0), "softcap": 2.0, "dropout_p": 0.2}

# Options that are constant, then those whose tensors are differentiated too. Tensors are drawn after the seed is set.
CONSTANT: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": lambda: {},
    "causal-top-left": lambda: {"causal": "top_left"},
    "causal-bottom-right": lambda: {"causal": "bottom_right"},
    "window": lambda: {"window": (1, 2)},
    "window-causal": lambda: {"window": (2, None), "causal": "bottom_right"},
    "softcap": lambda: {"softcap": 1.5},
    "scale": lambda: {"scale": -0.7},
    "dropout": lambda: {"dropout_p": 0.4},
    "batch-invariant": lambda: {"batch_invariant": True},
    "bool-mask": lambda: {"mask": _dead(B, H, M, N)},
    "bool-mask-of-keys": lambda: {"mask": torch.rand(B, 1, 1, N) > 0.3},
    "hiding-mask": lambda: {"mask": _hiding(M, N)},
    "alibi": lambda: {"alibi_slopes": torch.rand(H), "causal": "bottom_right"},
    "lengths": lambda: {"key_lengths": torch.tensor([4, 0])},
    "lengths-causal": lambda: {"key_lengths": torch.tensor([6, 3]), "causal": "bottom_right"},
    "blocks": lambda: {"block_map": torch.tensor([[[[True], [False]]]]), "block_size": (3, 16), "causal": "top_left"},
    "lse": lambda: {"return_lse": True, "causal": "top_left"},
    "weights-heads": lambda: {"return_weights": "heads", "mask": _dead(B, 1, M, N)},
    "weights-mean": lambda: {"return_weights": "mean", "return_lse": True},
    "weights-dropout": lambda: {"return_weights": "heads", "dropout_p": 0.3},
}
DIFFERENTIATED: dict[str, tuple[Callable[[], dict[str, Tensor]], dict[str, Any]]] = {
    "float-mask": (lambda: {"mask": _rand(B, 1, M, N)}, {}),
    "float-mask-of-keys": (lambda: {"mask": _rand(B, 1, 1, N)}, {"softcap": 2.0}),
    "bias": (lambda: {"bias": _rand(1, H, M, N)}, {"causal": "top_left"}),
    "bias-of-rows": (lambda: {"bias": _rand(H, M, 1)}, {"return_weights": "mean"}),
    "sinks": (lambda: {"sinks": _rand(H)}, {"return_lse": True}),
    "alibi-slopes": (lambda: {"alibi_slopes": torch.rand(H, dtype=torch.float64)}, {}),
    "alibi-slopes-per-batch": (lambda: {"alibi_slopes": torch.rand(B, H, dtype=torch.float64)}, {"causal": "top_left"}),
    "mask-bias-sinks": (
        lambda: {"mask": _rand(M, N), "bias": _rand(B, H, 1, N), "sinks": _rand(H)},
        {"window": (2, 1)},
    ),
    "everything": (lambda: {"bias": _rand(1, H, M, N), "sinks": _rand(H)}, {**EVERYTHING, "return_weights": "mean"}),
}
SIZES = {"mqa": (2, 3, 1, 4, 5, 3, 2), "one-row": (2, 4, 2, 1, 7, 3, 3), "twelve-rows": (1, 2, 2, 12, 9, 2, 4)}
PACKED: dict[str, Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]] = {
    "packed": lambda: ({}, {"causal": "bottom_right"}),
    "packed-lse-sinks": lambda: ({"sinks": _rand(H)}, {"return_lse": True}),
    "packed-alibi-window-softcap": lambda: ({}, {"alibi_slopes": torch.rand(3, H), "window": (2, 1), "softcap": 2.0}),
    "packed-dropout": lambda: ({}, {"dropout_p": 0.3}),
}
NAMES = [*CONSTANT, *DIFFERENTIATED, *SIZES, *PACKED]


def _outputs(out: Any) -> Any:
    return out if isinstance(out, Tensor) else tuple(t for t in out if t is not None)


def problem(name: str) -> tuple[Run, tuple[Tensor, ...]]:
    """A function of float64 tensors, all of which are differentiated."""
    torch.manual_seed(0)
    extra: dict[str, Tensor] = {}
    options: dict[str, Any] = {}
    b, h, hk, m, n, d, dv = SIZES.get(name, (B, H, HK, M, N, D, DV))
    call: Run = fa.attention
    inputs: list[Tensor] = [_rand(b, h, m, d), _rand(b, hk, n, d), _rand(b, hk, n, dv)]
    if name in CONSTANT:
        options = CONSTANT[name]()
    elif name in DIFFERENTIATED:
        make, options = DIFFERENTIATED[name]
        extra = make()
    elif name in PACKED:
        extra, options = PACKED[name]()
        starts = (torch.tensor([0, 2, 2, 5]), torch.tensor([0, 3, 5, 9]))
        inputs = [_rand(5, H, D), _rand(9, HK, D), _rand(9, HK, DV)]

        def call(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Any:
            return fa.varlen_attention(q, k, v, *starts, max_seqlen_q=3, max_seqlen_k=4, **given)

    def run(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Any:
        torch.manual_seed(5)  # the dropout mask
        return _outputs(call(q, k, v, **dict(zip(extra, rest, strict=True)), **options))

    return run, tuple(t.requires_grad_() for t in (*inputs, *extra.values()))


def _backend(name: str) -> str:
    return "reference" if name.startswith("alibi-slopes") else "cpu"  # which has no gradient for the slopes


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives(name: str) -> None:
    run, inputs = problem(name)
    with fa.use_backend(_backend(name)):
        assert gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode(name: str) -> None:
    run, inputs = problem(name)
    assert gradcheck(run, inputs, fast_mode=True, check_forward_ad=True, check_backward_ad=False)


@pytest.mark.parametrize("name", NAMES)
def test_forward_over_reverse_is_reverse_over_reverse(name: str) -> None:
    """Two ways to a Hessian-vector product: `torch.func`, and the double backward of the kernels."""
    run, inputs = problem(name)

    def loss(*tensors: Tensor) -> Tensor:
        outs = run(*tensors)
        return sum(o.sin().sum() for o in ((outs,) if isinstance(outs, Tensor) else outs))  # type: ignore[return-value]

    vectors = tuple(torch.randn_like(t) for t in inputs)
    every = tuple(range(len(inputs)))
    found = torch.func.jvp(torch.func.grad(loss, every), tuple(t.detach() for t in inputs), vectors)[1]
    with fa.use_backend(_backend(name)):
        first = torch.autograd.grad(loss(*inputs), inputs, create_graph=True)
        dot = sum((g * v).sum() for g, v in zip(first, vectors, strict=True))
        expected = torch.autograd.grad(dot, inputs)  # type: ignore[arg-type]
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", NAMES)
def test_vmap(name: str) -> None:
    """Over the query alone, as one call for each."""
    run, inputs = problem(name)
    q, *rest = (t.detach() for t in inputs)
    queries = torch.stack([q, 2.0 * q])
    mapped = torch.func.vmap(lambda q: run(q, *rest), randomness="same")(queries)
    for i, q in enumerate(queries):
        expected = run(q, *rest)
        found = mapped[i] if isinstance(mapped, Tensor) else tuple(t[i] for t in mapped)
        torch.testing.assert_close(found, expected)


def test_third_derivative() -> None:
    run, (q, k, v) = problem("softcap")

    def second(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = run(q, k, v)
        (dq,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
        (dk,) = torch.autograd.grad(dq.cos().sum(), k, create_graph=True)
        return dk

    assert gradcheck(second, (q, k, v), fast_mode=True)


@pytest.mark.fast
def test_explain_announces_it() -> None:
    q, k, v = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    assert any("second derivative" in note for note in fa.explain(q, k, v).notes)
    assert not any("second derivative" in note for note in fa.explain(q.detach(), k.detach(), v.detach()).notes)

    def told(q: Tensor) -> Tensor:
        found = fa.explain(q, k.detach(), v.detach())
        assert found.backend == "reference" and "needs operations that torch can trace" in str(found.reasons["cpu"])
        assert "the reference needs O(M N) memory" in found.notes
        return fa.attention(q, k.detach(), v.detach())

    torch.func.jvp(told, (q.detach(),), (torch.randn_like(q),))
    torch.func.vmap(told)(q.detach()[None])
