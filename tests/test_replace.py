"""`replace_attention`: what it swaps, what it leaves, and what stays the same object."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_attention.nn as fused

pytestmark = [
    pytest.mark.fast,
    pytest.mark.filterwarnings("error::fused_attention.FallbackWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
]

E, H = 8, 2


class Model(nn.Module):
    """Attention in several places, one module used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 16, batch_first=True), 2)
        self.cross = nn.MultiheadAttention(E, H, kdim=6, vdim=6, batch_first=True, dtype=torch.float64)
        self.shared = nn.ModuleList([nn.MultiheadAttention(E, H, add_bias_kv=True)])
        self.again = self.shared[0]
        self.head = nn.Linear(E, 3)


def test_everything_but_the_class_stays_the_same_object() -> None:
    model = Model()
    model.again.eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    state = copy.deepcopy(model.state_dict())
    report = fused.replace_attention(model)
    assert report.replaced == ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn", "cross", "shared.0"]
    assert report.skipped == []
    assert all(type(dict(model.named_modules())[name]) is fused.MultiheadAttention for name in report.replaced)
    assert model.again is model.shared[0]
    assert {n: id(m) for n, m in model.named_modules()} == {n: id(m) for n, m in before.items()}
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert list(model.state_dict()) == list(state)
    model.load_state_dict(state)
    assert not model.again.training and model.cross.training
    assert model.cross.in_proj_bias.dtype == torch.float64
    model.again(*[torch.randn(3, 2, E)] * 3)[0].sum().backward()
    held = model.again.in_proj_weight.detach().clone()
    optimizer.step()
    assert not torch.equal(held, model.again.in_proj_weight)


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
def test_same_results(mode: str) -> None:
    torch.manual_seed(0)
    theirs = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False
    )
    ours = copy.deepcopy(theirs)
    fused.replace_attention(ours)
    x = torch.randn(4, 5, E)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [1], [4]])
    outputs = []
    for model in (theirs, ours):
        model.train(mode == "train")
        with torch.set_grad_enabled(mode != "no_grad"):
            outputs.append(model(x, src_key_padding_mask=padding))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)


def test_hooks_and_instance_attributes_survive() -> None:
    model = nn.Sequential(nn.Identity(), nn.MultiheadAttention(E, H))
    calls: list[str] = []
    model[1].register_forward_hook(lambda *_: calls.append("forward"))
    model[1].register_forward_pre_hook(lambda *_: calls.append("before"))
    model[1].register_full_backward_hook(lambda *_: calls.append("backward"))
    model[1].note = "mine"
    fused.replace_attention(model)
    x = torch.randn(3, 2, E, requires_grad=True)
    model[1](x, x, x)[0].sum().backward()
    assert calls == ["before", "forward", "backward"] and model[1].note == "mine"


def test_the_model_itself() -> None:
    module = nn.MultiheadAttention(E, H)
    x = torch.randn(3, 2, E)
    expected = module(x, x, x)[0]
    report = fused.replace_attention(module)
    assert type(module) is fused.MultiheadAttention and report.replaced == [""]
    assert "the model itself" in str(report)
    torch.testing.assert_close(module(x, x, x)[0], expected)


class _Own(nn.MultiheadAttention):
    """A user's subclass."""


