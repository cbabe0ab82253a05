"""Multi-head attention written out twice, as yardsticks for modules: in PyTorch, and in numpy's long double.

Both give a row that sees nothing zero weights, where `torch.nn.MultiheadAttention` answers NaN. `exact_multihead` also
gives every gradient, by hand, for float64, of which PyTorch has no wider type.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of the module, in which True hides, as a number to add."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(mask, -torch.inf)


def _added_masks(m: nn.MultiheadAttention, size: tuple[int, int, int, int], dtype: torch.dtype, **kw: Any) -> Tensor:
    """[N, H, L, S + extra]: both masks and the causal hint as one number to add to each score."""
    n, rows, keys, extra = size
    padding, attn = kw["key_padding_mask"], kw["attn_mask"]
    if kw["is_causal"] and padding is None and not kw["need_weights"]:  # the hint is believed, the mask not read
        hidden = torch.ones(n, m.num_heads, rows, keys + extra, dtype=torch.bool).triu(1)
        return _added(hidden, dtype)
    total = torch.zeros(n, m.num_heads, rows, keys, dtype=dtype)
    if attn is not None:
        added = _added(attn, dtype)
        total = total + (added.view(n, -1, rows, keys) if added.dim() == 3 else added)
    if padding is not None:
        total = total + _added(padding, dtype).view(n, 1, 1, keys)
    return F.pad(total, (0, extra))


def _weights_of(m: nn.MultiheadAttention) -> tuple[list[Tensor], list[Tensor] | None]:
    packed = m.in_proj_weight
    weights = [m.q_proj_weight, m.k_proj_weight, m.v_proj_weight] if packed is None else list(packed.chunk(3))
    return weights, None if m.in_proj_bias is None else list(m.in_proj_bias.chunk(3))


def plain_multihead(m: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, **kw: Any) -> Any:
    """The forward of `torch.nn.MultiheadAttention`; gradients through autograd."""
    batched = query.dim() == 3
    x = [t if batched else t.unsqueeze(0) for t in (query, key, value)]
    x = [t.transpose(0, 1) if batched and not m.batch_first else t for t in x]
    weights, biases = _weights_of(m)
    q, k, v = (F.linear(t, w, b) for t, w, b in zip(x, weights, biases or [None] * 3, strict=True))
    size = (q.shape[0], q.shape[1], k.shape[1])
    if m.bias_k is not None and m.bias_v is not None:
        k = torch.cat([k, m.bias_k.expand(size[0], -1, -1)], 1)
        v = torch.cat([v, m.bias_v.expand(size[0], -1, -1)], 1)
    if m.add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    mask = _added_masks(m, (*size, k.shape[1] - size[2]), q.dtype, **kw)
    q, k, v = (t.unflatten(-1, (m.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + mask
    dead = (mask == -torch.inf).all(-1, keepdim=True)
    p = torch.where(dead, 0.0, torch.softmax(torch.where(dead, 0.0, scores), -1))
    out = F.linear((p @ v).transpose(1, 2).flatten(-2), m.out_proj.weight, m.out_proj.bias)
    out = out.transpose(0, 1) if batched and not m.batch_first else out
    p = p.mean(1) if kw["average_attn_weights"] else p
    found = p if kw["need_weights"] else None
    return (out, found) if batched else (out[0], None if found is None else found[0])


def _wide(t: Tensor) -> np.ndarray:
    return t.detach().double().numpy().astype(np.longdouble)


def _split(x: np.ndarray, heads: int) -> np.ndarray:
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)  # [N, S, E] -> [N, H, S, d]


def _join(x: np.ndarray) -> np.ndarray:
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)


def _extended(m: nn.MultiheadAttention, k: np.ndarray, v: np.ndarray) -> list[np.ndarray]:
    """The keys and values that `add_bias_kv` and `add_zero_attn` append."""
    extended = []
    for t, row in ((k, m.bias_k), (v, m.bias_v)):
        if row is not None:
            t = np.concatenate([t, np.repeat(_wide(row), t.shape[0], 0)], 1)
        extended.append(np.pad(t, ((0, 0), (0, int(m.add_zero_attn)), (0, 0))))
    return extended


def exact_multihead(
    m: nn.MultiheadAttention, inputs: list[Tensor], dout: Tensor, dweights: Tensor, **kw: Any
) -> dict[str, np.ndarray]:
    """Output, weights and every gradient of sum(output * dout) + sum(weights * dweights), in long double.

    inputs: query, key and value, where one tensor may appear several times. The gradients of the inputs are numbered
    by distinct tensor; those of the parameters have the names of `named_parameters`.
    """
    heads, batched = m.num_heads, dout.dim() == 3

    def inward(x: np.ndarray) -> np.ndarray:  # to [N, L, E]
        return x[None] if not batched else x if m.batch_first else x.swapaxes(0, 1)

    def outward(x: np.ndarray) -> np.ndarray:
        return x[0] if not batched else x if m.batch_first else x.swapaxes(0, 1)

    x = [inward(_wide(t)) for t in inputs]
    w, b = _weights_of(m)
    ws, bs = [_wide(t) for t in w], [_wide(t) for t in b] if b else [0, 0, 0]
    q, k, v = (t @ wt.T + bt for t, wt, bt in zip(x, ws, bs, strict=True))
    n, keys = k.shape[:2]
    k, v = _extended(m, k, v)
    q, k, v = (_split(t, heads) for t in (q, k, v))
    scale = 1 / np.sqrt(np.longdouble(q.shape[-1]))
    mask = _wide(_added_masks(m, (n, q.shape[2], keys, k.shape[2] - keys), torch.float64, **kw))
    s = scale * q @ k.swapaxes(-2, -1) + mask
    top = s.max(-1, keepdims=True)
    e = np.exp(s - np.where(top == -np.inf, 0, top))
    total = e.sum(-1, keepdims=True)
    p = e / np.where(total == 0, 1, total)
    attended = _join(p @ v)
    wo = _wide(m.out_proj.weight)
    out = attended @ wo.T + (_wide(m.out_proj.bias) if m.out_proj.bias is not None else 0)
    found = {"output": outward(out)}
    if kw["need_weights"]:
        returned = p.mean(1) if kw["average_attn_weights"] else p
        found["weights"] = returned if batched else returned[0]

    dy = inward(_wide(dout))
    do = _split(dy @ wo, heads)
    dp = do @ v.swapaxes(-2, -1)
    if kw["need_weights"]:
        dw = _wide(dweights) if batched else _wide(dweights)[None]
        dp = dp + (dw[:, None] / heads if kw["average_attn_weights"] else dw)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True))
    grads = {"out_proj.weight": np.einsum("nle,nlf->ef", dy, attended), "out_proj.bias": dy.sum((0, 1))}
    grads |= _mask_gradients(ds[..., :keys], batched, **kw)
    dq, dk, dv = _join(scale * ds @ k), _join(scale * ds.swapaxes(-2, -1) @ q), _join(p.swapaxes(-2, -1) @ do)
    if m.bias_k is not None:
        grads["bias_k"], grads["bias_v"] = dk[:, keys].sum(0)[None, None], dv[:, keys].sum(0)[None, None]
    projected = (dq, dk[:, :keys], dv[:, :keys])
    dws = [np.einsum("nle,nlf->ef", d, t) for d, t in zip(projected, x, strict=True)]
    grads["in_proj_weight"] = np.concatenate(dws) if m.in_proj_weight is not None else None
    grads |= {f"{c}_proj_weight": d for c, d in zip("qkv", dws, strict=True)}
    grads["in_proj_bias"] = np.concatenate([d.sum((0, 1)) for d in projected])
    distinct = [t for i, t in enumerate(inputs) if all(t is not u for u in inputs[:i])]
    for i, t in enumerate(distinct):
        parts = [outward(d @ wt) for u, d, wt in zip(inputs, projected, ws, strict=True) if u is t]
        grads[f"input {i}"] = sum(parts[1:], parts[0])
    return found | {f"gradient of {name}": g for name, g in grads.items()}


def _mask_gradients(ds: np.ndarray, batched: bool, **kw: Any) -> dict[str, np.ndarray]:
    grads = {}
    padding, attn = kw["key_padding_mask"], kw["attn_mask"]
    if padding is not None:
        summed = ds.sum((1, 2))
        grads["key_padding_mask"] = summed if batched else summed[0]
    if attn is not None:
        grads["attn_mask"] = ds.sum((0, 1)) if attn.dim() == 2 else ds.reshape(-1, *ds.shape[2:])
    return grads
