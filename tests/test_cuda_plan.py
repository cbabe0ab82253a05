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

SM_80, SM_90 = Device("cuda", "sm_80"), Device("cuda", "sm_90")
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
    ("change", "device", "word"),
    [
        ({}, SM_80, "by kernels for sm_90a (FUSED_ATTENTION_CUDA_ARCHS), not on sm_80"),
        ({"dtype": torch.float32}, SM_90, "bfloat16 and float16, not float32"),
        ({"head_dim": 264}, SM_90, "up to 256, not 264"),
        ({"weights": "heads"}, SM_90, "no attention weights"),
        ({"gradients": frozenset({"query"})}, SM_90, "no gradients with products in fp8"),
        ({"transform": "torch.func"}, SM_90, "torch.func"),
    ],
)
def test_calls_in_fp8_that_are_refused(
    change: dict[str, Any], device: Device, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "architectures", lambda: ("80", "90a"))
    monkeypatch.setattr(cuda, "_serves", lambda arch: True)
    spec = replace(PLAIN, precision="fp8")
    assert cuda.supports(spec, SM_90) is None
    options = {"mask": torch.bool, "bias": torch.float32, "sinks": True, "softcap": 3.0, "dropout_p": 0.1}
    assert cuda.supports(replace(spec, **options), SM_90) is None  # type: ignore[arg-type]
    assert word in str(cuda.supports(replace(spec, **change), device))
    monkeypatch.setattr(cuda, "architectures", lambda: ("80",))
    assert "by kernels for sm_90a" in str(cuda.supports(spec, SM_90))


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
    for kernel, grid, threads, shared, argument, maps in (*forward, *backward):
        assert shared <= MOST_SHARED, kernel
        assert grid > 0 and threads % 32 == 0 and 0 < len(argument) <= 4096 and not maps


@needs_kernels
def test_the_plan_follows_the_call(say: Callable[[str], None]) -> None:
    """128 rows a block; few rows of grouped heads share one; packed sequences have a bound on their blocks."""
    plan = params._C.cuda_plan_forward  # type: ignore[union-attr]
    ((kernel, grid, threads, shared, *_),) = plan(_args(PLAIN))
    assert (kernel, grid, threads, shared) == ("forward_sm80_bf16_d64", 2 * 8 * 3, 128, 48 * 1024 + 16)
    ((kernel, grid, *_),) = plan(_args(replace(PLAIN, rows=40), softcap=3.0))
    assert (kernel, grid) == ("forward_sm80_bf16_d64_options", 2 * 2 * 2)
    packed = _args(PLAIN, cu_seqlens_q=16, cu_seqlens_k=16, total_rows=310, total_keys=510)
    assert plan(packed)[0][1] == 8 * min(2 * 3, 3 + 2)
    assert plan(_args(replace(PLAIN, batch=0))) == [] and plan(_args(replace(PLAIN, rows=0))) == []
    assert plan(_args(replace(PLAIN, columns=0)))[0][1] > 0  # zeros are written
    for device in (SM_80, SM_90):
        say(f"explain would say: {cuda.plan(replace(PLAIN, gradients=frozenset({'query', 'key'})), device)}")


def _rows(spec: AttentionSpec, heads: int, rows: int, dims: int) -> tuple[int, ...]:
    return (1 << 20, params.DTYPE_CODES[spec.dtype], heads * rows * dims, rows * dims, dims, 1)


def _args_sm90(spec: AttentionSpec, **more: Any) -> dict[str, Any]:
    """Arguments with dense tensors, for a chip of 132 multiprocessors."""
    args = _args(spec, arch=90, processors=132)
    args["q"] = _rows(spec, spec.heads, spec.rows, spec.head_dim)
    args["k"] = _rows(spec, spec.kv_heads, spec.columns, spec.head_dim)
    args["v"] = _rows(spec, spec.kv_heads, spec.columns, spec.value_dim)
    return args | more


