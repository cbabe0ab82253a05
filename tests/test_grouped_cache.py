"""`GroupedQueryAttention` with a cache: token by token, in chunks and in ragged batches it equals the full forward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attention as fa
from fused_attention.nn import grouped

from .grouped_cases import DYNAMIC, MODELS, D, E, Model, eager, widened
from .numerics import assert_close

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
BY_NAME = {m.name: m for m in MODELS}
B, S = 3, 21


def new_cache(kind: str, module: fa.GroupedQueryAttention, dtype: torch.dtype, capacity: int = 24) -> Any:
    """An empty cache; the pages of the paged one are owned in no order."""
    if kind == "dense":
        return fa.KVCache.allocate(B, module.num_kv_heads, capacity, D, dtype=dtype)
    pages = -(-capacity // 4)
    table = torch.randperm(B * pages).view(B, pages).int()
    return fa.PagedKVCache.allocate(table, B * pages, module.num_kv_heads, 4, D, dtype=dtype)


def decoded(module: fa.GroupedQueryAttention, x: Tensor, cache: Any, chunks: list[int], **given: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat([module(part, cache=cache, **given) for part in x.split(chunks, 1)], 1)


def check(module: fa.GroupedQueryAttention, x: Tensor, got: Tensor, **known: Any) -> None:
    with torch.no_grad():
        assert_close(got, eager(module, x, **known)[0], eager(widened(module), x.double(), **known)[0])


CHUNKS = {"token-by-token": [1] * S, "prefill": [S - 3, 1, 1, 1], "chunked": [1, 9, 7, 3, 1]}


@pytest.mark.fast
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("kind", ["dense", "paged"])
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("model", MODELS, ids=str)
@pytest.mark.usefixtures("poison")
def test_equals_the_full_forward(model: Model, dtype: torch.dtype, kind: str, chunks: str) -> None:
    module = model.build(dtype)
    x = torch.randn(B, S, E).to(dtype)
    cache = new_cache(kind, module, dtype)
    got = decoded(module, x, cache, CHUNKS[chunks])
    assert cache.lengths.tolist() == [S] * B
    if dtype == F64:  # of which there is no wider type to measure with
        torch.testing.assert_close(got, module(x), rtol=1e-11, atol=1e-12)
    else:
        check(module, x, got)


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["dense", "paged"])
@pytest.mark.parametrize("name", ["plain", "norm-rope", "window-sinks", "everything"])
def test_ragged_prompts(name: str, kind: str) -> None:
    """Right-padded prompts come in at once; then every sequence goes on from its own length."""
    module = BY_NAME[name].build()
    x = torch.randn(B, S, E)
    lengths = torch.tensor([5, 12, 9])
    cache = new_cache(kind, module, F32)
    with torch.no_grad():
        prompt = module(x[:, :12], cache=cache)
        cache.lengths.sub_((12 - lengths).int())
        steps = []
        for i in range(4):
            token = x[torch.arange(B), lengths + i][:, None]
            steps.append(module(token, cache=cache))
    for b, length in enumerate(lengths.tolist()):
        got = torch.cat([prompt[b : b + 1, :length], *(s[b : b + 1] for s in steps)], 1)
        check(module, x[b : b + 1, : length + 4], got)


@pytest.mark.fast
@pytest.mark.parametrize("name", ["mqa", "norm-rope"])
def test_positions_of_the_caller(name: str) -> None:
    module = BY_NAME[name].build()
    x, positions = torch.randn(B, 9, E), torch.randint(0, 60, (B, 9))
    cache = new_cache("dense", module, F32)
    with torch.no_grad():
        parts = [module(x[:, i : i + 3], positions=positions[:, i : i + 3], cache=cache) for i in (0, 3, 6)]
    check(module, x, torch.cat(parts, 1), positions=positions)


@pytest.mark.fast
def test_dynamic_scaling_is_taken_at_the_capacity() -> None:
    """All keys are turned alike: as a full forward over a sequence as long as the cache may grow."""
    rope = {"scaling": DYNAMIC, "max_positions": 8}
    module = Model("dynamic", (4, 2), rope).build()
    x = torch.randn(B, 32, E)
    cache = new_cache("dense", module, F32, capacity=32)
    got = decoded(module, x, cache, [1] * 32)
    check(module, x, got)
    short = decoded(module, x[:, :20], new_cache("dense", module, F32, capacity=32), [20])
    torch.testing.assert_close(short, got[:, :20])
    normed = Model("dynamic-norm", (4, 2), rope, {"qk_norm_eps": 1e-6}).build()
    check(normed, x, decoded(normed, x, new_cache("paged", normed, F32, capacity=32), [30, 1, 1]))


@pytest.mark.fast
@pytest.mark.parametrize(("name", "fused"), [("mqa", True), ("norm-rope", False), ("plain", True)])
def test_one_call_a_step(name: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rotation is left to the append where no norm has to come before it."""
    module, calls = BY_NAME[name].build(), []
    real = grouped.decode_attention

    def watched(*tensors: Any, **options: Any) -> Any:
        calls.append(options)
        return real(*tensors, **options)

    turned = []
    monkeypatch.setattr(grouped, "decode_attention", watched)
    monkeypatch.setattr(grouped, "rope_qk_norm", lambda *a, **o: turned.append(1) or fa.rope_qk_norm(*a, **o))
    decoded(module, torch.randn(B, 1, E), new_cache("dense", module, F32), [1])
    assert len(calls) == 1 and len(turned) == (0 if fused else 1)
    assert (calls[0]["rope"] is not None) == (name == "mqa")


