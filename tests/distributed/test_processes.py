"""A rank that fails or hangs fails the test that it runs in, with what it has to say."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from .processes import Processes, RankError

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("distributed")]


def _fails_in_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("told apart")
    dist.barrier()


def _hangs() -> None:
    if dist.get_rank() == 0:
        dist.barrier()


def test_a_failure_in_one_rank_is_told() -> None:
    processes = Processes(2)
    with pytest.raises(RankError, match="(?s)rank 1 failed.*told apart.*rank 0 did not end.*_fails_in_one"):
        processes.run(_fails_in_one)
    assert not processes._processes
    with pytest.raises(RankError, match="(?s)rank 0 did not end.*_hangs"):
        processes.run(_hangs, timeout_s=3.0)
    processes.stop()
