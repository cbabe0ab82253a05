"""Ring attention and Ulysses over two and four processes, by the tolerance rule; and what they send."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fused_attention as fa
from fused_attention import context_parallel as cp
from fused_attention.backends import reference
from fused_attention.context_parallel.sharding import Layout
from fused_attention.parity.problems import plain_gradients
from fused_attention.spec import Causal, Inputs, Options, make_spec

from ..cases import _exact, _joined
from ..numerics import assert_close
from .processes import Processes

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("distributed")]

FUNCTIONS: dict[str, Callable[..., Any]] = {"ring": cp.ring_attention, "ulysses": cp.ulysses_attention}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass(frozen=True)
class Case:
    """Sizes [B, H, HK, S, D, DV] of the whole problem and its options."""

    name: str
    sizes: tuple[int, int, int, int, int, int] = (2, 4, 4, 64, 16, 16)
    dtype: str = "fp32"
    causal: Causal | None = None
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    scale: float | None = None
    sinks: bool = False
    alibi: bool = False
    key_lengths: bool = False
    keys: int | None = None  # N, where it is not S
    packed: tuple[int, ...] | None = None  # lengths
    layout: Layout = "zigzag"
    memory: str = "bhsd"
    seeds: int = 1
    backend: str = "auto"

    def __str__(self) -> str:
        return self.name

    def make(self, seed: int) -> tuple[Inputs, Options]:
        g = torch.Generator().manual_seed(seed)
        b, h, hk, s, d, dv = self.sizes
        n = s if self.keys is None else self.keys

        def rand(heads: int, length: int, width: int) -> Tensor:
            if self.memory == "bshd":
                return torch.randn(b, length, heads, width, generator=g).to(DTYPES[self.dtype]).transpose(1, 2)
            return torch.randn(b, heads, length, width, generator=g).to(DTYPES[self.dtype])

        starts = None if self.packed is None else torch.tensor([0, *self.packed]).cumsum(0)
        x = Inputs(
            rand(h, s, d),
            rand(hk, n, d),
            rand(hk, n, dv),
            sinks=torch.randn(h, generator=g).to(DTYPES[self.dtype]) if self.sinks else None,
            alibi_slopes=torch.rand(1, h, generator=g) if self.alibi else None,
            key_lengths=torch.tensor([n - 3, 0][:b]) if self.key_lengths else None,
            cu_seqlens_q=starts,
            cu_seqlens_k=starts,
        )
        left, right = self.window or (None, None)
        return x, Options(self.causal, left, right, self.softcap, self.scale)


def _call(case: Case, function: str, x: Inputs) -> tuple[fa.AttentionResult, list[Tensor]]:
    """This rank's result, in kernel layout, and its leaves: query, key, value and sinks."""
    leaves = [cp.shard_sequence(t, 2, layout=case.layout).requires_grad_() for t in x[:3]]
    if case.memory == "bshd":
        leaves = [t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in leaves]
    sinks = None if x.sinks is None else x.sinks.clone().requires_grad_()
    options: dict[str, Any] = {"causal": case.causal, "window": case.window, "softcap": case.softcap}
    options |= {"scale": case.scale, "sinks": sinks, "layout": case.layout, "return_lse": True}
    if function == "ulysses":
        options |= {"alibi_slopes": x.alibi_slopes, "key_lengths": x.key_lengths}
    if case.packed is None:
        result = FUNCTIONS[function](*leaves, **options)
    else:
        tokens = [t.squeeze(0).transpose(0, 1) for t in leaves]
        output, lse, _ = FUNCTIONS[function](*tokens, cu_seqlens=x.cu_seqlens_q, **options)
        result = fa.AttentionResult(output.transpose(0, 1)[None], lse[None], None)
    return result, leaves if sinks is None else [*leaves, sinks]


def _whole(case: Case, t: Tensor) -> Tensor:
    return cp.unshard_sequence(t, 2, layout=case.layout)


