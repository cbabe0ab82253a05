"""`MultiheadAttention` inside PyTorch's transformers, nested, compiled and traced; what it copies; its bad calls."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_attention.nn as fused
from fused_attention.backends import cpu
from fused_attention.nn import multihead

from .test_multihead_behavior import HIDDEN, MODES, E, H, close, in_mode, pair

pytestmark = [
    pytest.mark.filterwarnings("error::fused_attention.FallbackWarning"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]

# --- torch.nn.TransformerEncoder and its kin ------------------------------------------------------------------------


def _ours_from(theirs: nn.MultiheadAttention) -> fused.MultiheadAttention:
    ours = fused.MultiheadAttention(
        theirs.embed_dim, theirs.num_heads, dropout=theirs.dropout, batch_first=theirs.batch_first
    )
    ours.load_state_dict(theirs.state_dict())
    return ours


def _layer() -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True)


def _encoder(how: str) -> nn.TransformerEncoder:
    """An encoder with our attention in every layer, put there in one of several ways."""
    layer = _layer()
    if how == "before":
        layer.self_attn = _ours_from(layer.self_attn)
    encoder = nn.TransformerEncoder(layer, 2)
    if how == "after":
        for made in encoder.layers:
            made.self_attn = _ours_from(made.self_attn)
    if how == "replaced":
        fused.replace_attention(encoder)
    return encoder


CHANGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "as built": lambda m: m,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "assigned state": lambda m: [m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True), m][1],
    "to and back": lambda m: m.to(torch.float64).to(torch.float32),
    "no gradients": lambda m: m.requires_grad_(False),
}


@pytest.mark.fast
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("how", ["before", "after", "replaced"])
def test_encoder_gives_the_same_rows_in_every_mode(how: str, change: str) -> None:
    """Also at padded positions, where PyTorch's own encoder answers zeros in eval."""
    theirs = _encoder("theirs")
    ours = CHANGES[change](_encoder(how))
    x = torch.randn(2, 3, E)
    expected = in_mode(theirs, "train", lambda: theirs(x, src_key_padding_mask=HIDDEN))
    outputs = [in_mode(ours, mode, lambda: ours(x, src_key_padding_mask=HIDDEN)) for mode in MODES]
    for out in outputs:
        close(out, expected)
        assert torch.equal(out, outputs[0])
    assert in_mode(theirs, "no_grad", lambda: theirs(x, src_key_padding_mask=HIDDEN))[HIDDEN].eq(0).all()
    with torch.inference_mode():
        assert torch.equal(ours(x, src_key_padding_mask=HIDDEN), outputs[0])


@pytest.mark.fast
def test_encoder_layer_calls_our_forward_in_eval() -> None:
    layer = _layer()
    layer.self_attn = _ours_from(layer.self_attn)
    calls = []
    true_forward = layer.self_attn.forward
    layer.self_attn.forward = lambda *a, **k: calls.append(1) or true_forward(*a, **k)
    x = torch.randn(2, 3, E)
    for mask in ({}, {"src_key_padding_mask": HIDDEN}, {"src_mask": torch.zeros(3, 3)}):
        in_mode(layer, "no_grad", lambda mask=mask: layer(x, **mask))
    assert len(calls) == 3


@pytest.mark.fast
def test_a_bias_is_what_everybody_else_reads() -> None:
    encoder = _encoder("after")
    ours = encoder.layers[0].self_attn
    assert ours.in_proj_bias is dict(ours.named_parameters())["in_proj_bias"]
    ours.in_proj_bias = None
    assert ours.in_proj_bias is None
    del ours.in_proj_bias
    with pytest.raises(AttributeError, match="in_proj_bias"):
        ours.in_proj_bias  # noqa: B018


@pytest.mark.fast
@pytest.mark.parametrize("mode", MODES)
def test_decoder_layer_and_transformer(mode: str) -> None:
    torch.manual_seed(0)
    theirs = nn.Transformer(E, H, 1, 1, 16, dropout=0.0, batch_first=True)
    ours = copy.deepcopy(theirs)
    assert len(fused.replace_attention(ours).replaced) == 3
    source, target = torch.randn(2, 3, E), torch.randn(2, 5, E)
    masks = {
        "src_key_padding_mask": HIDDEN,
        "memory_key_padding_mask": HIDDEN,
        "tgt_mask": torch.ones(5, 5, dtype=torch.bool).triu(1),
        "tgt_is_causal": True,
    }
    expected = in_mode(theirs, "train", lambda: theirs(source, target, **masks))
    close(in_mode(ours, mode, lambda: ours(source, target, **masks)), expected)


