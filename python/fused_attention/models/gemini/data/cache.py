"""Where what takes seconds to make is kept: a folder of the user's, safe to delete."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO


def folder() -> Path:
    """`$XDG_CACHE_HOME/fused_attention/gemini`, by default below `~/.cache`. Not created."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fused_attention" / "gemini"


def write(path: Path, save: Callable[[IO[bytes]], object]) -> None:
    """Call `save` with a file that becomes `path` when it is whole, so that another process never reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            save(file)
        except BaseException:
            os.unlink(file.name)
            raise
    os.replace(file.name, path)
