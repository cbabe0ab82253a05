"""Images and sounds become vectors of the sequence, of the size that token embeddings have.

image [C, H, W]    -> 3 x 3 convolutions, some of stride 2 -> [n, n, E], n * n = image_tokens
log-mel [bins, T]  -> convolutions over time, some of stride 2 -> [ceil(T / reduction), E]
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration import GeminiConfig


class ImageEncoder(nn.Module):
    """A small convolutional stem: the grid is halved until it has `image_tokens` cells, each of which is a token."""

    def __init__(self, config: GeminiConfig) -> None:
        super().__init__()
        size, grid = config.hidden_size, math.isqrt(config.image_tokens)
        halvings = (config.image_size // grid).bit_length() - 1
        # Channels double with every halving and end at E.
        widths = [max(8, size >> (halvings - i)) for i in range(halvings)] + [size]
        self.first = nn.Conv2d(config.image_channels, widths[0], 3, padding=1)
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.halve = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairs)
        self.positions = nn.Embedding(config.image_tokens, size)
        self.norm = nn.RMSNorm(size, config.rms_norm_eps)
        self.shape = (config.image_channels, config.image_size, config.image_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [N, C, H, W] in [0, 1]; returns [N, image_tokens, E], row by row of the grid."""
        if pixels.dim() != 4 or tuple(pixels.shape[1:]) != self.shape:
            raise ValueError(
                f"pixel_values: got shape {list(pixels.shape)}, expected [N, C, H, W] = [N, *{self.shape}]"
            )
        x = self.first(2.0 * pixels.to(self.first.weight.dtype) - 1.0)  # [N, c, H, W]
        for convolution in self.halve:
            x = convolution(F.silu(x))
        x = x.flatten(2).transpose(1, 2)  # [N, image_tokens, E]
        return self.norm(x + self.positions.weight)


class AudioEncoder(nn.Module):
    """Convolutions over time. What follows a clip's last frame is zero at every layer, as outside of a clip that is
    alone, so that padding changes nothing."""

    def __init__(self, config: GeminiConfig) -> None:
        super().__init__()
        size = config.hidden_size
        halvings = config.audio_reduction.bit_length() - 1
        self.first = nn.Conv1d(config.num_mel_bins, size, 3, padding=1)
        self.halve = nn.ModuleList(nn.Conv1d(size, size, 3, stride=2, padding=1) for _ in range(halvings))
        self.norm = nn.RMSNorm(size, config.rms_norm_eps)
        self.mel_bins = config.num_mel_bins

    def forward(self, frames: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The tokens of all clips, one clip after the other.

        frames: [N, num_mel_bins, T] log-mel. lengths: [N] frames of each clip, 1 .. T; None: T.
        Returns [sum of ceil(length / reduction), E].
        """
        lengths = check_frames("input_features", frames, lengths, self.mel_bins)
        x = self.first(hide_padding(frames.to(self.first.weight.dtype), lengths))  # [N, E, T]
        for convolution in self.halve:
            x = convolution(hide_padding(F.silu(x), lengths))  # [N, E, ceil(T / 2)]
            lengths = (lengths + 1) // 2
        x = self.norm(x.transpose(1, 2).to(self.norm.weight.dtype))  # [N, slots, E]; autocast made it narrower
        return x[torch.arange(x.shape[1], device=x.device) < lengths[:, None]]


def hide_padding(x: Tensor, lengths: Tensor, value: float = 0.0) -> Tensor:
    """x [N, C, T] with `value` at and past each length."""
    padding = torch.arange(x.shape[2], device=x.device) >= lengths[:, None]
    return x.masked_fill(padding[:, None], value)


def check_frames(name: str, frames: Tensor, lengths: Tensor | None, mel_bins: int) -> Tensor:
    """The lengths [N] of clips [N, mel_bins, T], all T by default."""
    if frames.dim() != 3 or frames.shape[1] != mel_bins:
        raise ValueError(f"{name}: got shape {list(frames.shape)}, expected [N, num_mel_bins, T] = [N, {mel_bins}, T]")
    count, _, longest = frames.shape
    if lengths is None:
        return torch.full((count,), longest, device=frames.device)
    if tuple(lengths.shape) != (count,):
        raise ValueError(f"{name}: got lengths of shape {list(lengths.shape)}, expected [N] = [{count}]")
    if bool(((lengths < 1) | (lengths > longest)).any()):
        raise ValueError(f"{name}: got lengths {lengths.tolist()}, expected 1 .. {longest} frames")
    return lengths.to(frames.device)
