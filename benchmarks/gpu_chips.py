"""What the chips have: limits of a multiprocessor and operations per clock, for tables computed without a GPU.

Sources. Limits of NVIDIA's chips: libcu++, `cuda/__device/arch_traits.h`, and the tuning guides of Ampere, Hopper and
Blackwell. Registers are allocated by the warp in units of 256, warps by fours (CUDA occupancy calculator). Results per
clock and multiprocessor: CUDA C++ Best Practices Guide 13, "Throughput of Native Arithmetic Instructions". Matrix
rates, clocks and memory: data sheets and architecture white papers of the A100 80GB SXM (312 TFLOP/s dense bfloat16,
2039 GB/s), the H100 SXM (989, in float8 1979, and 3350; the H200 is the same chip at 4800 GB/s) and the B200 (2250 and
8000). AMD: CDNA
3 white paper (1307 TFLOP/s on 304 compute units, 5300 GB/s), the LLVM sources (SISchedule.td: transcendental functions
at a quarter of the rate; AMDGPUUsage: 512 vector registers a lane, in units of 8).
"""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

from fused_attention.backends.triton.ahead import Resources

from .sass import kind

KIB = 1024


class Chip(NamedTuple):
    """One multiprocessor (SM, compute unit), how many the chip has and at which clock they run.

    Rates are per clock and multiprocessor: floating-point operations of the matrix unit by operand dtype, and lanes of
    the special unit (exp2), of float32 arithmetic and of integer arithmetic. issue: instructions of a warp.
    """

    name: str
    units: int
    mhz: int  # the clock that belongs to the published matrix rate
    wave: int  # threads of a warp
    threads: int
    blocks: int
    shared: int  # bytes of a multiprocessor
    shared_block: int  # the most that one block may have
    shared_reserved: int  # taken from each block by the system
    matrix: dict[str, int]
    special: int
    fma: int
    alu: int
    issue: int | None
    memory: int  # GB/s

    @property
    def peak(self) -> float:
        """Dense 16-bit matrix operations per second."""
        return self.peak_of("half")

    def peak_of(self, rate: str) -> float:
        """Dense matrix operations per second at one of the matrix rates."""
        return self.units * self.mhz * 1e6 * self.matrix[rate]


