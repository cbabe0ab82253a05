"""Time per call of fused_attention beside PyTorch's, as ratios.

Both take turns in one process (A B A B ...), so that a busy machine or a changing clock meets both; medians are
compared, and nothing is timed before its results have passed the tolerance rule.

    python -m benchmarks.ratio [--only TEXT] [--seconds 1.0] [--json benchmarks/results/NAME.json]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .contest import Contest, Run, all_contests
from .machine import describe, matrix_rate

FEWEST_ROUNDS = 5


def _seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def take_turns(contest: Contest, seconds: float) -> dict[str, Any]:
    """Check, then time for about `seconds`; medians in seconds."""
    contest.check()
    for run in (contest.ours, contest.torch):
        run()
    ours, torchs = [], []
    end = time.perf_counter() + seconds
    while len(ours) < FEWEST_ROUNDS or time.perf_counter() < end:
        ours.append(_seconds(contest.ours))
        torchs.append(_seconds(contest.torch))
    a, b = statistics.median(ours), statistics.median(torchs)
    rate = contest.flops / a
    return {"name": contest.name, "ours": a, "torch": b, "ratio": b / a, "rounds": len(ours), "flop/s": rate}


def _table(results: list[dict[str, Any]]) -> Table:
    table = Table("", "ours ms", "torch ms", "torch / ours", "ours GFLOP/s", "rounds")
    for r in results:
        color = "green" if r["ratio"] >= 1 else "red"
        ratio = f"[{color}]{r['ratio']:.2f}[/]"
        times = (f"{1e3 * r[who]:.3f}" for who in ("ours", "torch"))
        table.add_row(r["name"], *times, ratio, f"{r['flop/s'] / 1e9:.0f}", str(r["rounds"]))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only the cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=1.0, help="time per case")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)

    machine = describe()
    for key, value in machine.items():
        console.print(f"{key:<18} {value}", markup=False, highlight=False)
    best_rates: dict[torch.dtype, float] = {}
    results = []
    chosen = {name: make for name, make in all_contests().items() if args.only in name}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(chosen))
        for name, make in chosen.items():
            progress.update(task, description=name)
            contest = make()
            results.append(take_turns(contest, args.seconds))
            rate = matrix_rate(contest.dtype)  # once per case: other programs come and go
            best_rates[contest.dtype] = max(rate, best_rates.get(contest.dtype, 0.0))
            progress.advance(task)
    console.print(_table(results))
    for dtype, rate in best_rates.items():
        console.print(f"torch.mm in {str(dtype).removeprefix('torch.')}, the best seen: {rate / 1e9:.0f} GFLOP/s")
    if results:
        mean = math.exp(statistics.fmean(math.log(r["ratio"]) for r in results))
        console.print(f"geometric mean of torch / ours over {len(results)} cases: {mean:.2f}")
    if args.json:
        machine["matrix rates"] = {str(dtype): rate for dtype, rate in best_rates.items()}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
        console.print(f"written to {args.json}")


if __name__ == "__main__":
    main()
