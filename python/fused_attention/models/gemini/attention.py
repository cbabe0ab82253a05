"""The layers' attention: QK-norm, rotary positions, and transformers' AttentionInterface or our caches.

    q, k = rope(norm(q)), rope(norm(k));  out = Wo attention(q, k, v)

Layout: the projection gives [B, S, H + 2 HK, D]; q, k and v are views [B, H or HK, S, D] of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...ops import rope_qk_norm
from .cache import Arrival, GeminiCache
from .configuration import GeminiConfig

Tables = tuple[Tensor, Tensor, Tensor | None]  # cos, sin, rows: see RotaryEmbedding.tables_for


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain operations, for attn_implementation="eager"; the window is in the mask."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(2, 3) * scaling  # [B, H, M, N]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    weights = F.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class GeminiAttention(nn.Module):
    def __init__(self, config: GeminiConfig, layer: int) -> None:
        super().__init__()
        assert config.layer_types is not None
        self.config, self.layer_idx, self.layer_type = config, layer, config.layer_types[layer]
        self.is_causal = True
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.num_key_value_groups = self.heads // self.kv_heads  # what transformers' own sdpa asks for
        self.window = config.sliding_window if self.layer_type == "sliding_attention" else None
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, rows, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self, x: Tensor, tables: Tables, mask: Tensor | None, arrival: Arrival | None, past: Cache | None, **more: Any
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, S, E] -> [B, S, E], and the weights where the implementation gives them."""
        qkv = self.qkv_proj(x).unflatten(-1, (self.heads + 2 * self.kv_heads, self.head_dim)).transpose(1, 2)
        query, key, value = qkv.split((self.heads, self.kv_heads, self.kv_heads), 1)  # [B, H or HK, S, D]
        query, key = self._turn(query, key, tables)
        cap, scale = self.config.attn_logit_softcapping, self.head_dim**-0.5
        if isinstance(past, GeminiCache):
            window = None if self.window is None else (self.window - 1, None)
            held = past.layers[self.layer_idx]
            out = held.attend(query, key, value, arrival, window=window, softcap=cap, scale=scale)  # [B, H, S, D]
            if mask is None:
                return self.o_proj(out.transpose(1, 2).flatten(2)), None
            # A prompt with images, whose tokens see each other: it is in the cache now, and attends by its mask.
        elif past is not None:
            key, value = past.update(key, value, self.layer_idx)
        implementation = self.config._attn_implementation
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        more |= {"softcap": cap, "scaling": scale, "sliding_window": self.window}
        dropout = self.config.dropout if self.training else 0.0
        out, weights = attend(self, query, key, value, mask, dropout=dropout, **more)  # [B, S, H, D]
        return self.o_proj(out.flatten(2)), weights

    def _turn(self, query: Tensor, key: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
        """RMS norm of every head, then rotation."""
        cos, sin, rows = tables
        norms: dict[str, Any] = {"query_weight": self.q_norm.weight, "key_weight": self.k_norm.weight}
        turned = rope_qk_norm(query, key, cos, sin, positions=rows, eps=self.config.rms_norm_eps, **norms)
        assert turned[0] is not None and turned[1] is not None
        return turned[0], turned[1]