CHIPS = {
    "sm_80": Chip("A100 SXM", 108, 1410, 32, 2048, 32, 164 * KIB, 163 * KIB, KIB,
                  {"half": 2048, "tf32": 1024}, 16, 64, 64, 4, 2039),
    "sm_90": Chip("H100 SXM", 132, 1830, 32, 2048, 32, 228 * KIB, 227 * KIB, KIB,
                  {"half": 4096, "tf32": 2048, "fp8": 8192}, 16, 128, 64, 4, 3350),
    "sm_100": Chip("B200", 148, 1860, 32, 2048, 32, 228 * KIB, 227 * KIB, KIB,
                   {"half": 8192, "tf32": 4096}, 16, 128, 64, 4, 8000),
    "gfx942": Chip("MI300X", 304, 2100, 64, 2048, 16, 64 * KIB, 64 * KIB, 0,
                   {"half": 2048, "tf32": 1024, "float": 256}, 16, 64, 64, None, 5300),
}  # fmt: skip


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def blocks_per_unit(r: Resources, arch: str) -> tuple[int, str]:
    """How many blocks of a kernel fit on one multiprocessor, and what runs out first."""
    chip = CHIPS[arch]
    waves = -(-r.threads // chip.wave)
    limits = {"threads": chip.threads // r.threads, "blocks": chip.blocks}
    if arch.startswith("sm_"):
        limits["registers"] = 64 * KIB // (_up(r.registers * chip.wave, 256) * _up(waves, 4))
        limits["shared memory"] = chip.shared // _up(r.shared_bytes + chip.shared_reserved, 128)
        if r.tensor_memory:
            limits["tensor memory"] = 512 // r.tensor_memory
    else:  # four SIMDs, each with 512 vector registers a lane, 800 scalar registers and room for 8 waves
        vectors, scalars = 512 // _up(r.registers, 8), 800 // _up(r.scalar_registers + 6, 16)
        limits["registers"] = 4 * min(vectors, scalars, 8) // waves
        if r.shared_bytes:
            limits["shared memory"] = chip.shared // _up(r.shared_bytes, 512)
    scarce = min(limits, key=limits.__getitem__)
    return limits[scarce], scarce


# --- time once round a loop -----------------------------------------------------------------------------------

_SHAPES = (
    re.compile(r"HMMA\.(?P<m>16)(?P<n>8)(?P<k>4|8|16)\."),
    re.compile(r"[HQ]GMMA\.(?P<m>\d+)x(?P<n>\d+)x(?P<k>\d+)"),
    re.compile(r"v_mfma_f32_(?P<m>\d+)x(?P<n>\d+)x(?P<k>\d+)(?:_(?P<b>\d+)b)?"),
)


def matrix_flops(op: str) -> int | None:
    """Operations of one matrix instruction for one warp; None where the mnemonic does not tell (tcgen05)."""
    for shape in _SHAPES:
        if found := shape.match(op):
            blocks = int(found.groupdict().get("b") or 1)
            flops = 2 * int(found["m"]) * int(found["n"]) * int(found["k"]) * blocks
            return flops // 4 if op.startswith(("HGMMA", "QGMMA")) else flops  # four warps share one wgmma
    return None


def rate_name(op: str) -> str:
    """Which of a chip's matrix rates an instruction runs at: "half", "tf32", "fp8" or "float"."""
    if op.startswith("QGMMA"):
        return "fp8"
    if re.search(r"TF32|xf32", op):
        return "tf32"
    return "float" if re.match(r"v_mfma_f32_\w*?f32$", op) else "half"


# Results of these take a lane for longer or shorter than one of float32 arithmetic does.
_TWICE_FMA = re.compile(r"(FFMA2|FMUL2|FADD2|IMAD)\b")  # two results; integers on half of the lanes
_HALF_ALU = re.compile(r"FMNMX\b")  # 128 minima a clock on sm_100


def pipe_lanes(counts: Counter[str], arch: str) -> dict[str, float]:
    """Lane-instructions of a warp on each pipe, weighed by how long they hold it. From benchmarks.sass's kinds."""
    chip = CHIPS[arch]
    lanes = {"exp2 and other functions": 0.0, "float32 arithmetic": 0.0, "integers and moves": 0.0, "issue": 0.0}
    for op, n in counts.items():
        what = kind(op)
        lanes["issue"] += n
        if what in ("exp2", "special"):
            lanes["exp2 and other functions"] += n
        elif what == "fma":
            lanes["float32 arithmetic"] += n * (2 if chip.fma == 128 and _TWICE_FMA.match(op) else 1)
        elif what == "alu":
            lanes["integers and moves"] += n * (0.5 if arch == "sm_100" and _HALF_ALU.match(op) else 1)
    return lanes


def pipe_cycles(each: Counter[str], one: Counter[str], warps: int, arch: str) -> dict[str, float]:
    """Clocks of one multiprocessor that each pipe other than the matrix unit takes for once round a loop.

    each: instructions of every warp; one: those that a single warp executes.
    """
    chip = CHIPS[arch]
    a, b = pipe_lanes(each, arch), pipe_lanes(one, arch)
    total = {name: warps * a[name] + b[name] for name in a}
    special, fma, alu, issue = total.values()
    if chip.issue is None:  # AMD: one vector pipe does all three, special functions at a quarter of its rate
        return {"vector arithmetic": (fma + alu) * chip.wave / chip.fma + special * chip.wave / chip.special}
    return {
        "exp2 and other functions": special * chip.wave / chip.special,
        "float32 arithmetic": fma * chip.wave / chip.fma,
        "integers and moves": alu * chip.wave / chip.alu,
        "issue": issue / chip.issue,
    }
