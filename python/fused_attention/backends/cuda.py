"""The CUDA C++ kernels: what they support, and the call into the extension. Nothing waits for the device."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..spec import AttentionSpec, Device, Inputs, Outputs, beyond
from .params import (
    _C,
    DTYPE_CODES,
    Call,
    Gradients,
    call_of,
    describe,
    put_incoming,
    put_input_gradients,
    put_outputs,
)

MAX_HEAD_DIM = 256
MAX_LENGTH = 1 << 30
DTYPES = (torch.bfloat16, torch.float16)


@functools.cache
def architectures() -> tuple[str, ...]:
    """What the kernels are compiled for, such as ("80", "90a"); empty where they are not built."""
    built = {} if _C is None else _C.info()
    return tuple(filter(None, built.get("cuda_archs", "").split(";")))


@functools.cache
def _serves(arch: str) -> bool:
    """Code for sm_XY runs on chips of the same X with at least this Y; code for sm_XYa on that chip alone."""
    wanted = int(arch.removeprefix("sm_"))
    for built in architectures():
        own = int(built.rstrip("af"))
        if own == wanted or (built.isdigit() and own // 10 == wanted // 10 and own <= wanted):
            return True
    return False


def _kernel_arch(arch: str) -> int:
    """Which kernels run on a chip: 90 for those that use what sm_90a alone has, else 80."""
    return 90 if arch == "sm_90" and "90a" in architectures() else 80


@functools.cache
def _chip(index: int | None) -> dict[str, int]:
    """The arguments that follow from the GPU."""
    found = torch.cuda.get_device_properties(index)
    return {"arch": _kernel_arch(f"sm_{found.major}{found.minor}"), "processors": found.multi_processor_count}


def unavailable(device: Device) -> str | None:
    """None if kernels for `device` are built, otherwise the reason why not."""
    if device.type != "cuda":
        return f"runs on CUDA tensors, not on {device.type}"
    if device.arch is None or not device.arch.startswith("sm_"):
        return f"runs on NVIDIA GPUs, not on {device.arch}"
    if not architectures():
        return "the CUDA kernels are not built; install with nvcc at hand"
    if not _serves(device.arch):
        built = ", ".join(f"sm_{a}" for a in architectures())
        return f"built for {built}, not for {device.arch} (FUSED_ATTENTION_CUDA_ARCHS)"
    return None


def unsupported(spec: AttentionSpec) -> str | None:
    """None if the kernels can do what `spec` asks for, wherever they are built, otherwise the reason why not."""
    if max(spec.rows, spec.columns) >= MAX_LENGTH:
        return f"lengths below {MAX_LENGTH}, not {max(spec.rows, spec.columns)}"
    if spec.weights:
        return "no attention weights"
    if spec.block_map is not None:
        return "no block maps"
    if spec.precision and spec.gradients:
        return f"no gradients with products in {spec.precision}"
    return beyond(spec, DTYPES, MAX_HEAD_DIM, "fp8")


def supports(spec: AttentionSpec, device: Device) -> str | None:
    """None if these kernels run `spec` on `device`, otherwise the reason why not."""
    reason = unavailable(device) or unsupported(spec)
    if reason is None and spec.precision and _kernel_arch(device.arch or "") != 90:
        return f"products in {spec.precision} by kernels for sm_90a (FUSED_ATTENTION_CUDA_ARCHS), not on {device.arch}"
    return reason


def plan(spec: AttentionSpec, device: Device) -> str | None:
    """The kernels that would be launched, for tensors that are aligned to 16 bytes as new ones are."""
    assert _C is not None
    args = describe(spec) | {"arch": _kernel_arch(device.arch or "")}
    anywhere = 16  # nothing is read
    tensors = {"mask": spec.mask, "bias": spec.bias}
    for name, heads, rows, dims in (
        ("q", spec.heads, spec.rows, spec.head_dim),
        ("k", spec.kv_heads, spec.columns, spec.head_dim),
        ("v", spec.kv_heads, spec.columns, spec.value_dim),
        ("dout", spec.heads, spec.rows, spec.value_dim),
    ):
        args[name] = (anywhere, DTYPE_CODES[spec.dtype], heads * rows * dims, rows * dims, dims, 1)
    tensors["alibi"] = torch.float32 if spec.alibi_slopes else None
    for name, short in (("query", "dq"), ("key", "dk"), ("value", "dv")):
        tensors[short] = spec.dtype if name in spec.gradients else None
    for name, short in (("mask", "dmask"), ("bias", "dbias"), ("sinks", "dsinks")):
        tensors[short] = torch.float32 if name in spec.gradients else None
    args |= {n: (anywhere, DTYPE_CODES[t]) for n, t in tensors.items() if t is not None}
    if spec.packed:
        args |= {"cu_seqlens_q": anywhere, "total_rows": spec.rows, "total_keys": spec.columns}
    launches = _C.cuda_plan_forward_fp8(args) if spec.precision else _C.cuda_plan_forward(args)
    if spec.gradients:
        launches += _C.cuda_plan_backward(args | {"mask_shares": 1, "bias_shares": 1})
    return ", ".join(kernel for kernel, *_ in launches)


def _call(spec: AttentionSpec, x: Inputs) -> Call:
    call = call_of(spec, x)
    call.args |= _chip(x.query.device.index)
    if spec.dropout_p > 0.0:
        assert x.seed is not None
        call.put_address("seed_at", x.seed)
    return call


def _put_schedule(call: Call, x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Packed sequences by falling work; returns the order, rows and keys of each, on the device."""
    assert x.cu_seqlens_q is not None and x.cu_seqlens_k is not None
    rows, keys = x.cu_seqlens_q.diff(), x.cu_seqlens_k.diff()
    order = torch.argsort(rows * keys, descending=True, stable=True)
    call.put_address("order", order)
    call.args["total_rows"], call.args["total_keys"] = x.query.shape[2], x.key.shape[2]
    return order, rows, keys