def _results(case: Case, function: str, seed: int) -> dict[str, tuple[Tensor, Any, Any]]:
    """Per result: what the ranks give together, what plain eager code gives, and the exact value."""
    x, o = case.make(seed)
    names = ["query", "key", "value", *(["sinks"] if case.sinks else [])]
    with fa.use_backend(case.backend):
        result, leaves = _call(case, function, x)
    g = torch.Generator().manual_seed(seed + 1000)
    incoming = [
        torch.randn(t.shape, generator=g).to(t.dtype) for t in (_whole(case, result.output), _whole(case, result.lse))
    ]
    alive = torch.isfinite(result.lse)
    dout, dlse = (cp.shard_sequence(t, 2, layout=case.layout) for t in incoming)
    torch.autograd.backward([result.output, torch.where(alive, result.lse, 0.0)], [dout, dlse * alive])
    grads = [_whole(case, t.grad) for t in leaves[:3]]  # type: ignore[arg-type]
    for sink in leaves[3:]:
        assert sink.grad is not None
        total = sink.grad.double()  # each rank's share is in its own dtype; their sum is not rounded again
        dist.all_reduce(total)
        grads.append(total.to(sink.dtype))

    leafy = x._replace(**{n: getattr(x, n).detach().requires_grad_() for n in names})
    spec = make_spec(leafy, o)
    given = (incoming[0], incoming[1], None)
    same, same_grads = plain_gradients(spec, x, given, DTYPES[case.dtype])
    exact, exact_grads = _exact(spec, x, given)
    lse_same = reference.forward(spec, x).lse if case.dtype in ("fp16", "bf16") else same.lse
    found = {
        "output": (_whole(case, result.output), same.output, exact["output"]),
        "lse": (_whole(case, result.lse), lse_same, exact["lse"]),
    }
    return found | {f"d{n}": (t, same_grads[n], exact_grads[n]) for n, t in zip(names, grads, strict=True)}


def check(case: Case, function: str) -> None:
    """In every rank: all draws of the case at once, by the rule."""
    draws = [_results(case, function, seed) for seed in range(case.seeds)]
    for name in draws[0]:
        out, same, ref = (_joined(tuple(d[name][i] for d in draws)) for i in range(3))
        assert_close(out, same, ref, grad=name.startswith("d"), name=f"{function} {case}: {name}")


GQA, ODD = (1, 8, 4, 64, 16, 24), (2, 3, 1, 64, 16, 16)
PACKED = (1, 4, 4, 64, 16, 16)

# fmt: off
BOTH = [
    Case("full"),
    Case("causal", causal="top_left"),
    Case("causal-contiguous", causal="bottom_right", layout="contiguous"),
    Case("gqa-causal", GQA, causal="top_left"),
    Case("window", window=(5, None), causal="top_left"),
    Case("window-contiguous", window=(5, None), causal="top_left", layout="contiguous"),
    Case("window-both-sides", window=(7, 20)),
    Case("window-both-sides-contiguous", window=(20, 3), layout="contiguous"),
    Case("window-zero", window=(0, 0)),
    Case("softcap-scale", causal="top_left", softcap=1.5, scale=0.7),
    Case("sinks", (2, 8, 8, 64, 16, 16), causal="top_left", sinks=True, seeds=4),
    Case("cross", keys=24),
    Case("bf16", GQA, "bf16", causal="top_left"),
    Case("fp16", GQA, "fp16", causal="top_left", window=(30, None)),
    Case("fp64", GQA, "fp64", causal="top_left"),
    Case("bshd", GQA, causal="top_left", memory="bshd"),
    Case("reference", GQA, causal="top_left", backend="reference"),
    Case("reference-bf16-sinks", GQA, "bf16", causal="top_left", sinks=True, seeds=4, backend="reference"),
    Case("packed", PACKED, causal="top_left", packed=(3, 20, 0, 1, 40)),
    Case("packed-long", PACKED, causal="top_left", packed=(64,)),
    Case("packed-full", PACKED, packed=(1, 17, 15, 31), layout="contiguous"),
    Case("packed-window", PACKED, packed=(2, 29, 33), window=(6, 2), sinks=True, seeds=4),
    Case("packed-short", PACKED, "bf16", causal="top_left", packed=(1,) * 24 + (2,) * 20),
]
RING = [
    Case("odd-heads", ODD, causal="top_left"),
    Case("mqa-cross", (1, 5, 1, 60, 8, 8), keys=28, layout="contiguous"),
    Case("no-keys", keys=0, sinks=True),
    Case("few-rows", (4, 4, 4, 8, 16, 16), causal="top_left", seeds=8),
]
ULYSSES = [
    Case("alibi", causal="top_left", alibi=True),
    Case("key-lengths", key_lengths=True, causal="top_left"),
    Case("packed-alibi", PACKED, causal="top_left", packed=(3, 20, 41), alibi=True, layout="contiguous"),
]
# fmt: on
CASES = [
    *(pytest.param("ring", case, id=f"ring-{case}") for case in BOTH + RING),
    *(pytest.param("ulysses", case, id=f"ulysses-{case}") for case in BOTH + ULYSSES),
]


