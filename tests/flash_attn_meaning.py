"""What the functions of `flash_attn` compute, by its documentation, in plain PyTorch: for machines that cannot have it.

Causality and windows are aligned to the lower right corner; -1 in a window is open; layouts are [B, S, H, D].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """q [B, M, H, D], k and v [B, N, HK, D]; the result [B, M, H, D]."""
    rows, columns, group = q.shape[1], k.shape[1], q.shape[2] // max(k.shape[2], 1)
    k, v = (t.double().repeat_interleave(group, 2) for t in (k, v))
    scores = torch.einsum("bmhd,bnhd->bhmn", q.double(), k) * (softmax_scale or 1 / math.sqrt(q.shape[-1]))
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(rows)[:, None] + columns - rows - torch.arange(columns)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.double()[..., None, None] * distance.abs()
    left, right = window_size
    hidden = torch.zeros(rows, columns, dtype=torch.bool)
    if left >= 0:
        hidden |= distance > left
    if causal or right >= 0:
        hidden |= -distance > (0 if causal else right)
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhmn,bnhd->bmhd", weights, v).to(q.dtype)


def flash_attn_qkvpacked_func(qkv: Tensor, causal: bool = False) -> Tensor:
    """qkv [B, S, 3, H, D]."""
    return flash_attn_func(*qkv.unbind(2), causal=causal)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
) -> Tensor:
    """q [T, H, D], k and v [TK, HK, D]."""
    found = []
    for i in range(len(cu_seqlens_q) - 1):
        rows = slice(int(cu_seqlens_q[i]), int(cu_seqlens_q[i + 1]))
        keys = slice(int(cu_seqlens_k[i]), int(cu_seqlens_k[i + 1]))
        assert rows.stop - rows.start <= max_seqlen_q and keys.stop - keys.start <= max_seqlen_k
        found.append(flash_attn_func(q[None, rows], k[None, keys], v[None, keys], causal=causal)[0])
    return torch.cat(found)


def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor, causal: bool = False
) -> Tensor:
    """The new k and v [B, M, HK, D] go into the caches [B, S, HK, D] at cache_seqlens, then q attends."""
    found = []
    for i, length in enumerate(cache_seqlens.tolist()):
        end = length + k.shape[1]
        k_cache[i, length:end], v_cache[i, length:end] = k[i], v[i]
        found.append(flash_attn_func(q[i : i + 1], k_cache[i : i + 1, :end], v_cache[i : i + 1, :end], causal=causal))
    return torch.cat(found)
