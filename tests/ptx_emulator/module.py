"""Load PTX, compile what it was translated to, launch its kernels."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from .parse import EmulationError, parse
from .tensor_map import TensorMap, memory_of
from .translate import SHARED_START, Kernel, cpp_name, translate, up

CPP = Path(__file__).with_name("cpp")
MAX_SHARED = 227 << 10  # bytes of a block on sm_90
# No product and sum may become one (PTX says where they do). The runtime sets the rounding mode. What is translated is
# compiled quickly rather than well: most of its time goes by in the runtime.
FLAGS = (
    "-std=c++17 -march=native -fPIC -shared -ffp-contract=off -fwrapv -fno-strict-aliasing -fno-gnu-unique -w".split()
)
LEVEL = {"runtime": ["-O2", "-frounding-math"], "kernel": ["-Og"]}


class _Launch(ctypes.Structure):  # PtxLaunch in cpp/launch.cpp
    _fields_ = [
        ("entry", ctypes.c_void_p),
        *((name, ctypes.c_uint32 * 3) for name in ("grid", "block", "cluster")),
        *((name, ctypes.c_uint32) for name in ("shared_bytes", "dynamic_bytes")),
        *((name, ctypes.c_void_p) for name in ("params", "counts", "ranges")),
        *((name, ctypes.c_uint64) for name in ("range_count", "seed")),
        *((name, ctypes.c_uint32) for name in ("check_races", "check_bounds")),
        *((name, ctypes.c_void_p) for name in ("error", "races", "lines")),
        *((name, ctypes.c_uint64) for name in ("wavefronts", "ideal_wavefronts")),
    ]


@dataclass
class BankConflicts:
    """Wavefronts of ld, st, ldmatrix, stmatrix and cp.async in shared memory; extra: those that bank conflicts cost."""

    total: int = 0
    extra: int = 0
    by_line: dict[str, tuple[int, int]] = field(default_factory=dict)  # line of PTX: extra, total

    def __str__(self) -> str:
        share = 100 * self.extra / max(self.total, 1)
        return f"{self.extra} of {self.total} shared-memory wavefronts are bank conflicts ({share:.1f}%)"


@dataclass
class Report:
    """What a launch showed. instructions: executed ones of all threads by opcode, predicated-off ones included."""

    races: list[str]
    bank_conflicts: BankConflicts
    instructions: Counter[str]


# --- compiling ----------------------------------------------------------------------------------------------------
def cache_folder() -> Path:
    """FUSED_ATTENTION_EMULATOR_CACHE, or a folder in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FUSED_ATTENTION_EMULATOR_CACHE") or Path(base, "fused_attention", "ptx_emulator"))


@cache
def _surroundings() -> str:
    """What a compiled object depends on beside its source: the headers, and the processor that -march=native means."""
    headers = "".join(p.read_text() for p in sorted(CPP.iterdir()))
    try:
        flags = re.search(r"^(?:flags|Features)\s*:.*$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        flags = None
    return headers + platform.machine() + (flags[0] if flags else platform.processor())


def _build(source: str, kind: str) -> Path:
    """Compile C++ to a shared object, once per content."""
    command = [os.environ.get("CXX", "g++"), *FLAGS, *LEVEL[kind], f"-I{CPP}"]
    key = hashlib.sha256("\0".join([source, _surroundings(), *command[:-1]]).encode()).hexdigest()[:32]
    folder = cache_folder()
    target = folder / f"{kind}-{key}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        code, built = Path(scratch, "code.cpp"), Path(scratch, "code.so")
        code.write_text(source)
        try:
            done = subprocess.run([*command, "-o", built, code], capture_output=True, text=True)
        except FileNotFoundError as e:
            raise EmulationError(
                f"the emulator needs a C++ compiler; {command[0]} is not there (CXX names another)"
            ) from e
        if done.returncode:
            raise EmulationError(f"{command[0]} failed on translated PTX:\n{done.stderr[-4000:]}")
        os.replace(built, target)  # at once: another process may build the same
    return target


@cache
def _runtime() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_build('#include "launch.cpp"\n', "runtime")), mode=ctypes.RTLD_GLOBAL)
    library.ptx_launch.argtypes, library.ptx_launch.restype = [ctypes.POINTER(_Launch)], None
    library.ptx_free.argtypes, library.ptx_free.restype = [ctypes.c_void_p], None
    return library


