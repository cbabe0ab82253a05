"""The definition: plain eager PyTorch, differentiable to any order, O(M N) memory.

    s = scale * q k^T;  s = softcap * tanh(s / softcap);  s += alibi + mask + bias;  s = -inf where hidden
    lse = log(sum_j exp(s_j) + exp(sink));  weights = dropout(exp(s - lse));  output = weights v

A row that sees no key gives output 0, weights 0, lse -inf. What every other backend computes is measured against
this module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from .. import philox
from ..layout import memory_order
from ..spec import AttentionSpec, Device, Inputs, Outputs, only_full_precision


def unsupported(spec: AttentionSpec) -> str | None:
    """The reference refuses nothing but products of less precision than the inputs have."""
    return only_full_precision(spec)


def supports(spec: AttentionSpec, device: Device) -> str | None:
    """The same on every device."""
    return unsupported(spec)


def plan(spec: AttentionSpec, device: Device) -> str | None:
    """Nothing is launched but torch's own operations."""
    return None


def diagonal(spec: AttentionSpec, x: Inputs, rows: int, columns: int) -> Tensor:
    """The key on the diagonal of row 0, [B or 1, 1, 1, 1]: 0, or (keys - rows) for the bottom-right alignment."""
    if spec.causal != "bottom_right":
        return torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=x.query.device)
    lengths = x.key_lengths
    if lengths is None:
        return torch.full((1, 1, 1, 1), columns - rows, dtype=torch.int64, device=x.query.device)
    return (lengths - rows)[:, None, None, None]


def visible_keys(spec: AttentionSpec, x: Inputs, rows: int, columns: int) -> Tensor | None:
    """Which keys a row sees, bool broadcastable to [B, H, M, N]; None where all rows see all keys."""
    device = x.query.device
    column = torch.arange(columns, device=device)
    center = torch.arange(rows, device=device)[:, None] + diagonal(spec, x, rows, columns)  # [B|1, 1, M, 1]
    tests: list[Tensor] = []
    if spec.causal:
        tests.append(column <= center)
    left, right = spec.window or (None, None)
    if left is not None:
        tests.append(column >= center - left)
    if right is not None:
        tests.append(column <= center + right)
    if x.key_lengths is not None:
        tests.append(column < x.key_lengths[:, None, None, None])
    for t in (x.mask, x.bias):
        if t is not None:
            tests.append(t if t.dtype == torch.bool else t != float("-inf"))
    if spec.block_map is not None and x.block_map is not None:
        block_rows, block_columns = spec.block_map
        band = torch.arange(rows, device=device) // block_rows
        tests.append(x.block_map[:, :, band][..., column // block_columns])
    visible: Tensor | None = None
    for test in tests:
        visible = test if visible is None else visible & test
    return visible


def additive_terms(spec: AttentionSpec, x: Inputs, rows: int, columns: int, dtype: torch.dtype) -> list[Tensor]:
    """ALiBi, the float mask and the bias, each broadcastable to [B, H, M, N], in the given dtype."""
    terms: list[Tensor] = []
    if x.alibi_slopes is not None:
        center = torch.arange(rows, device=x.query.device)[:, None] + diagonal(spec, x, rows, columns)
        distance = (center - torch.arange(columns, device=x.query.device)).abs()
        terms.append(-x.alibi_slopes.to(dtype)[:, :, None, None] * distance)
    terms += [t.to(dtype) for t in (x.mask, x.bias) if t is not None and t.dtype != torch.bool]
    return terms


def _holds_nonfinite(*tensors: Tensor) -> bool:
    return not all(bool(t.isfinite().all()) for t in tensors)


def _attend(spec: AttentionSpec, x: Inputs, batch: Tensor, acc: torch.dtype) -> Outputs:
    """One dense batch; `batch` holds the indices that enter the dropout counter."""
    rows, columns, heads = x.query.shape[2], x.key.shape[2], x.query.shape[1]
    q = x.query.to(acc)
    k = x.key.to(acc).repeat_interleave(spec.group, dim=1)  # [B, H, N, D]
    v = x.value.to(acc).repeat_interleave(spec.group, dim=1)
    visible = visible_keys(spec, x, rows, columns)
    # 0 * NaN is NaN: where hidden keys hold NaN or Inf, products are taken one by one, over what is visible.
    one_by_one = visible is not None and spec.transform != "torch.func" and _holds_nonfinite(q, k, v)
    if one_by_one:
        assert visible is not None
        visible = visible.expand(q.shape[0], heads, rows, columns)
        seen = visible[..., None]  # [B, H, M, N, 1]
        q = torch.where(visible.any(-1, keepdim=True), q, 0.0)
        scores = (q[:, :, :, None] * torch.where(seen, k[:, :, None], 0.0)).sum(-1) * spec.scale
    else:
        scores = (q * spec.scale) @ k.transpose(-2, -1)  # [B, H, M, N]
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    for term in additive_terms(spec, x, rows, columns, acc):
        scores = scores + term
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))

    if columns == 0:
        top = scores.new_full((*scores.shape[:-1], 1), float("-inf"))
    else:
        top = scores.detach().amax(-1, keepdim=True)
    alive = top != float("-inf")  # [B, H, M, 1]
    sink = None if x.sinks is None else x.sinks.to(acc)[None, :, None, None]
    shift = top if sink is None else torch.maximum(top, sink.detach())
    shift = torch.where(alive, shift, 0.0)
    exps = torch.exp(scores - shift)
    total = exps.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(torch.where(alive, sink, 0.0) - shift)
    total = torch.where(alive, total, 1.0)
    lse = torch.where(alive, shift + torch.log(total), float("-inf"))[..., 0]
    weights = exps / total
    if spec.dropout_p > 0.0:
        assert x.seed is not None
        keep = philox.keep_mask(x.seed, spec.dropout_p, batch, heads, rows, columns)
        factor = 1.0 / (1.0 - spec.dropout_p) if spec.dropout_p < 1.0 else 0.0
        weights = weights * keep * factor
    if one_by_one:
        output = (weights[..., None] * torch.where(seen, v[:, :, None], 0.0)).sum(-2)
    else:
        output = weights @ v
    if spec.weights is None:
        return Outputs(output.to(spec.dtype), lse, None)
    returned = weights.mean(1) if spec.weights == "mean" else weights
    return Outputs(output.to(spec.dtype), lse, returned.to(spec.dtype))


