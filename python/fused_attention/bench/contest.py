"""One shape, run by ours and by its peers, and the check that each computes the same before any is timed.

A contest holds several sets of inputs and moves to the next one at each call, so that a figure is not that of data
which the call before left in the cache.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..nn import replace_attention
from ..parity.rule import compare
from .caches import cache_runs
from .peers import PEERS, Attention, mask_of, ours, window_mask
from .shapes import AttentionShape, CacheShape, ModuleShape, Shape
from .timing import Run

# Inputs of this much in all: more than the last-level cache of most machines.
ROTATED_BYTES = 64 * 2**20
MOST_SETS = 8
CHECKED_SCORES = 2**26  # of one head, in float64 512 MiB; of a longer call the last rows are checked
CHECKED_ROWS = 512


class CheckError(AssertionError):
    """Ours does not compute what it is to be timed for."""


@dataclass
class Contest:
    """runs: ours first, then the peers that can run the shape; refused: the reasons of those that cannot."""

    shape: Shape
    runs: dict[str, Run]
    check: Callable[[], None]
    refused: dict[str, str] = field(default_factory=dict)


def _sets(size_in_bytes: float) -> int:
    return max(2, min(MOST_SETS, math.ceil(ROTATED_BYTES / size_in_bytes)))


# --- attention ------------------------------------------------------------------------------------------------------


def _inputs(shape: AttentionShape, device: torch.device) -> tuple[Tensor, ...]:
    """query, key, value, and the gradient of the output."""
    like: dict[str, Any] = {"dtype": shape.dtype, "device": device}
    q, dout = (torch.randn(shape.batch, shape.heads, shape.rows, shape.head_dim, **like) for _ in range(2))
    k, v = (torch.randn(shape.batch, shape.kv_heads, shape.columns, shape.head_dim, **like) for _ in range(2))
    return (*(t.requires_grad_(shape.backward) for t in (q, k, v)), dout)


def _call(f: Attention, shape: AttentionShape, sets: Iterator[tuple[Tensor, ...]]) -> Run:
    def forward() -> Tensor:
        with torch.no_grad():
            return f(*next(sets)[:3])

    def both() -> tuple[Tensor, ...]:
        *qkv, dout = next(sets)
        return torch.autograd.grad(f(*qkv), qkv, dout)

    return both if shape.backward else forward


def _visible(shape: AttentionShape, rows: slice, device: torch.device) -> Tensor | None:
    """Of some rows of the first batch element what a plain computation needs: bool, or added to the scores."""
    own = mask_of(shape, device)
    if own is not None:
        own = own[:1] if own.shape[2] == 1 else own[:1, :, rows]
    if shape.window is not None:
        window = window_mask(shape, device)
        return None if window is None else window[rows]
    if shape.causal:
        ones = torch.ones(shape.rows, shape.columns, dtype=torch.bool, device=device)
        return ones.tril()[rows]
    return own


def _results(f: Attention, shape: AttentionShape, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    *qkv, dout = tensors
    output = f(*qkv)
    return [output, *(torch.autograd.grad(output, qkv, dout) if shape.backward else ())]


def check_attention(f: Attention, shape: AttentionShape, tensors: tuple[Tensor, ...]) -> None:
    """Heads are independent: the first group of the first batch element is compared, by the tolerance rule."""
    group, device = shape.heads // shape.kv_heads, tensors[0].device
    rows = slice(None)
    if shape.rows * shape.columns > CHECKED_SCORES and not shape.backward:
        rows = slice(max(0, shape.rows - CHECKED_ROWS), None)
    visible = _visible(shape, rows, device)

    def first(i: int, t: Tensor) -> Tensor:
        return t[:1, : (1 if i in (1, 2) else group)]

    def plain(dtype: torch.dtype) -> list[Tensor]:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mask = visible if visible is None or visible.dtype == torch.bool else visible.to(dtype)
            with sdpa_kernel(SDPBackend.MATH):
                return F.scaled_dot_product_attention(q[:, :, rows], k, v, mask, enable_gqa=group > 1)

        parts = (first(i, t).detach().to(dtype).requires_grad_(shape.backward and i < 3) for i, t in enumerate(tensors))
        return _results(call, shape, tuple(parts))

    output, *grads = _results(f, shape, tensors)
    got = [first(0, output)[:, :, rows], *(first(i, g) for i, g in enumerate(grads))]
    for i, (out, same, ref) in enumerate(zip(got, plain(shape.dtype), plain(torch.float64), strict=True)):
        found = compare(out, same, ref, grad=i > 0)
        if found["error"] > found["allowed"]:
            name = ("output", "dq", "dk", "dv")[i]
            raise CheckError(f"{shape.name}: {name} is off by {found['error']:.3g}, allowed {found['allowed']:.3g}")


def attention_contest(shape: AttentionShape, peers: Iterable[str], device: torch.device) -> Contest:
    """Ours and those of `peers` that run the shape and compute the same."""
    torch.manual_seed(0)
    sets = [_inputs(shape, device) for _ in range(_sets(shape.bytes))]
    functions = {"ours": ours(shape, device)}
    refused: dict[str, str] = {}
    for name in peers:
        reason = PEERS[name].refuses(shape, device)
        try:
            if reason is None:
                function = PEERS[name].make(shape, device)
                check_attention(function, shape, sets[0])
                functions[name] = function
        except (RuntimeError, NotImplementedError, CheckError) as error:
            reason = str(error).splitlines()[0]
        if reason is not None:
            refused[name] = reason
    runs = {name: _call(f, shape, itertools.cycle(sets)) for name, f in functions.items()}
    return Contest(shape, runs, lambda: check_attention(functions["ours"], shape, sets[0]), refused)


# --- the module -----------------------------------------------------------------------------------------------------


def _module_call(
    module: nn.MultiheadAttention, shape: ModuleShape, sets: Iterator[Tensor]
) -> Callable[[], list[Tensor]]:
    parameters = list(module.parameters())
    padding = None
    if shape.padding:
        hidden = torch.arange(shape.tokens, device=parameters[0].device) >= shape.tokens - shape.tokens // 8
        padding = hidden.expand(shape.batch, -1)

    def inference() -> list[Tensor]:
        x = next(sets)
        with torch.no_grad():
            found = module(x, x, x, key_padding_mask=padding, need_weights=shape.need_weights)
        return [t for t in found if t is not None]

    def training() -> list[Tensor]:
        x = next(sets)
        output, weights = module(x, x, x, key_padding_mask=padding, need_weights=shape.need_weights)
        grads = torch.autograd.grad(output, [x, *parameters], torch.ones_like(output))
        return [output, *([] if weights is None else [weights]), *grads]

    return training if shape.backward else inference


def module_contest(shape: ModuleShape, peers: Iterable[str], device: torch.device) -> Contest:
    """`MultiheadAttention` against torch's own, with the same weights."""
    torch.manual_seed(0)
    like: dict[str, Any] = {"dtype": shape.dtype, "device": device}
    peer = nn.MultiheadAttention(shape.width, shape.heads, batch_first=True, **like).train(shape.backward)
    mine = copy.deepcopy(peer)
    report = replace_attention(mine)
    assert report.replaced, str(report)
    size = shape.batch * shape.tokens * shape.width * shape.dtype.itemsize
    data = (torch.randn(shape.batch, shape.tokens, shape.width, **like) for _ in range(_sets(size)))
    sets = [x.requires_grad_(shape.backward) for x in data]

    def check() -> None:
        exact = [x.detach().double().requires_grad_(shape.backward) for x in sets[:1]]
        contestants = ((mine, sets), (peer, sets), (copy.deepcopy(peer).double(), exact))
        results = (_module_call(module, shape, iter(inputs))() for module, inputs in contestants)
        for i, (out, same, ref) in enumerate(zip(*results, strict=True)):
            found = compare(out, same, ref, grad=i > shape.need_weights)
            if found["error"] > found["allowed"]:
                raise CheckError(f"{shape.name}: result {i} is off by {found['error']:.3g}")

    modules = {"ours": mine} | ({"torch": peer} if "torch" in peers else {})
    runs: dict[str, Run] = {name: _module_call(m, shape, itertools.cycle(sets)) for name, m in modules.items()}
    refused = {name: "no module" for name in peers if name != "torch"}
    return Contest(shape, runs, check, refused)


# --- caches ---------------------------------------------------------------------------------------------------------


def cache_contest(shape: CacheShape, peers: Iterable[str], device: torch.device) -> Contest:
    """`decode_attention` on a cache in the query's dtype, torch on dense tensors, and caches that store codes."""
    runs, wrong = cache_runs(shape, peers, device)

    def check() -> None:
        message = wrong()
        if message is not None:
            raise CheckError(message)

    return Contest(shape, runs, check, {name: "no cache" for name in peers if name != "torch"})


def make_contest(shape: Shape, peers: Iterable[str], device: torch.device) -> Contest:
    """What `shape` is a shape of."""
    if isinstance(shape, ModuleShape):
        return module_contest(shape, peers, device)
    if isinstance(shape, CacheShape):
        return cache_contest(shape, peers, device)
    return attention_contest(shape, peers, device)
