"""How much attention each key draws: the column sums of the weights, without the weights.

    score_n = sum_m exp(s_mn - lse_m)

This is the gradient that `value` would get from an incoming gradient of ones, because output_m = sum_n w_mn value_n. So
the backward kernels compute it block by block, from the log-sum-exp of a forward pass, with every option they have.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import autograd
from .functional import gather
from .spec import ArgumentError, Causal, Options, Window, need_tensor, shape_of, window_sides
from .tracing import is_traced


def _check(query: Tensor, key: Tensor, given: dict[str, Tensor | None]) -> None:
    for name, t in (("query", query), ("key", key)):
        need_tensor(name, t, optional=False)
        if t.is_nested or t.layout != torch.strided or t.dim() != 4:
            was = "a nested tensor" if t.is_nested else f"{t.layout} {shape_of(t)}"
            raise ArgumentError(f"{name}: got {was}, expected a dense tensor [B, H, S, D]")
    if not torch.is_grad_enabled():
        return
    for name, maybe in {"query": query, "key": key, **given}.items():
        if isinstance(maybe, Tensor) and maybe.requires_grad:
            raise ArgumentError(
                f"{name}: got a tensor that requires grad, expected none: key_scores has no derivative "
                "(torch.no_grad())"
            )


def key_scores(
    query: Tensor,
    key: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    causal: Causal | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    per_query_head: bool = False,
) -> Tensor:
    """The attention weights of `attention`, summed over the queries: which keys a cache can do without.

    Memory is O(M + N). Not differentiable: a tensor that requires grad is an error unless under `torch.no_grad()`.

    Args:
        query: [B, H, M, D]; all queries (Zhang et al., "H2O", 2023) or the last few (Li et al., "SnapKV", 2024).
        key: [B, HK, N, D].
        mask, bias, alibi_slopes, sinks, key_lengths, causal, window, softcap, scale: as in `attention`.
        per_query_head: one score per query head instead of the sum over the heads that share a key.

    Returns:
        [B, HK, N], or [B, H, N] if `per_query_head` is set, in the query's dtype; summed in float32, float64 for
        float64. A key that no query sees has the score 0. Without sinks the scores of a head add up to the number of
        queries that see a key.

    Raises:
        ArgumentError: (a ValueError) a shape, dtype, device or value is wrong, or a tensor requires grad.
        TypeError: an argument has the wrong type.
        BackendError: the backend named by `use_backend` does not support the call.
    """
    options = Options(causal, *window_sides(window), softcap, scale)
    given = {"mask": mask, "bias": bias, "alibi_slopes": alibi_slopes, "sinks": sinks}
    _check(query, key, given)
    if not isinstance(per_query_head, bool):
        raise TypeError(f"per_query_head: got {per_query_head!r}, expected a bool")
    heads, shared = query.shape[1], max(key.shape[1], 1)
    width = max(heads // shared, 1) if per_query_head else 1  # DV: one column for each head of a group
    value = key.new_zeros(1).expand(*key.shape[:3], width) if width == 1 else key.new_zeros(*key.shape[:3], width)
    x = gather((query, key, value, mask, bias, alibi_slopes, sinks), key_lengths)
    found = autograd.value_gradient(x, options, _cotangent(x.query, shared, width), is_traced(x.query))
    if not per_query_head:
        return found.squeeze(3)
    return found.transpose(2, 3).flatten(1, 2)  # [B, HK, G, N] -> [B, H, N]


def _cotangent(query: Tensor, shared: int, width: int) -> Tensor:
    """[B, H, M, DV]: ones, or for head h a one in column h mod DV. Expanded, of O(H DV) memory."""
    batch, heads, rows, _ = query.shape
    if width == 1:
        return query.new_ones(1).expand(batch, heads, rows, 1)
    own = torch.eye(width, dtype=query.dtype, device=query.device).repeat(shared, 1)  # [H, DV]
    return own[None, :, None].expand(batch, heads, rows, width)
