"""What the functions of context parallelism check alike, and the call that they make of their arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ..functional import any_autocast, autocast
from ..spec import (
    Causal,
    Inputs,
    Options,
    Window,
    as_offsets,
    check_packed,
    make_spec,
    need_tensor,
    shape_of,
    window_sides,
)
from .blocks import Problem
from .sharding import Layout, Ranks, bad, check_layout, check_local_length, ranks_of


class Call(NamedTuple):
    """The arguments beside the tensors, as they were given."""

    group: Any
    layout: Layout
    cu_seqlens: Tensor | None
    causal: Causal | None
    window: Window | None
    softcap: float | None
    scale: float | None


def refuse(function: str, given: Mapping[str, Any], reasons: Mapping[str, str]) -> None:
    """Options that `attention` has and `function` has not; reasons: why, by name."""
    for name, value in given.items():
        if name not in reasons:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
        if isinstance(value, Tensor) or value not in (None, 0):
            was = "a Tensor" if isinstance(value, Tensor) else repr(value)
            raise bad(name, was, f"none in {function}: {reasons[name]}")


def gather(
    function: str,
    call: Call,
    tensors: tuple[Any, Any, Any, Any],
    given: Mapping[str, Any],
    reasons: Mapping[str, str],
) -> tuple[Inputs, Ranks, Problem]:
    """Check one call on this rank's shards.

    tensors: query, key, value and sinks. given, reasons: as in `refuse`.

    Returns the tensors after autocast and in kernel layout, dense [B, H, S / W, D] or packed [1, H, T / W, D], the
    ranks, and the problem.
    """
    refuse(function, given, reasons)
    check_layout(call.layout)
    ranks = ranks_of(call.group)
    if any_autocast():
        tensors = autocast(*tensors)
    query, key, value, sinks = tensors
    if call.cu_seqlens is not None:
        check_packed(query, key, value)
        query, key, value = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
    left, right = window_sides(call.window)
    options = Options(call.causal, left, right, call.softcap, call.scale)
    x = Inputs(query, key, value, sinks=sinks)
    spec = make_spec(x, options)
    if spec.transform:
        raise bad("query", f"a tensor in {spec.transform}", "one outside of transforms")
    starts = None
    if call.cu_seqlens is not None:
        starts = _starts(call.cu_seqlens, ranks.world * query.shape[2])
    problem = Problem(ranks.world, call.layout, query.shape[2], call.causal is not None, left, right, starts)
    if problem.positional:
        if key.shape[2] != query.shape[2]:
            raise bad("key", f"length {key.shape[2]} in {shape_of(key)}", f"query's {query.shape[2]}: positions count")
        check_local_length("query", query.shape[2], call.layout, ranks.world)
    return x, ranks, problem


def _starts(cu_seqlens: Tensor, total: int) -> tuple[int, ...]:
    need_tensor("cu_seqlens", cu_seqlens, optional=False)
    offsets = as_offsets("cu_seqlens", cu_seqlens)
    assert offsets is not None
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise bad("cu_seqlens", f"shape {shape_of(offsets)}", "[B + 1]")
    starts = tuple(offsets.tolist())
    falls = any(b < a for a, b in zip(starts, starts[1:], strict=False))
    if starts[0] != 0 or starts[-1] != total or falls:
        raise bad("cu_seqlens", list(starts), f"offsets that never fall, from 0 to the {total} tokens of all ranks")
    return starts
