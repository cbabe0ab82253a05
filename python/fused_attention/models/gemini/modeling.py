"""A decoder-only transformer over text, images and sound, whose attention is this package's.

    x        = embed(tokens), with the encoders' vectors in the slots of images and clips         [B, S, E]
    each layer: x += Wo attention(rope(norm(q)), rope(norm(k)), v);  x += Wd (silu(Wg x) * Wu x)   pre-norm, RMS
    hidden   = norm(x); logits = cap * tanh(hidden Wembed^T / cap)                                 [B, S, vocabulary]

Attention is causal, over a window in "sliding_attention" layers; the tokens of one input image also see each other.
It goes through transformers' AttentionInterface, "fused_attention" by default, or, with a `GeminiCache`, through
`decode_attention`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput, can_return_tuple

from ...integrations.transformers import NAME, register
from ...nn.positions import RotaryEmbedding
from .attention import GeminiAttention
from .cache import Arrival, GeminiCache
from .configuration import GeminiConfig
from .decoders import AudioDecoder, ImageDecoder, for_loss
from .encoders import AudioEncoder, ImageEncoder
from .inputs import Media, MediaInputs

register()


@dataclass
class GeminiOutput(ModelOutput):
    """What `GeminiModel` returns.

    loss: text_loss + image_loss_weight * image_loss + audio_loss_weight * audio_loss, of those that there are.
    logits: [B, S, vocabulary], or of the last positions only (`logits_to_keep`).
    text_loss: mean cross-entropy of a label, in nats. image_loss, audio_loss: see `decoders.py`.
    last_hidden_state: [B, S, E], normalised. hidden_states: [B, S, E] before each layer, and the last one.
    attentions: [B, H, S, N] of each layer.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    text_loss: Tensor | None = None
    image_loss: Tensor | None = None
    audio_loss: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class GeminiMLP(nn.Module):
    def __init__(self, config: GeminiConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)  # [B, S, intermediate] each
        return self.down_proj(F.silu(gate) * up)


class GeminiLayer(GradientCheckpointingLayer):
    def __init__(self, config: GeminiConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = GeminiAttention(config, layer)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GeminiMLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, past_key_values: Cache | None = None, **options: Any) -> tuple[Tensor, Tensor | None]:
        attended, weights = self.attention(self.attention_norm(x), past=past_key_values, **options)
        x = x + self.dropout(attended)
        return x + self.dropout(self.mlp(self.mlp_norm(x))), weights


class GeminiPreTrainedModel(PreTrainedModel):
    config: GeminiConfig
    config_class = GeminiConfig
    base_model_prefix = ""
    input_modalities = ["image", "audio", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["GeminiLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True

    def _sdpa_can_dispatch(self, is_init_check: bool = False) -> bool:
        if self.config.attn_logit_softcapping is not None:
            raise ValueError(
                "attn_implementation='sdpa' has no softcap and would leave it out: take 'fused_attention' or 'eager', "
                "or a config with attn_logit_softcapping=None"
            )
        return super()._sdpa_can_dispatch(is_init_check)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal, with the deviation at which what comes out of a layer varies as much as what goes in: pictures and
        clips reach the text's positions through attention from the first step on. A SiLU, which follows the
        convolutions, halves the variance. A row of the embedding is one of the head's, with E inputs."""
        super()._init_weights(module)
        if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)):
            gain = 2.0 if isinstance(module, (nn.Conv1d, nn.Conv2d)) else 1.0
            initialization.normal_(module.weight, mean=0.0, std=(gain / module.weight[0].numel()) ** 0.5)


