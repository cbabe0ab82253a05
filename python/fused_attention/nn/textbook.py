"""The two modules that introductions to attention write by hand, with the same parameters and the same numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..functional import attention


class SelfAttention(nn.Module):
    """Single-head self-attention: softmax(Q K^T / sqrt(d_k)) V with Q, K, V = X Wq^T + bq, X Wk^T + bk, X Wv^T + bv.

    Args:
        input_dim: features of the input.
        d_k: features of queries, keys, values and of the output.
    """

    def __init__(self, input_dim: int, d_k: int) -> None:
        super().__init__()
        self.W_q = nn.Linear(input_dim, d_k)
        self.W_k = nn.Linear(input_dim, d_k)
        self.W_v = nn.Linear(input_dim, d_k)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """x [..., S, input_dim] -> [..., S, d_k].

        mask: bool (True shows) or floating (added), broadcastable to the scores [..., S, S]. causal: each
        position sees itself and what comes before.
        """
        *batch, length, _ = x.shape
        # One head; the leading dimensions are one batch dimension. [B, 1, S, d_k]
        n = math.prod(batch)
        q, k, v = (w(x).reshape(n, 1, length, w.out_features) for w in (self.W_q, self.W_k, self.W_v))
        if mask is not None:
            if mask.dim() > 2:
                mask = mask.expand(*batch, *mask.shape[-2:]).reshape(n, 1, *mask.shape[-2:])
            else:
                mask = torch.atleast_2d(mask)[None, None]
        output = attention(q, k, v, mask=mask, causal="top_left" if causal else None)
        assert isinstance(output, Tensor)
        return output.reshape(*batch, length, self.W_v.out_features)


class MultiHeadAttention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values, and one for the output.

    Args:
        input_dim: features of input and output.
        num_heads: heads; must divide `input_dim`.

    Raises:
        ValueError: `input_dim` is not a positive multiple of `num_heads`.
    """

    def __init__(self, input_dim: int, num_heads: int) -> None:
        super().__init__()
        if input_dim <= 0 or num_heads <= 0 or input_dim % num_heads:
            raise ValueError(
                f"Input dimension must be divisible by number of heads, got input_dim={input_dim} and "
                f"num_heads={num_heads}"
            )
        self.input_dim = input_dim
        self.num_heads = num_heads
        self.head_dim = input_dim // num_heads
        self.qkv_proj = nn.Linear(input_dim, 3 * input_dim)
        self.out_proj = nn.Linear(input_dim, input_dim)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """x [B, S, input_dim] -> [B, S, input_dim].

        mask: bool (True shows) or floating (added), broadcastable to the scores [B, num_heads, S, S]. causal:
        each position sees itself and what comes before.
        """
        qkv = self.qkv_proj(x).unflatten(-1, (3, self.num_heads, self.head_dim))  # [B, S, 3, H, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # views [B, H, S, d]
        if mask is not None:
            mask = mask.view((1,) * (4 - mask.dim()) + mask.shape)
        output = attention(q, k, v, mask=mask, causal="top_left" if causal else None)
        assert isinstance(output, Tensor)
        return self.out_proj(output.transpose(1, 2).flatten(-2))  # the output lies in memory as [B, S, H, d]
