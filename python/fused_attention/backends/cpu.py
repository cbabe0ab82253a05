"""The C++ kernels: what they support, and the call into the extension. Only pointers and strides cross over."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..spec import FLOAT_DTYPES, AttentionSpec, Device, Inputs, Outputs, beyond, uneven_blocks
from .params import (
    _C,
    DTYPE_CODES,
    WEIGHTS_CODES,
    Call,
    Gradients,
    call_of,
    describe,
    import_error,
    put_incoming,
    put_input_gradients,
    put_outputs,
)

_import_error = import_error

MAX_HEAD_DIM = 512
INT8_ISAS = ("avx512_bf16", "amx", "amx_emulated")  # that have products of 8-bit integers


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
    dtypes = FLOAT_DTYPES if spec.precision is None else tuple(t for t in FLOAT_DTYPES if t != torch.float64)
    return beyond(spec, dtypes, MAX_HEAD_DIM, "int8") or uneven_blocks(spec) or _beyond_int8(spec)


def _beyond_int8(spec: AttentionSpec) -> str | None:
    """Why the kernels of `precision="int8"` cannot run `spec`; None if they may, or if it is not asked for."""
    if spec.precision is None:
        return None
    if spec.gradients:
        return "no gradients with products in int8"
    if spec.weights:
        return "no attention weights with products in int8"
    if spec.block_map is not None and (spec.block_map[0] % 32 or spec.block_map[1] % 32):
        return f"blocks of a multiple of 32 rows and keys with products in int8, not {spec.block_map}"
    return None


def supports(spec: AttentionSpec, device: Device) -> str | None:
    """None if these kernels run `spec` on `device`, otherwise the reason why not."""
    reason = unavailable(device) or unsupported(spec)
    if reason is None and spec.precision and info()["isa"] not in INT8_ISAS:
        return f"products in int8 by kernels for {' and '.join(INT8_ISAS[:2])}, not by those for {info()['isa']}"
    return reason


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


def _new_weights(call: Call, spec: AttentionSpec, like: Tensor) -> Tensor | None:
    """A new tensor for the attention weights, if they are asked for."""
    if spec.weights is None:
        return None
    heads = () if spec.weights == "mean" else (spec.heads,)
    weights = like.new_empty(spec.batch, *heads, spec.rows, spec.columns)
    call.put_weights(spec, "weights", weights)
    return weights


def forward(spec: AttentionSpec, x: Inputs) -> Outputs:
    """Run the forward kernel, which writes the weights too where they are asked for."""
    assert _C is not None
    call = _call(spec, x)
    out = put_outputs(call, spec, x)._replace(weights=_new_weights(call, spec, x.query))
    _C.attention_forward(call.args)
    return out


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


# --- projections, of a module's small calls -------------------------------------------------------------------------


@functools.cache
def _isa() -> str | None:
    return info().get("isa")


@functools.cache
def _slow_in_torch(dtype: torch.dtype) -> bool:
    """Whether PyTorch multiplies matrices of this dtype by loops of its own here, at 1 to 20 GFLOP/s."""
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    if not torch.backends.mkldnn.is_available():
        return True
    ask = torch.ops.mkldnn
    supported = ask._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else ask._is_mkldnn_fp16_supported
    return not supported()


def projections_pay(dtype: torch.dtype, rows: int, width: int) -> bool:
    """Whether a call that also projects [rows, width] to 3 width and back is faster than PyTorch's products around it.

    PyTorch spends 3 us on a small product of float32 and 20 us on one of bfloat16 before it multiplies.
    """
    if not rows or dtype == torch.float64 or _isa() in (None, "portable"):
        return False
    if _slow_in_torch(dtype):
        return rows >= 8 or width <= 256
    most, widest = (2e6, 128) if dtype == torch.float32 else (3e7, 256)
    return width <= widest and 3 * rows * width * width <= most


class Projected:
    """`forward_joint` between two projections: a call with all but its addresses."""

    def __init__(self, spec: AttentionSpec, batch_first: bool) -> None:
        assert _C is not None
        batch, heads, rows, dim, code = spec.batch, spec.heads, spec.rows, spec.head_dim, DTYPE_CODES[spec.dtype]
        width = heads * dim
        self.spec = spec
        self.joint_size = (batch, rows, 3 * width) if batch_first else (rows, batch, 3 * width)

        def placed(columns: int, at: int = 0) -> tuple[int, ...]:
            batch_step, row_step = (rows * columns, columns) if batch_first else (columns, batch * columns)
            return (at * spec.dtype.itemsize, code, batch_step, dim, row_step, 1)

        args = describe(spec)
        args |= {name: placed(3 * width, i * width) for i, name in enumerate(("q", "k", "v"))}
        args |= {"out": placed(width), "lse": (0, DTYPE_CODES[spec.lse_dtype], heads * rows, rows, 1)}
        if spec.weights is not None:
            by_head = (heads * rows * rows, rows * rows) if spec.weights == "heads" else (rows * rows, 0)
            args |= {"weights": (0, code, *by_head, rows, 1), "weights_mode": WEIGHTS_CODES[spec.weights]}

        def linear(out: int) -> dict[str, Any]:
            matrices = {"x": (0, code, width), "w": (0, code, width), "b": (0, code), "y": (0, code, out)}
            return {"rows": batch * rows, "in": width, "out": out, **matrices}

        self._run = _C.Projected(linear(3 * width), args, linear(width)).run

    def __call__(
        self, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, keep: bool
    ) -> tuple[Tensor | None, ...]:
        """The output, the weights if they are asked for, and to `keep`: the projection, attention's output, lse."""
        spec = self.spec
        output = torch.empty_like(x)
        weights = joint = attended = lse = None
        if spec.weights is not None:
            heads = () if spec.weights == "mean" else (spec.heads,)
            weights = x.new_empty(spec.batch, *heads, spec.rows, spec.rows)
        if keep:
            joint, attended = x.new_empty(self.joint_size), torch.empty_like(x)
            lse = x.new_empty(spec.batch, spec.heads, spec.rows, dtype=spec.lse_dtype)
        tensors = (x, w1, b1, w2, b2, joint, attended, output, lse, weights)
        self._run(*[0 if t is None else t.data_ptr() for t in tensors], torch.get_num_threads())
        return output, weights, joint, attended, lse


