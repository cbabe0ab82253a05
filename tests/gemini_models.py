"""A tiny multimodal model with sharp random weights, and padded batches of every kind for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_attention.models.gemini import GeminiConfig, GeminiForConditionalGeneration

from .transformers_models import randomise

VOCABULARY, FIRST_TEXT = 61, 11
CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "sliding_window": 5,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 8.0,
    "patch_size": 4,
    "num_mel_bins": 6,
    "audio_prenet_size": 12,
    "max_audio_slots": 8,
}


def config(**more: Any) -> GeminiConfig:
    return GeminiConfig(**{**CONFIG, **more})


def build(implementation: str = "fused_attention", dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """The same random model each time."""
    torch.manual_seed(0)
    model = GeminiForConditionalGeneration(config(**more))
    randomise(model, 1)
    model.set_attn_implementation(implementation)
    return model.to(dtype).eval()


def text(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_TEXT, VOCABULARY, (count,), generator=generator).tolist()


def image(c: GeminiConfig) -> list[int]:
    return [c.boi_token_id, *[c.image_token_id] * c.image_tokens, c.eoi_token_id]


def clip(c: GeminiConfig, frames: int) -> list[int]:
    return [c.boa_token_id, *[c.audio_token_id] * c.audio_slots(frames), c.eoa_token_id]


def pad(rows: list[list[int]], side: str) -> dict[str, Tensor]:
    """input_ids and attention_mask [B, S]."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for b, row in enumerate(rows):
        at = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[b, at], mask[b, at] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def _random(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


FEATURE_LENGTHS, TARGET_LENGTHS = (9, 5, 12), (7, 10)


def pixels(count: int, seed: int = 3) -> Tensor:
    """Images [N, 1, 8, 8] whose pixels are whole levels."""
    return (_random(count, 1, 8, 8, seed=seed) * 16).round() / 16


def frames(count: int, length: int, seed: int = 4) -> Tensor:
    return 2 * _random(count, 6, length, seed=seed) - 1


def prompts(c: GeminiConfig, side: str = "left") -> dict[str, Tensor]:
    """Five prompts: two images, one after the other; an image; two clips around a text; a clip; only text."""
    long, short, middle = FEATURE_LENGTHS
    rows = [
        [1, *image(c), *image(c), *text(3, 1)],
        [1, *text(2, 2), *image(c), *text(4, 3)],
        [1, *clip(c, long), *text(2, 4), *clip(c, short), *text(1, 5)],
        [1, *clip(c, middle), *text(2, 6)],
        [1, *text(4, 7)],
    ]
    media = {"pixel_values": pixels(3), "input_features": frames(3, 12)}
    return {**pad(rows, side), **media, "feature_lengths": torch.tensor(FEATURE_LENGTHS)}


def batch(c: GeminiConfig, side: str = "right") -> dict[str, Tensor]:
    """For training: images and clips to describe, to draw and to say, and text, with labels."""
    first, second = (c.audio_slots(n) for n in TARGET_LENGTHS)
    drawn = [c.boi_token_id, *[c.image_out_token_id] * c.image_out_tokens, c.eoi_token_id]
    said = [[c.boa_token_id, *[c.audio_out_token_id] * n, c.eoa_token_id] for n in (first, second)]
    long, short, middle = FEATURE_LENGTHS
    rows = [
        [1, *image(c), *text(4, 11), 2],
        [1, *clip(c, long), *image(c), *text(3, 12), 2],
        [1, *text(3, 13), *drawn, 2],
        [1, *clip(c, short), *text(2, 14), *said[0], 2],
        [1, *image(c), *text(1, 15), *drawn, *said[1], 2],
        [1, *clip(c, middle), *text(2, 16), 2],
        [1, *text(9, 17), 2],
    ]
    inputs = pad(rows, side)
    # A sequence's first token would be predicted from padding, whose own output means nothing.
    visible = inputs["attention_mask"].bool()
    predicted = visible & torch.cat([torch.zeros(len(rows), 1, dtype=torch.bool), visible[:, :-1]], 1)
    return {
        **inputs,
        "labels": inputs["input_ids"].masked_fill(~predicted, -100),
        "pixel_values": pixels(3),
        "input_features": frames(3, 12),
        "feature_lengths": torch.tensor(FEATURE_LENGTHS),
        "image_targets": pixels(2, seed=8),
        "audio_targets": frames(2, 11, seed=9),
        "target_lengths": torch.tensor(TARGET_LENGTHS),
    }


def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
