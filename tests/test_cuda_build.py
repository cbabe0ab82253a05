"""What nvcc makes of the CUDA kernels: no register spills on any chip that they serve, and the instructions meant."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks.nvcc import SOURCES, nvcc

from .cuda_support import needs_nvcc
from .test_packaging import copy_tree, pip_install, run

pytestmark = pytest.mark.slow

# The chips that the kernels of a source run on. The first one is what their PTX is for.
COMMON = ("sm_80", "sm_86", "sm_90")  # the code for sm_86 runs on sm_89
CHIPS = {
    "forward_sm80": COMMON,
    "key_gradient_sm80": COMMON,
    "query_gradient_sm80": COMMON,
    "decode_sm80": COMMON,
    "forward_sm90": ("sm_90a",),
    "forward_fp8_sm90": ("sm_90a",),
    "quantise_sm90": ("sm_90a",),
    "key_gradient_sm90": ("sm_90a",),
    "query_gradient_sm90": ("sm_90a",),
}


def _each(names: Iterable[str], *values: str) -> list[Any]:
    """One process compiles the PTX of a source, once for all chips."""
    return [pytest.param(n, *values, marks=[pytest.mark.xdist_group(f"nvcc-{n}"), needs_nvcc]) for n in names]


HOPPER = [name for name in CHIPS if name.endswith("_sm90") and name != "quantise_sm90"]


@functools.cache
def _assembler() -> str:
    """ptxas of the same version as nvcc."""
    compiler = nvcc()
    assert compiler is not None
    told = subprocess.run([*compiler, "--dryrun", "-x", "cu", "-c", "/dev/null"], capture_output=True, text=True).stderr
    found = re.search(r"^#\$ _HERE_=(.*)$", told, re.MULTILINE)
    assert found, told
    return str(Path(found[1], "ptxas"))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, str]]:
    """(source, chip) -> the cubin and what ptxas says about it."""
    folder = tmp_path_factory.mktemp("nvcc")

    @functools.cache
    def intermediate(name: str) -> Path:
        made = folder / f"{name}.ptx"
        source = SOURCES / f"{name}.cu"
        flags = ["-std=c++17", "-O3", f"-arch={CHIPS[name][0]}", "-Werror", "all-warnings", "-ptx"]
        subprocess.run([*(nvcc() or []), *flags, "-o", str(made), str(source)], check=True)
        return made

    @functools.cache
    def assembled(name: str, chip: str) -> tuple[Path, str]:
        made = folder / f"{name}-{chip}.cubin"
        command = [_assembler(), "-v", f"-arch={chip}", "-o", str(made), str(intermediate(name))]
        return made, subprocess.run(command, check=True, capture_output=True, text=True).stderr

    return assembled


@pytest.mark.parametrize(("name", "chip"), [p for name in CHIPS for c in CHIPS[name] for p in _each([name], c)])
def test_no_kernel_spills(
    name: str, chip: str, compiled: Callable[[str, str], tuple[Path, str]], say: Callable[[str], None]
) -> None:
    _, told = compiled(name, chip)
    kernels = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        told,
        re.DOTALL,
    )
    assert len(kernels) == told.count("Compiling entry function") > 0
    assert not [k for k in kernels if k[1:4] != ("0", "0", "0")]
    assert "Potential Performance Loss" not in told, told  # products of a warpgroup one after the other
    most = max(int(registers) for *_, registers in kernels)
    say(f"{name} for {chip}: {len(kernels)} kernels, no spills, {most} registers at most")


def _disassembler() -> str | None:
    """cuobjdump, of the CUDA toolkit or of the Triton wheel."""
    beside = Path(_assembler()).with_name("cuobjdump")
    found = shutil.which("cuobjdump") or (str(beside) if beside.exists() else None)
    spec = find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        inside = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(inside) if inside.exists() else None
    return found


def _opcodes(cubin: Path) -> dict[str, Counter[str]]:
    """The instructions of each kernel."""
    tool = _disassembler()
    if tool is None:
        pytest.skip("no cuobjdump, neither beside nvcc nor in a Triton wheel")
    listing = subprocess.run([tool, "-sass", str(cubin)], check=True, capture_output=True, text=True).stdout
    functions = re.split(r"Function : (\w+)", listing)[1:]
    return {
        kernel: Counter(re.findall(r"^\s+/\*\w+\*/\s+(?:@!?U?P\w+ )?([\w.]+)", code, re.MULTILINE))
        for kernel, code in zip(functions[::2], functions[1::2], strict=True)
    }


@pytest.mark.parametrize("name", _each(name for name in CHIPS if not name.endswith("_sm90")))
def test_instructions(name: str, compiled: Callable[[str, str], tuple[Path, str]], say: Callable[[str], None]) -> None:
    """Tensor cores on 16 x 8 x 16 tiles, asynchronous copies of 16 bytes, matrix loads; no local memory."""
    found = _opcodes(compiled(name, "sm_80")[0])
    for kernel, used in found.items():
        assert not [op for op in used if op.startswith(("STL", "LDL"))], kernel
        if not re.search(r"_d\d", kernel):  # sums over rows and their like
            continue
        assert any(op.startswith("HMMA.16816.F32") for op in used), kernel
        assert any(op.startswith("LDGSTS.E.BYPASS") and op.endswith("128") for op in used), kernel
        assert any(op.startswith("LDSM.16") for op in used), kernel
        transposed = any(op.startswith("LDSM.16.MT88") for op in used)  # V, and the left operands of gradients
        assert transposed or kernel.startswith("additive_gradient"), kernel
    say(f"{name}: {len(found)} kernels have HMMA.16816, LDGSTS and LDSM, and no local memory")


@pytest.mark.parametrize("name", _each(HOPPER))
def test_instructions_of_sm_90a(
    name: str, compiled: Callable[[str, str], tuple[Path, str]], say: Callable[[str], None]
) -> None:
    """Tensor cores from shared memory, tensor copies, registers shared out; no local memory, no mma of sm_80."""
    found = _opcodes(compiled(name, "sm_90a")[0])
    for kernel, used in found.items():
        assert not [op for op in used if op.startswith(("STL", "LDL", "HMMA"))], kernel
        products = "QGMMA.64x" if kernel.startswith("fp8_") else "HGMMA.64x"
        assert not [op for op in used if "GMMA" in op and not op.startswith(products)], kernel
        for op in (products, "UTMALDG.4D", "USETMAXREG.TRY_ALLOC", "USETMAXREG.DEALLOC", "SYNCS."):
            assert any(o.startswith(op) for o in used), f"{kernel} has no {op}"
    say(f"{name}: {len(found)} kernels have {products[:5]}, UTMALDG and USETMAXREG, and no local memory")


@pytest.mark.parametrize("name", _each(["quantise_sm90"]))
def test_instructions_that_make_float8(
    name: str, compiled: Callable[[str, str], tuple[Path, str]], say: Callable[[str], None]
) -> None:
    """Conversions of pairs, loads and stores of 16 bytes; no local memory."""
    found = _opcodes(compiled(name, "sm_90a")[0])
    for kernel, used in found.items():
        assert not [op for op in used if op.startswith(("STL", "LDL"))], kernel
        for op in ("F2FP.SATFINITE.E4M3.F32", "LDG.E.128", "STS.128", "STG.E.128"):
            assert any(o.startswith(op) for o in used), f"{kernel} has no {op}"
    say(f"{name}: {len(found)} kernels have F2FP.E4M3 and accesses of 16 bytes, and no local memory")


def test_without_nvcc_the_rest_is_built_and_one_line_says_so(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    printed = pip_install(tree, tmp_path / "installed", CUDACXX="/nonexistent/nvcc", FUSED_ATTENTION_CUDA="")
    said = [line for line in printed.splitlines() if line.strip().startswith("fused-attention: ")]
    assert len(said) == 1 and "without CUDA kernels: no CUDA compiler found" in said[0], printed
    code = "from fused_attention.backends import cpu, cuda; print(cpu.info()['isa'], cuda.architectures())"
    assert "()" in run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "installed"))


def test_cuda_kernels_that_are_asked_for_and_cannot_be_built_are_an_error(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    with pytest.raises(AssertionError, match="no CUDA compiler found"):
        pip_install(tree, tmp_path / "x", CUDACXX="/nonexistent/nvcc", FUSED_ATTENTION_CUDA="1")


@needs_nvcc
def test_an_architecture_that_nvcc_does_not_know_is_named(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    with pytest.raises(AssertionError, match="does not compile for 80;1000"):
        pip_install(tree, tmp_path / "x", FUSED_ATTENTION_CUDA="1", FUSED_ATTENTION_CUDA_ARCHS="80;1000")
