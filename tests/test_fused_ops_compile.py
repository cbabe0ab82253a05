"""The kernels of `fused_softmax` and `rope_qk_norm` compile for every chip, without a GPU or a register spill."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attention.backends.reference_ops import Softmax, Tables

from .triton_support import INTERPRETED

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 replaces the compiler by the interpreter")

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


class Offline:
    """Stands in for a driver: names a chip that is not here."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_device(self) -> Any:
        return self.target  # keys Triton's cache per device

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


@pytest.fixture(params=TARGETS, scope="module")
def arch(request: pytest.FixtureRequest) -> Iterator[str]:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    before = driver._active  # `active` would look for a GPU
    driver.set_active(Offline(GPUTarget(*TARGETS[request.param])))
    yield request.param
    driver.set_active(before)


def _spills(compiled: Any, folder: Path) -> dict[str, int]:
    """What the compiled kernel keeps in memory for want of registers."""
    if "amdgcn" in compiled.asm:
        names = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
        found = {name: re.findall(rf"\.{name}:\s*(\d+)", compiled.asm["amdgcn"]) for name in names}
    else:
        import triton

        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        cubin = folder / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [str(tool), "--dump-resource-usage", str(cubin)]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = {name: re.findall(rf"\b{name}:(\d+)", usage) for name in ("STACK", "LOCAL")}
    assert all(len(values) == 1 for values in found.values()), found
    return {name: int(values[0]) for name, values in found.items()}


def _compile(launches: list[Any], folder: Path) -> None:
    assert launches
    for launch in launches:
        compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
        spilled = _spills(compiled, folder)
        assert not any(spilled.values()), spilled


def _mask(kind: str | None, columns: int) -> Tensor | None:
    if kind is None:
        return None
    return torch.ones(1, 1, 1, columns, dtype=torch.bool if kind == "bool" else torch.float32)


# dtype, [B, H, M, N], mask, options
SOFTMAX = {
    "short": (torch.float32, (2, 3, 5, 7), "float", Softmax()),
    "plain": (torch.bfloat16, (2, 2, 128, 1024), None, Softmax(0.125)),
    "widest-block": (torch.float32, (1, 1, 2, 8192), "float", Softmax(0.5, 30.0, "bottom_right")),
    "loop": (torch.float16, (1, 1, 2, 9000), "bool", Softmax(0.5, 30.0, "top_left")),
}


@pytest.mark.parametrize("case", SOFTMAX)
def test_softmax(arch: str, case: str, tmp_path: Path) -> None:
    from fused_attention.backends.triton import softmax

    dtype, shape, kind, o = SOFTMAX[case]
    x, mask = torch.zeros(shape, dtype=dtype), _mask(kind, shape[3])
    launches, y = softmax.forward_launches(x, mask, o, arch)
    needs = softmax.Needs(True, mask if kind == "float" else None)
    backward, _, _ = softmax.backward_launches(x, y, torch.zeros_like(y), o, needs, arch)
    _compile(launches + backward, tmp_path)


# dtype, D, R, interleaved, normalised
ROPE_NORM = {
    "llama": (torch.bfloat16, 128, 128, False, True),
    "gpt-j": (torch.float32, 256, 64, True, True),
    "rope-only": (torch.float16, 64, 64, False, False),
    "norm-only": (torch.bfloat16, 96, 0, False, True),
    "widest": (torch.float32, 8192, 8192, True, True),
}


@pytest.mark.parametrize("case", ROPE_NORM)
def test_rope_norm(arch: str, case: str, tmp_path: Path) -> None:
    from fused_attention.backends.triton.rope_norm import Given, launches

    dtype, dim, rotated, interleaved, normalised = ROPE_NORM[case]
    q, k = torch.zeros(2, 4, 33, dim, dtype=dtype), torch.zeros(2, 33, 2, dim, dtype=dtype).transpose(1, 2)
    weight = torch.zeros(dim, dtype=dtype) if normalised else None
    table = torch.zeros(50, rotated // 2)
    positions = torch.zeros(2, 33, dtype=torch.int64)
    tables = Tables(table, table.clone(), positions, interleaved) if rotated else None
    forward, _, _ = launches(Given(q, weight), Given(k, weight), tables, 1e-6, arch)
    sides = (Given(t if normalised else None, weight, torch.zeros_like(t), normalised) for t in (q, k))
    backward, _, _ = launches(*sides, tables, 1e-6, arch)
    _compile(forward + backward, tmp_path)
