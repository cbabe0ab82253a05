"""`GroupedQueryAttention`: parameters, checkpoints with fused and with separate projections, malformed calls."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fused_attention as fa

from .grouped_cases import MODELS, D, E, Model

pytestmark = pytest.mark.fast
BY_NAME = {m.name: m for m in MODELS}
CROSS = Model("cross", (4, 2), None, {"context_dim": 10, "qkv_bias": True, "qk_norm_eps": 1e-6})


def test_parameters() -> None:
    found = {n: tuple(p.shape) for n, p in BY_NAME["everything"].build().named_parameters()}
    rows = (4 + 2 * 2) * D
    assert found == {
        "qkv_proj.weight": (rows, E),
        "qkv_proj.bias": (rows,),
        "o_proj.weight": (E, 4 * D),
        "o_proj.bias": (E,),
        "q_norm.weight": (D,),
        "k_norm.weight": (D,),
        "sinks": (4,),
    }
    assert set(BY_NAME["plain"].build().state_dict()) == {"qkv_proj.weight", "o_proj.weight"}
    assert set(CROSS.build().state_dict()) >= {"q_proj.weight", "q_proj.bias", "kv_proj.weight", "kv_proj.bias"}


@pytest.mark.parametrize("model", [*MODELS, CROSS], ids=str)
def test_round_trips(model: Model) -> None:
    module, other = model.build(seed=0), model.build(seed=1)
    inputs = [torch.randn(2, 9, E)] + ([torch.randn(2, 5, 10)] if model is CROSS else [])
    expected = module(*inputs)
    assert not torch.equal(other(*inputs), expected)
    fused, separate = module.state_dict(), module.separate_state_dict()
    for state in (fused, separate):
        other = model.build(seed=1)
        assert not any(other.load_state_dict(state))
        assert torch.equal(other(*inputs), expected)
    assert separate["k_proj.weight"].shape == (module.num_kv_heads * D, E if model is not CROSS else 10)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(again(*inputs), expected)


def test_a_llama_checkpoint_loads_into_a_model() -> None:
    """Separate weights under a prefix beside fused ones; the caller's dictionary stays as it is."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = BY_NAME["norm-rope"].build()

    source, model = Block(), nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])})
    state = {f"layers.1.self_attn.{n}": t.clone() for n, t in source.self_attn.separate_state_dict().items()}
    state |= {f"layers.0.self_attn.{n}": t for n, t in Block().self_attn.state_dict().items()}
    untouched = set(state)
    assert not any(model.load_state_dict(state)) and set(state) == untouched
    x = torch.randn(2, 5, E)
    assert torch.equal(model["layers"][1].self_attn(x), source.self_attn(x))
    with torch.device("meta"):
        empty = BY_NAME["norm-rope"].build()
    empty.load_state_dict(source.self_attn.separate_state_dict(), assign=True)
    assert torch.equal(empty(x), source.self_attn(x))


def test_what_is_missing_or_too_much_is_named() -> None:
    module = BY_NAME["plain"].build()
    state = module.separate_state_dict()
    del state["v_proj.weight"]
    with pytest.raises(RuntimeError, match='Missing key.*"qkv_proj.weight"(.|\n)*Unexpected key.*"q_proj.weight"'):
        module.load_state_dict(state)
    state = module.separate_state_dict() | {"rotary_emb.inv_freq": torch.ones(4)}
    with pytest.raises(RuntimeError, match="rotary_emb.inv_freq"):
        module.load_state_dict(state)
    state = module.separate_state_dict()
    state["k_proj.weight"] = state["k_proj.weight"][:-1]
    with pytest.raises(RuntimeError, match="size mismatch for qkv_proj.weight"):
        module.load_state_dict(state)


def test_one_rotary_embedding_serves_all_layers() -> None:
    rope = fa.RotaryEmbedding(D)
    layers = nn.ModuleList(fa.GroupedQueryAttention(E, 4, 2, head_dim=D, rope=rope) for _ in range(3))
    assert len(list(layers.modules())) == 1 + 3 * 3 + 1
    for layer in layers:
        layer(torch.randn(1, 9, E))
    assert len(rope._constants._kept) == 1


# --- malformed ----------------------------------------------------------------------------------------------------

PLAIN, ROTATED, CROSSED = (m.build() for m in (BY_NAME["plain"], BY_NAME["norm-rope"], CROSS))
X, C = torch.zeros(2, 5, E), torch.zeros(2, 7, 10)
HIDE, SHOW = torch.zeros(2, 5, dtype=torch.bool), torch.ones(5, 5, dtype=torch.bool)
RAGGED = torch.nested.nested_tensor([torch.zeros(3, E), torch.zeros(5, E)], layout=torch.jagged)


def new(*sizes: Any, **options: Any) -> Callable[[], Any]:
    return lambda: fa.GroupedQueryAttention(*sizes, **options)


def call(module: nn.Module, *tensors: Any, **given: Any) -> Callable[[], Any]:
    return lambda: module(*tensors, **given)


