"""Models made of one `GroupedQueryAttention`, and the same layer written out in eager PyTorch."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fused_attention as fa
from fused_attention import philox

E, D = 24, 8
ROPE: dict[str, Any] = {"head_dim": D}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}


@dataclass(frozen=True)
class Model:
    """heads are H and HK; rope and options are arguments of the constructors."""

    name: str
    heads: tuple[int, int] = (4, 2)
    rope: dict[str, Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def build(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> fa.GroupedQueryAttention:
        """The module with weights drawn from the seed, those of norms and sinks too."""
        torch.manual_seed(seed)
        rope = None if self.rope is None else fa.RotaryEmbedding(**ROPE | self.rope)
        module = fa.GroupedQueryAttention(
            E, *self.heads, head_dim=D, rope=rope, **{"causal": "top_left"} | self.options
        )
        with torch.no_grad():
            for name, p in module.named_parameters():
                if "norm" in name:
                    p.add_(0.3 * torch.randn_like(p))
                elif name == "sinks":
                    p.normal_()
                else:
                    p.mul_(2.0)  # scores of the size that softcap and softmax notice
        return module.to(dtype)


# fmt: off
MODELS = [
    Model("plain"),
    Model("mha", (3, 3), {}, {"causal": "bottom_right"}),
    Model("mqa", (4, 1), {"base": 100.0}, {"qkv_bias": True, "o_bias": True}),
    Model("norm", (4, 2), None, {"qk_norm_eps": 1e-5}),
    Model("norm-rope", (4, 2), {"interleaved": True}, {"qk_norm_eps": 1e-6, "scale": 0.5}),
    Model("partial", (6, 2), {"partial_rotary_factor": 0.5}, {"softcap": 2.0}),
    Model("window", (4, 2), {}, {"window": (5, 0)}),
    Model("window-sinks", (4, 2), {}, {"window": (6, None), "sinks": True}),
    Model("softcap-sinks", (4, 4), None, {"softcap": 1.5, "sinks": True}),
    Model("alibi", (6, 3), None, {"alibi": True}),
    Model("linear", (2, 1), {"scaling": {"rope_type": "linear", "factor": 3.0}}),
    Model("yarn", (4, 2), {"scaling": YARN, "max_positions": 64}),
    Model("llama3", (4, 2), {"scaling": LLAMA, "max_positions": 16, "base": 50.0}),
    Model("everything", (4, 2), {"scaling": YARN, "interleaved": True, "partial_rotary_factor": 0.75},
          {"qk_norm_eps": 1e-6, "window": (7, 0), "softcap": 3.0, "sinks": True, "alibi": True, "qkv_bias": True,
           "o_bias": True}),
]
# fmt: on


def turned(module: fa.GroupedQueryAttention, x: Tensor, positions: Tensor) -> Tensor:
    """x [B, H, S, D] times exp(i angle), positions [B|1, S]; the tables' own values are tests/test_positions.py's."""
    rope = module.rope
    if rope is None:
        return x
    length = int(positions.max()) + 1
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = (t[positions][:, None].to(x.dtype) for t in rope.tables(length, dtype=dtype))
    part, rest = x[..., : rope.rotary_dim], x[..., rope.rotary_dim :]
    if rope.interleaved:
        a, b = part[..., 0::2], part[..., 1::2]
        part = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    else:
        swapped = torch.cat((-part[..., rope.rotary_dim // 2 :], part[..., : rope.rotary_dim // 2]), -1)
        part = part * torch.cat((cos, cos), -1) + swapped * torch.cat((sin, sin), -1)
    return torch.cat((part, rest), -1)


def _normed(x: Tensor, norm: torch.nn.RMSNorm | None) -> Tensor:
    if norm is None:
        return x
    assert norm.eps is not None
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def _scores(module: fa.GroupedQueryAttention, q: Tensor, k: Tensor, visible: Tensor, bias: Tensor | None) -> Tensor:
    rows, columns = q.shape[2], k.shape[2]
    scores = q @ k.mT * (module.head_dim**-0.5 if module.scale is None else module.scale)
    if module.softcap is not None:
        scores = module.softcap * torch.tanh(scores / module.softcap)
    shift = columns - rows if module.causal == "bottom_right" else 0
    distance = torch.arange(columns) - torch.arange(rows)[:, None] - shift
    if module.alibi:
        scores = scores - fa.alibi_slopes(module.num_heads).to(q.dtype)[:, None, None] * distance.abs()
    if bias is not None:
        scores = scores + bias.to(q.dtype)
    left, right = module.window or (None, None)
    if module.causal is not None:
        visible = visible & (distance <= 0)
    if left is not None:
        visible = visible & (distance >= -left)
    if right is not None:
        visible = visible & (distance <= right)
    return scores.masked_fill(~visible, float("-inf"))


def eager(
    module: fa.GroupedQueryAttention,
    x: Tensor,
    context: Tensor | None = None,
    *,
    positions: Tensor | None = None,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
    seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The layer by its formulas, in x's dtype, every key repeated for its heads: output and weights [B, H, S, N].

    visible: bool, broadcastable to the scores. seed: of torch, for the dropout mask.
    """
    heads, shared, dim = module.num_heads, module.num_kv_heads, module.head_dim
    source = x if context is None else context
    p: dict[str, Any] = dict.fromkeys(("q_proj.bias", "k_proj.bias", "v_proj.bias"))
    with torch.enable_grad():
        fused, sizes = module._fused()
        for kind in ("weight", "bias"):
            whole = getattr(getattr(module, fused), kind)
            if whole is not None:
                p |= {f"{n}.{kind}": t for n, t in zip(sizes, whole.split(list(sizes.values())), strict=True)}
    if context is not None:
        p |= {"q_proj.weight": module.q_proj.weight, "q_proj.bias": module.q_proj.bias}

    def heads_of(name: str, t: Tensor, n: int) -> Tensor:
        y = torch.nn.functional.linear(t, p[f"{name}.weight"], p[f"{name}.bias"])
        return y.view(*y.shape[:2], n, dim).transpose(1, 2)

    at = torch.arange(x.shape[1])[None] if positions is None else positions.view(-1, x.shape[1])
    q = turned(module, _normed(heads_of("q_proj", x, heads), module.q_norm), at)
    k = turned(module, _normed(heads_of("k_proj", source, shared), module.k_norm), at)
    v = heads_of("v_proj", source, shared)
    k, v = (t.repeat_interleave(heads // shared, 1) for t in (k, v))
    visible = torch.ones((), dtype=torch.bool) if visible is None else visible
    scores = _scores(module, q, k, visible, bias)
    if module.sinks is not None:
        sink = module.sinks[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink), -1)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)[..., : k.shape[2]]
    if seed is not None:
        torch.manual_seed(seed)
        key = philox.draw_seed(x.device)
        batch = torch.arange(x.shape[0])
        keep = philox.keep_mask(key, module.dropout, batch, heads, *weights.shape[2:])
        weights = weights * keep / (1.0 - module.dropout)
    output = (weights @ v).transpose(1, 2).flatten(-2)
    return torch.nn.functional.linear(output, module.o_proj.weight, module.o_proj.bias), weights


def widened(module: fa.GroupedQueryAttention) -> fa.GroupedQueryAttention:
    """The same module in float64."""
    return copy.deepcopy(module).double()
