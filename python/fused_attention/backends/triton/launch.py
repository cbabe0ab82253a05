"""What a kernel launch is, as data: the same launch runs on a GPU, in the interpreter, or is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)


class Launch(NamedTuple):
    """One launch of a `triton.jit` function: `kernel[grid](*args, **options)`.

    options holds the kernel's constexpr arguments by name beside num_warps and num_stages.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


def compile_options(arch: str | None, warps: int) -> dict[str, int]:
    """num_warps and, on NVIDIA, maxnreg: the limit that the hardware has anyway, 65536 registers for all threads.

    Without one ptxas aims at a number of programs per multiprocessor, and spills a register or two to reach it.
    """
    if arch is None or not arch.startswith("sm_"):
        return {"num_warps": warps}
    return {"num_warps": warps, "maxnreg": min(255, 65536 // (32 * warps))}


def run(launches: Iterable[Launch], where: Tensor) -> None:
    """Run launches in order on the device and current stream of `where`; nothing synchronises."""
    if where.is_cuda and where.device.index != torch.cuda.current_device():
        with torch.cuda.device(where.device):
            _run(launches)
    else:
        _run(launches)


def _run(launches: Iterable[Launch]) -> None:
    for launch in launches:
        launch.kernel[launch.grid](*launch.args, **launch.options)
