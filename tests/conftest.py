"""Fixtures that the whole suite shares."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch

# Two pytest workers share the cores: without this each would start a thread per core.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))


@pytest.fixture
def say(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Print something at the end of the run, from pytest-xdist's workers too."""
    return lambda text: record_property("say", text)


@pytest.fixture
def count(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Count something over the run; the sums are printed at its end."""
    return lambda what: record_property("count", what)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts: Counter[str] = Counter()
    for report in terminalreporter.stats.get("passed", []):
        for name, text in report.user_properties:
            if name == "say":
                terminalreporter.write_line(str(text))
            if name == "count":
                counts[str(text)] += 1
    for what, n in counts.items():
        terminalreporter.write_line(f"{what}: {n}")


@pytest.fixture
def poison() -> Iterator[None]:
    """Fill memory from torch.empty with NaN (integers: the largest value), as torch does in deterministic mode."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    assert torch.empty(3).isnan().all() and torch.randn(2, 3).new_empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
