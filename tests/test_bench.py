"""`python -m fused_attention bench`: what is timed is the same computation everywhere, and what is written says so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="rich is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from rich.console import Console  # noqa: E402

from fused_attention import cli  # noqa: E402
from fused_attention.bench import busy, contest, growth, machine, peers, shapes, timing  # noqa: E402
from fused_attention.bench.shapes import AttentionShape, CacheShape, ModuleShape  # noqa: E402

pytestmark = pytest.mark.fast

CPU = torch.device("cpu")
SMALL = AttentionShape("small", "g", 2, 4, 2, 33, 40, 16)
KINDS = [
    replace(SMALL, name="full"),
    replace(SMALL, name="causal", rows=40, causal=True),
    replace(SMALL, name="window", rows=40, window=7),
    replace(SMALL, name="bool", mask="bool"),
    replace(SMALL, name="float", mask="float"),
    replace(SMALL, name="padding", mask="padding"),
    replace(SMALL, name="decode", rows=1),
]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "fwd+bwd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", KINDS, ids=str)
def test_ours_and_torch_compute_the_same(shape: AttentionShape, dtype: torch.dtype, backward: bool) -> None:
    made = contest.make_contest(replace(shape, dtype=dtype, backward=backward), ["torch"], CPU)
    assert list(made.runs) == ["ours", "torch"] and not made.refused
    made.check()
    for run in made.runs.values():
        run()


def test_the_last_rows_of_a_long_call_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "CHECKED_SCORES", 100)
    monkeypatch.setattr(contest, "CHECKED_ROWS", 5)
    for shape in KINDS:
        contest.make_contest(shape, [], CPU).check()


def test_what_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = KINDS[1]
    wrong = peers.ours(replace(shape, causal=False), CPU)
    monkeypatch.setitem(peers.PEERS, "torch", peers.Peer(lambda s, d: None, lambda s, d: wrong))
    made = contest.make_contest(shape, ["torch"], CPU)
    assert list(made.runs) == ["ours"] and "output is off by" in made.refused["torch"]
    monkeypatch.setattr(contest, "ours", lambda s, d: wrong)
    with pytest.raises(contest.CheckError, match="causal: output is off by"):
        contest.make_contest(shape, [], CPU).check()


def test_a_peer_says_what_it_cannot_run() -> None:
    made = contest.make_contest(replace(SMALL, backward=True), ["flex", "openvino", "flash", "flash_attn"], CPU)
    assert list(made.runs) == ["ours"]
    assert made.refused["flex"] == "FlexAttention has no backward pass on a CPU"
    assert made.refused["flash"] == "a kernel for GPUs"


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_modules_compute_the_same(weights: bool, backward: bool) -> None:
    shape = ModuleShape("module", "g", 2, 9, 32, 4, padding=True, need_weights=weights, backward=backward)
    made = contest.make_contest(shape, ["torch", "flex"], CPU)
    assert list(made.runs) == ["ours", "torch"] and made.refused == {"flex": "no module"}
    made.check()


def test_caches_compute_the_same() -> None:
    shape = CacheShape("cache", "g", 2, 8, 2, 40, 16)
    made = contest.make_contest(shape, ["torch", "flex"], CPU)
    assert list(made.runs) == ["ours", "torch", "int8", "fp8"] and made.refused == {"flex": "no cache"}
    made.check()
    exact, *others = (made.runs[name]() for name in made.runs)
    assert isinstance(exact, torch.Tensor)
    for found in others:  # codes of 8 bits round by more, but they are the same keys
        assert isinstance(found, torch.Tensor)
        torch.testing.assert_close(found, exact, atol=0.1, rtol=0.1)
    assert shape.bytes == 2 * 2 * 2 * 40 * 16 * 2 and shape.flops == 4 * 2 * 8 * 40 * 16


def test_growth_is_relative_to_the_shortest(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = (64, 128)
    made = [
        replace(SMALL, name=str(n), kv_heads=4, rows=n, columns=n, backward=b) for b in (False, True) for n in lengths
    ]
    seconds = iter([1.0, 1.0, 6.0, 5.0, 2.0, 2.0, 4.0, 4.0])
    extra = iter([100, 300, 500, 1000])
    monkeypatch.setattr(growth, "_seconds", lambda run, rounds: next(seconds))
    monkeypatch.setattr(growth, "extra_memory", lambda run: next(extra))
    before = torch.get_num_threads()
    rows = growth.measure([replace(s, group=str(s.backward)) for s in made], 0.0)
    assert torch.get_num_threads() == before
    assert [r["time over S^2"] for r in rows] == [1.0, 1.25, 1.0, 0.5]
    assert [r["memory over S"] for r in rows] == [1.0, 1.5, 1.0, 1.0]


def test_extra_memory_is_seen() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the system does not tell a process its memory")
    found = machine.extra_memory(lambda: torch.ones(2**23))
    assert found is not None and 0.9 * 2**25 < found < 2**26


def test_a_busy_process_runs_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with busy.burner() as child:
        assert child.poll() is None
    assert child.poll() is not None
    times = {n: {"median": t} for n, t in (("ours", 1.0), ("torch", 2.0))}
    rows = [
        {"name": "calm", "times": times, "busy": {"ours": {"median": 2.0}, "torch": {"median": 8.0}}},
        {"name": "late", "times": times, "busy": {"ours": {"median": 3.0}}},
    ]
    assert busy.slowed(rows[0]) == {"ours": 2.0, "torch": 4.0}
    busy.print_table(rows, Console(width=160))
    assert "ours above 2.2 times its quiet time: late" in capsys.readouterr().out


def test_contestants_take_turns() -> None:
    order: list[str] = []
    found = timing.take_turns({n: lambda n=n: order.append(n) for n in "abc"}, 0.0, CPU)  # type: ignore[misc]
    assert order == list("abc") * (1 + timing.FEWEST_ROUNDS)
    assert {t.rounds for t in found.values()} == {timing.FEWEST_ROUNDS}


def test_work_is_counted_by_hand() -> None:
    """4 M N D per head forward, 14 with the backward pass; half of it under causality."""
    shape = AttentionShape("", "", 2, 4, 2, 8, 8, 16, torch.bfloat16)
    assert shape.flops == 4 * 2 * 4 * 8 * 8 * 16 and replace(shape, backward=True).flops == 3.5 * shape.flops
    assert replace(shape, causal=True).flops == shape.flops / 2
    assert shape.bytes == 2 * 2 * (2 * 4 * 8 + 2 * 2 * 8) * 16


def test_names_are_unique() -> None:
    for suite in shapes.SUITES.values():
        assert len({s.name for s in suite}) == len(suite)


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    modules = (ModuleShape("module", "modules", 1, 8, 32, 4),)
    monkeypatch.setitem(shapes.SUITES, "models", (*KINDS[:2], replace(KINDS[0], name="longer", columns=80), *modules))
    files = {kind: tmp_path / "out" / f"bench.{kind}" for kind in ("json", "html", "svg")}
    options = ["--json", str(files["json"]), "--html", str(files["html"]), "--plot", str(files["svg"])]
    assert cli.main(["bench", "--seconds", "0", *options]) == 0
    printed = capsys.readouterr().out
    assert "torch / ours" in printed and "geometric mean" in printed
    rows = json.loads(files["json"].read_text())["results"]
    assert [r["name"] for r in rows] == ["full", "causal", "longer", "module"]
    for r in rows:
        times = r["times"]
        assert r["ratios"]["torch"] == pytest.approx(times["torch"]["median"] / times["ours"]["median"])
        assert times["ours"]["low"] <= times["ours"]["median"] <= times["ours"]["high"]
    page = files["html"].read_text()
    assert "data:image/png;base64," in page and "http" not in page and "longer" in page
    assert files["svg"].read_text().lstrip().startswith("<?xml")
    assert cli.main(["bench", "--seconds", "0", "--only", "causal", "--busy", *options[:2]]) == 0
    assert "beside a busy process" in capsys.readouterr().out
    (row,) = json.loads(files["json"].read_text())["results"]
    assert row["busy"]["ours"]["median"] > 0 and row["busy"].keys() == {"ours", "torch"}
    monkeypatch.setitem(shapes.SUITES, "growth", (KINDS[0], replace(KINDS[0], name="twice", rows=66, columns=80)))
    assert cli.main(["bench", "--suite", "growth", "--seconds", "0", *options[:2]]) == 0
    assert "time / S^2" in capsys.readouterr().out
    assert [r["name"] for r in json.loads(files["json"].read_text())["results"]] == ["full", "twice"]
    assert cli.main(["bench", "--list", "--only", "long"]) == 0
    assert capsys.readouterr().out.split() == ["longer"]
    assert cli.main(["bench", "--only", "no such shape"]) == 1
