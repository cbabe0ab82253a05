"""The launches that the launchers of the Triton kernels make for a chip, by name, on a machine without that chip."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from fused_attention.backends.triton import append, attention, decode, gradients
from fused_attention.backends.triton.launch import Launch
from fused_attention.cache import DecodeInputs, DecodeSpec, KVCache
from fused_attention.spec import Inputs, Options, make_spec

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
DIMS = (64, 128, 256, 512)
PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}


class Job(NamedTuple):
    """One call to compile; precision: of float32 products, as torch.set_float32_matmul_precision has it."""

    kernel: str
    arch: str
    dtype: str
    dim: int
    precision: str = "highest"


def long_sequence(dtype: torch.dtype, dim: int, heads: int = 8, tokens: int = 4096) -> Inputs:
    """Tensors [1, heads, tokens, dim] whose values nobody reads."""
    shape = (1, heads, tokens, dim)
    return Inputs(*(torch.empty(shape, dtype=dtype) for _ in range(3)))


def _forward(arch: str, dtype: torch.dtype, dim: int) -> list[Launch]:
    x = long_sequence(dtype, dim)
    return attention.forward_launches(make_spec(x, Options(causal="top_left")), x, arch)[0]


def _backward(arch: str, dtype: torch.dtype, dim: int) -> list[Launch]:
    x = long_sequence(dtype, dim)
    spec = replace(make_spec(x, Options(causal="top_left")), gradients=frozenset(("query", "key", "value")))
    _, out = attention.forward_launches(spec, x, arch)
    return gradients.backward_launches(spec, x, out, (torch.empty_like(out.output), None, None), arch)[0]


def _decode(kv_dtype: torch.dtype | None) -> Callable[[str, torch.dtype, int], list[Launch]]:
    """One token for each of 16 sequences, 32 heads that share 8 key heads, appended to a cache and turned by RoPE."""

    def launches(arch: str, dtype: torch.dtype, dim: int) -> list[Launch]:
        batch, heads, kv_heads, capacity = 16, 32, 8, 8192
        cache = KVCache.allocate(batch, kv_heads, capacity, dim, dtype=dtype, kv_dtype=kv_dtype)
        new = [torch.empty(batch, n, 1, dim, dtype=dtype) for n in (heads, kv_heads, kv_heads)]
        tables = [torch.empty(capacity, dim // 2) for _ in range(2)]
        x = DecodeInputs(*new, *tables)
        shape = (batch, heads, kv_heads, 1, capacity, dim, dim)
        spec = DecodeSpec(*shape, dtype, cache.kv_dtype, dim**-0.5, appends=True, rotary_dim=dim)
        store = decode.store_of(spec, cache, arch)
        first, query = append.append_launches(spec, x, store)
        return first + decode.decode_launches(spec, x._replace(query=query), store, arch, PROCESSORS[arch])[0]

    return launches


KERNELS: dict[str, Callable[[str, torch.dtype, int], list[Launch]]] = {
    "forward": _forward,
    "backward": _backward,
    "decode": _decode(None),
    "decode int8": _decode(torch.int8),
    "decode fp8": _decode(torch.float8_e4m3fn),
}


def launches(job: Job) -> list[Launch]:
    """What the launchers would launch for a job."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(job.precision)
    try:
        return KERNELS[job.kernel](job.arch, DTYPES[job.dtype], job.dim)
    finally:
        torch.set_float32_matmul_precision(before)


def jobs(kernels: list[str], archs: list[str], dims: list[int], dtype: str = "bfloat16") -> Iterator[Job]:
    """Every combination, by kernel, chip and head dim."""
    for kernel in kernels:
        for arch in archs:
            for dim in dims:
                yield Job(kernel, arch, dtype, dim)
