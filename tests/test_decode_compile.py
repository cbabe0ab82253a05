"""The decoding kernels, compiled for chips that are not here: no register spilled, shared memory within the chip's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from fused_attention.cache import Cache, DecodeInputs, KVCache, PagedKVCache, describe
from fused_attention.spec import Options

from .triton_support import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 puts the interpreter in the compiler's place")

ahead = pytest.importorskip("fused_attention.backends.triton.ahead", reason="Triton is not installed")

SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
PROCESSORS = 108

F32, F16, BF16, I8, F8 = torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn
EVERYTHING = {"window": (1000, 0), "softcap": 30.0, "alibi": True, "sinks": True}


@dataclass(frozen=True)
class Case:
    """Rows M, query heads per key head, head dims, storage and options of one call on a cache of 8192 tokens."""

    name: str
    rows: int
    group: int
    dims: tuple[int, int]
    dtype: torch.dtype
    kv_dtype: torch.dtype | None = None
    page: int | None = None
    rolls: bool = False
    interleaved: bool = False
    precision: str = "highest"
    tree: bool = False
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.name


# fmt: off
CASES = [
    Case("plain", 1, 4, (128, 128), BF16),
    Case("D80", 1, 1, (80, 80), F16, interleaved=True),
    Case("paged-rows-everything", 8, 8, (128, 128), BF16, page=16, options=EVERYTHING),
    Case("D192-DV128-rows-everything", 8, 8, (192, 128), BF16, page=64, options=EVERYTHING),
    Case("D512-paged-everything", 1, 4, (512, 512), BF16, page=16, options=EVERYTHING),
    Case("int8-paged-everything", 1, 4, (128, 128), F16, I8, page=16, options=EVERYTHING),
    Case("int8-rows-D256", 8, 8, (256, 256), F16, I8),
    Case("fp8-rolling-everything", 1, 4, (128, 128), BF16, F8, rolls=True, options=EVERYTHING),
    Case("fp8-D64", 1, 8, (64, 64), BF16, F8, interleaved=True),
    Case("fp8-rows-paged-everything", 8, 4, (128, 128), BF16, F8, page=16, options=EVERYTHING),
    Case("fp8-D512-paged-everything", 1, 4, (512, 512), F16, F8, page=16, options=EVERYTHING),
    Case("ieee-paged-everything", 8, 4, (128, 128), F32, page=16, options=EVERYTHING),
    Case("tree-rows-paged-everything", 8, 4, (128, 128), BF16, page=16, tree=True, options=EVERYTHING),
    Case("tree-fp8", 16, 4, (128, 128), BF16, F8, tree=True),
    Case("ieee-D512", 1, 4, (512, 512), F32),
    Case("ieee-int8-D256-everything", 1, 4, (256, 256), F32, I8, options=EVERYTHING),
    Case("tf32-D256-paged", 4, 4, (256, 256), F32, page=16, precision="high"),
    Case("tf32-D512", 1, 4, (512, 512), F32, precision="high"),
]
# fmt: on


def launches(case: Case, arch: str) -> list[Any]:
    """What the launchers would launch for a case, 4 sequences and 2 key heads."""
    from fused_attention.backends.triton import decode

    batch, kv_heads, capacity = 4, 2, 8192
    heads, (d, dv) = kv_heads * case.group, case.dims
    cache: Cache
    if case.page is None:
        window = 1000 if case.rolls else None
        cache = KVCache.allocate(batch, kv_heads, capacity, d, dv, case.dtype, case.kv_dtype, window=window)
    else:
        table = torch.arange(batch * capacity // case.page, dtype=torch.int32).reshape(batch, -1)
        cache = PagedKVCache.allocate(table, table.numel(), kv_heads, case.page, d, dv, case.dtype, case.kv_dtype)
    new = [
        torch.empty(batch, h, case.rows, e, dtype=case.dtype) for h, e in ((heads, d), (kv_heads, d), (kv_heads, dv))
    ]
    tables = [torch.empty(capacity, d // 4) for _ in range(2)]  # half of the dims are turned
    options = dict(case.options)
    slopes = torch.empty(1, heads) if options.pop("alibi", False) else None
    sinks = torch.empty(heads, dtype=case.dtype) if options.pop("sinks", False) else None
    left, right = options.pop("window", (None, None))
    tree = torch.ones(batch, case.rows, case.rows).tril().bool() if case.tree else None
    x = DecodeInputs(*new, *tables, slopes, sinks, tree)
    spec = describe(cache, x, Options(window_left=left, window_right=right, **options), case.interleaved)
    assert decode.decode_splits(PROCESSORS, batch, kv_heads, 1, capacity) > 1
    return decode.launches(spec, cache, x, arch, PROCESSORS)[0]


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_without_spills(case: Case, arch: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(case.precision)
    try:
        todo = launches(case, arch)
    finally:
        torch.set_float32_matmul_precision(before)
    assert [k.kernel.__name__ for k in todo] == ["append_kernel", "decode_kernel", "combine_kernel"]
    for compiled in ahead.compile_ahead(todo, arch):
        found = ahead.resources(compiled, arch)
        assert found.spilled_bytes == 0, found
        assert found.shared_bytes <= SHARED[arch], found
        if found.name == "decode_kernel":
            # NVIDIA's matrix units have no IEEE float32; AMD's have.
            exact = case.dtype == F32 and case.precision == "highest" and arch.startswith("sm_")
            assert bool(found.matrix) != exact, found
            if arch == "sm_80" and not exact:
                assert set(found.matrix) == {"mma.sync"}


def test_one_split_writes_the_result_itself() -> None:
    """A batch that fills the chip takes one launch to attend, which the sinks then join."""
    from fused_attention.backends.triton import decode

    cache = KVCache.allocate(66, 4, 1024, 64, dtype=BF16)
    x = DecodeInputs(torch.empty(66, 32, 1, 64, dtype=BF16), sinks=torch.empty(32))
    todo, _ = decode.launches(describe(cache, x, Options()), cache, x, "sm_90", 132)
    assert [k.kernel.__name__ for k in todo] == ["decode_kernel"]
    (compiled,) = ahead.compile_ahead(todo, "sm_90")
    assert ahead.resources(compiled, "sm_90").spilled_bytes == 0
