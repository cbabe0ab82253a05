"""Generated images and sounds: what stands in their slots of the sequence, and what a hidden state says comes next.

Both are autoregressive. Slot i holds what was generated i-th, and the hidden state of the position before a slot
predicts what the slot will hold:

    boi        image_out 0   image_out 1  ...  image_out n - 1   eoi
    predicts:  patch 0       patch 1           patch n - 1

An image is a raster of patches; a pixel is a categorical over `image_levels`, independent of the others of its patch
given the hidden state. So a drawing can be sampled: a regression would draw the mean of all hands. A sound is a
sequence of groups of mel frames, as in Tacotron (Wang et al., 2017): each is regressed, with a probability that it is
the last, and fed back through a bottleneck with dropout, without which the model would copy the previous group. Beside
it, the slot's position is embedded: where what is fed back is poor, a clip can still be told from the time alone, which
minutes of training suffice to learn. At generation nothing is dropped, so that a prompt has one sound.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .audio import SILENCE
from .configuration import GeminiConfig
from .encoders import check_frames, hide_padding


def for_loss(x: Tensor) -> Tensor:
    """What a loss is computed from: float32, or float64 of a model in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class ImageDecoder(nn.Module):
    """Images [N, C, H, W] in [0, 1] as P patches of K = C * patch_size^2 pixels."""

    def __init__(self, config: GeminiConfig) -> None:
        super().__init__()
        self.side, self.levels = config.patch_size, config.image_levels
        self.shape = (config.image_channels, config.image_size, config.image_size)
        self.patches, self.pixels = config.image_out_tokens, config.image_channels * config.patch_size**2
        self.embedding = nn.Linear(self.pixels, config.hidden_size)
        self.positions = nn.Embedding(self.patches, config.hidden_size)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, self.pixels * self.levels)

    def split(self, images: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, P, K]."""
        if images.dim() != 4 or tuple(images.shape[1:]) != self.shape:
            raise ValueError(
                f"image_targets: got shape {list(images.shape)}, expected [N, C, H, W] = [N, *{self.shape}]"
            )
        return F.unfold(images, self.side, stride=self.side).transpose(1, 2)

    def join(self, patches: Tensor) -> Tensor:
        """[N, P, K] -> [N, C, H, W]."""
        return F.fold(patches.transpose(1, 2), self.shape[1:], self.side, stride=self.side)

    def embed(self, patches: Tensor, first: int = 0) -> Tensor:
        """Patches first, first + 1, ... of N images [N, n, K] -> [N, n, E]."""
        position = self.positions.weight[first : first + patches.shape[1]]
        return self.norm(self.embedding(2.0 * patches.to(position.dtype) - 1.0) + position)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., K, levels] of the pixels of the next patch, from [..., E]."""
        return self.head(hidden).unflatten(-1, (self.pixels, self.levels))

    def loss(self, hidden: Tensor, images: Tensor) -> Tensor:
        """Mean cross-entropy of a pixel, in nats. hidden [N * P, E], of the positions before the slots."""
        level = (self.split(images) * (self.levels - 1)).round().long()  # [N, P, K]
        if bool(((level < 0) | (level >= self.levels)).any()):
            raise ValueError("image_targets: got pixel values outside of 0 .. 1")
        return F.cross_entropy(for_loss(self(hidden).flatten(0, 1)), level.flatten())

    def draw(self, hidden: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
        """The next patch [N, K] of N images: sampled, or the likeliest levels at temperature 0."""
        logits = self(hidden).float()  # [N, K, levels]
        if temperature == 0.0:
            level = logits.argmax(-1)
        else:
            chances = (logits / temperature).softmax(-1).flatten(0, 1)
            level = torch.multinomial(chances, 1, generator=generator).view(logits.shape[:2])
        return level / (self.levels - 1)


class AudioDecoder(nn.Module):
    """Log-mel clips [N, bins, T] as slots of K = audio_reduction * bins values, frame after frame."""

    def __init__(self, config: GeminiConfig) -> None:
        super().__init__()
        self.reduction, self.mel_bins, self.most = config.audio_reduction, config.num_mel_bins, config.max_audio_slots
        size, narrow = config.hidden_size, config.audio_prenet_size
        self.prenet = nn.ModuleList([nn.Linear(self.reduction * self.mel_bins, narrow), nn.Linear(narrow, narrow)])
        self.dropout = nn.Dropout(config.audio_prenet_dropout)
        self.embedding = nn.Linear(narrow, size)
        self.positions = nn.Embedding(self.most, size)
        self.norm = nn.RMSNorm(size, config.rms_norm_eps)
        self.head = nn.Linear(size, self.reduction * self.mel_bins + 1)  # and the logit of "this is the last slot"

    def split(self, frames: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """[N, bins, T] -> [N, slots, K], silent past each clip's end, and the lengths [N] in frames."""
        lengths = check_frames("audio_targets", frames, lengths, self.mel_bins)
        x = hide_padding(frames, lengths, SILENCE)
        x = F.pad(x, (0, -frames.shape[2] % self.reduction), value=SILENCE)
        slots = x.transpose(1, 2).unflatten(1, (-1, self.reduction)).flatten(2)
        if int(lengths.max()) > self.most * self.reduction:
            raise ValueError(f"audio_targets: got {int(lengths.max())} frames, expected at most max_audio_slots' worth")
        return slots[:, : self.most], lengths

    def join(self, slots: Tensor) -> Tensor:
        """[N, slots, K] -> [N, bins, slots * reduction]."""
        return slots.unflatten(2, (self.reduction, self.mel_bins)).flatten(1, 2).transpose(1, 2)

    def embed(self, slots: Tensor, first: int = 0) -> Tensor:
        """Slots first, first + 1, ... of N clips [N, n, K] -> [N, n, E]."""
        position = self.positions.weight[first : first + slots.shape[1]]
        x = slots.to(position.dtype)
        for layer in self.prenet:
            x = self.dropout(F.relu(layer(x)))
        return self.norm(self.embedding(x) + position)

    def in_use(self, lengths: Tensor, slots: int) -> Tensor:
        """bool [N, slots]: which slots hold a frame."""
        return torch.arange(slots, device=lengths.device) * self.reduction < lengths[:, None]

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The frames [..., K] of the next slot and the logit [...] that it is the last, from [..., E]."""
        out = self.head(hidden)
        return out[..., :-1], out[..., -1]

    def loss(self, hidden: Tensor, frames: Tensor, lengths: Tensor | None) -> Tensor:
        """Mean |error| + error^2 of a log-mel value, plus the mean cross-entropy of a slot's being the last, in nats.

        hidden: [used slots of all clips, E], of the positions before the slots.
        """
        slots, lengths = self.split(frames, lengths)
        used = self.in_use(lengths, slots.shape[1])
        said, stop = (for_loss(t) for t in self(hidden))  # [used, K], [used]
        frame = torch.arange(slots.shape[1] * self.reduction, device=slots.device).view(slots.shape[1], -1)
        real = (frame < lengths[:, None, None])[used]  # [used, reduction]
        error = (said - slots[used].to(said.dtype)).unflatten(1, (self.reduction, -1))[real]
        last = ((frame[:, -1] + 1 >= lengths[:, None])[used]).to(stop.dtype)
        return error.abs().mean() + error.square().mean() + F.binary_cross_entropy_with_logits(stop, last)
