"""Every shipped config of the attention kernels compiles for every chip, on a machine that has none of them.

What is compiled are the launches that the launchers make. Each must fit: no register spilled to memory, shared memory
within what a block of the chip may have, and the chip's own matrix instruction wherever a product has the 64 rows that
it takes; below that, NVIDIA's chips use mma.sync. IEEE float32 has no matrix instruction there, and must not get one.

FUSED_ATTENTION_COMPILE_ALL=1 compiles every option for every chip and every head dim in every dtype, which takes about
three times as long; without it, options are sampled over the chips, and other dtypes than bfloat16 are compiled at the
largest head dim of each of their configs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fused_attention.spec import make_spec

from .cases import Case, make
from .triton_support import INTERPRETED

pytest.importorskip("triton", reason="Triton is not installed")

import triton  # noqa: E402

from benchmarks.gpu_chips import CHIPS  # noqa: E402
from benchmarks.gpu_kernels import ARCHS, Job, launches  # noqa: E402
from benchmarks.gpu_static import loop_products  # noqa: E402
from benchmarks.sass import matrix_loop, read_amd  # noqa: E402
from fused_attention.backends.triton import ahead, attention, gradients  # noqa: E402
from fused_attention.backends.triton.launch import Launch  # noqa: E402

compiles = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 puts an interpreter in the compiler's place")

OWN = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
TAKES = {"sm_80": 16, "sm_90": 64, "sm_100": 64, "gfx942": 16}  # rows of a product

ALL = os.environ.get("FUSED_ATTENTION_COMPILE_ALL") == "1"
DIMS = (16, 32, 64, 128, 256, 512)
DTYPES = (("bfloat16", "highest"), ("float16", "highest"), ("float32", "highest"), ("float32", "high"))


def _config(job: Job) -> tuple[object, ...]:
    """What the launchers chose for a job, head dims aside."""
    found = []
    for launch in launches(job):
        chosen = {k: v for k, v in launch.options.items() if k not in ("BLOCK_D", "BLOCK_DV")}
        found.append((launch.kernel.__name__, *sorted(chosen.items())))
    return tuple(found)


def _plain_jobs() -> Iterator[Job]:
    """bfloat16 at every head dim; other dtypes at the largest head dim of each config, float16 where it has its own."""
    for arch in ARCHS:
        for kernel in ("forward", "backward"):
            half = {_config(Job(kernel, arch, "bfloat16", dim)) for dim in DIMS}
            for dtype, precision in DTYPES:
                jobs = {dim: Job(kernel, arch, dtype, dim, precision) for dim in DIMS}
                if dtype != "bfloat16" and not ALL:
                    largest = {_config(job): dim for dim, job in jobs.items()}
                    new = {dim for config, dim in largest.items() if dtype != "float16" or config not in half}
                    jobs = {dim: jobs[dim] for dim in sorted(new | ({128} if dtype == "float16" else set()))}
                yield from jobs.values()


# Options that change the kernels' code, and the chips that they are sampled on.
_LONG = (2, 8, 2, 512, 512, 64, 64)
_WIDE = (2, 8, 2, 512, 512, 128, 128)
# fmt: off
OPTIONS = [
    (Case("full", _WIDE), "sm_90 gfx942"),
    # The heads of a group in one block.
    (Case("few-rows", (2, 8, 2, 4, 512, 128, 128), causal="bottom_right"), "sm_80 sm_100"),
    (Case("D192-DV128", (1, 4, 4, 512, 512, 192, 128), causal="top_left"), "sm_90 sm_100"),
    (Case("D80", (1, 4, 4, 512, 512, 80, 80), causal="top_left"), "sm_80 gfx942"),
    # Rows that are not multiples of 16 bytes: read from a padded copy, written element by element.
    (Case("D127", (1, 4, 4, 512, 512, 127, 127), causal="top_left"), "sm_80 sm_90 gfx942"),
    (Case("window-lengths", _WIDE, window=(100, 0), causal="bottom_right", key_lengths=True), "sm_90 sm_100"),
    (Case("bool-mask", _WIDE, mask="bool:b11n"), "sm_80 sm_90"),
    (Case("bias", _WIDE, bias="half:1hmn"), "sm_90 gfx942"),
    (Case("dropout", _WIDE, dropout_p=0.1, causal="top_left"), "sm_80 sm_90 sm_100"),
    (Case("softcap-sinks-alibi", _WIDE, softcap=30.0, sinks=True, alibi="h", causal="top_left"), "sm_80 sm_100"),
    (Case("block-map", _WIDE, block_map="1h:0.5:128x128", causal="top_left"), "sm_80 sm_90 sm_100 gfx942"),
    (Case("block-map-16", _WIDE, block_map="1h:0.5:16x16"), "sm_90"),
    (Case("packed", (3, 8, 2, 512, 512, 128, 128), packed=((512, 0, 100), (512, 0, 100)), causal="top_left"),
     "sm_80 sm_90 gfx942"),
    (Case("weights", _LONG, weights="mean", mask="bool:b11n"), "sm_90 sm_100"),
    (Case("everything", _LONG, causal="bottom_right", window=(300, 50), softcap=4.0, mask="float:b1mn",
          bias="half:1hmn", alibi="bh", sinks=True, key_lengths=True, dropout_p=0.1, weights="heads"),
     "sm_90 gfx942"),
]
# fmt: on
SAMPLE = [(case, arch) for case, archs in OPTIONS for arch in (ARCHS if ALL else archs.split())]
DECODE = [("decode", 64), ("decode", 128), ("decode", 256), ("decode", 512), ("decode int8", 128), ("decode fp8", 128)]


def _matrix(r: ahead.Resources, arch: str) -> set[str]:
    """Names of the matrix instructions: AMD's without shape."""
    return {name[:6] if name.startswith("v_mfma") else name for name in r.matrix}


