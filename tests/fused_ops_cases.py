"""Named problems of `fused_softmax` and `rope_qk_norm`, and the check of the kernels on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fused_attention.backends import reference_ops
from fused_attention.backends.reference_ops import Softmax, Tables
from fused_attention.ops import fused_softmax, rope_qk_norm

from .numerics import assert_close
from .triton_support import DEVICE

Named = dict[str, Tensor]
Run = Callable[[Named], tuple[Tensor, ...]]


# --- the rule -----------------------------------------------------------------------------------------------------


def differentiated(run: Run, tensors: Named, wanted: list[str], cotangents: list[Tensor]) -> Named:
    """Outputs and gradients by name, on the CPU."""
    leaves = {n: t.detach().requires_grad_() if n in wanted else t for n, t in tensors.items()}
    outs = run(leaves)
    grads = torch.autograd.grad(
        outs, [leaves[n] for n in wanted], [g.to(o) for g, o in zip(cotangents, outs, strict=True)]
    )
    found = {f"output{i}": o.detach() for i, o in enumerate(outs)} | {
        f"d{n}": g for n, g in zip(wanted, grads, strict=True)
    }
    return {n: t.cpu() for n, t in found.items()}


def judge(
    draw: Callable[[int], Named],
    kernel: Run,
    plain: Callable[[Named, torch.dtype], tuple[Tensor, ...]],
    dtype: torch.dtype,
    wanted: list[str],
    hidden: Callable[[Named], Tensor] | None = None,
) -> None:
    """Apply the rule to every output and gradient, over so many draws that a maximum means something.

    hidden: entries of the output whose incoming gradient is NaN.
    """
    size = draw(0)[wanted[0]].numel()
    runs: list[tuple[Named, Named, Named]] = []
    for seed in range(max(1, min(4, 256 // size))):
        tensors = draw(seed)
        shapes = [o.shape for o in plain(tensors, dtype)]
        g = torch.Generator().manual_seed(seed + 100)
        cotangents = [torch.randn(shape, generator=g).to(dtype) for shape in shapes]
        if hidden is not None:
            cotangents[0][hidden(tensors).expand(shapes[0])] = float("nan")
        wide = {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
        there = {n: t.to(DEVICE) for n, t in tensors.items()}
        before = {n: t.clone() for n, t in there.items()}
        got = differentiated(kernel, there, wanted, cotangents)
        for name, t in there.items():
            assert torch.equal(t.nan_to_num(), before[name].nan_to_num()), f"{name} was modified"
        same = differentiated(lambda t: plain(t, dtype), tensors, wanted, cotangents)
        exact = differentiated(lambda t: plain(t, torch.float64), wide, wanted, cotangents)
        runs.append((got, same, exact))
    for name in runs[0][0]:
        got_all = torch.cat([run[0][name].flatten() for run in runs])
        same_all, exact_all = (np.concatenate([run[i][name].double().numpy().ravel() for run in runs]) for i in (1, 2))
        assert_close(got_all, same_all, exact_all, grad=name.startswith("d"), name=name)


# --- softmax ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """One problem of `fused_softmax`."""

    shape: tuple[int, ...]
    mask: str | None = None  # "bool", "float", "hiding" (float with -inf), then the shape: "bool:1,1,5,7"
    options: Softmax = Softmax()
    layout: str = "contiguous"  # "transposed" (M before H), "column" (last dim not contiguous), "expanded"
    nan: bool = False  # what is hidden holds NaN
    shift: float = 0.0

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.shape)), self.mask, self.layout if self.layout != "contiguous" else None]
        parts += [f"{n}={v}" for n, v in self.options._asdict().items() if v not in (None, 1.0)]
        return "-".join(p for p in parts if p)


def _hidden(t: Named, o: Softmax) -> Tensor:
    x = t["scores"]
    visible = torch.ones(x.shape[-2:], dtype=torch.bool)
    if o.causal is not None:
        visible = visible.tril(reference_ops.diagonal(o, *x.shape[-2:]))
    if "mask" in t:
        visible = visible & (t["mask"] if t["mask"].dtype == torch.bool else t["mask"] != float("-inf"))
    return ~visible.expand(x.shape)


def draw_rows(case: Rows, dtype: torch.dtype, seed: int) -> Named:
    g = torch.Generator().manual_seed(seed)
    x = 3.0 * torch.randn(case.shape, generator=g) + case.shift
    tensors: Named = {}
    if case.mask is not None:
        kind, _, sizes = case.mask.partition(":")
        shape = tuple(int(n) for n in sizes.split(",")) if sizes else case.shape
        mask = torch.randn(shape, generator=g)
        keep = torch.rand(shape, generator=g) > 0.4
        if keep.dim() > 1 and keep.shape[-2] > 1:
            keep[..., 0, :] = False  # a row that shows nothing
        tensors["mask"] = (
            keep if kind == "bool" else mask.masked_fill(~keep, float("-inf")) if kind == "hiding" else mask
        )
    if case.nan:
        x = x.masked_fill(_hidden({"scores": x} | tensors, case.options), float("nan"))
    x = x.to(dtype)
    if case.layout == "transposed":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif case.layout == "column":
        x = x.mT.contiguous().mT
    elif case.layout == "expanded":
        x = x[:1].expand(case.shape)
    return {"scores": x} | tensors


def check_rows(case: Rows, dtype: torch.dtype) -> None:
    o = case.options
    wanted = ["scores"] + (["mask"] if case.mask is not None and not case.mask.startswith("bool") else [])
    judge(
        lambda seed: draw_rows(case, dtype, seed),
        lambda t: (fused_softmax(t["scores"], t.get("mask"), **o._asdict()),),
        lambda t, acc: (reference_ops.softmax(t["scores"], t.get("mask"), o, acc),),
        dtype,
        wanted,
        (lambda t: _hidden(t, o)) if case.nan else None,
    )


CAPPED = Softmax(0.7, 2.0, "bottom_right")
ROWS = [
    *(Rows(shape) for shape in ((1, 1), (1, 3), (33, 1), (3, 3), (113, 203), (239, 1), (2, 3, 5, 7), (1, 9000))),
    Rows((1, 9000), "hiding:1,9000", Softmax(0.5, 3.0)),
    Rows((2, 8195), "bool", Softmax(causal="bottom_right"), nan=True),
    Rows((2, 8200), "float:2,1", Softmax(causal="top_left")),
    Rows((65, 40), None, Softmax(causal="top_left")),
    Rows((40, 65), None, Softmax(-0.3, causal="bottom_right")),
    Rows((40, 33), None, Softmax(causal="bottom_right"), nan=True),
    Rows((2, 3, 7, 50), "bool", nan=True),
    Rows((2, 3, 7, 50), "bool:1,1,7,50", CAPPED, nan=True),
    Rows((2, 3, 7, 50), "hiding:1,3,1,50", CAPPED, nan=True),
    Rows((2, 3, 7, 50), "hiding:2,1,7,1"),
    Rows((2, 3, 7, 50), "float:7,50", Softmax(2.0)),
    Rows((2, 3, 7, 50), "float:50", Softmax(2.0, 0.5)),
    Rows((2, 3, 7, 50), "hiding", Softmax(0.125)),
    Rows((2, 3, 7, 50), "float:1,3,7,50", CAPPED, layout="transposed"),
    Rows((3, 4, 17, 20), "bool:17,20", layout="column"),
    Rows((3, 2, 9, 20), "float:9,20", layout="expanded"),
    Rows((2, 3, 2, 5, 21), "hiding:3,1,5,21", nan=True),
    Rows((5, 130), None, Softmax(), shift=-1000.0),
]


# --- RMS norm and rotary embedding ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """One problem of `rope_qk_norm`."""

    name: str
    sizes: tuple[int, int, int, int, int, int] = (2, 4, 2, 5, 5, 16)  # B, H, HK, M, N, D; H or HK 0: no such tensor
    rotated: int | None = None  # R; default D rounded down to an even number
    weights: str = "qk"
    positions: str | None = None  # "batch", "shared"
    interleaved: bool = False
    layout: str = "contiguous"  # "bmhd", "reversed" (last dim not contiguous), "expanded"

    def __str__(self) -> str:
        return self.name


def draw_heads(case: Heads, dtype: torch.dtype, seed: int) -> Named:
    g = torch.Generator().manual_seed(seed)
    b, h, hk, m, n, d = case.sizes
    tensors: Named = {}
    for name, heads, length in (("query", h, m), ("key", hk, n)):
        if not heads:
            continue
        x = torch.randn(b, heads, length, d, generator=g).to(dtype)
        if case.layout == "bmhd":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        elif case.layout == "reversed":
            x = x.mT.contiguous().mT
        elif case.layout == "expanded":
            x = x[:, :1].expand(b, heads, length, d)
        tensors[name] = x
        if name[0] in case.weights:
            tensors[f"{name}_weight"] = 1.0 + 0.3 * torch.randn(d, generator=g).to(dtype)
    rotated = d // 2 * 2 if case.rotated is None else case.rotated
    if rotated:
        rows = max(m, n) + 3
        angle = 6.0 * torch.rand(rows, rotated // 2, generator=g)
        tensors["cos"], tensors["sin"] = angle.cos(), angle.sin()
        if case.positions is not None:
            rows_of = b if case.positions == "batch" else 1
            tensors["positions"] = torch.randint(0, rows, (rows_of, m), generator=g)
    return tensors


def run_heads(case: Heads) -> Run:
    def run(t: Named) -> tuple[Tensor, ...]:
        named = {n: t[n] for n in ("query_weight", "key_weight", "cos", "sin", "positions") if n in t}
        outs = rope_qk_norm(t.get("query"), t.get("key"), **named, interleaved=case.interleaved)
        for x, y in zip((t.get("query"), t.get("key")), outs, strict=True):
            assert (x is None) == (y is None)
            if x is not None and y is not None and case.layout == "bmhd":
                assert y.transpose(1, 2).is_contiguous()
        return tuple(y for y in outs if y is not None)

    return run


def _plain_heads(case: Heads, t: Named, acc: torch.dtype) -> tuple[Tensor, ...]:
    tables = Tables(t["cos"], t["sin"], t.get("positions"), case.interleaved) if "cos" in t else None
    return tuple(
        reference_ops.rope_norm(t[n], t.get(f"{n}_weight"), tables, 1e-6, acc) for n in ("query", "key") if n in t
    )


def check_heads(case: Heads, dtype: torch.dtype) -> None:
    wanted = [n for n in ("query", "key", "query_weight", "key_weight") if n in draw_heads(case, dtype, 0)]
    judge(
        lambda seed: draw_heads(case, dtype, seed),
        run_heads(case),
        lambda t, acc: _plain_heads(case, t, acc),
        dtype,
        wanted,
    )


# fmt: off
HEADS = [
    Heads("plain"),
    Heads("interleaved", interleaved=True),
    *(Heads(f"D{d}-R{r}{'-interleaved' * i}", (1, 2, 1, 7, 7, d), r, interleaved=i)
      for d, r, i in ((1, 0, False), (2, 2, True), (3, 2, False), (3, 0, False), (33, 32, True), (33, 18, False),
                      (80, 40, False), (80, 40, True), (128, 128, False), (96, 96, True))),
    Heads("norm-only", (2, 3, 1, 33, 17, 24), 0),
    Heads("rope-only", weights=""),
    Heads("rope-only-interleaved-partial", rotated=6, weights="", interleaved=True),
    Heads("query-weight", weights="q"),
    Heads("key-weight", weights="k"),
    Heads("query-alone", (2, 4, 0, 5, 5, 16), positions="batch"),
    Heads("key-alone", (2, 0, 3, 5, 1, 16)),
    Heads("other-lengths", (2, 4, 2, 3, 11, 16)),
    Heads("one-row", (1, 1, 1, 1, 1, 8)),
    Heads("positions", positions="batch"),
    Heads("positions-shared", positions="shared", interleaved=True),
    Heads("many-rows", (2, 3, 1, 113, 113, 8), positions="batch"),
    *(Heads(f"layout-{layout}", (2, 3, 2, 9, 9, 40), 32, layout=layout, positions="batch")
      for layout in ("bmhd", "reversed", "expanded")),
]
# fmt: on