@needs_kernels
@pytest.mark.parametrize("dims", [(32, 32), (64, 64), (96, 80), (128, 128), (160, 8), (192, 128), (256, 256)])
@pytest.mark.parametrize("terms", [False, True])
def test_the_plan_for_sm_90(dims: tuple[int, int], terms: bool) -> None:
    spec = replace(PLAIN, head_dim=dims[0], value_dim=dims[1])
    bias: dict[str, Any] = {"bias": (16, 0, 1, 1, 1, 1)} if terms else {}
    plan = params._C.cuda_plan_forward  # type: ignore[union-attr]
    ((kernel, grid, threads, shared, argument, maps),) = plan(_args_sm90(spec, **bias))
    tile = 64 if max(dims) <= 64 else 128 if max(dims) <= 128 else 256
    assert kernel == f"forward_sm90_bf16_d{tile}{'_options' if terms else ''}"
    assert (grid, threads) == (2 * 8 * 3, 384) and shared <= 227 * 1024 and len(argument) <= 4096
    assert plan(_args_sm90(replace(spec, rows=5000), **bias))[0][1] == 132
    # The innermost dimension first: columns, rows, heads, batch.
    for (offset, address, code, sizes, strides, box), (heads, rows, columns) in zip(
        maps, ((8, 300, dims[0]), (2, 500, dims[0]), (2, 500, dims[1])), strict=True
    ):
        assert offset % 64 == 0 and offset + 128 <= len(argument) and address == 1 << 20 and code == 1
        assert sizes == [columns, rows, heads, 2]
        assert strides == [2 * columns, 2 * columns * rows, 2 * columns * rows * heads]
        assert box[0] * 2 == 128 and all(0 < n <= 256 for n in box)


@needs_kernels
@pytest.mark.parametrize(
    ("change", "sm90"),
    [
        ({}, True),
        ({"k": (1 << 20, 1, 0, 64 * 500, 64, 1)}, True),  # one batch element for all
        ({"v": (1 << 20, 1, 64 * 1000, 0, 64, 1)}, True),
        ({"k": ((1 << 20) + 2, 1, 64 * 1000, 64 * 500, 64, 1)}, False),  # the address
        ({"q": (1 << 20, 1, 65 * 2400, 65 * 300, 65, 1)}, False),  # rows of 130 bytes
        ({"v": (1 << 20, 1, 64 * 1000, 64 * 500 + 4, 64, 1)}, False),  # heads
        ({"k": (1 << 20, 1, 64, 64, 0, 1)}, False),  # rows that share memory
        ({"k": (1 << 20, 1, 1 << 40, 64 * 500, 64, 1)}, False),  # farther than a tensor map can say
        ({"q": (1 << 20, 1, -64, 64 * 300, 64, 1)}, False),
        ({"N": 0}, False),
        ({"arch": 80}, False),
    ],
)
def test_what_the_copy_engine_cannot_read_is_left_to_the_kernels_for_sm_80(change: dict[str, Any], sm90: bool) -> None:
    args = _args_sm90(PLAIN) | change
    kernel = params._C.cuda_plan_forward(args)[0][0]  # type: ignore[union-attr]
    assert kernel == ("forward_sm90_bf16_d64" if sm90 else "forward_sm80_bf16_d64")
    # Few rows of grouped heads: as many rows to a block as the kernel that runs takes.
    args |= {"M": 100, "D": 224, "DV": 224}
    rows, group, *_ = params._C.cuda_blocks(args)  # type: ignore[union-attr]
    assert (rows, group) == ((128, 4) if sm90 else (64, 1))


@needs_kernels
def test_packed_sequences_have_one_map_for_all() -> None:
    packed = _args_sm90(PLAIN, cu_seqlens_q=16, cu_seqlens_k=16, total_rows=310, total_keys=510)
    for name in ("q", "k", "v"):
        packed[name] = (*packed[name][:2], 0, *packed[name][3:])
    ((_, grid, *_, maps),) = params._C.cuda_plan_forward(packed)  # type: ignore[union-attr]
    assert grid == 8 * min(2 * 3, 3 + 2)
    assert [m[3] for m in maps] == [[64, 310, 8, 1], [64, 510, 2, 1], [64, 510, 2, 1]]


