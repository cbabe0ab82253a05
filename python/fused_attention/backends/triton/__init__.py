"""The Triton kernels: what they support, and how a call is run. Triton is imported by the first call, not here."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from ...spec import AttentionSpec, Device, Inputs, Outputs, beyond, uneven_blocks

MAX_HEAD_DIM = 512
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_installed = importlib.util.find_spec("triton") is not None


def unavailable(device: Device) -> str | None:
    """None if Triton makes kernels for `device`, otherwise the reason why not."""
    if not _installed:
        return "Triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "runs on CUDA and ROCm tensors; on a CPU only in Triton's interpreter (TRITON_INTERPRET=1)"
    if device.type not in ("cpu", "cuda"):
        return f"runs on CUDA and ROCm tensors, not on {device.type}"
    if device.arch is not None and device.arch.startswith("sm_") and int(device.arch[3:]) < 80:
        return f"needs sm_80 or newer, not {device.arch}"
    return None


def unsupported(spec: AttentionSpec) -> str | None:
    """None if the kernels can do what `spec` asks for, on whatever device, otherwise the reason why not."""
    if spec.block_map is not None and spec.block_map[0] % 16:
        return f"blocks of a multiple of 16 rows, not {spec.block_map[0]}"
    return beyond(spec, DTYPES, MAX_HEAD_DIM) or uneven_blocks(spec)


def supports(spec: AttentionSpec, device: Device) -> str | None:
    """None if these kernels run `spec` on `device`, otherwise the reason why not."""
    return unavailable(device) or unsupported(spec)


def plan(spec: AttentionSpec, device: Device) -> str | None:
    """The tile configs of the kernels that would be launched."""
    from . import configs

    chosen = {"forward": configs.forward(device.arch, spec)}
    if spec.weights:
        chosen["weights"] = configs.weights(device.arch, spec)
    if spec.gradients & {"key", "value"}:
        chosen["dK and dV"] = configs.key_gradient(device.arch, spec)
    if "query" in spec.gradients:
        chosen["dQ"] = configs.query_gradient(device.arch, spec)
    if spec.gradients & {"mask", "bias"}:
        chosen["dBias"] = configs.additive_gradient(device.arch, spec)
    return "; ".join(f"{name} {config}" for name, config in chosen.items())


def forward(spec: AttentionSpec, x: Inputs) -> Outputs:
    """Run the forward kernel, then the weights kernel where weights are asked for."""
    from . import attention, launch

    launches, out = attention.forward_launches(spec, x, Device.of(x.query).arch)
    launch.run(launches, x.query)
    return out


def backward(
    spec: AttentionSpec, x: Inputs, out: Outputs, grads: tuple[Tensor | None, Tensor | None, Tensor | None]
) -> dict[str, Tensor]:
    """Gradients of the inputs named in `spec.gradients`, recomputed from lse; bit-equal from run to run."""
    from . import gradients, launch

    launches, found = gradients.backward_launches(spec, x, out, grads, Device.of(x.query).arch)
    launch.run(launches, x.query)
    return gradients.finish(spec, x, out, found)
