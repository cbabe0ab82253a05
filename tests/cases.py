"""Named attention problems that every backend is checked on, and the check itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_attention.backends import reference
from fused_attention.dispatch import BACKENDS
from fused_attention.spec import DIFFERENTIABLE, AttentionSpec, Device, Inputs, Options, Outputs, make_spec

from .numerics import assert_close, exact_attention


@dataclass(frozen=True)
class Case:
    """Sizes [B, H, HK, M, N, D, DV] and options; the tensors are made from a seed."""

    name: str
    sizes: tuple[int, int, int, int, int, int, int] = (2, 4, 4, 33, 49, 16, 16)
    causal: str | None = None
    window: tuple[int | None, int | None] = (None, None)
    softcap: float | None = None
    scale: float | None = None
    dropout_p: float = 0.0
    weights: str | None = None
    mask: str | None = None  # "bool", "float", "half", with a shape letter each: "bool:bhmn", "float:1hm1"
    bias: str | None = None
    alibi: str | None = None  # "h" or "bh"
    sinks: bool = False
    key_lengths: bool = False
    dead: bool = False  # some rows see nothing
    shift: float = 0.0  # added to query and subtracted from key: strongly negative logits
    layout: str = "contiguous"  # "bmhd", "qkv", "expanded", "reversed"
    nan_hidden: bool = False  # hidden keys hold NaN
    packed: tuple[tuple[int, ...], tuple[int, ...]] | None = None  # sequence lengths of queries and keys
    batch_invariant: bool = False

    def __str__(self) -> str:
        return self.name


def _term(kind: str, case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A mask or bias such as "float:1h1n": a letter keeps the dimension, 1 broadcasts it."""
    form, letters = kind.split(":")
    b, h, _, m, n, _, _ = case.sizes
    shape = tuple(1 if c == "1" else {"b": b, "h": h, "m": m, "n": n}[c] for c in letters)
    if form == "bool":
        mask = torch.rand(shape, generator=generator) > 0.3
        if case.dead and mask.shape[-2] > 1:
            mask[..., 0, :] = False
        return mask
    values = torch.randn(shape, generator=generator)
    if form == "hiding":
        values = values.masked_fill(torch.rand(shape, generator=generator) > 0.7, float("-inf"))
        if case.dead and values.shape[-2] > 1:
            values[..., 1, :] = float("-inf")
    return values.to(torch.float32 if form == "float" and dtype != torch.float64 else dtype)


