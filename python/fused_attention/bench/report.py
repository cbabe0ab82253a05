"""What was timed, for people and for machines: a table, JSON, a plot, and a page that opens without a network."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .shapes import ModuleShape, Shape
from .timing import Times

Row = dict[str, Any]

MEMORY_BOUND = 16  # operations per byte below which a call is held against the memory's rate


def make_row(shape: Shape, times: dict[str, Times], refused: dict[str, str], rates: dict[str, float]) -> Row:
    """One shape's figures: seconds, the ratio of each peer's time to ours, and how near ours comes to the limit.

    rates: "matrix" in operations and "memory" in bytes per second, as measured on this machine.
    """
    mine = times["ours"].median
    ratios = {name: t.median / mine for name, t in times.items() if name != "ours"}
    by_memory = shape.flops / shape.bytes < MEMORY_BOUND
    amount, limit = (shape.bytes, "memory") if by_memory else (shape.flops, "matrix")
    return {
        "name": shape.name,
        "group": shape.group,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "tokens": shape.tokens if isinstance(shape, ModuleShape) else shape.columns,
        "flops": shape.flops,
        "bytes": shape.bytes,
        "times": {name: t._asdict() for name, t in times.items()},
        "ratios": ratios,
        "refused": refused,
        "limit": limit,
        "of limit": amount / mine / rates[limit],
    }


def summary(rows: Iterable[Row]) -> list[Row]:
    """Per group and peer the geometric mean and the smallest of the ratios."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        for peer, ratio in row["ratios"].items():
            ratios.setdefault((row["group"], peer), []).append(ratio)
    return [
        {
            "group": group,
            "peer": peer,
            "mean": math.exp(statistics.fmean(map(math.log, found))),
            "least": min(found),
            "shapes": len(found),
        }
        for (group, peer), found in ratios.items()
    ]


# --- for people -----------------------------------------------------------------------------------------------------


def _cells(row: Row, peers: list[str]) -> list[str]:
    rate = f"{row['flops'] / row['times']['ours']['median'] / 1e9:.0f}"
    if row["limit"] == "memory":
        rate = f"{row['bytes'] / row['times']['ours']['median'] / 1e9:.1f} GB/s"
    cells = [row["name"], f"{1e3 * row['times']['ours']['median']:.3f}"]
    for peer in peers:
        cells.append(f"{row['ratios'][peer]:.2f}" if peer in row["ratios"] else "-")
    return [*cells, rate, f"{row['of limit']:.0%}"]


def _heads(peers: list[str]) -> list[str]:
    return ["", "ours ms", *(f"{peer} / ours" for peer in peers), "ours GFLOP/s", "of the limit"]


def peers_of(rows: list[Row]) -> list[str]:
    """Those with a figure in any row, in the order in which they were asked for."""
    return list(dict.fromkeys(peer for row in rows for peer in row["ratios"]))


def print_tables(rows: list[Row], console: Console) -> None:
    """A row per shape, then a row per group and peer, then what could not be timed and why."""
    peers = peers_of(rows)
    table = Table(*_heads(peers))
    for row in rows:
        cells = _cells(row, peers)
        for i, peer in enumerate(peers, 2):
            if peer in row["ratios"]:
                cells[i] = f"[{'green' if row['ratios'][peer] >= 1 else 'red'}]{cells[i]}[/]"
        table.add_row(*cells)
    console.print(table)
    groups = Table("", "peer", "geometric mean of peer / ours", "least", "shapes")
    for line in summary(rows):
        groups.add_row(line["group"], line["peer"], f"{line['mean']:.2f}", f"{line['least']:.2f}", str(line["shapes"]))
    console.print(groups)
    for reason, names in _refusals(rows).items():
        console.print(f"not timed, {reason} ({len(names)} shapes)", markup=False, highlight=False)