def _expected_matrix(arch: str, products: list[tuple[int, int, int]], ieee: bool) -> set[str]:
    if not products or (ieee and arch != "gfx942"):
        return set()
    return {OWN[arch] if m >= TAKES[arch] else "mma.sync" for m, _, _ in products}


# Scalar registers that do not fit, LLVM keeps in lanes of vector registers, not in memory. They cost where the inner
# loop moves them: at most this share of its instructions. Measured: 0.036 with every option at once, else 0.01.
MOVED = 0.04


def _moved(amdgcn: str) -> float:
    """The share of the inner loop's instructions that move such scalars."""
    loop = matrix_loop(read_amd(amdgcn))
    if not loop:
        return 0.0
    moves = sum(n for op, n in loop.each_warp.items() if op.startswith(("v_readlane", "v_writelane")))
    return moves / loop.each_warp.total()


def check(todo: Iterable[Launch], arch: str, ieee: bool = False) -> None:
    """Compile launches and collect whatever does not fit, so that one run tells everything."""
    todo = list(todo)
    wrong = []
    assert todo
    for launch, compiled in zip(todo, ahead.compile_ahead(todo, arch), strict=True):
        r = ahead.resources(compiled, arch)
        if r.spilled_bytes:
            wrong.append(f"{r.name}: {r.spilled_bytes} bytes a thread are spilled, {r.registers} registers")
        if r.shared_bytes > CHIPS[arch].shared_block:
            wrong.append(f"{r.name}: {r.shared_bytes} bytes of shared memory, more than {CHIPS[arch].shared_block}")
        if r.threads != launch.options["num_warps"] * CHIPS[arch].wave:
            wrong.append(f"{r.name}: {r.threads} threads for {launch.options['num_warps']} warps")
        products = [p for loop in loop_products(compiled.asm["ttir"]) for p in loop]
        expected = _expected_matrix(arch, products, ieee)
        if _matrix(r, arch) != expected:
            wrong.append(f"{r.name}: matrix instructions {r.matrix}, expected {expected} for products of {products}")
        if "amdgcn" in compiled.asm and (moved := _moved(compiled.asm["amdgcn"])) > MOVED:
            wrong.append(f"{r.name}: {moved:.1%} of the inner loop moves spilled scalars")
    assert not wrong, f"{arch}, Triton {triton.__version__}:\n" + "\n".join(wrong)


@compiles
@pytest.mark.fast
def test_one_kernel() -> None:
    check(launches(Job("forward", "sm_90", "bfloat16", 64)), "sm_90")


