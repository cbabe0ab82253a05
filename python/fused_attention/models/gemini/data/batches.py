"""Examples into the arguments of the model's forward pass, and a stream of batches that mixes the tasks.

A sequence is `<bos> prompt target <eos>`. Its target is the tokens of a text, `<boi> <image_out> * n <eoi>` for a
picture of n patches, or `<boa> <audio_out> * ceil(T / audio_reduction) <eoa>` for a clip of T frames. Labels are the
target's tokens and `<eos>`, the slots among them, so that a model learns how long a clip is; -100 elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..processing import GeminiProcessor, pad_features
from .tasks import Example, training_example

IGNORED = -100
# How often each task is drawn: sentences need most, clips to say there are few of.
WEIGHTS = {"describe": 2, "transcribe": 3, "sentiment": 2, "joint": 4, "draw": 2, "say": 1, "text": 3}
_POOL = 16  # batches


class Collator:
    """A callable that makes one batch of a list of examples, padded on the right.

    Args:
        processor: what turns a user's prompts into arguments turns these.
        image_slots: patches of a generated picture; the model's `image_out_tokens`.
        audio_reduction: mel frames to a slot of a generated clip.
        longest: tokens; a longer target text loses its end and its `<eos>`.
    """

    def __init__(
        self, processor: GeminiProcessor, image_slots: int = 16, audio_reduction: int = 4, longest: int = 160
    ) -> None:
        self.processor, self.image_slots = processor, image_slots
        self.audio_reduction, self.longest = audio_reduction, longest
        self._slots = torch.tensor(processor.tokenizer.convert_tokens_to_ids(["<image_out>", "<audio_out>"]))

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """input_ids, attention_mask, labels [B, S] int64, and label_weights [B, S] float32: 1 / sqrt(n) for each of the
        n tokens of a target text, 0 elsewhere. With 1 for all, the long texts would drown the answers of a word, and
        1 / n would drown the texts. Then, where there are any, in the order of the examples,
        pixel_values [N, 1, 8, 8], input_features [N, 40, T] with feature_lengths [N], image_targets [N, 1, 8, 8], and
        audio_targets [N, 40, T'] with target_lengths [N], T' a multiple of `audio_reduction`, silent after the end.
        """
        pairs = self.encode(examples)
        ids = [torch.tensor(prompt + target) for prompt, target in pairs]
        labels = [torch.tensor([IGNORED] * len(prompt) + target) for prompt, target in pairs]
        pad = self.processor.tokenizer.pad_token_id
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }
        counts = (batch["labels"] != IGNORED) & ~torch.isin(batch["labels"], self._slots)
        batch["label_weights"] = counts / counts.sum(1, keepdim=True).clamp(min=1).sqrt()
        images = [image for example in examples for image in example.images]
        sounds = [sound for example in examples for sound in example.sounds]
        drawn = [example.image for example in examples if example.image is not None]
        said = [example.sound for example in examples if example.sound is not None]
        if images:
            batch["pixel_values"] = torch.stack(images)
        if sounds:
            batch["input_features"], batch["feature_lengths"] = pad_features(sounds)
        if drawn:
            batch["image_targets"] = torch.stack(drawn)
        if said:
            batch["audio_targets"], batch["target_lengths"] = pad_features(said, self.audio_reduction)
        return batch

    def encode(self, examples: Sequence[Example]) -> list[tuple[list[int], list[int]]]:
        """For each example the ids of `<bos>` and the prompt, and those of the target and `<eos>`."""
        tokenizer = self.processor.tokenizer
        frames = [sound.shape[1] for example in examples for sound in example.sounds]
        prompts, _ = self.processor.expand([example.prompt for example in examples], frames)
        before = tokenizer(prompts).input_ids
        after = tokenizer([self._target(example) for example in examples], add_special_tokens=False).input_ids
        pairs = []
        for example, prompt, target in zip(examples, before, after, strict=True):
            room = self.longest - len(prompt)
            if room <= len(target) and (example.text is None or room < 1):
                raise ValueError(f"an example of {example.task} has over {self.longest} tokens")
            pairs.append((prompt, [*target, tokenizer.eos_token_id][:room]))
        return pairs

    def _target(self, example: Example) -> str:
        if example.image is not None:
            return "<boi>" + "<image_out>" * self.image_slots + "<eoi>"
        if example.sound is not None:
            return "<boa>" + "<audio_out>" * -(-example.sound.shape[1] // self.audio_reduction) + "<eoa>"
        assert example.text is not None
        return example.text


class MixedBatches:
    """An endless iterator over lists of training examples, tasks drawn by weight, each list of similar lengths.

    Batch k is a function of the arguments and k alone, so training that resumes with `start=k` goes on exactly.

    Args:
        weights: task -> how often, relative to the others; 0 leaves it out.
        batch_size: examples in a list.
        seed: of all that is drawn.
        start: the number of the first batch.
        rank: other numbers, for other processes, give other examples.
        moved: see `training_example`.
    """

    def __init__(
        self,
        weights: Mapping[str, float] = WEIGHTS,
        batch_size: int = 32,
        seed: int = 0,
        start: int = 0,
        rank: int = 0,
        moved: float = 1.0,
    ) -> None:
        if batch_size < 1 or start < 0:
            raise ValueError(f"batch_size, start: got {batch_size}, {start}, expected at least 1 and 0")
        if not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
            raise ValueError(f"weights: got {dict(weights)}, expected numbers of 0 or more, one above 0")
        self._tasks = list(weights)
        self._shares = np.array([weights[task] for task in self._tasks], dtype=np.float64)
        self._shares /= self._shares.sum()
        if not 0.0 <= moved <= 1.0:
            raise ValueError(f"moved: got {moved}, expected a share, 0 to 1")
        self.batch_size, self.seed, self.step, self.rank, self.moved = batch_size, seed, start, rank, moved
        self._pool: list[list[Example]] = []
        self._pool_number = -1

    def __iter__(self) -> Iterator[list[Example]]:
        return self

    def __next__(self) -> list[Example]:
        number, index = divmod(self.step, _POOL)
        if number != self._pool_number:
            self._pool, self._pool_number = self._fill(number), number
        self.step += 1
        return self._pool[index]

    def _fill(self, number: int) -> list[list[Example]]:
        """The batches of one pool, sorted by length within it and then shuffled."""
        rng = np.random.default_rng([self.seed, self.rank, number])
        names = rng.choice(self._tasks, size=_POOL * self.batch_size, p=self._shares)
        examples = sorted((training_example(str(name), rng, self.moved) for name in names), key=_length)
        lists = [examples[i : i + self.batch_size] for i in range(0, len(examples), self.batch_size)]
        return [lists[i] for i in rng.permutation(len(lists))]


def _length(example: Example) -> float:
    """About how many tokens: three characters of text to one, four frames, a picture's slots."""
    frames = sum(sound.shape[1] for sound in example.sounds) + (0 if example.sound is None else example.sound.shape[1])
    return len(example.prompt + (example.text or "")) / 3 + frames / 4 + (0 if example.image is None else 16)
