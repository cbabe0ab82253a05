"""From a call to launches: which kernels run, on which grid, with which arguments. No kernel is written here."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...layout import output_like
from ...spec import AttentionSpec, Inputs, Outputs
from . import configs, forward_kernels, weights_kernels
from .launch import Launch, compile_options
from .tiles import Problem, View

ALIGN = 16  # elements: what Triton sees of the divisibility of a stride
FAR = 1 << 30  # a window side that reaches everywhere, and leaves room to add positions in 32 bits


class Schedule(NamedTuple):
    """Blocks of rows of packed sequences, longest sequence first."""

    order: Tensor  # int64 [B], sequences by falling length
    ends: Tensor  # int64 [2^k >= B], blocks of order[0] .. order[i] together
    batch: int


def view(t: Tensor, packed: bool = False) -> View:
    """A tensor [B, H, M, D]; packed sequences share one element of the batch."""
    b, h, m, _ = t.stride()
    return View(t, 0 if packed else b, h, m)


def row_view(t: Tensor, packed: bool = False) -> View:
    """A tensor [B, H, M]."""
    b, h, m = t.stride()
    return View(t, 0 if packed else b, h, m)


def broadcast_view(t: Tensor | None) -> View | None:
    """A mask or bias [B|1, H|1, M|1, N|1]: stride 0 where it broadcasts."""
    if t is None:
        return None
    return View(t, *(0 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)))


def precision(dtype: torch.dtype) -> str | None:
    """How products of float32 are taken: as `torch.set_float32_matmul_precision` says."""
    if dtype != torch.float32:
        return None
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def right_side(spec: AttentionSpec) -> int | None:
    """How many keys right of the diagonal a row sees, None: all. Causality is a right side of 0."""
    _, right = spec.window or (None, None)
    if spec.causal:
        return 0 if right is None else min(right, 0)
    return right


@functools.lru_cache(maxsize=1024)
def _constants(spec: AttentionSpec, float32_precision: str | None) -> tuple[Any, ...]:
    """The members of a `Problem` that follow from the spec: those after the tensors, in order."""
    (left, _), right = spec.window or (None, None), right_side(spec)
    added = spec.softcap is not None or spec.mask is not None or spec.bias is not None or spec.alibi_slopes
    exact = spec.dtype == torch.float32
    threshold = factor = None
    if spec.dropout_p > 0.0:
        threshold = min(int(spec.dropout_p * 2**32), 2**32 - 1) - 2**31
        factor = 1.0 / (1.0 - spec.dropout_p) if spec.dropout_p < 1.0 else 0.0
    found = {
        "rows": spec.rows,
        "columns": spec.columns,
        "heads": spec.heads,
        "batch": spec.batch,
        "scale": spec.scale,
        "softcap": spec.softcap,
        "left": None if left is None else min(left, FAR),
        "right": None if right is None else min(right, FAR),
        "threshold": threshold,
        "keep_factor": factor,
        "block_rows": None if spec.block_map is None else spec.block_map[0],
        "block_columns": None if spec.block_map is None else spec.block_map[1],
        "group": tl.constexpr(spec.group),
        "D": tl.constexpr(width(spec.head_dim)),
        "DV": tl.constexpr(width(spec.value_dim)),
        "head_dim": tl.constexpr(spec.head_dim),
        "value_dim": tl.constexpr(spec.value_dim),
        "bottom_right": tl.constexpr(spec.causal == "bottom_right"),
        "raw": tl.constexpr(not exact and not added and spec.scale > 0.0),
        "exact": tl.constexpr(exact),
        "precision": tl.constexpr(float32_precision),
        "chunk": tl.constexpr(configs.chunk(spec, float32_precision)),
        "split": tl.constexpr(not configs.heavy(spec)),
    }
    return tuple(found[name] for name in Problem._fields[12:])


def width(dim: int) -> int:
    """How many elements of a row are read for a head dim."""
    return -(-dim // ALIGN) * ALIGN


def readable(t: Tensor) -> Tensor:
    """t [B, H, S, D] itself, or a copy with zeros behind the rows, such that D and all strides are multiples of ALIGN.

    Anything else is loaded element by element, in more instructions than the matrix products take, and with so many
    addresses alive that registers spill.
    """
    b, h, s, d = t.stride()
    dim = t.shape[3]
    if d == 1 and not (b | h | s | dim) % ALIGN and not t.data_ptr() % 16:
        return t
    copy = t.new_empty((*t.shape[:3], width(dim)))
    copy[..., :dim] = t
    copy[..., dim:] = 0
    return copy


_NO_OPTION = (None,) * (len(Inputs._fields) - 3)


def problem(spec: AttentionSpec, x: Inputs) -> Problem:
    """What every kernel is told about one call."""
    packed = spec.packed
    q, k, v = view(readable(x.query), packed), view(readable(x.key), packed), view(readable(x.value), packed)
    constants = _constants(spec, precision(spec.dtype))
    if x.plain:
        return Problem(q, k, v, *_NO_OPTION, *constants)
    slopes = None
    if x.alibi_slopes is not None:
        t = x.alibi_slopes.to(torch.float32)
        slopes = View(t, 0 if t.shape[0] == 1 else t.stride(0), t.stride(1), 0)
    return Problem(
        q,
        k,
        v,
        broadcast_view(x.mask),
        broadcast_view(x.bias),
        slopes,
        None if x.sinks is None else x.sinks.to(torch.float32).contiguous(),
        None if x.key_lengths is None else x.key_lengths.contiguous(),
        None if x.cu_seqlens_q is None else x.cu_seqlens_q.contiguous(),
        None if x.cu_seqlens_k is None else x.cu_seqlens_k.contiguous(),
        x.seed,
        broadcast_view(x.block_map),
        *constants,
    )


def weights_view(t: Tensor) -> View:
    """Weights or their gradient, [B, M, N] (averaged: a head stride of 0) or [B, H, M, N]."""
    if t.dim() == 3:
        b, m, n = t.stride()
        return View(t, b, 0, m, n)
    return View(t, *t.stride())


def schedule(x: Inputs, block: int, group: int = 1, keys: bool = False) -> Schedule:
    """Sequences by falling cost, on the device and without waiting for it.

    block: rows (keys: keys) in a tile. group: heads whose rows follow each other in a tile.
    """
    assert x.cu_seqlens_q is not None and x.cu_seqlens_k is not None
    rows, columns = x.cu_seqlens_q.diff(), x.cu_seqlens_k.diff()
    order = torch.argsort(rows * columns, descending=True, stable=True)
    tiles = ((columns if keys else rows * group) + block - 1) // block
    ends = torch.cumsum(tiles[order], 0)
    batch = ends.shape[0]
    size = triton.next_power_of_2(batch)
    if size > batch:  # the bisection reads a power of two of them
        ends = torch.cat((ends, ends[-1:].expand(size - batch) + 1))
    return Schedule(order, ends, batch)


@functools.lru_cache(maxsize=4096)
def _descriptor(shape: torch.Size, strides: tuple[int, ...], size: int, *block: int) -> dict[str, Any] | None:
    """What a tensor descriptor says but for the tensor; validated once."""
    if 0 in shape or any(s <= 0 or s * size % 16 for s in strides[:3]):
        return None
    dtype = {2: torch.float16, 4: torch.float32}[size]
    sample = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    return {**vars(TensorDescriptor(sample, list(shape), list(strides), [1, 1, *block])), "base": None}


def describe(t: Tensor, block: int, width: int) -> TensorDescriptor | None:
    """A tensor descriptor for tiles [block, width] of [B, H, S, D]; None where the hardware cannot describe t."""
    found = None if t.data_ptr() % 16 else _descriptor(t.shape, t.stride(), t.element_size(), block, width)
    if found is None:
        return None
    descriptor = object.__new__(TensorDescriptor)  # its own checks take longer than everything else before a launch
    descriptor.__dict__ = {**found, "base": t}
    return descriptor


def forward_launches(spec: AttentionSpec, x: Inputs, arch: str | None) -> tuple[list[Launch], Outputs]:
    """The launches of a forward pass and the tensors that they fill."""
    query = x.query
    output = output_like(query, query.shape[0], spec.value_dim)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    weights = None
    if spec.weights is not None:
        heads = () if spec.weights == "mean" else (spec.heads,)
        weights = query.new_empty(spec.batch, *heads, spec.rows, spec.columns)
    if lse.numel() == 0:
        return [], Outputs(output, lse, weights)
    p = problem(spec, x)
    stats = None
    if weights is not None:
        stats = (row_view(torch.empty_like(lse)), row_view(torch.empty_like(lse)))
    launches = [_forward(spec, x, p, arch, (output, lse), stats)]
    if weights is not None and weights.numel():
        launches.append(_weights(spec, p, arch, weights, stats))
    return launches, Outputs(output, lse, weights)


class _Plan(NamedTuple):
    """What a spec alone decides about a launch; found once per spec."""

    group: int  # query heads whose rows share a block
    blocks: int
    heads: int  # over which blocks are repeated
    options: dict[str, Any]


@functools.lru_cache(maxsize=4096)
def _forward_plan(spec: AttentionSpec, arch: str | None, c: configs.Config) -> _Plan:
    # A block map may differ from head to head.
    pack = spec.group > 1 and spec.rows < c.BLOCK_M and spec.block_map is None
    group, heads = (spec.group, spec.kv_heads) if pack else (1, spec.heads)
    options = {
        "BLOCK_M": c.BLOCK_M,
        "BLOCK_N": c.BLOCK_N,
        "BLOCK_D": configs.padded(spec.head_dim),
        "BLOCK_DV": configs.padded(spec.value_dim),
        "PACK": pack,
        "STEPS": (spec.batch - 1).bit_length() if spec.packed else 0,
        "SPECIALIZE": c.specialize,
        "num_stages": c.stages,
        **compile_options(arch, c.warps),
    }
    return _Plan(group, triton.cdiv(spec.rows * group, c.BLOCK_M), heads, options)


def _forward(
    spec: AttentionSpec, x: Inputs, p: Problem, arch: str | None, out: tuple[Tensor, Tensor], stats: Any
) -> Launch:
    c = configs.forward(arch, spec)
    group, blocks, heads, options = _forward_plan(spec, arch, c)
    keys = describe(p.key.p, c.BLOCK_N, options["BLOCK_D"]) if c.descriptors else None
    values = describe(p.value.p, c.BLOCK_N, options["BLOCK_DV"]) if c.descriptors else None
    grid, order = blocks * heads * spec.batch, None
    if spec.packed:
        order = schedule(x, c.BLOCK_M, group)
        grid = heads * min(blocks * spec.batch, triton.cdiv(x.query.shape[2] * group, c.BLOCK_M) + spec.batch)
    args = (p, view(out[0], spec.packed), row_view(out[1], spec.packed), stats, keys, values, order, blocks)
    return Launch(forward_kernels.forward_kernel, (grid,), args, options)


def _weights(spec: AttentionSpec, p: Problem, arch: str | None, weights: Tensor, stats: Any) -> Launch:
    c = configs.weights(arch, spec)
    mean = spec.weights == "mean"
    row_blocks, key_blocks = triton.cdiv(spec.rows, c.BLOCK_M), triton.cdiv(spec.columns, c.BLOCK_N)
    grid = row_blocks * key_blocks * (1 if mean else spec.heads) * spec.batch
    options = {
        "MEAN": mean,
        "BLOCK_M": c.BLOCK_M,
        "BLOCK_N": c.BLOCK_N,
        "BLOCK_D": configs.padded(spec.head_dim),
    }
    args = (p, weights_view(weights), *stats, row_blocks, key_blocks)
    options |= {"num_stages": c.stages, **compile_options(arch, c.warps)}
    return Launch(weights_kernels.weights_kernel, (grid,), args, options)
