"""New tokens into a cache, in place, and the query turned to its positions: one launch.

    position of row i = dropped + length - M + i, the new tokens counted; without `dropped` the row that it is kept in;
                        under a tree mask its depth stands in the place of i
    (a, b) = a pair of the first R dims;  (a, b) -> (a cos - b sin, b cos + a sin)       (Su et al., "RoFormer", 2021)
    scale = max|x| / limit;  stored = round(x / scale)                        limit: 127 for int8, 448 for float8 e4m3

One program per token and BLOCK_H heads: the first ones of a token write keys, the next ones values, the others turn
queries. All arithmetic is float32, rounded once, to what is stored. A token whose page does not exist or that is past
the capacity is not written; the kernel that attends gives NaN for its sequence.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...cache import LIMITS, Cache, DecodeInputs, DecodeSpec, KVCache, PagedKVCache
from ...layout import output_like, rows_contiguous
from .decode_kernels import Store, Table, place
from .launch import Launch
from .tiles import INF, View
from .tree import depth_of, tree_of


class Turn(NamedTuple):
    """The tables [L, R/2] with their row strides."""

    cos: Any
    cos_row: Any
    sin: Any
    sin_row: Any
    length: Any  # L
    R: Any  # constexpr
    INTERLEAVED: Any  # constexpr


@triton.jit
def load_rows(view, b, h, m, there, d):
    """Dims d of token m in heads h, float32 [BLOCK_H, BLOCK_D]."""
    p = view.p + b * view.b + m * view.m + (h * view.h)[:, None] + d[None, :]
    return tl.load(p, mask=there, other=0.0).to(tl.float32)


@triton.jit
def turned(view, turn, b, h, m, there, position, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """One token in heads h, 0 past DIM, turned where there are tables; float32 [BLOCK_H, BLOCK_DIM]."""
    d = tl.arange(0, BLOCK_DIM)
    x = load_rows(view, b, h, m, there[:, None] & (d < DIM)[None, :], d)
    if turn is not None:
        HALF: tl.constexpr = turn.R // 2
        if turn.INTERLEAVED:
            other, pair, first = d ^ 1, d // 2, d % 2 == 0
        else:
            other, pair, first = tl.where(d < HALF, d + HALF, d - HALF), d % HALF, d < HALF
        inside = d < turn.R
        y = load_rows(view, b, h, m, there[:, None] & inside[None, :], other)
        known = inside & (position >= 0) & (position < turn.length)
        cos = tl.load(turn.cos + position * turn.cos_row + pair, mask=known, other=float("nan"))
        sin = tl.load(turn.sin + position * turn.sin_row + pair, mask=known, other=float("nan"))
        sin = tl.where(first, -sin, sin)
        x = tl.where(inside[None, :], x * cos[None, :] + y * sin[None, :], x)
    return x


@triton.jit
def rounded(x):
    """To the nearest integer, ties to even, for |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2^23


