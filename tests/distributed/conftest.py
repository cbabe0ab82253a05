"""The processes that tests of this folder run in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .processes import Processes


def _processes(world: int) -> Iterator[Processes]:
    processes = Processes(world)
    yield processes
    processes.stop()


@pytest.fixture(scope="session", params=[2, 4], ids=lambda n: f"{n}-ranks")
def ranks(request: pytest.FixtureRequest) -> Iterator[Processes]:
    """Two processes, then four."""
    yield from _processes(request.param)


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Processes]:
    yield from _processes(2)
