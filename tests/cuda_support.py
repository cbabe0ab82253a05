"""The CUDA kernels as nvcc makes them for sm_80 and sm_90a, in the PTX emulator, in place of a GPU.

The launches are those of the extension: kernel, grid, shared memory and argument come from the plan that a GPU would be
given (csrc/cuda/plan.h).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.nvcc import SOURCES, nvcc, source_of
from fused_attention.backends import cuda, params
from fused_attention.backends.params import Call

from . import ptx_emulator as emu
from .ptx_emulator.module import cache_folder

BUILT = bool(cuda.architectures())

needs_kernels = pytest.mark.skipif(not BUILT, reason="the extension is built without CUDA kernels")

needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="no nvcc")


@functools.cache
def _sources_hash() -> str:
    files = [SOURCES.parent / "params.h", *sorted(SOURCES.iterdir())]
    return hashlib.sha256(b"\0".join(f.read_bytes() for f in files)).hexdigest()[:16]


def ptx(source: str, *defines: str) -> str:
    """The PTX of a source for the chip in its name; kept on disk."""
    compiler = nvcc()
    assert compiler is not None
    folder = cache_folder()
    target = folder / f"{source}-{'-'.join(defines)}-{_sources_hash()}.ptx"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch, "code.ptx")
            arch = "sm_90a" if source.endswith("_sm90") else "sm_80"
            flags = ["-std=c++17", "-O3", f"-arch={arch}", "-ptx", *(f"-D{d}" for d in defines)]
            command = [*compiler, *flags, "-o", str(made), str(SOURCES / f"{source}.cu")]
            subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(made, target)
    return target.read_text()


def only(text: str, kernel: str) -> str:
    """A module with one of its kernels: what is not called need not be translated."""
    head, *entries = re.split(r"(?=^\s*// \.globl|^\.visible \.entry)", text, flags=re.MULTILINE)
    declarations = [e for e in entries if ".entry" not in e]
    (mine,) = (e for e in entries if re.search(rf"\.entry {kernel}\(", e))
    return head + "".join(declarations) + mine


@functools.cache
def module(kernel: str) -> emu.Module:
    """The module that holds a kernel, translated and compiled."""
    source = source_of(kernel)
    dim = re.search(r"_d(\d+)", kernel)
    dtype = "f16" if "_f16" in kernel else "bf16"
    text = ptx(source, f"FA_HEAD_DIM={dim[1] if dim else 64}", f"FA_DTYPE={dtype}")
    return emu.load(only(text, kernel))


def _bits(t: Tensor) -> Tensor:
    """As integers, so that NaN equals itself."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t if t.dtype == torch.bool else t.view(kinds[t.element_size()])


Map = tuple[int, int, int, list[int], list[int], list[int]]


def tensor_map(plan: Map) -> bytes:
    """What the driver would encode for a tensor map of a plan."""
    _, address, code, dims, strides, box = plan
    kind = np.uint8 if code == params.DTYPE_CODES[torch.float8_e4m3fn] else np.uint16
    size = np.dtype(kind).itemsize
    steps = [size, *strides]
    span = sum((n - 1) * s for n, s in zip(dims, steps, strict=True)) + size
    memory = (ctypes.c_uint8 * span).from_address(address)
    array: np.ndarray = np.ndarray(dims[::-1], kind, memory, strides=steps[::-1])
    return bytes(emu.TensorMap(array, box, swizzle=box[0] * size))


def with_maps(argument: bytes, maps: list[Map]) -> bytes:
    """A kernel's argument with the tensor maps of its plan written into it."""
    written = bytearray(argument)
    for plan in maps:
        written[plan[0] : plan[0] + 128] = tensor_map(plan)
    return bytes(written)


# Bytes of shared memory that the kernels of a chip may use; those for sm_80 run on sm_86, too.
MOST_SHARED = {"sm80": 99 * 1024, "sm90": 227 * 1024}


class Emulator:
    """Takes the place of `cuda.run`: runs every launch of a call under each schedule in turn.

    Results must not depend on the schedule: all memory is compared bit by bit.
    """

    def __init__(self, seeds: Iterable[int] = (0,)) -> None:
        self.seeds = list(seeds)
        self.reports: list[tuple[str, emu.Report]] = []

    def __call__(self, kind: str, call: Call, where: Tensor) -> None:
        assert params._C is not None
        for kernel, grid, threads, shared, argument, maps in getattr(params._C, f"cuda_plan_{kind}")(call.args):
            assert shared <= MOST_SHARED["sm90" if "_sm90_" in kernel else "sm80"], "more shared memory than there is"
            argument = with_maps(argument, maps)
            first: list[Tensor] = []
            for seed in self.seeds:
                report = module(kernel).launch(
                    kernel, grid, threads, [argument], shared=shared, seed=seed, memory=call.tensors
                )
                assert not report.races, f"{kernel}, seed {seed}:\n" + "\n".join(report.races)
                self.reports.append((kernel, report))
                now = [_bits(t) for t in call.tensors]
                first = first or [t.clone() for t in now]
                for t, before in zip(now, first, strict=True):
                    assert torch.equal(t, before), f"{kernel}: seed {seed} gives other bits than seed {self.seeds[0]}"

    def summary(self) -> str:
        """One line per kernel: how often it ran, its bank conflicts."""
        lines = []
        for name in dict.fromkeys(n for n, _ in self.reports):
            mine = [r.bank_conflicts for n, r in self.reports if n == name]
            total, extra = sum(b.total for b in mine), sum(b.extra for b in mine)
            share = 100 * extra / total if total else 0.0
            lines.append(f"  {name}: {len(mine)} launches, no race, bank conflicts {share:.2f}% of wavefronts")
        return "\n".join(lines)


@contextmanager
def emulated(
    monkeypatch: pytest.MonkeyPatch, seeds: Iterable[int] = (0,), arch: int = 80, processors: int = 1
) -> Iterator[Emulator]:
    """Within: the backend `cuda` takes CPU tensors and runs in the emulator, as on so many multiprocessors."""
    emulator = Emulator(seeds)
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "unavailable", lambda device: None)
        patch.setattr(cuda, "_kernel_arch", lambda name: arch)
        patch.setattr(cuda, "run", emulator)
        patch.setattr(cuda, "_chip", lambda index: {"arch": arch, "processors": processors})
        yield emulator
