"""Exact fused softmax attention for PyTorch, with one meaning on every machine."""

from .cache import KVCache, PagedKVCache
from .decode import decode_attention
from .dispatch import BackendError, Explanation, FallbackWarning, use_backend
from .functional import AttentionResult, attention, explain, varlen_attention
from .nn import (
    MultiHeadAttention,
    MultiheadAttention,
    SelfAttention,
    replace_attention,
)
from .ops import fused_softmax, rope_qk_norm
from .sdpa import scaled_dot_product_attention
from .spec import ArgumentError, AttentionSpec

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "AttentionResult",
    "AttentionSpec",
    "BackendError",
    "Explanation",
    "FallbackWarning",
    "KVCache",
    "MultiHeadAttention",
    "MultiheadAttention",
    "PagedKVCache",
    "SelfAttention",
    "attention",
    "decode_attention",
    "explain",
    "fused_softmax",
    "replace_attention",
    "rope_qk_norm",
    "scaled_dot_product_attention",
    "use_backend",
    "varlen_attention",
]
