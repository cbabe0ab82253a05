"""Scripts that a user has already: with the added line and without it they print the same."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
ADDED = re.compile(r"# the added line$|^(import|from) fused_attention")
NUMBER = re.compile(r"-?\d+\.\d+")


def _output(script: str, tmp_path: Path) -> str:
    path = tmp_path / "script.py"
    path.write_text(script)
    result = subprocess.run([sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("name", "module"), [("swap_in_torch", "torch"), ("swap_in_transformers", "transformers")])
def test_one_added_line_changes_nothing(name: str, module: str, tmp_path: Path) -> None:
    if find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    after = (EXAMPLES / f"{name}.py").read_text()
    lines = after.splitlines(keepends=True)
    before = "".join(line for line in lines if not ADDED.search(line))
    assert len(lines) - len(before.splitlines()) == 2, "the line and its import"
    ours, theirs = _output(after, tmp_path), _output(before, tmp_path)
    assert NUMBER.sub("#", ours) == NUMBER.sub("#", theirs), "the words and the generated tokens"
    numbers = [[float(n) for n in NUMBER.findall(text)] for text in (ours, theirs)]
    assert len(numbers[0]) >= 5 and numbers[0] == pytest.approx(numbers[1], abs=2e-5)
