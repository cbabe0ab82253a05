"""`python -m fused_attention parity`: every backend on every device here, each feature by the tolerance rule.

A row is one backend, feature and dtype: the worst error of its results (output, lse, weights) and of its gradients
against float64, beside the error of plain eager PyTorch in the same dtype.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..backends import cpu
from ..dispatch import BACKENDS
from ..spec import Device, make_spec
from .features import FEATURES
from .problems import Case, draws, joined, make, results
from .rule import compare

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Enough numbers that two maxima of them can be compared, few enough that all rows take well under two minutes.
VALUES = 8192


class Place(NamedTuple):
    """A backend on a device; `device` is torch's name of it."""

    backend: str
    device: str


@dataclass
class Row:
    """status: "ok", "failed", "not supported" or "not reached"; parts: per result {"error", "torch", "allowed"}."""

    backend: str
    device: str
    feature: str
    dtype: str
    status: str = "ok"
    reason: str = ""
    parts: dict[str, dict[str, float]] = field(default_factory=dict)

    def worst(self, gradients: bool) -> tuple[str, dict[str, float]] | None:
        """The gradient, or else the output or weights, that comes nearest to what is allowed, or farthest beyond it."""
        parts = [(n, p) for n, p in self.parts.items() if n != "lse" and n.startswith("d") == gradients]
        return max(parts, key=lambda item: _excess(item[1]), default=None)

    def plain(self) -> dict[str, Any]:
        """As JSON has it: an error that is not finite is null."""
        parts = {n: {k: v if math.isfinite(v) else None for k, v in p.items()} for n, p in self.parts.items()}
        return {**asdict(self), "parts": parts}


def _excess(part: dict[str, float]) -> float:
    return part["error"] / part["allowed"] if part["allowed"] else (torch.inf if part["error"] else 0.0)


def places(wanted: list[str] | None) -> list[Place]:
    """Every backend on every kind of device here."""
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return [Place(name, device) for device in devices for name in BACKENDS if wanted is None or name in wanted]


def _supports(place: Place, case: Case, dtype: torch.dtype) -> str | None:
    x, options = make(case, dtype)
    device = Device.of(torch.empty(0, device=place.device))
    return BACKENDS[place.backend].supports(make_spec(x, options), device)


def _measure(place: Place, case: Case, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    runs = [results(case, place.backend, dtype, seed, place.device) for seed in range(draws(case, VALUES))]
    figures = {}
    for name in runs[0]:
        out, same, ref = (joined([run[name][i] for run in runs]) for i in range(3))
        figures[name] = compare(out, same, ref, grad=name.startswith("d"))
    return figures


def measure(place: Place, feature: str, dtype: str) -> Row:
    """Run one feature's problems; a part's figures are those of the problem in which it is worst."""
    row = Row(place.backend, place.device, feature, dtype)
    for case in FEATURES[feature]:
        reason = _supports(place, case, DTYPES[dtype])
        if reason is not None:
            row.status, row.reason = "not supported", reason
            return row
        try:
            parts = _measure(place, case, DTYPES[dtype])
        except Exception as error:  # whatever goes wrong in a kernel is this row's finding
            row.status, row.reason = "failed", f"{case}: {type(error).__name__}: {error}"
            return row
        for name, part in parts.items():
            if name not in row.parts or _excess(part) > _excess(row.parts[name]):
                row.parts[name] = part
            if row.status == "ok" and not part["error"] <= part["allowed"]:
                row.status, row.reason = "failed", f"{case}: {name}: {part['error']:.1e} > {part['allowed']:.1e}"
    return row


def run_all(where: list[Place], features: list[str], dtypes: list[str], seconds: float) -> Iterator[Row]:
    """Every feature in one dtype before the next dtype; what the time does not reach is "not reached"."""
    end = time.monotonic() + seconds if seconds else torch.inf
    for dtype in dtypes:
        for feature in features:
            for place in where:
                late = time.monotonic() > end
                yield Row(*place, feature, dtype, "not reached") if late else measure(place, feature, dtype)


def _figures(found: tuple[str, dict[str, float]] | None) -> str:
    return "" if found is None else f"{found[0]:<14}{found[1]['error']:.1e} / {found[1]['torch']:.1e}"


def table(rows: list[Row]) -> list[str]:
    """One block per backend and device."""
    lines: list[str] = []
    for place in dict.fromkeys(Place(r.backend, r.device) for r in rows):
        mine = [r for r in rows if (r.backend, r.device) == place]
        lines += ["", f"{place.backend} on {place.device}"]
        reasons = {r.reason for r in mine}
        if len(mine) > 1 and len(reasons) == 1 and {r.status for r in mine} == {"not supported"}:
            lines.append(f"  not run: {reasons.pop()}")
            continue
        lines.append(
            f"  {'feature':<30}{'dtype':<10}{'worst result, ours / PyTorch':<34}worst gradient, ours / PyTorch"
        )
        for r in sorted(mine, key=lambda r: list(FEATURES).index(r.feature)):
            shown = f"{_figures(r.worst(False)):<34}{_figures(r.worst(True)):<34}{r.status}" if r.parts else r.status
            note = f": {r.reason}" if r.reason else ""
            lines.append(f"  {r.feature:<30}{r.dtype:<10}{shown}{note}")
    return lines


def environment() -> dict[str, Any]:
    """What the figures were measured on."""
    extension = cpu.info()
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "cpu kernels": extension.get("isa", f"missing: {extension.get('error')}"),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--backends", nargs="+", choices=tuple(BACKENDS), help="default: all")
    parser.add_argument("--features", nargs="+", choices=tuple(FEATURES), default=list(FEATURES), metavar="FEATURE")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--seconds", type=float, default=110.0, help="after which no row begins; 0: no limit")
    parser.add_argument("--report", type=Path, help="also write the result here; JSON if the name ends in .json")
    parser.add_argument("--json", action="store_true")


def _summary(rows: list[Row], seconds: float) -> str:
    counts = {s: sum(r.status == s for r in rows) for s in ("ok", "failed", "not supported", "not reached")}
    text = f"{counts['ok']} ok, {counts['failed']} failed, {counts['not supported']} not supported"
    if counts["not reached"]:
        text += f", {counts['not reached']} NOT REACHED in the time (--seconds 0 runs all)"
    return f"{text}; {seconds:.0f} s"


def run(args: argparse.Namespace) -> int:
    """Run, print and write what was asked for; the exit status, 1 if anything failed."""
    start, rows = time.monotonic(), []
    where = places(args.backends)
    total = len(where) * len(args.features) * len(args.dtypes)
    for row in run_all(where, args.features, args.dtypes, args.seconds):
        rows.append(row)
        if sys.stderr.isatty():
            print(f"\r{len(rows)}/{total} {row.backend:<10}{row.feature:<32}", end="", file=sys.stderr, flush=True)
    seconds = time.monotonic() - start
    found = {"environment": environment(), "seconds": seconds, "rows": [r.plain() for r in rows]}
    about = [f"{k:<12} {', '.join(v) or 'none' if isinstance(v, list) else v}" for k, v in environment().items()]
    text = "\n".join([*about, *table(rows), "", _summary(rows, seconds)])
    as_json = json.dumps(found, indent=2, allow_nan=False)
    print(as_json if args.json else text)
    if args.report is not None:
        args.report.write_text((as_json if args.report.suffix == ".json" else text) + "\n")
    return int(any(r.status == "failed" for r in rows))