@compiles
@pytest.mark.parametrize("job", list(_plain_jobs()), ids=lambda job: "-".join(map(str, job)))
def test_plain(job: Job) -> None:
    check(launches(job), job.arch, ieee=job.dtype == "float32" and job.precision == "highest")


def launches_of(case: Case, arch: str) -> list[Launch]:
    """Forward and backward of a case in bfloat16, with gradients of everything that can have one."""
    x, o = make(case, torch.bfloat16)
    names = {"query", "key", "value", "bias", "sinks"} | ({"mask"} if str(case.mask).startswith("float") else set())
    present = frozenset(n for n in names if getattr(x, n) is not None)
    spec = replace(make_spec(x, o), gradients=present)
    forward, out = attention.forward_launches(spec, x, arch)
    dweights = None if out.weights is None else torch.empty_like(out.weights)
    grads = (torch.empty_like(out.output), torch.empty_like(out.lse), dweights)
    return forward + gradients.backward_launches(spec, x, out, grads, arch)[0]


@compiles
@pytest.mark.parametrize(("case", "arch"), SAMPLE, ids=lambda value: str(value))
def test_options(case: Case, arch: str) -> None:
    check(launches_of(case, arch), arch)


@compiles
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("kernel", "dim"), DECODE)
def test_decode(kernel: str, dim: int, arch: str) -> None:
    check(launches(Job(kernel, arch, "bfloat16", dim)), arch)


@compiles
@pytest.mark.parametrize("arch", ["sm_86", "sm_89", "sm_120", "gfx90a", "gfx950"])
def test_other_chips_compile(arch: str) -> None:
    """Chips without a config of their own: the kernel compiles and does not spill."""
    (compiled,) = ahead.compile_ahead(launches(Job("forward", arch, "bfloat16", 64)), arch)
    r = ahead.resources(compiled, arch)
    assert r.registers > 0 and not r.spilled_bytes and r.matrix


@compiles
def test_the_driver_is_put_back() -> None:
    before = ahead.driver._active
    todo = launches(Job("forward", "sm_90", "bfloat16", 64))
    ahead.compile_ahead(todo, "sm_90")
    assert ahead.driver._active is before
    broken = [k._replace(options={**k.options, "BLOCK_M": 24}) for k in todo]  # not a power of two
    with pytest.raises(Exception, match="power of"):
        ahead.compile_ahead(broken, "sm_90")
    assert ahead.driver._active is before


@pytest.mark.fast
@pytest.mark.parametrize(
    ("arch", "expected"),
    [("sm_80", ("cuda", 80, 32)), ("sm_120", ("cuda", 120, 32)), ("gfx942", ("hip", "gfx942", 64)),
     ("gfx90a", ("hip", "gfx90a", 64)), ("gfx1100", ("hip", "gfx1100", 32))],
)  # fmt: skip
def test_names_of_chips(arch: str, expected: tuple[object, ...]) -> None:
    target = ahead.target_of(arch)
    assert (target.backend, target.arch, target.warp_size) == expected


@pytest.mark.fast
@pytest.mark.parametrize("arch", ["", "90", "sm90", "sm_9", "cuda", "gfx", "gfx9"])
def test_other_names_are_refused(arch: str) -> None:
    with pytest.raises(ValueError, match="expected a name such as"):
        ahead.target_of(arch)


def test_the_interpreter_is_refused() -> None:
    code = "from fused_attention.backends.triton import ahead; ahead.compile_ahead([], 'sm_90')"
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode and "RuntimeError: TRITON_INTERPRET is set" in done.stderr


@compiles
def test_triton_3_6() -> None:
    """A subset under an installation of Triton 3.6.0, where there is one."""
    folder = os.environ.get("FUSED_ATTENTION_TRITON_360")
    if not folder:
        pytest.skip("FUSED_ATTENTION_TRITON_360 names no folder with an installation of Triton 3.6.0")
    path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "FUSED_ATTENTION_TRITON"))}
    env |= {"PYTHONPATH": path}
    version = [sys.executable, "-c", "import triton; print(triton.__version__)"]
    assert subprocess.run(version, env=env, capture_output=True, text=True).stdout.startswith("3.6.0")
    subset = "test_plain and bfloat16-64 or test_options and (full or everything) or test_decode and decode-64"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", subset]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
