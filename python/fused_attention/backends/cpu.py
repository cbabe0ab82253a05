"""The C++ kernels: what they support, and the call into the extension. Only pointers and strides cross over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..spec import FLOAT_DTYPES, AttentionSpec, Device, Inputs, Outputs, beyond, uneven_blocks
from .params import _C, Call, Gradients, call_of, import_error, put_incoming, put_input_gradients, put_outputs

_import_error = import_error

MAX_HEAD_DIM = 512


def info() -> dict[str, Any]:
    """What the extension was built with and which instruction set it chose; {"error": reason} if it is missing."""
    return _C.info() if _C is not None else {"error": f"the C++ extension is not built ({_import_error})"}


def unavailable(device: Device) -> str | None:
    """None if kernels for `device` are built, otherwise the reason why not."""
    if _C is None:
        return info()["error"] + "; install with a C++ compiler at hand"
    return None if device.type == "cpu" else f"runs on CPU tensors, not on {device.type}"


def unsupported(spec: AttentionSpec) -> str | None:
    """None if the kernels can do what `spec` asks for, wherever they are built, otherwise the reason why not."""
    return beyond(spec, FLOAT_DTYPES, MAX_HEAD_DIM) or uneven_blocks(spec)


def supports(spec: AttentionSpec, device: Device) -> str | None:
    """None if these kernels run `spec` on `device`, otherwise the reason why not."""
    return unavailable(device) or unsupported(spec)


def plan(spec: AttentionSpec, device: Device) -> str | None:
    """Which instruction set the kernels use."""
    return f"{info()['isa']} kernels, up to {torch.get_num_threads()} threads"


def _call(spec: AttentionSpec, x: Inputs) -> Call:
    call = call_of(spec, x)
    call.args["threads"] = torch.get_num_threads()
    if spec.dropout_p > 0.0:
        assert x.seed is not None
        call.args["seed"] = int(x.seed.item())
    return call


def forward(spec: AttentionSpec, x: Inputs) -> Outputs:
    """Run the forward kernel, then the weights kernel where weights are asked for."""
    assert _C is not None
    call = _call(spec, x)
    query = x.query
    out = put_outputs(call, spec, x)
    if spec.weights is not None:
        stats = query.new_empty(*query.shape[:3], 2, dtype=spec.lse_dtype)
        call.put("stats", stats, spec.packed)
    _C.attention_forward(call.args)
    if spec.weights is None:
        return out
    heads = () if spec.weights == "mean" else (spec.heads,)
    weights = query.new_empty(spec.batch, *heads, spec.rows, spec.columns)
    del call.args["out"]
    call.put_weights(spec, "weights", weights)
    _C.attention_weights(call.args)
    return out._replace(weights=weights)


def backward(spec: AttentionSpec, x: Inputs, out: Outputs, grads: Gradients) -> dict[str, Tensor]:
    """Gradients of the inputs named in `spec.gradients`, recomputed from lse; bit-equal at any thread count."""
    assert _C is not None
    call = _call(spec, x)
    put_incoming(call, spec, out, grads)
    found = put_input_gradients(call, spec, x)
    for name, short in (("mask", "dmask"), ("bias", "dbias")):
        if name in spec.gradients:
            found[name] = torch.zeros(getattr(x, name).shape, dtype=spec.lse_dtype)
            call.put_broadcast(short, found[name])
    if "sinks" in spec.gradients:
        found["sinks"] = torch.zeros(spec.heads, dtype=spec.lse_dtype)
        call.put("dsinks", found["sinks"])
    _C.attention_backward(call.args)
    return {n: g.to(getattr(x, n).dtype) for n, g in found.items()}
