"""Self-attention with the projections around it, as a module makes it: one call where PyTorch's products are slower.

q, k, v = x Wi^T + bi,      output = concat_h(softmax(q_h k_h^T / sqrt(d)) v_h) Wo^T + bo
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from .backends import cpu
from .joint import is_plain, joint_attention
from .spec import AttentionSpec, Causal, WeightsMode


class Projection(NamedTuple):
    """weight: [out, in]; bias: [out] or None."""

    weight: Tensor
    bias: Tensor | None


def projected_attention(
    x: Tensor,
    first: Projection,
    last: Projection,
    heads: int,
    batch_first: bool = True,
    *,
    causal: Causal | None = None,
    dropout_p: float = 0.0,
    return_weights: WeightsMode | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Project `x` to query, key and value, attend, and project what comes out.

    Args:
        x: [B, S, E], or [S, B, E] without `batch_first`.
        first: to query, key and value one after the other: weight [3 E, E].
        last: weight [E, E].
        heads: H.

    The other arguments and the errors are those of `attention` and of `torch.nn.functional.linear`.

    Returns:
        The output, shaped like `x`, and the weights or None.
    """
    call = None if dropout_p else _one_call(x, first, last, heads, batch_first, causal, return_weights)
    if call is None:
        options: dict[str, Any] = {"causal": causal, "dropout_p": dropout_p, "return_weights": return_weights}
        return _apart(x, first, last, heads, batch_first, **options)
    if call.spec.gradients:
        found: tuple[Tensor, Tensor | None] = _Projected.apply(call, batch_first, x, *first, *last)
        return found
    output, weights = call(x, *first, *last, False)[:2]
    assert output is not None
    return output, weights


def _apart(
    x: Tensor, first: Projection, last: Projection, heads: int, batch_first: bool, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The three steps by themselves."""
    attended, weights = joint_attention(F.linear(x, *first), heads, batch_first, **options)
    return F.linear(attended, *last), weights


def _one_call(
    x: Tensor,
    first: Projection,
    last: Projection,
    heads: int,
    batch_first: bool,
    causal: Causal | None,
    weights: WeightsMode | None,
) -> cpu.Projected | None:
    """The call that does it all; None where it cannot, or where PyTorch's products are faster.

    Whether gradients are wanted makes no difference: training and inference have the same bits.
    """
    if not is_plain(x) or torch._C._is_torch_function_mode_enabled():
        return None
    shape, dtype = x.shape, x.dtype
    width = shape[2]
    if not cpu.projections_pay(dtype, shape[0] * shape[1], width):
        return None
    needs = x.requires_grad
    for (weight, bias), out in ((first, 3 * width), (last, width)):
        if weight.shape != (out, width) or not _is_plain_parameter(weight, dtype):
            return None
        if bias is not None and (bias.shape != (out,) or not _is_plain_parameter(bias, dtype)):
            return None
        needs = needs or weight.requires_grad or (bias is not None and bias.requires_grad)
    needs = needs and torch.is_grad_enabled()
    return _planned(shape, heads, batch_first, dtype, needs, causal, weights, dispatch.requested())


def _is_plain_parameter(t: Tensor, dtype: torch.dtype) -> bool:
    plain = type(t) is torch.nn.Parameter or type(t) is Tensor
    return plain and t.dtype == dtype and t.is_cpu and t.layout == torch.strided and t.is_contiguous()


@functools.lru_cache(maxsize=4096)
def _planned(shape: torch.Size, heads: int, batch_first: bool, *kind: Any) -> cpu.Projected | None:
    spec = dispatch.select_joint(torch.Size((*shape[:2], 3 * shape[2])), heads, batch_first, *kind)
    return None if spec is None else cpu.Projected(spec, batch_first)


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: cpu.Projected, batch_first: bool, *tensors: Any) -> Any:
        x, w1, b1, w2, b2 = tensors
        output, weights, qkv, attended, lse = call(x, w1, b1, w2, b2, True)
        ctx.spec, ctx.batch_first = call.spec, batch_first
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, qkv, attended, lse)
        return output, weights

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dweights: Tensor | None) -> Any:
        *tensors, qkv, attended, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        if dout is None and dweights is None:
            return (None,) * 7
        if torch.is_grad_enabled():
            return None, None, *_gradients_in_graph(ctx.spec, ctx.batch_first, tensors, needs, dout, dweights)
        x, wi, _, wo, _ = tensors
        dx = dwi = dbi = dwo = dbo = dattended = None
        if dout is not None:
            rows = dout.reshape(-1, dout.shape[-1])
            dwo, dbo = _parameter_gradients(rows, attended, needs[3], needs[4])
            dattended = (rows @ wo).view(attended.shape) if any(needs[:3]) else None
        if any(needs[:3]):
            spec, incoming = ctx.spec, (dattended, dweights)
            rows = cpu.backward_joint(spec, qkv, ctx.batch_first, (attended, lse), incoming).flatten(0, 1)
            dwi, dbi = _parameter_gradients(rows, x, needs[1], needs[2])
            dx = (rows @ wi).view(x.shape) if needs[0] else None
        return None, None, dx, dwi, dbi, dwo, dbo


def _parameter_gradients(dy: Tensor, x: Tensor, weight: bool, bias: bool) -> tuple[Tensor | None, Tensor | None]:
    """Of y = x W^T + b, from dy [rows, out]."""
    return dy.t() @ x.reshape(-1, x.shape[-1]) if weight else None, dy.sum(0) if bias else None


def _gradients_in_graph(
    spec: AttentionSpec,
    batch_first: bool,
    tensors: list[Tensor],
    needs: tuple[bool, ...],
    dout: Tensor | None,
    dweights: Tensor | None,
) -> list[Tensor | None]:
    """The gradients of the three steps by themselves, to be differentiated again."""
    x, wi, bi, wo, bo = tensors
    options: dict[str, Any] = {"causal": spec.causal, "return_weights": spec.weights}
    found = _apart(x, Projection(wi, bi), Projection(wo, bo), spec.heads, batch_first, **options)
    pairs = [(y, dy) for y, dy in zip(found, (dout, dweights), strict=True) if y is not None and dy is not None]
    inputs = [t for t, need in zip(tensors, needs, strict=True) if need]
    outputs, incoming = zip(*pairs, strict=True)
    grads = iter(torch.autograd.grad(outputs, inputs, incoming, create_graph=True, allow_unused=True))
    return [next(grads) if need else None for need in needs]
