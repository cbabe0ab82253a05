"""Ring attention (Liu et al., "Ring Attention with Blockwise Transformers", 2023): exact attention over a sequence that
is spread over W ranks. Rows stay where they are, keys and values go round.

    forward    step s: rank r computes (output_s, lse_s) of its rows and the keys of rank r - s;
               output = sum_s exp(lse_s - lse) output_s,   lse = log sum_s exp(lse_s)
    backward   the same round; with the output and lse of all keys each step gives its part of dQ, dK and dV:
               P = exp(S - lse),  dS = P (dP - delta);  dK and dV travel behind their keys and come home at the end

The next keys are on their way while a step computes. Sums over steps are float32 (float64 for float64), and so are the
dK and dV that travel. Layout: local rows and keys [B, H or HK, S / W, D], packed sequences [1, H or HK, T / W, D].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..dispatch import BACKENDS, select
from ..functional import AttentionResult
from ..layout import output_like
from ..spec import AttentionSpec, Causal, Device, Inputs, Options, Outputs, Window, make_spec
from ..tracing import uncompiled
from .blocks import Block, Problem, Span, blocks, steps
from .call import Call, gather
from .sharding import Layout, Ranks

_ELSEWHERE = "`ulysses_attention` takes it"
UNSUPPORTED = {
    "mask": "it would have as many elements as the scores that ring attention never holds",
    "bias": "it would have as many elements as the scores that ring attention never holds",
    "alibi_slopes": f"its distances reach across ranks; {_ELSEWHERE}",
    "key_lengths": f"pack the sequences and give cu_seqlens, or {_ELSEWHERE}",
    "dropout_p": "a rank does not draw the dropout mask that one process would",
    "return_weights": "no rank sees all keys of a row",
}


class Step(NamedTuple):
    """One call of a backend: some of the rows and some of the keys of one rank."""

    block: Block
    spec: AttentionSpec
    backend: str


class Ring(NamedTuple):
    """One call of ring attention: per step the calls of backends. Chosen before anything is sent, or a call that one
    rank refuses would leave the others waiting."""

    ranks: Ranks
    steps: list[list[Step]]


# --- what travels ---------------------------------------------------------------------------------------------------


class _Transfer:
    """Tensors on their way to the rank `distance` places ahead, and those that come from as many places behind."""

    def __init__(self, ranks: Ranks, tensors: Sequence[Tensor], distance: int) -> None:
        ahead, behind = ((ranks.rank + d) % ranks.world for d in (distance, -distance))
        self.sent = [t.contiguous() for t in tensors]  # kept until they are there
        self.arriving = [torch.empty_like(t) for t in self.sent]
        peer = [dist.get_global_rank(ranks.group, r) for r in (ahead, behind)]
        ops = [dist.P2POp(dist.isend, t, peer[0], ranks.group) for t in self.sent]
        ops += [dist.P2POp(dist.irecv, t, peer[1], ranks.group) for t in self.arriving]
        self.works = dist.batch_isend_irecv(ops)

    def wait(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        return self.arriving


def _round(ring: Ring, key: Tensor, value: Tensor) -> Iterator[tuple[list[Step], Tensor, Tensor]]:
    """Keys and values of one rank after the other, this one's first; the next are sent for before these are used."""
    for number, step in enumerate(ring.steps, 1):
        transfer = _Transfer(ring.ranks, (key, value), 1) if number < len(ring.steps) else None
        yield step, key, value
        if transfer is not None:
            key, value = transfer.wait()


# --- one block ------------------------------------------------------------------------------------------------------


def _rows(t: Tensor, span: Span | None) -> Tensor:
    """A span of dimension 2, as a view."""
    return t if span is None else t[:, :, span[0] : span[1]]


