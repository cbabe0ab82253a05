"""From tensors to the fields of AttentionParams (csrc/params.h): addresses, dtype codes and strides, as a dict."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..layout import output_like, rows_contiguous
from ..spec import AttentionSpec, Inputs, Outputs

_C: ModuleType | None = None
import_error = ""
try:
    _C = importlib.import_module("fused_attention._C")
except ImportError as error:
    # The build leaves a note where it could not make the extension.
    note = Path(__file__).parent.parent / "_C_missing.txt"
    import_error = note.read_text().strip() if note.exists() else str(error)

DTYPE_CODES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.bool: 4,
    torch.int8: 5,
    torch.float8_e4m3fn: 6,
}
CAUSAL_CODES = {None: 0, "top_left": 1, "bottom_right": 2}
WEIGHTS_CODES = {None: 0, "mean": 1, "heads": 2}

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass
class Call:
    """Arguments by name, and the tensors behind their addresses, which must outlive the call."""

    args: dict[str, Any]
    tensors: list[Tensor] = field(default_factory=list)

    def put(self, name: str, t: Tensor, packed: bool = False) -> None:
        """A tensor argument. Packed sequences share one element of the batch: its stride is 0."""
        strides = t.stride()
        self.args[name] = (t.data_ptr(), DTYPE_CODES[t.dtype], *((0, *strides[1:]) if packed else strides))
        self.tensors.append(t)

    def put_broadcast(self, name: str, t: Tensor) -> None:
        """A tensor whose dimensions of size 1 have stride 0."""
        strides = [0 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)]
        self.args[name] = (t.data_ptr(), DTYPE_CODES[t.dtype], *strides)
        self.tensors.append(t)

    def put_weights(self, spec: AttentionSpec, name: str, t: Tensor) -> None:
        """Weights or their gradient, [B, H, M, N]; averaged, [B, M, N], they have a head stride of 0."""
        b, *rest = t.stride()
        strides = (b, 0, *rest) if spec.weights == "mean" else (b, *rest)
        self.args[name] = (t.data_ptr(), DTYPE_CODES[t.dtype], *strides)
        self.args["weights_mode"] = WEIGHTS_CODES[spec.weights]
        self.tensors.append(t)

    def put_joint(self, names: tuple[str, ...], t: Tensor, spec: AttentionSpec, batch_first: bool) -> None:
        """The equal parts of the last dimension of a dense [B, S, n H D] (or [S, B, n H D]), as [B, H, S, D] each."""
        _, inner, width = t.shape
        code, step = DTYPE_CODES[t.dtype], width // len(names)
        batch, row = (inner * width, width) if batch_first else (width, inner * width)
        address, step_bytes = t.data_ptr(), step * t.itemsize
        for i, name in enumerate(names):
            self.args[name] = (address + i * step_bytes, code, batch, step // spec.heads, row, 1)
        self.tensors.append(t)

    def put_address(self, name: str, t: Tensor) -> None:
        """A contiguous vector of integers."""
        t = t.contiguous()
        self.args[name] = t.data_ptr()
        self.tensors.append(t)


def describe(spec: AttentionSpec) -> dict[str, Any]:
    """The arguments that follow from the spec."""
    return dict(_described(spec))


@functools.lru_cache(maxsize=4096)
def _described(spec: AttentionSpec) -> dict[str, Any]:
    args: dict[str, Any] = {
        "B": spec.batch,
        "H": spec.heads,
        "HK": spec.kv_heads,
        "M": spec.rows,
        "N": spec.columns,
        "D": spec.head_dim,
        "DV": spec.value_dim,
        "scale": spec.scale,
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
    if spec.part_of_keys:
        args["part_of_keys"] = True
    if spec.precision == "int8":
        args["int8"] = True
    if spec.dropout_p > 0.0:
        args["dropout_p"] = spec.dropout_p
    if spec.block_map is not None:
        args["block_m"], args["block_n"] = spec.block_map
    return args


def call_of(spec: AttentionSpec, x: Inputs) -> Call:
    """A call with all inputs but the seed of the dropout."""
    call = Call(describe(spec))
    for name, t in (("q", x.query), ("k", x.key), ("v", x.value)):
        call.put(name, rows_contiguous(t), spec.packed)
    if x.plain:
        return call
    if x.mask is not None:
        call.put_broadcast("mask", x.mask)
    if x.bias is not None:
        call.put_broadcast("bias", x.bias)
    if x.alibi_slopes is not None:
        call.put_broadcast("alibi", x.alibi_slopes.to(torch.float32))
    if x.sinks is not None:
        call.put("sinks", x.sinks.to(spec.lse_dtype))
    if x.block_map is not None:
        call.put_broadcast("block_map", x.block_map)
    for name in ("key_lengths", "cu_seqlens_q", "cu_seqlens_k"):
        t = getattr(x, name)
        if t is not None:
            call.put_address(name, t)
    return call


def put_outputs(call: Call, spec: AttentionSpec, x: Inputs) -> Outputs:
    """New tensors for the output and lse."""
    output = output_like(x.query, x.query.shape[0], spec.value_dim)
    lse = torch.empty(x.query.shape[:3], dtype=spec.lse_dtype, device=x.query.device)
    call.put("out", output, spec.packed)
    call.put("lse", lse, spec.packed)
    return Outputs(output, lse, None)


def put_incoming(call: Call, spec: AttentionSpec, out: Outputs, grads: Gradients) -> None:
    """What a backward pass reads beside the inputs."""
    dout, dlse, dweights = grads
    dout = None if dout is None else rows_contiguous(dout)
    delta = torch.empty_like(out.lse)
    output = rows_contiguous(out.output)
    for name, t in (("out", output), ("lse", out.lse), ("dout", dout), ("dlse", dlse), ("delta", delta)):
        if t is not None:
            call.put(name, t, spec.packed)
    if dweights is not None:
        call.put_weights(spec, "dweights", dweights)


def put_input_gradients(call: Call, spec: AttentionSpec, x: Inputs) -> dict[str, Tensor]:
    """New tensors for the gradients of query, key and value that are asked for."""
    found: dict[str, Tensor] = {}
    for name, short in (("query", "dq"), ("key", "dk"), ("value", "dv")):
        if name in spec.gradients:
            t = getattr(x, name)
            found[name] = output_like(t, t.shape[0], t.shape[-1])
            call.put(short, found[name], spec.packed)
    return found
