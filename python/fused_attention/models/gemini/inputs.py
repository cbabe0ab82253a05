"""Images and sound on their way into the sequence: preprocessing, slots, and what fills them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import audio
from .decoders import AudioDecoder, ImageDecoder
from .encoders import AudioEncoder, ImageEncoder


class Media(NamedTuple):
    """What is no text in one call of the model; see `GeminiModel.forward`."""

    pixel_values: Tensor | None = None
    input_features: Tensor | None = None
    feature_lengths: Tensor | None = None
    image_targets: Tensor | None = None
    audio_targets: Tensor | None = None
    target_lengths: Tensor | None = None

    def any(self) -> bool:
        return any(t is not None for t in self)


def _fill(x: Tensor, slots: Tensor, vectors: Tensor, name: str) -> Tensor:
    """x [B, S, E] with vectors [n, E] in its n slots (bool [B, S]), row by row."""
    if int(slots.sum()) != vectors.shape[0]:
        raise ValueError(f"{name}: got {vectors.shape[0]} vectors for {int(slots.sum())} slots in input_ids")
    return x.index_put((slots,), vectors.to(x.dtype))


class MediaInputs(nn.Module):
    """The part of `GeminiModel` between its inputs and the first layer."""

    config: Any  # GeminiConfig; PreTrainedModel declares it wider
    embed_tokens: nn.Embedding
    embed_scale: float
    image_encoder: ImageEncoder
    audio_encoder: AudioEncoder
    image_decoder: ImageDecoder
    audio_decoder: AudioDecoder

    def embed(self, ids: Tensor, media: Media, continued: bool = False) -> Tensor:
        """ids [B, S] -> [B, S, E], every slot filled.

        continued: what comes first is in a cache already. Then images cannot be added, whose tokens see each other, and
            a slot without a filling is a token that was generated as text.
        """
        if continued and media.any():
            raise ValueError("images and sound come with the first tokens of a sequence, not after what is in a cache")
        x = self.embed_tokens(ids) * self.embed_scale
        for token, name, vectors in self._fillings(media):
            slots = ids == token
            if vectors is not None:
                x = _fill(x, slots, vectors, name)
            elif not continued and bool(slots.any()):
                raise ValueError(f"{name}: got None for {int(slots.sum())} slots in input_ids")
        return x

    def _fillings(self, media: Media) -> list[tuple[int, str, Tensor | None]]:
        """(token, name, vectors [n, E]) of each modality."""
        config = self.config
        pixels = features = images = sounds = None
        if media.pixel_values is not None:
            pixels = self.image_encoder(media.pixel_values).flatten(0, 1)
        if media.input_features is not None:
            features = self.audio_encoder(media.input_features, media.feature_lengths)
        if media.image_targets is not None:
            images = self.image_decoder.embed(self.image_decoder.split(media.image_targets)).flatten(0, 1)
        if media.audio_targets is not None:
            slots, lengths = self.audio_decoder.split(media.audio_targets, media.target_lengths)
            used = self.audio_decoder.in_use(lengths, slots.shape[1])
            sounds = self.audio_decoder.embed(slots)[used]
        return [
            (config.image_token_id, "pixel_values", pixels),
            (config.audio_token_id, "input_features", features),
            (config.image_out_token_id, "image_targets", images),
            (config.audio_out_token_id, "audio_targets", sounds),
        ]

    def image_blocks(self, ids: Tensor) -> Tensor:
        """[B, S]: which input image of its sequence a token belongs to; -1 for all other tokens."""
        image = ids == self.config.image_token_id
        number = (image.long().cumsum(1) - 1) // self.config.image_tokens
        return number.masked_fill(~image, -1)

    def before_slots(self, hidden: Tensor, ids: Tensor, token: int) -> Tensor:
        """The hidden states [n, E] that predict the n slots of a token: of the positions before them."""
        slots = ids == token
        if bool(slots[:, 0].any()):
            raise ValueError("input_ids: got a generated slot as a first token, expected boi or boa before it")
        return hidden[:, :-1][slots[:, 1:]]

    # --- as users hand them over --------------------------------------------------------------------------------------

    def preprocess_image(self, image: Any) -> Tensor:
        """An image as `pixel_values` [1, C, H, W] in [0, 1], scaled to the model's size.

        image: a PIL image; or an array or tensor [H, W], [H, W, C] or [C, H, W], uint8 or floats in [0, 1].
        """
        config = self.config
        if hasattr(image, "convert"):
            import numpy

            modes = {1: "L", 3: "RGB", 4: "RGBA"}
            image = numpy.array(image.convert(modes[config.image_channels]))
        pixels = torch.as_tensor(image)
        if pixels.dim() == 2:
            pixels = pixels[None]
        elif (
            pixels.dim() == 3 and pixels.shape[2] == config.image_channels and pixels.shape[0] != config.image_channels
        ):
            pixels = pixels.permute(2, 0, 1)
        if pixels.dim() != 3 or pixels.shape[0] != config.image_channels:
            raise ValueError(f"image: got shape {list(pixels.shape)}, expected {config.image_channels} channel(s)")
        pixels = pixels.float() / 255.0 if pixels.dtype == torch.uint8 else pixels.float()
        if not bool(((pixels >= 0.0) & (pixels <= 1.0)).all()):
            raise ValueError("image: got values outside of 0 .. 1, expected uint8, or floats scaled to 0 .. 1")
        size = (config.image_size, config.image_size)
        if tuple(pixels.shape[1:]) != size:
            pixels = F.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0].clamp(0.0, 1.0)
        return pixels[None].to(self.embed_tokens.weight.device)

    def preprocess_audio(self, samples: Any, sampling_rate: int = audio.SAMPLING_RATE) -> Tensor:
        """A mono clip as `input_features` [1, num_mel_bins, 1 + T // 160]: see `log_mel`.

        samples: array, list or tensor [T], floats in [-1, 1].
        """
        wave = torch.as_tensor(samples, dtype=torch.float32)
        return audio.log_mel(wave, sampling_rate, self.config.num_mel_bins)[None].to(self.embed_tokens.weight.device)

    def join_inputs(self, text: Any, image: Tensor | None = None, sound: Tensor | None = None) -> dict[str, Tensor]:
        """Image and sound in front of a text, as `boi image.. eoi boa audio.. eoa text`, behind its bos if it has one.

        Args:
            text: a tokenizer's output with input_ids [1, S], and attention_mask if it has one; or the ids themselves.
            image: [N, C, H, W], as from `preprocess_image`, in order.
            sound: [N, num_mel_bins, T], as from `preprocess_audio`, all of length T.

        Returns:
            input_ids, attention_mask, and pixel_values and input_features where given, for `forward` and `generate`.
        """
        config, device = self.config, self.embed_tokens.weight.device
        ids = (text if isinstance(text, Tensor) else text["input_ids"]).to(device)
        mask = None if isinstance(text, Tensor) else text.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask.to(device)
        if (image is not None or sound is not None) and ids.shape[0] != 1:
            raise ValueError(f"input_text: got {ids.shape[0]} sequences, expected one; use a processor for a batch")
        front: list[int] = []
        joined: dict[str, Tensor] = {}
        if image is not None:
            front += [config.boi_token_id, *[config.image_token_id] * config.image_tokens, config.eoi_token_id] * len(
                image
            )
            joined["pixel_values"] = image
        if sound is not None:
            slots = config.audio_slots(sound.shape[2])
            front += [config.boa_token_id, *[config.audio_token_id] * slots, config.eoa_token_id] * len(sound)
            joined["input_features"] = sound
        start = 1 if front and int(ids[0, 0]) == config.bos_token_id else 0
        put = torch.tensor([front], dtype=ids.dtype, device=device).expand(ids.shape[0], -1)
        ids = torch.cat([ids[:, :start], put, ids[:, start:]], 1)
        mask = torch.cat([mask[:, :start], torch.ones_like(put), mask[:, start:]], 1)
        return {"input_ids": ids, "attention_mask": mask, **joined}