def forward(spec: AttentionSpec, x: Inputs, compute_dtype: torch.dtype | None = None) -> Outputs:
    """The attention of `spec`; gradients of any order through autograd.

    compute_dtype: default `spec.lse_dtype`; the inputs' own dtype gives what plain eager code in that dtype gives.
    """
    acc = compute_dtype or spec.lse_dtype
    device = x.query.device.type
    castable = torch.amp.is_autocast_available(device)
    # Autocast would take the products to a half dtype.
    with torch.autocast(device, enabled=False) if castable else contextlib.nullcontext():
        if spec.packed:
            out = _attend_packed(spec, x, acc)
        elif spec.batch_invariant and spec.batch > 1:
            out = _attend_alone(spec, x, acc)
        else:
            out = _attend(spec, x, torch.arange(spec.batch, device=x.query.device), acc)
    order, back = memory_order(x.query)
    return out._replace(output=out.output.permute(order).contiguous().permute(back))


_OF_A_BATCH = ("query", "key", "value", "mask", "bias", "alibi_slopes", "key_lengths", "block_map")


def _attend_alone(spec: AttentionSpec, x: Inputs, acc: torch.dtype) -> Outputs:
    """Each sequence of the batch by itself: how a product of many matrices sums depends on how many there are, and on
    where each of them lies in memory.
    """
    alone, parts = replace(spec, batch=1), []
    for b in range(spec.batch):
        own = {name: getattr(x, name) for name in _OF_A_BATCH}
        rows = {n: t[b : b + 1].clone() for n, t in own.items() if t is not None and t.shape[0] == spec.batch}
        parts.append(_attend(alone, x._replace(**rows), torch.full((1,), b, device=x.query.device), acc))
    output, lse, weights = zip(*parts, strict=True)
    return Outputs(torch.cat(output), torch.cat(lse), None if spec.weights is None else torch.cat(weights))


def sequences(x: Inputs) -> Iterator[Inputs]:
    """Packed inputs one sequence at a time, each as a dense batch of one."""
    assert x.cu_seqlens_q is not None and x.cu_seqlens_k is not None
    starts_q, starts_k, slopes = x.cu_seqlens_q.tolist(), x.cu_seqlens_k.tolist(), x.alibi_slopes
    for b in range(len(starts_q) - 1):
        rows, keys = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        yield x._replace(
            query=x.query[:, :, rows],
            key=x.key[:, :, keys],
            value=x.value[:, :, keys],
            alibi_slopes=slopes if slopes is None or slopes.shape[0] == 1 else slopes[b : b + 1],
        )


