"""Sizes of zero, everything dropped, and the ways in which torch wraps a call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fused_attention as fa

pytestmark = [pytest.mark.fast, pytest.mark.filterwarnings("error::fused_attention.FallbackWarning")]


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def qkv(b: int = 2, h: int = 4, m: int = 5, n: int = 7) -> list[Tensor]:
    hk = h // 2
    return [rand(b, h, m, 8), rand(b, hk, n, 8), rand(b, hk, n, 6)]


@pytest.mark.parametrize("weights", [None, "mean", "heads"])
@pytest.mark.parametrize("sizes", [{"b": 0}, {"h": 0}, {"m": 0}, {"n": 0}], ids=str)
def test_sizes_of_zero(sizes: dict[str, int], weights: str | None) -> None:
    tensors = qkv(**sizes)
    out = fa.attention(*tensors, return_weights=weights, return_lse=True)
    assert out.output.shape == (*tensors[0].shape[:3], 6) and not out.output.any()
    out.output.sum().backward()
    assert all(t.grad is not None and t.grad.shape == t.shape and not t.grad.any() for t in tensors)
    if weights == "mean":
        assert out.weights is not None and not out.weights.any()


def test_everything_dropped() -> None:
    tensors = qkv()
    out = fa.attention(*tensors, dropout_p=1.0, return_lse=True)
    assert not out.output.any() and out.lse is not None
    torch.testing.assert_close(out.lse, fa.attention(*tensors, return_lse=True).lse)
    assert not any(g.any() for g in torch.autograd.grad(out.output.sum(), tensors))


def test_gradient_through_lse_alone() -> None:
    q, k, v = qkv()
    lse = fa.attention(q, k, v, return_lse=True).lse
    assert lse is not None
    scores = (q * 8**-0.5) @ k.repeat_interleave(2, 1).mT
    for a, b in zip(torch.autograd.grad(lse.sum(), (q, k)), torch.autograd.grad(scores.logsumexp(-1).sum(), (q, k)),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", ["expanded", "transposed"])
def test_incoming_gradient_of_any_strides(layout: str) -> None:
    tensors = qkv()
    out = fa.attention(*tensors)
    given = torch.ones(1).expand_as(out) if layout == "expanded" else torch.randn(2, 4, 6, 5).mT
    for a, b in zip(torch.autograd.grad(out, tensors, given, retain_graph=True),
                    torch.autograd.grad(out, tensors, given.contiguous()), strict=True):  # fmt: skip
        assert torch.equal(a, b)


def test_an_input_changed_in_place_is_noticed() -> None:
    q = rand(1, 1, 3, 4)
    changed = q * 1
    out = fa.attention(changed, changed, changed)
    changed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_checkpoint_draws_the_same_mask_again() -> None:
    tensors = qkv()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fa.attention(q, k, v, dropout_p=0.5)

    torch.manual_seed(0)
    plain = torch.autograd.grad(run(*tensors).square().sum(), tensors)
    torch.manual_seed(0)
    saved = torch.autograd.grad(checkpoint(run, *tensors, use_reentrant=False).square().sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(plain, saved, strict=True))


def test_inference_mode_and_saved_tensor_hooks() -> None:
    tensors = qkv()
    expected = fa.attention(*tensors, causal="bottom_right")
    with torch.inference_mode():
        assert torch.equal(fa.attention(*tensors, causal="bottom_right"), expected)
    with torch.autograd.graph.save_on_cpu():
        out = fa.attention(*tensors, causal="bottom_right")
    for a, b in zip(torch.autograd.grad(out.sum(), tensors), torch.autograd.grad(expected.sum(), tensors), strict=True):
        assert torch.equal(a, b)


def test_window_wider_than_any_integer_of_the_problem() -> None:
    tensors = qkv()
    assert torch.equal(fa.attention(*tensors, window=(2**40, 2**40)), fa.attention(*tensors))


def test_masks_of_few_dimensions_broadcast() -> None:
    tensors = qkv()
    full = fa.attention(*tensors)
    torch.testing.assert_close(fa.attention(*tensors, mask=torch.ones(7, dtype=torch.bool)), full)
    torch.testing.assert_close(fa.attention(*tensors, mask=torch.tensor(0.5)), full)


def test_output_lies_in_memory_in_the_query_s_order() -> None:
    q, k, v = (t.transpose(1, 2) for t in (rand(2, 5, 4, 8), rand(2, 7, 4, 8), rand(2, 7, 4, 8)))
    for backend in ("cpu", "reference"):
        with fa.use_backend(backend):
            assert fa.attention(q, k, v).transpose(1, 2).is_contiguous()
