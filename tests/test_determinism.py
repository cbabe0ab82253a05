"""The same bits at any thread count, in any batch, in threads, after a fork, and in little memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import fused_attention as fa


@pytest.fixture(autouse=True)
def _threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _everything(seed: int = 0, b: int = 2, m: int = 257, n: int = 300) -> list[Tensor]:
    """Forward and all gradients of a problem with most options."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(b, 4, m, 32, generator=g).requires_grad_()
    k, v = (torch.randn(b, 2, n, 32, generator=g).requires_grad_() for _ in range(2))
    bias = torch.randn(1, 4, 1, n, generator=g).requires_grad_()
    sinks = torch.randn(4, generator=g).requires_grad_()
    torch.manual_seed(seed)
    out = fa.attention(
        q, k, v, bias=bias, sinks=sinks, causal="bottom_right", window=(200, 0), softcap=10.0, dropout_p=0.1,
        return_lse=True, return_weights="mean",
    )  # fmt: skip
    assert out.lse is not None and out.weights is not None
    loss = out.output.square().sum() + out.lse.sum() + out.weights.square().sum()
    inputs = [q, k, v, bias, sinks]
    return [out.output, out.lse, out.weights, *torch.autograd.grad(loss, inputs)]


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.fast
def test_thread_count_does_not_change_a_bit() -> None:
    torch.set_num_threads(1)
    expected = _everything()
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert _equal(_everything(), expected), threads
        assert _equal(_everything(), expected), threads


def test_threads_of_python_do_not_disturb_each_other() -> None:
    torch.set_num_threads(2)
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(4):
            if not _equal(_without_dropout(seed), plain[seed]):
                wrong.append(seed)

    plain = [_without_dropout(seed) for seed in range(3)]
    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


def _without_dropout(seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 4, 200, 32, generator=g).requires_grad_()
    out = fa.attention(q, q, q, causal="top_left")
    return [out, *torch.autograd.grad(out.square().sum(), q)]


FORK = """
import multiprocessing, os, sys, threading, torch, fused_attention as fa
torch.set_num_threads(2)
q, k, v, dout = (torch.randn(2, 4, 300, 32) for _ in range(4))
leaves = [t.requires_grad_() for t in (q, k, v)]

def run():  # nothing but our own kernels: torch's parallel operators do hang in a forked child
    out = fa.attention(*leaves, causal="top_left")
    return [t.detach().numpy() for t in (out, *torch.autograd.grad(out, leaves, dout))]

def same():
    return all((a == b).all() for a, b in zip(run(), expected))

def many():  # calls of several threads share the threads of the pool
    torch.set_num_threads(5)
    found = []
    callers = [threading.Thread(target=lambda: found.extend(same() for _ in range(20))) for _ in range(3)]
    for caller in callers: caller.start()
    for caller in callers: caller.join()
    return found == [True] * 60

def child(generations):
    assert same() and many()
    assert sys.platform != "linux" or len(os.listdir("/proc/self/task")) >= 5, "has no threads of its own"
    if generations: follow(generations - 1)

def follow(generations):
    worker = context.Process(target=child, args=(generations,))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0, worker.exitcode

context = multiprocessing.get_context("fork")
expected = run()
follow(1)
"""


def test_fork_after_use() -> None:
    """A forked child (a DataLoader worker) must not wait for threads that only its parent has: it starts its own, and
    so does its child."""
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=200)


BOUND = """
import os, torch, fused_attention as fa
torch.set_num_threads(2)
q, k, v = (torch.randn(2, 4, 300, 32) for _ in range(3))
found = fa.attention(q, k, v)
torch.set_num_threads(1)
assert torch.equal(found, fa.attention(q, k, v))
pid = os.fork()
if pid == 0:
    torch.set_num_threads(2)
    os._exit(0 if torch.equal(found, fa.attention(q, k, v)) else 3)
assert os.waitpid(pid, 0)[1] == 0
"""


def test_threads_bound_to_cores() -> None:
    """OMP_PROC_BIND: with OpenMP's threads, and in a child, which has none, on the calling one."""
    subprocess.run([sys.executable, "-c", BOUND], check=True, timeout=120, env={**os.environ, "OMP_PROC_BIND": "true"})


@pytest.mark.fast
@pytest.mark.parametrize("backend", ["cpu"])
def test_batch_invariant_rows_are_bit_equal(backend: str) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(9, 4, 150, 32, generator=g).requires_grad_() for _ in range(3))

    def run(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        with fa.use_backend(backend):
            out = fa.attention(q, k, v, causal="top_left", batch_invariant=True)
        return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]

    whole = run(q, k, v)
    for part in (slice(0, 1), slice(4, 6)):
        alone = run(*(t[part].detach().requires_grad_() for t in (q, k, v)))
        assert _equal(alone, [t[part] for t in whole])


MEMORY = """
import ctypes, pathlib, sys, torch, fused_attention as fa

def status(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

S, window = int(sys.argv[1]), (int(sys.argv[2]), 0) if len(sys.argv) > 2 else None
torch.set_num_threads(2)
q, k, v = (torch.randn(1, 1, S, 64, requires_grad=True) for _ in range(3))
fa.attention(*(t[:, :, :256].detach().requires_grad_() for t in (q, k, v)), window=window).sum().backward()
ctypes.CDLL("libc.so.6").malloc_trim(0)
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again here
before = status("VmRSS")
fa.attention(q, k, v, window=window).sum().backward()
print(status("VmHWM") - before)
"""


def _extra(*arguments: int) -> int:
    command = [sys.executable, "-c", MEMORY, *map(str, arguments)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout)


def test_memory_of_a_long_sequence(say: Callable[[str], None]) -> None:
    """Forward and backward at S 16384, B 1, H 1, D 64, fp32: the scores alone would be 1 GiB."""
    long = _extra(16384)
    say(f"extra memory of forward + backward at S 16384, D 64, fp32: {long / 1e6:.1f} MB")
    # The output and the three gradients are 16.8 MB of it: less would mean that nothing was measured.
    assert 16e6 < long < 80e6


def test_memory_of_a_long_sequence_with_a_window(say: Callable[[str], None]) -> None:
    """The same at S 32768 with a window of 1024, whose scores alone would be 4 GiB."""
    long = _extra(32768, 1024)
    say(f"extra memory of forward + backward at S 32768, window 1024, D 64, fp32: {long / 1e6:.1f} MB")
    assert 33e6 < long < 120e6
