"""Modules: parameters plus one call of `fused_attention.functional` each.

`MultiheadAttention` is the drop-in for `torch.nn.MultiheadAttention`; `replace_attention` puts it into a
model that exists already; `SelfAttention` and `MultiHeadAttention` are the two textbook modules.
"""

from .multihead import MultiheadAttention
from .replace import ReplacementReport, replace_attention
from .textbook import MultiHeadAttention, SelfAttention

__all__ = [
    "MultiHeadAttention",
    "MultiheadAttention",
    "ReplacementReport",
    "SelfAttention",
    "replace_attention",
]
