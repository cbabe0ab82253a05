"""`python -m fused_attention parity`: what it reports, and that it sees a wrong kernel."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_attention import cli
from fused_attention.backends import cpu
from fused_attention.dispatch import BACKENDS
from fused_attention.parity import command
from fused_attention.parity.features import FEATURES
from fused_attention.parity.rule import compare
from fused_attention.spec import Outputs

FEW = ["--backends", "cpu", "reference", "--features", "plain", "sinks, with gradient"]


def _rows(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    status = cli.main(["parity", *arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)["rows"]


@pytest.fixture
def built() -> None:
    if "error" in cpu.info():
        pytest.skip("the C++ extension is not built")


@pytest.mark.slow
def test_the_whole_command_takes_less_than_two_minutes(tmp_path: Path) -> None:
    report = tmp_path / "parity.json"
    arguments = [sys.executable, "-m", "fused_attention", "parity", "--report", str(report)]
    result = subprocess.run(arguments, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(report.read_text())
    assert found["seconds"] < 120 and found["environment"]["torch"] == torch.__version__
    seen = {(r["backend"], r["feature"], r["dtype"]) for r in found["rows"]}
    assert seen == {(b, f, d) for b in BACKENDS for f in FEATURES for d in command.DTYPES}
    assert {r["status"] for r in found["rows"] if r["backend"] == "reference"} == {"ok"}
    for feature in FEATURES:
        assert f"  {feature:<30}bfloat16" in result.stdout
    assert "0 failed" in result.stdout and "NOT REACHED" not in result.stdout


@pytest.mark.fast
def test_a_row_holds_every_result(capsys: pytest.CaptureFixture[str], built: None) -> None:
    status, rows = _rows(capsys, *FEW, "--dtypes", "float32")
    assert status == 0 and len(rows) == 4 and {r["status"] for r in rows} == {"ok"}
    (row,) = [r for r in rows if (r["backend"], r["feature"]) == ("cpu", "sinks, with gradient")]
    assert set(row["parts"]) == {"output", "lse", "dquery", "dkey", "dvalue", "dsinks"}
    for part in row["parts"].values():
        assert 0 < part["error"] <= part["allowed"] < 1e-4 and 0 < part["torch"] < 1e-4


@pytest.mark.fast
@pytest.mark.parametrize("wrong", ["output", "gradient", "nan", "raises"])
def test_a_wrong_kernel_fails(
    wrong: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, built: None
) -> None:
    forward, backward = cpu.forward, cpu.backward

    def broken_forward(spec: Any, x: Any) -> Outputs:
        if wrong == "raises":
            raise RuntimeError("a fault in a kernel")
        out = forward(spec, x)
        out.output[..., 0] += {"output": 1e-3, "nan": torch.nan}.get(wrong, 0.0)
        return out

    def broken_backward(*arguments: Any) -> dict[str, Any]:
        found = backward(*arguments)
        return found | {"key": found["key"] * 1.01} if wrong == "gradient" else found

    monkeypatch.setattr(cpu, "forward", broken_forward)
    monkeypatch.setattr(cpu, "backward", broken_backward)
    status, rows = _rows(capsys, *FEW, "--dtypes", "float32")
    assert status == 1
    assert {(r["backend"], r["status"]) for r in rows} == {("cpu", "failed"), ("reference", "ok")}
    reason = {"output": "output", "nan": "output: inf", "gradient": "dkey", "raises": "a fault in a kernel"}[wrong]
    assert all(reason in r["reason"] for r in rows if r["backend"] == "cpu")
    assert cli.main(["parity", *FEW, "--dtypes", "float32"]) == 1
    assert "2 failed" in capsys.readouterr().out


@pytest.mark.fast
def test_what_was_not_run_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    report = tmp_path / "parity.txt"
    arguments = ["--backends", "reference", "--features", "plain", "dropout", "--dtypes", "float32"]
    assert cli.main(["parity", *arguments, "--seconds", "1e-9", "--report", str(report)]) == 0
    text = capsys.readouterr().out
    assert text == report.read_text() and text.count("not reached") == 2
    assert "2 NOT REACHED in the time (--seconds 0 runs all)" in text
    assert cli.main(["parity", *arguments, "--seconds", "0"]) == 0
    assert "2 ok, 0 failed" in capsys.readouterr().out


@pytest.mark.fast
def test_a_backend_that_refuses_says_why(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS["cpu"], "supports", lambda spec, device: "the kernels are not built")
    assert cli.main(["parity", "--backends", "cpu", "--features", "plain", "dropout"]) == 0
    assert "cpu on cpu\n  not run: the kernels are not built" in capsys.readouterr().out


@pytest.mark.fast
def test_the_rule() -> None:
    ref = torch.tensor([1.0, -2.0, torch.inf, 0.5], dtype=torch.float64)
    same = ref.float() + torch.tensor([1e-4, 0.0, 0.0, 0.0])
    good = compare(ref.float() + torch.tensor([0.0, 1.9e-4, 0.0, 0.0]), same, ref, grad=False)
    assert good["error"] <= good["allowed"] and good["torch"] == pytest.approx(1e-4, rel=1e-2)
    bad = compare(ref.float() + torch.tensor([0.0, 2.2e-4, 0.0, 0.0]), same, ref, grad=False)
    assert bad["error"] > bad["allowed"]
    assert compare(ref.float() + torch.tensor([0.0, 2.2e-4, 0.0, 0.0]), same, ref, grad=True)["allowed"] > 2.9e-4
    for wrong in (torch.nan, torch.inf):
        assert compare(ref.float().index_fill(0, torch.tensor([0]), wrong), same, ref, grad=False)["error"] == torch.inf
    assert compare(ref.float().nan_to_num(posinf=3.0), same, ref, grad=False)["error"] == torch.inf
