"""The package as others get it: source distribution, wheel, an installation elsewhere, a machine without a compiler.

Nothing is downloaded: the build tools of the running environment are used, and its PyTorch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

# One group: under pytest-xdist one process runs them all, and builds once.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging")]

ROOT = Path(__file__).resolve().parents[1]
SOURCE_ENTRIES = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "csrc", "python")

# Importing torch fails in a process that has this first on its path.
NO_TORCH = "raise ImportError('torch was imported during the build')\n"

FORWARD_BACKWARD = """
import torch, fused_attention
q, k, v = (torch.randn(2, 4, 33, 16, requires_grad=True) for _ in range(3))
with fused_attention.use_backend({backend!r}):
    out = fused_attention.scaled_dot_product_attention(q, k, v, is_causal=True)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
same = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
expected = torch.autograd.grad(same.square().sum(), (q, k, v))
torch.testing.assert_close(out, same)
torch.testing.assert_close(grads, expected)
print(fused_attention.__file__)
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    """stdout and stderr of a command that must succeed."""
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("FUSED_ATTENTION_")}
    clean["FUSED_ATTENTION_CUDA"] = (
        "0"  # test_cuda_build.py compiles those kernels; here they would take minutes each time
    )
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}"
    return result.stdout


def pip_install(source: Path, target: Path, **environment: str) -> str:
    options = ("--no-deps", "--no-build-isolation", "--no-index", "-v")
    return run(
        *(sys.executable, "-m", "pip", "install", *options, "--target", target, source),
        cwd=target.parent,
        **environment,
    )


def copy_tree(destination: Path) -> Path:
    """The sources alone, so that what a build leaves behind does not touch the tree under test."""
    destination.mkdir()
    leave_out = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", "_C_missing.txt")
    for name in SOURCE_ENTRIES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, destination / name, ignore=leave_out)
        else:
            shutil.copy2(source, destination / name)
    return destination


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_tree(tmp_path_factory.mktemp("source") / "tree")


@pytest.fixture(scope="module")
def no_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("no_torch")
    (folder / "torch.py").write_text(NO_TORCH)
    return folder


@pytest.fixture(scope="module")
def distributions(tree: Path, no_torch: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel that is built from it, made where torch cannot be imported."""
    folder = tmp_path_factory.mktemp("dist")
    environment = {"PYTHONPATH": str(no_torch), "FUSED_ATTENTION_REQUIRE_EXT": "1"}
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, tree, cwd=folder, **environment)
    return folder


def test_build_without_torch_really_has_none(no_torch: Path, tmp_path: Path) -> None:
    code = "import importlib\ntry:\n    importlib.import_module('torch')\nexcept ImportError as e:\n    print(e)"
    assert "during the build" in run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(no_torch))


def test_source_distribution_is_complete(distributions: Path) -> None:
    (path,) = distributions.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder, patterns in (("csrc", ("*.cpp", "*.h", "*.cu")), ("python", ("*.py",))):
        expected = {str(p.relative_to(ROOT)) for pattern in patterns for p in (ROOT / folder).rglob(pattern)}
        assert expected and expected <= names, sorted(expected - names)
    assert {"setup.py", "pyproject.toml", "LICENSE"} <= names
    assert not [name for name in names if name.endswith((".so", ".o"))]


def test_wheel_holds_package_and_extension_only(distributions: Path) -> None:
    (path,) = distributions.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith("METADATA"))
        text = archive.read(metadata).decode()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fused_attention"}
    assert [name for name in names if name.startswith("fused_attention/_C.")]
    assert "Requires-Dist: torch>=2.9" in text and "License-Expression: Apache-2.0" in text
    requirements = [line for line in text.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert len(requirements) == 1, requirements


def test_wheel_works_elsewhere(distributions: Path, tmp_path: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    target = tmp_path / "installed"
    pip_install(wheel, target)
    path = {"PYTHONPATH": str(target)}
    report = run(sys.executable, "-m", "fused_attention", "info", cwd=tmp_path, **path)
    assert torch.__version__ in report
    printed = run(sys.executable, "-c", FORWARD_BACKWARD.format(backend="cpu"), cwd=tmp_path, **path)
    assert str(target) in printed, printed


def test_without_compiler_the_reference_serves(tree: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    printed = pip_install(tree, target, CXX="/nonexistent/c++")
    said = [line for line in printed.splitlines() if line.strip().startswith("fused-attention: ")]
    assert len(said) == 1 and "no C++ compiler" in said[0] and "reference" in said[0], printed
    assert not list((target / "fused_attention").glob("_C.*"))
    path = {"PYTHONPATH": str(target)}
    report = run(sys.executable, "-m", "fused_attention", "info", cwd=tmp_path, **path)
    assert "missing" in report, report
    printed = run(sys.executable, "-c", FORWARD_BACKWARD.format(backend="auto"), cwd=tmp_path, **path)
    assert str(target) in printed and "FallbackWarning" in printed, printed


def test_without_compiler_can_be_an_error(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no C\\+\\+ compiler found"):
        pip_install(tree, tmp_path / "x", CXX="/nonexistent/c++", FUSED_ATTENTION_REQUIRE_EXT="1")


def test_compiler_that_fails_is_named(tree: Path, tmp_path: Path) -> None:
    printed = pip_install(tree, tmp_path / "installed", CXX=shutil.which("false") or "false")
    assert "does not compile C++17 with OpenMP" in printed
