"""Those that ours is timed against: what each can run, and how it is called. None is imported before it is asked."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..functional import attention
from .shapes import AttentionShape

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Peer(NamedTuple):
    """refuses: why it cannot run a shape on a device, or None. make: attention of [B, H, M, D], [B, HK, N, D] twice."""

    refuses: Callable[[AttentionShape, torch.device], str | None]
    make: Callable[[AttentionShape, torch.device], Attention]


def lengths(shape: AttentionShape) -> int:
    """Keys that padding leaves."""
    return shape.columns - shape.columns // 8 if shape.mask == "padding" else shape.columns


def mask_of(shape: AttentionShape, device: torch.device) -> Tensor | None:
    """What the shape's `mask` is made of: one of its own, [B, 1, M, N], or the padding, bool [B, 1, 1, N]."""
    generator = torch.Generator().manual_seed(1)
    size = (shape.batch, 1, shape.rows, shape.columns)
    if shape.mask == "bool":
        return (torch.rand(size, generator=generator) < 0.7).to(device)
    if shape.mask == "float":
        return torch.randn(size, generator=generator).to(device, shape.dtype)
    if shape.mask == "padding":
        return (torch.arange(shape.columns, device=device) < lengths(shape)).expand(shape.batch, 1, 1, -1)
    return None


def window_mask(shape: AttentionShape, device: torch.device) -> Tensor | None:
    """The mask that a window is without an option for one: bool [M, N]."""
    if shape.window is None:
        return None
    ones = torch.ones(shape.rows, shape.columns, dtype=torch.bool, device=device)
    return ones.tril().triu(-shape.window)


# --- ours and torch's -----------------------------------------------------------------------------------------------


def ours(shape: AttentionShape, device: torch.device) -> Attention:
    """fused_attention.attention, with the shape's structure told as options."""
    options: dict[str, Any] = {}
    if shape.causal or shape.window is not None:
        options["causal"] = "top_left"
    if shape.window is not None:
        options["window"] = (shape.window, None)
    if shape.mask == "padding":
        options["key_lengths"] = torch.full((shape.batch,), lengths(shape), device=device)
    elif shape.mask is not None:
        options["mask"] = mask_of(shape, device)
    return lambda q, k, v: attention(q, k, v, **options)


def _torch(shape: AttentionShape, device: torch.device) -> Attention:
    mask = mask_of(shape, device) if shape.window is None else window_mask(shape, device)
    grouped = shape.heads != shape.kv_heads
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, is_causal=shape.causal, enable_gqa=grouped)


def _sdpa(backend: SDPBackend) -> Peer:
    """One of the kernels behind torch's function, which says itself by a RuntimeError what it cannot run."""

    def make(shape: AttentionShape, device: torch.device) -> Attention:
        plain = _torch(shape, device)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return plain(q, k, v)

        return call

    return Peer(lambda shape, device: None if device.type == "cuda" else "a kernel for GPUs", make)


# --- FlexAttention --------------------------------------------------------------------------------------------------


def _flex_refuses(shape: AttentionShape, device: torch.device) -> str | None:
    return "FlexAttention has no backward pass on a CPU" if shape.backward and device.type == "cpu" else None


