"""The one tolerance rule of the project, applied, and exact values for float64.

The rule itself is in `fused_attention/parity/rule.py`, with which users check their own machine. Where `ref` is
infinite, `out` must be the same infinity; where `ref` is finite, a NaN in `out` fails.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_attention import philox
from fused_attention.backends import reference
from fused_attention.parity.rule import allowed, rounding
from fused_attention.spec import AttentionSpec, Inputs


class Mismatch(AssertionError):
    """The tolerance rule does not hold."""


def _wide(t: Any) -> np.ndarray:
    if isinstance(t, Tensor):
        t = t.detach().double().numpy()
    return np.asarray(t, dtype=np.longdouble)


def _largest(x: np.ndarray) -> float:
    return float(np.abs(x).max()) if x.size else 0.0


def tolerance(same: Any, ref: Any, dtype: torch.dtype, grad: bool = False) -> float:
    """The right side of the rule."""
    exact, plain = _wide(ref), _wide(same)
    finite = np.isfinite(exact)
    step = rounding(torch.from_numpy(exact[finite].astype(np.float64)), dtype)
    # A peer that answers NaN (torch in rows that see nothing) says nothing about rounding there.
    both = finite & np.isfinite(plain)
    return allowed(_largest(plain[both] - exact[both]), step, grad)


def assert_close(out: Tensor, same: Any, ref: Any, grad: bool = False, name: str = "") -> dict[str, float]:
    """Apply the rule; returns the figures {"error", "allowed", "relative_l2"}.

    Args:
        out: what is tested; its dtype is the tested dtype.
        same: plain eager PyTorch in that dtype (Tensor or array of out's shape).
        ref: the value in higher precision (Tensor or array of out's shape).
        grad: out is a gradient.
        name: what to call it in the message.

    Raises:
        Mismatch: the rule does not hold.
    """
    got, exact = _wide(out), _wide(ref)
    label = name or "value"
    if got.shape != exact.shape:
        raise Mismatch(f"{label}: shape {got.shape}, expected {exact.shape}")
    finite = np.isfinite(exact)
    if not np.array_equal(got[~finite], exact[~finite], equal_nan=True):
        raise Mismatch(f"{label}: infinities or NaNs differ from the reference's")
    if not np.isfinite(got[finite]).all():
        bad = int((~np.isfinite(got[finite])).sum())
        raise Mismatch(f"{label}: {bad} of {got.size} values are not finite where the reference is")
    error = _largest(got[finite] - exact[finite])
    bound = tolerance(same, ref, out.dtype, grad)
    norm = float(np.sqrt((exact[finite] ** 2).sum()))
    relative = float(np.sqrt(((got[finite] - exact[finite]) ** 2).sum())) / norm if norm else 0.0
    if not error <= bound:
        raise Mismatch(f"{label}: error {error:.3e} > allowed {bound:.3e} (relative L2 {relative:.3e}, {out.dtype})")
    return {"error": error, "allowed": bound, "relative_l2": relative}


# --- exact values for float64 -------------------------------------------------------------------------------------


def _repeat(x: np.ndarray, group: int) -> np.ndarray:
    return np.repeat(x, group, axis=1)


def _sum_to(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    axes = tuple(i for i, (n, want) in enumerate(zip(x.shape, shape, strict=True)) if want == 1 and n != 1)
    return x.sum(axis=axes, keepdims=True)


def exact_attention(
    spec: AttentionSpec,
    x: Inputs,
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
    dweights: Tensor | None = None,
    first_batch: int = 0,
) -> dict[str, np.ndarray]:
    """The formula of `backends/reference.py` and its gradients in numpy's long double, for dense inputs.

    first_batch is the batch index of the first element in the dropout counter.

    Returns "output", "lse", "weights" (per head, dropped), and where dout is given the gradients "query", "key",
    "value", "mask", "bias", "alibi_slopes", "sinks" for the inputs that are present.
    """
    f = _exact_forward(spec, x, first_batch)
    found = {"output": np.einsum("bhmn,bhnd->bhmd", f.weights, f.v), "weights": f.weights, "lse": f.lse}
    return found if dout is None else found | _exact_gradients(spec, x, f, dout, dlse, dweights)


def _exact_forward(spec: AttentionSpec, x: Inputs, first_batch: int) -> SimpleNamespace:
    """q, k and v with repeated heads, p, weights, lse, and what the gradients need beside them."""
    rows, columns, heads = x.query.shape[2], x.key.shape[2], x.query.shape[1]
    q, k, v = (_wide(t) for t in x[:3])
    k, v = (_repeat(np.where(np.isfinite(t), t, 0), spec.group) for t in (k, v))  # only hidden keys may not be
    full = (q.shape[0], heads, rows, columns)
    visible = reference.visible_keys(spec, x, rows, columns)
    hidden = np.zeros(full, bool) if visible is None else ~np.broadcast_to(visible.numpy(), full)
    s = spec.scale * np.einsum("bhmd,bhnd->bhmn", q, k)
    tanh = np.tanh(s / spec.softcap) if spec.softcap else None
    if tanh is not None:
        s = spec.softcap * tanh
    for term in reference.additive_terms(spec, x, rows, columns, torch.float64):
        s = s + _wide(term)
    s[hidden] = -np.inf
    top = s.max(-1, keepdims=True, initial=-np.inf)
    alive = top > -np.inf
    sink = None if x.sinks is None else _wide(x.sinks)[None, :, None, None]
    shift = np.where(alive, top if sink is None else np.maximum(top, sink), 0)
    exps = np.exp(s - shift)
    sink_exp = 0 if sink is None else np.where(alive, np.exp(np.where(alive, sink, 0) - shift), 0)
    total = np.where(alive, exps.sum(-1, keepdims=True) + sink_exp, 1)
    factor: Any = 1.0
    if spec.dropout_p:
        assert x.seed is not None
        batch = torch.arange(first_batch, first_batch + full[0])
        keep = philox.keep_mask(x.seed, spec.dropout_p, batch, heads, rows, columns)
        factor = keep.numpy() / (1 - np.longdouble(spec.dropout_p))
    p = exps / total
    lse = np.where(alive, shift + np.log(total), -np.inf)[..., 0]
    return SimpleNamespace(
        q=q, k=k, v=v, p=p, weights=p * factor, factor=factor, lse=lse, alive=alive, tanh=tanh, psink=sink_exp / total
    )


def _exact_gradients(
    spec: AttentionSpec,
    x: Inputs,
    f: SimpleNamespace,
    dout: Tensor,
    dlse: Tensor | None,
    dweights: Tensor | None,
) -> dict[str, np.ndarray]:
    rows, columns, heads = x.query.shape[2], x.key.shape[2], x.query.shape[1]
    do = _wide(dout)
    dp = np.einsum("bhmd,bhnd->bhmn", do, f.v)
    if dweights is not None:
        dw = _wide(dweights)
        dp = dp + (dw if spec.weights == "heads" else dw[:, None] / heads)
    dp = dp * f.factor
    delta = (f.p * dp).sum(-1, keepdims=True)
    if dlse is not None:
        delta = delta - np.where(f.alive, _wide(dlse)[..., None], 0)
    ds = f.p * (dp - delta)
    found = {}
    for name in ("mask", "bias"):
        t = getattr(x, name)
        if t is not None and t.dtype != torch.bool:
            found[name] = _sum_to(ds, tuple(t.shape))
    if x.alibi_slopes is not None:
        one = x._replace(alibi_slopes=torch.ones(1, heads), mask=None, bias=None)
        (distance,) = reference.additive_terms(spec, one, rows, columns, torch.float64)
        found["alibi_slopes"] = _sum_to((ds * _wide(distance)).sum((2, 3)), tuple(x.alibi_slopes.shape))
    if x.sinks is not None:
        found["sinks"] = (-f.psink * delta).sum((0, 2, 3))
    if f.tanh is not None:
        ds = ds * (1 - f.tanh**2)
    ds = ds * spec.scale
    grouped = (*x.key.shape[:2], spec.group, columns)
    found["query"] = np.einsum("bhmn,bhnd->bhmd", ds, f.k)
    found["key"] = np.einsum("bhmn,bhmd->bhnd", ds, f.q).reshape(*grouped, f.q.shape[3]).sum(2)
    found["value"] = np.einsum("bhmn,bhmd->bhnd", f.weights, do).reshape(*grouped, f.v.shape[3]).sum(2)
    return found