class _Double(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


def _parametrized(module: nn.Module) -> nn.Module:
    nn.utils.parametrize.register_parametrization(module, "in_proj_weight", _Double())
    return module


def _patched() -> nn.Module:
    module = nn.MultiheadAttention(E, H)
    module.forward = lambda *a, **k: "patched"  # type: ignore[assignment]
    return module


def _scripted() -> nn.Module:
    return torch.jit.script(nn.MultiheadAttention(E, H))


SKIPPED: dict[str, tuple[Any, str]] = {
    "subclass": (lambda: _Own(E, H), "subclass"),
    "parametrized subclass": (lambda: _parametrized(_Own(E, H)), "subclass"),
    "quantizable": (lambda: torch.ao.nn.quantizable.MultiheadAttention(E, H), "quantization"),
    "patched forward": (_patched, "forward was replaced"),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_left_as_they_were_with_a_reason(name: str) -> None:
    make, reason = SKIPPED[name]
    model = nn.Sequential(make(), nn.MultiheadAttention(E, H))
    kind = type(model[0])
    report = fused.replace_attention(model)
    assert report.replaced == ["1"] and type(model[0]) is kind
    assert [n for n, _ in report.skipped] == ["0"] and reason in report.skipped[0][1]
    assert reason in str(report) and "left as they were" in str(report)


def test_scripted_modules_are_untouched() -> None:
    model = nn.Sequential(_scripted(), nn.MultiheadAttention(E, H))
    kind = type(model[0])
    assert fused.replace_attention(model).replaced == ["1"]
    assert type(model[0]) is kind


def test_twice_is_once() -> None:
    model = Model()
    fused.replace_attention(model)
    report = fused.replace_attention(model)
    assert (report.replaced, report.skipped, report.notes) == ([], [], [])
    assert "replaced 0 attention modules" in str(report)


def test_encoder_stops_packing_and_the_report_says_so() -> None:
    model = Model()
    assert model.encoder.use_nested_tensor
    report = fused.replace_attention(model)
    assert not model.encoder.use_nested_tensor
    assert len(report.notes) == 1 and report.notes[0].startswith("encoder: use_nested_tensor")
    assert report.notes[0] in str(report)


def test_replaced_models_copy_and_pickle() -> None:
    model = Model()
    fused.replace_attention(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other.cross) is fused.MultiheadAttention and other.again is other.shared[0]
        assert other.again._qkv_same_embed_dim is False


_PARAMETRIZED: dict[str, Any] = {
    "a function": lambda m: _parametrized(m),
    "weight norm": lambda m: nn.utils.parametrizations.weight_norm(m, "in_proj_weight"),
    "spectral norm": lambda m: nn.utils.parametrizations.spectral_norm(m, "in_proj_weight"),
    "of the last projection": lambda m: [nn.utils.parametrizations.weight_norm(m.out_proj), m][1],
    "of the bias": lambda m: [nn.utils.parametrize.register_parametrization(m, "in_proj_bias", _Double()), m][1],
}


@pytest.mark.parametrize("name", _PARAMETRIZED)
def test_parametrizations_go_on(name: str) -> None:
    module = nn.MultiheadAttention(E, H)
    module.in_proj_bias.data.normal_()
    module = _PARAMETRIZED[name](module).eval()
    x = torch.randn(3, 2, E)
    state = copy.deepcopy(module.state_dict())
    parameters = {n: id(p) for n, p in module.named_parameters()}
    with torch.no_grad():
        expected = module(x, x, x)[0]
    assert fused.replace_attention(module).replaced == [""]
    assert isinstance(module, fused.MultiheadAttention) and not module._qkv_same_embed_dim
    assert {n: id(p) for n, p in module.named_parameters()} == parameters
    assert list(module.state_dict()) == list(state)
    torch.testing.assert_close(module(x, x, x)[0], expected)
    torch.testing.assert_close(copy.deepcopy(module)(x, x, x)[0], expected)
    module(x, x, x)[0].sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    if hasattr(module, "parametrizations"):
        for tensor in list(module.parametrizations):
            nn.utils.parametrize.remove_parametrizations(module, tensor)
        assert type(module) is fused.MultiheadAttention
        torch.testing.assert_close(module(x, x, x)[0], expected)


@pytest.mark.parametrize("old", [False, True], ids=["parametrized", "old weight norm"])
def test_the_layer_around_a_normed_weight_does_not_bypass_us(old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.TransformerEncoderLayer(E, H, 16, batch_first=True)
    fused.replace_attention(layer)
    if old:
        with pytest.warns(FutureWarning):
            nn.utils.weight_norm(layer.self_attn, "in_proj_weight")
    else:
        nn.utils.parametrizations.weight_norm(layer.self_attn, "in_proj_weight")
    calls: list[str] = []
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *_, **__: calls.append("torch's"))
    original = fused.MultiheadAttention.forward
    monkeypatch.setattr(
        fused.MultiheadAttention, "forward", lambda *a, **k: [calls.append("ours"), original(*a, **k)][1]
    )
    with torch.no_grad():
        layer.eval()(torch.randn(2, 3, E))
    assert calls == ["ours"]


def test_weight_norm_of_the_old_kind_goes_on() -> None:
    module = nn.MultiheadAttention(E, H)
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(module, "in_proj_weight")
    x = torch.randn(3, 2, E)
    expected = module(x, x, x)[0]
    assert fused.replace_attention(module).replaced == [""]
    module.in_proj_weight_g.data.mul_(1.0)
    torch.testing.assert_close(module(x, x, x)[0], expected)


def test_restore_is_the_way_back() -> None:
    model = Model()
    model.built = fused.MultiheadAttention(E, H)
    nn.utils.parametrizations.weight_norm(model.cross, "in_proj_bias", dim=0)
    kinds = {n: type(m).__name__ for n, m in model.named_modules()}
    ids = {n: id(m) for n, m in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    swapped = fused.replace_attention(model)
    for restored in (copy.deepcopy(model), model):
        report = fused.restore_attention(restored)
        assert report.replaced == swapped.replaced and "use_nested_tensor set to True again" in str(report)
        assert {n: type(m).__name__ for n, m in restored.named_modules()} == kinds
        assert type(restored.built) is fused.MultiheadAttention and restored.encoder.use_nested_tensor
        assert type(restored.again) is nn.MultiheadAttention and restored.again._qkv_same_embed_dim
        assert all(torch.equal(v, state[k]) for k, v in restored.state_dict().items())
        assert fused.restore_attention(restored) == fused.ReplacementReport()
    assert {n: id(m) for n, m in model.named_modules()} == ids
    x = torch.randn(3, 2, E)
    expected = model.again(x, x, x)[0]
    fused.replace_attention(model)
    torch.testing.assert_close(model.again(x, x, x)[0], expected)


def test_whole_transformers_are_swapped() -> None:
    """nn.Transformer: encoder, decoder and cross attention, the same results in every mode."""
    torch.manual_seed(0)
    theirs = nn.Transformer(E, H, 2, 2, 16, dropout=0.0, batch_first=True)
    ours = copy.deepcopy(theirs)
    report = fused.replace_attention(ours)
    assert len(report.replaced) == 6 and not report.skipped
    source, target = torch.randn(3, 5, E), torch.randn(3, 4, E)
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    options = {"tgt_mask": mask, "tgt_is_causal": True}
    for training in (True, False):
        with torch.set_grad_enabled(training):
            expected = theirs.train(training)(source, target, **options)
            out = ours.train(training)(source, target, **options)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
