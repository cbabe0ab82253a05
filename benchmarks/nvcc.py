"""Where the CUDA compiler is, and which file of csrc/cuda a kernel stands in."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

SOURCES = Path(__file__).parent.parent / "csrc" / "cuda"
FILES = {  # by how the names of their kernels begin
    "forward_": "forward_sm80",
    "key_": "key_gradient_sm80",
    "value_": "key_gradient_sm80",
    "query_": "query_gradient_sm80",
    "additive_": "query_gradient_sm80",
    "row_": "query_gradient_sm80",
    "sink_": "query_gradient_sm80",
    "decode_": "decode_sm80",
    "fp8_forward_": "forward_fp8_sm90",
    "fp8_quantise_": "quantise_sm90",
}


def source_of(kernel: str) -> str:
    """The file, without its suffix."""
    file = next(file for prefix, file in FILES.items() if kernel.startswith(prefix))
    return file.replace("sm80", "sm90") if "_sm90_" in kernel else file


def nvcc() -> list[str] | None:
    """The compiler that setup.py would find."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for candidate in (os.environ.get("CUDACXX"), "nvcc", home and str(Path(home, "bin", "nvcc"))):
        if candidate and shutil.which(candidate):
            return [candidate]
    return None
