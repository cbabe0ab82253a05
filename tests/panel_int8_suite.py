"""`precision="int8"` on packed panels against the same recipe in eager PyTorch, and how far the recipe is from float64.

test_panels.py runs this file in a process of its own, as panel_suite.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attention as fa
from fused_attention.backends import cpu, reference
from fused_attention.spec import Device, Inputs, Options, make_spec

from .cases import Case, make
from .panel_suite import LONG

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [..., D] of float32 as whole numbers of -127 .. 127, and their scales."""
    largest = x.abs().amax(-1, keepdim=True)
    return (x * torch.where(largest == 0, 0.0, x.new_tensor(127.0) / largest)).round(), largest / 127


def recipe(q: Tensor, k: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """q and k in float64 whose products are those of the codes: one more column holds q.mean(k).

    The codes are found in float32, step by step as the kernels do: what lies between two of them falls to the same.
    seen: [B] keys that key_lengths leaves.
    """
    q, k = q.float(), k.float()
    there = (torch.arange(k.shape[2]) < seen[:, None])[:, None, :, None]
    count = seen.clamp(min=1)[:, None, None, None]
    mean = (torch.where(there, k, 0.0).sum(2, keepdim=True, dtype=torch.float64) / count).float()
    (q8, a), (k8, b) = _codes(q), _codes(torch.where(there, k - mean, 0.0))
    common = (q.double() * mean.double().repeat_interleave(q.shape[1] // k.shape[1], 1)).sum(-1, keepdim=True)
    q8, a, k8, b = (t.double() for t in (q8, a, k8, b))
    return torch.cat([a * q8, common], -1), torch.cat([b * k8, torch.ones_like(b)], -1)


# fmt: off
CASES = [c for c in LONG if c.weights is None and not c.nan_hidden and not c.packed and "48x64" not in c.name
         and c.dropout_p == 0] + [
    Case("one-row", (2, 4, 2, 1, 200, 64, 64), causal="bottom_right"),
    Case("one-key", (1, 2, 1, 33, 1, 32, 40)),
    Case("odd", (1, 2, 2, 45, 77, 65, 17), causal="top_left"),
    Case("gqa-lengths", (3, 4, 1, 40, 150, 96, 32), key_lengths=True, softcap=9.0, sinks=True),
]
# fmt: on


def _error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_the_recipe(case: Case, dtype: str) -> None:
    """To the rounding of the weights (bf16: 8 bits) and of the output; the log-sum-exp is that of the scores."""
    x, o = make(case, TYPES[dtype])
    spec = make_spec(x, o._replace(precision="int8"))
    assert cpu.supports(spec, Device("cpu")) is None
    out, lse, _ = cpu.forward(spec, x)
    whole = torch.full((x.key.shape[0],), x.key.shape[2])
    q, k = recipe(x.query, x.key, whole if x.key_lengths is None else x.key_lengths)
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in x]
    exact = Inputs(*wide)._replace(query=q, key=k)  # type: ignore[arg-type]
    scale = x.query.shape[3] ** -0.5 if o.scale is None else o.scale
    wanted = reference.forward(make_spec(exact, o._replace(scale=scale)), exact)
    # float32 rounds a score of size s by s * 2^-24, and its weight by as much of itself.
    scores = float(lse.abs().nan_to_num(posinf=0.0).max())
    step = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": (16 + scores) * 2.0**-24}[dtype]
    assert _error(out, wanted.output) < step
    torch.testing.assert_close(lse.double(), wanted.lse, rtol=1e-5, atol=1e-5)


def _plain(m: int, n: int, d: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 4, s, d, generator=generator) for s in (m, n, n)]


def _int8(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    with fa.use_backend("cpu"):
        out = fa.attention(q, k, v, precision="int8", **options)
    assert isinstance(out, Tensor)
    return out


def _exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q.double() @ k.double().mT / q.shape[-1] ** 0.5, -1) @ v.double()


def test_how_far_it_is_from_float64() -> None:
    """Two per cent on normal inputs; what all keys have in common costs nothing, though it is thirty times as large."""
    q, k, v = _plain(130, 300, 64)
    plain, shifted = _error(_int8(q, k, v), _exact(q, k, v)), k + 30 * torch.randn(1, 4, 1, 64)
    moved = _error(_int8(q, shifted, v), _exact(q, shifted, v))
    print(f"relative L2 error of precision='int8': {plain:.4f}, with keys far from 0 {moved:.4f}")
    assert plain < 0.02 and moved < 0.02
    codes, scale = _codes(shifted)
    assert _error(_exact(q, scale * codes, v), _exact(q, shifted, v)) > 5 * moved, "the mean would not have mattered"


def test_packed_sequences_are_as_alone() -> None:
    q, k, v = (t[0].transpose(0, 1).bfloat16() for t in _plain(150, 150, 64))
    ends = torch.tensor([0, 5, 5, 90, 150])
    with fa.use_backend("cpu"):
        packed = fa.varlen_attention(q, k, v, ends, ends, causal="top_left", precision="int8")
    assert isinstance(packed, Tensor)
    for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        alone = [t[a:b].transpose(0, 1)[None] for t in (q, k, v)]
        if b > a:
            assert torch.equal(packed[a:b], _int8(*alone, causal="top_left")[0].transpose(0, 1))


def test_rows_do_not_depend_on_threads_or_batch() -> None:
    tensors = [t.bfloat16() for t in _plain(200, 333, 64)]
    whole = _int8(*tensors, batch_invariant=True)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(whole, _int8(*tensors, batch_invariant=True))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(whole[:1], _int8(*(t[:1] for t in tensors), batch_invariant=True))


def test_numbers_that_are_not_finite() -> None:
    """In key or value they are met in full precision; a query with one gives a row of NaN."""
    for which in (1, 2):
        q, k, v = _plain(40, 90, 32)
        (q, k, v)[which][0, 1, 70, 3] = float("inf") if which == 1 else float("nan")
        with fa.use_backend("cpu"):
            assert torch.equal(_int8(q, k, v, causal="top_left"), fa.attention(q, k, v, causal="top_left"))
    q, k, v = _plain(40, 90, 32)
    q[1, 2, 7, 5] = float("inf")
    out = _int8(q, k, v)
    assert out[1, 2, 7].isnan().all() and int(out.isnan().any(-1).sum()) == 1


def test_what_is_refused() -> None:
    q, k, v = _plain(40, 64, 32)
    blocks = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    for call, reason in (
        (lambda: fa.attention(*(t.double() for t in (q, k, v)), precision="int8"), "not float64"),
        (lambda: fa.attention(q.requires_grad_(), k, v, precision="int8"), "no gradients with products in int8"),
        (lambda: fa.attention(q.detach(), k, v, precision="int8", return_weights="mean"), "no attention weights"),
        (lambda: fa.attention(q.detach(), k, v, precision="int8", block_map=blocks, block_size=(16, 16)), "of 32 rows"),
    ):
        with pytest.raises(fa.BackendError, match=reason):
            call()
    explanation = fa.explain(q.detach(), k, v, precision="int8")
    assert explanation.backend == "cpu" and "int8 codes" in str(explanation)
    assert cpu.info()["isa"] in cpu.INT8_ISAS


def test_the_reference_computes_no_recipe() -> None:
    q, k, v = _plain(3, 3, 8)
    spec = make_spec(Inputs(q, k, v), Options(precision="int8"))
    assert reference.supports(spec, Device("cpu")) == "products in the precision of the inputs, not in int8"