@pytest.mark.parametrize(("function", "case"), CASES)
def test_equals_one_process(ranks: Processes, function: str, case: Case) -> None:
    ranks.run(check, case, function)


# --- what is sent ---------------------------------------------------------------------------------------------------


def _sent_by(function: str, case: Case) -> tuple[int, int]:
    """Bytes that this rank gives to torch.distributed for others, forward and backward."""
    sent, batch, exchange = [0], dist.batch_isend_irecv, dist.all_to_all_single

    def counted_batch(ops: list[Any]) -> Any:
        sent[0] += sum(op.tensor.nbytes for op in ops if op.op is dist.isend)
        return batch(ops)

    def counted_exchange(output: Tensor, given: Tensor, **options: Any) -> Any:
        sent[0] += given.nbytes * (dist.get_world_size() - 1) // dist.get_world_size()
        return exchange(output, given, **options)

    x, _ = case.make(0)
    leaves = [cp.shard_sequence(t, 2, layout=case.layout).requires_grad_() for t in x[:3]]
    dist.batch_isend_irecv, dist.all_to_all_single = counted_batch, counted_exchange
    try:
        out = FUNCTIONS[function](*leaves, causal=case.causal, window=case.window, layout=case.layout)
        forward = sent[0]
        out.sum().backward()
        return forward, sent[0] - forward
    finally:
        dist.batch_isend_irecv, dist.all_to_all_single = batch, exchange


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_bytes_sent(ranks: Processes, dtype: str, say: Callable[[str], None]) -> None:
    """docs/performance.md has these formulas."""
    b, h, hk, s, d, dv = sizes = (2, 8, 4, 128, 16, 24)
    world, item = ranks.world, DTYPES[dtype].itemsize
    keys, rows = b * hk * s // world * (d + dv), b * h * s // world * (d + dv)  # numbers of one rank
    causal = Case("causal", sizes, dtype, causal="top_left")
    ring = ((world - 1) * keys * item, (world - 1) * keys * (item + 4))
    assert set(ranks.run(_sent_by, "ring", causal)) == {ring}
    ulysses = (world - 1) * (keys + rows) * item // world
    assert set(ranks.run(_sent_by, "ulysses", causal)) == {(ulysses, ulysses)}
    near = Case("window", sizes, dtype, causal="top_left", window=(s // world, None), layout="contiguous")
    assert set(ranks.run(_sent_by, "ring", near)) == {(keys * item, keys * (item + 4))}
    say(f"{world} ranks, {dtype}: bytes sent by each, forward + backward: ring {ring[0]} + {ring[1]}, "
        f"Ulysses {ulysses} + {ulysses}")  # fmt: skip