class GeminiModel(MediaInputs, GeminiPreTrainedModel):
    """Text, images and sound in; logits of text, and losses or slots of images and sound, out.

    `GeminiForConditionalGeneration` is this model with `generate`: the same parameters under the same names.
    """

    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}

    def __init__(self, config: GeminiConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_scale = config.hidden_size**0.5  # token vectors as large as the encoders'
        self.image_encoder, self.audio_encoder = ImageEncoder(config), AudioEncoder(config)
        self.image_decoder, self.audio_decoder = ImageDecoder(config), AudioDecoder(config)
        self.layers = nn.ModuleList(GeminiLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Neither parameters nor state: no part of the module.
        self.rope = {
            "full_attention": RotaryEmbedding(config.head_dim, base=config.rope_theta),
            "sliding_attention": RotaryEmbedding(config.head_dim, base=config.rope_local_theta),
        }
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def audio_slots(self, frames: int) -> int:
        """Tokens that stand for a clip of so many mel frames."""
        return self.config.audio_slots(frames)

    def make_cache(
        self,
        kind: str = "dense",
        kv_dtype: torch.dtype | str | None = None,
        max_length: int | None = None,
        page_size: int = 16,
    ) -> GeminiCache:
        """An empty cache for `past_key_values`, here and in `generate`; arguments as of `GeminiCache`."""
        most = self.config.max_position_embeddings if max_length is None else max_length
        return GeminiCache(len(self.layers), kind, kv_dtype, most, page_size)

    def _masks(self, x: Tensor, mask: Tensor | None, past: Cache | None, rest: dict[str, Any]) -> dict[str, Any]:
        """The mask of each kind of layer; None from a GeminiCache, which needs none without images."""
        makers = {
            "full_attention": create_causal_mask,
            "sliding_attention": create_sliding_window_causal_mask,
        }
        kinds = set(self.config.layer_types or ())
        if isinstance(past, GeminiCache):
            if rest["block_sequence_ids"] is None:
                return dict.fromkeys(kinds)
            past = None  # an image has to come first, so nothing is held yet
        arguments = {"config": self.config, "inputs_embeds": x, "attention_mask": mask, "past_key_values": past, **rest}
        return {kind: makers[kind](**arguments) for kind in kinds}

    def _run(
        self,
        x: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        past: Cache | None,
        blocks: Tensor | None,
        **more: Any,
    ) -> GeminiOutput:
        """All layers. x [B, S, E]; mask [B, past + S]; blocks [B, S]: which image a token belongs to, -1: none."""
        columns, seen = x.shape[1], 0 if past is None else past.get_seq_length()
        hidden_wanted, weights_wanted = more.pop("output_hidden_states", None), more.get("output_attentions")
        arrival = None
        if isinstance(past, GeminiCache) and mask is not None:
            arrival = self._arrival(mask, seen + columns, columns)
        masks = self._masks(x, mask, past, {"position_ids": positions, "block_sequence_ids": blocks})
        if positions is None:  # rotary positions are relative: padding in front shifts all of a sequence alike
            positions = torch.arange(seen, seen + columns, device=x.device)
        like = x[:, None]  # [B, 1, S, E]: only its dtype and device count
        tables = {kind: self.rope[kind].tables_for(like, positions) for kind in masks}
        states: tuple[Tensor, ...] = ()
        attentions: tuple[Any, ...] = ()
        for kind, layer in zip(self.config.layer_types or (), self.layers, strict=True):
            states += (x,) if hidden_wanted else ()
            x, weights = layer(x, past_key_values=past, tables=tables[kind], mask=masks[kind], arrival=arrival, **more)
            attentions += (weights,) if weights_wanted else ()
        x = self.norm(x)
        states += (x,) if hidden_wanted else ()
        return GeminiOutput(
            past_key_values=past,
            last_hidden_state=x,
            hidden_states=states or None,
            attentions=attentions or None,
        )

    @staticmethod
    def _arrival(mask: Tensor, total: int, columns: int) -> Arrival | None:
        if mask.dim() != 2 or mask.shape[1] != total:
            raise ValueError(
                f"attention_mask: got shape {list(mask.shape)}, expected [B, past + S] = [B, {total}] with this cache"
            )
        return Arrival.of(mask[:, -columns:].bool())

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_features: Tensor | None = None,
        feature_lengths: Tensor | None = None,
        image_targets: Tensor | None = None,
        audio_targets: Tensor | None = None,
        target_lengths: Tensor | None = None,
        labels: Tensor | None = None,
        label_weights: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        input_text: Any = None,
        input_image: Tensor | None = None,
        input_audio: Tensor | None = None,
        **more: Any,
    ) -> GeminiOutput:
        """One pass over B sequences of S tokens.

        Args:
            input_ids: [B, S]. Images, clips and generated ones stand in it as `GeminiConfig` says.
            attention_mask: [B, past + S], 0 is padding, on either side.
            position_ids: [B, S] or [1, S]; default past, past + 1, ...
            past_key_values: a cache from `make_cache`, under `torch.no_grad()`, or one of transformers'.
            inputs_embeds: [B, S, E] instead of input_ids, with everything in its slots.
            pixel_values: [N, C, H, W] in [0, 1], all input images of the batch in order of appearance.
            input_features: [N, num_mel_bins, T] log-mel, all input clips in order; feature_lengths: [N] frames of each.
            image_targets: [N, C, H, W] in [0, 1], all images to be generated, which are fed back (teacher forcing).
            audio_targets: [N, num_mel_bins, T] log-mel, all clips to be generated; target_lengths: [N] frames of each.
            labels: [B, S] token ids, as input_ids; -100 is not predicted, and neither is a slot.
            label_weights: [B, S] floating, how much each label counts in the text's loss; default 1.
            use_cache: make and return a cache where none is given; default no.
            logits_to_keep: logits of so many last positions only; 0: of all. All with labels.
            num_items_in_batch: what the text's loss is divided by; default the labels that count.
            input_text, input_image, input_audio: a tokenizer's output and what `preprocess_image` and
                `preprocess_audio` give, instead of the first rows: image and sound are put in front of the text.
            more: output_hidden_states, output_attentions, and what the attention implementation takes.

        Raises:
            ValueError: slots and what should fill them do not match, or arguments exclude each other.
        """
        if input_text is not None:
            joined = self.join_inputs(input_text, input_image, input_audio)
            input_ids, attention_mask = joined["input_ids"], joined["attention_mask"]
            pixel_values, input_features = joined.get("pixel_values"), joined.get("input_features")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: got both or neither, expected one of them")
        more.pop("return_dict", None)
        if past_key_values is None and use_cache:
            fused = self.config._attn_implementation == NAME
            past_key_values = self.make_cache() if fused else DynamicCache(config=self.config)
        media = Media(pixel_values, input_features, feature_lengths, image_targets, audio_targets, target_lengths)
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        blocks = None
        if input_ids is not None:
            inputs_embeds = self.embed(input_ids, media, continued=seen > 0)
            blocks = self.image_blocks(input_ids) if pixel_values is not None else None
        elif media.any():
            raise ValueError("inputs_embeds: got images or sound beside them, expected them in their slots already")
        assert inputs_embeds is not None
        out = self._run(inputs_embeds, attention_mask, position_ids, past_key_values, blocks, **more)
        self._finish(out, input_ids, labels, label_weights, media, logits_to_keep, num_items_in_batch)
        return out

    def _finish(
        self,
        out: GeminiOutput,
        ids: Tensor | None,
        labels: Tensor | None,
        weights: Tensor | None,
        media: Media,
        keep: int,
        items: Any,
    ) -> None:
        """Logits and losses, from the hidden states."""
        config, hidden = self.config, out.last_hidden_state
        assert hidden is not None
        out.logits = self.lm_head(hidden if labels is not None or not keep else hidden[:, -keep:])
        if config.final_logit_softcapping is not None:
            cap = config.final_logit_softcapping
            out.logits = cap * torch.tanh(out.logits / cap)
        losses = []
        if labels is not None:
            out.text_loss = self._text_loss(out.logits, ids, labels, weights, items)
            losses.append(out.text_loss)
        if media.image_targets is not None and ids is not None:
            before = self.before_slots(hidden, ids, config.image_out_token_id)
            out.image_loss = self.image_decoder.loss(before, media.image_targets)
            losses.append(config.image_loss_weight * out.image_loss)
        if media.audio_targets is not None and ids is not None:
            before = self.before_slots(hidden, ids, config.audio_out_token_id)
            out.audio_loss = self.audio_decoder.loss(before, media.audio_targets, media.target_lengths)
            losses.append(config.audio_loss_weight * out.audio_loss)
        out.loss = sum(losses[1:], losses[0]) if losses else None

    def _text_loss(
        self, logits: Tensor, ids: Tensor | None, labels: Tensor, weights: Tensor | None, items: Any
    ) -> Tensor:
        if ids is not None:
            slots = torch.tensor(self.config.slot_token_ids, device=ids.device)
            labels = labels.masked_fill(torch.isin(ids, slots), -100)
        target = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()  # position s predicts token s + 1
        if weights is None:
            total = F.cross_entropy(for_loss(logits.flatten(0, 1)), target, ignore_index=-100, reduction="sum")
            return total / ((target != -100).sum().clamp(min=1) if items is None else items)
        weight = F.pad(weights[:, 1:], (0, 1)).flatten().masked_fill(target == -100, 0.0)
        each = F.cross_entropy(for_loss(logits.flatten(0, 1)), target, ignore_index=-100, reduction="none")
        return (each * weight).sum() / (weight.sum().clamp(min=1e-6) if items is None else items)
