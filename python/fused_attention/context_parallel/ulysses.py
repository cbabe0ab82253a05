"""Ulysses (Jacobs et al., "DeepSpeed Ulysses", 2023): each rank exchanges its part of the sequence, with all heads, for
the whole sequence with its part of the heads, attends, and exchanges back.

    [B, H, S / W, D]    all to all   ->   [B, H / W, S, D]    attention   ->   [B, H / W, S, DV]
    [B, H / W, S, DV]   all to all   ->   [B, H, S / W, DV]

Rank r has the query heads r H / W and on, and the key/value heads r HK / W and on, which are those that they read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..functional import AttentionResult, attention, varlen_attention
from ..spec import ArgumentError, Causal, Inputs, Window, check_vector
from ..tracing import uncompiled
from .call import Call, gather
from .sharding import Layout, Ranks, bad, in_order, in_shards

UNSUPPORTED = {
    "mask": "hide by causal, window, key_lengths or cu_seqlens",
    "bias": "add alibi_slopes, or attend to the whole sequence on each rank",
    "dropout_p": "a rank does not draw the dropout mask that one process would: it counts other heads",
    "return_weights": "no rank holds the rows of all heads",
}


class _Exchange(NamedTuple):
    """to_heads: from a part of the sequence to a part of the heads; else back."""

    ranks: Ranks
    layout: Layout
    to_heads: bool

    def run(self, t: Tensor) -> Tensor:
        """[B, H, S / W, ...] -> [B, H / W, S, ...], or the other way round."""
        world, layout = self.ranks.world, self.layout
        if self.to_heads:
            parts = t.unflatten(1, (world, t.shape[1] // world)).movedim(1, 0)  # [W, B, H / W, S / W, ...]
            arrived = self._all_to_all(parts)  # of each rank its part of the sequence
            return in_order(arrived.movedim(3, 1), layout).movedim(0, 2)
        parts = in_shards(t.movedim(2, 0), world, layout).movedim(1, 3)  # [W, B, H / W, S / W, ...]
        return self._all_to_all(parts).movedim(0, 1).flatten(1, 2)  # of each rank its part of the heads

    def _all_to_all(self, parts: Tensor) -> Tensor:
        parts = parts.contiguous()
        arrived = torch.empty_like(parts)
        dist.all_to_all_single(arrived, parts, group=self.ranks.group)
        return arrived


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, t: Tensor) -> Tensor:
        ctx.exchange = exchange
        return exchange.run(t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        back = ctx.exchange._replace(to_heads=not ctx.exchange.to_heads)
        return None, _AllToAll.apply(back, grad)


def _check_heads(ranks: Ranks, query: Tensor, key: Tensor) -> None:
    for name, t in (("query", query), ("key", key)):
        if t.shape[1] % ranks.world:
            raise bad(name, f"{t.shape[1]} heads", f"a multiple of the {ranks.world} ranks, or `ring_attention`")


def _own_heads(ranks: Ranks, t: Tensor | None) -> Tensor | None:
    """This rank's share of the last dimension."""
    if t is None:
        return None
    share = t.shape[-1] // ranks.world
    return t[..., ranks.rank * share : (ranks.rank + 1) * share]


def _slopes(alibi_slopes: Tensor | None, like: Inputs, sequences: int) -> Tensor | None:
    if alibi_slopes is None or not isinstance(alibi_slopes, Tensor):
        return alibi_slopes  # what is no tensor is refused where it is used
    slopes = alibi_slopes[None] if alibi_slopes.dim() == 1 else alibi_slopes
    heads = like.query.shape[1]
    check_vector("alibi_slopes", slopes, like, ((sequences, heads), (1, heads)))
    return slopes


@uncompiled
def ulysses_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: Any = None,
    layout: Layout = "zigzag",
    cu_seqlens: Tensor | None = None,
    key_lengths: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    causal: Causal | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    **unsupported: Any,
) -> Tensor | AttentionResult:
    """`attention` of a sequence that is spread over the ranks of a process group, by exchanging it for the heads.

    Every rank calls it at the same time with shards of the same length and dtype. Each rank sends (W - 1) / W of its
    query, key, value and output, and as much backward. Gradients of `sinks` are those of this rank's heads, zero
    elsewhere: sum them over the group. Under torch.compile the call is a break in the graph.

    Args:
        query: [B, H, S / W, D], this rank's shard (`shard_sequence`); H is a multiple of W. With cu_seqlens
            [T / W, H, D].
        key: [B, HK, N / W, D]; HK is a multiple of W. With cu_seqlens [T / W, HK, D].
        value: [B, HK, N / W, DV]; with cu_seqlens [T / W, HK, DV].
        group: a `torch.distributed.ProcessGroup`; None: all processes.
        layout: how the sequence is sharded, as given to `shard_sequence`.
        cu_seqlens: [B + 1] integers, where each sequence starts in the whole packed sequence, from 0 to T; the same on
            all ranks. Its values are read on the host. Not beside key_lengths.
        key_lengths, alibi_slopes, sinks: as in `attention`, for the whole sequence and all heads.
        causal, window, softcap, scale, return_lse: as in `attention`.

    Returns:
        The output [B, H, S / W, DV] ([T / W, H, DV]), or an `AttentionResult` with lse [B, H, S / W] ([H, T / W]).

    Raises:
        ArgumentError: (a ValueError) a shape, dtype, device or value is wrong, the heads cannot be divided among the
            ranks, there is no process group, or an option of `attention` is given that this function does not have.
        TypeError: an argument has the wrong type or name.
        BackendError: the backend named by `use_backend` does not support the call.
    """
    call = Call(group, layout, cu_seqlens, causal, window, softcap, scale)
    given = (query, key, value, sinks)
    x, ranks, problem = gather("ulysses_attention", call, given, unsupported, UNSUPPORTED)
    _check_heads(ranks, x.query, x.key)
    sequences = x.query.shape[0] if problem.starts is None else len(problem.starts) - 1
    slopes = _slopes(alibi_slopes, x, sequences)
    if problem.starts is not None and key_lengths is not None:
        raise ArgumentError("key_lengths: got a value, expected None beside cu_seqlens")
    options: dict[str, Any] = {"causal": causal, "window": window, "softcap": softcap, "scale": scale}
    options |= {
        "alibi_slopes": _own_heads(ranks, slopes),
        "sinks": _own_heads(ranks, x.sinks),
        "return_lse": return_lse,
    }
    there, back = _Exchange(ranks, layout, True), _Exchange(ranks, layout, False)
    exchanged = [_AllToAll.apply(there, t) for t in x[:3]]
    if problem.starts is None:
        output, lse = _pair(attention(*exchanged, key_lengths=key_lengths, **options))
    else:
        starts = torch.tensor(problem.starts, device=x.query.device)
        q, k, v = (t.squeeze(0).transpose(0, 1) for t in exchanged)
        output, lse = _pair(varlen_attention(q, k, v, starts, starts, **options))
        output, lse = output.transpose(0, 1)[None], None if lse is None else lse[None]
    output = _AllToAll.apply(back, output)
    lse = None if lse is None else _AllToAll.apply(back, lse)
    if problem.starts is not None:
        output, lse = output.squeeze(0).transpose(0, 1), None if lse is None else lse.squeeze(0)
    return AttentionResult(output, lse, None) if return_lse else output


def _pair(result: Tensor | AttentionResult) -> tuple[Tensor, Tensor | None]:
    return (result, None) if isinstance(result, Tensor) else (result.output, result.lse)