def _qkv(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    b, h, hk, m, n, d, dv = case.sizes
    if case.packed:
        b, m, n = 1, sum(case.packed[0]), sum(case.packed[1])

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if case.layout == "qkv":  # slices of one projection [M, B, 3, H, D]
        q, k, v = rand(m, b, 3, h, d).to(dtype).permute(1, 3, 0, 2, 4).unbind(3)
        return q, k, v
    if case.layout == "bmhd":
        q, k, v = (rand(b, s, x, e).transpose(1, 2) for s, x, e in ((m, h, d), (n, hk, d), (n, hk, dv)))
    elif case.layout == "reversed":  # the last dimension is not contiguous
        q, k, v = (rand(b, x, e, s).transpose(2, 3) for s, x, e in ((m, h, d), (n, hk, d), (n, hk, dv)))
    elif case.layout == "expanded":
        q, k, v = rand(b, h, m, d), rand(1, hk, n, d), rand(b, 1, n, dv)
        return q.to(dtype), k.to(dtype).expand(b, hk, n, d), v.to(dtype).expand(b, hk, n, dv)
    else:
        q, k, v = rand(b, h, m, d), rand(b, hk, n, d), rand(b, hk, n, dv)
    return (q + case.shift).to(dtype), (k - case.shift).to(dtype), v.to(dtype)


def make(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[Inputs, Options]:
    """The tensors and options of a case."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = _qkv(case, dtype, g)
    b, h, _, m, n, _, _ = case.sizes
    mask = _term(case.mask, case, dtype, g) if case.mask else None
    bias = _term(case.bias, case, dtype, g) if case.bias else None
    slopes = torch.rand(b if case.alibi == "bh" else 1, h, generator=g) if case.alibi else None
    sinks = torch.randn(h, generator=g).to(dtype) if case.sinks else None
    lengths = None
    if case.key_lengths:
        lengths = torch.randint(0 if case.dead else 1, n + 1, (b,), generator=g)
        lengths[0] = 0 if case.dead else n // 2 + 1
    if case.nan_hidden:
        assert lengths is not None
        k, v = k.clone(), v.clone()
        for i, length in enumerate(lengths.tolist()):
            k[i, :, length:] = float("nan")
            v[i, :, length:] = float("inf")
    offsets: list[Tensor | None] = [None, None]
    if case.packed:
        offsets = [torch.tensor([0, *lens]).cumsum(0) for lens in case.packed]
    seed_tensor = torch.tensor([0x1234567890ABCDE]) if case.dropout_p else None
    x = Inputs(q, k, v, mask, bias, slopes, sinks, lengths, offsets[0], offsets[1], seed_tensor)
    o = Options(case.causal, *case.window, case.softcap, case.scale, case.dropout_p, case.batch_invariant, case.weights)
    return x, o


def _to(x: Inputs, dtype: torch.dtype) -> Inputs:
    return Inputs(*(t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in x))


def _leaves(x: Inputs, names: list[str]) -> Inputs:
    return x._replace(**{n: getattr(x, n).detach().requires_grad_() for n in names})


def _cotangents(out: Outputs, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
    """Random gradients that come in for output, lse and weights."""

    def rand(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator).to(t.dtype)

    return rand(out.output), rand(out.lse), None if out.weights is None else rand(out.weights)


def _plain_gradients(
    spec: AttentionSpec, x: Inputs, grads: tuple[Tensor, Tensor, Tensor | None], dtype: torch.dtype
) -> tuple[Outputs, dict[str, Tensor]]:
    """Plain eager PyTorch that computes in `dtype`, and its gradients by autograd."""
    names = sorted(spec.gradients)
    leaves = _leaves(x, names)
    out = reference.forward(spec, leaves, compute_dtype=dtype)
    if not names:
        return out, {}
    pairs = [(o, g.to(o.dtype)) for o, g in zip(out, grads, strict=True) if o is not None and g is not None]
    alive = torch.isfinite(out.lse)
    pairs[1] = (torch.where(alive, out.lse, 0.0), pairs[1][1] * alive)
    found = torch.autograd.grad(
        [o for o, _ in pairs], [getattr(leaves, n) for n in names], [g for _, g in pairs], allow_unused=True
    )
    zipped = zip(names, found, strict=True)
    return out, {n: torch.zeros_like(getattr(x, n)) if g is None else g for n, g in zipped}


def _exact_packed(spec: AttentionSpec, x: Inputs, grads: tuple[Tensor, Tensor, Tensor | None]) -> dict[str, np.ndarray]:
    """One sequence at a time, joined along the rows."""
    assert x.cu_seqlens_q is not None
    starts, parts = x.cu_seqlens_q.tolist(), []
    for b, one in enumerate(reference.sequences(x)):
        rows = slice(starts[b], starts[b + 1])
        parts.append(exact_attention(spec, one, grads[0][:, :, rows], grads[1][:, :, rows], first_batch=b))
    found = {n: np.concatenate([p[n] for p in parts], 2) for n in ("output", "lse", "query", "key", "value")}
    if x.sinks is not None:
        found["sinks"] = np.sum([p["sinks"] for p in parts], 0)
    if x.alibi_slopes is not None:
        slopes = [p["alibi_slopes"] for p in parts]
        found["alibi_slopes"] = np.sum(slopes, 0) if x.alibi_slopes.shape[0] == 1 else np.concatenate(slopes)
    return found | {"weights": np.zeros(0)}


def _exact(
    spec: AttentionSpec, x: Inputs, grads: tuple[Tensor, Tensor, Tensor | None]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values in a precision above the tested one: float64, or long double for float64."""
    if x.query.dtype == torch.float64:
        found = _exact_packed(spec, x, grads) if spec.packed else exact_attention(spec, x, *grads)
        if spec.weights == "mean":
            found["weights"] = found["weights"].mean(1)
        return found, found
    wide = replace(spec, dtype=torch.float64)
    grads64 = tuple(None if g is None else g.double() for g in grads)
    out, derived = _plain_gradients(wide, _to(x, torch.float64), grads64, torch.float64)  # type: ignore[arg-type]
    return {"output": out.output, "lse": out.lse, "weights": out.weights}, derived


def differentiable_inputs(spec: AttentionSpec, x: Inputs, backend: str, device: Device) -> frozenset[str]:
    """Every input that is there, floating and that the backend can differentiate."""
    names = {n for n in DIFFERENTIABLE if getattr(x, n) is not None and getattr(x, n).is_floating_point()}
    for name in sorted(names):
        if BACKENDS[backend].supports(replace(spec, gradients=frozenset({name})), device):
            names.discard(name)
    return frozenset(names)


def _moved(x: Any, device: str) -> Any:
    return type(x)(*(None if t is None else t.to(device) for t in x))


def _run(
    backend: str, spec: AttentionSpec, x: Inputs, device: str, generator: torch.Generator
) -> tuple[Outputs, tuple[Tensor, Tensor, Tensor | None], dict[str, Tensor]]:
    """What a backend gives on a device, what came in for the backward pass, and the gradients; all back on the CPU."""
    kernel = BACKENDS[backend]
    placed = _moved(x, device)
    untouched = [None if t is None else t.clone() for t in x]
    assert kernel.supports(spec, Device.of(placed.query)) is None, kernel.supports(spec, Device.of(placed.query))
    with torch.no_grad():
        there = kernel.forward(spec, placed)
    out = _moved(there, "cpu")
    grads = _cotangents(out, generator)
    dlse = torch.where(torch.isfinite(out.lse), grads[1], 0.0)
    incoming = tuple(None if g is None else g.to(device) for g in (grads[0], dlse, grads[2]))
    found = kernel.backward(spec, placed, there._replace(weights=None), incoming)  # type: ignore[arg-type]
    for name, before, after in zip(Inputs._fields, untouched, _moved(placed, "cpu"), strict=True):
        if before is not None:
            assert torch.equal(before.nan_to_num(), after.nan_to_num()), f"{name} was modified"
    return out, grads, {n: g.cpu() for n, g in found.items()}


def _results(
    case: Case, backend: str, dtype: torch.dtype, seed: int, device: str
) -> dict[str, tuple[Tensor, Any, Any]]:
    """Per result of one draw: what the backend gives, what plain eager code gives, and the exact value."""
    x, o = make(case, dtype, seed)
    spec = make_spec(x, o)
    spec = replace(spec, gradients=differentiable_inputs(spec, x, backend, Device.of(x.query.to(device))))
    out, grads, found = _run(backend, spec, x, device, torch.Generator().manual_seed(seed + 1000))
    assert set(found) == set(spec.gradients)
    same, same_grads = _plain_gradients(spec, x, grads, dtype)
    lse_same = reference.forward(spec, x).lse if dtype in (torch.float16, torch.bfloat16) else same.lse
    exact, exact_grads = _exact(spec, x, grads)
    results: dict[str, tuple[Tensor, Any, Any]] = {
        "output": (out.output, same.output, exact["output"]),
        "lse": (out.lse, lse_same, exact["lse"]),
    }
    if out.weights is not None:
        results["weights"] = (out.weights, same.weights, exact["weights"])
    return results | {f"d{n}": (grad, same_grads[n], exact_grads[n]) for n, grad in found.items()}


def _joined(parts: tuple[Any, ...]) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat([p.detach().flatten() for p in parts])
    return np.concatenate([np.asarray(p).ravel() for p in parts])


def draws(case: Case, values: int) -> int:
    """How many seeds a case is checked over at once.

    The rule compares two maxima. Over the few numbers of a tiny result (dsinks has one per head) that is a comparison
    of two coin tosses, so such problems are drawn several times, until the output has about so many values, and the
    maxima are taken over all draws.
    """
    b, h, _, m, _, _, dv = case.sizes
    wanted = values // max(b * h * m * dv, 1)
    return max(1, min(16, max(wanted, values // 256 // h) if case.sinks or case.alibi else wanted))


def check(
    case: Case, backend: str, dtype: torch.dtype, values: int = 16384, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """Run one case forward and backward on one backend and apply the rule to every result."""
    runs = [_results(case, backend, dtype, seed, device) for seed in range(draws(case, values))]
    figures = {}
    for name in runs[0]:
        got, same, exact = (_joined(parts) for parts in zip(*(run[name] for run in runs), strict=True))
        grad = name.startswith("d")
        figures[name] = assert_close(got, same, exact, grad=grad, name=name)
    return figures


_ODD = [(1, 1), (1, 33), (33, 1), (3, 3), (113, 203), (239, 1), (1, 239), (65, 129), (128, 64)]

# fmt: off
CASES = [
    Case("plain"),
    *(Case(f"M{m}xN{n}", (1, 2, 2, m, n, 32, 32)) for m, n in _ODD),
    *(Case(f"causal-M{m}xN{n}", (1, 2, 2, m, n, 32, 32), causal=c) for m, n in _ODD for c in ("top_left",)),
    *(Case(f"bottom-right-M{m}xN{n}", (1, 2, 1, m, n, 24, 8), causal="bottom_right") for m, n in _ODD),
    *(Case(f"D{d}-DV{e}", (1, 2, 2, 19, 37, d, e)) for d, e in
      ((1, 1), (1, 7), (5, 3), (17, 33), (64, 64), (80, 96), (128, 128), (192, 128), (256, 256), (512, 512), (511, 1))),
    Case("gqa-8:2", (2, 8, 2, 40, 40, 16, 16)),
    Case("mqa-6:1", (2, 6, 1, 17, 65, 32, 16), causal="bottom_right"),
    *(Case(f"window-{left}-{right}-{c}", (1, 2, 2, 70, 90, 16, 16), window=(left, right), causal=c)
      for left, right in ((0, 0), (5, None), (None, 7), (16, 3), (200, 200))
      for c in (None, "top_left", "bottom_right")),
    Case("window-long", (1, 1, 1, 300, 300, 16, 16), window=(20, 0), causal="top_left"),
    *(Case(f"mask-{m}", mask=m, dead=True) for m in
      ("bool:bhmn", "bool:11mn", "bool:b11n", "bool:1hmn", "bool:bhm1", "bool:111n", "float:bhmn", "float:11mn",
       "float:b11n", "half:1h1n", "half:bhmn", "hiding:bhmn", "hiding:11mn", "hiding:b11n")),
    *(Case(f"bias-{m}", bias=m, dead=True) for m in
      ("float:bhmn", "float:1hmn", "float:b1mn", "float:11mn", "float:111n", "float:bhm1", "float:1h11", "half:1hmn",
       "hiding:1hmn", "half:b11n")),
    Case("mask-and-bias", mask="bool:b11n", bias="half:1hmn", dead=True),
    Case("float-mask-and-bias", mask="float:b11n", bias="hiding:1hmn", causal="bottom_right"),
    Case("gqa-bias", (2, 4, 2, 33, 70, 16, 16), bias="float:1hmn"),
    Case("softcap", softcap=3.0),
    Case("softcap-causal-bias", softcap=0.7, causal="top_left", bias="half:11mn", scale=2.0),
    *(Case(f"alibi-{a}-{c}", alibi=a, causal=c) for a in ("h", "bh") for c in (None, "top_left", "bottom_right")),
    Case("sinks", sinks=True),
    Case("sinks-dead", sinks=True, mask="bool:bhmn", dead=True),
    Case("sinks-window-softcap", (2, 4, 2, 65, 65, 32, 32), sinks=True, window=(9, 0), causal="top_left", softcap=5.0),
    Case("lengths", key_lengths=True),
    Case("lengths-dead-causal", key_lengths=True, dead=True, causal="bottom_right"),
    Case("lengths-nan", key_lengths=True, nan_hidden=True),
    Case("lengths-nan-dead-causal", key_lengths=True, nan_hidden=True, dead=True, causal="bottom_right",
         weights="heads"),
    Case("scale-zero", scale=0.0),
    Case("scale-negative", scale=-0.3),
    Case("very-negative-logits", (1, 2, 2, 40, 60, 64, 64), shift=3.0),
    Case("dropout", dropout_p=0.3),
    Case("dropout-half-causal-gqa", (2, 4, 2, 67, 67, 16, 16), dropout_p=0.5, causal="top_left"),
    Case("dropout-weights-heads", dropout_p=0.25, weights="heads", key_lengths=True),
    Case("dropout-weights-mean", dropout_p=0.25, weights="mean"),
    Case("weights-heads", weights="heads", mask="bool:b11n", dead=True),
    Case("weights-mean", (2, 6, 3, 70, 40, 16, 16), weights="mean", bias="half:1hmn"),
    Case("weights-mean-causal-sinks", weights="mean", causal="bottom_right", sinks=True, softcap=2.0),
    *(Case(f"layout-{layout}", (2, 3, 3, 41, 41, 24, 24), layout=layout, causal="top_left")
      for layout in ("bmhd", "qkv", "expanded", "reversed")),
    Case("batch-invariant", batch_invariant=True, causal="top_left"),
    *(Case(f"packed-{c}", (4, 4, 2, 17, 40, 16, 24), packed=((5, 0, 17, 9), (5, 3, 0, 40)), causal=c)
      for c in (None, "top_left", "bottom_right")),
    Case("packed-everything", (3, 4, 2, 65, 70, 16, 16), packed=((65, 1, 0), (70, 2, 5)), causal="bottom_right",
         window=(11, 0), softcap=3.0, alibi="bh", sinks=True, dropout_p=0.2),
    *(Case(f"empty-{name}", sizes) for name, sizes in
      (("batch", (0, 2, 2, 5, 7, 8, 8)), ("rows", (2, 2, 2, 0, 7, 8, 8)), ("keys", (2, 2, 2, 5, 0, 8, 8)))),
    Case("everything", (2, 4, 2, 61, 77, 40, 24), causal="bottom_right", window=(30, 5), softcap=4.0, mask="bool:b1mn",
         bias="half:1hmn", alibi="bh", sinks=True, key_lengths=True, dropout_p=0.1, weights="mean", dead=True),
]

LARGE = [
    Case("M1023xN1024", (1, 1, 1, 1023, 1024, 64, 64), causal="bottom_right"),
    Case("M799xN3", (1, 2, 2, 799, 3, 32, 32)),
    Case("M3xN799", (1, 2, 2, 3, 799, 64, 64), mask="bool:11mn"),
    Case("M257xN513-window", (1, 2, 1, 257, 513, 128, 64), window=(64, 0), causal="bottom_right"),
    Case("M400xN400-bias", (1, 2, 2, 400, 400, 32, 32), bias="float:11mn"),
]
# fmt: on
