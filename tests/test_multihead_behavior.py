"""What users of `torch.nn.MultiheadAttention` rely on beside its numbers, and the promises it does not make."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import fused_attention.nn as fused
from fused_attention import FallbackWarning

pytestmark = [pytest.mark.fast, pytest.mark.filterwarnings("error::fused_attention.FallbackWarning")]

E, H = 8, 2
MODES = ("train", "eval", "no_grad")
CONSTRUCTORS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"add_bias_kv": True, "add_zero_attn": True},
    {"kdim": 5, "vdim": 7, "dropout": 0.25},
    {"batch_first": True, "dtype": torch.float64},
]
HIDDEN = torch.tensor([[False, False, True], [False, True, True]])  # a right-padded batch of two


def pair(**options: Any) -> tuple[nn.MultiheadAttention, fused.MultiheadAttention]:
    """PyTorch's module and ours with the same weights, biases not zero."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(E, H, **options)
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.5)
    ours = fused.MultiheadAttention(E, H, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def in_mode(module: nn.Module, mode: str, call: Callable[[], Any]) -> Any:
    module.train(mode == "train")
    with torch.set_grad_enabled(mode != "no_grad"):
        return call()


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- construction, state ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", CONSTRUCTORS, ids=str)
def test_construction_gives_the_parameters_of_torch(options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    theirs = nn.MultiheadAttention(E, H, **options)
    torch.manual_seed(1)
    ours = fused.MultiheadAttention(E, H, **options)
    assert isinstance(ours, nn.MultiheadAttention)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    for a, b in ((ours, theirs), (theirs, ours)):
        a.load_state_dict(b.state_dict(), strict=True)
        a.load_state_dict(b.state_dict(), strict=True, assign=True)
    torch.manual_seed(2)
    ours._reset_parameters()
    torch.manual_seed(2)
    theirs._reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("arguments", [(0, 1), (4, 0), (5, 2)], ids=str)
def test_construction_fails_as_in_torch(arguments: tuple[int, int]) -> None:
    with pytest.raises(Exception) as theirs:
        nn.MultiheadAttention(*arguments)
    with pytest.raises(type(theirs.value)):
        fused.MultiheadAttention(*arguments)


def test_construction_on_meta_then_materialised() -> None:
    ours = fused.MultiheadAttention(E, H, device="meta")
    x = torch.randn(3, 2, E, device="meta")
    assert ours(x, x, x)[0].shape == (3, 2, E)
    ours = ours.to_empty(device="cpu")
    ours.out_proj.reset_parameters()  # whose weight _reset_parameters leaves alone, as in torch
    ours._reset_parameters()
    x = torch.randn(3, 2, E)
    assert ours(x, x, x)[0].isfinite().all()


def test_copies() -> None:
    _, ours = pair()
    x = torch.randn(3, 2, E)
    expected = ours(x, x, x)[0]
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(buffer, weights_only=False)]
    for other in copies:
        assert type(other) is fused.MultiheadAttention
        assert torch.equal(other(x, x, x)[0], expected)
        assert other._qkv_same_embed_dim is False
    assert ours.to(torch.float64)(x.double(), x.double(), x.double())[0].dtype == torch.float64


def test_functional_call_and_gradient_of_it() -> None:
    warnings.simplefilter("ignore", FallbackWarning)  # transforms take the reference
    theirs, ours = pair(dtype=torch.float64)
    x = torch.randn(3, 2, E, dtype=torch.float64)
    doubled = {n: 2 * p.detach() for n, p in ours.named_parameters()}
    out = [torch.func.functional_call(m, doubled, (x, x, x))[0] for m in (theirs, ours)]
    close(out[1], out[0])

    def loss(module: nn.Module, parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, parameters, (x, x, x))[0].square().sum()

    expected = torch.func.grad(lambda p: loss(theirs, p))(doubled)
    for name, value in torch.func.grad(lambda p: loss(ours, p))(doubled).items():
        close(value, expected[name])


def test_parametrization_and_pruning_of_in_proj() -> None:
    class Double(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    x = torch.randn(3, 2, E)
    for name in ("in_proj_bias", "in_proj_weight"):
        theirs, ours = pair()
        for module in (theirs, ours):
            nn.utils.parametrize.register_parametrization(module, name, Double())
        close(ours(x, x, x)[0], theirs(x, x, x)[0])
        for module in (theirs, ours):
            nn.utils.parametrize.remove_parametrizations(module, name)
            prune.l1_unstructured(module, name, amount=0.5)
        close(ours(x, x, x)[0], theirs(x, x, x)[0])
        for module in (theirs, ours):
            prune.remove(module, name)
        close(ours(x, x, x)[0], theirs(x, x, x)[0])


# --- masks and the causal hint ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("need", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("padding", [None, HIDDEN])
def test_causal_hint_without_mask_raises_in_every_mode(
    mode: str, need: bool, batch_first: bool, padding: Tensor | None
) -> None:
    _, ours = pair(batch_first=batch_first)
    x = torch.randn((2, 3, E) if batch_first else (3, 2, E))
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        in_mode(ours, mode, lambda: ours(x, x, x, padding, need_weights=need, is_causal=True))


@pytest.mark.parametrize("mode", MODES)
def test_causal_hint_is_believed_only_where_nothing_else_counts(mode: str) -> None:
    _, ours = pair(batch_first=True)
    x = torch.randn(2, 3, E)
    causal = torch.ones(3, 3, dtype=torch.bool).triu(1)
    nothing = torch.zeros(3, 3, dtype=torch.bool)  # not a causal mask: a false promise shows which one was used

    def call(mask: Tensor, hint: bool, padding: Tensor | None = None, need: bool = False) -> Tensor:
        return in_mode(ours, mode, lambda: ours(x, x, x, padding, need, mask, is_causal=hint))[0]

    close(call(nothing, True), call(causal, False))
    close(call(nothing, True, need=True), call(nothing, False, need=True))
    close(call(nothing, True, padding=HIDDEN), call(nothing, False, padding=HIDDEN))
    assert call(torch.zeros(9, 9, dtype=torch.bool), True).shape == x.shape  # the mask is not read


def test_a_bool_mask_hides_where_it_is_true() -> None:
    _, ours = pair()
    x = torch.randn(3, 2, E)
    weights = ours(x, x, x, HIDDEN, average_attn_weights=False)[1]
    assert (weights[HIDDEN[:, None, None].expand_as(weights)] == 0).all()
    mask = torch.rand(2 * H, 3, 3) < 0.4
    mask[..., 0] = False
    weights = ours(x, x, x, attn_mask=mask, average_attn_weights=False)[1]
    assert torch.equal(weights == 0, mask.view(2, H, 3, 3))


def test_mixed_masks_merge_with_torchs_warning() -> None:
    theirs, ours = pair()
    x = torch.randn(3, 2, E)
    bias = torch.randn(3, 3)
    for padding, mask in ((HIDDEN, bias), (torch.randn(2, 3), torch.ones(3, 3, dtype=torch.bool).triu(1))):
        with pytest.warns(UserWarning, match="mismatched key_padding_mask and attn_mask is deprecated"):
            expected = theirs(x, x, x, padding, attn_mask=mask)
        with pytest.warns(UserWarning, match="mismatched key_padding_mask and attn_mask is deprecated"):
            got = ours(x, x, x, padding, attn_mask=mask)
        close(got[0], expected[0])
        close(got[1], expected[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ours(x, x, x, HIDDEN, attn_mask=torch.ones(3, 3, dtype=torch.bool).triu(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", ["attn", "padding", "both"])
def test_mask_of_another_dtype(dtype: torch.dtype, mask_dtype: torch.dtype, which: str) -> None:
    """Refused where both of PyTorch's paths refuse, accepted where at least one accepts."""
    theirs, ours = pair(dtype=dtype)
    x = torch.randn(3, 2, E, dtype=dtype)
    masks = {
        "key_padding_mask": torch.zeros(2, 3, dtype=mask_dtype) if which != "attn" else None,
        "attn_mask": torch.zeros(3, 3, dtype=mask_dtype) if which != "padding" else None,
    }
    accepted = False
    for need in (True, False):
        try:
            theirs(x, x, x, need_weights=need, **masks)
            accepted = True
        except RuntimeError:
            pass
    for need in (True, False):
        if accepted:
            assert ours(x, x, x, need_weights=need, **masks)[0].dtype == dtype
        else:
            with pytest.raises(RuntimeError, match="mask"):
                ours(x, x, x, need_weights=need, **masks)


# --- rows that see nothing, empty things --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("need", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_dead_batch_element(mode: str, need: bool, batch_first: bool) -> None:
    _, ours = pair(batch_first=batch_first)
    x = torch.randn((2, 3, E) if batch_first else (3, 2, E), requires_grad=True)
    padding = torch.tensor([[False, False, True], [True, True, True]])
    out, weights = in_mode(ours, mode, lambda: ours(x, x, x, padding, need_weights=need))
    dead = out[1] if batch_first else out[:, 1]
    assert torch.equal(dead, ours.out_proj.bias.expand_as(dead))
    if need:
        assert torch.equal(weights[1], torch.zeros(3, 3))
        close(weights[0].sum(-1), torch.ones(3))
    if mode != "no_grad":
        (out.square().sum() + (weights.square().sum() if need else 0)).backward()
        assert all(t.grad is not None and t.grad.isfinite().all() for t in (x, *ours.parameters()))
        ours.zero_grad()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("need", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("padding", [True, False])
def test_empty_batch(mode: str, need: bool, batch_first: bool, padding: bool) -> None:
    _, ours = pair(batch_first=batch_first)
    x = torch.randn((0, 3, E) if batch_first else (3, 0, E))
    mask = torch.zeros(0, 3, dtype=torch.bool) if padding else None
    out, weights = in_mode(ours, mode, lambda: ours(x, x, x, mask, need_weights=need))
    assert out.shape == x.shape
    assert (weights.shape == (0, 3, 3)) if need else (weights is None)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("need", [True, False])
def test_no_keys_and_no_queries(mode: str, need: bool) -> None:
    _, ours = pair()
    query, nothing = torch.randn(3, 2, E), torch.randn(0, 2, E)
    out, weights = in_mode(ours, mode, lambda: ours(query, nothing, nothing, need_weights=need))
    assert torch.equal(out, ours.out_proj.bias.expand_as(out))
    assert weights is None or weights.shape == (2, 3, 0)
    out, weights = in_mode(ours, mode, lambda: ours(nothing, query, query, need_weights=need))
    assert out.shape == (0, 2, E) and (weights is None or weights.shape == (2, 0, 3))


# --- shapes, dtypes, weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [True, False])
def test_unbatched_input_gives_unbatched_results(batch_first: bool) -> None:
    theirs, ours = pair(batch_first=batch_first)
    query, key = torch.randn(5, E), torch.randn(3, E)
    for average in (True, False):
        options = {"average_attn_weights": average, "key_padding_mask": HIDDEN[0]}
        expected = theirs(query, key, key, **options)
        got = ours(query, key, key, **options)
        assert got[0].shape == (5, E) and got[1].shape == ((5, 3) if average else (H, 5, 3))
        close(got[0], expected[0])
        close(got[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    theirs, ours = pair(add_bias_kv=True)
    x = torch.randn(3, 2, E)
    for need in (True, False):
        with torch.autocast("cpu", dtype=dtype):
            expected = theirs(x, x, x, HIDDEN, need_weights=need)
            got = ours(x, x, x, HIDDEN, need_weights=need)
        assert got[0].dtype == dtype
        torch.testing.assert_close(got[0], expected[0], rtol=0.05, atol=0.05)
        if need:
            assert got[1].dtype == dtype
            torch.testing.assert_close(got[1], expected[1], rtol=0.05, atol=0.02)
    got[0].float().sum().backward()
    assert ours.in_proj_weight.grad.dtype == torch.float32


@pytest.mark.parametrize("average", [True, False])
def test_dropout_drops_the_weights_that_come_back(average: bool) -> None:
    _, ours = pair(dropout=0.5, dtype=torch.float64)
    x = torch.randn(7, 2, E, dtype=torch.float64)
    plain = ours.eval()(x, x, x, average_attn_weights=False)
    assert torch.equal(ours(x, x, x)[0], plain[0])  # none in eval
    ours.train()
    torch.manual_seed(3)
    out, weights = ours(x, x, x, average_attn_weights=False)
    assert 0.2 < (weights == 0).double().mean() < 0.8
    kept = weights != 0
    torch.testing.assert_close(weights[kept], 2 * plain[1][kept])
    value = torch.nn.functional.linear(x, ours.in_proj_weight[2 * E :], ours.in_proj_bias[2 * E :])
    heads = value.view(7, 2, H, E // H).permute(1, 2, 0, 3)
    torch.testing.assert_close(out, ours.out_proj((weights @ heads).permute(2, 0, 1, 3).flatten(-2)))
    torch.manual_seed(3)
    again = ours(x, x, x, average_attn_weights=average)
    assert torch.equal(again[0], out)
    torch.testing.assert_close(again[1], weights.mean(1) if average else weights)
    torch.manual_seed(3)
    torch.testing.assert_close(ours(x, x, x, need_weights=False)[0], out)


def test_derivatives_of_higher_order_and_forward_mode_with_weights() -> None:
    warnings.simplefilter("ignore", FallbackWarning)  # transforms take the reference
    _, ours = pair(dtype=torch.float64)
    x = torch.randn(2, 1, E, dtype=torch.float64, requires_grad=True)

    def call(t: Tensor) -> tuple[Tensor, ...]:
        return ours(t, t, t, average_attn_weights=False)

    assert torch.autograd.gradcheck(call, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, x)
    forward, backward = torch.func.jacfwd(call)(x), torch.func.jacrev(call)(x)
    for a, b in zip(forward, backward, strict=True):
        torch.testing.assert_close(a, b)


def test_float_masks_get_gradients() -> None:
    theirs, ours = pair()
    x = torch.randn(3, 2, E)
    grads = []
    for module in (theirs, ours):
        masks = [torch.zeros(2, 3, requires_grad=True), torch.zeros(2 * H, 3, 3, requires_grad=True)]
        module(x, x, x, masks[0], attn_mask=masks[1])[0].square().sum().backward()
        grads.append([m.grad for m in masks])
    for a, b in zip(*grads, strict=True):
        close(b, a)
