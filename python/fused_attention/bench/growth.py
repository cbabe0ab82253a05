"""How the cost of one call grows with its length: CPU time over S^2, extra memory over S, relative to the shortest.

The time is that of one thread, which other programs on the machine lengthen less than time on the wall; the extra
memory is what the process takes during the call beyond its inputs, the output included.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .machine import describe, extra_memory
from .peers import ours
from .shapes import AttentionShape
from .timing import Run


def _seconds(run: Run, rounds: int) -> float:
    """CPU time of the calling thread, the least of some calls."""
    least = float("inf")
    for _ in range(rounds):
        start = time.thread_time()
        run()
        least = min(least, time.thread_time() - start)
    return least


def _call(shape: AttentionShape) -> Run:
    torch.manual_seed(0)
    like: dict[str, Any] = {"dtype": shape.dtype, "requires_grad": shape.backward}
    qkv = [torch.randn(shape.batch, shape.heads, shape.rows, shape.head_dim, **like) for _ in range(3)]
    function = ours(shape, torch.device("cpu"))

    def run() -> object:
        output = function(*qkv)
        return torch.autograd.grad(output.sum(), qkv) if shape.backward else output

    return run


def measure(shapes: Iterable[AttentionShape], seconds: float) -> list[dict[str, Any]]:
    """A row per shape; within a group the first is what the others are compared with. On one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    first: dict[str, dict[str, Any]] = {}
    try:
        for shape in shapes:
            run = _call(shape)
            if not rows:
                run()  # what the first call of all loads is not its own
            extra = extra_memory(run)
            took = _seconds(run, 1)
            took = min(took, _seconds(run, max(2, int(seconds / max(took, 1e-6)))))
            row = {"name": shape.name, "group": shape.group, "tokens": shape.rows, "seconds": took, "bytes": extra}
            base = first.setdefault(shape.group, row)
            longer = shape.rows / base["tokens"]
            row["time over S^2"] = took / base["seconds"] / longer**2
            row["memory over S"] = extra / base["bytes"] / longer if extra and base["bytes"] else None
            rows.append(row)
    finally:
        torch.set_num_threads(threads)
    return rows


def run(shapes: Iterable[AttentionShape], seconds: float, console: Any, file: Path | None) -> int:
    """Measure and print; returns the exit status."""
    from rich.table import Table

    rows = measure(shapes, seconds)
    table = Table("", "CPU ms", "time / S^2", "extra MB", "memory / S")
    for row in rows:
        memory = ["-", "-"] if row["bytes"] is None else [f"{row['bytes'] / 1e6:.2f}", "-"]
        if row["memory over S"] is not None:
            memory[1] = f"{row['memory over S']:.2f}"
        table.add_row(row["name"], f"{1e3 * row['seconds']:.1f}", f"{row['time over S^2']:.2f}", *memory)
    console.print(table)
    console.print("each relative to the shortest of its group; one thread, the least of some calls")
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        about = describe(torch.device("cpu"))
        file.write_text(json.dumps({"machine": about, "results": rows}, indent=1) + "\n")
    return 0