@triton.jit
def to_e4m3(x):
    """The bits of float8 e4m3 (no infinities), |x| <= 448, nearest even; as int8."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Where e4m3 is normal: three bits of mantissa stay, and 120 is the difference of the biases.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    small = rounded(tl.abs(x) * 512.0).to(tl.int32)  # below 2^-6, in units of 2^-9
    code = tl.where(size < (121 << 23), small, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.int8)


@triton.jit
def write(cache, view, scales, x, b, h, there, n, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, LIMIT: tl.constexpr):
    """x [BLOCK_H, BLOCK_DIM], 0 past DIM, as token n of sequence b in heads h."""
    d = tl.arange(0, BLOCK_DIM)
    at = n + tl.zeros([1], tl.int64)
    keys = place(cache, b, at, (at >= 0) & (at < cache.capacity))  # [1]
    there &= keys.exists
    if scales is not None:
        scale = tl.div_rn(tl.max(tl.abs(x), 1), LIMIT)  # [BLOCK_H]
        scale = tl.where(scale == 0.0, 1.0, scale)
        broken = tl.max((tl.abs(x) < INF).to(tl.int32) ^ 1, 1) > 0  # NaN or Inf
        scale = tl.where(broken, float("nan"), scale)
        x = tl.where(broken[:, None], 0.0, tl.div_rn(x, scale[:, None] + tl.zeros_like(x)))
        x = tl.minimum(tl.maximum(x, -LIMIT), LIMIT)
        if cache.KIND == "int8":
            x = rounded(x).to(tl.int8)
        else:
            x = to_e4m3(x)
        tl.store(scales.p + keys.block * scales.b + h * scales.h + keys.row * scales.m, scale, mask=there)
    p = view.p + (keys.block * view.b + keys.row * view.m + h * view.h)[:, None] + d[None, :]
    tl.store(p, x.to(view.p.dtype.element_ty), mask=there[:, None] & (d < DIM)[None, :])


@triton.jit
def append_kernel(query, key, value, cache, out, turn, tree, rows, heads, kv_heads, BLOCK_H: tl.constexpr,
                  D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
                  LIMIT: tl.constexpr):  # fmt: skip
    """key, value: views of [B, HK, M, .] or None; query and out: views of [B, H, M, D], or None without `turn`."""
    token = tl.program_id(0).to(tl.int64)
    b, m = token // rows, token % rows
    position = tl.load(cache.lengths + b).to(tl.int64) - rows + m
    at = position  # where it is turned to; below, where it is stored
    if cache.dropped is not None:
        at += tl.load(cache.dropped + b).to(tl.int64)
    if tree is not None:
        at += depth_of(tree, b, m, m >= 0) - m
    slot = tl.program_id(1)
    kv_slots = 0
    if key is not None:
        kv_slots = tl.cdiv(kv_heads, BLOCK_H)
        h = (slot % kv_slots * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)  # [BLOCK_H]
        there = h < kv_heads
        if slot < kv_slots:
            x = turned(key, turn, b, h, m, there, at, D, BLOCK_D)
            write(cache, cache.key, cache.key_scale, x, b, h, there, position, D, BLOCK_D, LIMIT)
        elif slot < 2 * kv_slots:
            x = turned(value, None, b, h, m, there, at, DV, BLOCK_DV)
            write(cache, cache.value, cache.value_scale, x, b, h, there, position, DV, BLOCK_DV, LIMIT)
    if turn is not None:
        if slot >= 2 * kv_slots:
            h = ((slot - 2 * kv_slots) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
            d = tl.arange(0, BLOCK_D)
            x = turned(query, turn, b, h, m, h < heads, at, D, BLOCK_D)
            p = out.p + b * out.b + m * out.m + (h * out.h)[:, None] + d[None, :]
            tl.store(p, x.to(out.p.dtype.element_ty), mask=(h < heads)[:, None] & (d < D)[None, :])


def converts_e4m3(arch: str | None) -> bool:
    """Whether the chip has an instruction from float8 e4m3, two numbers at a time; elsewhere five for each number."""
    return arch is not None and arch.startswith("sm_") and int(arch[3:]) >= 89


@functools.lru_cache(maxsize=1024)
def _store_constants(page_size: int | None, kv_dtype: torch.dtype, arch: str | None) -> dict[str, Any]:
    kinds = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3"}
    return {
        "PAGE": tl.constexpr(page_size or 0),
        "KIND": tl.constexpr(kinds.get(kv_dtype, "float")),
        "NATIVE": tl.constexpr(converts_e4m3(arch)),
    }


def _view(t: Tensor | None) -> View | None:
    """A tensor [., ., ., D] or, of scales, [., ., .]."""
    return None if t is None else View(t, *t.stride()[:3])


def _codes(t: Tensor) -> View:
    """K or V of a cache; float8 as the bits that it consists of."""
    return View(t.view(torch.int8) if t.dtype == torch.float8_e4m3fn else t, *t.stride()[:3])


def store_of(spec: DecodeSpec, cache: Cache, arch: str | None) -> Store:
    """A cache as the kernels see it."""
    table = None
    if isinstance(cache, PagedKVCache):
        block_table = rows_contiguous(cache.block_table)
        table = Table(block_table, block_table.stride(0), cache.num_pages)
    return Store(
        key=_codes(cache.key),
        value=_codes(cache.value),
        key_scale=_view(cache.key_scale),
        value_scale=_view(cache.value_scale),
        table=table,
        lengths=cache.lengths,
        dropped=cache.dropped if isinstance(cache, KVCache) else None,
        capacity=spec.capacity,
        **_store_constants(spec.page_size, spec.kv_dtype, arch),
    )


class Plan(NamedTuple):
    """What the append of one spec is launched with."""

    grid: tuple[int, int]
    options: dict[str, Any]
    turn: dict[str, Any]  # members of a `Turn`


@functools.lru_cache(maxsize=1024)
def _plan(spec: DecodeSpec) -> Plan:
    block = min(8, triton.next_power_of_2(spec.heads if spec.rotary_dim else spec.kv_heads))
    slots = 2 * triton.cdiv(spec.kv_heads, block) if spec.appends else 0
    if spec.rotary_dim:
        slots += triton.cdiv(spec.heads, block)
    width, value_width = triton.next_power_of_2(spec.head_dim), triton.next_power_of_2(spec.value_dim)
    options = {
        "BLOCK_H": block,
        "D": spec.head_dim,
        "DV": spec.value_dim,
        "BLOCK_D": width,
        "BLOCK_DV": value_width,
        "LIMIT": LIMITS.get(spec.kv_dtype, 0.0),
        "num_warps": min(4, max(1, block * max(width, value_width) // 512)),  # 16 numbers a thread
    }
    turn = {"R": tl.constexpr(spec.rotary_dim), "INTERLEAVED": tl.constexpr(spec.interleaved)}
    return Plan((spec.batch * spec.rows, slots), options, turn)


def append_launches(spec: DecodeSpec, x: DecodeInputs, store: Store) -> tuple[list[Launch], Tensor]:
    """The launch that writes x.key and x.value as the last M of each sequence's tokens, and the query that attends.

    The store's lengths count the new tokens already.
    """
    plan, query = _plan(spec), x.query
    source = out = turn = None
    if spec.rotary_dim:
        assert x.cos is not None and x.sin is not None
        cos, sin = rows_contiguous(x.cos), rows_contiguous(x.sin)
        turn = Turn(cos, cos.stride(0), sin, sin.stride(0), cos.shape[0], **plan.turn)
        query = output_like(x.query, spec.batch, spec.head_dim)
        source, out = _view(rows_contiguous(x.query)), _view(query)
    if 0 in plan.grid:
        return [], query
    new = (None if t is None else _view(rows_contiguous(t)) for t in (x.key, x.value))
    tree = tree_of(x.tree_mask) if spec.rotary_dim else None
    args = (source, *new, store, out, turn, tree, spec.rows, spec.heads, spec.kv_heads)
    return [Launch(append_kernel, plan.grid, args, plan.options)], query
