"""A trained model in 8 bits: linear layers with dynamic activations and the embedding by torchao, the cache by ours.

Linear layers hold int8 weights with a scale for each output channel, and quantise what comes in row by row; the token
embedding holds int8 rows with a scale each. Convolutions, a twentieth of the work, are rounded to bfloat16 and kept so
on disk. Norms and positions stay as they are. Generate with `model.make_cache(kv_dtype="int8")` for an int8 cache.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from .configuration import GeminiConfig
from .generation import GeminiForConditionalGeneration

_FILE = "quantized.pt"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


def quantize(model: GeminiForConditionalGeneration) -> GeminiForConditionalGeneration:
    """Quantise in place, and return the model. It can generate and be evaluated, not be trained on."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis

    model.eval().requires_grad_(False)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)  # no longer tied: int8 each
    model.config.tie_word_embeddings = False
    quantize_(model, Int8DynamicActivationInt8WeightConfig(), lambda m, _: isinstance(m, nn.Linear))
    rows = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
    quantize_(model, rows, lambda m, _: m is model.embed_tokens)
    for module in model.modules():
        if isinstance(module, _CONVOLUTIONS):
            module.weight.copy_(module.weight.bfloat16())
    return model


def save_quantized(model: GeminiForConditionalGeneration, folder: str | Path) -> Path:
    """Write the configuration and the 8-bit weights; returns the file of the weights."""
    folder = Path(folder)
    model.config.save_pretrained(folder)
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, _CONVOLUTIONS):
            state[f"{name}.weight"] = module.weight.bfloat16()
    torch.save(state, folder / _FILE)
    return folder / _FILE


def load_quantized(folder: str | Path) -> GeminiForConditionalGeneration:
    """What `save_quantized` wrote, equal bit for bit."""
    import torchao.quantization  # noqa: F401  # so that torch.load knows its tensors

    folder = Path(folder)
    config = GeminiConfig.from_pretrained(folder)
    model = GeminiForConditionalGeneration(config).eval().requires_grad_(False)
    state = torch.load(folder / _FILE, weights_only=True)
    for name, module in model.named_modules():
        if isinstance(module, _CONVOLUTIONS):
            state[f"{name}.weight"] = state[f"{name}.weight"].float()
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False)
