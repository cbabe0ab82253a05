"""The one registry of what is timed. Sizes are those of models that people run."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionShape:
    """One call of scaled dot-product attention."""

    name: str
    batch: int
    heads: int
    kv_heads: int
    rows: int
    columns: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    causal: bool = False
    padding: bool = False  # a bool mask hides the last eighth of the keys
    backward: bool = True

    def __str__(self) -> str:
        return self.name

    def flops(self) -> float:
        """Multiplications and additions of the two matrix products of the forward pass, hidden keys left out."""
        visible = self.rows * self.columns * (0.5 if self.causal else 1.0) * (7 / 8 if self.padding else 1.0)
        return 4.0 * self.batch * self.heads * visible * self.head_dim


@dataclass(frozen=True)
class ModuleShape:
    """One call of a multi-head self-attention module."""

    name: str
    batch: int
    tokens: int
    width: int
    heads: int
    dtype: torch.dtype = torch.float32
    padding: bool = False
    need_weights: bool = False
    backward: bool = True

    def __str__(self) -> str:
        return self.name

    def flops(self) -> float:
        """As above, the four projections included."""
        visible = self.tokens * (7 / 8 if self.padding else 1.0)
        return self.batch * self.tokens * self.width * (8.0 * self.width + 4.0 * visible)


ATTENTION = (
    AttentionShape("digits-8", 64, 4, 4, 8, 8, 16),
    AttentionShape("bert-128-padded", 8, 12, 12, 128, 128, 64, padding=True),
    AttentionShape("vit-197", 8, 12, 12, 197, 197, 64),
    AttentionShape("vit-197-bf16", 8, 12, 12, 197, 197, 64, torch.bfloat16),
    AttentionShape("bert-512-padded", 2, 12, 12, 512, 512, 64, padding=True),
    AttentionShape("gpt2-1024-causal", 1, 12, 12, 1024, 1024, 64, causal=True),
    AttentionShape("llama-1024-gqa-causal", 1, 16, 4, 1024, 1024, 128, causal=True),
    AttentionShape("llama-1024-gqa-causal-bf16", 1, 16, 4, 1024, 1024, 128, torch.bfloat16, causal=True),
    AttentionShape("long-8192", 1, 1, 1, 8192, 8192, 64),
    AttentionShape("decode-4096-gqa", 4, 16, 4, 1, 4096, 128, backward=False),
    AttentionShape("decode-4096-gqa-bf16", 4, 16, 4, 1, 4096, 128, torch.bfloat16, backward=False),
)

MODULE = (
    ModuleShape("digits-8", 64, 8, 64, 4, padding=True),
    ModuleShape("bert-128-padded", 8, 128, 768, 12, padding=True),
    ModuleShape("vit-197", 4, 197, 768, 12),
    # No training: without bf16 instructions the projections alone, PyTorch's in both, take ten seconds.
    ModuleShape("vit-197-bf16", 4, 197, 768, 12, torch.bfloat16, backward=False),
    ModuleShape("encoder-512-padded", 2, 512, 512, 8, padding=True),
    ModuleShape("encoder-512-weights", 2, 512, 512, 8, need_weights=True),
    ModuleShape("narrow-2048", 1, 2048, 128, 4),
)
