"""The Triton kernels as the compiler makes them for sm_80 and sm_90, run in the PTX emulator, by the tolerance rule.

The launches are the launchers' own, with the tiles of the chip. Each runs under several schedules: no race may be
reported, and every schedule must give the same bits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from fused_attention import dispatch
from fused_attention.functional import AttentionResult
from fused_attention.spec import Inputs, Options, make_spec

from . import test_decode
from .cases import Case, check
from .triton_support import INTERPRETED

triton = pytest.importorskip("triton", reason="Triton is not installed")
if INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1 puts an interpreter in the compiler's place", allow_module_level=True)

import triton.language as tl  # noqa: E402

from benchmarks.gpu_kernels import PROCESSORS  # noqa: E402
from fused_attention.backends.triton import ahead, attention, decode  # noqa: E402
from fused_attention.backends.triton.launch import Launch  # noqa: E402

from .emulator_support import Emulated, emulate  # noqa: E402
from .ptx_emulator import EmulationError  # noqa: E402

pytestmark = pytest.mark.emulator

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ARCHS = ("sm_80", "sm_90")
Say = Callable[[str], None]


@pytest.fixture(autouse=True)
def _poisoned_memory(poison: None) -> None:
    """torch.empty holds NaN here, so that what a kernel does not write is seen."""


# fmt: off
RAGGED = [
    Case("causal-gqa-lengths", (1, 4, 2, 113, 203, 64, 64), causal="bottom_right", key_lengths=True, nan_hidden=True),
    Case("mask", (1, 2, 1, 77, 150, 40, 64), mask="bool:b1mn", dead=True),
]
OPTIONS = [
    (Case("D128", (1, 2, 1, 130, 257, 128, 128), causal="top_left"), "bf16 fp16"),
    (Case("everything", (1, 4, 2, 61, 77, 40, 24), causal="bottom_right", window=(30, 5), softcap=4.0,
          mask="float:b1mn", bias="half:1hmn", alibi="bh", sinks=True, key_lengths=True, dropout_p=0.1, weights="mean",
          dead=True), "bf16"),
    (Case("block-map", (1, 4, 2, 113, 203, 64, 64), causal="bottom_right", block_map="1h:0.5:32x64", nan_hidden=True),
     "bf16"),
    (Case("packed", (3, 2, 1, 65, 70, 64, 64), packed=((65, 1, 0), (70, 2, 5)), causal="bottom_right", window=(11, 0)),
     "fp16"),
]
# fmt: on


def _check(case: Case, arch: str, dtype: str, seeds: range, monkeypatch: pytest.MonkeyPatch, say: Say) -> None:
    emulated = Emulated(arch, seeds)
    monkeypatch.setitem(dispatch.BACKENDS, "emulated", cast(Any, emulated))
    check(case, "emulated", DTYPES[dtype], values=1)
    assert {n for n, _, _ in emulated.reports} >= {
        "forward_kernel",
        "delta_kernel",
        "query_gradient_kernel",
        "key_gradient_kernel",
    }
    say(f"{case} {dtype}\n{emulated.summary()}")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", RAGGED, ids=str)
def test_ragged_shapes(case: Case, dtype: str, arch: str, monkeypatch: pytest.MonkeyPatch, say: Say) -> None:
    _check(case, arch, dtype, range(8), monkeypatch, say)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("case", "dtype"), [pytest.param(c, d, id=f"{c}-{d}") for c, ds in OPTIONS for d in ds.split()]
)
def test_options(case: Case, dtype: str, arch: str, monkeypatch: pytest.MonkeyPatch, say: Say) -> None:
    _check(case, arch, dtype, range(2), monkeypatch, say)


# --- decoding -----------------------------------------------------------------------------------------------------
DECODE = ("bf16", "fp16-rows", "int8-fp16-rope-paged", "bf16-fp8", "splits-window-alibi", "tree-shared-fp16-rope")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", [c for c in test_decode.CASES + test_decode.TREES if c.name in DECODE], ids=str)
def test_decoding(case: test_decode.Case, arch: str, monkeypatch: pytest.MonkeyPatch, say: Say) -> None:
    emulated = Emulated(arch, range(4))

    def run(backend: str, cache: Any, arguments: dict[str, Any], device: str | None) -> tuple[AttentionResult, Any]:
        cache = copy.deepcopy(cache)
        spec, x = test_decode.described(cache, arguments)
        launches, out = decode.launches(spec, cache, x, arch, PROCESSORS[arch])
        emulated.run(launches, [out.output, out.lse])
        return AttentionResult(out.output, out.lse, None), cache

    monkeypatch.setattr(test_decode, "run", run)
    test_decode.check(case, "emulated")
    ran = {name for name, _, _ in emulated.reports}
    assert {"append_kernel", "decode_kernel"} <= ran and ("combine_kernel" in ran) == case.name.startswith("splits")
    say(f"decoding {case}\n{emulated.summary()}")


# --- the emulator against another reading of the PTX ISA: the layouts that Triton's compiler has ------------------
@triton.jit
def product_kernel(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x, y = tl.load(a + m[:, None] * K + k[None, :]), tl.load(b + k[:, None] * N + n[None, :])
    integer: tl.constexpr = a.dtype.element_ty == tl.int8
    product = tl.dot(x, y, input_precision=PRECISION, out_dtype=tl.int32 if integer else tl.float32)
    tl.store(c + m[:, None] * N + n[None, :], product)


PRODUCTS = [
    ("sm_80", torch.float32, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"),
    ("sm_80", torch.int8, "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"),
    ("sm_89", torch.float8_e4m3fn, "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"),
    ("sm_89", torch.float8_e5m2, "mma.sync.aligned.m16n8k32.row.col.f32.e5m2.e5m2.f32"),
    ("sm_90", torch.float32, "wgmma.mma_async.sync.aligned.m64n64k8.f32.tf32.tf32"),
    ("sm_90", torch.float8_e4m3fn, "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3"),
    ("sm_90", torch.int8, "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8"),
]


@pytest.mark.parametrize(("arch", "dtype", "opcode"), PRODUCTS, ids=lambda v: str(v).removeprefix("torch."))
def test_products_of_other_dtypes(arch: str, dtype: torch.dtype, opcode: str) -> None:
    g = torch.Generator().manual_seed(0)
    size = (64, 64)
    if dtype == torch.int8:
        a, b = (torch.randint(-128, 128, size, generator=g, dtype=dtype) for _ in range(2))
    else:
        a, b = (torch.randn(size, generator=g).to(dtype) for _ in range(2))
    c = torch.empty(size, dtype=torch.int32 if dtype == torch.int8 else torch.float32)
    options = {"M": 64, "N": 64, "K": 64, "PRECISION": "tf32", "num_warps": 4}
    launch = Launch(product_kernel, (1,), (a, b, c), options)
    (compiled,) = ahead.compile_ahead([launch], arch)
    for seed in range(2):
        report = emulate(launch, compiled, seed)
        assert report.instructions[opcode] > 0 and not report.races, report.instructions
        exact = a.double() @ b.double()
        # tf32 keeps 10 bits of each factor.
        allowed = (a.double().abs() @ b.double().abs()) * (2.0**-9 if dtype == torch.float32 else 2.0**-20)
        assert ((c.double() - exact).abs() <= allowed).all()


# --- bugs in compiled Triton code are caught too ------------------------------------------------------------------
@pytest.mark.parametrize(("arch", "line"), [("sm_80", "bar.sync"), ("sm_80", "cp.async.wait_group"),
                                            ("sm_90", "mbarrier.try_wait"), ("sm_90", "wgmma.wait_group")])  # fmt: skip
def test_a_line_that_is_missing_is_caught(arch: str, line: str) -> None:
    """The forward kernel without its barriers, or without its waits."""
    q, k, v = (torch.randn(1, 1, 300, 64, dtype=torch.bfloat16) for _ in range(3))
    x = Inputs(q, k, v)
    (launch,), _ = attention.forward_launches(make_spec(x, Options()), x, arch)
    (compiled,) = ahead.compile_ahead([launch], arch)
    text = compiled.asm["ptx"]
    kept = [s if line not in s else s.replace(s.strip(), "") for s in text.splitlines()]
    if line == "mbarrier.try_wait":  # with the loop around it, which no longer ends
        kept = [s if "waitLoop;" not in s else "" for s in kept]
    assert kept != text.splitlines()
    broken = replace_ptx(compiled, "\n".join(kept) + "\n")
    try:
        races = emulate(launch, broken, 1).races
    except EmulationError as e:
        races = [str(e)]
    assert races and ("is not ordered after" in races[0] or "mbarrier" in races[0])


def replace_ptx(compiled: Any, text: str) -> Any:
    found = copy.copy(compiled)
    found.asm = {**compiled.asm, "ptx": text}
    return found


def test_cases_reach_past_their_tiles() -> None:
    """Otherwise the ragged shapes would be whole tiles."""
    for case in RAGGED:
        assert all(n % 16 for n in case.sizes[3:5]), case
        assert replace(case, dead=False).sizes == case.sizes
