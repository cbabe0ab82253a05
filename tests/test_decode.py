"""Decoding against its definition: every option, both caches, every storage, on every backend that has it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attention.backends import reference_decode
from fused_attention.cache import LIMITS, Cache, DecodeInputs, DecodeSpec, KVCache, PagedKVCache, describe
from fused_attention.decode import decode_attention
from fused_attention.dispatch import use_backend
from fused_attention.functional import AttentionResult
from fused_attention.spec import Options

from .numerics import assert_close
from .triton_support import DEVICE, INTERPRETED, needs_triton

TRITON = pytest.param("triton", marks=[pytest.mark.triton, needs_triton])
EVERYWHERE = pytest.mark.parametrize("backend", ["cpu", "reference", TRITON])

F32, F16, BF16, I8, F8 = torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Case:
    """Sizes [B, H, HK, M, D, DV] and options; the tensors are made from a seed."""

    name: str
    sizes: tuple[int, int, int, int, int, int] = (3, 4, 2, 1, 16, 16)
    capacity: int = 80
    dtype: torch.dtype = F32
    kv_dtype: torch.dtype | None = None
    page: int | None = None
    append: bool = True
    rope: tuple[int, bool] | None = None  # R, interleaved
    window: tuple[int | None, int | None] = (None, None)
    softcap: float | None = None
    scale: float | None = None
    alibi: str | None = None  # "h", "bh"
    sinks: bool = False
    batch_invariant: bool = False
    layout: str = "bhnd"  # or "bnhd": how a dense cache and the new tensors lie in memory
    tree: str | None = None  # which of the last M rows see each other: "1", or "b", one tree for each sequence
    spread: float = 1.0  # values of tokens differ in size by up to this factor

    def __str__(self) -> str:
        return self.name


def _laid_out(case: Case, t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2) if case.layout == "bnhd" else t


def _filled(case: Case, cache: Cache, g: torch.Generator) -> None:
    """Random tokens everywhere, also where nothing may be read."""
    for storage, scales in ((cache.key, cache.key_scale), (cache.value, cache.value_scale)):
        t = torch.randn(storage.shape, generator=g)
        if storage is cache.value:
            t = t * case.spread ** torch.rand(*t.shape[:3], 1, generator=g)
        if scales is not None:
            t, found = reference_decode.quantise(t, storage.dtype)
            scales.copy_(found)
        reference_decode._bits(storage).copy_(reference_decode._bits(t.to(storage.dtype)))


def ancestry(batch: int, rows: int, g: torch.Generator) -> Tensor:
    """Random trees [batch, rows, rows]: row i sees itself, its parent (an earlier row, or none) and their ancestors."""
    mask = torch.eye(rows, dtype=torch.bool).repeat(batch, 1, 1)
    for b in range(batch):
        for i in range(1, rows):
            parent = int(torch.randint(-1, i, (), generator=g))
            if parent >= 0:
                mask[b, i] |= mask[b, parent]
    return mask


def make(case: Case, seed: int = 0) -> tuple[Cache, dict[str, Any]]:
    """A cache that holds random tokens and the arguments of one call."""
    g = torch.Generator().manual_seed(seed)
    b, h, hk, m, d, dv = case.sizes
    kv_dtype = case.kv_dtype or case.dtype
    cache: Cache
    if case.page is None:
        cache = KVCache.allocate(b, hk, case.capacity, d, dv, case.dtype, kv_dtype)
        cache = replace(cache, key=_laid_out(case, cache.key), value=_laid_out(case, cache.value))
    else:
        slots = -(-case.capacity // case.page)
        table = torch.randperm(b * slots + 3, generator=g)[: b * slots].reshape(b, slots).int()
        cache = PagedKVCache.allocate(table, b * slots + 3, hk, case.page, d, dv, case.dtype, kv_dtype)
    _filled(case, cache, g)
    room = cache.capacity - (m if case.append else 0)
    lengths = torch.randint(0, room + 1, (b,), generator=g)
    if b > 1:
        lengths[0], lengths[1] = 0, room
    cache = replace(cache, lengths=lengths.int() if seed % 2 else lengths)

    def rand(*shape: int) -> Tensor:
        return _laid_out(case, torch.randn(shape, generator=g)).to(case.dtype)

    arguments: dict[str, Any] = {"query": rand(b, h, m, d), "batch_invariant": case.batch_invariant}
    if case.append:
        arguments |= {"key": rand(b, hk, m, d), "value": rand(b, hk, m, dv)}
    if case.rope:
        angles = torch.rand(cache.capacity, case.rope[0] // 2, generator=g) * 7
        arguments["rope"] = (angles.cos(), angles.sin(), case.rope[1])
    if case.alibi:
        arguments["alibi_slopes"] = torch.rand(*((b, h) if case.alibi == "bh" else (h,)), generator=g)
    if case.sinks:
        arguments["sinks"] = torch.randn(h, generator=g).to(case.dtype)
    if case.tree:
        arguments["tree_mask"] = ancestry(b if case.tree == "b" else 1, m, g)
    arguments |= {n: getattr(case, n) for n in ("window", "softcap", "scale")}
    return cache, arguments


def described(cache: Cache, arguments: dict[str, Any]) -> tuple[DecodeSpec, DecodeInputs]:
    a = dict(arguments)
    cos, sin, interleaved = a.pop("rope", None) or (None, None, False)
    slopes = a.pop("alibi_slopes", None)
    slopes = slopes[None] if slopes is not None and slopes.dim() == 1 else slopes
    new = (a.pop("query"), a.pop("key", None), a.pop("value", None))
    x = DecodeInputs(*new, cos, sin, slopes, a.pop("sinks", None), a.pop("tree_mask", None))
    left, right = a.pop("window", None) or (None, None)
    return describe(cache, x, Options(window_left=left, window_right=right, **a), interleaved), x


def on(device: str, value: Any) -> Any:
    """Tensors of a cache, a tuple or a dictionary on another device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(on(device, v) for v in value)
    if isinstance(value, dict):
        return {k: on(device, v) for k, v in value.items()}
    if isinstance(value, (KVCache, PagedKVCache)):
        return replace(value, **{k: on(device, v) for k, v in vars(value).items()})
    return value


