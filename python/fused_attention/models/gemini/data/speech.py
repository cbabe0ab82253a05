"""Spoken words: the ten digits and ten other words, said by espeak-ng's voices.

A voice is a variant (its timbre) with an accent; one variant in four is **held out**: the test hears timbres of which
nothing was trained on, in any accent, speed or pitch. Clips are at 16 kHz, cut to what is said, a second at most, and
as loud as one another. They are synthesised once, in about half a minute, and kept in the user's cache; see
`espeak.py` for the licence.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import IO, NamedTuple

import numpy as np

from ..audio import SAMPLING_RATE
from ..resampling import resample
from . import cache
from .digits import NAMES
from .espeak import Synthesiser, Voice

WORDS = (*NAMES, "yes", "no", "left", "right", "up", "down", "stop", "go", "hello", "world")
LONGEST = SAMPLING_RATE  # samples
ACCENTS = ("en-us", "en", "en-gb-x-rp", "en-gb-scotland")
# Variants that sound like people; the robots, whispers and effects among espeak-ng's are left out.
VARIANTS = (
    *("Alex", "Alicia", "Andrea", "Andy", "Denis", "Gene", "Hugo", "Jacky", "Lee", "Mario", "Michael", "Mike"),
    *("belinda", "benjamin", "david", "edward", "f1", "f2", "f3", "f4", "f5", "linda"),
    *("m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "paul", "robert", "steph", "victor"),
)
HELD_OUT_VARIANTS = VARIANTS[3::4]
# What "say a digit" is answered with, from the voices of the training set.
SPEAKERS = {"man": Voice("en-us", "m3"), "woman": Voice("en-us", "f2")}
_TAKES = {"digit": 3, "word": 1}  # speeds and pitches that a voice says it in, in each of its accents
_ACCENTS_OF_A_VARIANT = 3
_VERSION = 1  # of what is synthesised, in the cache's name
_PEAK = 0.7
_QUIET = 0.02  # of the peak: what is quieter before and after is cut
_MARGIN = 320  # samples kept of it


class Clip(NamedTuple):
    """samples [T] float32 in [-1, 1] at 16 kHz, T <= 16,000; word: an index into WORDS, a digit below 10."""

    samples: np.ndarray
    word: int
    voice: Voice


@functools.cache
def load(split: str) -> tuple[Clip, ...]:
    """The clips of `split`, "train" or "test" (the held-out variants), in a fixed order, always the same."""
    if split not in ("train", "test"):
        raise ValueError(f"split: got {split!r}, expected 'train' or 'test'")
    return _kept(split, list(_plan(split)))


def spoken_digit(digit: int, speaker: str = "man") -> np.ndarray:
    """The clip that a request to say the digit is answered with, float32 [T]; speaker: a key of SPEAKERS."""
    return _answers()[list(SPEAKERS).index(speaker) * len(NAMES) + digit].samples


def synthesise(text: str, voice: Voice, source: Synthesiser | None = None) -> np.ndarray:
    """One clip, float32 [T] at 16 kHz, silence cut, a second at most, its peak at 0.7.

    source: what says it; by default a new one, which makes the clip a function of text and voice.
    """
    source = source or Synthesiser()
    raw = source.say(text, voice).astype(np.float64) / 32768
    samples = resample(raw, source.sampling_rate, SAMPLING_RATE)
    peak = np.abs(samples).max()
    loud = np.flatnonzero(np.abs(samples) > _QUIET * peak)
    samples = samples[max(loud[0] - _MARGIN, 0) : loud[-1] + _MARGIN][:LONGEST]
    return (samples * (_PEAK / peak)).astype(np.float32)


@functools.cache
def _answers() -> tuple[Clip, ...]:
    return _kept("speakers", [(digit, voice) for voice in SPEAKERS.values() for digit in range(len(NAMES))])


def _kept(name: str, plan: list[tuple[int, Voice]]) -> tuple[Clip, ...]:
    """The clips of a plan, said one after another where the cache does not hold them."""
    path = cache.folder() / f"speech-{name}-{_VERSION}.npz"
    if not path.exists():
        source = Synthesiser()
        clips = [synthesise(WORDS[word], voice, source) for word, voice in plan]
        cache.write(path, lambda file: _save(file, clips))
    with np.load(path) as data:
        samples, ends = data["samples"], data["ends"]
    pieces = np.split(samples.astype(np.float32) / 32768, ends[:-1])
    return tuple(Clip(piece, word, voice) for piece, (word, voice) in zip(pieces, plan, strict=True))


def _plan(split: str) -> Iterator[tuple[int, Voice]]:
    """Every word in every voice of the split, at speeds and pitches that are drawn once and for all."""
    held_out = split == "test"
    for number, variant in enumerate(VARIANTS):
        if (variant in HELD_OUT_VARIANTS) != held_out:
            continue
        rng = np.random.default_rng(number)
        for turn in range(_ACCENTS_OF_A_VARIANT):
            accent = ACCENTS[(number + turn) % len(ACCENTS)]
            for word in range(len(WORDS)):
                for _ in range(_TAKES["digit" if word < len(NAMES) else "word"]):
                    yield word, Voice(accent, variant, int(rng.integers(150, 221)), int(rng.integers(35, 66)))


def _save(file: IO[bytes], clips: list[np.ndarray]) -> None:
    samples = (np.concatenate(clips) * 32768).round().astype(np.int16)
    np.savez_compressed(file, samples=samples, ends=np.cumsum([len(clip) for clip in clips]))
