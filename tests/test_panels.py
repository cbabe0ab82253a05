"""The kernels on packed panels: the products that they are made of, which variant is chosen, and the kernels.

The products are those of Intel AMX or the dot products of AVX-512. A processor without AMX runs the kernels with its
tiles in plain C++ (FUSED_ATTENTION_CPU_ISA=amx_emulated).
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fused_attention.backends import cpu

ROOT = Path(__file__).resolve().parents[1]
SHOW = "from fused_attention.backends import cpu; print(cpu.info()['isa'])"


def _python(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"FUSED_ATTENTION_CPU_ISA": isa}
    environment.pop("PYTEST_XDIST_WORKER", None)
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


# --- the products -------------------------------------------------------------------------------------------------


def _compile(name: str, folder: Path) -> Path:
    """The products by `name`: tiles or dots in plain C++, or the instructions of AVX-512 for dots."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    assert compiler, "these tests compile csrc/cpu/products.h: g++ is needed"
    flags = ["-std=gnu++17", "-O2", "-fPIC", "-shared", "-Wno-psabi", "-DFA_ISA=checked"]
    flags.append(f"-DFA_PRODUCTS={2 if name == 'tiles' else 3}")
    if name == "avx512":
        flags += [f"-m{name}" for name in ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512bf16", "avx512vnni")]
    built = folder / f"{name}.so"
    source = ROOT / "tests" / "products.cpp"
    subprocess.run([compiler, *flags, f"-I{ROOT / 'csrc'}", str(source), "-o", str(built)], check=True)
    return built


KINDS = ["tiles", "dots", *(["avx512"] if "avx512_bf16" in cpu.info()["isas"] else [])]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("products")
    return {name: _compile(name, folder) for name in KINDS}


@pytest.fixture
def library(libraries: dict[str, Path]) -> Path:
    """The tiles of AMX in plain C++."""
    return libraries["tiles"]


def _bf16(x: np.ndarray) -> np.ndarray:
    """To bfloat16 by cutting off: what the bits mean is the point here."""
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def _float(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32)


def _flush(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def _dot(c: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """TDPBF16PS after its pseudocode: even and odd terms in chains of their own, then their sum, then c."""
    left, right = _flush(_float(a)), _flush(_float(b)).reshape(16, 16, 2)
    sums = np.zeros((2, 16, 16), np.float32)
    for k in range(16):
        for odd in range(2):
            # Exact in float64: the product of two bfloat16 and its sum with a float32 are rounded once, as by an FMA.
            product = left[:, 2 * k + odd, None].astype(np.float64) * right[None, k, :, odd]
            sums[odd] = _flush((sums[odd] + product).astype(np.float32))
    return _flush(_flush(c) + _flush(sums[0] + sums[1]))


def _pointer(x: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.ctypes.data)


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("magnitude", [1.0, 1e-18, 1e-19, 1e15])
def test_dot_is_the_instruction_to_the_last_bit(library: Path, magnitude: float, which: int) -> None:
    rng = np.random.default_rng(which)
    a, b = (_bf16(rng.standard_normal((16, 32)) * magnitude) for _ in range(2))
    c = (rng.standard_normal((16, 16)) * magnitude**2).astype(np.float32)
    a[3, 7], b[2, 5], c[1, 1] = 0x0041, 0x8073, np.float32(1e-39)  # subnormal
    found = c.copy()
    ctypes.CDLL(str(library)).dot(which, _pointer(found), _pointer(a), _pointer(b))
    expected = _dot(c, a, b)
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))
    assert (expected != c).any()


def test_dot_takes_subnormals_for_zero(library: Path) -> None:
    a, b = np.zeros((16, 32), np.uint16), np.full((16, 32), 0x3F80, np.uint16)
    a[:, 0] = 0x007F  # the largest subnormal
    c = np.full((16, 16), 1e-39, np.float32)
    ctypes.CDLL(str(library)).dot(0, _pointer(c), _pointer(a), _pointer(b))
    assert not c.any()


def test_infinities_and_nans_pass_through(library: Path) -> None:
    a, b = np.zeros((16, 32), np.uint16), np.full((16, 32), 0x3F80, np.uint16)
    a[0, 3], a[1, 4] = 0x7F80, 0x7FC0
    c = np.zeros((16, 16), np.float32)
    ctypes.CDLL(str(library)).dot(0, _pointer(c), _pointer(a), _pointer(b))
    assert np.isposinf(c[0]).all() and np.isnan(c[1]).all() and not c[2:].any()


@pytest.mark.parametrize("magnitude", [1.0, 1e-18, 1e-19, 1e15])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_dot_products_of_pairs_to_the_last_bit(libraries: dict[str, Path], kind: str, magnitude: float) -> None:
    """VDPBF16PS after its pseudocode: the odd product first, each added with one rounding, subnormal numbers zero."""
    rng = np.random.default_rng(3)
    dot = ctypes.CDLL(str(libraries[kind])).dot
    for _ in range(100):
        a, b = (_bf16(rng.standard_normal((16, 2)) * magnitude) for _ in range(2))
        c = (rng.standard_normal(16) * magnitude**2).astype(np.float32)
        a[3, 1], b[5, 0], c[7] = 0x0041, 0x8073, np.float32(1e-39)  # subnormal
        found, expected = c.copy(), _flush(c)
        dot(_pointer(found), _pointer(a), _pointer(b))
        for odd in (1, 0):
            product = _flush(_float(a[:, odd])).astype(np.float64) * _flush(_float(b[:, odd]))
            expected = _flush((expected + product).astype(np.float32))
        assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("terms", "parts"), [(1, 1), (3, 2), (4, 2), (6, 3)])