def _refusals(rows: list[Row]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in rows:
        for peer, reason in row["refused"].items():
            found.setdefault(f"{peer}: {reason}", []).append(row["name"])
    return found


# --- files ----------------------------------------------------------------------------------------------------------


def write_json(path: Path, machine: dict[str, Any], rows: list[Row]) -> None:
    """Everything, in seconds, operations and bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "summary": summary(rows), "results": rows}, indent=1) + "\n")


def draw(rows: list[Row], target: Path | io.BytesIO, kind: str | None = None) -> None:
    """Throughput against sequence length, a panel for each group with several lengths, a line for each contestant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = {g: [r for r in rows if r["group"] == g] for g in dict.fromkeys(r["group"] for r in rows)}
    shown = {g: found for g, found in groups.items() if len({r["tokens"] for r in found}) > 1} or groups
    columns = min(3, len(shown))
    lines = math.ceil(len(shown) / columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(5 * columns, 3.6 * lines), squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.remove()
    for axis, (group, found) in zip(axes.flat, shown.items(), strict=False):
        for who in ("ours", *peers_of(found)):
            points: dict[int, list[float]] = {}
            for row in found:
                if who in row["times"]:
                    points.setdefault(row["tokens"], []).append(row["flops"] / row["times"][who]["median"] / 1e9)
            sizes = sorted(points)
            axis.plot(sizes, [statistics.fmean(points[n]) for n in sizes], marker="o", label=who)
        axis.set_xscale("log", base=2)
        lengths = sorted({r["tokens"] for r in found})
        axis.set_xticks(lengths, [str(n) for n in lengths])
        axis.set(title=group, xlabel="tokens", ylabel="GFLOP/s", ylim=(0, None))
        axis.legend()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(target, format=kind)
    pyplot.close(figure)


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; }
th { text-align: left; background: #f4f4f4; } td + td { text-align: right; font-variant-numeric: tabular-nums; }
td.ahead { color: #0a7a2f; } td.behind { color: #b3261e; } img { max-width: 100%; }
"""


def _html_table(heads: list[str], lines: list[list[str]], ratios: range) -> str:
    out = ["<table><tr>", *(f"<th>{html.escape(h)}</th>" for h in heads), "</tr>"]
    for line in lines:
        out.append("<tr>")
        for i, cell in enumerate(line):
            kind = ""
            if i in ratios and cell != "-":
                kind = ' class="ahead"' if float(cell) >= 1 else ' class="behind"'
            out.append(f"<td{kind}>{html.escape(cell)}</td>")
        out.append("</tr>")
    return "".join([*out, "</table>"])


def write_html(path: Path, title: str, machine: dict[str, Any], rows: list[Row]) -> None:
    """One page with the tables, the plot and the machine, all in the one file."""
    picture = io.BytesIO()
    draw(rows, picture, "png")
    encoded = base64.b64encode(picture.getvalue()).decode()
    peers = peers_of(rows)
    groups = [[s["group"], s["peer"], f"{s['mean']:.2f}", f"{s['least']:.2f}", str(s["shapes"])] for s in summary(rows)]
    about = [[key, ", ".join(value) if isinstance(value, list) else str(value)] for key, value in machine.items()]
    refusals = "".join(f"<li>{html.escape(r)} ({len(n)} shapes)</li>" for r, n in _refusals(rows).items())
    page = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(title)}</h1><p>Medians of interleaved calls. A ratio above 1: ours is faster.</p>",
        _html_table(["", "peer", "geometric mean of peer / ours", "least", "shapes"], groups, range(2, 4)),
        f'<img alt="throughput against sequence length" src="data:image/png;base64,{encoded}">',
        _html_table(_heads(peers), [_cells(row, peers) for row in rows], range(2, 2 + len(peers))),
        f"<h2>Not timed</h2><ul>{refusals}</ul>" if refusals else "",
        f"<h2>Machine</h2>{_html_table(['what', 'value'], about, range(0))}</html>",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(page) + "\n")
