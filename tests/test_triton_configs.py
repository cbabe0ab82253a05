"""Tile configs are pure functions, measured ones are read as they were written, tuning measures what it says."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_attention.backends.triton import configs, tune
from fused_attention.backends.triton.configs import Config
from fused_attention.spec import AttentionSpec

pytestmark = pytest.mark.fast

PLAIN = AttentionSpec(2, 8, 8, 1024, 1024, 128, 128, torch.bfloat16, 0.1)
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx90a", "gfx942", "gfx950")
SHARED = {"sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB a block may have, by family
DIMS = (1, 16, 24, 64, 80, 128, 192, 256, 300, 512)
HEAVY: list[dict[str, Any]] = [
    {"mask": torch.bool},
    {"bias": torch.float32},
    {"softcap": 30.0},
    {"alibi_slopes": True},
    {"dropout_p": 0.1},
    {"weights": "mean"},
    {"packed": True, "window": (64, 0)},
    {"block_map": (128, 128)},
]
LIGHT: list[dict[str, Any]] = [
    {},
    {"causal": "bottom_right"},
    {"window": (64, 0)},
    {"packed": True, "causal": "top_left"},
    {"sinks": True, "key_lengths": True, "kv_heads": 2},
]


def every() -> list[tuple[str, str, AttentionSpec, Config]]:
    """Kernel, chip, spec and choice: of all kernels on all chips, for all dtypes and dims, light and heavy."""
    found = []
    for kernel in configs.KERNELS:
        for arch in ARCHS:
            for dtype in configs.DTYPES:
                for dim in DIMS:
                    for mask in (None, torch.bool):
                        spec = replace(PLAIN, dtype=dtype, head_dim=dim, value_dim=dim, mask=mask)
                        found.append((kernel, arch, spec, getattr(configs, kernel)(arch, spec)))
    return found


def test_padded() -> None:
    assert [configs.padded(d) for d in (1, 16, 17, 64, 65, 192, 512)] == [16, 16, 32, 64, 128, 256, 512]


def test_unknown_chips_take_the_numbers_of_a_relative() -> None:
    wanted = ("sm_80", "sm_86", "sm_86", "sm_90", "sm_100", "sm_100", "sm_86", *["gfx942"] * 3)
    assert tuple(map(configs.family, ARCHS)) == wanted


def test_what_is_heavy() -> None:
    assert all(configs.heavy(replace(PLAIN, **fields)) for fields in HEAVY)
    assert not any(configs.heavy(replace(PLAIN, **fields)) for fields in LIGHT)


@pytest.mark.parametrize("size", [(16, 16), (48, 96), (64, 128), (128, 128), (256, 1024)], ids=str)
def test_whole_tiles_make_up_a_block(size: tuple[int, int]) -> None:
    """Of every kernel on every chip, and where a config is forced."""
    for kernel, arch, spec, unmapped in every():
        mapped = replace(spec, mask=torch.bool, block_map=size)
        c = getattr(configs, kernel)(arch, mapped)
        assert size[0] % c.BLOCK_M == 0 and size[1] % c.BLOCK_N == 0 and min(c[:2]) >= 16, f"{kernel} {arch} {c}"
        if spec.mask is not None:
            assert c.BLOCK_M in (unmapped.BLOCK_M, size[0] & -size[0])
    with configs.override("forward", Config(128, 128, 8, 2)):
        assert configs.forward("sm_90", replace(PLAIN, block_map=(32, 64)))[:2] == (32, 64)


def test_every_choice_is_one_that_the_kernels_can_take() -> None:
    for kernel, arch, spec, c in every():
        where = f"{kernel} {arch} {spec.dtype} {spec.head_dim} {c}"
        assert all(n & (n - 1) == 0 for n in c[:3]), where
        assert min(c.BLOCK_M, c.BLOCK_N) >= 16 and max(c.BLOCK_M, c.BLOCK_N) <= 256, where
        assert 1 <= c.warps <= 16 and 1 <= c.stages <= 4, where
        assert not (c.descriptors or c.specialize) or configs.family(arch) in ("sm_90", "sm_100"), where
        assert c.together or kernel == "key_gradient", where


def test_tiles_that_wait_in_shared_memory_fit_into_it() -> None:
    """Only what must lie there: two operands per stage. The whole is read from the compiled kernels elsewhere."""
    for kernel, arch, spec, c in every():
        if kernel in ("forward", "key_gradient", "query_gradient") and spec.dtype != torch.float32:
            stepped = c.BLOCK_M if kernel == "key_gradient" else c.BLOCK_N
            dim = configs.padded(spec.head_dim)
            needed = (c.stages if c.stages > 1 else 0) * stepped * 2 * dim * spec.dtype.itemsize
            assert needed <= SHARED[configs.family(arch)] * 1024, f"{kernel} {arch} {dim} {c}"


def test_heavy_calls_never_take_larger_tiles() -> None:
    for kernel in configs.KERNELS:
        for arch in ARCHS:
            for dim in DIMS:
                spec = replace(PLAIN, head_dim=dim)
                light = getattr(configs, kernel)(arch, spec)
                heavy = getattr(configs, kernel)(arch, replace(spec, mask=torch.bool))
                assert heavy.BLOCK_M * heavy.BLOCK_N <= light.BLOCK_M * light.BLOCK_N, f"{kernel} {arch} {dim}"


def test_a_choice_does_not_depend_on_batch_length_or_heads() -> None:
    other = replace(PLAIN, batch=7, rows=3, columns=99, heads=16, batch_invariant=True)
    for kernel in configs.KERNELS:
        for arch in (*ARCHS, None):
            assert getattr(configs, kernel)(arch, PLAIN) == getattr(configs, kernel)(arch, other)


def test_delta_keeps_its_rows_in_registers() -> None:
    for dim in DIMS:
        c = configs.delta("sm_90", replace(PLAIN, value_dim=dim, dtype=torch.float32))
        assert 2 * c.BLOCK_M * configs.padded(dim) // (32 * c.warps) <= 128


def test_the_functions_need_no_triton() -> None:
    code = (
        "import sys, torch\n"
        "from fused_attention.backends.triton import configs, tune\n"
        "from fused_attention.spec import AttentionSpec\n"
        "spec = AttentionSpec(1, 1, 1, 1, 1, 64, 64, torch.float16, 1.0)\n"
        "configs.forward('sm_90', spec), tune.candidates('forward', 'sm_90', spec)\n"
        "assert 'triton' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_override_holds_inside_and_only_for_its_kernel() -> None:
    usual, other = configs.forward("sm_90", PLAIN), Config(16, 16, 4, 1)
    with pytest.raises(KeyError), configs.override("forward", other):
        assert configs.forward("sm_90", PLAIN) == configs.forward(None, PLAIN) == other
        with configs.override("forward", usual), configs.override("weights", other):
            assert configs.forward("sm_80", PLAIN) == usual and configs.weights("sm_80", PLAIN) == other
        assert configs.forward("sm_90", PLAIN) == other
        assert configs.query_gradient("sm_90", PLAIN) != other
        raise KeyError
    assert configs.forward("sm_90", PLAIN) == usual


# --- the table of measured choices ----------------------------------------------------------------------------


def test_what_was_measured_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Config(64, 32, 4, 2, True)
    monkeypatch.setattr(configs, "tuned", lambda: {("sm_90", "forward", "bf16/128/light"): measured})
    configs._found.cache_clear()
    try:
        assert configs.forward("sm_90", PLAIN) == configs.forward("sm_90", replace(PLAIN, head_dim=96)) == measured
        for spec in (replace(PLAIN, dtype=torch.float16), replace(PLAIN, softcap=1.0), replace(PLAIN, value_dim=129)):
            assert configs.forward("sm_90", spec) == configs.static("forward", "sm_90", spec)
        assert configs.forward("sm_100", PLAIN) == configs.static("forward", "sm_100", PLAIN)
        assert configs.static("forward", "sm_90", PLAIN) != measured
    finally:
        configs._found.cache_clear()


def test_the_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    path, said = tmp_path / "tuned.json", {"gpu": "a GPU", "date": "2026-01-01"}
    a, b = Config(128, 64, 8, 3, True), Config(32, 64, 8, 2, False, False, False)
    forward, backward = tune.Job("forward", "bf16", 96, False), tune.Job("key_gradient", "fp32", 64, True)
    tune.write(path, "sm_90", {forward: a, backward: b}, said)
    tune.write(path, "sm_80", {forward: b}, said)
    light, heavy = ("sm_90", "forward", "bf16/128/light"), ("sm_90", "key_gradient", "fp32/64/heavy")
    assert configs.tuned(path) == {light: a, heavy: b, ("sm_80", "forward", "bf16/128/light"): b}
    assert json.loads(path.read_text())["sm_90"]["measured"] == said
    assert "[128, 64, 8, 3, true, false, true]" in path.read_text()
    tune.write(path, "sm_90", {forward: None}, said)  # the static choice won
    configs.tuned.cache_clear()
    assert set(configs.tuned(path)) == {heavy, ("sm_80", "forward", "bf16/128/light")}


@pytest.mark.parametrize(
    ("kernel", "numbers"),
    [
        ("forwards", [64, 64, 4, 2, False, False, True]),
        ("forward", [64, 64, 4, 2]),
        ("forward", [64, 64, 4, 2, 0, 0, 1]),
        ("forward", [64, 48, 4, 2, False, False, True]),
        ("forward", [8, 64, 4, 2, False, False, True]),
        ("forward", [64, 64, 4, 0, False, False, True]),
        ("forward", "fast"),
    ],
)
def test_a_table_that_is_wrong_says_where(kernel: str, numbers: Any, tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"sm_90": {kernel: {"bf16/128/light": numbers}}}))
    with pytest.raises(ValueError, match=f"sm_90 {kernel} bf16/128/light"):
        configs.tuned(path)


def test_what_ships_was_measured() -> None:
    table = json.loads(configs.TABLE.read_text())
    configs.tuned()
    for arch, kernels in table.items():
        assert set(kernels["measured"]) >= {"gpu", "driver", "torch", "triton", "date"}, arch


# --- tuning ---------------------------------------------------------------------------------------------------


def test_candidates_start_from_the_static_choice() -> None:
    for kernel in configs.KERNELS:
        for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
            for spec in (PLAIN, replace(PLAIN, head_dim=512, mask=torch.bool), replace(PLAIN, dtype=torch.float32)):
                found = tune.candidates(kernel, arch, spec)
                assert found[0] == configs.static(kernel, arch, spec)
                assert len(found) == len(set(found)) and 5 <= len(found) <= 16
                assert all(c.BLOCK_M >= 16 and c.BLOCK_N >= 16 and c.warps >= 2 and c.stages >= 1 for c in found)
                if arch in ("sm_80", "gfx942"):
                    assert not any(c.descriptors or c.specialize for c in found)


def test_jobs_name_the_entries_of_the_table() -> None:
    jobs = tune.jobs(["forward", "additive_gradient"], [64, 96], ["bf16"], tune.CLASSES)
    assert [str(j) for j in jobs] == [
        "forward bf16/64/light",
        "forward bf16/64/heavy",
        "forward bf16/128/light",
        "forward bf16/128/heavy",
        "additive_gradient bf16/64/heavy",
        "additive_gradient bf16/128/heavy",
    ]
    for job in jobs:
        x, spec = tune.problem(job, "cpu", 32, 2)
        assert configs.heavy(spec) == job.heavy == configs.heavy(tune.everything(job, "cpu")[1])
        assert configs.entry(spec.dtype, max(spec.head_dim, spec.value_dim), configs.heavy(spec)) == job.key


def test_runs_are_timed_in_turns_and_the_first_round_does_not_count() -> None:
    ran: list[str] = []
    times = {"a": iter([9.0, 1.0, 3.0, 2.0]), "b": iter([9.0, 5.0, 5.0, 70.0])}

    def clock(run: tune.Run) -> float:
        run()
        return next(times[ran[-1]])

    found = tune.medians([lambda: ran.append("a"), lambda: ran.append("b")], clock, 3)
    assert ran == ["a", "b"] * 4
    assert found == [statistics.median([1.0, 3.0, 2.0]), 5.0]


def test_a_winner_is_clearly_faster_and_spills_nothing() -> None:
    tried = [Config(64, 64, 4, stages) for stages in (1, 2, 3, 4)]

    def clean(c: Config) -> int:
        return 0

    assert tune.winner(tried, [1.0, 0.9, 0.8, 2.0], clean) == tried[2]
    assert tune.winner(tried, [1.0, 0.9, 0.8, 2.0], lambda c: 8 * (c.stages == 3)) == tried[1]
    assert tune.winner(tried, [1.0, 0.99, 0.995, 2.0], clean) is None
    assert tune.winner(tried, [1.0, 0.5, 0.5, 0.5], lambda c: 8) is None


def test_results_must_equal_those_of_the_static_choice() -> None:
    base = torch.randn(64, dtype=torch.bfloat16)
    lse = torch.tensor([1.0, float("-inf")])
    assert tune.agree([base, lse], [base, lse], torch.bfloat16)
    assert tune.agree([base * 1.004, lse], [base, lse], torch.bfloat16)
    for wrong in (base + base.abs().max(), base.where(base < base.max(), float("nan")), torch.zeros_like(base)):
        assert not tune.agree([wrong, lse], [base, lse], torch.bfloat16)
    assert not tune.agree([base, lse.flip(0)], [base, lse], torch.bfloat16)


@pytest.mark.parametrize("kernel", tune.FUNCTIONS)
def test_launches_carry_the_config_that_is_tried(kernel: str) -> None:
    pytest.importorskip("triton")
    job = tune.Job(kernel, "fp16", 32, True)
    x, spec = tune.problem(job, "cpu", 64, 2)
    for config in (Config(16, 32, 4, 1), Config(32, 16, 2, 2)):
        prepared, launches = tune.prepare(job, config, x, spec, None)
        assert {k.kernel.fn.__name__ for k in prepared.launches} == tune.FUNCTIONS[kernel]
        assert len(launches) >= len(prepared.launches) and prepared.results
        assert all(k.options["num_stages"] == config.stages for k in prepared.launches)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    assert tune.run(parser.parse_args([])) == 1
    said = capsys.readouterr()
    assert not said.out and said.err.startswith("tune: ") and said.err.count("\n") == 1
