"""Compile launches for any chip on a machine that has none, and read what the machine code needs.

Triton asks its driver for the chip to compile for; an offline driver that names a chip takes its place while
`compile_ahead` runs. What is compiled are the very launches that the launchers make, with the real specialisation of
every argument, down to a cubin (ptxas, shipped with Triton) or an hsaco file (LLVM, likewise).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from .launch import INTERPRETED, Launch


class Resources(NamedTuple):
    """What one program (thread block, workgroup) of a compiled kernel needs.

    registers, scalar_registers: 32-bit registers a thread (AMD: VGPRs of the unified file, accumulation registers
    included) and a wave (AMD only). spilled_bytes: local memory a thread, where nothing but spilled registers lies in
    these kernels. scalar_spills: scalar registers that live in lanes of vector registers, not in memory (AMD only).
    shared_bytes, threads: of a program. tensor_memory: columns of 128 x 32 bits (sm_100). matrix: matrix instructions
    in the program text by mnemonic, as in PTX ("mma.sync", "wgmma.mma_async", "tcgen05.mma") or AMD's assembly
    ("v_mfma_f32_32x32x8_bf16").
    """

    name: str
    registers: int
    scalar_registers: int
    spilled_bytes: int
    scalar_spills: int
    shared_bytes: int
    threads: int
    tensor_memory: int
    matrix: dict[str, int]


class _Offline:
    """As much of a Triton driver as compiling takes."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_device(self) -> Any:  # keys Triton's cache of compiled kernels, so each chip has one of its own
        return self.target

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


_one_at_a_time = threading.Lock()  # the driver is a global of Triton's


def target_of(arch: str) -> Any:
    """Triton's name for a chip: "sm_90" is GPUTarget("cuda", 90, 32), "gfx942" is GPUTarget("hip", "gfx942", 64)."""
    if match := re.fullmatch(r"sm_(\d{2,3})", arch):
        return GPUTarget("cuda", int(match[1]), 32)
    if re.fullmatch(r"gfx9[0-9a-f]{2}", arch):
        return GPUTarget("hip", arch, 64)
    if re.fullmatch(r"gfx1[0-9a-f]{3}", arch):  # RDNA: waves of 32
        return GPUTarget("hip", arch, 32)
    raise ValueError(f'arch: got {arch!r}, expected a name such as "sm_90" or "gfx942"')


@contextmanager
def _offline(arch: str) -> Iterator[None]:
    with _one_at_a_time:
        before = driver._active  # reading `active` instead would look for a GPU
        driver.set_active(_Offline(target_of(arch)))
        try:
            yield
        finally:
            driver.set_active(before)


def compile_ahead(launches: Iterable[Launch], arch: str) -> list[Any]:
    """The launches compiled for a chip: one `triton.compiler.CompiledKernel` each, with `asm` and `metadata`.

    Tensors of the launches may lie on a CPU; their dtypes, strides and the alignment of their pointers are what counts.
    Nothing is run.

    Raises:
        RuntimeError: Triton's interpreter is on, and has taken the compiler's place.
        ValueError: the name of the chip cannot be read.
    """
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: Triton interprets its kernels and compiles none")
    with _offline(arch):
        return [k.kernel.warmup(*k.args, grid=k.grid, **k.options) for k in launches]


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"nothing in the compiled kernel matches {pattern!r}")
    return int(match[1])


def cuobjdump(compiled: Any, option: str) -> str:
    """What NVIDIA's cuobjdump, which Triton ships, prints about a cubin; option "-sass" or "-res-usage"."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        done = subprocess.run([knobs.nvidia.cuobjdump.path, option, cubin], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"cuobjdump {option} failed: {done.stderr.strip()}")
    return done.stdout


# wgmma.mma_async.sync.aligned.m64n128k16.f32... is "wgmma.mma_async", tcgen05.mma.cta_group::1... "tcgen05.mma".
_PTX_MATRIX = re.compile(r"^\s*(?:@!?%p\d+\s+)?(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", re.MULTILINE)
_AMD_MATRIX = re.compile(r"^\s*(v_s?mfma[a-z]*_\w+|v_wmma_\w+)", re.MULTILINE)


def _nvidia(compiled: Any) -> Resources:
    usage, ptx = cuobjdump(compiled, "-res-usage"), compiled.asm["ptx"]
    return Resources(
        name=compiled.metadata.name,
        registers=_number(r"\bREG:(\d+)", usage),
        scalar_registers=0,
        spilled_bytes=_number(r"\bSTACK:(\d+)", usage) + _number(r"\bLOCAL:(\d+)", usage),
        scalar_spills=0,
        shared_bytes=compiled.metadata.shared,
        threads=_number(r"\.reqntid (\d+)", ptx),
        tensor_memory=getattr(compiled.metadata, "tmem_size", 0),
        matrix=dict(Counter(_PTX_MATRIX.findall(ptx))),
    )


def _amd(compiled: Any) -> Resources:
    text = compiled.asm["amdgcn"]
    return Resources(
        name=compiled.metadata.name,
        registers=_number(r"\.vgpr_count: *(\d+)", text),
        scalar_registers=_number(r"\.sgpr_count: *(\d+)", text),
        # A spilled scalar takes a lane of a vector register; only when that is spilled too does it reach the memory.
        spilled_bytes=_number(r"\.private_segment_fixed_size: *(\d+)", text),
        scalar_spills=_number(r"\.sgpr_spill_count: *(\d+)", text),
        shared_bytes=compiled.metadata.shared + _number(r"\.group_segment_fixed_size: *(\d+)", text),
        threads=_number(r"\.max_flat_workgroup_size: *(\d+)", text),
        tensor_memory=0,
        matrix=dict(Counter(_AMD_MATRIX.findall(text))),
    )


def resources(compiled: Any, arch: str) -> Resources:
    """What a kernel that `compile_ahead` made for `arch` needs, read from its machine code."""
    return _nvidia(compiled) if target_of(arch).backend == "cuda" else _amd(compiled)
