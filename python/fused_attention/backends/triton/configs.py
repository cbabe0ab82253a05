"""Which tile sizes, warps and stages a kernel takes: pure functions of the chip and of the call's spec.

arch is "sm_80", "sm_90", "sm_100", "gfx942" or a relative of one, or None for the interpreter. A choice depends on the
kernel, the chip's family, the operands (16 bits or float32), the larger head dim, and on whether the call is heavy: a
mask, bias, softcap, ALiBi, dropout or weights keep so many more values alive that only smaller tiles stay within 255
registers a thread. Under a block map tiles divide its blocks. Nothing depends on the batch, so no row's result does.

The static choices were found by compiling for each chip ahead of time: the first without register spills in every call
of its class, within the chip's shared memory, in this order: the larger tile (more operations per byte that is read),
at least two pipeline stages, more blocks per multiprocessor. What was measured on a GPU (`python -m fused_attention
tune`) stands in tuned.json and comes before them. Nothing is timed here.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...spec import AttentionSpec

TABLE = Path(__file__).with_name("tuned.json")


class Config(NamedTuple):
    """How one kernel is compiled."""

    BLOCK_M: int
    BLOCK_N: int
    warps: int
    stages: int
    descriptors: bool = False  # tiles of the inner loop are read through tensor descriptors (TMA)
    specialize: bool = False  # loads and matrix products on warps of their own
    together: bool = True  # dK and dV in one kernel

    def __str__(self) -> str:
        extras = [n for n in ("descriptors", "specialize") if getattr(self, n)] + ["dK, dV apart"] * (not self.together)
        return f"{self.BLOCK_M} x {self.BLOCK_N}, {self.warps} warps, {self.stages} stages" + "".join(
            f", {e}" for e in extras
        )


INTERPRETER = Config(32, 32, 4, 1)  # small tiles: odd sizes meet the edges of several
DELTA = Config(32, 0, 8, 1)  # bound by memory: 32 rows of 512 floats are 128 registers a thread in two tensors
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def padded(dim: int) -> int:
    """A head dim as a tile has it: a power of two, at least the 16 of the matrix unit."""
    return max(16, 1 << (dim - 1).bit_length())


def family(arch: str) -> str:
    """The chip whose numbers serve, of the five that have some."""
    if arch.startswith("gfx"):
        return "gfx942"
    number = int(arch[3:])
    if number >= 120 or 80 < number < 90 and number != 87:
        return "sm_86"  # RTX and L40: mma.sync, and 99 KiB of shared memory a block
    return "sm_80" if number < 90 else "sm_90" if number < 100 else "sm_100"


def hopper_or_newer(arch: str) -> bool:
    """Whether tensor descriptors become TMA."""
    return arch.startswith("sm_") and int(arch[3:]) >= 90


def heavy(spec: AttentionSpec) -> bool:
    """Whether a call needs registers for more than scores, weights and accumulators.

    Packed sequences with a window count: their offsets and three loops over tiles take as much. So do block maps, by
    which tiles are skipped in one loop.
    """
    added = spec.mask is not None or spec.bias is not None or spec.alibi_slopes or spec.softcap is not None
    added = added or spec.block_map is not None
    return added or spec.dropout_p > 0.0 or spec.weights is not None or (spec.packed and spec.window is not None)


def chunk(spec: AttentionSpec, float32_precision: str | None) -> int:
    """How many head dims a product takes at a time; 0: all.

    IEEE float32 runs as fused multiply-adds on operands that lie in registers over all dims taken at once: 16 of them
    leave room for the accumulators at head dim 512. So do tf32's operands at 512.
    """
    dim = padded(max(spec.head_dim, spec.value_dim))
    if float32_precision == "ieee":
        return 16 if dim > 32 else 0
    return 32 if float32_precision is not None and dim > 256 else 0


def shares(tiles: int, steps: int) -> int:
    """In how many shares a gradient that broadcasts is summed: enough programs for a large chip, by shape alone."""
    return max(1, min(steps, 512 // max(tiles, 1)))


def forward(arch: str | None, spec: AttentionSpec) -> Config:
    """The forward kernel's config."""
    return _choice("forward", arch, spec)


def delta(arch: str | None, spec: AttentionSpec) -> Config:
    """Of the kernel that sums output times its gradient."""
    return DELTA


