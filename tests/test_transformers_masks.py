"""Masks of transformers as lengths, windows and packed sequences: which they become, and that they mean the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .numerics import assert_close

hf = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import masking_utils  # noqa: E402

from fused_attention.integrations import transformers as integration  # noqa: E402
from fused_attention.integrations.transformers_masks import Plan, StructuredMask, make_mask  # noqa: E402
from fused_attention.spec import ArgumentError  # noqa: E402

from .transformers_models import MODELS, build  # noqa: E402

pytestmark = pytest.mark.filterwarnings("error::fused_attention.FallbackWarning")

B, H, HK, D = 3, 4, 2, 8
NONE = torch.zeros(B, dtype=torch.long)


def _packed(function: Callable, rows: int) -> Callable:
    """Sequences of 3, 1 and the other tokens."""
    position = torch.cat([torch.arange(3), torch.arange(1), torch.arange(rows - 4)])[None].expand(B, rows)
    ids = masking_utils.find_packed_sequence_indices(position)
    return masking_utils.packed_sequence_compatibility_function(function, position, ids)


FUNCTIONS: dict[str, Callable[[int], Callable]] = {
    "causal": lambda rows: masking_utils.causal_mask_function,
    "bidirectional": lambda rows: masking_utils.bidirectional_mask_function,
    "window": lambda rows: masking_utils.sliding_window_causal_mask_function(3),
    "bidirectional window": lambda rows: masking_utils.sliding_window_bidirectional_mask_function(2),
    "chunks": lambda rows: masking_utils.chunked_causal_mask_function(4, NONE),
    "large chunks": lambda rows: masking_utils.chunked_causal_mask_function(64, NONE),
    "chunks after padding": lambda rows: masking_utils.chunked_causal_mask_function(4, torch.tensor([0, 1, 5])),
    "packed": lambda rows: _packed(masking_utils.causal_mask_function, rows),
    "packed window": lambda rows: _packed(masking_utils.sliding_window_causal_mask_function(3), rows),
    "packed chunks": lambda rows: _packed(masking_utils.chunked_causal_mask_function(4, NONE), rows),
    "a block of image tokens": lambda rows: masking_utils.or_masks(
        masking_utils.causal_mask_function,
        masking_utils.blockwise_overlay((torch.arange(40) < 4).long().expand(B, 40) - 1),
    ),
    "another function": lambda rows: lambda b, h, q, k: (q + k) % 2 == 0,
}
# (rows, columns, q_offset, kv_offset): a prompt; one for a static cache; later tokens; a window's cache; a shifted one.
SHAPES = [(9, 9, 0, 0), (9, 14, 0, 0), (5, 12, 7, 0), (5, 16, 7, 0), (5, 7, 12, 10), (5, 7, 10, 12), (1, 12, 11, 0)]
PADDINGS = ["none", "all visible", "left", "right", "holes"]
# transformers makes packed masks for a whole prompt only.
CASES = [(n, s) for n in FUNCTIONS for s in SHAPES if "packed" not in n or s == SHAPES[0]]


def _padding(kind: str, length: int) -> Tensor | None:
    position = torch.arange(length).expand(B, length)
    lengths = torch.tensor([[length], [length - 3], [length - 6]])
    return {
        "none": None,
        "all visible": position >= 0,
        "left": position >= length - lengths,
        "right": position < lengths,
        "holes": position % 3 != torch.tensor([[0], [1], [2]]),
    }[kind]


def _inputs(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, H, rows, D), (B, HK, columns, D), (B, HK, columns, D + 2))
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)


def _eager(tensors: tuple[Tensor, ...], mask: Tensor, bias: Tensor | None = None) -> Tensor:
    """[B, M, H, DV]; zeros where a row sees nothing."""
    q, k, v = tensors
    k, v = (t.repeat_interleave(H // HK, 1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * D**-0.5 + (0 if bias is None else bias.to(q.dtype))
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0)
    return (weights @ v).transpose(1, 2)


def _dense(arguments: dict[str, Any]) -> Tensor:
    return masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)


@pytest.mark.fast
@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
def test_every_mask_means_what_transformers_means(name: str, shape: tuple[int, int, int, int]) -> None:
    rows, columns, q_offset, kv_offset = shape
    bias = torch.randn(1, H, rows, columns, generator=torch.Generator().manual_seed(1))
    for kind, with_bias in itertools.product(PADDINGS, (False, True)):
        arguments: dict[str, Any] = {
            "batch_size": B,
            "q_length": rows,
            "kv_length": columns,
            "q_offset": q_offset,
            "kv_offset": kv_offset,
            "mask_function": FUNCTIONS[name](rows),
            "attention_mask": _padding(kind, kv_offset + columns),
        }
        dense = _dense(arguments).expand(B, 1, rows, columns)
        mask = make_mask(**arguments, allow_is_causal_skip=False)
        used = bias if with_bias else None
        out, weights = integration.fused_attention_forward(
            nn.Module(), *_inputs(rows, columns, torch.float32), mask, position_bias=used
        )
        assert weights is None
        ref = _eager(_inputs(rows, columns, torch.float64), dense, used)
        assert_close(out, _eager(_inputs(rows, columns, torch.float32), dense, used), ref, name=kind)
        assert rows == 1 or torch.equal(torch.ops.aten.clone(mask), dense)


def _plan(name: str, shape: tuple[int, int, int, int], padding: str = "none") -> Plan | None:
    rows, columns, q_offset, kv_offset = shape
    padded = _padding(padding, kv_offset + columns)
    mask = make_mask(B, rows, columns, q_offset, kv_offset, FUNCTIONS[name](rows), padded)
    assert isinstance(mask, StructuredMask)
    return mask.plan


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "shape", "padding", "expected"),
    [
        ("causal", SHAPES[0], "none", ("top_left", (None, None), 9)),
        ("causal", SHAPES[1], "none", ("top_left", (None, None), 9)),
        ("causal", SHAPES[2], "all visible", ("bottom_right", (None, None), 12)),
        ("causal", SHAPES[3], "none", ("bottom_right", (None, None), 12)),
        ("causal", SHAPES[4], "none", ("bottom_right", (None, None), 7)),
        ("causal", SHAPES[5], "none", None),
        ("bidirectional", SHAPES[2], "none", (None, (None, None), 12)),
        ("window", SHAPES[0], "none", ("top_left", (2, None), 9)),
        ("bidirectional window", SHAPES[0], "none", (None, (2, 2), 9)),
        ("bidirectional window", SHAPES[2], "none", None),
        ("large chunks", SHAPES[2], "left", ("bottom_right", (None, None), 12)),
        ("chunks after padding", SHAPES[0], "left", None),
        ("packed chunks", SHAPES[0], "none", None),
        ("a block of image tokens", SHAPES[0], "none", None),
        ("another function", SHAPES[0], "none", None),
    ],
)
def test_which_masks_stay_structural(name: str, shape: Any, padding: str, expected: Any) -> None:
    plan = _plan(name, shape, padding)
    assert (None if plan is None else plan[:3]) == expected


@pytest.mark.fast
def test_padding_becomes_lengths_or_one_row() -> None:
    right, left = _plan("causal", SHAPES[0], "right"), _plan("causal", SHAPES[0], "left")
    assert right is not None and right.key_lengths is not None and right.padding is None
    assert right.key_lengths.tolist() == [9, 6, 3]
    assert left is not None and left.key_lengths is None and left.padding is not None
    assert left.padding.shape == (B, 1, 1, 9)
    later = _plan("causal", SHAPES[2], "right")
    assert later is not None and later.key_lengths is None and later.padding is not None
    full = _plan("causal", SHAPES[0], "all visible")
    assert full is not None and full.key_lengths is None and full.padding is None


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "starts"), [("packed", [0, 3, 4]), ("packed window", [0, 3, 4]), ("chunks", [0, 4, 8])]
)
def test_sequences_become_offsets(name: str, starts: list[int]) -> None:
    plan = _plan(name, SHAPES[0])
    assert plan is not None and plan.offsets is not None
    assert plan.offsets.tolist() == [9 * b + s for b in range(B) for s in starts] + [9 * B]
    assert plan.longest == {"chunks": 4}.get(name, 5)


# --- masks in models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_models_keep_masks_structural(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only image tokens that see each other, and chunks with padding, need a tensor."""
    made: list[StructuredMask] = []
    dense = StructuredMask.dense
    monkeypatch.setattr(StructuredMask, "dense", lambda self: [made.append(self), dense(self)][1])
    integration.register()
    for side in MODELS[name].sides:
        made.clear()
        build(name, integration.NAME)(**MODELS[name].inputs(side))
        assert bool(made) == (name in ("Gemma 3 multimodal", "Llama 4"))


