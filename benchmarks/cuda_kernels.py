"""The CUDA C++ kernels of a call, compiled by nvcc for a chip that need not be here, and what they need and execute."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from triton import knobs

from fused_attention.backends import params
from fused_attention.backends.triton.ahead import Resources
from fused_attention.cache import LIMITS
from fused_attention.spec import Options, make_spec

from .gpu_kernels import DTYPES, PROCESSORS, Job, long_sequence
from .nvcc import SOURCES, nvcc, source_of

ARCHS = ("sm_80", "sm_90")
DIMS = (64, 128, 256)
SHORT = {"bfloat16": "bf16", "float16": "f16"}
ANYWHERE = 16  # an address that nobody reads
E4M3 = params.DTYPE_CODES[torch.float8_e4m3fn]


class Part(NamedTuple):
    """A launch of a job, as csrc/cuda/plan.h plans it, and what a tile of scores means to it.

    products: matrix products of a tile, of all its head dims each; 0 where there is none. side: its rows or keys, which
    the kernel holds; the other side is what it steps over. key_bytes: of keys and values read for one key.
    """

    kernel: str
    threads: int
    shared_bytes: int
    products: int = 0
    side: str = ""
    size: int = 0
    key_bytes: int = 0

    @property
    def computing(self) -> int:
        """Warps that compute; of the kernels for sm_90a a warpgroup brings what the others need."""
        return self.threads // 32 - (4 if "_sm90_" in self.kernel else 0)


class Compiled(NamedTuple):
    """What nvcc made of a part, and the disassembly."""

    part: Part
    resources: Resources
    sass: str


# --- the launches of a job --------------------------------------------------------------------------------------


def _plan(kind: str, args: dict[str, Any]) -> list[tuple[str, int, int]]:
    """Kernel, threads and bytes of shared memory of each launch."""
    plan = getattr(params._C, f"cuda_plan_{kind}", None)
    if plan is None:
        raise RuntimeError("the CUDA kernels are not built, and with them the planner of their launches is missing")
    return [(kernel, threads, shared) for kernel, _, threads, shared, *_ in plan(args)]


def _arguments(arch: str, dtype: torch.dtype, dim: int) -> dict[str, Any]:
    x = long_sequence(dtype, dim)
    spec = replace(make_spec(x, Options(causal="top_left")), gradients=frozenset(("query", "key", "value")))
    tensors = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
    given = {name: (ANYWHERE, params.DTYPE_CODES[dtype], *x.query.stride()) for name in tensors}
    chip = {"arch": 90 if arch == "sm_90" else 80, "processors": PROCESSORS[arch]}
    return params.describe(spec) | given | chip | {"mask_shares": 1, "bias_shares": 1}


def _forward(arch: str, dtype: torch.dtype, dim: int) -> list[Part]:
    args = _arguments(arch, dtype, dim)
    rows = params._C.cuda_blocks(args)[0]
    return [Part(*each, 2, "BLOCK_M", rows) for each in _plan("forward", args)]


def _forward_fp8(arch: str, dtype: torch.dtype, dim: int) -> list[Part]:
    """With products of float8, which sm_90 has: the kernel that makes codes, and the one that multiplies them."""
    if arch != "sm_90":
        return []
    args = _arguments(arch, dtype, dim)
    rows = params._C.cuda_fp8_blocks(args)[0]
    args |= {f"{name}_{kind}": (ANYWHERE, code) for name in "qkv" for kind, code in (("codes", E4M3), ("scales", 0))}
    first, second = _plan("forward_fp8", args)
    return [Part(*first), Part(*second, 2, "BLOCK_M", rows)]


def _backward(arch: str, dtype: torch.dtype, dim: int) -> list[Part]:
    args = _arguments(arch, dtype, dim)
    _, _, rows, keys = params._C.cuda_blocks(args)
    tiles = {  # scores, dP, and the gradients themselves; dV alone needs no dP
        "row_deltas": (0, "", 0),
        "query_gradient": (3, "BLOCK_M", rows),
        "key_gradients": (4, "BLOCK_N", keys),
        "key_gradient": (3, "BLOCK_N", keys),
        "value_gradient": (2, "BLOCK_N", keys),
    }
    return [Part(*each, *tiles[re.split(r"_sm|_bf|_f", each[0])[0]]) for each in _plan("backward", args)]


def _decode(kv_dtype: torch.dtype | None) -> Callable[[str, torch.dtype, int], list[Part]]:
    """As benchmarks.gpu_kernels has it, in 4 splits."""

    def parts(arch: str, dtype: torch.dtype, dim: int) -> list[Part]:
        stored = kv_dtype or dtype
        sizes = {"B": 16, "H": 32, "HK": 8, "M": 1, "D": dim, "DV": dim, "capacity": 8192}
        tensors = {"q": dtype, "k": stored, "v": stored, "key": dtype, "value": dtype, "query": dtype, "turned": dtype}
        args = {name: (ANYWHERE, params.DTYPE_CODES[t]) for name, t in tensors.items()} | sizes
        args |= {"partial": (ANYWHERE, 0), "stats": (ANYWHERE, 0), "splits": 4, "scale": dim**-0.5}
        append = {n: v for n, v in args.items() if n not in ("q", "partial", "stats", "splits", "scale")}
        attend = {n: v for n, v in args.items() if n not in ("key", "value", "query", "turned")}
        key_bytes = 2 * dim * stored.itemsize + (8 if stored in LIMITS else 0)
        found = [Part(*each) for each in _plan("append", append)]
        for kernel, threads, shared in _plan("decode", attend):
            tile = () if "combine" in kernel else (2, "BLOCK_M", 16 * threads // 32, key_bytes)
            found.append(Part(kernel, threads, shared, *tile))
        return found

    return parts


KERNELS: dict[str, Callable[[str, torch.dtype, int], list[Part]]] = {
    "cuda forward": _forward,
    "cuda fp8": _forward_fp8,
    "cuda backward": _backward,
    "cuda decode": _decode(None),
    "cuda decode int8": _decode(torch.int8),
    "cuda decode fp8": _decode(torch.float8_e4m3fn),
}


# --- compiling ----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _compile(source: str, arch: str, dim: str, dtype: str) -> tuple[str, str]:
    """What ptxas says about the kernels of a file for one head dim and dtype, and their disassembly."""
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("no nvcc")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        flags = ["-std=c++17", "-O3", f"-arch={arch}", "-cubin", "-Xptxas", "-v"]
        defines = [f"-DFA_HEAD_DIM={dim}", f"-DFA_DTYPE={dtype}"]
        command = [*compiler, *flags, *defines, "-o", str(cubin), str(SOURCES / f"{source}.cu")]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        command = [knobs.nvidia.cuobjdump.path, "-sass", str(cubin)]
        return told, subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _section(text: str, start: str, following: str) -> str:
    """From the line that names a kernel to the next such line."""
    found = re.search(rf"{start}.*?(?={following}|\Z)", text, re.DOTALL)
    if found is None:
        raise ValueError(f"nothing in the compiler's output matches {start!r}")
    return found[0]


def _compiled(part: Part, arch: str, dtype: str) -> Compiled:
    dim = re.search(r"_d(\d+)", part.kernel)
    told, sass = _compile(
        source_of(part.kernel), "sm_90a" if "_sm90_" in part.kernel else arch, dim[1] if dim else "64", dtype
    )
    said = _section(told, rf"entry function '{part.kernel}'", "Compiling entry function")
    code = _section(sass, rf"Function : {part.kernel}\n", "Function : ")
    (registers,) = re.findall(r"Used (\d+) registers", said)
    (frame,) = re.findall(r"(\d+) bytes stack frame", said)
    matrix = Counter(re.findall(r"\b(HMMA|HGMMA|QGMMA)\.", code))
    needs = Resources(part.kernel, int(registers), 0, int(frame), 0, part.shared_bytes, part.threads, 0, dict(matrix))
    return Compiled(part, needs, code)


def compile_job(job: Job) -> list[Compiled]:
    """The kernels of a job, compiled for its chip.

    Raises:
        RuntimeError: there is no nvcc, or the extension was built without the planner of CUDA launches.
    """
    return [
        _compiled(part, job.arch, SHORT[job.dtype])
        for part in KERNELS[job.kernel](job.arch, DTYPES[job.dtype], job.dim)
    ]