def run(
    backend: str, cache: Cache, arguments: dict[str, Any], device: str | None = None
) -> tuple[AttentionResult, Cache]:
    """The result of a call and the cache after it, on the CPU; the cache given stays as it is."""
    device = device or (DEVICE if backend == "triton" else "cpu")
    # copy.deepcopy would make strided tensors that are not dense contiguous
    cache = on(device, copy.deepcopy(cache))
    with use_backend(backend):
        out = decode_attention(cache=cache, return_lse=True, **on(device, arguments))
    assert isinstance(out, AttentionResult)
    return AttentionResult(*(on("cpu", t) for t in out)), on("cpu", cache)


def references(cache: Cache, arguments: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Per result what plain eager code gives and the value in float64, from what `cache` holds after the call."""
    spec, x = described(cache, {**arguments, "key": None, "value": None})

    def attend(dtype: torch.dtype, acc: torch.dtype) -> Any:
        turned = x._replace(query=reference_decode.append(spec, cache, x._replace(query=x.query.to(dtype))))
        wide = {n: t.to(dtype) for n, t in turned._asdict().items() if t is not None and n in ("query", "sinks")}
        return reference_decode.attend(replace(spec, dtype=dtype), cache, turned._replace(**wide), acc)

    exact = attend(torch.float64, torch.float64)
    same = attend(spec.dtype, spec.dtype)
    same_lse = attend(spec.dtype, spec.lse_dtype)
    return {"output": (same.output, exact.output), "lse": (same_lse.lse, exact.lse)}


def check_appended(before: Cache, after: Cache, arguments: dict[str, Any]) -> None:
    """The new tokens stand where they belong, rounded or quantised to within one step; all else is as it was."""
    expected = copy.deepcopy(before)
    spec, x = described(expected, arguments)
    reference_decode.append(spec, expected, x)
    assert torch.equal(after.lengths, expected.lengths)
    for name in ("key", "value"):
        got, want = getattr(after, name), getattr(expected, name)
        scale, scale_want = getattr(after, f"{name}_scale"), getattr(expected, f"{name}_scale")
        if scale is None:  # one rounding of a sum of two products, which may have been fused
            assert_close(got, want, want.double(), name=name)
            same = torch.isclose(got.float(), want.float(), rtol=2.0**-9, atol=2.0**-12)
            assert same.all()
            continue
        torch.testing.assert_close(scale, scale_want, rtol=2e-7, atol=0.0)
        limit = LIMITS[spec.kv_dtype]
        step = 1.0 if limit == 127.0 else (want.float().abs() / 8).clamp(min=2.0**-9)
        assert ((got.float() - want.float()).abs() <= step).all()
        assert (got.view(torch.uint8) != want.view(torch.uint8)).float().mean() < 0.01


def check(case: Case, backend: str, device: str | None = None) -> None:
    """One call by the rule; small problems are drawn several times and the maxima taken over all draws."""
    b, h, _, m, _, dv = case.sizes
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {"output": [], "lse": []}
    draws = max(1, min(3, 256 // max(b * h * m * dv, 1)))
    for seed in range(draws):
        cache, arguments = make(case, seed)
        untouched = copy.deepcopy(arguments)
        out, after = run(backend, cache, arguments, device)
        check_appended(cache, after, arguments)
        for name, t in untouched.items():
            if isinstance(t, Tensor):
                assert torch.equal(t, arguments[name]), f"{name} was modified"
        for name, (same, exact) in references(after, arguments).items():
            found[name].append((getattr(out, name), same, exact))
    for name, parts in found.items():
        got, same, exact = (torch.cat([p.flatten() for p in column]) for column in zip(*parts, strict=True))
        assert_close(got, same, exact, name=name)


# fmt: off
CASES = [
    Case("plain"),
    Case("fp16-rows", (2, 6, 2, 3, 24, 40), dtype=F16),
    Case("no-append", (3, 4, 4, 2, 8, 8), append=False),
    Case("no-append-rope", (3, 4, 2, 2, 8, 8), append=False, rope=(8, False), dtype=F16),
    Case("mqa-rope", (2, 5, 1, 2, 32, 16), rope=(32, False), dtype=F16, layout="bnhd"),
    Case("rope-partial-interleaved", (2, 2, 2, 3, 20, 12), rope=(6, True)),
    Case("rope-partial-half-odd-dim", (2, 2, 1, 2, 7, 5), rope=(6, False)),
    Case("D1", (2, 2, 1, 1, 1, 1)),
    Case("D3-DV65", (2, 2, 2, 1, 3, 65), dtype=F16, page=7),
    Case("D512-DV500", (1, 2, 1, 1, 512, 500), capacity=20, dtype=F16, kv_dtype=F8),
    Case("rows-over-a-tile", (1, 10, 2, 17, 16, 8), capacity=100),
    Case("rows-64", (1, 2, 1, 64, 8, 8), capacity=150, page=16),
    Case("paged", (3, 4, 2, 1, 16, 16), page=16),
    Case("paged-1", (2, 2, 1, 2, 16, 16), page=1, dtype=F16, softcap=3.0),
    Case("paged-odd-rope", (2, 4, 2, 3, 16, 24), page=5, rope=(12, True), sinks=True),
    Case("window", (3, 4, 2, 1, 16, 16), capacity=200, window=(70, 0)),
    Case("window-rows-paged", (3, 4, 2, 3, 16, 16), capacity=200, window=(5, 3), page=8, dtype=F16),
    Case("window-0", (2, 2, 2, 4, 16, 16), window=(0, None), alibi="h"),
    Case("window-sinks-softcap", (2, 4, 1, 2, 32, 32), window=(30, None), sinks=True, softcap=2.0, dtype=F16),
    Case("alibi-bh", (3, 4, 2, 2, 16, 16), alibi="bh", page=16),
    Case("alibi-rows-fp16", (2, 4, 2, 5, 16, 16), alibi="h", dtype=F16, capacity=150),
    Case("sinks", (3, 4, 2, 1, 16, 16), sinks=True),
    Case("softcap-exact", (3, 4, 2, 2, 16, 16), softcap=20.0, scale=0.05),
    Case("scale-negative", (2, 4, 2, 2, 16, 16), scale=-0.4, dtype=F16),
    Case("bf16", (2, 4, 2, 2, 16, 16), dtype=BF16, rope=(16, False)),
    Case("bf16-paged-int8", (2, 4, 2, 2, 16, 16), dtype=BF16, kv_dtype=I8, page=16),
    Case("bf16-fp8", (2, 4, 2, 2, 16, 16), dtype=BF16, kv_dtype=F8),
    Case("fp32-over-bf16", (2, 4, 2, 2, 16, 16), dtype=F32, kv_dtype=BF16),
    Case("fp32-over-fp16-paged", (2, 4, 2, 2, 16, 16), dtype=F32, kv_dtype=F16, page=4),
    Case("int8", (3, 4, 2, 1, 16, 16), kv_dtype=I8),
    Case("int8-fp16-rope-paged", (2, 4, 2, 2, 32, 16), dtype=F16, kv_dtype=I8, rope=(16, False), page=16, spread=100.0),
    Case("int8-window-alibi", (2, 4, 1, 3, 16, 24), kv_dtype=I8, window=(40, 0), alibi="bh", capacity=150),
    Case("int8-softcap-sinks", (2, 4, 2, 2, 24, 16), dtype=F16, kv_dtype=I8, softcap=5.0, sinks=True, spread=1e-4),
    Case("fp8", (3, 4, 2, 1, 16, 16), kv_dtype=F8, spread=1000.0),
    Case("fp8-fp16-rope-paged", (2, 4, 2, 2, 16, 40), dtype=F16, kv_dtype=F8, rope=(16, True), page=3),
    Case("fp8-window-softcap", (2, 6, 2, 3, 16, 16), dtype=F16, kv_dtype=F8, window=(33, 0), softcap=4.0, capacity=150),
    Case("fp8-alibi-sinks-paged", (2, 4, 2, 2, 16, 16), kv_dtype=F8, alibi="h", sinks=True, page=16),
    Case("int8-rows-over-a-tile", (1, 12, 2, 11, 16, 16), kv_dtype=I8, capacity=100),
    Case("splits", (2, 4, 2, 2, 16, 16), capacity=600, sinks=True),
    Case("splits-paged-int8", (2, 4, 2, 1, 16, 24), capacity=600, dtype=F16, kv_dtype=I8, page=16, rope=(16, False)),
    Case("splits-fp8-softcap", (2, 2, 1, 3, 16, 16), capacity=800, kv_dtype=F8, softcap=5.0),
    Case("splits-window-alibi", (2, 2, 1, 3, 16, 16), capacity=900, dtype=F16, window=(600, None), alibi="h"),
    Case("splits-invariant", (2, 2, 1, 2, 16, 16), capacity=1100, batch_invariant=True, sinks=True),
    *(Case(f"empty-{name}", sizes) for name, sizes in
      (("batch", (0, 2, 2, 1, 8, 8)), ("rows", (2, 2, 2, 0, 8, 8)), ("heads", (2, 0, 2, 1, 8, 8)))),
]
# fmt: on


@EVERYWHERE
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("poison")
def test_matches_the_definition(case: Case, backend: str) -> None:
    if backend == "triton" and INTERPRETED and BF16 in (case.dtype, case.kv_dtype):
        pytest.skip("Triton's interpreter cuts off instead of rounding to bfloat16, and converts no integers to it")
    check(case, backend)


# fmt: off
TREES = [
    Case("tree", (3, 4, 2, 6, 16, 16), tree="b"),
    Case("tree-shared-fp16-rope", (3, 4, 2, 7, 16, 24), dtype=F16, tree="1", rope=(16, False), page=5),
    Case("tree-no-append", (2, 4, 4, 5, 24, 16), tree="b", append=False, sinks=True, softcap=3.0),
    Case("tree-rope-interleaved", (2, 4, 1, 8, 16, 16), tree="b", rope=(12, True), layout="bnhd"),
    Case("tree-one-row", (2, 4, 2, 1, 16, 16), tree="b", dtype=BF16),
    Case("tree-empty-rows", (2, 4, 2, 0, 16, 16), tree="1", rope=(16, False)),
    Case("tree-int8-paged", (2, 4, 2, 9, 16, 16), dtype=F16, kv_dtype=I8, page=16, tree="b"),
    Case("tree-fp8", (2, 4, 2, 16, 32, 16), kv_dtype=F8, tree="b", spread=100.0),
    Case("tree-bf16-40-rows", (2, 4, 2, 40, 32, 32), dtype=BF16, tree="b", capacity=200),
    Case("tree-int8-40-rows-paged", (2, 2, 1, 40, 16, 16), kv_dtype=I8, tree="b", capacity=200, page=7),
    Case("tree-splits", (2, 4, 2, 5, 16, 16), capacity=1300, tree="b", sinks=True, batch_invariant=True),
    Case("tree-window", (3, 4, 2, 9, 16, 16), tree="b", window=(4, 0)),
    Case("tree-window-of-one", (3, 4, 2, 9, 16, 16), tree="b", window=(0, 5), dtype=BF16),
    Case("tree-window-alibi-rope", (3, 4, 2, 9, 16, 16), tree="b", window=(30, None), alibi="bh", rope=(16, False)),
    Case("tree-alibi-paged", (3, 4, 2, 6, 16, 16), tree="1", alibi="h", page=8),
    Case("tree-alibi-window-int8-40-rows", (2, 4, 2, 40, 16, 16), kv_dtype=I8, tree="b", alibi="bh", window=(20, 0)),
    Case("tree-window-softcap-splits", (2, 4, 2, 6, 16, 16), capacity=1300, tree="b", window=(900, 0), softcap=3.0),
]
# fmt: on


@pytest.mark.parametrize("backend", ["cpu", TRITON])
@pytest.mark.parametrize("case", TREES, ids=str)
@pytest.mark.usefixtures("poison")
def test_trees_of_drafted_tokens(case: Case, backend: str) -> None:
    test_matches_the_definition(case, backend)


@pytest.mark.parametrize("case", TREES, ids=str)
def test_a_tree_is_its_branches(case: Case) -> None:
    """In float64: each row of a tree, alone in a cache that was filled along its branch."""
    case = replace(case, append=True, kv_dtype=None, dtype=torch.float64, layout="bnhd" if case.page else case.layout)
    cache, arguments = make(case, 3)
    tree = arguments.pop("tree_mask").expand(case.sizes[0], -1, -1)
    out, _ = run("cpu", cache, {**arguments, "tree_mask": tree})
    for b in range(case.sizes[0]):
        one = {k: v[b : b + 1] if isinstance(v, Tensor) and v.dim() == 4 else v for k, v in arguments.items()}
        if case.alibi == "bh":
            one["alibi_slopes"] = arguments["alibi_slopes"][b : b + 1]
        for i in range(case.sizes[3]):
            branch = tree[b, i].nonzero()[:, 0]
            along = {k: v[:, :, branch] if isinstance(v, Tensor) and v.dim() == 4 else v for k, v in one.items()}
            if isinstance(cache, PagedKVCache):
                alone: Cache = replace(
                    cache, block_table=cache.block_table[b : b + 1], lengths=cache.lengths[b : b + 1]
                )
            else:
                alone = KVCache(cache.key[b : b + 1], cache.value[b : b + 1], cache.lengths[b : b + 1])
            single, _ = run("reference", alone, along)
            torch.testing.assert_close(single.output[:, :, -1], out.output[b : b + 1, :, i])
