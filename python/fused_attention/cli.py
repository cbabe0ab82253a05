"""`python -m fused_attention`: what is here, what would run, how exactly and how fast."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from . import __version__, bench, dispatch, parity
from .backends import cpu
from .backends.triton import tune
from .spec import DIFFERENTIABLE, AttentionSpec, Device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def _devices() -> list[Device]:
    found = [Device("cpu")]
    found += [Device.of(torch.empty(0, device=f"cuda:{i}")) for i in range(torch.cuda.device_count())]
    return found


def collect_info() -> dict[str, Any]:
    """Versions, devices, and per device and backend whether a plain call runs there, with the reason if not."""
    backends = {
        (device.arch or device.type): {name: b.supports(_PLAIN, device) for name, b in dispatch.BACKENDS.items()}
        for device in _devices()
    }
    return {
        "fused_attention": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "cpu_extension": cpu.info(),
        "devices": backends,
    }


_PLAIN = AttentionSpec(1, 8, 8, 128, 128, 64, 64, torch.bfloat16, 0.125)
_QKV = frozenset({"query", "key", "value"})
FEATURES: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "float16": {"dtype": torch.float16},
    "float32": {"dtype": torch.float32},
    "float64": {"dtype": torch.float64},
    "causal, top-left and bottom-right": {"causal": "bottom_right"},
    "window, either side": {"window": (64, 0)},
    "bool mask, any broadcast": {"mask": torch.bool},
    "float mask, with gradient": {"mask": torch.float32, "gradients": {"mask"}},
    "bias, with deterministic gradient": {"bias": torch.float32, "gradients": {"bias"}},
    "key lengths": {"key_lengths": True},
    "block maps, sides of a multiple of 16": {"block_map": (64, 16)},
    "block maps, any sides": {"block_map": (10, 10)},
    "packed sequences": {"packed": True},
    "grouped and multi-query heads": {"kv_heads": 2},
    "value dim other than head dim": {"value_dim": 32},
    "head dim up to 512": {"head_dim": 512, "value_dim": 512},
    "head dim above 512": {"head_dim": 576, "value_dim": 512},
    "softcap": {"softcap": 30.0},
    "ALiBi": {"alibi_slopes": True},
    "ALiBi slopes with gradient": {"alibi_slopes": True, "gradients": {"alibi_slopes"}},
    "sinks, with gradient": {"sinks": True, "gradients": {"sinks"}},
    "dropout": {"dropout_p": 0.1},
    "attention weights, per head or averaged": {"weights": "mean"},
    "batch-invariant rows": {"batch_invariant": True},
    "forward-mode AD, torch.func": {"transform": "torch.func"},
}


def feature_table() -> str:
    """The backends' own answers as a Markdown table: forward and backward of every feature, the reason where not."""
    lines = ["| feature | " + " | ".join(dispatch.BACKENDS) + " |", "|---" * (1 + len(dispatch.BACKENDS)) + "|"]
    for name, fields in FEATURES.items():
        gradients = frozenset(fields.get("gradients", ())) | _QKV
        spec = replace(_PLAIN, **{**fields, "gradients": gradients})
        answers = [b.unsupported(spec) for b in dispatch.BACKENDS.values()]
        lines.append(f"| {name} | " + " | ".join("yes" if a is None else f"no: {a}" for a in answers) + " |")
    return "\n".join(lines)


def _print_info(info: dict[str, Any]) -> None:
    for key in ("fused_attention", "torch", "python", "platform", "threads"):
        print(f"{key:<16} {info[key]}")
    extension = info["cpu_extension"]
    if "error" in extension:
        print(f"{'C++ extension':<16} missing: {extension['error']}")
        print(f"{'':<16} what to do: install g++ (or set CXX), then install the package again")
    else:
        rest = {**extension, "isas": " and ".join(extension["isas"]) + " run here"}
        apart = ("isa", "isas_for_tests", "isas_refused")
        details = ", ".join(v if k == "isas" else f"{k} {v}" for k, v in rest.items() if k not in apart)
        print(f"{'C++ extension':<16} {extension['isa']} ({details})")
        for name, reason in extension["isas_refused"].items():
            print(f"{'':<16} not {name}: {reason}")
    for device, backends in info["devices"].items():
        print(f"{device}:")
        for name, reason in backends.items():
            print(f"  {name:<14} {'ready' if reason is None else 'no: ' + reason}")


