"""How well a model does what it was trained for, on held-out data: the share of right answers, and the perplexity.

A text is right if it is the target to the letter (greedy generation on our caches). A picture is right if a classifier
of real digits sees the digit that was asked for, a clip if a classifier of real clips hears it (`judges.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import judges
from .data.batches import Collator
from .data.held_out import held_out
from .data.tasks import Example
from .generation import GeminiForConditionalGeneration
from .processing import GeminiProcessor, pad_features

ANSWERED = ("describe", "transcribe", "sentiment", "joint")
_BATCH = 64
_LONGEST_ANSWER = 12  # tokens
_DRAWINGS = 5  # of each prompt: what is drawn is drawn at random
_TEMPERATURE = 0.7  # of drawing: below 1, where a minute's training is surest


def _prompts(processor: GeminiProcessor, examples: Sequence[Example]) -> Iterator[tuple[list[Example], dict[str, Any]]]:
    """Batches of examples of like length, and their prompts as the model takes them, padded on the left."""
    ordered = sorted(examples, key=lambda e: (sum(s.shape[1] for s in e.sounds), len(e.prompt)))
    for first in range(0, len(ordered), _BATCH):
        part = ordered[first : first + _BATCH]
        images = [image for e in part for image in e.images]
        sounds = [sound for e in part for sound in e.sounds]
        texts, _ = processor.expand([e.prompt for e in part], [sound.shape[1] for sound in sounds])
        padded = processor.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        inputs: dict[str, Any] = dict(padded)
        if images:
            inputs["pixel_values"] = torch.stack(images)
        if sounds:
            inputs["input_features"], inputs["feature_lengths"] = pad_features(sounds)
        yield part, inputs


def answers(
    model: GeminiForConditionalGeneration, processor: GeminiProcessor, examples: Sequence[Example], **options: Any
) -> list[tuple[Example, str]]:
    """Each example with what the model answers, greedily; options go to `generate` (kv_cache, kv_dtype, ...)."""
    found: list[tuple[Example, str]] = []
    for part, inputs in _prompts(processor, examples):
        out = model.generate(**inputs, max_new_tokens=_LONGEST_ANSWER, do_sample=False, **options)
        texts = processor.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found += zip(part, (text.strip() for text in texts), strict=True)
    return found


def drawn(
    model: GeminiForConditionalGeneration, processor: GeminiProcessor, examples: Sequence[Example], seed: int = 0
) -> list[tuple[Example, Tensor]]:
    """Each example with the picture [1, 8, 8] that the model draws for it."""
    generator = torch.Generator().manual_seed(seed)
    found: list[tuple[Example, Tensor]] = []
    for part, inputs in _prompts(processor, examples):
        images = model.generate_images(**inputs, temperature=_TEMPERATURE, generator=generator)
        found += zip(part, images, strict=True)
    return found


def said(
    model: GeminiForConditionalGeneration, processor: GeminiProcessor, examples: Sequence[Example]
) -> list[tuple[Example, Tensor]]:
    """Each example with the log-mel frames [40, T] that the model says for it."""
    found: list[tuple[Example, Tensor]] = []
    for part, inputs in _prompts(processor, examples):
        frames, lengths = model.generate_audio(**inputs)
        found += zip(part, (clip[:, : int(n)] for clip, n in zip(frames, lengths, strict=True)), strict=True)
    return found


@torch.no_grad()
def perplexity(model: GeminiForConditionalGeneration, processor: GeminiProcessor, examples: Sequence[Example]) -> float:
    """exp of the mean cross-entropy of a token of the target texts."""
    collate = Collator(processor)
    total, count = 0.0, 0
    ordered = sorted(examples, key=lambda e: len(e.text or ""))
    for first in range(0, len(ordered), _BATCH):
        batch = collate(ordered[first : first + _BATCH])
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        del batch["label_weights"]  # a perplexity is a mean over tokens
        loss = model(**batch).text_loss
        assert loss is not None
        total, count = total + float(loss) * tokens, count + tokens
    return math.exp(total / count)


def evaluate(
    model: GeminiForConditionalGeneration,
    processor: GeminiProcessor,
    tasks: Sequence[str],
    limit: int | None = None,
    **options: Any,
) -> dict[str, float]:
    """task -> share of right answers, 0 to 1; for "text" the perplexity.

    limit: so many held-out examples of each task; default all. options: of `generate`.
    """
    training = model.training
    model.eval()
    found = {}
    for task in tasks:
        examples = held_out(task)[:limit]
        if task in ANSWERED:
            right = [text == e.text for e, text in answers(model, processor, examples, **options)]
        elif task == "draw":
            pictures = [made for seed in range(_DRAWINGS) for made in drawn(model, processor, examples, seed)]
            seen = judges.digit_judge().recognise(torch.stack([image for _, image in pictures]))
            right = [e.answer == digit for (e, _), digit in zip(pictures, seen.tolist(), strict=True)]
        elif task == "say":
            clips = said(model, processor, examples)
            heard = judges.speech_judge().recognise([frames for _, frames in clips])
            right = [e.answer == digit for (e, _), digit in zip(clips, heard.tolist(), strict=True)]
        else:
            found[task] = perplexity(model, processor, examples)
            continue
        found[task] = sum(right) / len(right)
    model.train(training)
    return found
