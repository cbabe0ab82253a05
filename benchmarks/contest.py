"""The same computation by fused_attention and by PyTorch, and a check that both give the same before either is timed.

A contest holds several sets of inputs and moves to the next one at each call, so that a figure is not that of data
which the call before left in the cache.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fused_attention
from tests.numerics import assert_close

from .shapes import ATTENTION, MODULE, AttentionShape, ModuleShape

# Inputs of this much in all: more than the last-level cache of most machines.
ROTATED_BYTES = 64 * 2**20
MOST_SETS = 8

Run = Callable[[], object]


@dataclass(frozen=True)
class Contest:
    name: str
    dtype: torch.dtype
    flops: float
    ours: Run
    torch: Run
    check: Callable[[], None]  # raises if the results differ by more than the rule allows


def _sets(size_in_bytes: int) -> int:
    return max(2, min(MOST_SETS, math.ceil(ROTATED_BYTES / size_in_bytes)))


# --- scaled dot-product attention ---

Attention = Callable[..., Tensor]


def _attention_inputs(shape: AttentionShape, backward: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key, value, and the gradient of the output."""
    q = torch.randn(shape.batch, shape.heads, shape.rows, shape.head_dim, dtype=shape.dtype)
    k, v = (torch.randn(shape.batch, shape.kv_heads, shape.columns, shape.head_dim, dtype=shape.dtype) for _ in "kv")
    dout = torch.randn_like(q)
    return q.requires_grad_(backward), k.requires_grad_(backward), v.requires_grad_(backward), dout


def _attention_options(shape: AttentionShape) -> dict[str, object]:
    mask = torch.arange(shape.columns) < shape.columns - shape.columns // 8
    return {
        "attn_mask": mask.expand(shape.batch, 1, 1, -1) if shape.padding else None,
        "is_causal": shape.causal,
        "enable_gqa": shape.heads != shape.kv_heads,
    }


def _attention_call(f: Attention, shape: AttentionShape, backward: bool, sets: Iterator[tuple[Tensor, ...]]) -> Run:
    options = _attention_options(shape)

    def forward() -> Tensor:
        return f(*next(sets)[:3], **options)

    def both() -> tuple[Tensor, ...]:
        *inputs, dout = next(sets)
        return torch.autograd.grad(f(*inputs, **options), inputs, dout)

    return both if backward else forward


def _check_attention(shape: AttentionShape, backward: bool, inputs: tuple[Tensor, ...]) -> None:
    """Heads are independent: the first group of the first batch element is compared."""
    group = shape.heads // shape.kv_heads
    options = _attention_options(shape)

    def results(f: Attention, tensors: tuple[Tensor, ...]) -> list[Tensor]:
        *qkv, dout = tensors
        output = f(*qkv, **options)
        return [output, *(torch.autograd.grad(output, qkv, dout) if backward else ())]

    def first(t: Tensor) -> Tensor:
        return t[:1, : (1 if t.shape[1] == shape.kv_heads else group)]

    got = [first(t) for t in results(fused_attention.scaled_dot_product_attention, inputs)]
    if shape.padding:
        options["attn_mask"] = options["attn_mask"][:1]  # type: ignore[index]
    same, ref = (
        results(_plain, tuple(first(t).detach().to(dtype).requires_grad_(backward) for t in inputs))
        for dtype in (shape.dtype, torch.float64)
    )
    for name, a, b, c in zip(("output", "dq", "dk", "dv"), got, same, ref, strict=False):
        assert_close(a, b, c, grad=name != "output", name=f"{shape.name} {name}")


def _plain(*tensors: Tensor, **options: object) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*tensors, **options)  # type: ignore[arg-type]


def attention_contest(shape: AttentionShape, backward: bool) -> Contest:
    size = (2 * shape.heads * shape.rows + 2 * shape.kv_heads * shape.columns) * shape.batch * shape.head_dim
    torch.manual_seed(0)
    sets = [_attention_inputs(shape, backward) for _ in range(_sets(size * shape.dtype.itemsize))]

    def call(f: Attention) -> Run:
        return _attention_call(f, shape, backward, itertools.cycle(sets))

    return Contest(
        f"attention {shape.name} {'fwd+bwd' if backward else 'forward'}",
        shape.dtype,
        shape.flops() * (3.5 if backward else 1.0),  # the scores are computed again: five products beside two
        call(fused_attention.scaled_dot_product_attention),
        call(F.scaled_dot_product_attention),
        lambda: _check_attention(shape, backward, sets[0]),
    )


# --- the module ---


def _module_call(module: nn.MultiheadAttention, shape: ModuleShape, backward: bool, sets: Iterator[Tensor]) -> Run:
    padding = None
    if shape.padding:
        padding = (torch.arange(shape.tokens) >= shape.tokens - shape.tokens // 8).expand(shape.batch, -1)
    parameters = list(module.parameters())

    def forward() -> list[Tensor]:
        x = next(sets)
        with torch.no_grad():
            found = module(x, x, x, key_padding_mask=padding, need_weights=shape.need_weights)
        return [t for t in found if t is not None]

    def both() -> list[Tensor]:
        x = next(sets)
        output, weights = module(x, x, x, key_padding_mask=padding, need_weights=shape.need_weights)
        grads = torch.autograd.grad(output, [x, *parameters], torch.ones_like(output))
        return [output, *([] if weights is None else [weights]), *grads]

    return both if backward else forward


def module_contest(shape: ModuleShape, backward: bool) -> Contest:
    """`backward`: a training step in train mode; otherwise inference, in eval mode without gradients."""
    torch.manual_seed(0)
    peer = nn.MultiheadAttention(shape.width, shape.heads, batch_first=True, dtype=shape.dtype).train(backward)
    ours = copy.deepcopy(peer)
    report = fused_attention.replace_attention(ours)
    assert report.replaced, str(report)
    size = shape.batch * shape.tokens * shape.width * shape.dtype.itemsize
    data = [torch.randn(shape.batch, shape.tokens, shape.width, dtype=shape.dtype) for _ in range(_sets(size))]
    sets = [x.requires_grad_(backward) for x in data]

    def call(module: nn.MultiheadAttention, inputs: list[Tensor]) -> Run:
        return _module_call(module, shape, backward, itertools.cycle(inputs))

    def check() -> None:
        exact = [x.detach().double().requires_grad_(backward) for x in sets[:1]]
        got, same, ref = (
            call(module, inputs)()
            for module, inputs in ((ours, sets), (peer, sets), (copy.deepcopy(peer).double(), exact))
        )
        outputs = 1 + shape.need_weights
        for i, (a, b, c) in enumerate(zip(got, same, ref, strict=True)):  # type: ignore[call-overload]
            assert_close(a, b, c, grad=i >= outputs, name=f"{shape.name} result {i}")

    return Contest(
        f"module {shape.name} {'training' if backward else 'inference'}",
        shape.dtype,
        shape.flops() * (3.0 if backward else 1.0),
        call(ours, sets),
        call(peer, sets),
        check,
    )


def all_contests() -> dict[str, Callable[[], Contest]]:
    """What there is to run, by name; the inputs are made when one is called."""
    found: dict[str, Callable[[], Contest]] = {}
    for a in ATTENTION:
        found[f"attention {a.name} forward"] = lambda a=a: attention_contest(a, False)
        if a.backward:
            found[f"attention {a.name} fwd+bwd"] = lambda a=a: attention_contest(a, True)
    for m in MODULE:
        found[f"module {m.name} inference"] = lambda m=m: module_contest(m, False)
        if m.backward:
            found[f"module {m.name} training"] = lambda m=m: module_contest(m, True)
    return found