def _flex_predicate(shape: AttentionShape) -> Callable[..., Tensor] | None:
    """Which keys a row sees, as a function of indices."""
    left = shape.window

    def visible(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        seen = column < lengths(shape)
        if shape.causal or left is not None:
            seen = seen & (column <= row)
        return seen if left is None else seen & (row - column <= left)

    return visible if shape.causal or left is not None or shape.mask == "padding" else None


def _flex(shape: AttentionShape, device: torch.device) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # one shape after the other must not become one graph with symbols for sizes
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    visible, own = _flex_predicate(shape), mask_of(shape, device) if shape.mask in ("bool", "float") else None
    options: dict[str, Any] = {"enable_gqa": shape.heads != shape.kv_heads}
    if own is not None and own.dtype == torch.bool:
        allowed = own

        def look_up(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
            return allowed[b, 0, row, column]

        visible = look_up
    elif own is not None:
        added = own
        options["score_mod"] = lambda score, b, h, row, column: score + added[b, 0, row, column]
    if visible is not None:
        options["block_mask"] = create_block_mask(visible, shape.batch, None, shape.rows, shape.columns, device.type)
    return lambda q, k, v: compiled(q, k, v, **options)


# --- others ---------------------------------------------------------------------------------------------------------


def _openvino_refuses(shape: AttentionShape, device: torch.device) -> str | None:
    if importlib.util.find_spec("openvino") is None:
        return "OpenVINO is not installed"
    return "OpenVINO runs forward passes on the CPU here" if device.type != "cpu" or shape.backward else None


def _openvino_tensor(t: Tensor) -> Any:
    """The same memory; NumPy has no bfloat16, whose bits travel as int16."""
    import openvino

    if t.dtype != torch.bfloat16:
        return openvino.Tensor(t.detach().numpy(), shared_memory=True)
    return openvino.Tensor(t.detach().view(torch.int16).numpy(), list(t.shape), openvino.Type.bf16)


def _openvino(shape: AttentionShape, device: torch.device) -> Attention:
    import openvino
    from openvino import opset13

    names = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
    core, name = openvino.Core(), names[shape.dtype]
    batch, heads, kv_heads, dim = shape.batch, shape.heads, shape.kv_heads, shape.head_dim
    sizes = [[batch, heads, shape.rows, dim], *([[batch, kv_heads, shape.columns, dim]] * 2)]
    inputs = [opset13.parameter(size, getattr(openvino.Type, name)) for size in sizes]

    def expand(node: Any) -> Any:
        """The operation has no groups of heads."""
        one = opset13.unsqueeze(node, opset13.constant([2]))
        wide = opset13.broadcast(one, opset13.constant([batch, kv_heads, heads // kv_heads, shape.columns, dim]))
        return opset13.reshape(wide, opset13.constant([batch, heads, shape.columns, dim]), special_zero=False)

    mask = mask_of(shape, device) if shape.window is None else window_mask(shape, device)
    extra = [] if mask is None else [openvino.op.Constant(_openvino_tensor(mask.contiguous()), shared_memory=False)]
    keys = inputs[1:] if heads == kv_heads else [expand(node) for node in inputs[1:]]
    node = opset13.scaled_dot_product_attention(inputs[0], *keys, *extra, causal=shape.causal)
    # A hint the processor has no instructions for may lead to arithmetic in another 16-bit type.
    hint = name if name.upper() in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "f32"
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": hint}
    request = core.compile_model(openvino.Model([node], inputs), "CPU", settings).create_infer_request()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for i, t in enumerate((q, k, v)):
            request.set_input_tensor(i, _openvino_tensor(t))
        request.infer()
        data = request.get_output_tensor(0).data
        return torch.from_numpy(data.view("int16")).view(shape.dtype) if name == "bf16" else torch.from_numpy(data)

    return call


def _flash_attn_refuses(shape: AttentionShape, device: torch.device) -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return "flash_attn is not installed"
    if device.type != "cuda" or shape.dtype == torch.float32:
        return "flash_attn runs 16-bit dtypes on GPUs"
    return "flash_attn has no masks" if shape.mask is not None else None


def _flash_attn(shape: AttentionShape, device: torch.device) -> Attention:
    from flash_attn import flash_attn_func

    sides = (-1 if shape.window is None else shape.window, -1)
    causal = shape.causal or shape.window is not None

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), causal=causal, window_size=sides)
        return out.transpose(1, 2)

    return call


PEERS: dict[str, Peer] = {
    "torch": Peer(lambda shape, device: None, _torch),
    "flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "flex": Peer(_flex_refuses, _flex),
    "openvino": Peer(_openvino_refuses, _openvino),
    "flash_attn": Peer(_flash_attn_refuses, _flash_attn),
}
