"""The CPU kernels cross-compiled for aarch64 and run by qemu-user: the portable build, away from x86."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_attention.backends import cpu, params

from .cases import Case, check
from .ptx_emulator.module import cache_folder

ROOT = Path(__file__).parent.parent
SOURCES = ("tests/aarch64/driver.cpp", "csrc/cpu/dispatch.cpp", "csrc/cpu/threads.cpp", "csrc/cpu/kernels.cpp")
TOOLS = ("aarch64-linux-gnu-g++", "qemu-aarch64")
MISSING = [tool for tool in TOOLS if shutil.which(tool) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("aarch64"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

# Sizes by letter: K key heads, V value dim, T a pair.
SHAPES = {
    **dict.fromkeys(("q", "dq"), "BHMD"),
    **dict.fromkeys(("k", "dk"), "BKND"),
    **dict.fromkeys(("v", "dv"), "BKNV"),
    **dict.fromkeys(("out", "dout"), "BHMV"),
    **dict.fromkeys(("lse", "dlse", "delta"), "BHM"),
    **dict.fromkeys(("mask", "bias", "dmask", "dbias", "weights", "dweights"), "BHMN"),
    **dict.fromkeys(("sinks", "dsinks"), "H"),
    "alibi": "BH",
}
WRITTEN = ("out", "lse", "weights", "dq", "dk", "dv", "dmask", "dbias", "dsinks", "delta")
VECTORS = {"key_lengths": 0, "cu_seqlens_q": 1, "cu_seqlens_k": 1}  # B elements, and so many more
WIDTHS = {code: dtype.itemsize for dtype, code in params.DTYPE_CODES.items()}


def _driver() -> Path:
    """The cross-compiled driver; kept on disk."""
    files = [ROOT / SOURCES[0], ROOT / "csrc/params.h", *sorted((ROOT / "csrc/cpu").iterdir())]
    key = hashlib.sha256(b"\0".join(f.read_bytes() for f in files)).hexdigest()[:16]
    target = cache_folder() / f"aarch64-driver-{key}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        made = target.with_suffix(f".{os.getpid()}")
        flags = ["-std=gnu++17", "-O2", "-fopenmp", "-static", "-Wall", "-Werror"]
        defines = ["-DFA_ISA=portable", "-DFA_HAVE_PORTABLE=1"]
        command = [TOOLS[0], *flags, *defines, "-o", str(made), *(str(ROOT / s) for s in SOURCES)]
        subprocess.run(command, check=True)
        os.replace(made, target)
    return target


class Elsewhere:
    """Takes the place of the compiled extension: each call runs in the emulator on a copy of its memory."""

    def __init__(self, driver: Path, folder: Path) -> None:
        self.driver, self.folder = driver, folder

    def _sizes(self, args: dict[str, Any]) -> dict[str, int]:
        sizes = {
            letter: args[name] for letter, name in zip("BHKMNDV", ("B", "H", "HK", "M", "N", "D", "DV"), strict=True)
        }
        return sizes | {"T": 2}

    def _extent(self, name: str, value: tuple[int, ...], args: dict[str, Any]) -> int:
        """Bytes from the first to the last element."""
        sizes = self._sizes(args)
        for side, letter in (("q", "M"), ("k", "N")):
            if at := args.get(f"cu_seqlens_{side}"):
                sizes[letter] = ctypes.c_int64.from_address(at + 8 * args["B"]).value
        _, dtype, *strides = value
        counts = [sizes[letter] for letter in SHAPES[name]]
        if args.get("weights_mode") == 1 and name in ("weights", "dweights"):
            counts[1] = 1
        last = sum((n - 1) * s for n, s in zip(counts, strides, strict=False))
        return (last + 1) * WIDTHS[dtype] if min(counts) else 0

    def _run(self, which: str, args: dict[str, Any]) -> None:
        request, blob, spans = [], bytearray(), {}
        for name, value in args.items():
            if isinstance(value, tuple):
                strides = (*value[2:], 0, 0, 0, 0)[:4]
                spans[name] = (value[0], len(blob), self._extent(name, value, args))
                request.append(f"t {name} {value[1]} {' '.join(map(str, strides))} {len(blob)}")
            elif name in VECTORS:
                spans[name] = (value, len(blob), 8 * (args["B"] + VECTORS[name]))
                request.append(f"a {name} {len(blob)}")
            else:
                real = isinstance(value, float)
                request.append(f"f {name} {value!r}" if real else f"i {name} {int(value) % 2**64}")
                continue
            address, offset, size = spans[name]
            blob += ctypes.string_at(address, size) + bytes(-size % 64 + 64)
        (self.folder / "request").write_text("\n".join(request))
        (self.folder / "blob").write_bytes(blob)
        command = [TOOLS[1], self.driver, which, self.folder / "request", self.folder / "blob"]
        subprocess.run(command, check=True)
        after = (self.folder / "blob").read_bytes()
        for name in WRITTEN:
            if name in spans:
                address, offset, size = spans[name]
                ctypes.memmove(address, after[offset : offset + size], size)

    def attention_forward(self, args: dict[str, Any]) -> None:
        self._run("forward", args)

    def attention_backward(self, args: dict[str, Any]) -> None:
        self._run("backward", args)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, poison: None) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "_C", Elsewhere(_driver(), tmp_path))
        yield


# fmt: off
CASES = [
    Case("full", (1, 2, 2, 67, 67, 24, 24)),
    Case("causal", (2, 4, 2, 33, 130, 64, 40), causal="bottom_right"),
    Case("few-rows", (2, 8, 2, 3, 300, 32, 32), causal="bottom_right", key_lengths=True),
    Case("window-softcap-sinks", (1, 2, 1, 113, 203, 16, 16), window=(20, 7), softcap=5.0, sinks=True),
    Case("mask-bias-alibi", (2, 2, 2, 19, 77, 16, 16), mask="bool:b11n", bias="float:1hmn", alibi="h"),
    Case("dropout-weights", (1, 2, 2, 31, 45, 16, 16), dropout_p=0.3, weights="mean"),
    Case("packed", (3, 2, 2, 40, 50, 16, 16), packed=((40, 0, 7), (50, 3, 9)), causal="top_left"),
]
# fmt: on


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_option(case: Case, dtype: torch.dtype, elsewhere: None) -> None:
    check(case, "cpu", dtype, values=2048)


def test_it_is_another_processor() -> None:
    machine = int.from_bytes(_driver().read_bytes()[18:20], "little")  # e_machine of its ELF header
    isa = subprocess.run([TOOLS[1], _driver(), "isa"], capture_output=True, text=True, check=True).stdout
    assert machine == 183 and isa.strip() == "portable"
