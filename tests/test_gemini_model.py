"""The multimodal model: our attention beside eager in the same model, losses by hand, what sees what, saving."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .numerics import assert_close

hf = pytest.importorskip("transformers", reason="transformers is not installed")

from fused_attention.models.gemini import (  # noqa: E402
    GeminiForConditionalGeneration,
    GeminiModel,
    student_config,
    teacher_config,
)

from .gemini_models import batch, build, cast, config, pixels, prompts  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("error::fused_attention.FallbackWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
]
LOSSES = ("text_loss", "image_loss", "audio_loss")


def results(implementation: str, dtype: torch.dtype, inputs: dict[str, Tensor], **more: Any) -> dict[str, Tensor]:
    """Logits at real positions, all losses as one vector, all gradients, those of a part of the model as one vector."""
    model = build(implementation, dtype, **more)
    out = model(**cast(inputs, dtype))
    out.loss.backward()
    losses = torch.stack([out.loss, *(getattr(out, name) for name in LOSSES)])
    found = {"logits": out.logits[inputs["attention_mask"].bool()].detach(), "losses": losses.detach().to(dtype)}
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing, f"no gradient: {missing}"
    parts: dict[str, list[Tensor]] = {}
    for name, p in model.named_parameters():
        parts.setdefault(re.match(r"layers\.\d+|\w+", name)[0], []).append(p.grad.flatten())
    assert {"embed_tokens", "layers.0", "layers.2", "image_encoder", "audio_decoder"} <= set(parts)
    return found | {f"gradients of {name}": torch.cat(g) for name, g in parts.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_losses_and_every_gradient(side: str, dtype: torch.dtype, say: Callable[[str], None]) -> None:
    inputs = batch(config(), side)
    ref = results("eager", torch.float64, inputs)
    same, ours = results("eager", dtype, inputs), results("fused_attention", dtype, inputs)
    for name in ref.keys() - {"losses"}:
        assert_close(ours[name], same[name], ref[name], grad=name.startswith("gradient"), name=name)
    errors = [float((r["logits"].double() - ref["logits"]).abs().max()) for r in (ours, same)]
    say(f"{str(dtype).removeprefix('torch.'):<9}padded {side:<6}error in logits {errors[0]:.1e}, eager {errors[1]:.1e}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_losses(dtype: torch.dtype) -> None:
    """Of both sides and with and without a softcap at once: four numbers alone eager may meet by chance."""
    found: dict[str, list[Tensor]] = {"same": [], "ref": [], "ours": []}
    plain: dict[str, list[Tensor]] = {"same": [], "ref": [], "sdpa": []}  # without a softcap, which SDPA lacks
    for side in ("left", "right"):
        inputs = batch(config(), side)
        for more in ({}, {"attn_logit_softcapping": None}):
            found["same"].append(results("eager", dtype, inputs, **more)["losses"])
            found["ref"].append(results("eager", torch.float64, inputs, **more)["losses"])
            found["ours"].append(results("fused_attention", dtype, inputs, **more)["losses"])
        plain["same"].append(found["same"][-1])
        plain["ref"].append(found["ref"][-1])
        plain["sdpa"].append(results("sdpa", dtype, inputs, **more)["losses"])
    assert_close(*(torch.cat(plain[name]) for name in ("sdpa", "same", "ref")), name="losses of SDPA")
    assert_close(*(torch.cat(found[name]) for name in ("ours", "same", "ref")), name="losses")


def test_sdpa_without_softcap_and_refused_with_it() -> None:
    inputs = batch(config(), "right")
    same, ref = (results("eager", t, inputs, attn_logit_softcapping=None) for t in (torch.float32, torch.float64))
    for implementation in ("sdpa", "fused_attention"):
        found = results(implementation, torch.float32, inputs, attn_logit_softcapping=None)
        for name in ref.keys() - {"losses"}:
            assert_close(found[name], same[name], ref[name], grad=name.startswith("gradient"), name=name)
    with pytest.raises(ValueError, match="no softcap"):
        build("sdpa")


def test_text_alone_needs_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_attention.integrations.transformers_masks import StructuredMask

    def looked_into(self: Any) -> Tensor:
        raise AssertionError("a mask [B, 1, M, N] was made")

    monkeypatch.setattr(StructuredMask, "dense", looked_into)
    model, rows = build(), torch.randint(11, 61, (2, 9))
    mask = torch.ones_like(rows)
    mask[0, 6:] = 0
    model(rows, attention_mask=mask)
    with pytest.raises(AssertionError, match="a mask"):
        model(**prompts(model.config))


# --- losses by hand ---------------------------------------------------------------------------------------------------


def test_losses_by_hand() -> None:
    model = build(dtype=torch.float64)
    inputs = cast(batch(model.config), torch.float64)
    out, c = model(**inputs), model.config
    ids, hidden = inputs["input_ids"], out.last_hidden_state
    text, image, frames, stops = [], [], [], []
    target = {"image": iter(inputs["image_targets"]), "audio": iter(zip(inputs["audio_targets"], (7, 10), strict=True))}
    for b, row in enumerate(ids.tolist()):
        for s in range(1, len(row)):
            if inputs["labels"][b, s] != -100 and row[s] not in (7, 8, 9, 10):
                text.append(-out.logits[b, s - 1].log_softmax(-1)[row[s]])
            if row[s] == c.image_out_token_id and row[s - 1] == c.boi_token_id:
                picture = next(target["image"])[0]
                for i in range(4):
                    said = model.image_decoder.head(hidden[b, s - 1 + i]).view(16, 17).log_softmax(-1)
                    patch = picture[4 * (i // 2) : 4 * (i // 2) + 4, 4 * (i % 2) : 4 * (i % 2) + 4].flatten()
                    image += [-said[k, round(float(patch[k]) * 16)] for k in range(16)]
            if row[s] == c.audio_out_token_id and row[s - 1] == c.boa_token_id:
                sound, length = next(target["audio"])
                for i in range(-(-length // 4)):
                    out_row = model.audio_decoder.head(hidden[b, s - 1 + i])
                    for k in range(min(4, length - 4 * i)):
                        frames.append(out_row[6 * k : 6 * k + 6] - sound[:, 4 * i + k])
                    stops.append(F.softplus(-out_row[-1] if 4 * i + 4 >= length else out_row[-1]))
    error = torch.stack(frames)
    hand = {
        "text_loss": torch.stack(text).mean(),
        "image_loss": torch.stack(image).mean(),
        "audio_loss": error.abs().mean() + error.square().mean() + torch.stack(stops).mean(),
    }
    for name, value in hand.items():
        # The decoders take their losses in float32.
        torch.testing.assert_close(getattr(out, name).double(), value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.loss.double(), sum(hand.values()), rtol=1e-6, atol=1e-6)


def test_weights_of_the_losses_and_number_of_items() -> None:
    inputs = batch(config())
    out = build(image_loss_weight=0.5, audio_loss_weight=3.0)(**inputs)
    torch.testing.assert_close(out.loss, out.text_loss + 0.5 * out.image_loss + 3.0 * out.audio_loss)
    ids = inputs["input_ids"]
    counted = (inputs["labels"] != -100) & ~torch.isin(ids, torch.tensor([7, 8, 9, 10]))
    doubled = build()(**inputs, num_items_in_batch=2 * int(counted.sum()))
    torch.testing.assert_close(doubled.text_loss, out.text_loss / 2)


def test_weights_of_labels() -> None:
    """Weights of 0 take labels out, equal ones change nothing, and slots do not count whatever their weight."""
    inputs = batch(config())
    model, labels = build(), inputs["labels"]
    equal = model(**inputs, label_weights=torch.full(labels.shape, 0.3)).text_loss
    torch.testing.assert_close(equal, model(**inputs).text_loss)
    weights = torch.rand(labels.shape, generator=torch.Generator().manual_seed(0))
    weights[0] = 0.0
    found = model(**inputs, label_weights=weights)
    each = F.cross_entropy(found.logits[:, :-1].transpose(1, 2), labels[:, 1:].clamp(min=0), reduction="none")
    slots = torch.tensor([7, 8, 9, 10])
    counts = weights[:, 1:] * ((labels[:, 1:] != -100) & ~torch.isin(inputs["input_ids"][:, 1:], slots))
    torch.testing.assert_close(found.text_loss, (each * counts).sum() / counts.sum())
    labels[0] = -100
    torch.testing.assert_close(model(**inputs, label_weights=weights).text_loss, found.text_loss)


# --- what sees what ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["fused_attention", "eager"])
def test_tokens_of_one_image_see_each_other(implementation: str) -> None:
    model = build(implementation)
    inputs = {k: v[:1] for k, v in prompts(model.config).items() if k in ("input_ids", "attention_mask")}
    columns = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten().tolist()
    assert columns == [2, 3, 4, 5, 8, 9, 10, 11]  # two images, right beside their boi and eoi
    before = pixels(2)
    after = before.clone()
    after[0, :, 6:, 6:] = 1 - after[0, :, 6:, 6:]  # out of the first token's sight in the convolutions

    def hidden(images: Tensor) -> Tensor:
        return model(**inputs, pixel_values=images).last_hidden_state[0]

    encoded = [model.image_encoder(x)[0] for x in (before, after)]
    assert torch.equal(encoded[0][0], encoded[1][0]) and not torch.equal(encoded[0][3], encoded[1][3])
    changed = (hidden(before) != hidden(after)).any(-1)
    assert not changed[:2].any(), "what stands before an image saw it"
    assert changed[2:].all(), "a token of the image, or one behind it, did not see its last token"
    after = before.clone()
    after[1] = 1 - after[1]
    changed = (hidden(before) != hidden(after)).any(-1)
    assert not changed[:8].any() and changed[8:].all(), "an image saw the next one"


def test_padding_and_neighbours_change_nothing() -> None:
    model = build(dtype=torch.float64)
    inputs = cast(prompts(model.config), torch.float64)
    together = model(**inputs).logits
    alone = {"pixel_values": [(0, 2), (2, 3), None, None, None], "input_features": [None, None, (0, 2), (2, 3), None]}
    for b in range(5):
        real = inputs["attention_mask"][b].bool()
        media = {}
        if alone["pixel_values"][b]:
            media["pixel_values"] = inputs["pixel_values"][slice(*alone["pixel_values"][b])]
        if alone["input_features"][b]:
            at = slice(*alone["input_features"][b])
            lengths = inputs["feature_lengths"][at]
            cut = int(lengths.max())  # less padding than in the batch
            media |= {"input_features": inputs["input_features"][at, :, :cut], "feature_lengths": lengths}
        one = model(inputs["input_ids"][b : b + 1, real], **media).logits[0]
        torch.testing.assert_close(together[b, real], one, rtol=1e-9, atol=1e-9)


def test_what_is_past_a_clips_end_is_not_read() -> None:
    model = build()
    inputs = batch(model.config)
    spoiled = {k: v.clone() for k, v in inputs.items()}
    for name, lengths in (("input_features", "feature_lengths"), ("audio_targets", "target_lengths")):
        past = torch.arange(inputs[name].shape[2]) >= inputs[lengths][:, None]
        spoiled[name].masked_fill_(past[:, None], float("nan"))
    first, second = model(**inputs), model(**spoiled)
    assert torch.equal(first.loss, second.loss) and torch.isfinite(first.loss)


# --- training and saving ----------------------------------------------------------------------------------------------


def test_gradient_checkpointing_changes_nothing() -> None:
    inputs = batch(config())
    found = []
    for checkpointing in (False, True):
        model = build(dropout=0.1).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        loss = model(**inputs).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for plain, checkpointed in zip(*found, strict=True):
        assert torch.equal(plain, checkpointed)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16 autocast"])
def test_trains(autocast: bool) -> None:
    torch.manual_seed(0)
    model = GeminiForConditionalGeneration(config()).train()
    optimizer, inputs, losses = torch.optim.AdamW(model.parameters(), 5e-3), batch(model.config), []
    for _ in range(25):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(**inputs)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append([getattr(out, name).item() for name in LOSSES])
    for name, first, last in zip(LOSSES, losses[0], losses[-1], strict=True):
        assert last < 0.7 * first, f"{name} went from {first} to {last}"


@pytest.mark.parametrize("tied", [True, False])
def test_saves_and_loads(tied: bool, tmp_path: Path) -> None:
    model = build(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    inputs = batch(model.config)
    with torch.no_grad():
        expected = model(**inputs)
    autos = (hf.AutoModel, hf.AutoModelForCausalLM, hf.AutoModelForImageTextToText)
    for kind in (GeminiModel, GeminiForConditionalGeneration, *autos):
        loaded, report = kind.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
        assert loaded.config._attn_implementation == "fused_attention"
        assert (loaded.lm_head.weight is loaded.embed_tokens.weight) == tied
        with torch.no_grad():
            found = loaded.eval()(**inputs)
        assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    assert GeminiModel.from_pretrained(tmp_path, attn_implementation="eager").config._attn_implementation == "eager"
    fields = hf.AutoConfig.from_pretrained(tmp_path).to_dict()
    assert fields == {**model.config.to_dict(), "_name_or_path": str(tmp_path)}


def test_hidden_states_and_attention_weights() -> None:
    model, inputs = build(), batch(config())
    out = model(**inputs, output_hidden_states=True, output_attentions=True)
    eager = build("eager")(**inputs, output_attentions=True)
    assert len(out.hidden_states) == 4 and torch.equal(out.hidden_states[-1], out.last_hidden_state)
    real = inputs["attention_mask"].bool()
    for ours, theirs in zip(out.attentions, eager.attentions, strict=True):
        torch.testing.assert_close(ours.transpose(1, 2)[real], theirs.transpose(1, 2)[real], rtol=1e-4, atol=1e-5)


def test_sizes_of_the_presets() -> None:
    with torch.device("meta"):
        teacher, student = (GeminiModel(f(1024)) for f in (teacher_config, student_config))
    assert 1.5e6 <= teacher.num_parameters() <= 3e6
    assert student.num_parameters() <= teacher.num_parameters() / 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"boi_token_id": 4}, "token ids"),
        ({"audio_out_token_id": 61}, "token ids"),
        ({"patch_size": 3}, "patch_size"),
        ({"image_tokens": 3}, "image_tokens"),
        ({"image_tokens": 9}, "image_tokens"),
        ({"audio_reduction": 3}, "audio_reduction"),
        ({"image_levels": 1}, "image_levels"),
    ],
)
def test_contradicting_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**fields)
