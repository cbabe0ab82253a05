"""Exact fused softmax attention for PyTorch, with one meaning on every machine."""

from .cache import KVCache, PagedKVCache
from .context_parallel import (
    ring_attention,
    sequence_positions,
    shard_sequence,
    ulysses_attention,
    unshard_sequence,
)
from .decode import decode_attention
from .dispatch import BackendError, Explanation, FallbackWarning, use_backend
from .functional import AttentionResult, attention, explain, varlen_attention
from .nn import (
    GroupedQueryAttention,
    LearnedPositionalEmbedding,
    MultiHeadAttention,
    MultiheadAttention,
    RotaryEmbedding,
    SelfAttention,
    SinusoidalPositionalEncoding,
    alibi_slopes,
    replace_attention,
    restore_attention,
)
from .ops import fused_softmax, rope_qk_norm
from .scores import key_scores
from .sdpa import scaled_dot_product_attention
from .spec import ArgumentError, AttentionSpec
from .varlen import PackedSequences, pack_padded, unpack_padded

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "AttentionResult",
    "AttentionSpec",
    "BackendError",
    "Explanation",
    "FallbackWarning",
    "GroupedQueryAttention",
    "KVCache",
    "LearnedPositionalEmbedding",
    "MultiHeadAttention",
    "MultiheadAttention",
    "PackedSequences",
    "PagedKVCache",
    "RotaryEmbedding",
    "SelfAttention",
    "SinusoidalPositionalEncoding",
    "alibi_slopes",
    "attention",
    "decode_attention",
    "explain",
    "fused_softmax",
    "key_scores",
    "pack_padded",
    "replace_attention",
    "restore_attention",
    "ring_attention",
    "rope_qk_norm",
    "scaled_dot_product_attention",
    "sequence_positions",
    "shard_sequence",
    "ulysses_attention",
    "unpack_padded",
    "unshard_sequence",
    "use_backend",
    "varlen_attention",
]