def _attend_packed(spec: AttentionSpec, x: Inputs, acc: torch.dtype) -> Outputs:
    device = x.query.device
    parts = [_attend(spec, one, torch.tensor([b], device=device), acc) for b, one in enumerate(sequences(x))]
    if not parts:
        empty = x.query.new_empty(*x.query.shape[:3], spec.value_dim)
        return Outputs(empty, empty.new_empty(empty.shape[:3], dtype=spec.lse_dtype), None)
    return Outputs(torch.cat([p.output for p in parts], 2), torch.cat([p.lse for p in parts], 2), None)


def backward(
    spec: AttentionSpec, x: Inputs, out: Outputs, grads: tuple[Tensor | None, Tensor | None, Tensor | None]
) -> dict[str, Tensor]:
    """Gradients of the inputs named in `spec.gradients`, by differentiating the definition."""
    if spec.part_of_keys:
        grads = _of_the_part(spec, x, out, grads)
    # Inside a torch.library op autograd's dispatch keys are excluded, and enable_grad alone records nothing.
    recording = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with recording, torch.enable_grad():
        return _vjp(spec, x, grads, create_graph=False)


def _of_the_part(
    spec: AttentionSpec, x: Inputs, out: Outputs, grads: tuple[Tensor | None, Tensor | None, Tensor | None]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients that come in for the output and lse of these keys alone, from those for the whole, which is `out`.

    output = sum_i w_i output_i, w_i = exp(lse_i - lse):  dlse_i = w_i (dout . output_i - dout . output + dlse).
    """
    dout, dlse, _ = grads
    with torch.no_grad():
        own = forward(replace(spec, gradients=frozenset()), x)
        weight = torch.where(own.lse == float("-inf"), 0.0, torch.exp(own.lse - out.lse))
        through = torch.zeros_like(out.lse) if dlse is None else dlse
        if dout is not None:
            through = through + (dout.to(spec.lse_dtype) * (own.output.to(spec.lse_dtype) - out.output)).sum(-1)
            dout = (dout * weight[..., None]).to(dout.dtype)
        return dout, through * weight, None


def _vjp(
    spec: AttentionSpec, x: Inputs, grads: tuple[Tensor | None, Tensor | None, Tensor | None], create_graph: bool
) -> dict[str, Tensor]:
    names = sorted(spec.gradients)
    leaves = {n: getattr(x, n) for n in names}
    if not create_graph:
        leaves = {n: t.detach().requires_grad_() for n, t in leaves.items()}
    outputs = forward(spec, x._replace(**leaves))
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o is not None and g is not None]
    found = torch.autograd.grad(
        [o for o, _ in pairs],
        list(leaves.values()),
        [g for _, g in pairs],
        create_graph=create_graph,
        allow_unused=True,
    )
    return {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(names, found, strict=True)}


def _leaf(t: Tensor, keep_graph: bool) -> Tensor:
    return t if keep_graph and t.requires_grad else t.detach().requires_grad_()


def double_backward(
    spec: AttentionSpec,
    x: Inputs,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    second: dict[str, Tensor],
) -> tuple[dict[str, Tensor], list[Tensor | None]]:
    """The vector-Jacobian product of `backward`.

    second: a cotangent for each gradient that `backward` returned. Returns the gradients of the inputs named in
    `spec.gradients` and of the three incoming gradients.
    """
    keep_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = {n: _leaf(getattr(x, n), keep_graph) for n in sorted(spec.gradients)}
        incoming = [None if g is None else _leaf(g, keep_graph) for g in grads]
        first = _vjp(spec, x._replace(**leaves), (incoming[0], incoming[1], incoming[2]), create_graph=True)
        pairs = [(first[n], s) for n, s in second.items() if first[n].requires_grad]
        wanted = list(leaves.values()) + [g for g in incoming if g is not None]
        found: list[Tensor | None] = [None] * len(wanted)
        if pairs:
            found = list(
                torch.autograd.grad(
                    [f for f, _ in pairs],
                    wanted,
                    [s for _, s in pairs],
                    create_graph=keep_graph,
                    allow_unused=True,
                )
            )
    by_name = {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(leaves.items(), found, strict=False)}
    rest = iter(found[len(leaves) :])
    return by_name, [None if g is None else next(rest) for g in incoming]
