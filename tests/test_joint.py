"""Query, key and value in one projection: the same bits as from tensors of their own, and the same derivatives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fused_attention as fa
from fused_attention import autograd, dispatch
from fused_attention.backends import cpu
from fused_attention.joint import joint_attention
from fused_attention.layout import merge_heads, split_joint
from fused_attention.spec import AttentionSpec

H, D = 4, 8
LAYOUTS = pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "length first"])


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[AttentionSpec]]:
    """The calls that read the projection themselves."""
    if "error" in cpu.info():
        pytest.skip("the C++ extension is not built")
    calls: list[AttentionSpec] = []
    true = autograd.run_joint

    def run(spec: AttentionSpec, qkv: Tensor, batch_first: bool) -> Any:
        calls.append(spec)
        return true(spec, qkv, batch_first)

    monkeypatch.setattr(autograd, "run_joint", run)
    yield calls


def _projection(dtype: torch.dtype = torch.float32, length: int = 33) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, length, 3 * H * D, generator=generator, dtype=torch.float64).to(dtype)


def _apart(qkv: Tensor, batch_first: bool, **options: Any) -> tuple[Tensor, Tensor | None]:
    """By views and `attention`."""
    result = fa.attention(*split_joint(qkv, H, batch_first), **options)
    output, weights = (result, None) if isinstance(result, Tensor) else (result.output, result.weights)
    return merge_heads(output, batch_first), weights


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("weights", [None, "mean", "heads"])
@pytest.mark.parametrize("causal", [None, "top_left"])
@pytest.mark.parametrize("length", [1, 5, 130])
def test_the_same_bits(
    batch_first: bool, dtype: torch.dtype, weights: Any, causal: Any, length: int, joined: list[AttentionSpec]
) -> None:
    qkv = _projection(dtype, length).requires_grad_()
    results: list[list[Any]] = []
    for call in (joint_attention, _apart):
        like: Any = {"causal": causal, "return_weights": weights}
        args: Any = (qkv, H, batch_first) if call is joint_attention else (qkv, batch_first)
        output, found = call(*args, **like)
        loss = output.square().sum() + (0 if found is None else found.square().sum())
        results.append([output, found, *torch.autograd.grad(loss, qkv)])
        with torch.no_grad():
            results[-1] += call(*args, **like)
    assert len(joined) == 2
    for mine, apart in zip(*results, strict=True):
        assert (mine is None) == (apart is None) and (mine is None or torch.equal(mine, apart))
    assert results[0][0].is_contiguous()


@LAYOUTS
def test_derivatives(batch_first: bool, joined: list[AttentionSpec]) -> None:
    qkv = _projection(torch.float64, 3)[:2].contiguous().requires_grad_()

    def call(t: Tensor) -> Any:
        return joint_attention(t, H, batch_first, return_weights="mean")

    assert gradcheck(call, (qkv,)) and gradgradcheck(call, (qkv,))
    assert joined


def test_one_result_alone_has_a_gradient(joined: list[AttentionSpec]) -> None:
    qkv = _projection().requires_grad_()
    output, weights = joint_attention(qkv, H, return_weights="heads")
    assert weights is not None
    for mine, apart in zip((output, weights), _apart(qkv, True, return_weights="heads"), strict=True):
        assert apart is not None
        (found,), (wanted,) = (torch.autograd.grad(t.square().sum(), qkv, retain_graph=True) for t in (mine, apart))
        assert torch.equal(found, wanted)


def test_what_goes_by_tensors_of_their_own(joined: list[AttentionSpec]) -> None:
    """The answers are those of `attention` there too."""
    qkv = _projection()
    with fa.use_backend("reference"):
        torch.testing.assert_close(joint_attention(qkv, H)[0], _apart(qkv, True)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = joint_attention(qkv, H)
        assert output.dtype == torch.bfloat16 and torch.equal(output, _apart(qkv, True)[0])
    strided = qkv.transpose(0, 1)
    assert torch.equal(joint_attention(strided, H)[0], _apart(strided, True)[0])
    torch.manual_seed(0)
    dropped = joint_attention(qkv, H, dropout_p=0.5)[0]
    torch.manual_seed(0)
    assert torch.equal(dropped, _apart(qkv, True, dropout_p=0.5)[0])
    with pytest.warns(dispatch.FallbackWarning):
        mapped = torch.func.vmap(lambda t: joint_attention(t, H)[0])(qkv[None])[0]
    torch.testing.assert_close(mapped, _apart(qkv, True)[0])
    assert not joined


@LAYOUTS
def test_nothing_to_do(batch_first: bool) -> None:
    for size in ((0, 5), (5, 0)):
        qkv = torch.zeros(*size, 3 * H * D, requires_grad=True)
        output, weights = joint_attention(qkv, H, batch_first, return_weights="mean")
        assert weights is not None and output.shape == (*size, H * D)
        batch, length = size if batch_first else size[::-1]
        assert weights.shape == (batch, length, length)
        assert torch.autograd.grad(output.sum() + weights.sum(), qkv)[0].shape == qkv.shape
