"""`python -m fused_attention bench`: ours beside its peers, interleaved in one process."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch

from .shapes import SUITES, AttentionShape, Shape

PEER_NAMES = ("torch", "flash", "cudnn", "efficient", "flex", "openvino", "flash_attn")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The command's options."""
    p.add_argument("--suite", choices=SUITES, default="models")
    p.add_argument("--peers", nargs="+", choices=PEER_NAMES, default=["torch"])
    p.add_argument("--only", default="", metavar="TEXT", help="only the shapes whose name contains this")
    p.add_argument("--dtype", choices=DTYPES, help="run every shape in this dtype")
    p.add_argument("--device", help="default: cuda for the suites gpu and train, else cpu")
    p.add_argument("--seconds", type=float, default=1.0, help="time per shape")
    p.add_argument("--busy", action="store_true", help="time again beside a process that keeps one core busy")
    p.add_argument("--list", action="store_true", help="print the shapes and leave")
    p.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    p.add_argument("--plot", type=Path, metavar="FILE", help="draw throughput against length: .png or .svg")
    p.add_argument("--html", type=Path, metavar="FILE", help="write a page with tables and plot")


def _shapes(args: argparse.Namespace) -> list[Shape]:
    found = [s for s in SUITES[args.suite] if args.only in s.name]
    if args.dtype is not None:
        found = [dataclasses.replace(s, dtype=DTYPES[args.dtype]) for s in found]
    return found


def _time_all(
    shapes: list[Shape], args: argparse.Namespace, device: torch.device, console: Any
) -> list[dict[str, Any]]:
    from rich.progress import Progress

    from .busy import SETTLED_AFTER, burner
    from .contest import make_contest
    from .report import make_row
    from .timing import matrix_rate, memory_rate, take_turns

    rows = []
    best: dict[Any, float] = {}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(shapes))
        for shape in shapes:
            progress.update(task, description=shape.name)
            contest = make_contest(shape, args.peers, device)
            contest.check()
            times = take_turns(contest.runs, args.seconds, device)
            busy = {}
            if args.busy:
                with burner():
                    busy = take_turns(contest.runs, args.seconds, device)
                time.sleep(SETTLED_AFTER)
            # Once per shape, the best counts: other programs come and go.
            for key, rate in ((shape.dtype, matrix_rate(shape.dtype, device)), ("memory", memory_rate(device))):
                best[key] = max(rate, best.get(key, 0.0))
            rows.append((shape, times, contest.refused, busy))
            progress.advance(task)
    for key, rate in best.items():
        name = "memory" if key == "memory" else f"torch.mm in {str(key).removeprefix('torch.')}"
        unit = "GB/s" if key == "memory" else "GFLOP/s"
        console.print(f"{name}, the best seen: {rate / 1e9:.0f} {unit}")
    found = []
    for shape, times, refused, busy in rows:
        row = make_row(shape, times, refused, {"matrix": best[shape.dtype], "memory": best["memory"]})
        found.append(row | ({"busy": {name: t._asdict() for name, t in busy.items()}} if busy else {}))
    return found


def run(args: argparse.Namespace) -> int:
    """Time, print and write; returns the exit status."""
    shapes = _shapes(args)
    if args.list or not shapes:
        print("\n".join(s.name for s in shapes) or f"no shape of the suite {args.suite} contains {args.only!r}")
        return 0 if shapes else 1
    try:
        from rich.console import Console
    except ImportError:
        print("bench needs rich and matplotlib: pip install 'fused-attention[bench]'", file=sys.stderr)
        return 1
    from . import busy, growth, report
    from .machine import describe

    device = torch.device(args.device or ("cuda" if args.suite in ("gpu", "train") else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        print("there is no GPU here; --device cpu times the suite on the processor", file=sys.stderr)
        return 1
    console = Console(width=None if sys.stdout.isatty() else 140)
    machine = describe(device)
    for key, value in machine.items():
        console.print(f"{key:<18} {value}", markup=False, highlight=False)
    if args.suite == "growth":
        return growth.run(cast(list[AttentionShape], shapes), args.seconds, console, args.json)
    rows = _time_all(shapes, args, device, console)
    report.print_tables(rows, console)
    if args.busy:
        busy.print_table(rows, console)
    if args.json:
        report.write_json(args.json, machine, rows)
    if args.plot:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        report.draw(rows, args.plot)
    if args.html:
        report.write_html(args.html, f"fused_attention bench: {args.suite} on {device}", machine, rows)
    return 0
