"""Processes of one group (gloo) that outlive a test: each runs the functions it is sent, all at the same time."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

IMPORTS = [
    *("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"),
    *("fused_attention.nn.parallel", "fused_attention.parity.problems"),
]
GRACE_S = 5.0  # for the other ranks to end by themselves after one failed


class RankError(AssertionError):
    """A function failed, hung or died in some rank; the message holds what each rank has to say."""


def _serve(rank: int, world: int, folder: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1, file=open(f"{folder}/stacks-{rank}", "w"), all_threads=True)  # noqa: SIM115
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    pipe.send((None, None))
    while True:
        job = pipe.recv()
        if job is None:
            break
        try:
            function, arguments = job
            pipe.send((None, function(*arguments)))
        except BaseException:  # whatever it was, it is told
            pipe.send((traceback.format_exc(), None))
    dist.destroy_process_group()


class Processes:
    """world ranks. A failure ends them all: others may wait for the one that failed. The next `run` starts new ones."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder = ""

    def _start(self) -> None:
        # All are forked from one process that has imported what takes seconds to import, and has started no thread.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTS)
        self._folder = tempfile.mkdtemp()
        kept = dict(os.environ)
        os.environ["OMP_NUM_THREADS"] = "1"
        if "lo" in [name for _, name in socket.if_nameindex()]:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # not every machine resolves its own name
        try:
            for rank in range(self.world):
                here, there = context.Pipe()
                arguments = (rank, self.world, self._folder, there)
                self._processes.append(context.Process(target=_serve, args=arguments, daemon=True))
                self._processes[-1].start()
                self._pipes.append(here)
        finally:
            os.environ.clear()
            os.environ.update(kept)
        self._collect(120.0)

    def run(self, function: Callable[..., Any], *arguments: Any, timeout_s: float = 120.0) -> list[Any]:
        """Call a module's function in every rank; what each returned.

        Raises:
            RankError: a rank raised, died or took longer than the timeout; its traceback or stack is in the message.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, arguments))
        return self._collect(timeout_s)

    def _collect(self, timeout_s: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout_s
        while len(results) + len(failures) < self.world and time.monotonic() < deadline:
            open_ranks = [r for r in range(self.world) if r not in results and r not in failures]
            ready = wait([self._pipes[r] for r in open_ranks], max(0.0, deadline - time.monotonic()))
            for rank in open_ranks:
                if self._pipes[rank] in ready:
                    self._receive(rank, results, failures)
            if failures:
                deadline = min(deadline, time.monotonic() + GRACE_S)
        if len(results) == self.world:
            return [results[r] for r in range(self.world)]
        stacks = self._stacks([r for r in range(self.world) if r not in results and r not in failures])
        self.stop(kill=True)
        said = [f"--- rank {r} failed ---\n{text}" for r, text in sorted(failures.items())]
        said += [f"--- rank {r} did not end; it was at ---\n{text}" for r, text in sorted(stacks.items())]
        raise RankError("\n".join([f"{self.world} processes:", *said]))

    def _receive(self, rank: int, results: dict[int, Any], failures: dict[int, str]) -> None:
        try:
            error, value = self._pipes[rank].recv()
        except (EOFError, ConnectionResetError):
            self._processes[rank].join(GRACE_S)
            failures[rank] = f"the process died, exit code {self._processes[rank].exitcode}"
            return
        if error is None:
            results[rank] = value
        else:
            failures[rank] = error

    def _stacks(self, ranks: list[int]) -> dict[int, str]:
        for rank in ranks:
            if self._processes[rank].pid and self._processes[rank].is_alive():
                os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5 if ranks else 0.0)
        files = {rank: Path(self._folder, f"stacks-{rank}") for rank in ranks}
        return {rank: path.read_text() if path.exists() else "its start" for rank, path in files.items()}

    def stop(self, kill: bool = False) -> None:
        """End the processes, by force after a moment or at once."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if kill:
                process.kill()
            elif process.is_alive():
                pipe.send(None)
        for process in self._processes:
            process.join(20.0)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._pipes = [], []
        shutil.rmtree(self._folder, ignore_errors=True)
