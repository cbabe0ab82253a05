"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import fused_attention
from fused_attention.cli import collect_info


def describe() -> dict[str, Any]:
    """The processor, its instruction sets, threads and versions."""
    model, flags = platform.processor() or platform.machine(), set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        found = {key.strip(): value.strip() for key, _, value in fields}
        model, flags = found.get("model name", model), set(found.get("flags", "").split())
    extension = collect_info()["cpu_extension"]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": model,
        "instruction sets": [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if name in flags],
        "AMX": "yes" if "amx_tile" in flags else "no",
        "kernels": extension.get("isa", extension.get("error")),
        "compiler": extension.get("compiler"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "fused_attention": fused_attention.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def matrix_rate(dtype: torch.dtype, size: int = 1024, seconds: float = 0.2) -> float:
    """Floating-point operations per second of torch.mm at its best: the limit that attention can come near to."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    taken: list[float] = []
    while sum(taken) < seconds:
        start = time.perf_counter()
        torch.mm(a, b)
        taken.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(taken)
