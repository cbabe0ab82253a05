"""Named attention problems, drawn from a seed, and what a backend and plain eager PyTorch give for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..backends import reference
from ..dispatch import BACKENDS
from ..spec import DIFFERENTIABLE, AttentionSpec, Causal, Device, Inputs, Options, Outputs, WeightsMode, make_spec

Incoming = tuple[Tensor, Tensor, Tensor | None]  # gradients that come in for output, lse and weights


@dataclass(frozen=True)
class Case:
    """Sizes [B, H, HK, M, N, D, DV] and options; the tensors are made from a seed."""

    name: str
    sizes: tuple[int, int, int, int, int, int, int] = (2, 4, 4, 33, 49, 16, 16)
    causal: Causal | None = None
    window: tuple[int | None, int | None] = (None, None)
    softcap: float | None = None
    scale: float | None = None
    dropout_p: float = 0.0
    weights: WeightsMode | None = None
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
    block_map: str | None = None  # the share of blocks that are visible and their sizes: "bh:0.4:32x64", "11:0.4:16x16"

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


def _block_map(case: Case, generator: torch.Generator) -> tuple[Tensor | None, tuple[int, int] | tuple[None, None]]:
    """The map and the sizes of its blocks. With `dead`, the first row of blocks is hidden."""
    if case.block_map is None:
        return None, (None, None)
    letters, share, size = case.block_map.split(":")
    rows, columns = (int(n) for n in size.split("x"))
    b, h, _, m, n, _, _ = case.sizes
    shape = (b if letters[0] == "b" else 1, h if letters[1] == "h" else 1, -(-m // rows), -(-n // columns))
    shown = torch.rand(shape, generator=generator) < float(share)
    shown[:, :, :1] &= not case.dead
    return shown, (rows, columns)


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
    block_map, block_size = _block_map(case, g)
    if case.nan_hidden and block_map is not None:
        block_map[..., -1:] = False
        k, v = k.clone(), v.clone()
        end = (block_map.shape[3] - 1) * (block_size[1] or 0)
        k[:, :, end:], v[:, :, end:] = float("nan"), float("inf")
    elif case.nan_hidden:
        assert lengths is not None
        k, v = k.clone(), v.clone()
        for i, length in enumerate(lengths.tolist()):
            k[i, :, length:] = float("nan")
            v[i, :, length:] = float("inf")
    offsets: list[Tensor | None] = [None, None]
    if case.packed:
        offsets = [torch.tensor([0, *lens]).cumsum(0) for lens in case.packed]
    seed_tensor = torch.tensor([0x1234567890ABCDE]) if case.dropout_p else None
    x = Inputs(q, k, v, mask, bias, slopes, sinks, lengths, offsets[0], offsets[1], seed_tensor, block_map)
    o = Options(case.causal, *case.window, case.softcap, case.scale, case.dropout_p, case.batch_invariant, case.weights)
    return x, o._replace(block_rows=block_size[0], block_columns=block_size[1])


def cast(x: Inputs, dtype: torch.dtype) -> Inputs:
    return Inputs._make(t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in x)


def _leaves(x: Inputs, names: list[str]) -> Inputs:
    return x._replace(**{n: getattr(x, n).detach().requires_grad_() for n in names})


def _cotangents(out: Outputs, generator: torch.Generator) -> Incoming:
    """Random gradients that come in for output, lse and weights."""

    def rand(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator).to(t.dtype)

    return rand(out.output), rand(out.lse), None if out.weights is None else rand(out.weights)


def plain_gradients(
    spec: AttentionSpec, x: Inputs, grads: Incoming, dtype: torch.dtype
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


def differentiable_inputs(spec: AttentionSpec, x: Inputs, backend: str, device: Device) -> frozenset[str]:
    """Every input that is there, floating and that the backend can differentiate."""
    names = {n for n in DIFFERENTIABLE if getattr(x, n) is not None and getattr(x, n).is_floating_point()}
    for name in sorted(names):
        if BACKENDS[backend].supports(replace(spec, gradients=frozenset({name})), device):
            names.discard(name)
    return frozenset(names)


def moved(x: Any, device: str) -> Any:
    return type(x)(*(None if t is None else t.to(device) for t in x))


def run_backend(
    backend: str, spec: AttentionSpec, x: Inputs, device: str, generator: torch.Generator
) -> tuple[Outputs, Incoming, dict[str, Tensor]]:
    """What a backend gives on a device, what came in for the backward pass, and the gradients; all back on the CPU."""
    kernel = BACKENDS[backend]
    placed = moved(x, device)
    untouched = [None if t is None else t.clone() for t in x]
    assert kernel.supports(spec, Device.of(placed.query)) is None, kernel.supports(spec, Device.of(placed.query))
    with torch.no_grad():
        there = kernel.forward(spec, placed)
    out = moved(there, "cpu")
    grads = _cotangents(out, generator)
    dlse = torch.where(torch.isfinite(out.lse), grads[1], 0.0)
    incoming = tuple(None if g is None else g.to(device) for g in (grads[0], dlse, grads[2]))
    found = kernel.backward(spec, placed, there._replace(weights=None), incoming)  # type: ignore[arg-type]
    for name, before, after in zip(Inputs._fields, untouched, moved(placed, "cpu"), strict=True):
        if before is not None:
            assert torch.equal(before.nan_to_num(), after.nan_to_num()), f"{name} was modified"
    return out, grads, {n: g.cpu() for n, g in found.items()}


Exact = Callable[[AttentionSpec, Inputs, Incoming], tuple[dict[str, Any], dict[str, Any]]]


def exact64(spec: AttentionSpec, x: Inputs, grads: Incoming) -> tuple[dict[str, Any], dict[str, Any]]:
    """Output, lse and weights in float64, and the gradients."""
    wide = replace(spec, dtype=torch.float64)
    grads64 = (grads[0].double(), grads[1].double(), None if grads[2] is None else grads[2].double())
    out, derived = plain_gradients(wide, cast(x, torch.float64), grads64, torch.float64)
    return {"output": out.output, "lse": out.lse, "weights": out.weights}, derived


def results(
    case: Case, backend: str, dtype: torch.dtype, seed: int, device: str, exact_values: Exact = exact64
) -> dict[str, tuple[Tensor, Any, Any]]:
    """Per result of one draw: what the backend gives, what plain eager code gives, and the exact value."""
    x, o = make(case, dtype, seed)
    spec = make_spec(x, o)
    spec = replace(spec, gradients=differentiable_inputs(spec, x, backend, Device.of(x.query.to(device))))
    out, grads, found = run_backend(backend, spec, x, device, torch.Generator().manual_seed(seed + 1000))
    assert set(found) == set(spec.gradients)
    same, same_grads = plain_gradients(spec, x, grads, dtype)
    lse_same = reference.forward(spec, x).lse if dtype in (torch.float16, torch.bfloat16) else same.lse
    exact, exact_grads = exact_values(spec, x, grads)
    found_here: dict[str, tuple[Tensor, Any, Any]] = {
        "output": (out.output, same.output, exact["output"]),
        "lse": (out.lse, lse_same, exact["lse"]),
    }
    if out.weights is not None:
        found_here["weights"] = (out.weights, same.weights, exact["weights"])
    return found_here | {f"d{n}": (grad, same_grads[n], exact_grads[n]) for n, grad in found.items()}


def draws(case: Case, values: int) -> int:
    """How many seeds a case is checked over at once.

    The rule compares two maxima. Over the few numbers of a tiny result (dsinks has one per head) that is a comparison
    of two coin tosses, so such problems are drawn several times, until the output has about so many values, and the
    maxima are taken over all draws.
    """
    b, h, _, m, _, _, dv = case.sizes
    wanted = values // max(b * h * m * dv, 1)
    return max(1, min(16, max(wanted, values // 256 // h) if case.sinks or case.alibi else wanted))


def joined(parts: list[Tensor]) -> Tensor:
    """The values of all draws, one after another."""
    return torch.cat([p.detach().flatten() for p in parts])
