"""What the CUDA backend says it can do, what it would launch, and how a launch that cannot run is reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fused_attention.backends import cuda, cuda_decode, params
from fused_attention.cache import DecodeSpec
from fused_attention.spec import AttentionSpec, Device

from .cuda_support import needs_kernels

pytestmark = pytest.mark.fast

SM_80 = Device("cuda", "sm_80")
PLAIN = AttentionSpec(2, 8, 2, 300, 500, 64, 64, torch.bfloat16, 0.125)
# What the largest kernels may use on sm_86, sm_89 and sm_12x.
MOST_SHARED = 99 * 1024


def _args(spec: AttentionSpec, **more: Any) -> dict[str, Any]:
    """Arguments with tensors at an address that nobody reads."""
    args = params.describe(spec)
    for name in ("q", "k", "v", "out", "lse", "dout", "delta", "dq", "dk", "dv"):
        args[name] = (16, 0 if name in ("lse", "delta") else params.DTYPE_CODES[spec.dtype])
    return args | more


@pytest.mark.parametrize(
    ("device", "word"),
    [
        (Device("cpu"), "CUDA tensors, not on cpu"),
        (Device("cuda", "gfx942"), "NVIDIA GPUs, not on gfx942"),
        (Device("cuda", "sm_75"), "not built|not for sm_75"),
    ],
)
def test_devices_that_are_refused(device: Device, word: str) -> None:
    reason = cuda.supports(PLAIN, device)
    assert reason is not None
    assert any(part in reason for part in word.split("|")), reason


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"dtype": torch.float32}, "bfloat16 and float16, not float32"),
        ({"head_dim": 264}, "up to 256, not 264"),
        ({"weights": "mean"}, "no attention weights"),
        ({"columns": 1 << 30}, "lengths below"),
        ({"gradients": frozenset({"alibi_slopes"})}, "alibi_slopes"),
        ({"transform": "torch.func"}, "torch.func"),
    ],
)
def test_calls_that_are_refused(change: dict[str, Any], word: str) -> None:
    reason = cuda.unsupported(replace(PLAIN, **change))
    assert reason is not None and word in reason
    assert cuda.unsupported(PLAIN) is None


@pytest.mark.parametrize(
    ("built", "served", "refused"),
    [
        (("80",), ("sm_80", "sm_86", "sm_89"), ("sm_75", "sm_90", "sm_120")),
        (("80", "90a"), ("sm_80", "sm_87", "sm_90"), ("sm_100",)),
        (("86", "120"), ("sm_86", "sm_89", "sm_120", "sm_121"), ("sm_80", "sm_90")),
    ],
)
def test_chips_that_a_build_serves(
    built: tuple[str, ...], served: tuple[str, ...], refused: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "architectures", lambda: built)
    cuda._serves.cache_clear()
    try:
        assert all(cuda.supports(PLAIN, Device("cuda", arch)) is None for arch in served)
        assert all("FUSED_ATTENTION_CUDA_ARCHS" in str(cuda.supports(PLAIN, Device("cuda", arch))) for arch in refused)
    finally:
        cuda._serves.cache_clear()


@needs_kernels
@pytest.mark.parametrize(
    "dims", [(32, 32), (40, 64), (96, 80), (128, 128), (160, 1), (192, 128), (224, 224), (256, 256)]
)
@pytest.mark.parametrize("terms", [False, True])
def test_every_tile_fits_into_the_shared_memory_of_all_chips(dims: tuple[int, int], terms: bool) -> None:
    spec = replace(PLAIN, head_dim=dims[0], value_dim=dims[1])
    more: dict[str, Any] = {"bias": (16, 0, 1, 1, 1, 1), "dbias": (16, 0, 1, 1, 1, 1)} if terms else {}
    forward = params._C.cuda_plan_forward(_args(spec, **more))  # type: ignore[union-attr]
    backward = params._C.cuda_plan_backward(_args(spec, **more, bias_shares=1))  # type: ignore[union-attr]
    assert len(forward) == 1 and len(backward) >= 3
    for kernel, grid, threads, shared, argument in (*forward, *backward):
        assert shared <= MOST_SHARED, kernel
        assert grid > 0 and threads % 32 == 0 and 0 < len(argument) <= 4096


@needs_kernels
def test_the_plan_follows_the_call(say: Callable[[str], None]) -> None:
    """128 rows a block; few rows of grouped heads share one; packed sequences have a bound on their blocks."""
    plan = params._C.cuda_plan_forward  # type: ignore[union-attr]
    ((kernel, grid, threads, shared, _),) = plan(_args(PLAIN))
    assert (kernel, grid, threads, shared) == ("forward_sm80_bf16_d64", 2 * 8 * 3, 128, 48 * 1024 + 16)
    ((kernel, grid, *_),) = plan(_args(replace(PLAIN, rows=40), softcap=3.0))
    assert (kernel, grid) == ("forward_sm80_bf16_d64_options", 2 * 2 * 2)
    packed = _args(PLAIN, cu_seqlens_q=16, cu_seqlens_k=16, total_rows=310, total_keys=510)
    assert plan(packed)[0][1] == 8 * min(2 * 3, 3 + 2)
    assert plan(_args(replace(PLAIN, batch=0))) == [] and plan(_args(replace(PLAIN, rows=0))) == []
    assert plan(_args(replace(PLAIN, columns=0)))[0][1] > 0  # zeros are written
    say(f"explain would say: {cuda.plan(replace(PLAIN, gradients=frozenset({'query', 'key'})), SM_80)}")


@needs_kernels
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which would run it")
def test_a_launch_that_cannot_run_says_why() -> None:
    with pytest.raises(RuntimeError, match="forward_sm80_bf16_d64: cudaError"):
        params._C.cuda_forward(_args(PLAIN), 0)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="CUDA kernels: head dims up to 256"):
        params._C.cuda_forward(_args(replace(PLAIN, head_dim=300)), 0)  # type: ignore[union-attr]


def test_splits_of_the_keys() -> None:
    spec = DecodeSpec(1, 8, 8, 1, 8192, 128, 128, torch.bfloat16, torch.bfloat16, 0.1)
    assert cuda_decode.split_count(spec, 108) == 12  # 96 of 108 blocks
    assert cuda_decode.split_count(replace(spec, batch=64), 108) == 1
    assert cuda_decode.split_count(replace(spec, batch_invariant=True), 108) == 16
    assert cuda_decode.split_count(replace(spec, window=(500, 0)), 108) == 1
    assert cuda_decode.split_count(replace(spec, batch=0), 108) >= 1
