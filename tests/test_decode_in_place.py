"""The CPU's kernels read a cache where it lies: pages, codes, up to 16 rows; against copies, and without making any."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from fused_attention.backends import cpu, cpu_decode, reference_decode
from fused_attention.cache import Cache, DecodeInputs, KVCache, PagedKVCache, describe
from fused_attention.decode import decode_attention
from fused_attention.dispatch import use_backend
from fused_attention.functional import AttentionResult
from fused_attention.spec import Options

from .test_decode import BF16, F8, F16, F32, I8, INF, NAN, Case, check, make, run

pytestmark = pytest.mark.skipif(cpu._C is None, reason="the C++ extension is not built")

STORES = [(F32, F32), (F32, BF16), (F32, F16), (F32, I8), (F32, F8), (BF16, BF16), (BF16, I8), (F16, F16), (F16, F8)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Rows below, at and above whole groups of 4 and of 32; pages smaller and larger than a tile of 128 keys, and no power
# of two; head dims that fill vectors of every width, and some that do not.
SHAPES = [
    ((2, 8, 1, 1, 64, 64), None),
    ((2, 8, 1, 1, 64, 64), 16),
    ((2, 4, 2, 3, 64, 128), 1),
    ((2, 4, 4, 1, 128, 64), 48),
    ((1, 2, 2, 2, 32, 32), 300),
    ((2, 6, 2, 5, 96, 32), 7),
    ((2, 6, 1, 16, 64, 64), 32),
    ((1, 2, 1, 9, 20, 12), 128),
    ((1, 5, 1, 8, 33, 65), None),
]


@pytest.mark.parametrize(("dtype", "kv_dtype"), STORES, ids=lambda d: _name(d))
@pytest.mark.parametrize(("sizes", "page"), SHAPES, ids=str)
@pytest.mark.usefixtures("poison")
def test_shapes(sizes: Any, page: int | None, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    case = Case("", sizes, 700, dtype, kv_dtype, page, append=False, layout="bhnd" if page else "bnhd", spread=30.0)
    check(case, "cpu")


@pytest.mark.parametrize("rows", range(1, 17))
def test_options_at_every_number_of_rows(rows: int) -> None:
    case = Case("", (2, 4, 2, rows, 32, 32), 450, BF16, I8, 16, window=(200, 0), softcap=5.0, alibi="bh", sinks=True)
    check(case, "cpu")


@pytest.mark.parametrize("kv_dtype", [F32, BF16, I8, F8], ids=_name)
@pytest.mark.parametrize("page", [None, 16])
def test_no_copy_is_made(page: int | None, kv_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by us nor by a kernel: what 16 rows need beside the cache does not grow with it."""
    monkeypatch.setattr(reference_decode, "dense", lambda *_: pytest.fail("the cache was copied"))
    monkeypatch.setattr(reference_decode, "_dense", lambda *_: pytest.fail("the cache was copied"))
    cache, arguments = make(Case("", (1, 4, 2, 16, 64, 64), 2000, F32, kv_dtype, page, append=False))
    cache.lengths.fill_(2000)
    with use_backend("cpu"), torch.profiler.profile(profile_memory=True) as found:
        decode_attention(cache=cache, **arguments)
    largest = max((e.cpu_memory_usage for e in found.events()), default=0)
    assert largest <= 4 * 16 * 64 * 4, f"{largest} bytes at once; the output has {4 * 16 * 64 * 4}"


def test_more_rows_work_on_a_copy() -> None:
    for rows, in_place in ((16, True), (17, False)):
        cache, arguments = make(Case("", (1, 2, 1, rows, 16, 16), 60, F32, I8, 16, append=False))
        spec = describe(cache, DecodeInputs(arguments["query"]), Options())
        assert cpu_decode.reads_in_place(spec) == in_place
        assert not cpu_decode.reads_in_place(replace(spec, dtype=torch.float64))


@pytest.mark.parametrize("kv_dtype", [F32, BF16, F16, I8, F8], ids=_name)
@pytest.mark.parametrize("page", [None, 16])
def test_threads_change_no_bit(page: int | None, kv_dtype: torch.dtype) -> None:
    cache, arguments = make(Case("", (2, 8, 2, 4, 64, 64), 3000, F32, kv_dtype, page, append=False))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run("cpu", cache, arguments)[0].output)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("kv_dtype", [F32, I8, F8], ids=_name)
