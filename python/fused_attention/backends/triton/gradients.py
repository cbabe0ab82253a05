"""From a backward pass to launches: which kernels run, on which grid, with which arguments."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...layout import output_like, rows_contiguous
from ...spec import AttentionSpec, Inputs, Outputs
from . import backward_kernels, configs, weights_kernels
from .attention import describe, problem, readable, right_side, row_view, schedule, view, weights_view
from .launch import Launch, compile_options
from .tiles import Problem, View

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class AdditiveGradient(NamedTuple):
    """Float32 [shares, B', H', M', N'], contiguous."""

    p: Any
    share: int
    b: int
    h: int
    M: int
    N: int


class _Pass(NamedTuple):
    """What every kernel of one backward pass reads."""

    spec: AttentionSpec
    x: Inputs
    problem: Problem
    arch: str | None
    lse: View
    delta: View
    dlse: View | None
    dout: View
    dweights: View | None


def backward_launches(
    spec: AttentionSpec, x: Inputs, out: Outputs, grads: Gradients, arch: str | None
) -> tuple[list[Launch], dict[str, Tensor]]:
    """The launches of a backward pass and the gradients that they fill, those of mask and bias in float32 shares."""
    dout, dlse, dweights = grads
    if dout is None:
        dout = torch.zeros_like(out.output)
    dout = readable(dout)
    packed = spec.packed
    delta = torch.empty_like(out.lse)
    s = _Pass(
        spec,
        x,
        problem(spec, x),
        arch,
        row_view(out.lse, packed),
        row_view(delta, packed),
        None if dlse is None else row_view(dlse, packed),
        view(dout, packed),
        None if dweights is None else weights_view(dweights),
    )
    launches = _delta(s, rows_contiguous(out.output)) if delta.numel() else []
    found: dict[str, Tensor] = {}
    for name in ("query", "key", "value"):
        if name in spec.gradients:
            t = getattr(x, name)
            found[name] = output_like(t, t.shape[0], t.shape[-1])
    if "query" in found and delta.numel():
        launches.append(_query_gradient(s, dout, found["query"]))
    launches += _key_gradients(s, dout, found.get("key"), found.get("value"))
    for name in ("mask", "bias"):
        if name in spec.gradients:
            launches += _additive_gradient(s, getattr(x, name), found, name)
    if "sinks" in spec.gradients:
        found["sinks"] = delta  # of rows; summed when it is there
    return launches, found


def finish(spec: AttentionSpec, x: Inputs, out: Outputs, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """After the launches: the shares of mask and bias are added in order, the rows' shares of the sinks are summed."""
    for name in ("mask", "bias"):
        if name in found:
            shares = found[name]
            found[name] = shares[0] if shares.shape[0] == 1 else shares.sum(0)
    if "sinks" in found:
        assert x.sinks is not None
        dead = out.lse == float("-inf")
        # One number per head from all its rows: in double, so that it is as good as its terms.
        weight = torch.exp(x.sinks.double()[None, :, None] - torch.where(dead, 0.0, out.lse))
        found["sinks"] = -torch.where(dead, 0.0, weight * found["sinks"]).sum((0, 2))
    return {n: g.to(getattr(x, n).dtype) for n, g in found.items()}


def _rows_grid(s: _Pass, block_m: int, keys: bool = False) -> tuple[int, Any, int, int]:
    """The grid over tiles of rows (or keys), the schedule, the number of tiles, and the steps of its bisection."""
    spec = s.spec
    size, heads = (spec.columns, spec.kv_heads) if keys else (spec.rows, spec.heads)
    blocks = triton.cdiv(size, block_m)
    if not spec.packed:
        return blocks * heads * spec.batch, None, blocks, 0
    total = (s.x.key if keys else s.x.query).shape[2]
    grid = heads * min(blocks * spec.batch, triton.cdiv(total, block_m) + spec.batch)
    return grid, schedule(s.x, block_m, keys=keys), blocks, (spec.batch - 1).bit_length()


def _reach(spec: AttentionSpec) -> int:
    """How many keys from the first on the rows see together."""
    right = right_side(spec)
    if spec.causal == "bottom_right" or right is None:
        return spec.columns
    return min(spec.columns, spec.rows + right)


def _compile(s: _Pass, c: configs.Config) -> dict[str, int]:
    return {"num_stages": c.stages, **compile_options(s.arch, c.warps)}


def _options(s: _Pass, c: configs.Config) -> dict[str, Any]:
    return {
        "WHOLE": not s.spec.part_of_keys and _reach(s.spec) <= c.BLOCK_N,
        "BLOCK_M": c.BLOCK_M,
        "BLOCK_N": c.BLOCK_N,
        "BLOCK_D": configs.padded(s.spec.head_dim),
        "BLOCK_DV": configs.padded(s.spec.value_dim),
        **_compile(s, c),
    }


