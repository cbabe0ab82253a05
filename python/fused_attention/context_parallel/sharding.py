"""Which tokens of a sequence a rank holds, and how they are cut out and put together again.

contiguous: rank r of W holds part r of W
zigzag:     rank r of W holds parts r and 2 W - 1 - r of 2 W, so that under a causal mask all ranks have the same work
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..spec import ArgumentError, need_tensor, shape_of

Layout = Literal["zigzag", "contiguous"]
LAYOUTS = ("zigzag", "contiguous")


def bad(name: str, was: object, expected: str) -> ArgumentError:
    return ArgumentError(f"{name}: got {was}, expected {expected}")


class Ranks(NamedTuple):
    """A process group, this process's place in it, and how many there are."""

    group: Any
    rank: int
    world: int


def ranks_of(group: Any) -> Ranks:
    """group: a `torch.distributed.ProcessGroup`; None: all processes."""
    if not (dist.is_available() and dist.is_initialized()):
        raise bad("group", "no process group", "one: call torch.distributed.init_process_group first")
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: got {type(group).__name__}, expected a torch.distributed.ProcessGroup or None")
    rank = dist.get_rank(group)
    if rank < 0:
        raise bad("group", "a group without this process", "one that this process belongs to")
    return Ranks(group, rank, dist.get_world_size(group))


def check_layout(layout: object) -> None:
    if layout not in LAYOUTS:
        raise bad("layout", repr(layout), "'zigzag' or 'contiguous'")


def parts_per_rank(layout: Layout, world: int) -> int:
    """One process alone holds its sequence in order, whatever the layout."""
    return 2 if layout == "zigzag" and world > 1 else 1


def parts_of(rank: int, world: int, layout: Layout) -> tuple[int, ...]:
    """Which parts of the sequence a rank holds, in the order in which it holds them."""
    return (rank, 2 * world - 1 - rank) if parts_per_rank(layout, world) == 2 else (rank,)


def all_parts(world: int, layout: Layout) -> list[int]:
    """The parts of all ranks, one rank after another."""
    return [part for rank in range(world) for part in parts_of(rank, world, layout)]


def check_local_length(name: str, length: int, layout: Layout, world: int) -> None:
    if length % parts_per_rank(layout, world):
        raise bad(name, f"a local length of {length}", "an even one: with layout='zigzag' a rank holds two equal parts")


def _dim(t: Tensor, dim: int) -> int:
    need_tensor("tensor", t, optional=False)
    if not -t.dim() <= dim < t.dim():
        raise bad("dim", dim, f"a dimension of a tensor of shape {shape_of(t)}")
    return dim % t.dim()


def shard_sequence(tensor: Tensor, dim: int, *, group: Any = None, layout: Layout = "zigzag") -> Tensor:
    """This rank's part of a tensor that every rank holds whole. Sends nothing; differentiable.

    Args:
        tensor: any shape; the length S of `dim` is a multiple of 2 W ("zigzag") or W ("contiguous") for W ranks.
        dim: the dimension that runs along the sequence: 2 of a query [B, H, S, D], 1 of tokens [B, S].
        group: the process group; None: all processes.
        layout: "zigzag" balances the work of causal attention; "contiguous" is the part in order.

    Returns:
        The tensor with S / W in place of S, contiguous.

    Raises:
        ArgumentError: (a ValueError) there is no process group, or S cannot be divided.
    """
    dim = _dim(tensor, dim)
    check_layout(layout)
    ranks = ranks_of(group)
    count = parts_per_rank(layout, ranks.world) * ranks.world
    if tensor.shape[dim] % count:
        raise bad("tensor", f"length {tensor.shape[dim]} in {shape_of(tensor)}", f"a multiple of {count}: pad it")
    parts = tensor.chunk(count, dim) if tensor.shape[dim] else (tensor,) * count
    return torch.cat([parts[i] for i in parts_of(ranks.rank, ranks.world, layout)], dim)


def unshard_sequence(tensor: Tensor, dim: int, *, group: Any = None, layout: Layout = "zigzag") -> Tensor:
    """The whole tensor on every rank, from the part that each holds: what `shard_sequence` cut. Has no derivative.

    Args:
        tensor: this rank's part, of one shape and dtype on all ranks.
        dim, group, layout: as given to `shard_sequence`.

    Raises:
        ArgumentError: (a ValueError) there is no process group, or the local length is odd with "zigzag".
    """
    dim = _dim(tensor, dim)
    check_layout(layout)
    ranks = ranks_of(group)
    check_local_length("tensor", tensor.shape[dim], layout, ranks.world)
    local = tensor.detach().movedim(dim, 0).contiguous()
    whole = local.new_empty(ranks.world, *local.shape)
    dist.all_gather(list(whole.unbind(0)), local, group=ranks.group)
    return in_order(whole, layout).movedim(0, dim)


def in_order(whole: Tensor, layout: Layout) -> Tensor:
    """[W, S / W, ...], the parts of all ranks, as the sequence [S, ...]."""
    world = whole.shape[0]
    count = parts_per_rank(layout, world)
    if count == 1:
        return whole.flatten(0, 1)
    parts = whole.unflatten(1, (count, whole.shape[1] // count)).flatten(0, 1)  # [2 W, S / 2 W, ...]
    return parts[_inverse(world, layout, whole.device)].flatten(0, 1)


def in_shards(sequence: Tensor, world: int, layout: Layout) -> Tensor:
    """The sequence [S, ...] as [W, S / W, ...], the parts of all ranks."""
    count = parts_per_rank(layout, world) * world
    parts = sequence.unflatten(0, (count, sequence.shape[0] // count))
    if count > world:
        parts = parts[torch.tensor(all_parts(world, layout), device=sequence.device)]
    return parts.unflatten(0, (world, count // world)).flatten(1, 2)


def _inverse(world: int, layout: Layout, device: torch.device) -> Tensor:
    return torch.tensor(all_parts(world, layout), device=device).argsort()


def sequence_positions(
    length: int, *, group: Any = None, layout: Layout = "zigzag", device: torch.device | str | None = None
) -> Tensor:
    """Where this rank's tokens stand in the sequence: [S / W] int64, for rotary and other position embeddings.

    Args:
        length: S, of the whole sequence.
        group, layout: as in `shard_sequence`.
        device: of the result.

    Raises:
        ArgumentError: (a ValueError) as `shard_sequence` does.
    """
    return shard_sequence(torch.arange(length, device=device), 0, group=group, layout=layout)
