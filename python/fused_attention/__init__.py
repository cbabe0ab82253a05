"""Exact fused softmax attention for PyTorch, with one meaning on every machine."""

from .dispatch import BackendError, Explanation, FallbackWarning, use_backend
from .functional import AttentionResult, attention, explain, varlen_attention
from .nn import (
    MultiHeadAttention,
    MultiheadAttention,
    SelfAttention,
    replace_attention,
)
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
    "MultiHeadAttention",
    "MultiheadAttention",
    "SelfAttention",
    "attention",
    "explain",
    "replace_attention",
    "scaled_dot_product_attention",
    "use_backend",
    "varlen_attention",
]
