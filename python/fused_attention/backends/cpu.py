"""The C++ kernels: what they support, and the call into the extension. Only pointers and strides cross over."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..layout import output_like, rows_contiguous
from ..spec import AttentionSpec, Device, Inputs, Outputs

_C: ModuleType | None = None
_import_error = ""
try:
    _C = importlib.import_module("fused_attention._C")
except ImportError as error:
    # The build leaves a note where it could not make the extension.
    note = Path(__file__).parent.parent / "_C_missing.txt"
    _import_error = note.read_text().strip() if note.exists() else str(error)

MAX_HEAD_DIM = 512
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3, torch.bool: 4}
CAUSAL_CODES = {None: 0, "top_left": 1, "bottom_right": 2}
WEIGHTS_CODES = {None: 0, "mean": 1, "heads": 2}


def info() -> dict[str, Any]:
    """What the extension was built with and which instruction set it chose; {"error": reason} if it is missing."""
    return _C.info() if _C is not None else {"error": f"the C++ extension is not built ({_import_error})"}


def supports(spec: AttentionSpec, device: Device) -> str | None:
    """None if these kernels run `spec` on `device`, otherwise the reason why not."""
    if _C is None:
        return info()["error"] + "; install with a C++ compiler at hand"
    if device.type != "cpu":
        return f"runs on CPU tensors, not on {device.type}"
    if spec.transform:
        return f"{spec.transform} needs operations that torch can trace"
    if max(spec.head_dim, spec.value_dim) > MAX_HEAD_DIM:
        return f"head dims up to {MAX_HEAD_DIM}, not {max(spec.head_dim, spec.value_dim)}"
    if "alibi_slopes" in spec.gradients:
        return "no gradient for alibi_slopes"
    return None


def plan(spec: AttentionSpec, device: Device) -> str | None:
    """Which instruction set the kernels use."""
    return f"{info()['isa']} kernels, up to {torch.get_num_threads()} threads"


def _argument(t: Tensor) -> tuple[int, ...]:
    return (t.data_ptr(), DTYPE_CODES[t.dtype], *t.stride())


def _broadcast(t: Tensor) -> tuple[int, ...]:
    """A tensor argument whose dimensions of size 1 have stride 0."""
    strides = [0 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)]
    return (t.data_ptr(), DTYPE_CODES[t.dtype], *strides)


def _arguments(spec: AttentionSpec, x: Inputs) -> tuple[dict[str, Any], list[Tensor]]:
    """The extension's arguments, and the tensors that must outlive the call."""
    q, k, v = rows_contiguous(x.query), rows_contiguous(x.key), rows_contiguous(x.value)
    keep = [q, k, v]
    args: dict[str, Any] = {
        "B": spec.batch,
        "H": spec.heads,
        "HK": spec.kv_heads,
        "M": spec.rows,
        "N": spec.columns,
        "D": spec.head_dim,
        "DV": spec.value_dim,
        "q": _argument(q),
        "k": _argument(k),
        "v": _argument(v),
        "scale": spec.scale,
        "threads": torch.get_num_threads(),
    }
    if spec.causal:
        args["causal"] = CAUSAL_CODES[spec.causal]
    if spec.window:
        left, right = spec.window
        args["window_left"] = -1 if left is None else left
        args["window_right"] = -1 if right is None else right
    if spec.softcap is not None:
        args["softcap"] = spec.softcap
    if spec.batch_invariant:
        args["batch_invariant"] = True
    if x.mask is not None:
        args["mask"] = _broadcast(x.mask)
    if x.bias is not None:
        args["bias"] = _broadcast(x.bias)
    if x.alibi_slopes is not None:
        slopes = x.alibi_slopes.to(torch.float32)
        keep.append(slopes)
        args["alibi"] = _broadcast(slopes)
    if x.sinks is not None:
        sinks = x.sinks.to(spec.lse_dtype)
        keep.append(sinks)
        args["sinks"] = _argument(sinks)
    for name in ("key_lengths", "cu_seqlens_q", "cu_seqlens_k"):
        t = getattr(x, name)
        if t is not None:
            t = t.contiguous()
            keep.append(t)
            args[name] = t.data_ptr()
    if spec.packed:  # all sequences share one batch entry; the offsets tell them apart
        for name in ("q", "k", "v"):
            args[name] = (*args[name][:2], 0, *args[name][3:])
    if spec.dropout_p > 0.0:
        assert x.seed is not None
        args["dropout_p"] = spec.dropout_p
        args["seed"] = int(x.seed.item())
    return args, keep