# --- query, key and value from one projection: dense [B, S, 3 H D], or [S, B, 3 H D] without `batch_first` ---------


def _joint_call(spec: AttentionSpec, qkv: Tensor, batch_first: bool) -> Call:
    call = Call(describe(spec))
    call.args["threads"] = torch.get_num_threads()
    call.put_joint(("q", "k", "v"), qkv, spec, batch_first)
    return call


def forward_joint(spec: AttentionSpec, qkv: Tensor, batch_first: bool, keep_lse: bool) -> tuple[Tensor, ...]:
    """`forward` without a view of its own for each tensor: the output [B, S, H D] or [S, B, H D], lse, weights."""
    assert _C is not None
    call = _joint_call(spec, qkv, batch_first)
    outer, inner, width = qkv.shape
    output = qkv.new_empty((outer, inner, width // 3))
    call.put_joint(("out",), output, spec, batch_first)
    lse = qkv.new_empty(spec.batch, spec.heads, spec.rows, dtype=spec.lse_dtype) if keep_lse else None
    if lse is not None:
        call.put("lse", lse)
    weights = _new_weights(call, spec, qkv)
    _C.attention_forward(call.args)
    return output, lse, weights  # type: ignore[return-value]


def backward_joint(
    spec: AttentionSpec, qkv: Tensor, batch_first: bool, out: tuple[Tensor, Tensor], grads: tuple[Tensor | None, ...]
) -> Tensor:
    """`backward` of `forward_joint` from its output and lse: the gradient of the projection, laid out like it."""
    assert _C is not None
    call = _joint_call(spec, qkv, batch_first)
    output, lse = out
    dout, dweights = grads
    call.put_joint(("out",), output, spec, batch_first)
    call.put("lse", lse)
    call.put("delta", torch.empty_like(lse))
    if dout is not None:
        call.put_joint(("dout",), dout.contiguous(), spec, batch_first)
    if dweights is not None:
        call.put_weights(spec, "dweights", dweights)
    found = torch.empty_like(qkv)
    call.put_joint(("dq", "dk", "dv"), found, spec, batch_first)
    _C.attention_backward(call.args)
    return found
