"""Where Triton kernels can run: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

needs_triton = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="Triton kernels run here only with TRITON_INTERPRET=1"
)


def quicken_interpreter() -> None:
    """Let Triton's interpreter look up the language's built-in functions once, not at every call of a function.

    It replaces them before each call of a `triton.jit` function, nested ones included, and takes more time to find them
    than to run most functions.
    """
    import inspect
    from functools import cache
    from typing import Any

    from triton.language import core
    from triton.runtime import interpreter

    @cache
    def names(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if core.is_builtin(member)]

    def patch(package: Any, builder: Any, scope: Any) -> None:
        for name in names(package):
            member = getattr(package, name)
            if core.is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch


if INTERPRETED:
    quicken_interpreter()
