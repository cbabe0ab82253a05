"""Run a kernel of a PTX file on NumPy arrays.

One ARG per parameter of the kernel:

    3  0x10  -1  0.5              a number, as wide as the parameter is
    a.npy                         an array
    a.npy:out.npy                 an array, which is written to out.npy after the launch
    float32:64x128:out.npy        a new array of NaN (integers: zeros), written likewise; "float32:64x128" is not
    map:a.npy:64x64:128           a tensor map of an array: its box, innermost dimension first, and swizzle (bytes or 0)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from .module import Report, load
from .parse import EmulationError
from .tensor_map import TensorMap


def sizes(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.replace("x", ",").split(","))


def argument(text: str, outputs: list[tuple[str, np.ndarray]]) -> object:
    """The value of an ARG; arrays that are to be written are added to `outputs`."""
    head, *rest = text.split(":")
    if head == "map":
        return TensorMap(np.load(rest[0]), box=sizes(rest[1]), swizzle=int(rest[2]) if len(rest) > 2 else 0)
    if head.endswith(".npy"):
        array = np.load(head)
    elif rest:
        dtype = np.dtype(head)
        array = np.full(sizes(rest.pop(0)), np.nan if dtype.kind == "f" else 0, dtype)
    else:
        return float(text) if any(c in text for c in ".einf") and not text.startswith("0x") else int(text, 0)
    if rest:
        outputs.append((rest[0], array))
    return array


def show(report: Report, counts: bool) -> None:
    print(report.bank_conflicts)
    worst = sorted(report.bank_conflicts.by_line.items(), key=lambda item: -item[1][0])
    for line, (extra, total) in worst[:8]:
        print(f"  {extra} of {total} at {line}")
    if counts:
        for opcode, n in report.instructions.most_common():
            print(f"{n:12} {opcode}")
    print(f"{len(report.races)} races" + "".join(f"\n  {race}" for race in report.races))


def main() -> int:
    """The exit status: 0, or 1 where the kernel fails or has a race."""
    parser = argparse.ArgumentParser(
        "python -m tests.ptx_emulator", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ptx", type=Path)
    parser.add_argument("args", nargs="*", metavar="ARG")
    parser.add_argument("--kernel", help="its name, where the file has several; without arguments they are listed")
    parser.add_argument("--grid", type=sizes, default=(1,), metavar="X,Y,Z")
    parser.add_argument("--block", type=sizes, default=(32,), metavar="X,Y,Z")
    parser.add_argument("--cluster", type=sizes, metavar="X,Y,Z")
    parser.add_argument("--shared", type=int, default=0, metavar="BYTES", help="dynamic shared memory")
    parser.add_argument("--seed", type=int, default=0, help="of the schedule")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="run with this many seeds from --seed on")
    parser.add_argument("--counts", action="store_true", help="print how often each opcode ran")
    options = parser.parse_intermixed_args()
    try:
        module = load(options.ptx.read_text())
        if not options.args or (options.kernel is None and len(module.kernels) > 1):
            for kernel in module.kernels.values():
                params = ", ".join(f"{size} bytes" for _, size, _ in kernel.params)
                print(f"{kernel.name}({params}), {kernel.static_shared - 1024} bytes of static shared memory")
            return 0 if not options.args else parser.error("--kernel: the file has several")
        name = options.kernel or next(iter(module.kernels))
        races = 0
        for seed in range(options.seed, options.seed + options.seeds):
            outputs: list[tuple[str, np.ndarray]] = []
            args = [argument(a, outputs) for a in options.args]
            launch = (options.grid, options.block, args, options.shared, seed, options.cluster)
            report = module.launch(name, *launch)
            print(f"{name}, seed {seed}")
            show(report, options.counts)
            races += len(report.races)
            for path, array in outputs:
                np.save(path, array)
    except (EmulationError, ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return int(races > 0)


if __name__ == "__main__":
    sys.exit(main())