# --- arguments ----------------------------------------------------------------------------------------------------
Ranges = list[tuple[int, int]]


def pointer(array: Any) -> int:
    """The address of an array's memory; name the array in launch(..., memory=[array]) too."""
    return memory_of(array)[0]


def _pack(value: Any, name: str, size: int, ranges: Ranges) -> bytes:
    """A parameter's bytes; memory that it makes accessible is added to `ranges`."""
    if isinstance(value, TensorMap):
        ranges.append(value.memory)
        value = bytes(value)
    if value is None:
        return bytes(size)
    if isinstance(value, bytes | bytearray) and len(value) <= size:
        return bytes(value).ljust(size, b"\0")
    if isinstance(value, int):
        return (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    if isinstance(value, float) and size in (4, 8):
        return bytes(ctypes.c_float(value) if size == 4 else ctypes.c_double(value))
    if isinstance(value, bytes | bytearray | float) or size != 8:
        raise ValueError(f"{name}: got {type(value).__name__} {value!r}, the parameter has {size} bytes")
    address, length = memory_of(value)
    ranges.append((address, address + length))
    return address.to_bytes(8, "little")


def _merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Sorted; ranges that overlap become one, since arguments may be views of one array."""
    found: Ranges = []
    for low, high in sorted(r for r in ranges if r[0] < r[1]):
        if found and low < found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], high))
        else:
            found.append((low, high))
    return found


def _three(sizes: Sequence[int] | int) -> tuple[int, int, int]:
    x, y, z = (*((sizes,) if isinstance(sizes, int) else sizes), 1, 1)[:3]
    return int(x), int(y), int(z)


class Module:
    """A loaded module; `kernels` are its entry points by name."""

    def __init__(self, text: str) -> None:
        self.lines = text.splitlines()
        translation = translate(parse(text))
        self.kernels: dict[str, Kernel] = translation.kernels
        self._blocks, self._variables = translation.blocks, translation.variables
        _runtime()
        self._library = ctypes.CDLL(str(_build(translation.source, "kernel")))

    def launch(self, name: str, grid: Sequence[int] | int, block: Sequence[int] | int, args: Sequence[Any],
               shared: int = 0, seed: int = 0, cluster: Sequence[int] | int | None = None, check_races: bool = True,
               check_bounds: bool = True, memory: Sequence[Any] = ()) -> Report:  # fmt: skip
        """Run a kernel to its end.

        Args:
            name: of the kernel.
            grid, block, cluster: one to three sizes; the cluster is that of the PTX, or 1, where none is given.
            args: one per parameter: int, float, bytes (a struct), None (zeros), a NumPy array or CPU tensor (its
                address; its memory may be read and written), or a TensorMap.
            shared: bytes of dynamic shared memory.
            seed: of the schedule.
            check_races, check_bounds: whether races are looked for, and addresses in global memory checked.
            memory: further arrays that the kernel may reach, through addresses in its arguments.

        Raises:
            EmulationError: deadlock, access out of bounds or misaligned, an mbarrier used wrongly, a device-side trap.
            ValueError: a launch that no GPU would take, or arguments that do not fit.
        """
        kernel = self.kernels[name]
        if len(args) != len(kernel.params):
            raise ValueError(f"{name}: got {len(args)} arguments, expected {len(kernel.params)}")
        ranges = [(a, a + n) for a, n in map(memory_of, memory)]
        buffer = ctypes.create_string_buffer(kernel.params_size + 64)
        params = up(ctypes.addressof(buffer), 64)  # tensor maps are aligned so
        for value, (label, size, _), offset in zip(args, kernel.params, kernel.offsets, strict=True):
            ctypes.memmove(params + offset, _pack(value, f"{name}, {label}", size, ranges), size)
        ranges.append((params, params + kernel.params_size))
        for v in self._variables:
            address = ctypes.addressof(ctypes.c_char.in_dll(self._library, v.name))
            ranges.append((address, address + v.size))
        merged = [n for low_and_high in _merged(ranges) for n in low_and_high]
        flat = (ctypes.c_uint64 * len(merged))(*merged)
        counts = (ctypes.c_uint64 * len(self._blocks))()
        total = up(kernel.static_shared + shared, 16)
        launch = _Launch(
            entry=ctypes.cast(getattr(self._library, cpp_name(name)), ctypes.c_void_p), grid=_three(grid),
            block=_three(block), cluster=_three(cluster or kernel.required_cluster or 1), shared_bytes=total,
            dynamic_bytes=total - kernel.static_shared, params=params, counts=ctypes.addressof(counts),
            ranges=ctypes.addressof(flat), range_count=len(merged) // 2, seed=seed, check_races=check_races,
            check_bounds=check_bounds,
        )  # fmt: skip
        self._check(kernel, launch)
        if 0 not in launch.grid:
            _runtime().ptx_launch(ctypes.byref(launch))
        return self._report(kernel, launch, counts)

    @staticmethod
    def _check(kernel: Kernel, launch: _Launch) -> None:
        grid, block, cluster = (tuple(t) for t in (launch.grid, launch.block, launch.cluster))
        threads, bytes_ = block[0] * block[1] * block[2], launch.shared_bytes - SHARED_START
        rules = [
            (kernel.required_block in (None, block), f"a block of {block}, its .reqntid is {kernel.required_block}"),
            (all(g % c == 0 for g, c in zip(grid, cluster, strict=True)), f"a grid of {grid}, clusters of {cluster}"),
            (1 <= threads <= 1024, f"{threads} threads in a block"),
            (bytes_ <= MAX_SHARED, f"{bytes_} bytes of shared memory, more than {MAX_SHARED}"),
        ]
        for holds, why in rules:
            if not holds:
                raise ValueError(f"{kernel.name}: {why}")

    def _report(self, kernel: Kernel, launch: _Launch, counts: Iterable[int]) -> Report:
        error, races, lines = (self._text(getattr(launch, n)) for n in ("error", "races", "lines"))
        if error:
            raise EmulationError(f"{kernel.name}: {error}" + ("\nraces before that:\n" + races if races else ""))
        instructions: Counter[str] = Counter()
        for opcodes, times in zip(self._blocks, counts, strict=True):
            instructions.update({opcode: n * times for opcode, n in opcodes.items() if times})
        banks = BankConflicts(launch.wavefronts, launch.wavefronts - launch.ideal_wavefronts)
        for line, extra, total in (map(int, row.split()) for row in lines.splitlines()):
            banks.by_line[self._quote(line)] = (extra, total)
        return Report(races.splitlines(), banks, instructions)

    def _quote(self, line: int) -> str:
        text = " ".join(self.lines[line - 1].split())
        return f"line {line}: {text if len(text) <= 100 else text[:97] + '...'}"

    def _text(self, address: int | None) -> str:
        """A string of the runtime, given back to it; "[line n]" becomes that line of the PTX."""
        if not address:
            return ""
        text = ctypes.string_at(address).decode()
        _runtime().ptx_free(address)
        return re.sub(r"\[line (\d+)\]", lambda m: f"[{self._quote(int(m[1]))}]", text)


@cache
def load(ptx: str) -> Module:
    """Parse, translate and compile a module of PTX.

    Raises:
        EmulationError: an opcode or modifier that the emulator does not know, or no C++ compiler.
    """
    return Module(ptx)