def _args_fp8(spec: AttentionSpec, **more: Any) -> dict[str, Any]:
    """Codes beside the call, wherever q, k and v lie: nobody reads them by tensor maps."""
    args = _args(spec, arch=90, processors=132)
    d, blocks = -(-spec.head_dim // 16) * 16, -(-spec.columns // 128)
    for name, heads, rows, columns in (
        ("q", spec.heads, spec.rows, d),
        ("k", spec.kv_heads, spec.columns, d),
        ("v", spec.kv_heads, spec.value_dim, 128 * blocks),
    ):
        args[f"{name}_codes"] = (1 << 20, 6, heads * rows * columns, rows * columns, columns, 1)
        args[f"{name}_scales"] = (1 << 20, 0, heads, 1)
    return args | more


@needs_kernels
@pytest.mark.parametrize("dims", [(32, 32), (64, 64), (96, 80), (128, 128), (160, 8), (192, 128), (256, 256)])
@pytest.mark.parametrize("terms", [False, True])
def test_the_plan_with_products_of_float8(dims: tuple[int, int], terms: bool) -> None:
    spec = replace(PLAIN, head_dim=dims[0], value_dim=dims[1])
    args = _args_fp8(spec, **({"bias": (16, 0, 1, 1, 1, 1)} if terms else {}))
    first, second = params._C.cuda_plan_forward_fp8(args)  # type: ignore[union-attr]
    tile = 64 if max(dims) <= 64 else 128 if max(dims) <= 128 else 256
    kernel, grid, threads, shared, argument, maps = first
    assert (kernel, threads) == (f"fp8_quantise_sm90_bf16_d{tile}", 256) and not maps and shared <= 227 * 1024
    assert grid == 2 * (8 * 3 + 2 * 2 * 4)  # blocks of 128 rows of q, of k and of v
    kernel, grid, threads, shared, again, maps = second
    assert kernel == f"fp8_forward_sm90_bf16_d{tile}{'_options' if terms else ''}" and again == argument
    assert (grid, threads) == (2 * 8 * 3, 384) and shared <= 227 * 1024 and len(argument) <= 4096
    for (offset, address, code, sizes, strides, box), (heads, rows, columns, step) in zip(
        maps,
        (
            (8, 300, dims[0], -(-dims[0] // 16) * 16),
            (2, 500, dims[0], -(-dims[0] // 16) * 16),
            (2, dims[1], 512, 512),  # transposed, keys in whole blocks
        ),
        strict=True,
    ):
        assert offset % 64 == 0 and offset + 128 <= len(argument) and address == 1 << 20 and code == 6
        assert sizes == [columns, rows, heads, 2] and strides == [step, step * rows, step * rows * heads]
        assert box[0] in (32, 64, 128) and all(0 < n <= 256 for n in box)
    assert maps[0][5][:2] == [min(tile, 128), 64] and maps[2][5][1] == tile and maps[1][5][1] == maps[2][5][0]


@needs_kernels
def test_float8_and_packed_sequences_or_nothing_to_multiply() -> None:
    plan = params._C.cuda_plan_forward_fp8  # type: ignore[union-attr]
    packed = _args_fp8(PLAIN, cu_seqlens_q=16, cu_seqlens_k=16, total_rows=310, total_keys=510)
    first, second = plan(packed)
    assert first[1] == 8 * (310 // 128 + 2) + 2 * 2 * (510 // 128 + 2)  # each sequence begins with a block of its own
    assert second[1] == 8 * min(2 * 3, 3 + 2)
    assert [m[3] for m in second[5]] == [[64, 310, 8, 1], [64, 510, 2, 1], [5 * 128, 64, 2, 1]]
    assert [kernel for kernel, *_ in plan(_args_fp8(replace(PLAIN, columns=0)))] == ["forward_sm80_bf16_d64"]  # zeros
    assert plan(_args_fp8(replace(PLAIN, rows=0))) == [] and plan(_args_fp8(replace(PLAIN, batch=0))) == []
    assert "fp8_quantise_sm90_bf16_d64, fp8_forward_sm90_bf16_d64" == cuda.plan(replace(PLAIN, precision="fp8"), SM_90)


def _backward_sm90(spec: AttentionSpec, **more: Any) -> dict[str, list[Any]]:
    """What the gradients of q, k and v would launch, by the name before the chip's."""
    args = _args_sm90(spec, dout=_rows(spec, spec.heads, spec.rows, spec.value_dim)) | more
    plan = params._C.cuda_plan_backward(args)  # type: ignore[union-attr]
    return {kernel.partition("_sm")[0]: [kernel, *rest] for kernel, *rest in plan if kernel.startswith(("q", "k", "v"))}


@needs_kernels
@pytest.mark.parametrize("dims", [(32, 32), (64, 64), (96, 80), (128, 128), (160, 8), (192, 128), (256, 256)])
@pytest.mark.parametrize("terms", [False, True])
def test_the_plan_of_the_gradients_for_sm_90(dims: tuple[int, int], terms: bool) -> None:
    spec = replace(PLAIN, head_dim=dims[0], value_dim=dims[1])
    found = _backward_sm90(spec, **({"bias": (16, 0, 1, 1, 1, 1)} if terms else {}))
    tile = 64 if max(dims) <= 64 else 128 if max(dims) <= 128 else 256
    apart = ("key_gradient", "value_gradient") if tile == 256 else ("key_gradients",)
    assert set(found) == {"query_gradient", *apart}
    for name, (kernel, grid, threads, shared, argument, maps) in found.items():
        assert kernel == f"{name}_sm90_bf16_d{tile}{'_options' if terms else ''}"
        assert grid == (2 * 8 * 3 if name == "query_gradient" else 2 * 2 * 4)
        assert threads == 384 and shared <= 227 * 1024 and len(argument) <= 4096
        assert [m[3] for m in maps] == [
            [dims[0], 300, 8, 2],
            [dims[1], 300, 8, 2],
            [dims[0], 500, 2, 2],
            [dims[1], 500, 2, 2],
        ]
        assert all(m[0] % 64 == 0 and m[0] + 128 <= len(argument) for m in maps)
        boxes = [m[5] for m in maps]
        assert boxes[0] == boxes[1] and boxes[2] == boxes[3] and all(0 < n <= 256 for b in boxes for n in b)
        assert boxes[0 if name == "query_gradient" else 2][1] == 128  # what stays: a block


@needs_kernels
@pytest.mark.parametrize(
    ("change", "options"),
    [
        ({}, False),
        ({"sinks": (16, 0, 1)}, False),
        ({"causal": 2, "window_left": 5}, False),
        ({"softcap": 3.0}, True),
        ({"dropout_p": 0.1}, True),
        ({"scale": -1.0}, True),
        ({"N": 16}, True),  # few keys
        ({"causal": 1, "M": 16}, True),
        ({"causal": 2, "M": 16}, False),
        ({"window_right": 3, "M": 13}, True),
    ],
)
def test_rare_options_have_kernels_of_their_own(change: dict[str, Any], options: bool) -> None:
    for kernel, *_ in _backward_sm90(PLAIN, **change).values():
        assert "_sm90_" in kernel and kernel.endswith("_options") == options


@needs_kernels
def test_gradients_that_the_copy_engine_cannot_read_are_left_to_the_kernels_for_sm_80() -> None:
    odd = {"dout": ((1 << 20) + 2, 1, 64 * 2400, 64 * 300, 64, 1)}
    for change, chip, blocks in (
        ({}, "_sm90_", (128, 128)),
        (odd, "_sm80_", (64, 64)),
        ({"arch": 80}, "_sm80_", (64, 64)),
    ):
        found = _backward_sm90(PLAIN, **change)
        assert len(found) == 2 and all(chip in kernel for kernel, *_ in found.values())
        args = _args_sm90(PLAIN, dout=_rows(PLAIN, 8, 300, 64)) | change
        assert params._C.cuda_blocks(args)[2:] == blocks  # type: ignore[union-attr]


def test_the_kernels_of_a_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "architectures", lambda: ("80", "90a"))
    assert [cuda._kernel_arch(a) for a in ("sm_80", "sm_90", "sm_100", "")] == [80, 90, 80, 80]
    monkeypatch.setattr(cuda, "architectures", lambda: ("80", "90"))
    assert cuda._kernel_arch("sm_90") == 80


@needs_kernels
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which would run it")
def test_a_launch_that_cannot_run_says_why() -> None:
    with pytest.raises(RuntimeError, match="forward_sm80_bf16_d64: cudaError"):
        params._C.cuda_forward(_args(PLAIN), 0)  # type: ignore[union-attr]
    if "90a" in cuda.architectures():
        with pytest.raises(RuntimeError, match="forward_sm90_bf16_d64: "):
            params._C.cuda_forward(_args_sm90(PLAIN), 0)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="CUDA kernels: head dims up to 256"):
        params._C.cuda_forward(_args(replace(PLAIN, head_dim=300)), 0)  # type: ignore[union-attr]


def test_splits_of_the_keys() -> None:
    spec = DecodeSpec(1, 8, 8, 1, 8192, 128, 128, torch.bfloat16, torch.bfloat16, 0.1)
    assert cuda_decode.split_count(spec, 108) == 12  # 96 of 108 blocks
    assert cuda_decode.split_count(replace(spec, batch=64), 108) == 1
    assert cuda_decode.split_count(replace(spec, batch_invariant=True), 108) == 16
    assert cuda_decode.split_count(replace(spec, window=(500, 0)), 108) == 1
    assert cuda_decode.split_count(replace(spec, batch=0), 108) >= 1