def _put_ends(call: Call, name: str, lengths: Tensor, order: Tensor, size: int) -> None:
    """Blocks of `size` of the sequences up to each, in their order."""
    call.put_address(name, torch.cumsum(((lengths + size - 1) // size)[order], 0))


def run(kind: str, call: Call, where: Tensor) -> None:
    """Launch the kernels of a call on the device and current stream of `where`."""
    launch = getattr(_C, f"cuda_{kind}")
    if where.device.index != torch.cuda.current_device():
        with torch.cuda.device(where.device):
            launch(call.args, torch.cuda.current_stream().cuda_stream)
    else:
        launch(call.args, torch.cuda.current_stream().cuda_stream)


def _blocks(call: Call) -> Any:
    assert _C is not None
    return _C.cuda_blocks(call.args)


def _put_codes(call: Call, spec: AttentionSpec, x: Inputs, block: int) -> None:
    """Memory for float8 codes of query, key and value, and for the scales of their blocks of rows (fp8_params.h)."""
    device, batch = x.query.device, x.query.shape[0]

    def blocks(length: int) -> int:  # of one element of the batch
        return length // block + spec.batch if spec.packed else -(-length // block)

    for name, t in (("q", x.query), ("k", x.key), ("v", x.value)):
        heads, rows, dims = t.shape[1:]
        shape = (dims, blocks(rows) * block) if name == "v" else (rows, -(-dims // 16) * 16)
        codes = torch.empty(batch, heads, *shape, dtype=torch.float8_e4m3fn, device=device)
        scales = torch.empty(batch, heads, blocks(rows), dtype=torch.float32, device=device)
        call.put(f"{name}_codes", codes, spec.packed)
        call.put(f"{name}_scales", scales, spec.packed)


def forward(spec: AttentionSpec, x: Inputs) -> Outputs:
    """Run the forward kernel."""
    assert _C is not None
    call = _call(spec, x)
    out = put_outputs(call, spec, x)
    if spec.precision:
        size, heads, block = _C.cuda_fp8_blocks(call.args)
        _put_codes(call, spec, x, block)
    elif spec.packed:
        size, heads, _, _ = _blocks(call)
    if spec.packed:
        order, rows, _ = _put_schedule(call, x)
        _put_ends(call, "row_ends", rows * heads, order, size)
    run("forward_fp8" if spec.precision else "forward", call, x.query)
    return out


def _put_additive(call: Call, spec: AttentionSpec, x: Inputs) -> dict[str, Tensor]:
    """New tensors for the gradients of mask and bias, in shares that are added afterwards: [shares, *its shape]."""
    assert _C is not None
    names = {"mask": "dmask", "bias": "dbias"}
    wanted = {n: (short, getattr(x, n)) for n, short in names.items() if n in spec.gradients}
    for short, t in wanted.values():
        like = torch.empty(t.shape, dtype=torch.float32, device="meta")
        strides = [0 if n == 1 else s for n, s in zip(like.shape, like.stride(), strict=True)]
        call.args[short] = (16, DTYPE_CODES[torch.float32], *strides)  # any address: strides are looked at
    shares = dict(zip(names, _C.cuda_shares(call.args), strict=True))
    found: dict[str, Tensor] = {}
    empty = 0 in (spec.batch, spec.heads, spec.rows, spec.columns)
    for name, (short, t) in wanted.items():
        make = torch.zeros if empty else torch.empty
        found[name] = make((shares[name], *t.shape), dtype=torch.float32, device=t.device)
        call.put_broadcast(short, found[name][0])
        call.tensors.append(found[name])
        call.args[f"{name}_shares"] = shares[name]
    return found


def backward(spec: AttentionSpec, x: Inputs, out: Outputs, grads: Gradients) -> dict[str, Tensor]:
    """Gradients of the inputs named in `spec.gradients`, recomputed from lse; bit-equal from run to run."""
    call = _call(spec, x)
    if grads[0] is None:
        grads = (torch.zeros_like(out.output), *grads[1:])
    put_incoming(call, spec, out, grads)
    found = put_input_gradients(call, spec, x)
    if spec.gradients & {"mask", "bias"}:
        found |= _put_additive(call, spec, x)
    if "sinks" in spec.gradients:
        found["sinks"] = torch.empty(spec.heads, dtype=torch.float32, device=x.query.device)
        call.put("dsinks", found["sinks"])
    if spec.packed:
        _, _, row_size, key_size = _blocks(call)
        order, rows, keys = _put_schedule(call, x)
        _put_ends(call, "row_ends", rows, order, row_size)
        _put_ends(call, "key_ends", keys, order, key_size)
    run("backward", call, x.query)
    for name in ("mask", "bias"):
        if name in found:
            found[name] = found[name].sum(0)
    return {n: g.to(getattr(x, n).dtype) for n, g in found.items()}
