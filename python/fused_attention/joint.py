"""Attention of one projection that holds query, key and value, as a module of self-attention makes it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import autograd, dispatch
from .functional import attention
from .layout import merge_heads, split_joint
from .spec import Causal, WeightsMode
from .tracing import is_traced


def joint_attention(
    qkv: Tensor,
    heads: int,
    batch_first: bool = True,
    *,
    causal: Causal | None = None,
    dropout_p: float = 0.0,
    return_weights: WeightsMode | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`attention` of query, key and value that one projection gave, as a module calls it: one call, no views.

    Args:
        qkv: [B, S, 3 H D], or [S, B, 3 H D] without `batch_first`: query, key and value one after the other.
        heads: H.

    The other arguments and the errors are those of `attention`.

    Returns:
        The output, [B, S, H D] or [S, B, H D], and the weights or None.
    """
    if not dropout_p and is_plain(qkv):
        needs = qkv.requires_grad and torch.is_grad_enabled()
        kind = (qkv.shape, heads, batch_first, qkv.dtype, needs, causal, return_weights)
        spec = dispatch.select_joint(*kind, dispatch.requested())
        if spec is not None:
            return autograd.run_joint(spec, qkv, batch_first)
    q, k, v = split_joint(qkv, heads, batch_first)
    result = attention(q, k, v, causal=causal, dropout_p=dropout_p, return_weights=return_weights)
    output, weights = (result, None) if isinstance(result, Tensor) else (result.output, result.weights)
    return merge_heads(output, batch_first), weights


def is_plain(qkv: Tensor) -> bool:
    """Whether plain data on a CPU, outside of transforms and autocast, lies densely in memory."""
    if type(qkv) is not Tensor or not qkv.is_cpu or qkv.layout != torch.strided or not qkv.is_contiguous():
        return False
    if is_traced(qkv) or torch.is_autocast_enabled("cpu"):
        return False
    return torch.autograd.forward_ad._current_level < 0 and torch._C._functorch.peek_interpreter_stack() is None