def test_products_of_blocks(libraries: dict[str, Path], terms: int, parts: int, add: bool, kind: str) -> None:
    """2 x 2 tiles, several steps, and the pairs of parts that the number of terms stands for."""
    rng, steps, count = np.random.default_rng(terms), 3, 5
    a = _bf16(rng.standard_normal((parts, 32, 32 * steps)))
    b = _bf16(rng.standard_normal((parts, 32 * steps, 32)))
    tiles_a = a.reshape(parts, 2, 16, steps, 32).transpose(0, 1, 3, 2, 4).copy()
    # pairs of rows: [parts, steps, 2 tiles, 16 pairs, 16 columns, 2]
    tiles_b = b.reshape(parts, steps, 16, 2, 2, 16).transpose(0, 1, 4, 2, 5, 3).copy()
    c = rng.standard_normal((count, 32, 32)).astype(np.float32)
    found = c.copy()
    ctypes.CDLL(str(libraries[kind])).products(
        _pointer(found), _pointer(tiles_a), _pointer(tiles_b), steps, terms, add, count, 2, False
    )
    pairs = [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (0, 2)][:terms]
    left, right = _float(a).astype(np.float64), _float(b).astype(np.float64)
    start = c if add else np.zeros_like(c)
    expected = sum(left[i] @ right[j] for i, j in pairs) + start
    # The tiles sum a step apart and then add it; dot products are one chain.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 if kind == "tiles" else 1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("add", [False, True])
def test_products_of_codes(libraries: dict[str, Path], add: bool, kind: str) -> None:
    """The same of 8-bit codes, as exact integers; those of A may be shifted."""
    rng, steps, count = np.random.default_rng(5), 3, 5
    library = ctypes.CDLL(str(libraries[kind]))
    a, b = (rng.integers(-128, 128, shape).astype(np.int8) for shape in ((32, 64 * steps), (64 * steps, 32)))
    tiles_a = a.reshape(2, 16, steps, 64).transpose(0, 2, 1, 3) ^ np.uint8(library.code_zero()).astype(np.int8)
    shifted = a.astype(np.int32) + library.code_zero()
    # quadruples of rows: [steps, 2 tiles, 16 quadruples, 16 columns, 4]
    tiles_b = b.reshape(steps, 16, 4, 2, 16).transpose(0, 3, 1, 4, 2)
    c = rng.integers(-1000, 1000, (count, 32, 32)).astype(np.int32)
    found, tiles_a, tiles_b = c.copy(), tiles_a.copy(), tiles_b.copy()
    library.products(_pointer(found), _pointer(tiles_a), _pointer(tiles_b), steps, 1, add, count, 2, True)
    product = shifted @ b.astype(np.int32)
    assert np.array_equal(found, product + (c if add else 0 * c))


def test_tiles_without_a_configuration_fault(library: Path) -> None:
    code = (
        f"import ctypes; ctypes.CDLL({str(library)!r}).store_without_configuration(ctypes.create_string_buffer(1024))"
    )
    assert _python("", "-c", code).returncode < 0


# --- which variant ------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_the_emulation_is_never_chosen_unless_named() -> None:
    assert cpu.info()["isas_for_tests"] == ["amx_emulated"]
    assert "amx_emulated" not in cpu.info()["isas"]
    assert _python("", "-c", SHOW).stdout.strip() == cpu.info()["isas"][-1]
    assert _python("amx_emulated", "-c", SHOW).stdout.strip() == "amx_emulated"


@pytest.mark.fast
def test_amx_runs_or_says_why_not() -> None:
    done = _python("amx", "-c", SHOW)
    if "amx" in cpu.info()["isas"]:
        assert done.stdout.strip() == "amx"
        return
    reason = cpu.info()["isas_refused"]["amx"]
    assert any(word in reason for word in ("lacks", "not built", "arch_prctl", "only Linux")), reason
    assert done.returncode and f"FUSED_ATTENTION_CPU_ISA=amx: {reason}" in done.stderr, done.stderr


@pytest.mark.fast
def test_an_unknown_variant_is_refused() -> None:
    done = _python("amx2", "-c", SHOW)
    assert done.returncode and "FUSED_ATTENTION_CPU_ISA=amx2, expected one of: portable" in done.stderr


# --- the kernels --------------------------------------------------------------------------------------------------


VARIANTS = ["amx_emulated", *(name for name in ("avx512_bf16", "amx") if name in cpu.info()["isas"])]


def _suite(variant: str, *arguments: str) -> None:
    done = _python(variant, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments)
    assert done.returncode == 0, f"{variant}\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("part", ["bf16", "fp16", "not bf16 and not fp16 and not float32", "float32"])
def test_kernels(part: str, variant: str) -> None:
    _suite(variant, "tests/panel_suite.py", "-k", part)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_int8_kernels(variant: str) -> None:
    _suite(variant, "tests/panel_int8_suite.py")


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_on_a_cache(variant: str) -> None:
    """Few rows that are appended to a cache are not for panels, however many rows those would take."""
    _suite(variant, "tests/test_grouped_cache.py", "-k", "bfloat16 and chunked")