def key_gradient(arch: str | None, spec: AttentionSpec) -> Config:
    """Of dK and dV; a program holds BLOCK_N keys and steps over BLOCK_M rows."""
    return _choice("key_gradient", arch, spec)


def query_gradient(arch: str | None, spec: AttentionSpec) -> Config:
    """Of dQ."""
    return _choice("query_gradient", arch, spec)


def weights(arch: str | None, spec: AttentionSpec) -> Config:
    """Of the attention weights."""
    return _choice("weights", arch, spec)


def additive_gradient(arch: str | None, spec: AttentionSpec) -> Config:
    """Of the gradient of a mask or bias."""
    return _choice("additive_gradient", arch, spec)


# --- how a choice is made -------------------------------------------------------------------------------------

_forced: ContextVar[dict[str, Config]] = ContextVar("forced configs")


@contextmanager
def override(kernel: str, config: Config) -> Iterator[None]:
    """Give one kernel a config, whatever the tables say; for tuning, which tries several."""
    token = _forced.set({**_forced.get({}), kernel: config})
    try:
        yield
    finally:
        _forced.reset(token)


def _choice(kernel: str, arch: str | None, spec: AttentionSpec) -> Config:
    forced = _forced.get(None)
    if forced and kernel in forced:
        c = forced[kernel]
    else:
        c = INTERPRETER if arch is None else _found(kernel, arch, spec)
    if spec.block_map is not None:  # whole tiles make up a block: the largest powers of two in its sides
        rows, columns = (side & -side for side in spec.block_map)
        c = c._replace(BLOCK_M=min(c.BLOCK_M, rows), BLOCK_N=min(c.BLOCK_N, columns))
    return c


@functools.lru_cache(maxsize=4096)
def _found(kernel: str, arch: str, spec: AttentionSpec) -> Config:
    dim = padded(max(spec.head_dim, spec.value_dim))
    measured = tuned().get((arch, kernel, entry(spec.dtype, dim, heavy(spec))))
    return measured or static(kernel, arch, spec)


def static(kernel: str, arch: str, spec: AttentionSpec) -> Config:
    """The choice without what was measured."""
    return _static(kernel, arch, spec.dtype, padded(max(spec.head_dim, spec.value_dim)), heavy(spec))


def _static(kernel: str, arch: str, dtype: torch.dtype, dim: int, is_heavy: bool) -> Config:
    column = max(dim, 64).bit_length() - 7  # dims up to 64, 128, 256, 512
    if dtype == torch.float32:
        own = _FLOAT_SM_100.get(kernel) if family(arch) == "sm_100" else None
        return (own or _FLOAT[kernel])[column]
    chip = family(arch)
    if kernel in _SQUARE:
        return (_SQUARE_GFX942 if chip == "gfx942" else _SQUARE)[kernel][column]
    if chip == "sm_86":  # 99 KiB of shared memory: what is heavy on sm_80 fits
        chip, is_heavy = "sm_80", True
    return _HALF[kernel, chip, "heavy" if is_heavy else "light"][column]


def entry(dtype: torch.dtype, dim: int, is_heavy: bool) -> str:
    """The name of an entry in the table of what was measured: "bf16/128/light"."""
    return f"{DTYPES[dtype]}/{padded(dim)}/{'heavy' if is_heavy else 'light'}"


@functools.cache
def tuned(path: Path = TABLE) -> dict[tuple[str, str, str], Config]:
    """What was measured, by (arch, kernel, entry), from {arch: {kernel: {entry: [BLOCK_M, ...]}, "measured": ...}}.

    Raises:
        ValueError: the file is not such a table; the message names the entry.
    """
    found = {}
    for arch, kernels in json.loads(path.read_text()).items():
        for kernel, entries in kernels.items():
            if kernel == "measured":  # the GPU, driver, versions and date
                continue
            for name, numbers in entries.items():
                found[arch, kernel, name] = _read(f"{path}: {arch} {kernel} {name}", kernel, numbers)
    return found


