"""What a figure was measured on, and how much memory a call takes there."""

from __future__ import annotations

import ctypes
import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ..backends import cpu
from .timing import Run

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_SHOWN = ("avx2", "avx512f", "avx512_bf16", "amx_tile")


def _processor() -> tuple[str, set[str]]:
    """The model and the instruction sets."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return model, set()
    fields = (line.partition(":") for line in cpuinfo.read_text().splitlines())
    found = {key.strip(): value.strip() for key, _, value in fields}
    return found.get("model name", model), set(found.get("flags", "").split())


def describe(device: torch.device) -> dict[str, Any]:
    """The processor, its instruction sets, threads and versions; on a GPU also the GPU and its driver's CUDA."""
    model, flags = _processor()
    extension = cpu.info()
    found: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": model,
        "instruction sets": [name for name in _SHOWN if name in flags],
        "AMX": "yes" if "amx_tile" in flags else "no",
        "kernels": extension.get("isa", extension.get("error")),
        "compiler": extension.get("compiler"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
    }
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        found |= {"GPU": p.name, "multiprocessors": p.multi_processor_count, "CUDA of torch": torch.version.cuda}
    return found | {"torch": torch.__version__, "python": platform.python_version()}


def _status(field: str) -> int:
    """Bytes."""
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def extra_memory(run: Run) -> int | None:
    """Bytes at the peak of a call beyond those before it; None where the system does not tell."""
    if not _CLEAR.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text("5")  # the high-water mark starts again here
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before