def test_pages_change_no_bit(kv_dtype: torch.dtype) -> None:
    """The same tokens in pages of several sizes and in one block."""
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, h, n, 64, generator=g) for h, n in ((4, 3), (2, 600), (2, 600)))
    found = []
    for page in (None, 1, 16, 128, 999):
        cache: Cache = KVCache.allocate(2, 2, 999, 64, kv_dtype=kv_dtype)
        if page is not None:
            slots = -(-999 // page)
            table = torch.randperm(2 * slots, generator=g).int().reshape(2, slots)
            cache = PagedKVCache.allocate(table, 2 * slots, 2, page, 64, kv_dtype=kv_dtype)
        decode_attention(query[:, :, :1].expand(-1, -1, 600, -1), cache, key, value)
        with use_backend("cpu"):
            found.append(decode_attention(query, cache))
    assert all(torch.equal(found[0], other) for other in found[1:])  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["scale", "code"])
def test_codes_and_scales_that_are_not_numbers(what: str) -> None:
    """NaN in a token that is seen reaches the rows that see it, in a tile where nothing is hidden and in one where
    something is; NaN in a hidden token reaches nobody."""
    for length, at in ((256, 5), (300, 280)):
        cache, arguments = make(Case("", (1, 4, 2, 4, 64, 64), 384, F32, F8, append=False))
        cache.lengths.fill_(length)
        clean, _ = run("cpu", cache, arguments)
        for n in (at, length + 3):
            if what == "scale":
                assert cache.value_scale is not None
                cache.value_scale[0, 1, n] = NAN
            else:
                cache.value[0, 1, n, 7] = NAN
        spoiled, _ = run("cpu", cache, arguments)
        expected, _ = run("reference", cache, arguments)
        torch.testing.assert_close(spoiled.output, expected.output, equal_nan=True)
        assert torch.equal(spoiled.output[:, :2], clean.output[:, :2]), "another key head"
        assert spoiled.output[:, 2:, :, 7].isnan().all()
        assert spoiled.output[:, 2:, :, 8].isnan().all() == (what == "scale")


def test_pages_that_do_not_exist_and_were_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no check could look: NaN in the sequence that it concerns, and nothing outside the storage is read."""
    monkeypatch.setattr("fused_attention.cache.checks._check_values", lambda *_: None)
    for kv_dtype in (F32, I8, F8):
        cache, arguments = make(Case("", (3, 2, 1, 2, 32, 32), 300, F32, kv_dtype, 16, append=False))
        assert isinstance(cache, PagedKVCache)
        cache.lengths.copy_(torch.tensor([40, 300, 20]))
        cache.block_table[0, 1], cache.block_table[1, 18] = 1 << 30, -5
        cache.block_table[2, 2:] = -1  # unused
        out, _ = run("cpu", cache, arguments)
        assert isinstance(out, AttentionResult) and out.lse is not None
        assert out.output[:2].isnan().all() and out.lse[:2].isnan().all()
        assert out.output[2].isfinite().all() and out.lse[2].isfinite().all()


def test_every_code_counts() -> None:
    """All 256 codes of a key and of a value, in vectors and in what is left behind them, seen and behind the length."""
    for kv_dtype in (I8, F8):
        for dim in (256, 255):
            codes = torch.arange(256, dtype=torch.uint8)[:dim].view(kv_dtype)
            numbers = codes.float().nan_to_num(0.0)
            cache = KVCache.allocate(1, 1, 2, dim, kv_dtype=kv_dtype)
            for t in (cache.key, cache.value):
                reference_decode._bits(t).zero_()
            cache.key[0, 0, 0] = numbers.to(kv_dtype)
            cache.value[0, 0, 0] = codes
            assert cache.key_scale is not None and cache.value_scale is not None
            cache.key_scale[:], cache.value_scale[:] = 1.0, 1.0
            cache.value_scale[0, 0, 1] = INF
            cache.lengths.fill_(1)
            query = torch.zeros(1, 1, 1, dim)
            for i in range(0, dim, 17):
                query.zero_()
                query[..., i] = 1.0
                out, _ = run("cpu", cache, {"query": query, "scale": 1.0})
                assert out.lse is not None and out.lse.item() == numbers[i].item()
                torch.testing.assert_close(out.output[0, 0, 0], codes.float(), rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("isa", cpu.info().get("isas", [])[:-1])
def test_on_the_other_instruction_sets(isa: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-m", "not slow"]
    done = subprocess.run(
        command, env={**os.environ, "FUSED_ATTENTION_CPU_ISA": isa}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-3000:]
