"""Text by transformers' `generate` on our caches; images and sound, slot by slot."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache

from ...integrations.transformers import NAME
from .audio import SILENCE
from .cache import KINDS
from .modeling import GeminiModel


class _Writing:
    """One generation in progress: a prompt that ends in boi or boa, and the slots so far, in a cache."""

    def __init__(
        self, model: GeminiForConditionalGeneration, ids: Tensor, mask: Tensor | None, start: int, media: dict[str, Any]
    ) -> None:
        ends = ids[:, -1] == start
        mask = torch.ones_like(ids) if mask is None else mask
        if not bool(mask[:, -1].all()):
            raise ValueError("attention_mask: got padding behind the prompt, expected it in front")
        if not bool(ends.any()):
            ids, mask = F.pad(ids, (0, 1), value=start), F.pad(mask, (0, 1), value=1)
        elif not bool(ends.all()):
            raise ValueError(
                f"input_ids: got token {start} at the end of some rows, expected it in all of them or none"
            )
        self.model, self.mask = model, mask
        fused = model.config._attn_implementation == NAME
        self.cache = model.make_cache() if fused else DynamicCache(config=model.config)
        self.hidden = self._step(input_ids=ids, **media)

    def _step(self, **inputs: Any) -> Tensor:
        out = self.model(
            attention_mask=self.mask, past_key_values=self.cache, logits_to_keep=1, return_dict=True, **inputs
        )
        return out.last_hidden_state[:, -1]  # [B, E]

    def put(self, vector: Tensor) -> None:
        """The next slot holds vector [B, 1, E]."""
        self.mask = F.pad(self.mask, (0, 1), value=1)
        self.hidden = self._step(inputs_embeds=vector)


class GeminiForConditionalGeneration(GeminiModel, GenerationMixin):
    """`GeminiModel` with `generate`, `generate_images` and `generate_audio`."""

    def generate(
        self,
        inputs: Tensor | None = None,
        *arguments: Any,
        kv_cache: str | None = None,
        kv_dtype: torch.dtype | str | None = None,
        **options: Any,
    ) -> Any:
        """transformers' `generate`, on our caches where attention is ours.

        Args:
            inputs: [B, S] token ids, padded on the left.
            kv_cache: "dense" or "paged"; default dense with attn_implementation="fused_attention", and transformers'
                own cache with another one, or where use_cache, cache_implementation or past_key_values say so.
            kv_dtype: of the cache: None for the model's dtype, "int8", "fp8", or a dtype; see `GeminiCache`.
            options: as in transformers; pixel_values, input_features and feature_lengths are read with the prompt.

        Raises:
            ValueError: kv_cache or kv_dtype beside an option that chooses another cache.
        """
        config = options.get("generation_config")
        others = [n for n in ("past_key_values", "cache_implementation") if options.get(n) is not None]
        use_cache = options.get("use_cache", True if config is None else config.use_cache)
        if use_cache is False:
            others.append("use_cache=False")
        if config is not None and config.cache_implementation is not None:
            others.append("generation_config.cache_implementation")
        asked = kv_cache is not None or kv_dtype is not None
        if asked and others:
            raise ValueError(
                f"kv_cache, kv_dtype: got one of them beside {', '.join(others)}, which chooses a cache too"
            )
        if asked or (not others and self.config._attn_implementation == NAME):
            options["past_key_values"] = self.make_cache(kv_cache or KINDS[0], kv_dtype)
        if config is None or config.suppress_tokens is None:
            options.setdefault("suppress_tokens", self.config.slot_token_ids)
        mixin: Any = super()
        return mixin.generate(inputs, *arguments, **options)

    def prepare_inputs_for_generation(self, *arguments: Any, **kwargs: Any) -> dict[str, Any]:
        # transformers looks for the name "kwargs" here to learn that `forward`'s arguments are welcome in `generate`.
        mixin: Any = super()
        inputs: dict[str, Any] = mixin.prepare_inputs_for_generation(*arguments, **kwargs)
        if inputs.get("input_features") is None:
            inputs.pop("feature_lengths", None)
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **options: Any
    ) -> tuple[Any, dict[str, Any]]:
        """A sequence that is repeated takes all of its images and clips with it, in order."""
        repeated: dict[str, Any] = {}
        if expand_size > 1 and input_ids is not None:
            image = (input_ids == self.config.image_token_id).sum(1) // self.config.image_tokens
            audio = input_ids == self.config.audio_token_id
            clips = audio[:, 0].long() + (audio[:, 1:] & ~audio[:, :-1]).sum(1)
            counts = {"pixel_values": image, "input_features": clips, "feature_lengths": clips}
            for name, count in counts.items():
                media = options.pop(name, None)
                if media is not None:
                    parts = media.split(count.tolist())
                    repeated[name] = torch.cat([part for part in parts for _ in range(expand_size)])
        mixin: Any = super()
        ids, expanded = mixin._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **options
        )
        return ids, expanded | repeated

    @torch.no_grad()
    def generate_images(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        do_sample: bool = True,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        **media: Any,
    ) -> Tensor:
        """One image for each prompt.

        Args:
            input_ids: [B, S], padded on the left; boi is appended where no prompt ends in it.
            attention_mask: [B, S], 0 is padding.
            do_sample: draw every pixel's level at random; False: the likeliest ones.
            temperature: divides the logits; above 0.
            generator: where the random numbers come from; default torch's own.
            media: pixel_values, input_features and feature_lengths of the prompts.

        Returns:
            [B, C, H, W] in [0, 1], float32.
        """
        if not temperature > 0.0:
            raise ValueError(f"temperature: got {temperature}, expected a positive number, or do_sample=False")
        decoder = self.image_decoder
        writing = _Writing(self, input_ids, attention_mask, self.config.boi_token_id, media)
        patches: list[Tensor] = []
        while True:
            patches.append(decoder.draw(writing.hidden, temperature if do_sample else 0.0, generator))  # [B, K]
            if len(patches) == decoder.patches:
                return decoder.join(torch.stack(patches, 1))
            writing.put(decoder.embed(patches[-1][:, None], len(patches) - 1))

    @torch.no_grad()
    def generate_audio(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, max_slots: int | None = None, **media: Any
    ) -> tuple[Tensor, Tensor]:
        """One clip for each prompt, the same for the same prompt.

        Args:
            input_ids: [B, S], padded on the left; boa is appended where no prompt ends in it.
            attention_mask: [B, S], 0 is padding.
            max_slots: the longest clip in tokens of `audio_reduction` frames; default and at most max_audio_slots.
            media: pixel_values, input_features and feature_lengths of the prompts.

        Returns:
            log-mel frames [B, num_mel_bins, T], float32, silent past each clip's end, and the lengths [B] in frames.
        """
        decoder, most = self.audio_decoder, self.config.max_audio_slots if max_slots is None else max_slots
        if not 1 <= most <= self.config.max_audio_slots:
            raise ValueError(
                f"max_slots: got {max_slots}, expected 1 .. max_audio_slots = {self.config.max_audio_slots}"
            )
        writing = _Writing(self, input_ids, attention_mask, self.config.boa_token_id, media)
        slots: list[Tensor] = []
        lengths = torch.full((input_ids.shape[0],), most, device=input_ids.device)
        while True:
            frames, last = decoder(writing.hidden)  # [B, K], [B]
            slots.append(frames.float())
            lengths = torch.where(last > 0.0, lengths.clamp(max=len(slots)), lengths)
            if len(slots) >= int(lengths.max()):
                break
            writing.put(decoder.embed(frames[:, None], len(slots) - 1))
        sound = decoder.join(torch.stack(slots, 1))
        lengths = lengths * decoder.reduction
        past_end = torch.arange(sound.shape[2], device=sound.device) >= lengths[:, None]
        return sound.masked_fill(past_end[:, None], SILENCE), lengths
