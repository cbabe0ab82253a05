"""From a decoding call to launches: append, attend in splits, combine. The kernels are in files of their own."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton.language as tl

from ...cache import Cache, DecodeInputs, DecodeSpec
from ...layout import output_like, rows_contiguous
from ...spec import Device, Outputs
from . import supports
from .append import append_launches, store_of
from .configs import padded
from .decode_kernels import Partial, Problem, Store, combine_kernel, decode_kernel
from .launch import Launch, run
from .tiles import View
from .tree import tree_of

LEAST_KEYS = 256  # of a split: below, the partial results weigh as much as the keys read
FIXED_KEYS = 512  # of a split whose number follows from the capacity alone; 8k keys on 8 heads then fill 128 SMs
MOST_SPLITS = 128
PROGRAMS = 2  # a multiprocessor: two hide each other's latencies, more than the shared memory of the stages allows


class Config(NamedTuple):
    """How the decode kernel is compiled."""

    BLOCK_M: int
    BLOCK_N: int
    warps: int
    stages: int
    chunk: int | None = None  # dims of a product of q and k at a time; None: all
    registers: int | None = None  # of a thread that the compiler may use; None: as it sees fit


class Plan(NamedTuple):
    """What the launches of one spec on one chip have in common."""

    grid: tuple[int, int]
    splits: int
    options: dict[str, Any]  # of the decode kernel
    combine: dict[str, Any]  # of the combine kernel
    constants: dict[str, Any]  # members of a `Problem`


def decode_config(arch: str | None, spec: DecodeSpec, precision: str | None) -> Config:
    """Tile sizes of the decode kernel. They do not follow the batch, which no row's result may depend on."""
    width, value_width = padded(spec.head_dim), padded(spec.value_dim)
    exact = precision == "ieee"
    amd = arch is not None and arch.startswith("gfx")
    # The matrix unit takes at least 16 rows. Fused multiply-adds, which take its place for IEEE float32, leave
    # registers for no more; nor do a wide accumulator and wide codes. wgmma takes 64 rows and leaves room for them.
    if exact or value_width > 256 or (spec.quantised and value_width > 128):
        most = 16
    elif arch == "sm_90" and max(width, value_width) <= 128 and not spec.quantised:
        most = 64
    else:
        most = 32
    block_m = min(most, padded(spec.rows * spec.group))
    if arch is None:
        return Config(block_m, 64, 4, 1, 16)  # the wider ones piece by piece, as on a chip
    # 16k numbers a stage, 32 KiB in half precision: two stages on their way in each of two programs are four times what
    # hides the latency of a multiprocessor's share of the memory bandwidth. Codes take as many registers when widened.
    block_n = 32768 // ((width + value_width) * max(spec.kv_dtype.itemsize, 2))
    # The mask of a tree is read score by score: half of the keys leave registers for where they are read.
    block_n = max(16, min(32 if spec.tree else 64, 1 << (block_n.bit_length() - 1)))
    wide = width + value_width > 512
    if amd:  # four waves have 512 registers each, eight would have 256; 64 KiB hold no more than one stage in advance
        return Config(block_m, block_n, 4, 2, 128 if wide and exact else None)
    # Pages are found by one more load, which takes a stage of its own in front of each other one.
    stages, warps = 5 if spec.page_size else 3, 8 if wide else 4
    if exact:  # both operands of a fused multiply-add stand in registers: 32 dims at a time
        return Config(block_m, min(block_n, 32), warps, stages, 32)
    if wide and spec.dtype == torch.float32:
        return Config(block_m, 16, warps, stages, 128)
    # A query of 512 dims would take half of the registers.
    chunk = 256 if wide else None
    if not spec.quantised:
        return Config(block_m, 32 if wide else block_n, warps, stages, chunk)
    # Left to itself, ptxas spills two or three registers for the sake of a third program that is not needed.
    return Config(block_m, 32 if wide or block_m > 16 else block_n, warps, stages, chunk, 255)


