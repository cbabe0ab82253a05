"""The examples that the model is measured on: nothing in them was trained on but the phrasings."""

from __future__ import annotations

import functools

import numpy as np

from . import digits, sentiment, speech, text
from .tasks import (
    DESCRIBE,
    DRAW,
    JOINT,
    SAY,
    SENTIMENT,
    SPEAKING,
    TASKS,
    TRANSCRIBE,
    Example,
    classify,
    clip_frames,
    clips_of,
    compare,
    continue_text,
    describe,
    draw,
    pick,
    say,
    transcribe,
)

_SEED = 1234


@functools.cache
def held_out(task: str) -> tuple[Example, ...]:
    """All held-out examples of `task`, in a fixed order that mixes what they ask about.

    describe: the 360 test pictures. transcribe: the clips of the held-out voices, words and digits. sentiment: the
    held-out sentences. joint: each test picture with two such clips, one of its digit and one of another. draw, say:
    each digit in each phrasing; the pictures and clips in them are for the loss only. text: the validation sentences.
    """
    if task not in TASKS:
        raise ValueError(f"task: got {task!r}, expected one of {list(TASKS)}")
    rng = np.random.default_rng(_SEED)
    examples = _MAKERS[task](rng)
    return tuple(examples[i] for i in rng.permutation(len(examples)))


def _describe(rng: np.random.Generator) -> list[Example]:
    data = digits.load("test")
    rows = zip(data.images, data.labels.tolist(), strict=True)
    return [describe(image, digit, pick(rng, DESCRIBE)) for image, digit in rows]


def _transcribe(rng: np.random.Generator) -> list[Example]:
    clips = enumerate(speech.load("test"))
    return [transcribe(clip_frames("test", i), clip.word, pick(rng, TRANSCRIBE)) for i, clip in clips]


def _sentiment(rng: np.random.Generator) -> list[Example]:
    return [classify(sentence, pick(rng, SENTIMENT)) for sentence in sentiment.compose("test")]


def _joint(rng: np.random.Generator) -> list[Example]:
    data, clips = digits.load("test"), clips_of("test")
    made = []
    for image, digit in zip(data.images, data.labels.tolist(), strict=True):
        for word in (digit, (digit + int(rng.integers(1, 10))) % 10):
            frames = clip_frames("test", int(rng.choice(clips[word])))
            made.append(compare(image, digit, frames, word, pick(rng, JOINT)))
    return made


def _draw(rng: np.random.Generator) -> list[Example]:
    data = digits.load("test")
    rows = {digit: (data.labels == digit).nonzero()[:, 0].tolist() for digit in range(10)}
    return [draw(data.images[int(rng.choice(rows[digit]))], digit, phrasing) for digit in rows for phrasing in DRAW]


def _say(rng: np.random.Generator) -> list[Example]:
    asked = [(speaker, manner) for speaker, manners in SPEAKING.items() for manner in manners]
    return [say(digit, who, phrasing, how) for digit in range(10) for phrasing in SAY for who, how in asked]


def _text(rng: np.random.Generator) -> list[Example]:
    return [continue_text(sentence) for sentence in text.sentences("valid")]


_MAKERS = {
    "describe": _describe,
    "transcribe": _transcribe,
    "sentiment": _sentiment,
    "joint": _joint,
    "draw": _draw,
    "say": _say,
    "text": _text,
}
