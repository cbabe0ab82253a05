"""`python -m fused_attention tune`: time tile sizes on the GPU at hand and write the winners into a table.

Nothing is timed unless this is asked for. For every kernel, head dim, dtype and class of problem a few configs around
the static choice run in turns, A B C A B C ..., each after the L2 cache was overwritten; the median of the rounds
counts. A config whose results differ from those of the static choice is not considered, nor one that does not compile,
and the winner must be free of register spills in a call that uses every option at once. What is written is what
`configs` reads: tuned.json in the package, or another file.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...spec import AttentionSpec, Device, Inputs, Options, make_spec
from . import configs
from .configs import Config

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CLASSES = ("light", "heavy")
WINS = 0.98  # of the static choice's time: less is noise, and the static choice stays

# The functions that each config is for. The delta kernel is bound by memory at any config and is not tuned.
FUNCTIONS = {
    "forward": {"forward_kernel"},
    "key_gradient": {"key_gradient_kernel"},
    "query_gradient": {"query_gradient_kernel"},
    "weights": {"weights_kernel", "weights_delta_kernel"},
    "additive_gradient": {"additive_gradient_kernel"},
}


class Job(NamedTuple):
    """One entry of the table."""

    kernel: str
    dtype: str
    dim: int
    heavy: bool

    @property
    def key(self) -> str:
        return f"{self.dtype}/{configs.padded(self.dim)}/{CLASSES[self.heavy]}"

    def __str__(self) -> str:
        return f"{self.kernel} {self.key}"


class Prepared(NamedTuple):
    """A config made ready: its launches, and the results once they and all others of the pass have run."""

    config: Config
    launches: list[Any]
    results: list[Tensor]


Run = Callable[[], None]


# --- what is tried --------------------------------------------------------------------------------------------


def candidates(kernel: str, arch: str, spec: AttentionSpec) -> list[Config]:
    """The static choice, then its neighbours: each number halved and doubled, tiles turned, every switch thrown."""
    base = configs.static(kernel, arch, spec)
    m, n, warps, stages = base[:4]
    changes: list[dict[str, Any]] = [
        *({"BLOCK_M": m * a // 2, "BLOCK_N": n * b // 2} for a, b in ((1, 2), (4, 2), (2, 1), (2, 4), (1, 4), (4, 1))),
        *({"warps": warps * a // 2} for a in (1, 4)),
        {"BLOCK_M": m // 2, "warps": warps // 2},
        {"BLOCK_M": m * 2, "warps": warps * 2},
        *({"stages": stages + a} for a in (-1, 1)),
    ]
    if kernel in ("forward", "key_gradient", "query_gradient") and configs.hopper_or_newer(arch):
        changes.append({"descriptors": not base.descriptors})
        if kernel == "forward":
            changes.append({"specialize": not base.specialize})
    if kernel == "key_gradient":
        changes.append({"together": not base.together})
    found = [base]
    for change in changes:
        c = base._replace(**change)
        sizes_fit = 16 <= c.BLOCK_M <= 256 and 16 <= c.BLOCK_N <= 256
        if sizes_fit and 2 <= c.warps <= 16 and 1 <= c.stages <= 5 and c not in found:
            found.append(c)
    return found


def problem(job: Job, device: str, rows: int, heads: int) -> tuple[Inputs, AttentionSpec]:
    """The call that is timed: causal self-attention; if heavy, with a mask and a bias.

    Tensors [1, heads, rows, dim]. The kernels of weights and of a bias's gradient have calls that use them.
    """
    dtype, g = DTYPES[job.dtype], torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(1, heads, rows, job.dim, dtype=dtype, device=device, generator=g) for _ in range(3))
    mask = bias = None
    if job.heavy:
        mask = torch.rand(1, 1, rows, rows, device=device, generator=g) < 0.9
        bias = torch.randn(1, heads, rows, rows, dtype=dtype, device=device, generator=g)
    weights: Any = "mean" if job.kernel == "weights" else None
    x = Inputs(q, k, v, mask, bias)
    wanted = {"query", "key", "value"} | ({"bias"} if job.kernel == "additive_gradient" else set())
    spec = replace(make_spec(x, Options(causal="top_left", weights=weights)), gradients=frozenset(wanted))
    return x, spec


def everything(job: Job, device: str) -> tuple[Inputs, AttentionSpec]:
    """A small call with all options of the job's class, which no winner may spill registers in."""
    dtype, n, heads = DTYPES[job.dtype], 256, 4
    q = torch.zeros(2, heads, n, job.dim, dtype=dtype, device=device)
    k, v = (torch.zeros(2, 2, n, job.dim, dtype=dtype, device=device) for _ in range(2))
    lengths = torch.full((2,), n, device=device)
    sinks = torch.zeros(heads, device=device)
    x = Inputs(q, k, v, sinks=sinks, key_lengths=lengths)
    o = Options(causal="bottom_right", window_left=64)
    wanted = {"query", "key", "value"}
    if job.heavy:
        mask, bias = torch.zeros(2, 1, n, n, device=device), torch.zeros(1, heads, n, n, device=device)
        slopes, seed = torch.zeros(1, heads, device=device), torch.zeros(1, dtype=torch.int64, device=device)
        x = x._replace(mask=mask, bias=bias, alibi_slopes=slopes, seed=seed)
        o = o._replace(softcap=30.0, dropout_p=0.1, weights="mean")
        wanted |= {"mask", "bias"}
    return x, replace(make_spec(x, o), gradients=frozenset(wanted))