CALLS: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("no features", new(0, 4), ValueError, "embed_dim"),
    ("features are a float", new(24.0, 4), TypeError, "embed_dim"),
    ("no heads", new(24, 0), ValueError, "num_heads"),
    ("heads are None", new(24, None), TypeError, "num_heads"),
    ("heads do not divide", new(24, 5), ValueError, "num_heads"),
    ("key heads do not divide", new(24, 4, 3), ValueError, "num_kv_heads"),
    ("no key heads", new(24, 4, 0), ValueError, "num_kv_heads"),
    ("head dim 0", new(24, 4, head_dim=0), ValueError, "head_dim"),
    ("context dim 0", new(24, 4, context_dim=0), ValueError, "context_dim"),
    ("rope is a dict", new(24, 4, rope={}), TypeError, "rope"),
    ("rope of another head dim", new(24, 4, rope=fa.RotaryEmbedding(4)), ValueError, "rope"),
    ("rope across", new(24, 4, rope=fa.RotaryEmbedding(6), context_dim=8), ValueError, "rope"),
    ("norm epsilon is text", new(24, 4, qk_norm_eps="1e-6"), TypeError, "qk_norm_eps"),
    ("negative norm epsilon", new(24, 4, qk_norm_eps=-1.0), ValueError, "qk_norm_eps"),
    ("causal=True", new(24, 4, causal=True), TypeError, "causal"),
    ("unknown alignment", new(24, 4, causal="left"), ValueError, "causal"),
    ("window is a number", new(24, 4, window=5), TypeError, "window"),
    ("negative window", new(24, 4, window=(-1, 0)), ValueError, "window"),
    ("softcap 0", new(24, 4, softcap=0.0), ValueError, "softcap"),
    ("scale NaN", new(24, 4, scale=float("nan")), ValueError, "scale"),
    ("dropout above 1", new(24, 4, dropout=1.5), ValueError, "dropout"),
    ("sinks are a tensor", new(24, 4, sinks=torch.zeros(4)), TypeError, "sinks"),
    ("alibi is a tensor", new(24, 4, alibi=torch.zeros(4)), TypeError, "alibi"),
    ("qkv_bias is a tensor", new(24, 4, qkv_bias=torch.zeros(4)), TypeError, "qkv_bias"),
    ("x is None", call(PLAIN, None), TypeError, "x"),
    ("x of 2 dims", call(PLAIN, X[0]), ValueError, "x"),
    ("x of another width", call(PLAIN, X[..., :5]), ValueError, "x"),
    ("x is nested", call(PLAIN, RAGGED), ValueError, "x"),
    ("x in another dtype", call(PLAIN, X.double()), ValueError, "x.dtype"),
    ("integer x", call(PLAIN, X.long()), ValueError, "x.dtype"),
    ("x on another device", call(PLAIN, X.to("meta")), ValueError, "x.device"),
    ("context without context_dim", call(PLAIN, X, C), ValueError, "context"),
    ("no context", call(CROSSED, X), ValueError, "context"),
    ("context of another width", call(CROSSED, X, X), ValueError, "context"),
    ("context of another batch", call(CROSSED, X, C[:1]), ValueError, "context"),
    ("positions without rope", call(PLAIN, X, positions=torch.arange(5)), ValueError, "positions"),
    ("positions of another length", call(ROTATED, X, positions=torch.arange(4)), ValueError, "positions"),
    ("floating positions", call(ROTATED, X, positions=torch.ones(5)), ValueError, "positions.dtype"),
    ("positions are a range", call(ROTATED, X, positions=range(5)), TypeError, "positions"),
    ("mask of another length", call(PLAIN, X, mask=SHOW[:, :4]), ValueError, "mask"),
    ("bool bias", call(PLAIN, X, bias=SHOW), ValueError, "bias.dtype"),
    ("floating padding", call(PLAIN, X, key_padding_mask=HIDE.float()), ValueError, "key_padding_mask.dtype"),
    ("padding of another length", call(PLAIN, X, key_padding_mask=HIDE[:, :4]), ValueError, "key_padding_mask"),
    ("padding of x across", call(CROSSED, X, C, key_padding_mask=HIDE), ValueError, "key_padding_mask"),
    ("padding is a list", call(PLAIN, X, key_padding_mask=[0, 0]), TypeError, "key_padding_mask"),
    (
        "padding beside mask and bias",
        call(PLAIN, X, key_padding_mask=HIDE, mask=SHOW, bias=torch.zeros(5, 5)),
        ValueError,
        "key_padding_mask",
    ),
    ("lengths past the end", call(PLAIN, X, key_lengths=torch.tensor([5, 6])), ValueError, "key_lengths"),
    ("unknown weights", call(PLAIN, X, need_weights="all"), ValueError, "need_weights"),
    ("weights is a number", call(PLAIN, X, need_weights=2), TypeError, "need_weights"),
]


@pytest.mark.parametrize(("make", "error", "name"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS])
def test_malformed(make: Callable[[], Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value).split(":")[0].split("[")[0].removesuffix("_p") == name
    assert type(caught.value) in (fa.ArgumentError, TypeError)
