"""A second measurement beside a process that keeps one core busy."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

# A call on two cores of which one is half taken has three quarters of them; what goes beyond this is waiting.
MOST_SLOWED = 2.2

# Seconds after which the next quiet call is again what it would be on a machine that was never busy: a call that waited
# for an OpenMP thread keeps ours away from those threads for so long at most (csrc/cpu/threads.cpp).
SETTLED_AFTER = 4.0


@contextlib.contextmanager
def burner() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing but take the time of one core, at the priority of this one."""
    # It says when it runs, and it ends with this process, however that ends: its input is then closed.
    spin = (
        "import sys, threading, os\n"
        "threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()\n"
        "print('spinning', flush=True)\n"
        "while True: pass\n"
    )
    child = subprocess.Popen([sys.executable, "-c", spin], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    try:
        child.stdout.readline()
        yield child
    finally:
        child.kill()
        child.communicate()


def slowed(row: dict[str, Any]) -> dict[str, float]:
    """Of each contestant that was timed both ways, its busy time over its quiet time."""
    return {n: t["median"] / row["times"][n]["median"] for n, t in row["busy"].items()}


def print_table(rows: list[dict[str, Any]], console: Console) -> None:
    """A row per shape: quiet, busy and their ratio for each contestant; and how many of ours waited."""
    names = list(dict.fromkeys(name for row in rows for name in row["busy"]))
    table = Table("beside a busy process", *(f"{n} {what}" for n in names for what in ("quiet ms", "busy ms", "ratio")))
    for row in rows:
        cells: list[str] = []
        for name in names:
            if name not in row["busy"]:
                cells += ["-"] * 3
                continue
            quiet, busy = (row[key][name]["median"] for key in ("times", "busy"))
            cells += [f"{1e3 * quiet:.3f}", f"{1e3 * busy:.3f}", f"{busy / quiet:.2f}"]
        table.add_row(row["name"], *cells)
    console.print(table)
    over = [row["name"] for row in rows if slowed(row)["ours"] > MOST_SLOWED]
    console.print(f"ours above {MOST_SLOWED} times its quiet time: {', '.join(over) or 'none'}", markup=False)