def prepare(job: Job, config: Config, x: Inputs, spec: AttentionSpec, arch: str | None) -> tuple[Prepared, list[Any]]:
    """The launches of the job's kernel under a config, the results of the pass, and all launches of it in order."""
    from . import attention, gradients

    with configs.override(job.kernel, config):
        launches, out = attention.forward_launches(spec, x, arch)
        results = [t for t in out if t is not None]
        if job.kernel not in ("forward",):
            dweights = None if out.weights is None else torch.ones_like(out.weights)
            grads = (torch.ones_like(out.output), None, dweights)
            more, found = gradients.backward_launches(spec, x, out, grads, arch)
            launches, results = launches + more, results + list(found.values())
    own = [k for k in launches if k.kernel.fn.__name__ in FUNCTIONS[job.kernel]]
    for launch in own:
        took = (launch.options["BLOCK_M"], launch.options["BLOCK_N"], launch.options["num_warps"])
        if took != (config.BLOCK_M, config.BLOCK_N, config.warps):
            raise RuntimeError(f"{job}: the launcher took {took}, not {config}")
    return Prepared(config, own, results), launches


# --- what is measured -----------------------------------------------------------------------------------------


def medians(runs: Sequence[Run], clock: Callable[[Run], float], rounds: int) -> list[float]:
    """Milliseconds of each run by `clock`, in turns, the median of `rounds`; one round beforehand is not counted."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds + 1):
        for run, found in zip(runs, times, strict=True):
            elapsed = clock(run)
            if turn:
                found.append(elapsed)
    return [statistics.median(found) for found in times]


def gpu_clock(device: str) -> Callable[[Run], float]:
    """A clock in milliseconds between two events on the stream, after all of the L2 cache was overwritten."""
    size = max(2 * torch.cuda.get_device_properties(device).L2_cache_size, 64 << 20)
    flush = torch.empty(size, dtype=torch.uint8, device=device)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def clock(run: Run) -> float:
        flush.zero_()
        before.record()
        run()
        after.record()
        after.synchronize()
        return before.elapsed_time(after)

    return clock


def agree(found: Sequence[Tensor], base: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether results equal the static choice's up to the rounding of `dtype`: 4 units of the largest value."""
    allowed = 4 * torch.finfo(dtype).eps
    for a, b in zip(found, base, strict=True):
        scale = b[torch.isfinite(b)].abs().max().item() if b.numel() else 0.0
        both = torch.isfinite(a) & torch.isfinite(b)
        same = torch.where(both, (a.float() - b.float()).abs() <= allowed * scale, a == b)
        if not bool(same.all()):
            return False
    return True


def spills(job: Job, config: Config, arch: str, device: str) -> int:
    """Bytes of local memory a thread of the job's kernel in a call with every option of its class."""
    from . import ahead

    x, spec = everything(job, device)
    compiled = ahead.compile_ahead(prepare(job, config, x, spec, arch)[0].launches, arch)
    return max(ahead.resources(c, arch).spilled_bytes for c in compiled)