# --- nested tensors -------------------------------------------------------------------------------------------------

LENGTHS = (3, 1, 4)


def _nested(layout: torch.layout, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(seed)
    parts = [torch.randn(n, E) for n in lengths]
    return torch.nested.nested_tensor(parts, layout=layout, requires_grad=True), parts


@pytest.mark.fast
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("need", [None, "mean", "heads"])
@pytest.mark.parametrize("mode", MODES)
def test_nested_self_attention(layout: torch.layout, need: str | None, mode: str) -> None:
    _, ours = pair(batch_first=True)
    x, parts = _nested(layout)
    options = {"need_weights": need is not None, "average_attn_weights": need == "mean"}
    out, weights = in_mode(ours, mode, lambda: ours(x, x, x, **options))
    assert out.is_nested and out.layout == layout
    for i, part in enumerate(parts):
        one, w = ours(part[None], part[None], part[None], **options)
        close(out.unbind()[i], one[0])
        if weights is not None:
            n = LENGTHS[i]
            close(weights[i][..., :n, :n], w[0])
            assert weights[i][..., n:, :].eq(0).all() and weights[i][..., n:].eq(0).all()
    if mode != "no_grad":
        out.values().square().sum().backward()
        leaves = [p.clone().requires_grad_() for p in parts]
        sum(ours(p[None], p[None], p[None])[0].square().sum() for p in leaves).backward()
        for got, leaf in zip(x.grad.unbind(), leaves, strict=True):
            close(got, leaf.grad)


@pytest.mark.fast
def test_nested_matches_torch_where_torch_takes_it() -> None:
    theirs, ours = pair(batch_first=True)
    x, _ = _nested(torch.strided)
    for need, average in ((True, True), (True, False), (False, False)):
        options = {"need_weights": need, "average_attn_weights": average}
        expected = in_mode(theirs, "no_grad", lambda options=options: theirs(x, x, x, **options))
        got = in_mode(ours, "no_grad", lambda options=options: ours(x, x, x, **options))
        for a, b in zip(got[0].unbind(), expected[0].unbind(), strict=True):
            close(a, b)
        if need:
            close(got[1], expected[1])


@pytest.mark.fast
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_cross_attention_and_encoder(layout: torch.layout) -> None:
    _, ours = pair(batch_first=True)
    query, parts = _nested(layout)
    memory, memories = _nested(layout, (2, 5, 1), seed=1)
    for need in (False, True):
        out = ours(query, memory, memory, need_weights=need)[0]
        for got, q, m in zip(out.unbind(), parts, memories, strict=True):
            close(got, ours(q[None], m[None], m[None])[0][0])
    encoder = _encoder("replaced")
    expected = [in_mode(encoder, "train", lambda p=p: encoder(p[None])[0]) for p in parts]
    for mode in MODES:
        for got, one in zip(in_mode(encoder, mode, lambda: encoder(query)).unbind(), expected, strict=True):
            close(got, one)


@pytest.mark.fast
def test_nested_bad_calls() -> None:
    x, _ = _nested(torch.jagged)
    dense = torch.randn(3, 4, E)
    _, ours = pair(batch_first=True)
    for arguments, options in (
        ((x, x, x), {"key_padding_mask": torch.zeros(3, 4, dtype=torch.bool)}),
        ((x, x, x), {"attn_mask": torch.zeros(4, 4)}),
        ((x, dense, dense), {}),
        ((dense, x, x), {}),
    ):
        with pytest.raises(AssertionError, match="nested"):
            ours(*arguments, **options)
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        ours(x, x, x, is_causal=True)
    with pytest.raises(RuntimeError, match="2 sequences where query has 3"):
        other = _nested(torch.jagged, (2, 2))[0]
        ours(x, other, other)
    with pytest.raises(AssertionError, match="do not match value's"):
        ours(x, x, _nested(torch.jagged, (4, 1, 3))[0])
    for options in ({"batch_first": False}, {"batch_first": True, "add_zero_attn": True}):
        with pytest.raises(AssertionError, match="nested"):
            pair(**options)[1](x, x, x)


# --- compiled and traced --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["before", "after", "replaced"])
def test_compiled_encoder_gives_the_same_rows(how: str) -> None:
    encoder = _encoder(how)
    x = torch.randn(2, 3, E)
    expected = in_mode(encoder, "train", lambda: encoder(x, src_key_padding_mask=HIDDEN))
    torch._dynamo.reset()
    compiled = torch.compile(encoder, backend="aot_eager", fullgraph=True)
    for mode in MODES:
        close(in_mode(encoder, mode, lambda: compiled(x, src_key_padding_mask=HIDDEN)), expected)


def test_compiled_with_dropout_draws_from_the_seed() -> None:
    _, ours = pair(dropout=0.5)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 2, E)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(compiled(x, x, x)[0])
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = fused.MultiheadAttention(E, H)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


