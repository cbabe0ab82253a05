"""Decoding under torch.compile and export: one op that writes the cache in place, and no recompilation as it fills."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fused_attention as fa
from fused_attention.cache import Cache

B, H, HK, D, SIZE = 2, 4, 2, 16, 48


def _paged(kv_dtype: torch.dtype | None) -> Cache:
    table = torch.randperm(2 * SIZE // 8, generator=torch.Generator().manual_seed(1)).int().view(B, -1)
    return fa.PagedKVCache.allocate(table, table.numel(), HK, 8, D, kv_dtype=kv_dtype)


CACHES: dict[str, Callable[[], Cache]] = {
    "dense": lambda: fa.KVCache.allocate(B, HK, SIZE, D),
    "dense int8": lambda: fa.KVCache.allocate(B, HK, SIZE, D, kv_dtype=torch.int8),
    "paged": lambda: _paged(None),
    "paged int8": lambda: _paged(torch.int8),
}


def _tables() -> tuple[Tensor, Tensor, bool]:
    angles = torch.outer(torch.arange(SIZE), 100.0 ** (-torch.arange(D // 2) / (D // 2)))
    return angles.cos(), angles.sin(), False


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {
        "rope": _tables(),
        "alibi_slopes": torch.linspace(0.1, 0.5, H),
        "sinks": torch.linspace(-1, 1, H),
        "window": (20, 0),
        "softcap": 5.0,
        "scale": 0.3,
        "batch_invariant": True,
    },
}


def _tokens(rows: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    q, k, v = (torch.randn(B, heads, rows, D, generator=generator) for heads in (H, HK, HK))
    return q, k, v


def _in_use(cache: Cache) -> list[Tensor]:
    """What can be compared of a cache: its lengths and every token, in float32."""
    if isinstance(cache, fa.PagedKVCache):
        pages = cache.block_table.long()
        held = [t[pages].transpose(1, 2).flatten(2, 3) for t in (cache.key, cache.value)]
    else:
        held = [cache.key, cache.value]
    used = int(cache.lengths.max())
    return [cache.lengths, *(t[:, :, :used].float() for t in held)]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", CACHES)
def test_a_step_is_in_the_graph(kind: str, options: str) -> None:
    """A prompt and ten tokens: the numbers and the cache of eager calls, two graphs, and no copy of the cache."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("inductor")

    def step(cache: Cache, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out = fa.decode_attention(2 * q, cache, k, v, return_lse=True, **OPTIONS[options])
        assert isinstance(out, fa.AttentionResult) and out.lse is not None
        return out.output + 1, out.lse

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    held, eager = CACHES[kind](), CACHES[kind]()
    places = [held.key.data_ptr(), held.value.data_ptr(), held.lengths.data_ptr()]
    for number, rows in enumerate((7, *[1] * 10)):
        tokens = _tokens(rows, number)
        with torch.no_grad():
            got, wanted = compiled(held, *tokens), step(eager, *tokens)
        for a, b in zip((*got, *_in_use(held)), (*wanted, *_in_use(eager)), strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 2, "recompiled while the cache filled"
    assert places == [held.key.data_ptr(), held.value.data_ptr(), held.lengths.data_ptr()]


def test_queries_alone_and_chunks() -> None:
    """Without new tokens nothing is written; a prompt goes in pieces."""
    torch.compiler.reset()

    def step(cache: Cache, q: Tensor, k: Tensor | None, v: Tensor | None, chunk: int | None) -> Tensor:
        out = fa.decode_attention(q, cache, k, v, chunk=chunk)
        assert isinstance(out, Tensor)
        return out

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    held, eager = CACHES["dense"](), CACHES["dense"]()
    q, k, v = _tokens(9, 0)
    assert torch.equal(compiled(held, q, k, v, 4), step(eager, q, k, v, 4))
    assert torch.equal(compiled(held, q, None, None, None), step(eager, q, None, None, None))
    assert torch.equal(held.lengths, eager.lengths)


@pytest.mark.parametrize("kind", ["rolling", "managed"])
def test_a_cache_that_counts_on_the_host_ends_the_graph(kind: str) -> None:
    torch.compiler.reset()

    def make() -> Cache:
        if kind == "rolling":
            return fa.KVCache.allocate(B, HK, 24, D, window=16)
        cache = fa.PagedKVCache.managed(SIZE, 12, HK, 8, D)
        cache.add(B)
        return cache

    def step(cache: Cache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = fa.decode_attention(2 * q, cache, k, v, window=(16, 0))
        assert isinstance(out, Tensor)
        return out + 1

    compiled = torch.compile(step, backend="aot_eager")
    held, eager = make(), make()
    for number in range(30):
        tokens = _tokens(1, number)
        assert torch.equal(compiled(held, *tokens), step(eager, *tokens))
    assert torch.equal(held.lengths, eager.lengths)


def test_a_layer_with_a_cache() -> None:
    """GroupedQueryAttention token by token, rotary positions read from the cache."""
    torch.compiler.reset()
    torch.manual_seed(0)
    rope = fa.RotaryEmbedding(D)
    layer = fa.GroupedQueryAttention(H * D, H, HK, causal="bottom_right", rope=rope, qk_norm_eps=1e-6).eval()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    held, eager = CACHES["dense"](), CACHES["dense"]()
    with torch.no_grad():
        for rows in (5, 1, 1, 1):
            x = torch.randn(B, rows, H * D)
            torch.testing.assert_close(compiled(x, cache=held), layer(x, cache=eager), rtol=1e-5, atol=1e-6)
    assert torch.equal(held.lengths, eager.lengths)


def test_exported() -> None:
    """A step as a graph of its own, which writes the tensors that it is given."""

    class Step(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> Tensor:
            out = fa.decode_attention(q, fa.KVCache(key, value, lengths), k, v)
            assert isinstance(out, Tensor)
            return out

    cache, eager = CACHES["dense"](), CACHES["dense"]()
    assert isinstance(cache, fa.KVCache)
    program = torch.export.export(Step(), (*_tokens(1, 0), cache.key, cache.value, cache.lengths)).module()
    for number in range(3):
        tokens = _tokens(1, number)
        got = program(*tokens, cache.key, cache.value, cache.lengths)
        assert torch.equal(got, fa.decode_attention(tokens[0], eager, *tokens[1:]))
    assert cache.lengths.tolist() == [3] * B


def test_errors_are_those_of_eager_calls() -> None:
    torch.compiler.reset()
    cache = CACHES["dense"]()
    q, k, v = _tokens(1, 0)
    compiled = torch.compile(fa.decode_attention, backend="aot_eager")
    with pytest.raises(fa.ArgumentError, match="window.*left"):
        compiled(q, cache, k, v, window=(-1, 0))
    cache.lengths.fill_(SIZE)
    before = copy.deepcopy(cache)
    with pytest.raises(fa.ArgumentError, match="at most the capacity"):
        compiled(q, cache, k, v)
    assert torch.equal(cache.lengths, before.lengths)