def tune_one(job: Job, arch: str, device: str, rows: int, heads: int, rounds: int) -> tuple[Config | None, str]:
    """The config that beats the static choice, or None, and a line that says what was found."""
    from . import launch

    x, spec = problem(job, device, rows, heads)
    clock = gpu_clock(device)
    ready: list[Prepared] = []
    refused = 0
    for config in candidates(job.kernel, arch, spec):
        try:
            prepared, launches = prepare(job, config, x, spec, arch)
            launch.run(launches, x.query)
            torch.cuda.synchronize(device)
        except Exception as error:  # does not fit on this chip, or the compiler refuses it; the static choice must run
            if not ready:
                raise RuntimeError(f"{job}: the static choice does not run: {error}") from error
            refused += 1
            continue
        if ready and not agree(prepared.results, ready[0].results, spec.dtype):
            print(f"{job}: {config} gives other results than the static choice", file=sys.stderr)
            refused += 1
            continue
        ready.append(prepared)
    runs: list[Run] = [lambda p=p: launch.run(p.launches, x.query) for p in ready]  # type: ignore[misc]
    times = medians(runs, clock, rounds)
    chosen = winner([p.config for p in ready], times, lambda c: spills(job, c, arch, device))
    best = ready[0].config if chosen is None else chosen
    at = [p.config for p in ready].index(best)
    line = (
        f"{job}: static {times[0]:.3f} ms, best {times[at]:.3f} ms {tuple(best)}, of {len(ready)} ({refused} refused)"
    )
    return chosen, line


def winner(tried: Sequence[Config], times: Sequence[float], spilled: Callable[[Config], int]) -> Config | None:
    """The fastest that beats tried[0] by more than noise and spills nothing; None if that stays the best."""
    for time, place in sorted((t, i) for i, t in enumerate(times)):
        if place == 0 or time > WINS * times[0]:
            return None
        if spilled(tried[place]) == 0:
            return tried[place]
    return None


# --- what is written ------------------------------------------------------------------------------------------


def machine(device: str) -> dict[str, str]:
    """What the times were measured with."""
    import triton

    name, driver = torch.cuda.get_device_name(device), "unknown"
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, IndexError, subprocess.CalledProcessError):
        pass
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return {"gpu": name, "driver": driver, **versions, "date": date.today().isoformat()}


def write(path: Path, arch: str, found: dict[Job, Config | None], measured: dict[str, str]) -> None:
    """Put what was found for one chip into the table; where the static choice won, an older entry goes."""
    table = json.loads(path.read_text()) if path.exists() else {}
    chip = table.setdefault(arch, {})
    for job, config in found.items():
        entries = chip.setdefault(job.kernel, {})
        entries.pop(job.key, None)
        if config is not None:
            entries[job.key] = list(config)
        if not entries:
            del chip[job.kernel]
    chip["measured"] = measured
    path.write_text(_lines(table))


def _lines(table: dict[str, Any]) -> str:
    """JSON with one config a line."""
    text = json.dumps(table, indent=2, sort_keys=True)
    return re.sub(r"\[[^\[\]]*\]", lambda m: " ".join(m[0].split()).replace("[ ", "[").replace(" ]", "]"), text) + "\n"


def jobs(kernels: Iterable[str], dims: Iterable[int], dtypes: Iterable[str], classes: Iterable[str]) -> list[Job]:
    """Every combination; a bias, and so its gradient, makes a problem heavy."""
    combinations = [
        Job(kernel, dtype, dim, kind == "heavy")
        for kernel in kernels
        for dtype in dtypes
        for dim in dims
        for kind in classes
    ]
    always_heavy = ("weights", "additive_gradient")
    return [j for j in combinations if j.heavy or j.kernel not in always_heavy]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--kernels", nargs="+", choices=tuple(FUNCTIONS), default=tuple(FUNCTIONS)[:3])
    parser.add_argument("--dims", nargs="+", type=int, default=(64, 128, 256, 512), help="head dims")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=("bf16", "fp16"))
    parser.add_argument("--classes", nargs="+", choices=CLASSES, default=CLASSES, help="heavy: with mask, bias, ...")
    parser.add_argument("--rows", type=int, default=4096, help="tokens of the timed call")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=25, help="of each config, in turns; the median counts")
    parser.add_argument(
        "--json", type=Path, default=configs.TABLE, help="the table to write into (default: %(default)s)"
    )


def unable() -> str | None:
    """Why nothing can be timed here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    from .launch import INTERPRETED

    if INTERPRETED:
        return "TRITON_INTERPRET is set: the interpreter's times say nothing"
    if not torch.cuda.is_available():
        return "needs a GPU, and torch.cuda.is_available() is False"
    return None


def run(args: argparse.Namespace) -> int:
    """Tune what was asked for and write the table; the exit status, 1 without a GPU."""
    reason = unable()
    if reason:
        print(f"tune: {reason}", file=sys.stderr)
        return 1
    device = f"cuda:{torch.cuda.current_device()}"
    arch = Device.of(torch.empty(0, device=device)).arch
    assert arch is not None
    measured = machine(device)
    for job in jobs(args.kernels, args.dims, args.dtypes, args.classes):
        chosen, line = tune_one(job, arch, device, args.rows, args.heads, args.rounds)
        print(line, flush=True)
        write(args.json, arch, {job: chosen}, measured)  # after each: what was found survives an interruption
    return 0
