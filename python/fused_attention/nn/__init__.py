"""Modules: parameters plus one call of `fused_attention.functional` each.

`MultiheadAttention` is the drop-in for `torch.nn.MultiheadAttention`; `replace_attention` puts it into a model that
exists already and `restore_attention` takes it out; `SelfAttention` and `MultiHeadAttention` are the two textbook
modules; `GroupedQueryAttention` is the layer of today's decoders. `positions.py` tells tokens where they stand.
"""

from .grouped import GroupedQueryAttention
from .multihead import MultiheadAttention
from .positions import LearnedPositionalEmbedding, RotaryEmbedding, SinusoidalPositionalEncoding, alibi_slopes
from .replace import ReplacementReport, replace_attention, restore_attention
from .textbook import MultiHeadAttention, SelfAttention

__all__ = [
    "GroupedQueryAttention",
    "LearnedPositionalEmbedding",
    "MultiHeadAttention",
    "MultiheadAttention",
    "ReplacementReport",
    "RotaryEmbedding",
    "SelfAttention",
    "SinusoidalPositionalEncoding",
    "alibi_slopes",
    "replace_attention",
    "restore_attention",
]
