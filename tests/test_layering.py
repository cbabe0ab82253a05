"""Imports point one way, and importing the package does little."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fused_attention

pytestmark = pytest.mark.fast

PACKAGE = Path(fused_attention.__file__).parent

# A module may import what stands to its right; what shares a place may not import each other, but for packages.
ORDER = [
    ["__main__"],
    ["cli"],
    ["__init__"],
    ["bench"],
    ["models"],
    ["integrations", "parity"],
    ["nn"],
    ["projected"],
    ["sdpa", "decode", "scores", "joint", "context_parallel"],
    ["functional", "ops"],
    ["autograd"],
    ["steps"],
    ["dispatch"],
    ["backends"],
    ["cache", "varlen"],
    ["spec", "philox", "layout"],
    ["device", "arguments", "tracing"],
]
RANK = {name: place for place, names in enumerate(ORDER) for name in names}


def _layer(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def _own_imports(source: str, inside: list[str]) -> set[str]:
    """The layers of the package that a file in the folder `inside` imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = inside[: len(inside) - (node.level - 1)] if node.level > 1 else inside
            parts = base + (node.module.split(".") if node.module else [])
            found |= {parts[0]} if parts else {alias.name for alias in node.names if alias.name in RANK}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fused_attention":
            parts = (node.module or "").split(".")[1:]
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [a.name.split(".") for a in node.names]
            found |= {n[1] if len(n) > 1 else "__init__" for n in names if n[0] == "fused_attention"}
    return found


FILES = sorted(p for p in PACKAGE.rglob("*.py"))


def _edges_to_the_left(layer: str, source: str, inside: list[str]) -> list[str]:
    bad = []
    for other in sorted(_own_imports(source, inside) - {layer}):
        version = layer == "cli" and other == "__init__"
        if not version and RANK.get(other, -1) <= RANK[layer]:
            bad.append(f"{layer} must not import {other}")
    return bad


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_right(path: Path) -> None:
    layer = _layer(path)
    assert layer in RANK, f"{path.name} has no place in the order of layers"
    inside = list(path.relative_to(PACKAGE).parent.parts)
    assert not _edges_to_the_left(layer, path.read_text(), inside)


@pytest.mark.parametrize(
    "source",
    [
        "from ..functional import attention",
        "from .. import functional",
        "from fused_attention.nn import multihead",
        "from fused_attention import dispatch",
        "import fused_attention.autograd",
        "def f():\n    from ..something_new import x",
    ],
)
def test_an_edge_to_the_left_is_seen(source: str) -> None:
    assert _edges_to_the_left("backends", source, ["backends"])
    assert not _edges_to_the_left("backends", "from ..spec import Inputs\nfrom . import reference", ["backends"])


def test_import_is_light() -> None:
    code = (
        "import sys, fused_attention, torch\n"
        "assert 'triton' not in sys.modules, 'triton was imported'\n"
        "assert 'transformers' not in sys.modules, 'transformers was imported'\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'torch._dynamo' not in sys.modules, 'the compiler was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
