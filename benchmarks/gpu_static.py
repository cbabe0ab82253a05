"""What the Triton and CUDA kernels need and execute on each chip, read from their machine code. No GPU is needed.

    python -m benchmarks.gpu_static [--arch sm_90 ...] [--dims 64 128 ...] [--kernels forward ...] [--dtype bfloat16]
                                    [--json PATH] [--markdown] [--update-docs]

Registers, spills and shared memory are those that ptxas and LLVM settled on; the counts are instructions of one warp
once round the inner loop over whole tiles (benchmarks/sass.py says which loop that is). The roofline follows from them
alone: the clocks that each unit of a multiprocessor needs for once round the loop (benchmarks/gpu_chips.py has the
rates). The largest of them bounds the speed from above: no schedule beats it, and memory, waits, the ends of the loop
and a falling clock can only make it worse. The bound without overlap is the sum of the matrix unit's clocks and the
largest of the others': what is reached if neither works while the other does. Nothing of this was measured.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton

from fused_attention.backends import cuda
from fused_attention.backends.triton.ahead import Resources, compile_ahead, cuobjdump, resources

from . import cuda_kernels
from .gpu_chips import CHIPS, blocks_per_unit, matrix_flops, pipe_cycles, rate_name
from .gpu_kernels import ARCHS, DIMS, DTYPES, KERNELS, Job, jobs, launches
from .sass import Loop, kinds, matrix_loop, read_amd, read_sass

DOCS = Path(__file__).parent.parent / "docs" / "performance.md"
OPEN, CLOSE = "<!-- gpu_static -->", "<!-- /gpu_static -->"

Row = dict[str, Any]


# --- one kernel -----------------------------------------------------------------------------------------------


def loop_products(ttir: str) -> list[list[tuple[int, int, int]]]:
    """The matrix products (m, n, k) of each loop of Triton's IR that has any in its own body."""
    found: list[list[tuple[int, int, int]]] = []
    stack: list[tuple[str, list[tuple[int, int, int]]]] = []
    for line in ttir.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        if re.search(r"\bscf\.(for|while)\b", line):
            stack.append((indent, []))
        elif stack and line.startswith(stack[-1][0] + "}") and " do " not in line:
            products = stack.pop()[1]
            found += [products] if products else []
        elif dot := re.search(r"tt\.dot .* tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x", line):
            if stack:
                stack[-1][1].append((int(dot[1]), int(dot[3]), int(dot[2])))
    return found


def triton_work(ttir: str) -> list[int]:
    """Operations of the matrix products of each loop, once round it."""
    return [sum(2 * m * n * k for m, n, k in products) for products in loop_products(ttir)]


def executed(loop: Loop, warps: int) -> tuple[float, str]:
    """Operations that the matrix instructions of a block execute once round the loop, and the rate that they run at."""
    total, names = 0.0, Counter(("half",))
    for op, n in (loop.each_warp + loop.one_warp).items():
        if flops := matrix_flops(op):
            total += flops * n * warps
            names[rate_name(op)] += n * flops
    return total, names.most_common(1)[0][0]


def roofline(loop: Loop, warps: int, work: list[int], arch: str) -> Row:
    """Clocks of each unit once round the loop, and the bounds that follow.

    work: operations of the matrix products of each loop, where the source tells; empty: as many as are executed.
    """
    chip = CHIPS[arch]
    done, rate = executed(loop, warps)
    # tcgen05's mnemonic has no shape, and its products are whole tiles; float32 has no matrix unit
    done = done or float(max(work, default=0))
    useful = float(min(work, key=lambda flops: abs(flops - done), default=done))
    others = pipe_cycles(loop.each_warp, loop.one_warp, warps, arch)
    has_matrix = bool(kinds(loop.each_warp + loop.one_warp)["matrix"])
    clocks = {"matrix unit": done / chip.matrix[rate] if has_matrix else 0.0, **others}
    slowest = max(clocks, key=clocks.__getitem__)
    per_clock = chip.units * chip.mhz * 1e6 * useful
    return {
        "clocks": {name: round(c, 1) for name, c in clocks.items()},
        "operations": useful,
        "repeated": done / useful if useful else None,
        "limit": slowest,
        "bound_tflops": per_clock / clocks[slowest] / 1e12,
        "serial_tflops": per_clock / (clocks["matrix unit"] + max(others.values())) / 1e12,
        "of_peak": per_clock / clocks[slowest] / chip.peak_of("fp8" if rate == "fp8" else "half"),
    }