def _inputs(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
    starts = None if block.starts is None else torch.tensor(block.starts, device=q.device)
    q, k, v = _rows(q, block.rows), _rows(k, block.keys), _rows(v, block.keys)
    return Inputs(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts)


def _plan(ranks: Ranks, problem: Problem, x: Inputs, softcap: float | None, scale: float | None) -> Ring:
    """x: this rank's tensors, as large as those of any other. The spec names the gradients that are wanted."""
    names = frozenset(n for n in ("query", "key", "value") if torch.is_grad_enabled() and getattr(x, n).requires_grad)
    found: list[list[Step]] = []
    for number in range(steps(problem)):
        found.append([])
        for block in blocks(problem, ranks.rank, (ranks.rank - number) % ranks.world):
            if x.sinks is not None:  # they join the sum as if they were keys elsewhere
                block = replace(block, part=True)
            longest = None
            if block.starts is not None:
                longest = max(b - a for a, b in zip(block.starts, block.starts[1:], strict=False))
            causal: Causal | None = "top_left" if block.causal else None
            sides = (block.left, block.right)
            o = Options(causal, *sides, softcap, scale, max_seqlen_q=longest, max_seqlen_k=longest)
            spec = replace(make_spec(_inputs(block, *x[:3]), o), gradients=names, part_of_keys=block.part)
            found[-1].append(Step(block, spec, select(spec, Device.of(x.query)).backend))
    return Ring(ranks, found)


class _Sum:
    """The outputs of blocks of keys, each weighted by its share of the softmax. top: -inf where no key was seen yet."""

    def __init__(self, query: Tensor, value_dim: int, dtype: torch.dtype) -> None:
        shape = query.shape[:3]
        self.weighted = query.new_zeros(*shape, value_dim, dtype=dtype)
        self.total = query.new_zeros(shape, dtype=dtype)
        self.top = query.new_full(shape, float("-inf"), dtype=dtype)

    def add(self, span: Span | None, output: Tensor | None, lse: Tensor) -> None:
        """output None: zeros, as a sink's."""
        weighted, total, top = (_rows(t, span) for t in (self.weighted, self.total, self.top))
        largest = torch.maximum(top, lse)
        shift = largest.masked_fill(largest == float("-inf"), 0.0)
        old, new = torch.exp(top - shift), torch.exp(lse - shift)
        weighted.mul_(old[..., None])
        if output is not None:
            weighted.addcmul_(output.to(weighted.dtype), new[..., None])
        total.mul_(old).add_(new)
        top.copy_(largest)

    def result(self, query: Tensor) -> Outputs:
        """The output in the query's dtype and order of dimensions, and lse."""
        dead = self.total == 0
        output = output_like(query, query.shape[0], self.weighted.shape[3])
        output.copy_(self.weighted / self.total.masked_fill(dead, 1.0)[..., None])
        return Outputs(output, self.top.masked_fill(dead, 0.0) + torch.log(self.total), None)


# --- forward and backward -------------------------------------------------------------------------------------------


def _forward(ring: Ring, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Outputs:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    found = _Sum(q, v.shape[3], dtype)
    for calls, key, value in _round(ring, k, v):
        for block, spec, backend in calls:
            out = BACKENDS[backend].forward(spec, _inputs(block, q, key, value))
            found.add(block.rows, out.output, out.lse)
    if sinks is not None:  # a row that sees no key has none of its sink either
        logits = sinks.to(dtype)[None, :, None].expand(q.shape[:3])
        found.add(None, None, logits.masked_fill(found.top == float("-inf"), float("-inf")))
    return found.result(q)


class _Gradients(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor

    @classmethod
    def zeros(cls, dtype: torch.dtype, *tensors: Tensor) -> _Gradients:
        return cls(*(torch.zeros(t.shape, dtype=dtype, device=t.device) for t in tensors))

    def add(self, block: Block, found: dict[str, Tensor]) -> None:
        for name, span in (("query", block.rows), ("key", block.keys), ("value", block.keys)):
            if name in found:
                _rows(getattr(self, name), span).add_(found[name])

    def add_keys(self, arrived: Sequence[Tensor]) -> None:
        for mine, theirs in zip(self[1:], arrived, strict=True):
            mine.add_(theirs)


def _backward(
    ring: Ring, x: Inputs, out: Outputs, dout: Tensor | None, dlse: Tensor | None, names: frozenset[str]
) -> _Gradients:
    """The gradients of query, key and value among `names`, in the dtype of lse."""
    count, dtype = len(ring.steps), out.lse.dtype
    total = _Gradients.zeros(dtype, *x[:3])
    transfer: _Transfer | None = None
    for number, (calls, key, value) in enumerate(_round(ring, x.key, x.value)):
        # What is found for the keys of others leaves with them.
        here = total if number == 0 else _Gradients(total.query, *_Gradients.zeros(dtype, key, key, value)[1:])
        for block, spec, backend in calls:
            rows = Outputs(_rows(out.output, block.rows), _rows(out.lse, block.rows), None)
            incoming = [None if g is None else _rows(g, block.rows) for g in (dout, dlse)]
            inputs, spec = _inputs(block, x.query, key, value), replace(spec, gradients=names)
            here.add(block, BACKENDS[backend].backward(spec, inputs, rows, (incoming[0], incoming[1], None)))
        if number == 0 or not names & {"key", "value"}:
            continue
        if transfer is not None:  # from the rank behind, which had these keys before
            here.add_keys(transfer.wait())
        transfer = _Transfer(ring.ranks, here[1:], 1 if number + 1 < count else -number)
    if transfer is not None:
        total.add_keys(transfer.wait())
    return total


def _sinks_gradient(sinks: Tensor, out: Outputs, dout: Tensor | None, dlse: Tensor | None) -> Tensor:
    """-sum over rows of exp(sink - lse) delta; in double, so that it is as good as its terms."""
    delta = torch.zeros_like(out.lse, dtype=torch.float64)
    if dout is not None:
        delta += (dout.double() * out.output).sum(-1)
    if dlse is not None:
        delta -= dlse
    alive = out.lse > float("-inf")
    weight = torch.exp(sinks.double()[None, :, None] - out.lse.masked_fill(~alive, 0.0))
    return -(weight * delta).masked_fill(~alive, 0.0).sum((0, 2)).to(sinks.dtype)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ring: Ring, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Any:
        needs = zip(("query", "key", "value", "sinks"), ctx.needs_input_grad[1:], strict=True)
        ctx.ring, ctx.names = ring, frozenset(name for name, need in needs if need)
        out = _forward(ring, q, k, v, sinks)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, sinks, out.output, out.lse)
        return out.output, out.lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        q, k, v, sinks, output, lse = ctx.saved_tensors
        out, names = Outputs(output, lse, None), ctx.names
        if dlse is not None:
            dlse = dlse.masked_fill(lse == float("-inf"), 0.0)
        found: dict[str, Tensor] = {}
        if names - {"sinks"}:  # on every rank alike, or they would wait for each other
            total = _backward(ctx.ring, Inputs(q, k, v), out, dout, dlse, names - {"sinks"})
            for name, t in (("query", q), ("key", k), ("value", v)):
                if name in names:
                    found[name] = getattr(total, name).to(t.dtype)
        if "sinks" in names:
            found["sinks"] = _sinks_gradient(sinks, out, dout, dlse)
        return (None, *(found.get(name) for name in ("query", "key", "value", "sinks")))


# --- the public function --------------------------------------------------------------------------------------------


@uncompiled
def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: Any = None,
    layout: Layout = "zigzag",
    cu_seqlens: Tensor | None = None,
    causal: Causal | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    **unsupported: Any,
) -> Tensor | AttentionResult:
    """`attention` of a sequence that is spread over the ranks of a process group; keys and values go round the ring.

    Every rank calls it at the same time with shards of the same length, dtype and need for gradients, and gets the
    output of its own rows. Any number of heads; a rank holds the keys of two ranks at a time. Each rank sends its keys
    and values W - 1 times forward, and as often backward together with their float32 gradients. Gradients of `sinks`
    are those from the local rows, as a parameter's are in data parallelism: sum them over the group. Second
    derivatives raise, and under torch.compile the call is a break in the graph.

    Args:
        query: [B, H, S / W, D], this rank's shard (`shard_sequence`); with cu_seqlens [T / W, H, D].
        key: [B, HK, N / W, D]; N may differ from S where nothing depends on positions. With cu_seqlens [T / W, HK, D].
        value: [B, HK, N / W, DV]; with cu_seqlens [T / W, HK, DV].
        group: a `torch.distributed.ProcessGroup`; None: all processes.
        layout: how the sequence is sharded, as given to `shard_sequence`.
        cu_seqlens: [B + 1] integers, where each sequence starts in the whole packed sequence, from 0 to T; the same on
            all ranks. Its values are read on the host. Alignments count within each sequence.
        causal, window, softcap, scale, sinks, return_lse: as in `attention`. The two alignments are one here.

    Returns:
        The output [B, H, S / W, DV] ([T / W, H, DV]), or an `AttentionResult` with lse [B, H, S / W] ([H, T / W]).

    Raises:
        ArgumentError: (a ValueError) a shape, dtype, device or value is wrong, there is no process group, or an option
            of `attention` is given that ring attention does not have.
        TypeError: an argument has the wrong type or name.
        BackendError: the backend named by `use_backend` does not support the call.
    """
    call = Call(group, layout, cu_seqlens, causal, window, softcap, scale)
    x, ranks, problem = gather("ring_attention", call, (query, key, value, sinks), unsupported, UNSUPPORTED)
    ring = _plan(ranks, problem, x, softcap, scale)
    output, lse = _RingAttention.apply(ring, x.query, x.key, x.value, x.sinks)
    if cu_seqlens is not None:
        output, lse = output.squeeze(0).transpose(0, 1), lse.squeeze(0)
    return AttentionResult(output, lse, None) if return_lse else output
