"""The example runs as its reader would run it; it asserts by itself that logits, losses and accuracy agree."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "replace_mha.py"


@pytest.mark.slow
def test_replace_mha(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE), "--quick", "--device", "cpu", "--output", str(tmp_path)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "replaced 2 attention modules" in result.stdout
    assert (tmp_path / "replace_mha.png").stat().st_size > 10_000