def _read(where: str, kernel: str, numbers: Any) -> Config:
    kinds = (int,) * 4 + (bool,) * 3
    if kernel not in KERNELS:
        raise ValueError(f"{where}: no such kernel, expected one of {', '.join(KERNELS)}")
    if not isinstance(numbers, list) or [type(n) for n in numbers] != list(kinds):
        raise ValueError(f"{where}: got {numbers!r}, expected {list(Config._fields)}")
    c = Config(*numbers)
    powers = all(n > 0 and n & (n - 1) == 0 for n in c[:3])
    if not powers or c.BLOCK_M < 16 or c.BLOCK_N < 16 or c.stages < 1:
        raise ValueError(f"{where}: got {numbers!r}, expected powers of two, blocks of at least 16, a stage or more")
    return c


# --- the static choices ---------------------------------------------------------------------------------------

KERNELS = ("forward", "key_gradient", "query_gradient", "weights", "additive_gradient")
T = True  # through tensor descriptors

# 16-bit operands, for head dims up to 64, 128, 256 and 512.
_HALF = {
    # mma.sync; 163 KiB of shared memory. 215 to 255 registers a thread, one block per multiprocessor.
    ("forward", "sm_80", "light"): (
        Config(128, 64, 8, 3),
        Config(128, 32, 8, 3),
        Config(64, 32, 8, 2),
        Config(32, 32, 8, 1),
    ),
    ("forward", "sm_80", "heavy"): (
        Config(64, 64, 8, 2),
        Config(64, 32, 8, 2),
        Config(32, 32, 8, 1),
        Config(16, 32, 8, 1),
    ),
    ("key_gradient", "sm_80", "light"): (
        Config(32, 64, 8, 2),
        Config(32, 64, 8, 2),
        Config(32, 32, 8, 1),
        Config(16, 16, 8, 1, together=False),
    ),
    ("key_gradient", "sm_80", "heavy"): (
        Config(32, 32, 8, 1),
        Config(32, 32, 8, 1),
        Config(16, 16, 8, 1, together=False),
        Config(16, 16, 8, 1, together=False),
    ),
    ("query_gradient", "sm_80", "light"): (
        Config(128, 64, 8, 2),
        Config(64, 64, 8, 2),
        Config(64, 32, 8, 1),
        Config(32, 16, 8, 1),
    ),
    ("query_gradient", "sm_80", "heavy"): (
        Config(32, 32, 4, 1),
        Config(32, 32, 8, 1),
        Config(32, 16, 8, 1),
        Config(16, 16, 8, 1),
    ),
    # wgmma with TMA up to head dim 256. At 512 the 64 rows that wgmma takes leave no registers: mma.sync.
    ("forward", "sm_90", "light"): (
        Config(128, 128, 8, 3, T),
        Config(128, 128, 8, 2, T),
        Config(64, 64, 8, 2, T),
        Config(32, 32, 8, 1),
    ),
    ("forward", "sm_90", "heavy"): (
        Config(64, 64, 8, 2, T),
        Config(64, 64, 8, 2, T),
        Config(64, 16, 8, 2, T),
        Config(16, 32, 8, 1),
    ),
    ("key_gradient", "sm_90", "light"): (
        Config(32, 128, 8, 2, T),
        Config(32, 64, 8, 2, T),
        Config(32, 32, 8, 1),
        Config(16, 16, 8, 1, together=False),
    ),
    ("key_gradient", "sm_90", "heavy"): (
        Config(32, 64, 8, 1, T),
        Config(32, 32, 8, 1),
        Config(32, 32, 8, 1, together=False),
        Config(16, 16, 8, 1, together=False),
    ),
    ("query_gradient", "sm_90", "light"): (
        Config(128, 128, 8, 2, T),
        Config(128, 64, 8, 2, T),
        Config(64, 32, 8, 2, T),
        Config(32, 16, 8, 1),
    ),
    ("query_gradient", "sm_90", "heavy"): (
        Config(128, 32, 8, 2, T),
        Config(64, 32, 8, 2, T),
        Config(32, 16, 8, 1),
        Config(16, 16, 8, 1),
    ),
    # tcgen05 with TMA up to head dim 256; the accumulators lie in tensor memory. At 512 as on sm_90.
    ("forward", "sm_100", "light"): (
        Config(128, 64, 8, 3, T),
        Config(128, 64, 8, 3, T),
        Config(128, 32, 8, 2, T),
        Config(32, 32, 8, 1),
    ),
    ("forward", "sm_100", "heavy"): (
        Config(128, 64, 8, 2, T),
        Config(64, 32, 8, 2, T),
        Config(32, 32, 8, 1),
        Config(16, 32, 8, 1),
    ),
    ("key_gradient", "sm_100", "light"): (
        Config(64, 128, 8, 1, T),
        Config(32, 64, 8, 2, T),
        Config(32, 32, 8, 1),
        Config(16, 16, 8, 1, together=False),
    ),
    ("key_gradient", "sm_100", "heavy"): (
        Config(32, 64, 8, 1, T),
        Config(32, 64, 8, 1, T),
        Config(32, 32, 8, 1, together=False),
        Config(16, 16, 8, 1, together=False),
    ),
    ("query_gradient", "sm_100", "light"): (
        Config(128, 64, 8, 2, T),
        Config(128, 64, 8, 2, T),
        Config(64, 32, 8, 2, T),
        Config(32, 16, 8, 1),
    ),
    ("query_gradient", "sm_100", "heavy"): (
        Config(128, 32, 8, 1, T),
        Config(64, 32, 8, 1, T),
        Config(32, 16, 8, 1),
        Config(16, 16, 8, 1),
    ),
    # 4 warps of 64 lanes; 64 KiB of LDS.
    ("forward", "gfx942", "light"): (
        Config(128, 64, 4, 1),
        Config(128, 64, 4, 1),
        Config(64, 64, 4, 1),
        Config(64, 16, 4, 1),
    ),
    # 64 keys at a time would move 8% of the inner loop's instructions between scalar and vector registers.
    ("forward", "gfx942", "heavy"): (
        Config(128, 32, 4, 1),
        Config(64, 32, 4, 1),
        Config(32, 32, 4, 1),
        Config(32, 16, 4, 1),
    ),
    ("key_gradient", "gfx942", "light"): (
        Config(64, 64, 4, 1),
        Config(64, 64, 4, 1),
        Config(16, 32, 4, 1),
        Config(16, 16, 4, 1, together=False),
    ),
    ("key_gradient", "gfx942", "heavy"): (
        Config(32, 64, 4, 1),
        Config(32, 64, 4, 1),
        Config(16, 16, 4, 1, together=False),
        Config(16, 16, 4, 1, together=False),
    ),
    ("query_gradient", "gfx942", "light"): (
        Config(128, 64, 4, 1),
        Config(64, 64, 4, 1),
        Config(32, 32, 4, 1),
        Config(16, 16, 4, 1),
    ),
    ("query_gradient", "gfx942", "heavy"): (
        Config(64, 32, 4, 1),
        Config(64, 32, 4, 1),
        Config(32, 16, 4, 1),
        Config(16, 16, 4, 1),
    ),
}

