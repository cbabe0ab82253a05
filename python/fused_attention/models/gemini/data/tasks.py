"""What is asked of the model, as examples: a prompt, its media, and what is to follow.

| task | prompt | target |
|---|---|---|
| describe | "What is in this picture? <image>" | "a handwritten seven" |
| transcribe | "Transcribe the audio to text. <audio>" | "seven" |
| sentiment | "the film was superb. Is this positive or negative?" | "positive" |
| joint | "Is the spoken digit the one in the picture? <image> <audio>" | "seven and three: no" |
| draw | "Draw a seven." | a picture |
| say | "Say seven in a woman's voice." | a clip |
| text | nothing | a sentence |

Training examples are drawn by a generator and augmented; the held-out ones are a fixed list, never augmented: test
digits, test voices, held-out sentences. Each phrasing of a prompt occurs in both.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ..audio import SILENCE, log_mel
from . import digits, sentiment, speech, text

DESCRIBE = (
    "Describe the content of this image. <image>",
    "<image> Describe the picture.",
    "What is in this picture? <image>",
    "<image> What do you see?",
    "Which digit is it? <image>",
    "Say in words what the image shows: <image>",
)
TRANSCRIBE = (
    "Transcribe the audio to text. <audio>",
    "<audio> Transcribe.",
    "What is said? <audio>",
    "<audio> What did you hear?",
    "Write down the word: <audio>",
    "Which word is spoken here? <audio>",
)
SENTIMENT = (
    "{}",
    "{} Is this positive or negative?",
    "Sentiment: {}",
    "Positive or negative? {}",
    "What is the sentiment of this sentence? {}",
    "Classify: {}",
)
JOINT = (
    "Is the spoken digit the one in the picture? <image> <audio>",
    "<image> <audio> Is the spoken digit the one in the picture?",
    "Picture: <image> Sound: <audio> Do they show the same digit?",
    "Does the sound <audio> name the digit in the picture <image>?",
    "<audio> Is that what is written here? <image>",
)
DRAW = (
    "Draw a {}.",
    "Draw the digit {}.",
    "Please draw a handwritten {}.",
    "Show me a picture of a {}.",
    "Generate an image of the digit {}.",
    "Write a {} by hand.",
)
SAY = ("Say {}.", "Say the digit {}.", "Please say {} aloud.", "Speak the word {}.", "Generate audio of the digit {}.")
SPEAKING = {"man": ("", " Use a man's voice."), "woman": (" Use a woman's voice.",)}

_OFTEN = 400  # more than the least frequent learned piece of a vocabulary of a thousand


@dataclass(frozen=True)
class Example:
    """prompt: with a placeholder for each medium; images: [1, 8, 8] each; sounds: log-mel frames [40, T] each; then
    one of text, image [1, 8, 8] and sound [40, T]. answer: the digit, word or label by its number, where there is one.
    """

    task: str
    prompt: str
    images: tuple[Tensor, ...] = ()
    sounds: tuple[Tensor, ...] = ()
    text: str | None = None
    image: Tensor | None = None
    sound: Tensor | None = None
    answer: int | None = field(default=None)

    def __post_init__(self) -> None:
        if sum(target is not None for target in (self.text, self.image, self.sound)) != 1:
            raise ValueError("an example has one target: text, image or sound")


def training_example(task: str, rng: np.random.Generator, moved: float = 1.0) -> Example:
    """An example of `task` from the training data, drawn and augmented with `rng`.

    moved: the share of the pictures looked at that are augmented (`digits.augment`), 0 to 1; the others stay as they
    are in the data, and so in the test.
    """
    if task not in TASKS:
        raise ValueError(f"task: got {task!r}, expected one of {list(TASKS)}")
    return TASKS[task](rng, moved)


@functools.cache
def _words_between() -> tuple[str, ...]:
    """Words of the training texts that nobody has rated."""
    found = {word for sentence in text.sentences("train") for word in re.findall("[a-z]{2,}", sentence.lower())}
    return tuple(sorted(found - set(sentiment.lexicon())))


def insert_words(example: Example, rng: np.random.Generator, share: float) -> Example:
    """The same with words that mean nothing here put before this share of its prompt's words, so that no answer hangs
    on what stands around the word that decides it (random insertion; Wei and Zou, "EDA", 2019).
    """
    words = example.prompt.split()
    between = _words_between()
    added = [
        between[i] if put else ""
        for i, put in zip(rng.integers(len(between), size=len(words)), rng.random(len(words)) < share, strict=True)
    ]
    return replace(example, prompt=" ".join(f"{new} {word}".strip() for new, word in zip(added, words, strict=True)))


def describe(image: Tensor, digit: int, phrasing: str) -> Example:
    return Example("describe", phrasing, (image,), text=f"a handwritten {digits.NAMES[digit]}", answer=digit)


def transcribe(frames: Tensor, word: int, phrasing: str) -> Example:
    return Example("transcribe", phrasing, sounds=(frames,), text=speech.WORDS[word], answer=word)


def classify(sentence: sentiment.Sentence, phrasing: str) -> Example:
    label = sentence.label
    return Example("sentiment", phrasing.format(sentence.text), text=sentiment.LABELS[label], answer=label)


def compare(image: Tensor, digit: int, frames: Tensor, word: int, phrasing: str) -> Example:
    """What is answered: the digit seen, the one heard, and whether they are the same."""
    same = digit == word
    text = f"{digits.NAMES[digit]} and {digits.NAMES[word]}: {'yes' if same else 'no'}"
    return Example("joint", phrasing, (image,), (frames,), text=text, answer=int(same))


def draw(image: Tensor, digit: int, phrasing: str) -> Example:
    return Example("draw", phrasing.format(digits.NAMES[digit]), image=image, answer=digit)


def say(digit: int, speaker: str, phrasing: str, manner: str) -> Example:
    prompt = phrasing.format(digits.NAMES[digit]) + manner
    return Example("say", prompt, sound=_said(digit, speaker), answer=digit)


def continue_text(sentence: str) -> Example:
    return Example("text", "", text=sentence)


def tokenizer_corpus() -> Iterator[str]:
    """What a tokenizer for these tasks learns from: the training sentences, the prompts, and the answers, often.

    An answer begins a text, where pieces carry no space: each of its words is to be one piece there too.
    """
    yield from text.sentences("train")
    yield from (sentence.text for sentence in sentiment.compose("train"))
    prompts = [
        *DESCRIBE,
        *TRANSCRIBE,
        *JOINT,
        *SENTIMENT,
        *DRAW,
        *SAY,
        *(how for hows in SPEAKING.values() for how in hows),
    ]
    answers = [*speech.WORDS, *sentiment.LABELS, *(f"a handwritten {name}" for name in digits.NAMES)]
    for prompt in prompts:
        yield from [re.sub("<image>|<audio>|{}", "", prompt)] * _OFTEN
    for answer in answers:
        yield from [answer] * _OFTEN


@functools.cache
def clip_frames(split: str, index: int) -> Tensor:
    """The log-mel frames [40, T] of a clip of `speech.load(split)`."""
    return log_mel(torch.from_numpy(speech.load(split)[index].samples))


@functools.cache
def clips_of(split: str, digits_only: bool = True) -> dict[int, list[int]]:
    """word -> where its clips are in `speech.load(split)`."""
    found: dict[int, list[int]] = {}
    for index, clip in enumerate(speech.load(split)):
        if clip.word < len(digits.NAMES) or not digits_only:
            found.setdefault(clip.word, []).append(index)
    return found


@functools.cache
def _said(digit: int, speaker: str) -> Tensor:
    return log_mel(torch.from_numpy(speech.spoken_digit(digit, speaker)))


def pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _training_image(rng: np.random.Generator, moved: float) -> tuple[Tensor, int]:
    data = digits.load("train")
    row = int(rng.integers(len(data.labels)))
    image = data.images[row]
    if moved >= 1.0 or (moved > 0.0 and rng.random() < moved):
        image = digits.augment(image, rng)
    return image, int(data.labels[row])


def _training_clip(rng: np.random.Generator, word: int | None = None) -> tuple[Tensor, int]:
    """A clip with up to five silent frames before it, between 8 dB softer and 2 dB louder."""
    clips = speech.load("train")
    index = int(rng.integers(len(clips))) if word is None else int(rng.choice(clips_of("train")[word]))
    frames = clip_frames("train", index) + float(rng.uniform(-8, 2)) / 40  # frames are log10(power) / 4
    frames = torch.nn.functional.pad(frames.clamp(min=SILENCE), (int(rng.integers(0, 6)), 0), value=SILENCE)
    return frames, clips[index].word


def _training_comparison(rng: np.random.Generator, moved: float) -> Example:
    image, digit = _training_image(rng, moved)
    other = (digit + int(rng.integers(1, 10))) % 10
    frames, word = _training_clip(rng, digit if rng.random() < 0.5 else other)
    return compare(image, digit, frames, word, pick(rng, JOINT))


def _training_speech(rng: np.random.Generator) -> Example:
    speaker = pick(rng, tuple(SPEAKING))
    return say(int(rng.integers(10)), speaker, pick(rng, SAY), pick(rng, SPEAKING[speaker]))


def _training_sentiment(rng: np.random.Generator) -> Example:
    made = sentiment.compose("train")
    return classify(made[int(rng.integers(len(made)))], pick(rng, SENTIMENT))


TASKS: dict[str, Callable[[np.random.Generator, float], Example]] = {
    "describe": lambda rng, moved: describe(*_training_image(rng, moved), pick(rng, DESCRIBE)),
    "transcribe": lambda rng, _: transcribe(*_training_clip(rng), pick(rng, TRANSCRIBE)),
    "sentiment": lambda rng, _: _training_sentiment(rng),
    "joint": _training_comparison,
    "draw": lambda rng, _: draw(*_training_image(rng, 0.0), pick(rng, DRAW)),
    "say": lambda rng, _: _training_speech(rng),
    "text": lambda rng, _: continue_text(pick(rng, text.sentences("train"))),
}
