"""Which tile sizes, warps and stages a kernel takes: pure functions of the chip, the dtype and the head dims.

arch is "sm_80", "sm_90", "sm_100", "gfx942" or None for the interpreter. Numbers are bounded by registers (255 per
thread), by shared memory (sm_80: 163 KiB, sm_90 and sm_100: 227 KiB a block, gfx942: 64 KiB) and by what the matrix
unit wants (wgmma and tcgen05: 64 or 128 rows per group of four warps).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...spec import AttentionSpec


class Config(NamedTuple):
    """How one kernel is compiled."""

    BLOCK_M: int
    BLOCK_N: int
    warps: int
    stages: int
    descriptors: bool = False  # tiles of the inner loop are read through tensor descriptors (TMA)
    specialize: bool = False  # loads and matrix products on warps of their own
    together: bool = True  # dK and dV in one kernel

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


def padded(dim: int) -> int:
    """A head dim as a tile has it: a power of two, at least the 16 of the matrix unit."""
    return max(16, 1 << (dim - 1).bit_length())


def hopper_or_newer(arch: str) -> bool:
    """Whether tensor descriptors become TMA."""
    return arch.startswith("sm_") and int(arch[3:]) >= 90


def shares(tiles: int, steps: int) -> int:
    """In how many shares a gradient that broadcasts is summed: enough programs for a large chip, by shape alone."""
    return max(1, min(steps, 512 // max(tiles, 1)))


def forward(arch: str | None, spec: AttentionSpec) -> Config:
    """The forward kernel's config."""
    d = padded(max(spec.head_dim, spec.value_dim))
    if arch is None:
        return Config(32, 32, 4, 1)
    if arch.startswith("gfx"):
        return Config(64, 32, 4, 1)
    if spec.dtype == torch.float32:
        return Config(32, 32, 4, 1)
    return Config(128 if d <= 128 else 64, 64 if d <= 128 else 32, 8, 2, hopper_or_newer(arch))


def delta(arch: str | None, spec: AttentionSpec) -> Config:
    """Of the kernel that sums output times its gradient: bound by memory."""
    return Config(32, 0, 4, 1)


def key_gradient(arch: str | None, spec: AttentionSpec) -> Config:
    """Of dK and dV."""
    if arch is None:
        return Config(32, 32, 4, 1)
    d = padded(max(spec.head_dim, spec.value_dim))
    if spec.dtype == torch.float32:
        return Config(32, 32, 4, 1)
    return Config(32, 64 if d <= 128 else 32, 8, 1, hopper_or_newer(arch), together=d <= 256)


def query_gradient(arch: str | None, spec: AttentionSpec) -> Config:
    """Of dQ."""
    if arch is None:
        return Config(32, 32, 4, 1)
    d = padded(max(spec.head_dim, spec.value_dim))
    if spec.dtype == torch.float32:
        return Config(32, 32, 4, 1)
    return Config(64, 64 if d <= 128 else 32, 8, 1, hopper_or_newer(arch))


def weights(arch: str | None, spec: AttentionSpec) -> Config:
    """Of the attention weights: bound by writing them."""
    if arch is None:
        return Config(32, 32, 4, 1)
    return Config(32, 64, 4, 1)


def additive_gradient(arch: str | None, spec: AttentionSpec) -> Config:
    """Of the gradient of a mask or bias."""
    if arch is None:
        return Config(32, 32, 4, 1)
    return Config(32, 32, 4, 1)
