"""Ring attention and Ulysses beside what surrounds them: backends, autocast, compile, groups; and bad input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fused_attention as fa
from fused_attention import context_parallel as cp
from fused_attention.backends import reference
from fused_attention.spec import Inputs, Options, make_spec

from ..numerics import assert_close
from .processes import Processes
from .test_context_parallel import FUNCTIONS

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("distributed")]


def _hidden_nan(function: str) -> None:
    q, k, v = (torch.randn(1, 4, 32, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    x = Inputs(q.clone(), k.clone(), v.clone())
    spec = make_spec(x, Options("top_left"))
    same = reference.forward(spec, x).output[:, :, :-1]
    exact = reference.forward(replace(spec, dtype=torch.float64), x).output[:, :, :-1]
    k[:, :, -1], v[:, :, -1] = float("nan"), float("inf")
    local = [cp.shard_sequence(t, 2) for t in (q, k, v)]
    out = cp.unshard_sequence(FUNCTIONS[function](*local, causal="top_left"), 2)
    assert_close(out[:, :, :-1], same, exact)
    assert out[:, :, -1].isnan().all()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_hidden_key_is_never_read(ranks: Processes, function: str) -> None:
    ranks.run(_hidden_nan, function)


def _backend_asked_for(function: str) -> None:
    local = [torch.randn(1, 4, 8, 8, requires_grad=True) for _ in range(3)]
    with pytest.raises(fa.BackendError, match="triton"), fa.use_backend("triton"):
        FUNCTIONS[function](*local)
    wide = [torch.randn(1, 4, 4, 520, requires_grad=True) for _ in range(3)]  # wider than the kernels
    with fa.use_backend("reference"):
        out = FUNCTIONS[function](*wide, causal="top_left")
    out.sum().backward()  # outside: the backward pass runs on what the forward pass ran on
    with pytest.raises(fa.BackendError, match="head dim"), fa.use_backend("cpu"):
        FUNCTIONS[function](*wide)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_named_backend_runs_or_raises(two_ranks: Processes, function: str) -> None:
    two_ranks.run(_backend_asked_for, function)


def _autocast(function: str) -> None:
    local = [torch.randn(1, 4, 8, 16, requires_grad=True) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        out = FUNCTIONS[function](*local, causal="top_left")
    expected = FUNCTIONS[function](*(t.bfloat16() for t in local), causal="top_left")
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    (grad,) = torch.autograd.grad(out.float().sum(), local[:1])
    assert grad.dtype == torch.float32 and grad.isfinite().all()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_autocast(two_ranks: Processes, function: str) -> None:
    two_ranks.run(_autocast, function)


def _some_gradients(function: str) -> None:
    q, k, v = (
        torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(dist.get_rank() * 3 + i)) for i in range(3)
    )
    grads = []
    for needs in ((True, True, True), (True, False, False), (False, False, True)):
        leaves = [t.clone().requires_grad_(need) for t, need in zip((q, k, v), needs, strict=True)]
        FUNCTIONS[function](*leaves, causal="top_left").square().sum().backward()
        grads.append([t.grad for t in leaves])
    whole, query, value = grads
    assert torch.equal(query[0], whole[0]) and query[1] is query[2] is None
    assert torch.equal(value[2], whole[2]) and value[0] is value[1] is None
    with torch.no_grad():
        assert not FUNCTIONS[function](q, k, v).requires_grad


@pytest.mark.parametrize("function", FUNCTIONS)
def test_only_the_gradients_that_are_wanted(two_ranks: Processes, function: str) -> None:
    two_ranks.run(_some_gradients, function)


def _compiled(function: str) -> None:
    local = [torch.randn(1, 4, 8, 8, requires_grad=True) for _ in range(3)]

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return FUNCTIONS[function](q * 2, k, v, causal="top_left").square()

    expected, found = step(*local), torch.compile(step, backend="eager")(*local)
    assert torch.equal(found, expected)
    for mine, theirs in zip(*(torch.autograd.grad(t.sum(), local) for t in (found, expected)), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_under_compile(two_ranks: Processes, function: str) -> None:
    two_ranks.run(_compiled, function)


def _checkpointed(function: str, reentrant: bool) -> None:
    """The exchange is made again in the backward pass, by all ranks alike."""
    torch.manual_seed(dist.get_rank())
    local = [torch.randn(1, 4, 8, 8, requires_grad=True) for _ in range(3)]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return FUNCTIONS[function](q, k, v, causal="top_left").square()

    found = []
    for out in (run(*local), checkpoint(run, *local, use_reentrant=reentrant)):
        for t in local:
            t.grad = None
        out.sum().backward()
        found.append([t.grad for t in local])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_checkpointing(two_ranks: Processes, function: str, reentrant: bool) -> None:
    two_ranks.run(_checkpointed, function, reentrant)


def _one_of_many_groups() -> None:
    """Ranks of a subgroup have other numbers than in the whole."""
    groups = [dist.new_group([1, 0]), dist.new_group([0, 1])]
    x = torch.randn(3, 1, 2, 16, 8, generator=torch.Generator().manual_seed(0))
    for group in groups:
        local = [cp.shard_sequence(t, 2, group=group) for t in x]
        out = cp.unshard_sequence(cp.ring_attention(*local, group=group, causal="top_left"), 2, group=group)
        torch.testing.assert_close(out, fa.attention(*x, causal="top_left"))
    alone = [dist.new_group([i]) for i in range(dist.get_world_size())][dist.get_rank()]
    for function in FUNCTIONS.values():
        out = function(*x, group=alone, causal="top_left")
        torch.testing.assert_close(out, fa.attention(*x, causal="top_left"))


def test_groups(two_ranks: Processes) -> None:
    two_ranks.run(_one_of_many_groups)


def _positions() -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    zigzag = cp.sequence_positions(4 * world).tolist()
    assert zigzag == [2 * rank, 2 * rank + 1, 4 * world - 2 * rank - 2, 4 * world - 2 * rank - 1]
    assert cp.sequence_positions(2 * world, layout="contiguous").tolist() == [2 * rank, 2 * rank + 1]
    tokens = torch.randn(3, 4 * world, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    local = cp.shard_sequence(tokens, 1)
    assert torch.equal(local, tokens[:, zigzag]) and torch.equal(cp.unshard_sequence(local, -2), tokens)
    local.sum().backward()
    assert tokens.grad is not None and tokens.grad.sum() == local.numel()


def test_sharding(ranks: Processes) -> None:
    ranks.run(_positions)


# --- bad input ------------------------------------------------------------------------------------------------------


def _refusals() -> None:
    q = torch.randn(1, 4, 8, 8)
    ring, ulysses = cp.ring_attention, cp.ulysses_attention
    none, tensor = None, torch.zeros(1)
    calls: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: ring(q, q, q, mask=tensor), fa.ArgumentError, "mask.*as many elements"),
        (lambda: ring(q, q, q, bias=tensor), fa.ArgumentError, "bias.*as many elements"),
        (lambda: ring(q, q, q, dropout_p=0.1), fa.ArgumentError, "dropout_p.*mask that one process would"),
        (lambda: ring(q, q, q, alibi_slopes=tensor), fa.ArgumentError, "alibi_slopes.*ulysses_attention"),
        (lambda: ring(q, q, q, key_lengths=tensor), fa.ArgumentError, "key_lengths.*cu_seqlens"),
        (lambda: ring(q, q, q, return_weights="mean"), fa.ArgumentError, "return_weights"),
        (lambda: ring(q, q, q, colour=1), TypeError, "unexpected keyword argument 'colour'"),
        (lambda: ring(q, q, q, layout="spiral"), fa.ArgumentError, "layout.*'zigzag' or 'contiguous'"),  # type: ignore
        (lambda: ring(q, q, q, group="all"), TypeError, "group.*ProcessGroup"),
        (lambda: ring(q, q, q, causal="yes"), fa.ArgumentError, "causal"),  # type: ignore[arg-type]
        (lambda: ring(q[:, :, :7], q[:, :, :7], q[:, :, :7], causal="top_left"), fa.ArgumentError, "an even one"),
        (lambda: ring(q, q[:, :, :6], q[:, :, :6], causal="top_left"), fa.ArgumentError, "key.*positions count"),
        (lambda: ring(q[0], q[0], q[0], cu_seqlens=torch.tensor([0, 5])), fa.ArgumentError, "cu_seqlens.*all ranks"),
        (lambda: ring(q[0], q[0], q[0], cu_seqlens=torch.tensor([0, 9, 5, 8])), fa.ArgumentError, "never fall"),
        (lambda: ulysses(q[:, :3], q[:, :3], q[:, :3]), fa.ArgumentError, "query.*3 heads.*ring_attention"),
        (lambda: ulysses(q, q[:, :1], q[:, :1]), fa.ArgumentError, "key.*1 heads.*multiple of the 2 ranks"),
        (lambda: ulysses(q, q, q, dropout_p=0.5), fa.ArgumentError, "dropout_p"),
        (lambda: ulysses(q, q, q, alibi_slopes=torch.zeros(3)), fa.ArgumentError, "alibi_slopes"),
        (lambda: cp.shard_sequence(q[:, :, :6], 2), fa.ArgumentError, "multiple of 4"),
        (lambda: cp.shard_sequence(q, 4), fa.ArgumentError, "dim"),
        (lambda: torch.func.vmap(lambda t: ring(t, t, t))(q[None]), fa.ArgumentError, "torch.func"),
    ]  # fmt: skip
    for call, kind, message in calls:
        with pytest.raises(kind, match=message):
            call()
    assert ring(q, q, q, mask=none, dropout_p=0.0).shape == q.shape
    with pytest.raises(RuntimeError, match="once_differentiable|twice"):
        leaf = q.clone().requires_grad_()
        (grad,) = torch.autograd.grad(ring(leaf, leaf, leaf).square().sum(), leaf, create_graph=True)
        grad.sum().backward()


def test_what_is_refused(two_ranks: Processes) -> None:
    two_ranks.run(_refusals)


def test_without_processes() -> None:
    q = torch.randn(1, 4, 8, 8)
    for function in FUNCTIONS.values():
        with pytest.raises(fa.ArgumentError, match="init_process_group"):
            function(q, q, q)