# Float32, exact or tf32, on every chip: fused multiply-adds hold their operands in registers, 16 dims at a time.
_FLOAT = {
    "forward": (Config(32, 16, 8, 1),) * 4,
    "key_gradient": (Config(16, 16, 8, 1),) * 2 + (Config(16, 16, 8, 1, together=False),) * 2,
    "query_gradient": (Config(16, 32, 4, 1),) * 2 + (Config(16, 16, 8, 1),) * 2,
    "weights": (Config(32, 32, 8, 1),) * 4,
    "additive_gradient": (Config(16, 32, 8, 1),) * 2 + (Config(16, 16, 8, 1),) * 2,
}
# ptxas for sm_100 moves more loads of operands ahead: fewer threads with more of the tile each, or twice as many.
_FLOAT_SM_100 = {
    "forward": (Config(32, 16, 8, 1),) * 3 + (Config(16, 32, 8, 1),),
    "key_gradient": (Config(16, 16, 4, 1),) * 2
    + (Config(16, 16, 8, 1, together=False), Config(32, 16, 16, 1, together=False)),
    "query_gradient": (Config(16, 32, 4, 1),) * 2 + (Config(16, 16, 8, 1), Config(16, 16, 16, 1)),
}

# Bound by what they write; two products, and the tile of the result stays in registers.
_SQUARE = {
    "weights": (Config(32, 32, 4, 1), Config(32, 32, 4, 1), Config(32, 32, 4, 1), Config(16, 32, 8, 1)),
    "additive_gradient": (Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(16, 32, 8, 1), Config(16, 16, 8, 1)),
}
_SQUARE_GFX942 = _SQUARE | {
    "additive_gradient": (Config(16, 64, 4, 1), Config(16, 64, 4, 1), Config(16, 32, 4, 1), Config(16, 16, 4, 1)),
}
