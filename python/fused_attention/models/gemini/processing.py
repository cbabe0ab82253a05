"""Text, pictures and sound into the arguments of the model.

    "What digit is it? <image>" + a picture  ->  <bos> what digit is it ? <boi> <image> * image_tokens <eoi>
    "Transcribe: <audio>" + a clip           ->  <bos> transcribe : <boa> <audio> * ceil(frames / audio_stride) <eoa>

`<video>` stands for as many `<image>` as the clip has frames, in their order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BatchFeature, ProcessorMixin

from .audio import MEL_BINS, SAMPLING_RATE, SILENCE, log_mel
from .resampling import resample
from .tokenization import GeminiTokenizer

_PLACEHOLDER = re.compile("<image>|<audio>|<video>")
_LUMA = (0.299, 0.587, 0.114)  # of red, green, blue: ITU-R BT.601


class GeminiProcessor(ProcessorMixin):
    """Joins the tokenizer with what becomes of pictures and sound.

    Args:
        tokenizer: a `GeminiTokenizer`.
        image_tokens: slots of an input image; the model's `image_tokens`.
        audio_stride: mel frames to a slot of an input clip; the model's `audio_reduction`.
        image_size: pixels of a side; the model's `image_size`.
    """

    tokenizer: GeminiTokenizer

    def __init__(
        self, tokenizer: GeminiTokenizer, image_tokens: int = 4, audio_stride: int = 4, image_size: int = 8
    ) -> None:
        sizes = {"image_tokens": image_tokens, "audio_stride": audio_stride, "image_size": image_size}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        self.image_tokens, self.audio_stride, self.image_size = image_tokens, audio_stride, image_size
        super().__init__(tokenizer)

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: Any = None,
        audio: Any = None,
        videos: Any = None,
        *,
        sampling_rate: int = SAMPLING_RATE,
        padding_side: str = "left",
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """The model's arguments for one prompt or a batch of them.

        Args:
            text: one text or several, each with a placeholder for every medium in it. One text without any, or none,
                has all media in front of it.
            images: one picture or a list, in the order of the placeholders through the whole batch: PIL, NumPy or
                tensor, [H, W], [H, W, C] or [C, H, W] with C of 1 or 3; uint8, or floats in [0, 1].
            audio: one clip or a list, likewise: NumPy or tensor, [T] or [channels, T]; int16, or floats in [-1, 1].
            videos: one list of pictures, or a list of such lists, likewise.
            sampling_rate: Hz of `audio`; resampled to 16 kHz.
            padding_side: "left" to generate, "right" to train.
            return_tensors: "pt" only.

        Returns:
            input_ids, attention_mask [B, S] int64; with pictures pixel_values [N, 1, 8, 8] float32 in [0, 1]; with
            sound input_features [M, 40, T] float32, silent after the end of a clip, and feature_lengths [M] int64.

        Raises:
            ValueError: placeholders and media differ in number, a medium has another shape or range.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors: got {return_tensors!r}, expected 'pt'")
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side: got {padding_side!r}, expected 'left' or 'right'")
        stills = [to_pixels(image, self.image_size) for image in _as_list(images)]
        clips = [[to_pixels(frame, self.image_size) for frame in video] for video in _as_videos(videos)]
        sounds = [to_log_mel(sound, sampling_rate) for sound in _as_list(audio)]
        texts = _with_placeholders(text, len(stills), len(sounds), len(clips))
        lengths = [sound.shape[1] for sound in sounds]
        expanded, kinds = self.expand(texts, lengths, [len(clip) for clip in clips])
        if kinds.count("<image>") != len(stills):
            raise ValueError(f"images: got {len(stills)}, expected {kinds.count('<image>')}, one per <image>")
        data = dict(self.tokenizer(expanded, padding=True, padding_side=padding_side, return_tensors="pt"))
        waiting, moving = iter(stills), iter(clips)
        pixels = [p for k in kinds if k != "<audio>" for p in ([next(waiting)] if k == "<image>" else next(moving))]
        if pixels:
            data["pixel_values"] = torch.stack(pixels)
        if sounds:
            data["input_features"], data["feature_lengths"] = pad_features(sounds)
        return BatchFeature(data)

    def expand(
        self, texts: Sequence[str], feature_lengths: Sequence[int] = (), video_lengths: Sequence[int] = ()
    ) -> tuple[list[str], list[str]]:
        """The texts with a slot for every token of a medium, and the placeholders in their order through all texts.

        feature_lengths: mel frames of each clip; video_lengths: pictures of each video, both in that order. Raises
        `ValueError` where their number is not that of the placeholders.
        """
        kinds = [kind for text in texts for kind in _PLACEHOLDER.findall(text)]
        for name, kind, given in (("audio", "<audio>", feature_lengths), ("videos", "<video>", video_lengths)):
            if kinds.count(kind) != len(given):
                raise ValueError(f"{name}: got {len(given)}, expected {kinds.count(kind)}, one per {kind}")
        frames, pictures = iter(feature_lengths), iter(video_lengths)

        def slots(match: re.Match[str]) -> str:
            if match[0] == "<audio>":
                return "<boa>" + "<audio>" * self.audio_slots(next(frames)) + "<eoa>"
            image = "<boi>" + "<image>" * self.image_tokens + "<eoi>"
            return image * (next(pictures) if match[0] == "<video>" else 1)

        return [_PLACEHOLDER.sub(slots, text) for text in texts], kinds

    def audio_slots(self, frames: int) -> int:
        """Slots of a clip of so many mel frames: ceil(frames / audio_stride)."""
        return -(-frames // self.audio_stride)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "input_features", "feature_lengths"]

    @classmethod
    def _load_tokenizer_from_pretrained(
        cls, sub_processor_type: str, pretrained_model_name_or_path: Any, subfolder: str = "", **kwargs: Any
    ) -> GeminiTokenizer:
        # The class is known: AutoTokenizer would find it only where it has been registered.
        return GeminiTokenizer.from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)


