"""The PTX emulator: kernels of nvcc give right results under every schedule, and each planted bug is caught.

The kernels are in ptx_emulator/kernels, beside the PTX that nvcc made of them. A bug is planted by an edit of that PTX,
or by an argument; the tests of single instructions are in ptx_emulator/test_*.py.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from . import ptx_emulator as emu
from .ptx_emulator.module import cache_folder

pytestmark = pytest.mark.emulator

KERNELS = Path(__file__).parent / "ptx_emulator" / "kernels"
SEEDS = range(8)
AMPERE = (KERNELS / "ampere.ptx").read_text()
HOPPER = (KERNELS / "hopper.ptx").read_text()


def edited(text: str, *edits: tuple[str, str], entry: str, count: int = 1) -> str:
    """PTX of one kernel with `count` places of each pattern changed; a pattern that is not there is an error."""
    start = text.index(f".entry {entry}(")
    end = text.find(".visible .entry", start)
    body = text[start : end if end >= 0 else None]
    for pattern, new in edits:
        body, n = re.subn(pattern, new, body)
        assert n == count, f"{pattern!r} is there {n} times"
    return text[:start] + body + (text[end:] if end >= 0 else "")


# --- products: cp.async, ldmatrix, mma.sync -----------------------------------------------------------------------
M, N, K = 100, 128, 160  # the last rows of A are outside


def factors() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(M, K, generator=g).bfloat16(), torch.randn(K, N, generator=g).bfloat16()
    return a, b, a.double() @ b.double()


def ampere_product(text: str, seed: int, rows: int = M) -> tuple[emu.Report, float]:
    """The report, and the largest error."""
    a, b, exact = factors()
    c = torch.full((M, N), float("nan"))
    report = emu.load(text).launch("product", (N // 64, 2), 128, [a, b, c, rows, N, K], shared=3 * 8192, seed=seed)
    return report, float((c - exact).abs().nan_to_num(nan=float("inf")).max())


def knobs(stride: int = 1024, parity: int = 0, size: int = 16384, skip_full: int = 0, skip_empty: int = 0) -> bytes:
    return struct.pack("5i", stride, parity, size, skip_full, skip_empty)


def hopper_product(text: str, seed: int, settings: bytes, swizzle: int = 128) -> tuple[emu.Report, float]:
    a, b, exact = factors()
    c = torch.full((M, N), float("nan"), dtype=torch.bfloat16)
    maps = [emu.TensorMap(x, box=(64, 64), swizzle=swizzle if x is a else 128) for x in (a, b, c)]
    report = emu.load(text).launch("product", (N // 64, 2), 160, [*maps, K, settings], shared=5 * 8192, seed=seed)
    error = (c.double() - exact).abs() - exact.abs() * 2**-8
    return report, float(error.nan_to_num(nan=float("inf")).max())


def test_ampere_product() -> None:
    for seed in SEEDS:
        report, error = ampere_product(AMPERE, seed)
        assert not report.races and error < 1e-4
        assert report.bank_conflicts.extra == 0 and report.bank_conflicts.total > 1000
        assert report.instructions["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"] == 4 * 128 * 5 * 16


def test_hopper_product() -> None:
    for seed in SEEDS:
        report, error = hopper_product(HOPPER, seed, knobs())
        assert not report.races and error < 1e-2, (seed, report.races, error)
        assert report.bank_conflicts.extra == 0


def caught(text: str, entry: str = "product", **settings: int) -> list[str]:
    """What tells of a bug, for each seed: a race, a wrong result, or an error of the emulator."""
    found = []
    for seed in SEEDS:
        try:
            if ".target sm_80" in text:
                report, error = ampere_product(text, seed)
            else:
                swizzle = settings.get("swizzle", 128)
                report, error = hopper_product(
                    text, seed, knobs(**{k: v for k, v in settings.items() if k != "swizzle"}), swizzle
                )
            found.append(" ".join(["race: " + r for r in report.races] + [f"error: {error}"] * (error > 0.05)))
        except emu.EmulationError as e:
            found.append(str(e))
    return found


def test_a_missing_syncthreads_is_caught() -> None:
    found = caught(edited(AMPERE, (r"bar\.sync\s+0;", ""), entry="product"))
    assert all("race" in f for f in found) and any("error" in f for f in found)


def test_a_wrong_wait_group_is_caught() -> None:
    found = caught(edited(AMPERE, (r"cp\.async\.wait_group 1;", "cp.async.wait_group 2;"), entry="product"))
    assert all("race: " in f and "cp.async of" in f and "error" in f for f in found)


def test_swapped_operands_of_mma_are_caught() -> None:
    text, n = re.subn(r"(mma\.sync\S+ \{[^}]*\}, \{[^}]*\}, \{)(%r\d+),(%r\d+)\}", r"\1\3,\2}", AMPERE)
    assert n == 16 and all("error" in f for f in caught(text))


def test_a_dropped_trans_is_caught() -> None:
    text, n = re.subn(r"(ldmatrix\.sync\.aligned\.m8n8\.x2)\.trans", r"\1", AMPERE)
    assert n == 16 and all("error" in f for f in caught(text))


def test_an_access_out_of_bounds_is_caught() -> None:
    for rows in (M + 1, 2 * M):  # rows that the tensors do not have
        with pytest.raises(
            emu.EmulationError, match=r"out of bounds: .*global memory 0x.*; \d+ bytes past the end.*line \d+: "
        ):
            ampere_product(AMPERE, 0, rows)
    with pytest.raises(emu.EmulationError, match=r"out of range: the CTA has"):
        a, b, _ = factors()
        c = torch.empty(M, N)
        emu.load(AMPERE).launch("product", (N // 64, 2), 128, [a, b, c, M, N, K], shared=2 * 8192)


def test_a_misaligned_access_is_caught() -> None:
    a, b, _ = factors()
    c = torch.empty(M * N + 1)[1:]
    with pytest.raises(
        emu.EmulationError, match=r"thread \(\d+,0,0\): address 0x[0-9a-f]+ is not aligned to 8 bytes.*st\.global\.v2"
    ):
        emu.load(AMPERE).launch("product", (N // 64, 2), 128, [a, b, c, M, N, K], shared=3 * 8192)


def out_of_step(found: str) -> bool:
    """How it shows that one side does not wait for the other; which comes first is up to the schedule."""
    return "race" in found or "deadlock" in found or "1 arrivals where 0 are pending of 1" in found


def test_a_skipped_wait_for_a_full_barrier_is_caught() -> None:
    found = caught(HOPPER, skip_full=1)
    assert all("read by wgmma" in f and "copy that completes on the mbarrier" in f for f in found)


def test_a_skipped_wait_for_an_empty_barrier_is_caught() -> None:
    # The producer comes around too early: a second arrival in a phase that takes one, or a stage that is still read.
    assert all(map(out_of_step, caught(HOPPER, skip_empty=1)))


def test_a_wrong_parity_is_caught() -> None:
    assert all(map(out_of_step, caught(HOPPER, parity=1)))


@pytest.mark.parametrize(("size", "pending"), [(16384 + 128, 128), (16384 - 128, -128)])
def test_wrong_bytes_are_a_deadlock_that_shows_the_state(size: int, pending: int) -> None:
    for state in caught(HOPPER, size=size):
        assert "deadlock: no thread can go on" in state
        assert re.search(r"warp 0 threads 0xffffffff: waits on the mbarrier at 0x\w+ of CTA 0 for parity 0: ", state)
        assert f"it is in phase 0 (parity 0), 0 of 1 arrivals and {pending} bytes are pending [line" in state


def test_a_missing_wgmma_wait_is_caught() -> None:
    text, n = re.subn(r"wgmma\.wait_group\.sync\.aligned 0;", "", HOPPER)
    assert n >= 1 and all("race: " in f and "error" in f for f in caught(text))


def test_a_wrong_swizzle_is_caught() -> None:
    assert all("error" in f for f in caught(HOPPER, swizzle=0))  # TMA writes A in rows, wgmma reads it swizzled
    other, n = re.subn(f" {1 << 62};", f" {2 << 62};", HOPPER)  # a swizzle of 64 bytes in the descriptors
    assert n >= 1 and all("error" in f for f in caught(other))


def test_a_wrong_stride_offset_is_caught() -> None:
    assert all("error" in f or "race" in f for f in caught(HOPPER, stride=512))
    assert all("error" in f or "out of range" in f for f in caught(HOPPER, stride=2048))


def test_a_missing_fence_between_stages_is_out_of_scope() -> None:
    """Fences are not modelled: the emulator says so, and a missing one does not show."""
    text, n = re.subn(r"fence\.proxy\.async\.shared::cta;", "", HOPPER)
    assert n == 2 and not any(caught(text))
    assert "fence.proxy.async" in (emu.__doc__ or "")


# --- warps and barriers -------------------------------------------------------------------------------------------
def exchange(text: str, seed: int) -> tuple[emu.Report, bool]:
    x, y = torch.randn(128), torch.full((128,), float("nan"))
    report = emu.load(text).launch("exchange", 1, 128, [x, y], seed=seed)
    return report, torch.equal(y.view(4, 32), x.view(4, 32).roll(-1, 1))


def test_syncwarp_orders_the_threads_of_a_warp() -> None:
    for seed in SEEDS:
        report, right = exchange(AMPERE, seed)
        assert right and not report.races


def test_a_missing_syncwarp_is_caught() -> None:
    results = [exchange(edited(AMPERE, (r"bar\.warp\.sync\s+-1;", ""), entry="exchange"), seed) for seed in SEEDS]
    assert all(report.races for report, _ in results) and not all(right for _, right in results)


def handover(text: str, seed: int) -> tuple[emu.Report, bool]:
    x, y = torch.randn(6, 128), torch.empty(6, 128)
    report = emu.load(text).launch("handover", 1, 256, [x, y, 6], seed=seed)
    return report, torch.equal(y, 2 * x.flip(1))


def test_named_barriers() -> None:
    for seed in SEEDS:
        report, right = handover(AMPERE, seed)
        assert right and not report.races


def test_a_wrong_barrier_is_caught() -> None:
    start = AMPERE.index(".entry handover(")
    arrivals = re.compile(r"(barrier\.arrive %r\d+), 256;")
    assert len(arrivals.findall(AMPERE[start:])) == 6
    without, fewer = (AMPERE[:start] + arrivals.sub(new, AMPERE[start:]) for new in ("", r"\1, 128;"))
    for seed in SEEDS:
        with pytest.raises(emu.EmulationError, match=r"deadlock(.|\n)*waits at barrier 1: 128 of 256 threads arrived"):
            handover(without, seed)
        with pytest.raises(emu.EmulationError, match=r"deadlock|\d+ threads are expected, those before expected"):
            handover(fewer, seed)


def test_bank_conflicts_of_a_transpose() -> None:
    x, y = torch.randn(32, 32), torch.empty(32, 32)
    for padded, extra in ((0, 32 * 31), (1, 0)):
        report = emu.load(AMPERE).launch("transpose", 1, (32, 8), [x, y, padded], shared=33 * 32 * 4)
        assert torch.equal(y, x.T) and not report.races
        assert (report.bank_conflicts.total, report.bank_conflicts.extra) == (64 + extra, extra)
    assert str(report.bank_conflicts) == "0 of 64 shared-memory wavefronts are bank conflicts (0.0%)"


# --- clusters, bulk copies ----------------------------------------------------------------------------------------
def test_clusters_multicast_and_remote_memory() -> None:
    x, out = torch.randn(3, 256), torch.empty(6, 128)
    for seed in SEEDS:
        report = emu.load(HOPPER).launch(
            "cluster_sum", 6, 128, [emu.TensorMap(x, box=(128, 1)), out.fill_(0)], seed=seed
        )
        halves = x.view(3, 2, 128)
        sums = halves + halves.flip(1).roll(-1, 2)
        assert torch.equal(out.view(3, 2, 128), sums.flip(1)) and not report.races


def test_a_remote_arrival_that_is_missing_is_a_deadlock() -> None:
    text = edited(HOPPER, (r"mbarrier\.arrive\.release\.cluster\S+ _, \[%r\d+\];", ""), entry="cluster_sum")
    with pytest.raises(emu.EmulationError, match=r"CTA 1 warp 3(.|\n)*128 of 128 arrivals and 0 bytes are pending"):
        emu.load(text).launch(
            "cluster_sum", 2, 128, [emu.TensorMap(torch.randn(1, 256), box=(128, 1)), torch.empty(256)]
        )


def test_bulk_copies_and_reductions() -> None:
    x, y = torch.randn(1024), torch.randn(1024)
    expected = y + 3 * x
    for seed in SEEDS:
        out = y.clone()
        assert not emu.load(HOPPER).launch("bulk_add", 4, 256, [x, out], seed=seed).races
        assert torch.equal(out, expected)
    text = edited(HOPPER, (r"cp\.async\.bulk\.wait_group 0;", ""), entry="bulk_add")
    assert "the CTA ended before" in str(
        [emu.load(text).launch("bulk_add", 4, 256, [x, y], seed=s).races for s in SEEDS]
    )


# --- what nvcc makes of ordinary code -----------------------------------------------------------------------------
def test_ordinary_code() -> None:
    n = 200
    x = torch.linspace(-6, 7, n)
    out, histogram, total = torch.empty(n), torch.zeros(4, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    emu.load(AMPERE).launch("ordinary", 7, 32, [x, out, histogram, total, n])
    d = x.double()
    weights = torch.tensor([1.0, 2.0, 4.0, 8.0]).double().repeat(n // 4)
    found = [d.exp() + d.abs().log1p(), d.tanh(), (d * 100).sin(), d.erf(), d.abs().sqrt() / (1 + d * d),
             d * weights + 1, d.abs() ** 1.5, d * 3.25 - d.floor()]  # fmt: skip
    expected = torch.stack(found)[torch.arange(n) % 8, torch.arange(n)]
    torch.testing.assert_close(out.double(), expected, rtol=3e-6, atol=3e-5)
    assert torch.equal(histogram.long(), torch.bincount(x.floor().long() % 4, minlength=4))
    assert int(total) == int(torch.round(x * 65536).long().sum())


def test_half_precision_headers() -> None:
    shape = (64, 2)
    f = [torch.randn(shape).half() for _ in range(3)]
    u = [torch.randn(shape).bfloat16() for _ in range(3)]
    emu.load(AMPERE).launch("halves", 1, 64, [*f, *u])
    for (x, y, got), pick, root in ((f, torch.maximum, True), (u, torch.minimum, False)):
        fused = (x.double() * y.double() + pick(x, -y).double()).to(x.dtype)
        expected = fused + (x.abs().sqrt() if root else x.abs()) - x * y
        torch.testing.assert_close(got, expected, rtol=2**-7, atol=2**-7)


# --- around it ----------------------------------------------------------------------------------------------------
def test_seeds_give_schedules_that_can_be_had_again() -> None:
    text = edited(AMPERE, (r"bar\.warp\.sync\s+-1;", ""), entry="exchange")
    first, again = ([exchange(text, seed)[0].races for seed in SEEDS] for _ in range(2))
    assert first == again and len({str(r) for r in first}) > 1


@pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="nvcc is not installed: the PTX that is shipped is not made anew"
)
@pytest.mark.parametrize(("name", "arch"), [("ampere", "sm_80"), ("hopper", "sm_90a")])
def test_the_ptx_is_that_of_the_sources(name: str, arch: str, tmp_path: Path) -> None:
    made = tmp_path / "made.ptx"
    subprocess.run(["nvcc", "-ptx", f"-arch={arch}", "-o", made, KERNELS / f"{name}.cu"], check=True)
    shipped, new = (KERNELS / f"{name}.ptx").read_text(), made.read_text()
    release = re.compile(r"Cuda compilation tools, release (\S+),")
    versions = [match[1] for match in map(release.search, (shipped, new)) if match]
    if versions[0] != versions[1]:
        pytest.skip(f"the shipped PTX is of nvcc {versions[0]}, here is {versions[1]}")
    assert shipped == new


def test_from_a_shell(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    command = [sys.executable, "-m", "tests.ptx_emulator", str(KERNELS / "ampere.ptx")]
    root = Path(__file__).parent.parent

    def shell(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], cwd=root, capture_output=True, text=True)

    listed = shell()
    assert listed.returncode == 0 and "transpose(8 bytes, 8 bytes, 4 bytes)" in listed.stdout
    arguments = [f"{tmp_path}/x.npy", f"float32:32x32:{tmp_path}/y.npy", "1"]
    done = shell("--kernel", "transpose", "--block", "32,8", "--shared", "4224", "--counts", *arguments)
    assert done.returncode == 0 and "0 races" in done.stdout and "ld.shared.f32" in done.stdout, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), x.T)
    wrong = shell("--kernel", "transpose", "--block", "32,8", *arguments)
    assert wrong.returncode == 1 and "out of range" in wrong.stderr
    assert "One ARG per parameter" in shell("--help").stdout


def test_the_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FUSED_ATTENTION_EMULATOR_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(emu.EmulationError, match="needs a C\\+\\+ compiler; no-such-compiler is not there"):
        emu.Module(AMPERE.replace(".entry exchange(", ".entry other("))
    assert os.listdir(tmp_path) == []