@pytest.mark.fast
def test_a_mask_that_is_looked_into_is_a_tensor() -> None:
    mask = make_mask(B, 5, 5)
    assert isinstance(mask, StructuredMask) and not mask.looked_into
    assert mask.shape == (B, 1, 5, 5) and mask.dtype == torch.bool and "StructuredMask" in repr(mask)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    assert torch.equal(mask[0, 0], causal) and mask.looked_into
    assert torch.equal(mask[:, :, -2:], causal[-2:].expand(B, 1, 2, 5))
    assert torch.equal(mask.logical_not()[1, 0], ~causal)
    assert torch.equal(mask.to("cpu", copy=True)[2, 0], causal)


@pytest.mark.fast
def test_what_is_written_into_a_mask_counts() -> None:
    rows, columns, *offsets = SHAPES[0]
    mask = make_mask(B, rows, columns, *offsets, attention_mask=_padding("left", columns))
    assert mask is not None
    mask[:, :, 0, 4] = True
    expected = torch.ones(rows, columns, dtype=torch.bool).tril() & _padding("left", columns)[:, None, None]
    expected[:, :, 0, 4] = True
    tensors = _inputs(rows, columns, torch.float32)
    out, _ = integration.fused_attention_forward(nn.Module(), *tensors, mask)
    ref = _eager(_inputs(rows, columns, torch.float64), expected)
    assert_close(out, _eager(tensors, expected), ref)


