"""What a model is, without its weights: sizes, layer pattern, modalities and special tokens."""

from __future__ import annotations

import math
from typing import Any

from transformers import PretrainedConfig

from ...integrations.transformers import NAME

_LAYERS = ("full_attention", "sliding_attention")


class GeminiConfig(PretrainedConfig):
    """Sizes of a `GeminiModel`; every field is a keyword argument.

    The model type is "fused_gemini", not "gemini": that name is another's to take in transformers' registry, and a
    checkpoint of this model must never load into a class of that name, or the other way round.

    vocab_size .. head_dim: as in Llama; H query heads share HK = num_key_value_heads.
    max_position_embeddings: the longest sequence that a paged cache has room for.
    sliding_window: tokens that a row of a "sliding_attention" layer sees, itself among them.
    layer_types: "sliding_attention" or "full_attention" for each layer; default every third one, and the last, full.
    rope_theta, rope_local_theta: base of the rotary positions in full and in sliding layers.
    attn_logit_softcapping, final_logit_softcapping: x becomes cap * tanh(x / cap); None: not.
    dropout: of attention weights and of what each block adds, in training.
    image_size, image_channels: of images, in and out; pixel values are in [0, 1].
    patch_size, image_levels: a generated image is a sequence of square patches, a pixel one of so many grey levels.
    image_tokens: tokens that stand for one image at the input, a square number, image_size / sqrt halved some times.
    num_mel_bins: of log-mel frames, in and out.
    audio_reduction: frames to one token of audio, in and out; a power of two.
    audio_prenet_size, audio_prenet_dropout: the bottleneck through which generated audio is fed back.
    max_audio_slots: the longest generated audio, in tokens.
    image_loss_weight, audio_loss_weight: in the sum of the losses; the text's weight is 1.
    *_token_id: pad, begin and end of the sequence; an input image is `boi image * image_tokens eoi`, an input clip
        `boa audio * audio_slots(frames) eoa`; generated ones have image_out and audio_out in place of image and audio.

    Raises:
        ValueError: fields contradict each other.
    """

    model_type = "fused_gemini"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 1024
    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 5
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 32
    max_position_embeddings: int = 512
    sliding_window: int = 32
    layer_types: list[str] | None = None
    rope_theta: float = 100_000.0
    rope_local_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0
    tie_word_embeddings: bool = True
    dropout: float = 0.0
    use_cache: bool = True
    image_size: int = 8
    image_channels: int = 1
    patch_size: int = 2
    image_levels: int = 17
    image_tokens: int = 4
    num_mel_bins: int = 40
    audio_reduction: int = 4
    audio_prenet_size: int = 64
    audio_prenet_dropout: float = 0.5
    max_audio_slots: int = 64
    image_loss_weight: float = 1.0
    audio_loss_weight: float = 1.0
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    boi_token_id: int = 3
    eoi_token_id: int = 4
    boa_token_id: int = 5
    eoa_token_id: int = 6
    image_token_id: int = 7
    audio_token_id: int = 8
    image_out_token_id: int = 9
    audio_out_token_id: int = 10

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layer_types is None:
            last = self.num_hidden_layers - 1
            self.layer_types = [_LAYERS[(i + 1) % 3 != 0 and i != last] for i in range(self.num_hidden_layers)]
        if kwargs.get("attn_implementation") is None:
            kwargs["attn_implementation"] = NAME
        super().__post_init__(**kwargs)
        self._check_core()
        self._check_modalities()

    def _check_core(self) -> None:
        assert self.layer_types is not None
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_key_value_heads: {self.num_key_value_heads} does not divide num_attention_heads")
        if len(self.layer_types) != self.num_hidden_layers or any(kind not in _LAYERS for kind in self.layer_types):
            raise ValueError(f"layer_types: got {self.layer_types}, expected {self.num_hidden_layers} of {_LAYERS}")
        if self.sliding_window < 1:
            raise ValueError(f"sliding_window: got {self.sliding_window}, expected at least 1")
        special = self.special_token_ids
        if len(set(special)) != len(special) or not all(0 <= i < self.vocab_size for i in special):
            raise ValueError(f"token ids: got {special}, expected different ones in 0 .. {self.vocab_size - 1}")

    def _check_modalities(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size: {self.patch_size} does not divide the image_size {self.image_size}")
        grid = math.isqrt(self.image_tokens)
        shrink, rest = divmod(self.image_size, max(grid, 1))
        if grid * grid != self.image_tokens or rest or shrink & (shrink - 1):
            raise ValueError(
                f"image_tokens: got {self.image_tokens}, expected n * n with image_size {self.image_size} = n * 2 ** k"
            )
        if self.audio_reduction < 1 or self.audio_reduction & (self.audio_reduction - 1):
            raise ValueError(f"audio_reduction: got {self.audio_reduction}, expected a power of two")
        if self.image_levels < 2:
            raise ValueError(f"image_levels: got {self.image_levels}, expected at least 2")

    @property
    def slot_token_ids(self) -> list[int]:
        """Tokens that hold a place for what is no text; never generated as text."""
        return [self.image_token_id, self.audio_token_id, self.image_out_token_id, self.audio_out_token_id]

    @property
    def special_token_ids(self) -> list[int]:
        edges = [self.boi_token_id, self.eoi_token_id, self.boa_token_id, self.eoa_token_id]
        return [*edges, *self.slot_token_ids]

    @property
    def image_out_tokens(self) -> int:
        """Patches of a generated image."""
        return (self.image_size // self.patch_size) ** 2

    def audio_slots(self, frames: int) -> int:
        """Tokens that stand for a clip of so many mel frames, at the input and generated: ceil(frames / reduction)."""
        return -(-frames // self.audio_reduction)


def teacher_config(vocab_size: int, **more: Any) -> GeminiConfig:
    """About 2.5 million parameters with a vocabulary of 1,000: what the training command pretrains."""
    return GeminiConfig(vocab_size=vocab_size, **more)


def student_config(vocab_size: int, **more: Any) -> GeminiConfig:
    """Less than a quarter of `teacher_config`'s parameters, the same inputs and outputs: what it is distilled into."""
    sizes: dict[str, Any] = {
        "hidden_size": 96,
        "intermediate_size": 224,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "audio_prenet_size": 32,
    }
    return GeminiConfig(vocab_size=vocab_size, **{**sizes, **more})
