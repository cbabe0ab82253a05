"""Time per call, interleaved: A B C A B C ..., so that a busy machine or a changing clock meets all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

FEWEST_ROUNDS = 5
LONG_ROUND, FEWEST_LONG_ROUNDS = 10.0, 2  # seconds: as where a processor has no instructions for a dtype
FLUSHED_BYTES = 256 * 2**20  # more than the second-level cache of any GPU

Run = Callable[[], object]


class Times(NamedTuple):
    """Of one call in seconds: the median and the quartiles over `rounds` of them."""

    median: float
    low: float
    high: float
    rounds: int


def _on_cpu(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _on_gpu(device: torch.device) -> Callable[[Run], float]:
    """By events around each call, with the second-level cache overwritten before it."""
    flush = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)

    def seconds(run: Run) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return seconds


def take_turns(runs: dict[str, Run], seconds: float, device: torch.device) -> dict[str, Times]:
    """Time `runs` in turn for about `seconds` in all, after one call that does not count: each at least five times, or
    twice where a round takes over ten seconds."""
    measure = _on_gpu(device) if device.type == "cuda" else _on_cpu
    long = sum(measure(run) for run in runs.values()) > LONG_ROUND
    fewest = FEWEST_LONG_ROUNDS if long else FEWEST_ROUNDS
    taken: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < fewest or time.perf_counter() < end:
        for name, run in runs.items():
            taken[name].append(measure(run))
        rounds += 1
    found = {}
    for name, all_times in taken.items():
        low, middle, high = statistics.quantiles(all_times, n=4)
        found[name] = Times(middle, low, high, rounds)
    return found


def matrix_rate(dtype: torch.dtype, device: torch.device, seconds: float = 0.2) -> float:
    """Floating-point operations per second of torch.mm at its best: the limit that attention can come near to."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2.0 * size**3 / _best(lambda: torch.mm(a, b), seconds, device)


def memory_rate(device: torch.device, seconds: float = 0.2) -> float:
    """Bytes per second that are read: a sum over more than the caches hold; on a GPU a copy, both ways counted."""
    if device.type == "cuda":
        source = torch.empty(2**30, dtype=torch.int8, device=device)
        target = torch.empty_like(source)
        return 2.0 * source.numel() / _best(lambda: target.copy_(source), seconds, device)
    numbers = torch.ones(2**26)
    return 4.0 * numbers.numel() / _best(numbers.sum, seconds, device)


def _best(run: Run, seconds: float, device: torch.device) -> float:
    measure = _on_gpu(device) if device.type == "cuda" else _on_cpu
    taken = [measure(run)]
    while len(taken) < 3 or sum(taken) < seconds:
        taken.append(measure(run))
    return min(taken)
