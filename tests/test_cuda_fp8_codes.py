"""The float8 codes and scales that the first kernel of `precision="fp8"` makes, in the PTX emulator, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attention.backends import cuda
from fused_attention.backends.params import _C, Call, describe
from fused_attention.spec import Inputs, Options, make_spec

from .cuda_support import needs_kernels, needs_nvcc
from .fp8_recipe import BLOCK, E4M3, quantise
from .test_cuda_emulated import DTYPES, INF, NAN
from .test_cuda_fp8 import grouped, run

pytestmark = [pytest.mark.emulator, needs_kernels, needs_nvcc]


@pytest.fixture(autouse=True)
def _poisoned_memory(poison: None) -> None:
    """torch.empty holds NaN here, so that what a kernel does not write is seen."""


def _codes(monkeypatch: pytest.MonkeyPatch, x: Inputs, o: Options) -> dict[str, Tensor]:
    """What the first kernel leaves, as tensors."""
    calls: list[Call] = []
    put = cuda._put_codes

    def remember(call: Call, *rest: Any) -> None:
        put(call, *rest)
        calls.append(call)

    with monkeypatch.context() as patch:
        patch.setattr(cuda, "_put_codes", remember)
        run(x, o, monkeypatch)
    (call,) = calls
    by_address = {t.data_ptr(): t for t in call.tensors}
    return {f"{n}_{kind}": by_address[call.args[f"{n}_{kind}"][0]] for n in "qkv" for kind in ("codes", "scales")}


def _in_order(columns: Tensor) -> Tensor:
    """v_codes [..., DV, columns] as [..., keys, DV]: place p of 16 holds key 8 (p / 2 mod 2) + 2 (p / 4) + p mod 2."""
    p = torch.arange(columns.shape[-1])
    key = p // 16 * 16 + p // 2 % 2 * 8 + p % 16 // 4 * 2 + p % 2
    found = torch.empty_like(columns)
    found[..., key] = columns
    return found.mT


def same_bits(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape
    assert torch.equal(got.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8))


@pytest.mark.parametrize(("d", "dtype"), [p for d in (64, 72, 256) for p in grouped("bf16 fp16", d, name=f"D{d}")])
def test_codes_bit_by_bit(d: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of every magnitude, one of zeros, and what is not finite."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 300, d).to(DTYPES[dtype]) for _ in range(3))
    for t, by in ((q, 100.0), (k, 2.0**-20), (v, 0.01)):
        t[:, :, 130:] *= by
    q[:, 1, :128] = 0
    k[0, 0, 3, :4] = torch.tensor([448.0, 449.0, -480.0, 2.0**-9])
    v[0, 1, 7, 5], v[0, 0, 290, 1], q[0, 0, 299, 0] = NAN, INF, -INF
    found = _codes(monkeypatch, Inputs(q, k, v), Options())
    for name, t in (("q", q), ("k", k), ("v", v)):
        want = quantise(t, 300)
        got = found[f"{name}_codes"]
        got = _in_order(got)[..., :300, :] if name == "v" else got[..., :d]
        nan = want.codes.float().isnan()
        assert torch.equal(got.float().isnan(), nan) and bool(nan.any()) == (name != "k")
        same_bits(torch.where(nan, 0, got.float()), torch.where(nan, 0, want.codes.float()))
        same_bits(found[f"{name}_scales"], want.scales)
    assert (_in_order(found["v_codes"])[..., 300:, :].float() == 0).all()  # past the last key


@pytest.mark.parametrize("dtype", grouped("bf16", name="lengths"))
def test_what_is_past_the_end_counts_for_nothing(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a sequence, and of the keys."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 200, 64).to(DTYPES[dtype]) for _ in range(3))
    short = [t[:, :, :150] for t in (q, k, v)]
    k[:, :, 150:], v[:, :, 150:] = 1e30, -1e30
    offsets = torch.tensor([0, 150, 200])
    dense, packed = (
        Inputs(q, k, v, key_lengths=offsets[1:2]),
        Inputs(q, k, v, cu_seqlens_q=offsets, cu_seqlens_k=offsets),
    )
    for x in (dense, packed):
        found = _codes(monkeypatch, x, Options())
        for name, t in zip("kv", short[1:], strict=True):
            assert torch.equal(found[f"{name}_scales"][..., :2], quantise(t, 150).scales)


def test_the_codes_are_those_of_the_extension() -> None:
    """The block of the recipe is that of the kernels."""
    x = Inputs(*(torch.empty(1, 2, 40, 64, dtype=torch.bfloat16) for _ in range(3)))
    args = describe(make_spec(x, Options())) | {"arch": 90}
    assert _C is not None and _C.cuda_fp8_blocks(args) == (128, 1, BLOCK) and E4M3.itemsize == 1