def to_pixels(image: Any, size: int = 8) -> Tensor:
    """A picture as grey values [1, size, size], float32 in [0, 1], bilinear with antialiasing; see `GeminiProcessor`.

    Bright stays bright: the digits that the model knows are bright on a dark ground.
    """
    pixels = image if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
    if pixels.dtype == torch.uint8:
        pixels = pixels.float() / 255
    if pixels.dim() == 2:
        pixels = pixels[None]
    elif pixels.dim() == 3 and pixels.shape[0] not in (1, 3) and pixels.shape[-1] in (1, 3):
        pixels = pixels.movedim(-1, 0)
    if pixels.dim() != 3 or pixels.shape[0] not in (1, 3) or not pixels.numel() or not pixels.is_floating_point():
        raise ValueError(
            f"images: got {pixels.dtype} {list(pixels.shape)}, expected uint8 or floats [H, W], or with 1 or 3 channels"
        )
    pixels = pixels.float()
    if not (pixels.min() >= 0 and pixels.max() <= 1):
        raise ValueError(f"images: got floats in [{pixels.min():g}, {pixels.max():g}], expected them in [0, 1]")
    if pixels.shape[0] == 3:
        pixels = (pixels * pixels.new_tensor(_LUMA)[:, None, None]).sum(0, keepdim=True)
    if pixels.shape[1:] != (size, size):
        pixels = nn.functional.interpolate(
            pixels[None], (size, size), mode="bilinear", antialias=True, align_corners=False
        )[0]
    return pixels.clamp(0, 1)


def to_log_mel(audio: Any, sampling_rate: int = SAMPLING_RATE) -> Tensor:
    """A clip as log-mel frames [40, 1 + T // 160], float32; see `GeminiProcessor`. Channels are averaged."""
    samples = audio.detach().cpu().numpy() if isinstance(audio, Tensor) else np.asarray(audio)
    if samples.dtype == np.int16:
        samples = samples.astype(np.float32) / 32768
    if samples.ndim not in (1, 2) or not samples.size or not np.issubdtype(samples.dtype, np.floating):
        raise ValueError(
            f"audio: got {samples.dtype} {list(samples.shape)}, expected int16 or floats [T] or [channels, T]"
        )
    if not np.isfinite(samples).all():
        raise ValueError("audio: holds values that are not finite")
    if samples.ndim == 2:
        samples = samples.mean(0)
    if sampling_rate != SAMPLING_RATE:
        samples = resample(samples, sampling_rate, SAMPLING_RATE)
    return log_mel(torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32)))


def pad_features(features: Sequence[Tensor], multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Clips [40, T_i] as one [N, 40, T], silent after the end of each, T a multiple; and their lengths [N], int64."""
    longest = -(-max(f.shape[1] for f in features) // multiple) * multiple
    padded = torch.full((len(features), MEL_BINS, longest), SILENCE)
    for row, feature in zip(padded, features, strict=True):
        row[:, : feature.shape[1]] = feature
    return padded, torch.tensor([f.shape[1] for f in features])


def _as_list(media: Any) -> list[Any]:
    if media is None:
        return []
    return list(media) if isinstance(media, (list, tuple)) else [media]


def _as_videos(videos: Any) -> list[list[Any]]:
    """One video or several, as a list of lists of pictures."""
    given = _as_list(videos)
    if given and not isinstance(given[0], (list, tuple)):
        given = [given]
    if any(not video for video in given):
        raise ValueError("videos: one has no pictures")
    return [list(video) for video in given]


def _with_placeholders(text: str | Sequence[str] | None, images: int, sounds: int, videos: int) -> list[str]:
    texts = [""] if text is None else [text] if isinstance(text, str) else list(text)
    if not texts:
        raise ValueError("text: an empty list")
    if len(texts) == 1 and not _PLACEHOLDER.search(texts[0]):
        media = "<image>" * images + "<video>" * videos + "<audio>" * sounds
        texts = [media + texts[0]]
    return texts
