"""Log-mel frames of a waveform, and a waveform of log-mel frames.

    mel     = filters |STFT(samples)|^2     25 ms Hann windows every 10 ms, 40 triangles on the HTK scale
    log-mel = max(log10(mel), -4) / 4       -1 is silence; 1, loud speech, is 80 dB above it

Layout: samples [T], float, in [-1, 1]; frames [num_mel_bins, 1 + T // HOP].
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

SAMPLING_RATE = 16_000  # Hz
WINDOW, HOP = 400, 160  # samples
MEL_BINS = 40
SILENCE = -1.0  # the smallest value of a frame
_FLOOR = 1e-4  # in mel; 16-bit rounding noise is below it


def _mel(hertz: float) -> float:
    return 2595.0 * math.log10(1.0 + hertz / 700.0)


@functools.lru_cache(maxsize=8)
def _filters(mel_bins: int) -> Tensor:
    """Triangles [mel_bins, WINDOW / 2 + 1] that peak at 1, float64, evenly spaced in mel from 0 Hz to 8 kHz."""
    mel = torch.linspace(0.0, _mel(SAMPLING_RATE / 2), mel_bins + 2, dtype=torch.float64)
    edges = 700.0 * (10.0 ** (mel / 2595.0) - 1.0)
    hertz = torch.linspace(0.0, SAMPLING_RATE / 2, WINDOW // 2 + 1, dtype=torch.float64)
    rising = (hertz - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - hertz) / (edges[2:] - edges[1:-1])[:, None]
    return torch.minimum(rising, falling).clamp(min=0.0)


def _check(samples: Tensor, sampling_rate: int) -> None:
    if sampling_rate != SAMPLING_RATE:
        raise ValueError(f"sampling_rate: got {sampling_rate} Hz, expected {SAMPLING_RATE}; resample first")
    if samples.dim() != 1 or not samples.is_floating_point() or not samples.numel():
        raise ValueError(f"samples: got {samples.dtype} {list(samples.shape)}, expected floats [T] in [-1, 1], T > 0")


def _window(like: Tensor) -> Tensor:
    return torch.hann_window(WINDOW, dtype=like.dtype, device=like.device)


def log_mel(samples: Tensor, sampling_rate: int = SAMPLING_RATE, mel_bins: int = MEL_BINS) -> Tensor:
    """Log-mel frames of one clip.

    Args:
        samples: [T], float32 or float64, in [-1, 1].
        sampling_rate: Hz; 16,000 only.
        mel_bins: how many triangles.

    Returns:
        [mel_bins, 1 + T // 160] in the dtype of samples, from -1 (silence) to about 1. Frame i is centred at sample
        160 i; nothing depends on the rest of the clip, so clips of all lengths have the same scale.

    Raises:
        ValueError: another rate or shape.
    """
    _check(samples, sampling_rate)
    window = _window(samples)
    spectrum = torch.stft(samples, WINDOW, HOP, window=window, pad_mode="constant", return_complex=True)
    mel = _filters(mel_bins).to(samples) @ spectrum.abs().square()  # [mel_bins, frames]
    return mel.clamp(min=_FLOOR).log10() / 4.0


def _linear_power(mel: Tensor, steps: int = 50) -> Tensor:
    """Nonnegative power spectrum [WINDOW / 2 + 1, frames] whose filtered sums are `mel`.

    Multiplicative updates for least squares (Lee and Seung, "Algorithms for non-negative matrix factorization", 2000).
    """
    filters = _filters(mel.shape[0]).to(mel)
    wanted, tiny = filters.T @ mel, torch.finfo(mel.dtype).tiny
    power = (filters.T @ (mel / filters.sum(1, keepdim=True))).clamp(min=1e-10)
    for _ in range(steps):
        power = power * wanted / (filters.T @ (filters @ power)).clamp(min=tiny)
    return power


def griffin_lim(mel: Tensor, iterations: int = 32) -> Tensor:
    """A waveform with these log-mel frames (Griffin and Lim, 1984; with momentum: Perraudin et al., 2013).

    Phases start from a fixed seed, so the same frames give the same samples.

    Args:
        mel: [mel_bins, frames] as `log_mel` makes them; what lies outside -1 .. 1.5 is clipped.
        iterations: how often the phases are made consistent; 0: they stay random.

    Returns:
        [160 (frames - 1)] samples in [-1, 1], float32.

    Raises:
        ValueError: another shape, or fewer than 2 frames.
    """
    if mel.dim() != 2 or mel.shape[1] < 2:
        raise ValueError(f"mel: got shape {list(mel.shape)}, expected [mel_bins, frames] of at least 2 frames")
    power = 10.0 ** (4.0 * mel.detach().float().clamp(SILENCE, 1.5))
    power = torch.where(power <= _FLOOR * 1.001, 0.0, power)  # silence is silent, not noise at the floor
    magnitude = _linear_power(power).sqrt()
    window, length = _window(magnitude), HOP * (mel.shape[1] - 1)
    generator = torch.Generator(device="cpu").manual_seed(0)
    angle = 2.0 * math.pi * torch.rand(magnitude.shape, generator=generator)
    phase = torch.polar(torch.ones_like(angle), angle).to(magnitude.device)
    before = torch.zeros_like(phase)
    for _ in range(iterations):
        wave = torch.istft(magnitude * phase, WINDOW, HOP, window=window, length=length)
        now = torch.stft(wave, WINDOW, HOP, window=window, pad_mode="constant", return_complex=True)
        phase = now + 0.99 * (now - before)
        phase = phase / phase.abs().clamp(min=1e-12)
        before = now
    wave = torch.istft(magnitude * phase, WINDOW, HOP, window=window, length=length)
    return wave.clamp(-1.0, 1.0)