def _delta(s: _Pass, output: Tensor) -> list[Launch]:
    spec = s.spec
    c = configs.delta(s.arch, spec)
    grid, order, blocks, steps = _rows_grid(s, c.BLOCK_M)
    args = (s.problem, view(output, spec.packed), s.lse, s.dout, s.dlse, s.delta, order, blocks)
    options = {"BLOCK_M": c.BLOCK_M, "BLOCK_DV": configs.padded(spec.value_dim), "STEPS": steps}
    found = [Launch(backward_kernels.delta_kernel, (grid,), args, options | _compile(s, c))]
    if s.dweights is not None:
        c = configs.weights(s.arch, spec)
        blocks = triton.cdiv(spec.rows, c.BLOCK_M)
        options = {"BLOCK_M": c.BLOCK_M, "BLOCK_N": c.BLOCK_N, "BLOCK_D": configs.padded(spec.head_dim)}
        rest = (s.problem, s.delta, s.lse, s.dweights, blocks)
        grid = blocks * spec.heads * spec.batch
        found.append(Launch(weights_kernels.weights_delta_kernel, (grid,), rest, options | _compile(s, c)))
    return found


def _query_gradient(s: _Pass, dout: Tensor, dquery: Tensor) -> Launch:
    spec = s.spec
    c = configs.query_gradient(s.arch, spec)
    width, value_width = configs.padded(spec.head_dim), configs.padded(spec.value_dim)
    grid, order, blocks, steps = _rows_grid(s, c.BLOCK_M)
    keys = describe(s.problem.key.p, c.BLOCK_N, width) if c.descriptors else None
    values = describe(s.problem.value.p, c.BLOCK_N, value_width) if c.descriptors else None
    target = view(dquery, spec.packed)
    args = (s.problem, target, s.lse, s.delta, s.dlse, s.dout, s.dweights, keys, values, order, blocks)
    options = _options(s, c) | {"STEPS": steps}
    return Launch(backward_kernels.query_gradient_kernel, (grid,), args, options)


def _key_gradients(s: _Pass, dout: Tensor, dkey: Tensor | None, dvalue: Tensor | None) -> list[Launch]:
    """dK and dV in one launch, or one after the other where their accumulators do not fit together."""
    spec = s.spec
    c = configs.key_gradient(s.arch, spec)
    width, value_width = configs.padded(spec.head_dim), configs.padded(spec.value_dim)
    grid, order, blocks, steps = _rows_grid(s, c.BLOCK_N, keys=True)
    if grid == 0 or (dkey is None and dvalue is None):
        return []
    queries = describe(s.problem.query.p, c.BLOCK_M, width) if c.descriptors else None
    douts = describe(dout, c.BLOCK_M, value_width) if c.descriptors else None
    wanted = [(dkey, dvalue)] if c.together else [(dkey, None), (None, dvalue)]
    options = _options(s, c) | {"STEPS": steps}
    launches = []
    for dk, dv in wanted:
        if dk is not None or dv is not None:
            targets = tuple(None if t is None else view(t, spec.packed) for t in (dk, dv))
            args = (s.problem, *targets, s.lse, s.delta, s.dlse, s.dout, s.dweights, queries, douts, order, blocks)
            launches.append(Launch(backward_kernels.key_gradient_kernel, (grid,), args, options))
    return launches


def _additive_gradient(s: _Pass, t: Tensor, found: dict[str, Tensor], name: str) -> list[Launch]:
    """The gradient of a mask or bias in shares, [shares, *t.shape]."""
    spec = s.spec
    if 0 in (spec.batch, spec.heads, spec.rows, spec.columns):
        found[name] = torch.zeros((1, *t.shape), dtype=torch.float32, device=t.device)
        return []
    c = configs.additive_gradient(s.arch, spec)
    row_blocks, key_blocks = triton.cdiv(spec.rows, c.BLOCK_M), triton.cdiv(spec.columns, c.BLOCK_N)
    full = (spec.batch, spec.heads, row_blocks, key_blocks)
    repeats = tuple(n if have == 1 else 1 for have, n in zip(t.shape, full, strict=True))
    tiles = 1
    for n, again in zip(full, repeats, strict=True):
        tiles *= n // again
    steps = repeats[0] * repeats[1] * repeats[2] * repeats[3]
    shares = configs.shares(tiles, steps)
    chunk = triton.cdiv(steps, shares)
    shares = triton.cdiv(steps, chunk)
    grad = torch.empty((shares, *t.shape), dtype=torch.float32, device=t.device)
    found[name] = grad
    target = AdditiveGradient(grad, grad.stride(0), grad.stride(1), grad.stride(2), t.shape[2], t.shape[3])
    args = (s.problem, target, repeats, chunk, s.lse, s.delta, s.dlse, s.dout, s.dweights, row_blocks, key_blocks)
    kernel = weights_kernels.additive_gradient_kernel
    return [Launch(kernel, (tiles * shares,), args, _options(s, c))]