def tile_bytes(job: Job, options: dict[str, Any]) -> int:
    """Bytes of keys, values and their scales that a tile of the decode kernel reads."""
    stored = {"decode int8": 1, "decode fp8": 1}.get(job.kernel, DTYPES[job.dtype].itemsize)
    scales = 8 if stored == 1 else 0
    return options["BLOCK_N"] * (2 * job.dim * stored + scales)


def _row(
    job: Job, r: Resources, name: str, tile: dict[str, int], loop: Loop | None, work: list[int], warps: int
) -> Row:
    """loop: what once round the inner loop `warps` warps execute, None where there is none to report."""
    blocks, scarce = blocks_per_unit(r, job.arch)
    row = {**job._asdict(), **r._asdict(), "job": job.kernel, "kernel": name, "tile": tile}
    row |= {"blocks": blocks, "scarce": scarce, "loop": None, "roofline": None, "bytes": None}
    if loop is not None:
        total = kinds(loop.each_warp + loop.one_warp)
        row["loop"] = {**total, "vector": total["fma"] + total["alu"] + total["special"]}
        row["mnemonics"] = dict((loop.each_warp + loop.one_warp).most_common())
        row["roofline"] = roofline(loop, warps, work, job.arch)
    return row


def _measure_triton(job: Job) -> list[Row]:
    rows = []
    todo = launches(job)
    for launch, compiled in zip(todo, compile_ahead(todo, job.arch), strict=True):
        r = resources(compiled, job.arch)
        if "ttg.warp_specialize" in compiled.asm["ttgir"]:
            raise NotImplementedError(f"{r.name} for {job.arch}: its loops run on several kinds of warps")
        nvidia = job.arch.startswith("sm_")
        loop = matrix_loop(read_sass(cuobjdump(compiled, "-sass")) if nvidia else read_amd(compiled.asm["amdgcn"]))
        work = triton_work(compiled.asm["ttir"])
        name = f"{r.name.removesuffix('_kernel').replace('_', ' ')} {job.kernel.partition(' ')[2]}".strip()
        tile = {k: v for k, v in launch.options.items() if k in ("BLOCK_M", "BLOCK_N")}
        row = _row(job, r, name, tile, loop if work else None, work, r.threads // CHIPS[job.arch].wave)
        if row["loop"] and job.kernel.startswith("decode"):
            row["bytes"] = tile_bytes(job, launch.options)
        rows.append(row)
    return rows


def _measure_cuda(job: Job) -> list[Row]:
    rows = []
    for part, r, sass in cuda_kernels.compile_job(job):
        loop = matrix_loop(read_sass(sass)) if part.products else None
        tile: dict[str, int] = {}
        if loop is not None:
            scores = executed(loop, part.computing)[0] / (2 * part.products * job.dim)
            other = {"BLOCK_M": "BLOCK_N", "BLOCK_N": "BLOCK_M"}[part.side]
            tile = {part.side: part.size, other: int(scores / part.size)}
        codes = " ".join(job.kernel.split()[2:])
        name = f"CUDA {part.kernel.partition('_sm')[0].partition('_bf16')[0].replace('_', ' ')} {codes}".strip()
        row = _row(job, r, name, tile, loop, [], part.computing)
        if part.key_bytes:  # each warp has keys of its own
            row["bytes"] = tile["BLOCK_N"] * r.threads // 32 * part.key_bytes
            row["tile"] = {"BLOCK_M": 16, "BLOCK_N": tile["BLOCK_N"] * r.threads // 32}
        rows.append(row)
    return rows


def measure(job: Job) -> list[Row]:
    """Compile a job's launches and read them: a row for each."""
    return _measure_cuda(job) if job.kernel in cuda_kernels.KERNELS else _measure_triton(job)


def whole_backward(rows: list[Row]) -> Row | None:
    """The bound of dQ, dK and dV together, for the five products that the gradients take, from the rows of one job."""
    parts = [row for row in rows if row["job"].endswith("backward") and row["roofline"]]
    if not parts:
        return None
    chip, dim = CHIPS[parts[0]["arch"]], parts[0]["dim"]
    clocks = {"bound_tflops": 0.0, "serial_tflops": 0.0}
    for row in parts:  # clocks of a multiprocessor for one score, from operations per score and operations per second
        scores = row["tile"]["BLOCK_M"] * row["tile"]["BLOCK_N"]
        for name in clocks:
            clocks[name] += row["roofline"]["operations"] / scores / row["roofline"][name]
    bounds = {name: 10 * dim / c for name, c in clocks.items()}
    line = {**bounds, "clocks": {}, "limit": "", "of_peak": bounds["bound_tflops"] * 1e12 / chip.peak}
    return {
        **parts[0],
        "kernel": f"{'CUDA ' * (parts[0]['job'] in cuda_kernels.KERNELS)}dQ, dK and dV together",
        "roofline": line,
    }


# --- tables ---------------------------------------------------------------------------------------------------


def _name(row: Row) -> str:
    return f"{row['kernel']} | {CHIPS[row['arch']].name} ({row['arch']}) | {row['dim']}"


def _head(*names: str) -> list[str]:
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def resource_table(rows: list[Row]) -> list[str]:
    """Registers, memory and instruction counts, in Markdown."""
    out = _head(
        "kernel", "chip", "D", "tile", "warps", "registers", "spilled bytes", "shared KiB", "blocks per SM (limit)",
        "matrix", "exp2", "other vector", "memory", "other",
    )  # fmt: skip
    for row in rows:
        shown = row["job"] == "cuda fp8" or row["job"].endswith(("backward", "decode"))
        if row["loop"] is None and not (row["dim"] == 128 and shown):
            continue  # kernels without products hardly differ: one row for each chip
        tile = " x ".join(str(row["tile"][k]) for k in ("BLOCK_M", "BLOCK_N") if k in row["tile"])
        loop = row["loop"] or {}
        counts = " | ".join(
            str(loop.get(k, 0)) if loop else "-" for k in ("matrix", "exp2", "vector", "memory", "other")
        )
        warps = row["threads"] // CHIPS[row["arch"]].wave
        out.append(
            f"| {_name(row)} | {tile} | {warps} | {row['registers']} | {row['spilled_bytes']} | "
            f"{row['shared_bytes'] / 1024:.1f} | {row['blocks']} ({row['scarce']}) | {counts} |"
        )
    return out


def _clocks(line: Row) -> list[str]:
    names = ("matrix unit", "exp2 and other functions", "float32 arithmetic", "integers and moves", "issue")
    c = {n: f"{clocks:.0f}" for n, clocks in line["clocks"].items()}
    if "vector arithmetic" in c:  # AMD: one unit for all three
        c["float32 arithmetic"] = c["vector arithmetic"]
    return [c.get(n, "") for n in names]


def roofline_table(rows: list[Row]) -> list[str]:
    """The computed bounds of the kernels that matrix products bound, in Markdown."""
    out = _head(
        "kernel", "chip", "D", "clocks of a tile: matrix unit", "exp2", "float32", "integers, moves", "issue",
        "repeated", "limit", "upper bound TFLOP/s", "of the peak", "without overlap TFLOP/s",
    )  # fmt: skip
    shown = [row for row in rows if row["roofline"] and not row["bytes"]]
    for row in shown:
        same = [r for r in shown if (r["job"], r["arch"], r["dim"]) == (row["job"], row["arch"], row["dim"])]
        together = whole_backward(same) if row is same[-1] else None
        for r in (row, together):
            if r is not None:
                line = r["roofline"]
                again = f"{line['repeated']:g}" if "repeated" in line else ""
                out.append(
                    f"| {_name(r)} | {' | '.join(_clocks(line))} | {again} | {line['limit']} | "
                    f"{line['bound_tflops']:.0f} | {line['of_peak']:.0%} | {line['serial_tflops']:.0f} |"
                )
    return out


def decode_table(rows: list[Row]) -> list[str]:
    """How fast the decode kernels could read keys and values if memory were no limit, in Markdown."""
    out = _head(
        "kernel", "chip", "D", "clocks of a tile: matrix unit", "exp2", "float32", "integers, moves", "issue",
        "bytes of a tile", "limit", "upper bound GB/s", "memory GB/s",
    )  # fmt: skip
    for row in rows:
        if row["bytes"]:
            line, chip = row["roofline"], CHIPS[row["arch"]]
            rate = chip.units * chip.mhz * 1e6 * row["bytes"] / line["clocks"][line["limit"]] / 1e9
            clocks = " | ".join(_clocks(line))
            out.append(f"| {_name(row)} | {clocks} | {row['bytes']} | {line['limit']} | {rate:.0f} | {chip.memory} |")
    return out


def chip_table(archs: Iterable[str]) -> list[str]:
    """The rates that the roofline is made of, in Markdown."""
    out = _head(
        "chip", "multiprocessors", "MHz", "16-bit matrix operations", "of float8", "exp2", "float32 lanes",
        "integer lanes", "peak TFLOP/s",
    )  # fmt: skip
    for arch in archs:
        c = CHIPS[arch]
        lanes = (
            f"{c.matrix['half']} | {c.matrix.get('fp8', '')} | {c.special} | {c.fma} | {c.alu} | {c.peak / 1e12:.0f}"
        )
        out.append(f"| {c.name} ({arch}) | {c.units} | {c.mhz} | {lanes} |")
    return out


def _decode_section(rows: list[Row]) -> list[str]:
    if not any(row["bytes"] for row in rows):
        return []
    return [
        "Decoding reads more than it computes: the rate at which the units could take keys and values in, beside what",
        "the memory delivers at best. Where the first is the larger, memory is the limit, as it should be.",
        "",
        *decode_table(rows),
        "",
    ]


def document(rows: list[Row]) -> str:
    """Both tables with what they mean."""
    dtypes = ", ".join(sorted({row["dtype"] for row in rows}))
    text = [
        f"Operands in {dtypes}, causal, Triton {triton.__version__}: `python -m benchmarks.gpu_static --update-docs`.",
        "Registers, spills and shared memory as the compilers settled on them; instructions of one warp once round",
        "the inner loop over tiles without masks, counted in the disassembly (`benchmarks/sass.py` says which loop).",
        "Rows that begin with CUDA are kernels of `csrc/cuda`, by nvcc; of 12 warps 4 copy and 8 compute. Those with",
        "fp8 multiply float8, and their share of the peak is that of the peak in float8.",
        "",
        *resource_table(rows),
        "",
        "The roofline that follows, **computed and not measured**: the clocks that each unit of a multiprocessor needs",
        "for one tile. The largest bounds the speed from above at the chip's clock; the last column is the bound if",
        "the matrix unit and the rest never work at the same time. Operations are those of the products in the loop:",
        "the two backward kernels, which both compute the scores, share 7 products where 5 would do. Repeated: how",
        "often the warps of a block, together, execute each product. Together: for the 5 products alone.",
        "",
        *roofline_table(rows),
        "",
        *_decode_section(rows),
        "Per clock and multiprocessor, from the vendors' documents (`benchmarks/gpu_chips.py` names them):",
        "",
        *chip_table(dict.fromkeys(row["arch"] for row in rows)),
    ]
    return "\n".join(text)


def update_docs(text: str, path: Path = DOCS) -> None:
    """Put `text` between the markers in docs/performance.md."""
    before, found, rest = path.read_text().partition(OPEN)
    _, closed, after = rest.partition(CLOSE)
    if not (found and closed):
        raise ValueError(f"{path} has no region {OPEN} ... {CLOSE}")
    path.write_text(f"{before}{OPEN}\n{text}\n{CLOSE}{after}")


def cuda_jobs(kernels: list[str] | None, archs: list[str], dims: list[int], dtype: str) -> list[Job]:
    """Those of the CUDA kernels; says so where they are left out although nobody chose others."""
    if kernels is None and (dtype not in cuda_kernels.SHORT or not cuda_kernels.nvcc() or not cuda.architectures()):
        print(
            "the CUDA kernels are left out: they need a 16-bit dtype, nvcc and an extension built with it",
            file=sys.stderr,
        )
        return []
    wanted = [k for k in kernels or cuda_kernels.KERNELS if k in cuda_kernels.KERNELS]
    archs = [a for a in cuda_kernels.ARCHS if a in archs]
    return list(jobs(wanted, archs, [d for d in cuda_kernels.DIMS if d in dims], dtype))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=list(ARCHS))
    parser.add_argument("--dims", nargs="+", type=int, default=list(DIMS), help="head dims")
    parser.add_argument("--kernels", nargs="+", choices=[*KERNELS, *cuda_kernels.KERNELS])
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    parser.add_argument("--markdown", action="store_true", help="print what --update-docs writes")
    parser.add_argument("--update-docs", action="store_true", help=f"rewrite the region {OPEN} of docs/performance.md")
    args = parser.parse_args(argv)
    todo = list(jobs([k for k in args.kernels or KERNELS if k in KERNELS], args.arch, args.dims, args.dtype))
    todo += cuda_jobs(args.kernels, args.arch, args.dims, args.dtype)
    rows: list[Row] = []
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        for job, found in zip(todo, pool.map(measure, todo), strict=True):
            rows += found
            print(f"{job.kernel} {job.arch} {job.dim}", file=sys.stderr)
    plain = [*resource_table(rows), "", *roofline_table(rows), "", *_decode_section(rows)]
    print(document(rows) if args.markdown else "\n".join(plain))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n")
    if args.update_docs:
        update_docs(document(rows))


if __name__ == "__main__":
    main()