def _add_explain(commands: Any) -> None:
    p = commands.add_parser("explain", help="which kernel would run a call, and why each other one would not")
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--heads", type=int, default=8)
    p.add_argument("--kv-heads", type=int, help="default: as --heads")
    p.add_argument("--rows", type=int, default=1024, help="queries per sequence (M)")
    p.add_argument("--columns", type=int, help="keys per sequence (N); default: as --rows")
    p.add_argument("--head-dim", type=int, default=64)
    p.add_argument("--value-dim", type=int, help="default: as --head-dim")
    p.add_argument("--dtype", choices=DTYPES, default="float32")
    p.add_argument("--device", default="cpu", help="cpu, cuda:0, or one that is not here: cuda:sm_90, cuda:gfx942")
    p.add_argument("--causal", choices=("top_left", "bottom_right"))
    p.add_argument("--window", nargs=2, metavar=("LEFT", "RIGHT"), help="numbers, or none for an open side")
    p.add_argument("--softcap", type=float)
    p.add_argument("--dropout", type=float, default=0.0)
    p.add_argument("--mask", choices=("bool", *DTYPES))
    p.add_argument("--bias", choices=tuple(DTYPES))
    p.add_argument("--alibi", action="store_true")
    p.add_argument("--sinks", action="store_true")
    p.add_argument("--key-lengths", action="store_true")
    p.add_argument("--block-size", nargs=2, type=int, metavar=("ROWS", "KEYS"), help="of a block map")
    p.add_argument("--packed", action="store_true", help="varlen_attention")
    p.add_argument("--weights", choices=("mean", "heads"))
    p.add_argument("--precision", choices=("fp8", "int8"), help="of products; default: that of the dtype")
    p.add_argument("--gradients", nargs="*", choices=DIFFERENTIABLE, default=())
    p.add_argument("--json", action="store_true")


def _spec_of(a: argparse.Namespace) -> AttentionSpec:
    window = None
    if a.window:
        left, right = (None if side.lower() == "none" else int(side) for side in a.window)
        window = (left, right)
    return AttentionSpec(
        batch=a.batch,
        heads=a.heads,
        kv_heads=a.kv_heads or a.heads,
        rows=a.rows,
        columns=a.rows if a.columns is None else a.columns,
        head_dim=a.head_dim,
        value_dim=a.value_dim or a.head_dim,
        dtype=DTYPES[a.dtype],
        scale=a.head_dim**-0.5,
        causal=a.causal,
        window=window,
        softcap=a.softcap,
        dropout_p=a.dropout,
        weights=a.weights,
        packed=a.packed,
        mask=torch.bool if a.mask == "bool" else DTYPES.get(a.mask),
        bias=DTYPES.get(a.bias),
        alibi_slopes=a.alibi,
        sinks=a.sinks,
        key_lengths=a.key_lengths,
        block_map=None if a.block_size is None else (a.block_size[0], a.block_size[1]),
        gradients=frozenset(a.gradients),
        precision=a.precision,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fused_attention", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="versions, devices, and which backends are ready")
    info.add_argument("--json", action="store_true")
    info.add_argument("--features", action="store_true", help="what each backend supports, as a Markdown table")
    _add_explain(commands)
    tune.add_arguments(commands.add_parser("tune", help="time tile configs of the Triton kernels on the GPU at hand"))
    bench.add_arguments(commands.add_parser("bench", help="time ours beside its peers"))
    parity.add_arguments(commands.add_parser("parity", help="check every backend here, feature by feature"))
    args = parser.parse_args(argv)
    if args.command == "bench":
        return bench.run(args)
    if args.command == "parity":
        return parity.run(args)
    if args.command == "tune":
        return tune.run(args)
    if args.command == "info" and args.features:
        print(feature_table())
        return 0
    if args.command == "info":
        found = collect_info()
        if args.json:
            print(json.dumps(found, indent=2))
        else:
            _print_info(found)
        return 0
    explanation = dispatch.explain(_spec_of(args), Device.parse(args.device), [])
    print(json.dumps(explanation.to_dict(), indent=2) if args.json else explanation)
    return 0 if explanation.backend else 1


if __name__ == "__main__":
    sys.exit(main())