def decode_splits(
    processors: int, batch: int, kv_heads: int, row_tiles: int, keys: int, batch_invariant: bool = False
) -> int:
    """Into how many parts the keys are split.

    keys: as many as a row can see (the capacity, or less in a window). The smallest number that fills the last wave of
    programs nearly as well as any does; with batch_invariant a number that follows from `keys` alone. Where the parts
    begin follows from each sequence's own length.
    """
    most = max(1, min(MOST_SPLITS, keys // LEAST_KEYS))
    if batch_invariant:
        return max(1, min(MOST_SPLITS, keys // FIXED_KEYS))
    programs, slots = batch * kv_heads * row_tiles, PROGRAMS * processors

    def filled(splits: int) -> float:
        return programs * splits / (-(-programs * splits // slots) * slots)

    enough = 0.85 * max(map(filled, range(1, most + 1)))
    return next(n for n in range(1, most + 1) if filled(n) >= enough)


def supports_decode(spec: DecodeSpec, device: Device) -> str | None:
    """None if these kernels run `spec` on `device`, otherwise the reason why not."""
    return supports(spec.attention(spec.capacity, spec.dtype), device)


@functools.lru_cache(maxsize=16)
def _processors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _precision(dtype: torch.dtype) -> str | None:
    """How products of float32 are taken: as `torch.set_float32_matmul_precision` says."""
    if dtype != torch.float32:
        return None
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@functools.lru_cache(maxsize=1024)
def _plan(spec: DecodeSpec, arch: str | None, processors: int, precision: str | None) -> Plan:
    c = decode_config(arch, spec, precision)
    left = spec.window[0] if spec.window else None
    keys = spec.capacity if left is None else min(spec.capacity, left + spec.rows)
    tiles = -(-spec.rows * spec.group // c.BLOCK_M)
    splits = decode_splits(processors, spec.batch, spec.kv_heads, tiles, keys, spec.batch_invariant)
    width, value_width = padded(spec.head_dim), padded(spec.value_dim)
    options: dict[str, Any] = {
        "BLOCK_M": c.BLOCK_M,
        "BLOCK_N": c.BLOCK_N,
        "BLOCK_D": width,
        "BLOCK_DV": value_width,
        "CHUNK": c.chunk or width,
        "STAGES": c.stages,
        "num_warps": c.warps,
    }
    if c.registers:
        options["maxnreg"] = c.registers
    # 16 splits x 128 dims are 16 numbers a thread.
    combine = {"BLOCK_S": 16, "BLOCK_DV": value_width, "num_warps": 4}
    constants = {
        "rows": spec.rows,
        "group": spec.group,
        "heads": spec.heads,
        "batch": spec.batch,
        "scale": spec.scale,
        "softcap": spec.softcap,
        "left": None if left is None else min(left, spec.capacity),
        "D": tl.constexpr(spec.head_dim),
        "DV": tl.constexpr(spec.value_dim),
        "EXACT": tl.constexpr(spec.dtype == torch.float32),
        "PRECISION": tl.constexpr(precision),
    }
    return Plan((spec.batch * spec.kv_heads * tiles, splits), splits, options, combine, constants)


def decode_launches(
    spec: DecodeSpec, x: DecodeInputs, store: Store, arch: str | None, processors: int
) -> tuple[list[Launch], Outputs]:
    """The launches by which x.query, already turned, attends to the cache, and the tensors that they fill.

    One split writes its result itself; several leave partial results that a second launch combines.
    """
    query = rows_contiguous(x.query)
    output = output_like(x.query, spec.batch, spec.value_dim)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    out = Outputs(output, lse, None)
    if not lse.numel():
        return [], out
    plan = _plan(spec, arch, processors, _precision(spec.dtype))
    slopes = partial = None
    if x.alibi_slopes is not None:
        t = x.alibi_slopes
        slopes = View(t, 0 if t.shape[0] == 1 else t.stride(0), t.stride(1), 0)
    problem = Problem(
        query=View(query, *query.stride()[:3]),
        slopes=slopes,
        sinks=None if x.sinks is None else x.sinks.contiguous(),
        tree=tree_of(x.tree_mask),
        **plan.constants,
    )
    if plan.splits > 1:
        shape = (*query.shape[:3], plan.splits)
        partial = Partial(lse.new_empty(*shape, spec.value_dim), lse.new_empty(*shape, 2))
    args = (problem, store, View(output, *output.stride()[:3]), lse, partial, plan.splits)
    launches = [Launch(decode_kernel, plan.grid, args, plan.options)]
    if partial is not None:
        launches.append(Launch(combine_kernel, (lse.numel(),), args, plan.combine))
    return launches, out


def launches(
    spec: DecodeSpec, cache: Cache, x: DecodeInputs, arch: str | None, processors: int
) -> tuple[list[Launch], Outputs]:
    """One step of decoding: `cache.lengths` is counted up here, the rest is done by the launches that are returned."""
    store = store_of(spec, cache, arch)
    first, query = append_launches(spec, x, store)
    if spec.appends:
        cache.lengths.add_(spec.rows)
    more, out = decode_launches(spec, x._replace(query=query), store, arch, processors)
    return first + more, out


def forward(spec: DecodeSpec, cache: Cache, x: DecodeInputs) -> Outputs:
    """Append the new tokens in place, then let the query attend; nothing waits for the device."""
    processors = _processors(x.query.device.index) if x.query.is_cuda else 1
    todo, out = launches(spec, cache, x, Device.of(x.query).arch, processors)
    run(todo, x.query)
    return out