@pytest.mark.fast
def test_a_quantised_cache_and_autocast() -> None:
    module, x = BY_NAME["mqa"].build(), torch.randn(B, S, E)
    with torch.no_grad():
        full = module(x)
        coded = decoded(module, x, fa.KVCache.allocate(B, 1, S, D, kv_dtype=torch.int8), [S - 1, 1])
        relative = ((coded - full).norm() / full.norm()).item()
        assert 1e-5 < relative < 0.02  # one part in 254 of the largest value of each token
        with torch.autocast("cpu", BF16):
            out = decoded(module, x, new_cache("dense", module, BF16), [S - 1, 1])
        assert out.dtype == BF16
        low = copy.deepcopy(module).bfloat16()
        assert_close(out, eager(low, x.bfloat16())[0], eager(widened(module), x.double())[0])


# --- refusals -----------------------------------------------------------------------------------------------------

MODULE = BY_NAME["plain"].build()
X = torch.zeros(B, 1, E)


def call(module: fa.GroupedQueryAttention = MODULE, x: Tensor = X, **given: Any) -> Callable[[], Any]:
    return lambda: module(x, cache=given.pop("cache", None) or new_cache("dense", module, F32), **given)


def full_cache() -> fa.KVCache:
    cache = new_cache("dense", MODULE, F32, capacity=2)
    cache.lengths.fill_(2)
    return cache


OPEN = Model("open", (4, 2), None, {"causal": None}).build()
CROSS = Model("cross", (4, 2), None, {"context_dim": E}).build()
DROPPING = Model("dropping", (4, 2), None, {"dropout": 0.1}).build()
CALLS: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("mask", call(mask=torch.ones(1, 1, dtype=torch.bool)), ValueError, "mask"),
    ("bias", call(bias=torch.zeros(1, 1)), ValueError, "bias"),
    ("padding", call(key_padding_mask=torch.zeros(B, 1, dtype=torch.bool)), ValueError, "key_padding_mask"),
    ("lengths", call(key_lengths=torch.ones(B).long()), ValueError, "key_lengths"),
    ("weights", call(need_weights=True), ValueError, "need_weights"),
    ("not causal", call(OPEN), ValueError, "cache"),
    ("cross-attention", call(CROSS, context=X), ValueError, "cache"),
    ("dropout", call(DROPPING), ValueError, "cache"),
    ("not a cache", call(cache={"key": X}), TypeError, "cache"),
    ("no room", call(cache=full_cache()), ValueError, "cache.lengths"),
    ("other heads", call(cache=fa.KVCache.allocate(B, 3, 4, D)), ValueError, "query"),
    ("other batch", call(cache=fa.KVCache.allocate(B + 1, 2, 4, D)), ValueError, "query"),
]


@pytest.mark.fast
@pytest.mark.parametrize(("make", "error", "name"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS])
def test_refused(make: Callable[[], Any], error: type[Exception], name: str) -> None:
    with torch.no_grad(), pytest.raises(error) as caught:
        make()
    assert str(caught.value).startswith(f"{name}:")
    assert type(caught.value) in (fa.ArgumentError, TypeError)


@pytest.mark.fast
def test_no_derivative() -> None:
    cache = new_cache("dense", MODULE, F32)
    with pytest.raises(fa.ArgumentError, match="requires grad"):
        MODULE(X, cache=cache)
    assert not cache.lengths.any()
    with torch.inference_mode():
        MODULE(X, cache=cache)
    assert cache.lengths.tolist() == [1] * B


@pytest.mark.fast
@pytest.mark.parametrize("chunks", [[1] * S, [3] * (S // 3)], ids=["token-by-token", "chunked"])
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("name", ["window", "window-sinks"])
def test_a_cache_that_rolls(name: str, dtype: torch.dtype, chunks: list[int]) -> None:
    """It keeps a window of 21 tokens; rotation and slopes count on past its capacity."""
    module = BY_NAME[name].build(dtype)
    assert module.window is not None and module.window[0] is not None
    x = torch.randn(B, S, E).to(dtype)
    cache = fa.KVCache.allocate(B, module.num_kv_heads, 10, D, dtype=dtype, window=module.window[0])
    got = decoded(module, x, cache, chunks)
    assert cache.capacity == 10 and cache.positions.tolist() == [S] * B
    if dtype == F64:
        torch.testing.assert_close(got, module(x), rtol=1e-11, atol=1e-12)
    else:
        check(module, x, got)
