"""Classifiers that say what a generated picture shows and what a generated clip says.

They learn from real data alone, the training digits and the clips of the training voices, and are measured on the
held-out digits and voices: what they recognise in a generated medium is what a reader or listener of real ones would.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .audio import MEL_BINS, SILENCE, log_mel
from .data import cache, digits, speech

_FRAMES = 80  # 0.8 s: a digit is shorter
_CLASSES = 10
_EPOCHS = 12
_BATCH = 64
_SEED = 0
_VERSION = 1  # of the network and its training, in the cache's name


class DigitJudge:
    """Recognises handwritten digits: a support vector machine with a radial kernel on the 64 pixels."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        from sklearn.svm import SVC

        self._machine = SVC(C=10.0, gamma=0.05).fit(images.flatten(1).numpy(), labels.numpy())

    def recognise(self, images: Tensor) -> Tensor:
        """The digits [N], int64, of pictures [N, 1, 8, 8] with values in [0, 1]."""
        if images.dim() != 4 or images.shape[1:] != (1, digits.SIZE, digits.SIZE):
            raise ValueError(f"images: got {list(images.shape)}, expected [N, 1, {digits.SIZE}, {digits.SIZE}]")
        pixels = images.detach().cpu().float().flatten(1).numpy()
        return torch.from_numpy(np.asarray(self._machine.predict(pixels)))


class SpeechJudge:
    """Recognises spoken digits: a small convolutional network on log-mel frames, each bin less its clip's mean."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network.eval()

    @torch.no_grad()
    def recognise(self, clips: Sequence[Any]) -> Tensor:
        """The digits [N], int64, of clips: waveforms [T] at 16 kHz, tensor or NumPy, or log-mel frames [40, T]."""
        if not len(clips):
            return torch.empty(0, dtype=torch.int64)
        frames = torch.stack([_fit(_frames(clip)) for clip in clips])
        return torch.cat([self._network(part).argmax(1) for part in _normalise(frames).split(256)])


@functools.cache
def digit_judge() -> DigitJudge:
    """The judge of pictures; trained when first asked for, in a fraction of a second."""
    return DigitJudge(*digits.load("train"))


@functools.cache
def speech_judge() -> SpeechJudge:
    """The judge of clips; trained when first asked for, and kept in the user's cache."""
    path = cache.folder() / f"speech-judge-{_VERSION}.pt"
    if not path.exists():
        network = _train()
        cache.write(path, lambda file: torch.save(network.state_dict(), file))
    network = _network()
    network.load_state_dict(torch.load(path, weights_only=True))
    return SpeechJudge(network)


def spoken_digits(split: str) -> tuple[list[Tensor], Tensor]:
    """The log-mel frames [40, T_i] of the digits among the clips of `split`, and their labels [N], int64."""
    clips = [clip for clip in speech.load(split) if clip.word < _CLASSES]
    return [_frames(clip.samples) for clip in clips], torch.tensor([clip.word for clip in clips])


def _frames(clip: Any) -> Tensor:
    samples = torch.as_tensor(clip).detach().cpu().float()
    if samples.dim() == 2 and samples.shape[0] == MEL_BINS:
        return samples
    if samples.dim() != 1:
        raise ValueError(f"clips: got one of shape {list(samples.shape)}, expected [T] or [{MEL_BINS}, T]")
    return log_mel(samples)


def _fit(frames: Tensor, start: int | None = None) -> Tensor:
    """[40, T] -> [40, 80]: silence around, the clip in the middle or from frame `start`; a longer one loses its end."""
    frames = frames[:, :_FRAMES]
    room = _FRAMES - frames.shape[1]
    before = room // 2 if start is None else min(start, room)
    return nn.functional.pad(frames, (before, room - before), value=SILENCE)


def _normalise(frames: Tensor) -> Tensor:
    """[N, 40, 80] -> [N, 1, 40, 80] without what loudness and a timbre's mean spectrum add to every frame."""
    return (frames - frames.mean(2, keepdim=True))[:, None]


def _network() -> nn.Module:
    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    layers = [*block(1, 16, 2), *block(16, 32, 2), *block(32, 64, 2)]  # [N, 64, 5, 10]
    pool = [nn.AdaptiveAvgPool2d((5, 5)), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 25, _CLASSES)]
    return nn.Sequential(*layers, *pool)


def _train() -> nn.Module:
    """Adam with a cosine schedule; clips moved in time and in frequency, parts of them hidden (SpecAugment).

    Moving a spectrum by a bin or two is what another length of the vocal tract does to it.
    """
    frames, labels = spoken_digits("train")
    rng = np.random.default_rng(_SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        network = _network().train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
        steps = _EPOCHS * -(-len(frames) // _BATCH)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(_EPOCHS):
            for rows in np.array_split(rng.permutation(len(frames)), -(-len(frames) // _BATCH)):
                batch = torch.stack([_disturb(frames[row], rng) for row in rows])
                loss = nn.functional.cross_entropy(network(_normalise(batch)), labels[rows], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return network


def _disturb(frames: Tensor, rng: np.random.Generator) -> Tensor:
    fitted = _fit(frames, int(rng.integers(0, _FRAMES)))
    bins = (torch.arange(MEL_BINS) + int(rng.integers(-2, 3))).clamp(0, MEL_BINS - 1)
    fitted = fitted[bins]
    low, width = int(rng.integers(0, MEL_BINS - 4)), int(rng.integers(0, 5))
    fitted[low : low + width] = SILENCE
    low, width = int(rng.integers(0, _FRAMES - 8)), int(rng.integers(0, 9))
    fitted[:, low : low + width] = SILENCE
    return fitted