def test_export_and_symbolic_trace() -> None:
    model, x = _Residual(), torch.randn(3, 2, E)
    exported = torch.export.export(model, (x,)).module()
    close(exported(x), model(x))
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["attention"]
    close(traced(x), model(x))


# --- no copies ----------------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masks", [{}, {"key_padding_mask": HIDDEN}], ids=["none", "padding"])
def test_no_activation_is_copied(batch_first: bool, masks: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Projection -> kernel -> projection: the memory addresses say so, where these are three calls."""
    if "error" in cpu.info():
        pytest.skip("the C++ extension is not built")
    monkeypatch.setattr(cpu, "projections_pay", lambda *kind: False)
    _, ours = pair(batch_first=batch_first)
    x = torch.randn((2, 3, E) if batch_first else (3, 2, E))
    seen: list[dict[str, Any]] = []
    true_extension, true_linear = cpu._C, torch.nn.functional.linear
    assert true_extension is not None

    def forward(args: dict[str, Any]) -> None:
        seen.append(dict(args))
        true_extension.attention_forward(args)

    products: list[tuple[Tensor, Tensor]] = []

    def linear(t: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        products.append((t, true_linear(t, w, b)))
        return products[-1][1]

    monkeypatch.setattr(cpu, "_C", SimpleNamespace(attention_forward=forward))
    monkeypatch.setattr(multihead.F, "linear", linear)
    ours(x, x, x, need_weights=False, **masks)
    (entered, projected), (read, _) = products
    (args,) = seen
    assert entered is x
    size = E * x.element_size()
    assert [args[name][0] - projected.data_ptr() for name in "qkv"] == [0, size, 2 * size]
    batch, row = projected.stride()[:2] if batch_first else projected.stride()[1::-1]
    assert all(args[name][2:] == (batch, E // H, row, 1) for name in "qkv")
    assert [args[name] for name in ("B", "H", "M", "D")] == [2, H, 3, E // H]
    assert read.data_ptr() == args["out"][0] and read.is_contiguous()


@pytest.mark.fast
@pytest.mark.parametrize(("same", "products"), [("self", 2), ("key is value", 3), ("none", 4)])
def test_number_of_matrix_products(same: str, products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = pair()
    count = 0
    true_linear = torch.nn.functional.linear

    def linear(*args: Any) -> Tensor:
        nonlocal count
        count += 1
        return true_linear(*args)

    monkeypatch.setattr(multihead.F, "linear", linear)
    monkeypatch.setattr(cpu, "projections_pay", lambda *kind: False)
    x, y, z = (torch.randn(3, 2, E) for _ in range(3))
    ours(x, *{"self": (x, x), "key is value": (y, y), "none": (y, z)}[same])
    assert count == products
    count = 0
    u, w = torch.randn(3, E), torch.randn(3, E)
    ours(u, *{"self": (u, u), "key is value": (w, w), "none": (w, torch.randn(3, E))}[same])
    assert count == products


# --- bad calls ------------------------------------------------------------------------------------------------------

_X, _U = torch.randn(3, 2, E), torch.randn(3, E)
_BOOL = torch.bool
BAD_CALLS: dict[str, tuple[dict[str, Any], Callable[[nn.Module], Any]]] = {
    "query 4-D": ({}, lambda m: m(_X[None], _X, _X)),
    "query 1-D": ({}, lambda m: m(_U[0], _U[0], _U[0])),
    "key 2-D": ({}, lambda m: m(_X, _U, _U)),
    "key 3-D": ({}, lambda m: m(_U, _X, _X)),
    "key_padding_mask 1-D": ({}, lambda m: m(_X, _X, _X, torch.zeros(3, dtype=_BOOL))),
    "key_padding_mask int": ({}, lambda m: m(_X, _X, _X, torch.zeros(2, 3, dtype=torch.long))),
    "key_padding_mask wrong length": ({}, lambda m: m(_X, _X, _X, torch.zeros(2, 4, dtype=_BOOL))),
    "key_padding_mask wrong batch": ({}, lambda m: m(_X, _X, _X, torch.zeros(3, 3, dtype=_BOOL))),
    "key_padding_mask one for all": ({}, lambda m: m(_X, _X, _X, torch.zeros(1, 3, dtype=_BOOL))),
    "key_padding_mask list": ({}, lambda m: m(_X, _X, _X, [[1]])),
    "attn_mask uint8": ({}, lambda m: m(_X, _X, _X, attn_mask=torch.zeros(3, 3, dtype=torch.uint8))),
    "attn_mask wrong 2-D": ({}, lambda m: m(_X, _X, _X, attn_mask=torch.zeros(3, 4))),
    "attn_mask one row": ({}, lambda m: m(_X, _X, _X, attn_mask=torch.zeros(1, 3))),
    "attn_mask wrong 3-D": ({}, lambda m: m(_X, _X, _X, attn_mask=torch.zeros(2, 3, 3))),
    "attn_mask 4-D": ({}, lambda m: m(_X, _X, _X, attn_mask=torch.zeros(2, 2, 3, 3))),
    "attn_mask list": ({}, lambda m: m(_X, _X, _X, attn_mask=[[1]])),
    "attn_mask int with hint": ({}, lambda m: m(_X, _X, _X, attn_mask=torch.zeros(3, 3).long(), is_causal=True)),
    "unbatched key_padding_mask 2-D": ({}, lambda m: m(_U, _U, _U, torch.zeros(1, 3, dtype=_BOOL))),
    "unbatched key_padding_mask wrong": ({}, lambda m: m(_U, _U, _U, torch.zeros(4, dtype=_BOOL))),
    "unbatched attn_mask wrong 3-D": ({}, lambda m: m(_U, _U, _U, attn_mask=torch.zeros(1, 3, 3))),
    "unbatched attn_mask wrong 2-D": ({}, lambda m: m(_U, _U, _U, attn_mask=torch.zeros(3, 5))),
    "hint without mask": ({}, lambda m: m(_X, _X, _X, is_causal=True)),
    "query features": ({}, lambda m: m(torch.randn(3, 2, E + 1), _X, _X)),
    "key features": ({}, lambda m: m(_X, *[torch.randn(3, 2, E + 1)] * 2)),
    "key and value lengths": ({}, lambda m: m(_X, torch.randn(4, 2, E), torch.randn(5, 2, E))),
    "key batch": ({}, lambda m: m(_X, *[torch.randn(4, 3, E)] * 2)),
    "key batch 1": ({}, lambda m: m(_X, *[torch.randn(4, 1, E)] * 2)),
    "query batch": ({}, lambda m: m(torch.randn(3, 4, E), _X, _X)),
    "kdim": ({"kdim": 5, "vdim": 7}, lambda m: m(_X, _X, torch.randn(3, 2, 7))),
    "vdim": ({"kdim": 5, "vdim": 7}, lambda m: m(_X, torch.randn(3, 2, 5), _X)),
    "kdim lengths": ({"kdim": 5, "vdim": 7}, lambda m: m(_X, torch.randn(3, 2, 5), torch.randn(4, 2, 7))),
    "query dtype": ({}, lambda m: m(_X.double(), _X.double(), _X.double())),
    "query integer": ({}, lambda m: m(_X.long(), _X.long(), _X.long())),
    "query None": ({}, lambda m: m(None, _X, _X)),
    "key None": ({}, lambda m: m(_X, None, _X)),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", BAD_CALLS)
@pytest.mark.parametrize("mode", MODES)
def test_bad_calls_raise_what_torch_raises(name: str, mode: str) -> None:
    options, call = BAD_CALLS[name]
    theirs, ours = pair(**options)
    with pytest.raises(Exception) as expected:
        in_mode(theirs, mode, lambda: call(theirs))
    with pytest.raises(type(expected.value)) as got:
        in_mode(ours, mode, lambda: call(ours))
    message = str(got.value)
    if isinstance(expected.value, AssertionError):  # PyTorch's shape checks: their words are matched by users' tests
        assert message.startswith(str(expected.value).split(" but ")[0].split(".")[0])
    assert len(message.split()) > 4  # a sentence, not a bare value


@pytest.mark.fast
@pytest.mark.parametrize("dropout", [1.5, -0.5])
def test_impossible_dropout_raises_in_training(dropout: float) -> None:
    _, ours = pair(dropout=dropout)
    for need in (True, False):
        with pytest.raises((ValueError, RuntimeError), match="dropout"):
            ours(_X, _X, _X, need_weights=need)