OWN_ATTENTION: dict[str, Callable[[Tensor], Any]] = {
    "added": lambda m: torch.zeros(B, H, 5, 5) + m,
    "inverted": lambda m: 1.0 - m,
    "multiplied": lambda m: m * 2.0,
    "cast": lambda m: m.float(),
    "a row is added": lambda m: torch.zeros(B, 5) + m[:, 0, 0, :],
    "a row is compared": lambda m: m[:, 0, 0, :] < 0,
    "fills the scores": lambda m: torch.zeros(B, H, 5, 5).masked_fill(m, -1.0),
}


@pytest.mark.fast
@pytest.mark.parametrize("use", OWN_ATTENTION.values(), ids=OWN_ATTENTION)
def test_arithmetic_on_a_mask_is_refused(use: Callable[[Tensor], Tensor]) -> None:
    """A model with attention of its own would add True as 1 to its scores."""
    with pytest.raises(NotImplementedError, match="does not use transformers' attention interface"):
        use(make_mask(B, 5, 5))


@pytest.mark.parametrize("name", ["Mpt", "Bloom", "BigBird", "Longformer"])
def test_models_with_attention_of_their_own_are_refused(name: str) -> None:
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_layer": 2, "n_head": 4, "attention_window": 4}
    config_class = getattr(hf, f"{name}Config")
    config = config_class(**{k: v for k, v in sizes.items() if hasattr(config_class(), k)})
    config._attn_implementation = integration.NAME
    integration.register()
    model = getattr(hf, f"{name}Model")(config).eval()
    with pytest.raises(NotImplementedError, match="does not use transformers' attention interface"):
        model(torch.randint(3, 61, (2, 8)), attention_mask=torch.arange(8).expand(2, 8).ge(2).long())


# --- what is refused ------------------------------------------------------------------------------------------------


def _call(mask: Any = None, rows: int = 5, columns: int = 5, **keywords: Any) -> Tensor:
    return integration.fused_attention_forward(nn.Module(), *_inputs(rows, columns, torch.float32), mask, **keywords)[0]


def _looked_into(mask: Tensor | None) -> Tensor | None:
    assert mask is not None and mask[0, 0, 0, 0]
    return mask


