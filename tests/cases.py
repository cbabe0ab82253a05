"""Named attention problems that every backend is checked on, and the check itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_attention.backends import reference
from fused_attention.parity.problems import (
    Case,
    Incoming,
    draws,
    exact64,
    joined,
    make,
    results,
)
from fused_attention.spec import AttentionSpec, Inputs

from .numerics import assert_close, exact_attention

__all__ = ["CASES", "LARGE", "Case", "check", "make"]


def _exact_packed(spec: AttentionSpec, x: Inputs, grads: Incoming) -> dict[str, np.ndarray]:
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


def _exact(spec: AttentionSpec, x: Inputs, grads: Incoming) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values in a precision above the tested one: float64, or long double for float64."""
    if x.query.dtype == torch.float64:
        found = _exact_packed(spec, x, grads) if spec.packed else exact_attention(spec, x, *grads)
        if spec.weights == "mean":
            found["weights"] = found["weights"].mean(1)
        return found, found
    return exact64(spec, x, grads)


def _joined(parts: tuple[Any, ...]) -> Any:
    if isinstance(parts[0], Tensor):
        return joined(list(parts))
    return np.concatenate([np.asarray(p).ravel() for p in parts])


def check(
    case: Case, backend: str, dtype: torch.dtype, values: int = 16384, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """Run one case forward and backward on one backend and apply the rule to every result."""
    runs = [results(case, backend, dtype, seed, device, _exact) for seed in range(draws(case, values))]
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
    *(Case(f"blocks-{m}", (2, 4, 2, 110, 90, 16, 16), block_map=m) for m in
      ("b1:0.5:16x32", "1h:0.5:48x48", "11:0.5:64x64", "11:0.3:16x16", "bh:0.6:128x256", "bh:0.0:16x16")),
    Case("blocks-dead", (2, 4, 2, 110, 90, 16, 16), block_map="bh:0.5:32x16", dead=True),
    Case("blocks-few-rows", (2, 4, 2, 3, 200, 16, 16), block_map="bh:0.4:16x32"),
    Case("blocks-nan", (2, 4, 2, 70, 100, 16, 16), block_map="bh:0.5:32x32", nan_hidden=True, weights="heads"),
    Case("blocks-nan-causal", (2, 2, 2, 100, 100, 16, 16), block_map="11:0.5:32x16", nan_hidden=True,
         causal="top_left"),
    Case("blocks-window", (1, 4, 4, 100, 140, 16, 16), block_map="1h:0.6:32x64", window=(40, 9), causal="bottom_right"),
    Case("blocks-bias", (2, 4, 4, 60, 100, 16, 16), block_map="bh:0.5:16x48", bias="float:11mn", weights="mean"),
    Case("blocks-everything", (2, 4, 2, 61, 77, 40, 24), block_map="bh:0.7:16x32", causal="bottom_right",
         window=(50, 5), softcap=4.0, mask="bool:b1mn", bias="half:1hmn", alibi="bh", sinks=True, key_lengths=True,
         dropout_p=0.1, weights="mean", batch_invariant=True),
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