def _packed_argument(spec: AttentionSpec, t: Tensor) -> tuple[int, ...]:
    argument = _argument(t)
    return (*argument[:2], 0, *argument[3:]) if spec.packed else argument


def _weights_argument(spec: AttentionSpec, t: Tensor) -> tuple[int, ...]:
    """[B, M, N] as [B, H, M, N] with a head stride of 0."""
    pointer, code, *strides = _argument(t)
    return (pointer, code, strides[0], 0, *strides[1:]) if spec.weights == "mean" else (pointer, code, *strides)


def forward(spec: AttentionSpec, x: Inputs) -> Outputs:
    """Run the forward kernel, then the weights kernel where weights are asked for."""
    assert _C is not None
    args, keep = _arguments(spec, x)
    query = x.query
    output = output_like(query, query.shape[0], spec.value_dim)
    lse = torch.empty(query.shape[:3], dtype=spec.lse_dtype)
    args["out"] = _packed_argument(spec, output)
    args["lse"] = _packed_argument(spec, lse)
    if spec.weights is not None:
        stats = query.new_empty(*query.shape[:3], 2, dtype=spec.lse_dtype)
        args["stats"] = _packed_argument(spec, stats)
    _C.attention_forward(args)
    weights = None
    if spec.weights is not None:
        heads = () if spec.weights == "mean" else (spec.heads,)
        weights = query.new_empty(spec.batch, *heads, spec.rows, spec.columns)
        del args["out"]
        args["weights"] = _weights_argument(spec, weights)
        args["weights_mode"] = WEIGHTS_CODES[spec.weights]
        _C.attention_weights(args)
    del keep
    return Outputs(output, lse, weights)


def _additive_gradient(spec: AttentionSpec, t: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    grad = torch.zeros(t.shape, dtype=spec.lse_dtype)
    return grad, _broadcast(grad)


def backward(
    spec: AttentionSpec, x: Inputs, out: Outputs, grads: tuple[Tensor | None, Tensor | None, Tensor | None]
) -> dict[str, Tensor]:
    """Gradients of the inputs named in `spec.gradients`, recomputed from lse; bit-equal at any thread count."""
    assert _C is not None
    args, keep = _arguments(spec, x)
    dout, dlse, dweights = grads
    dout = None if dout is None else rows_contiguous(dout)
    delta = torch.empty(out.lse.shape, dtype=spec.lse_dtype)
    output = rows_contiguous(out.output)
    for name, t in (("out", output), ("lse", out.lse), ("dout", dout), ("dlse", dlse), ("delta", delta)):
        if t is not None:
            args[name] = _packed_argument(spec, t)
    if dweights is not None:
        args["dweights"] = _weights_argument(spec, dweights)
        args["weights_mode"] = WEIGHTS_CODES[spec.weights]
    found: dict[str, Tensor] = {}
    for name, short in (("query", "dq"), ("key", "dk"), ("value", "dv")):
        if name in spec.gradients:
            t = getattr(x, name)
            found[name] = output_like(t, t.shape[0], t.shape[-1])
            args[short] = _packed_argument(spec, found[name])
    for name, short in (("mask", "dmask"), ("bias", "dbias")):
        if name in spec.gradients:
            found[name], args[short] = _additive_gradient(spec, getattr(x, name))
    if "sinks" in spec.gradients:
        found["sinks"] = torch.zeros(spec.heads, dtype=spec.lse_dtype)
        args["dsinks"] = _argument(found["sinks"])
    _C.attention_backward(args)
    del keep
    return {n: g.to(getattr(x, n).dtype) for n, g in found.items()}
