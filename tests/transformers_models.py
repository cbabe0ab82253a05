"""Tiny random models of transformers, with the inputs of one padded batch each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

VOCABULARY, PAD, END = 61, 0, 2
BATCH, LENGTH = 6, 13
LENGTHS = (LENGTH, 9, 4)

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": END,
}
_SPECIAL = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": END}


def randomise(model: nn.Module, seed: int) -> None:
    """Weights that make attention sharp and every part matter; a fresh model's are nearly all the same."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if parameter.dim() >= 2:
            parameter.data.copy_(1.3 * noise / parameter[0].numel() ** 0.5)
        else:
            parameter.data.add_(0.2 * noise)


def ids(seed: int, side: str) -> dict[str, Tensor]:
    """input_ids and attention_mask [B, LENGTH], padded on one side."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, VOCABULARY, (BATCH, LENGTH), generator=generator)
    lengths = torch.tensor([LENGTHS[i % 3] for i in range(BATCH)])[:, None]
    position = torch.arange(LENGTH)
    visible = position < lengths if side == "right" else position >= LENGTH - lengths
    return {"input_ids": tokens.where(visible, torch.tensor(PAD)), "attention_mask": visible.long()}


def _decoder_inputs(side: str) -> dict[str, Tensor]:
    inputs = ids(3, side)
    visible = inputs["attention_mask"].bool()
    # A sequence's first token would be predicted from padding, whose own output means nothing.
    predicted = visible & torch.cat([torch.zeros(BATCH, 1, dtype=torch.bool), visible[:, :-1]], 1)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(~predicted, -100)}


def _gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=3, n_head=4, **_SPECIAL)
    )


def _gpt_oss() -> nn.Module:
    # Every token goes to every expert: a choice among them would turn a rounding error into another result.
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = hf.GptOssConfig(
        **_TEXT, sliding_window=4, num_local_experts=2, num_experts_per_tok=2, rope_parameters=rope
    )
    config._experts_implementation = "eager"
    return hf.GptOssForCausalLM(config)


def _llama4() -> nn.Module:
    kinds = ["chunked_attention", "full_attention", "chunked_attention"]
    experts = {"num_local_experts": 2, "num_experts_per_tok": 2, "intermediate_size_mlp": 48}
    config = hf.Llama4TextConfig(**_TEXT, **experts, attention_chunk_size=5, layer_types=kinds)
    return hf.Llama4ForCausalLM(config)


def _gemma3_config(**more: Any) -> Any:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return hf.Gemma3TextConfig(**_TEXT, sliding_window=4, layer_types=kinds, query_pre_attn_scalar=8, **more)


IMAGE_TOKEN, PIXELS = 4, 16


def _gemma3_multimodal() -> nn.Module:
    vision = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = hf.Gemma3Config(
        text_config=_gemma3_config().to_dict(),
        vision_config={**vision, "image_size": PIXELS, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_index=IMAGE_TOKEN,
        boi_token_index=VOCABULARY - 1,
        eoi_token_index=VOCABULARY - 2,
        **_SPECIAL,
    )
    return hf.Gemma3ForConditionalGeneration(config)


def _images(count: int) -> Tensor:
    return torch.randn(count, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(5))


def _multimodal_inputs(side: str) -> dict[str, Tensor]:
    inputs = _decoder_inputs(side)
    first = {"left": 5, "right": 1}[side]
    picture = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    picture[:2, first : first + 4] = True  # the image's tokens, which see each other in both directions
    inputs["input_ids"] = inputs["input_ids"].masked_fill(picture, IMAGE_TOKEN)
    inputs["labels"] = inputs["labels"].masked_fill(picture, -100)
    return {**inputs, "token_type_ids": picture.long(), "pixel_values": _images(2)}


def _bert() -> nn.Module:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    config = hf.BertConfig(vocab_size=VOCABULARY, pad_token_id=PAD, **{n: _TEXT[n] for n in names})
    return hf.BertForMaskedLM(config)


def _vit() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    return hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=PIXELS, patch_size=4, num_labels=7))


def _vit_inputs(side: str) -> dict[str, Tensor]:
    return {"pixel_values": _images(BATCH), "labels": torch.arange(BATCH)}


_ENCODED = 16


def _whisper() -> nn.Module:
    config = hf.WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=6,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=_ENCODED,
        max_target_positions=32,
        decoder_start_token_id=1,
        begin_suppress_tokens=None,
        **_SPECIAL,
    )
    return hf.WhisperForConditionalGeneration(config)


def _whisper_inputs(side: str) -> dict[str, Tensor]:
    inputs = _decoder_inputs("right")
    features = torch.randn(BATCH, 6, 2 * _ENCODED, generator=torch.Generator().manual_seed(7))
    decoder = {"decoder_input_ids": inputs["input_ids"], "decoder_attention_mask": inputs["attention_mask"]}
    return {"input_features": features, "labels": inputs["labels"], **decoder}


def _t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    buckets = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 10}
    special = {"pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": PAD}
    return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=VOCABULARY, **sizes, **buckets, **special))


def _t5_inputs(side: str) -> dict[str, Tensor]:
    inputs, target = ids(3, side), ids(8, "right")
    return {**inputs, "labels": target["input_ids"].masked_fill(target["attention_mask"] == 0, -100)}


@dataclass(frozen=True)
class Tiny:
    """make: a model with fresh weights. inputs: a batch padded on a side, with labels. sides: where it can be padded.

    generates: it has generate().
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[str], dict[str, Tensor]] = _decoder_inputs
    sides: tuple[str, ...] = ("left", "right")
    generates: bool = True


MODELS: dict[str, Tiny] = {
    "GPT-2": Tiny(_gpt2),
    "Llama": Tiny(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_TEXT))),
    "Mistral": Tiny(lambda: hf.MistralForCausalLM(hf.MistralConfig(**_TEXT, sliding_window=4))),
    "Gemma 2": Tiny(
        lambda: hf.Gemma2ForCausalLM(
            hf.Gemma2Config(**_TEXT, sliding_window=4, attn_logit_softcapping=2.0, query_pre_attn_scalar=8)
        )
    ),
    "Gemma 3": Tiny(lambda: hf.Gemma3ForCausalLM(_gemma3_config())),
    "Gemma 3 multimodal": Tiny(_gemma3_multimodal, _multimodal_inputs),
    "Qwen 3": Tiny(lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_TEXT))),
    "gpt-oss": Tiny(_gpt_oss),
    "Llama 4": Tiny(_llama4),
    "BERT": Tiny(_bert, generates=False),
    "ViT": Tiny(_vit, _vit_inputs, sides=("right",), generates=False),
    "Whisper": Tiny(_whisper, _whisper_inputs, sides=("right",)),
    "T5": Tiny(_t5, _t5_inputs),
}


def build(name: str, implementation: str, dtype: torch.dtype = torch.float32) -> Any:
    """The same random model each time, with one attention implementation."""
    torch.manual_seed(0)
    model: Any = MODELS[name].make()
    randomise(model, 1)
    model.set_attn_implementation(implementation)
    return model.to(dtype).eval()