_STARTS = torch.tensor([0, 2, 15], dtype=torch.int32)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown keyword": ({"indices": torch.zeros(1)}, "passes indices, which this integration does not know"),
    "a head mask": ({"head_mask": torch.ones(H)}, "passes head_mask"),
    "position-wise sinks": ({"sinks": torch.zeros(B, H, 5, 1)}, "passes sinks"),
    "rows without a place": ({"columns": 9}, "no mask for 5 causal queries and 9 keys"),
    "a window without causality": ({"is_causal": False, "sliding_window": 3}, "a window of 3 over 5 keys without"),
    "half of the packing": ({"cu_seq_lens_q": _STARTS}, "come together"),
    "packing with a bias": (
        {"cu_seq_lens_q": _STARTS, "cu_seq_lens_k": _STARTS, "position_bias": torch.zeros(1, H, 5, 5)},
        "need an attention_mask",
    ),
    "sinks of another shape": ({"s_aux": torch.zeros(1, H)}, "sinks: got shape"),
    "another mask's size": ({"mask": make_mask(B, 5, 6)}, r"a mask of shape \[3, 1, 5, 6\]"),
    "bidirectional, looked into": (
        {"is_causal": False, "mask": _looked_into(make_mask(B, 5, 5))},
        "is_causal=False, and a causal mask",
    ),
    "bidirectional window": (
        {"is_causal": False, "mask": make_mask(B, 5, 5, mask_function=FUNCTIONS["window"](5))},
        "is_causal=False, and a causal mask with a window",
    ),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name: str) -> None:
    arguments, reason = REFUSED[name]
    with pytest.raises(ArgumentError, match=reason):
        _call(**arguments)


@pytest.mark.fast
def test_keywords_without_bearing_are_taken() -> None:
    plain = _call()
    assert torch.equal(_call(use_cache=True, position_ids=torch.arange(5), num_items_in_batch=7, indices=None), plain)


@pytest.mark.fast
def test_causality_without_a_mask() -> None:
    """The keyword counts, then the module's attribute, then causal; one row sees all keys."""
    causal, full = _call(make_mask(B, 5, 5)), _call(torch.ones(1, 1, 5, 5, dtype=torch.bool))
    assert torch.equal(_call(), causal) and torch.equal(_call(is_causal=False), full)
    assert torch.equal(_call(make_mask(B, 5, 5), is_causal=False), full)
    # What is not known to be causal says everything itself.
    odd = make_mask(B, 5, 5, mask_function=FUNCTIONS["another function"](5))
    assert torch.equal(_call(odd, is_causal=False), _call(odd))
    module = nn.Module()
    module.is_causal = False
    tensors = _inputs(5, 5, torch.float32)
    assert torch.equal(integration.fused_attention_forward(module, *tensors, None)[0], full)
    assert torch.equal(integration.fused_attention_forward(module, *tensors, None, is_causal=True)[0], causal)
    ones = torch.ones(1, 1, 1, 5, dtype=torch.bool)
    assert torch.equal(_call(rows=1), _call(ones, rows=1))
    assert torch.equal(_call(rows=1, sliding_window=2), _call(ones & (torch.arange(5) >= 3), rows=1))


@pytest.mark.fast
def test_dropout_is_for_training() -> None:
    """As in eager attention, whose dropout asks the module."""
    module = nn.Module()
    tensors = _inputs(5, 5, torch.float32)
    dropped = integration.fused_attention_forward(module, *tensors, None, dropout=0.5)[0]
    kept = integration.fused_attention_forward(module.eval(), *tensors, None, dropout=0.5)[0]
    assert torch.equal(kept, _call()) and not torch.equal(dropped, kept)


@pytest.mark.fast
def test_own_attention_is_not_switched() -> None:
    class Outside(hf.PreTrainedModel):
        config_class = hf.BertConfig

        @classmethod
        def _can_set_attn_implementation(cls) -> bool:
            return False

    config = hf.BertConfig(attn_implementation="eager")
    with pytest.raises(ValueError, match="Outside computes its own attention"):
        integration.register(Outside(config))
