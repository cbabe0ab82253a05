"""How a call joins torch's machinery: one `autograd.Function` for eager code, one `torch.library` op for traced code.

Both run the same backend functions. Second derivatives go through the reference's graph.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .backends import cpu, reference
from .cache import Cache, DecodeInputs, KVCache, PagedKVCache
from .dispatch import BACKENDS, select
from .layout import merge_heads, output_like, split_heads, split_joint
from .spec import DIFFERENTIABLE, ArgumentError, AttentionSpec, Device, Inputs, Options, Outputs, make_spec
from .steps import decode

# --- eager ----------------------------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: AttentionSpec, backend: str, *tensors: Tensor | None) -> Outputs:
        x = Inputs(*tensors)  # type: ignore[arg-type]
        out = BACKENDS[backend].forward(spec, x)
        ctx.spec, ctx.backend = spec, backend
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*x, out.output, out.lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        *tensors, output, lse = ctx.saved_tensors
        needs = [n for n, need in zip(Inputs._fields, ctx.needs_input_grad[2:], strict=True) if need]
        if not needs or all(g is None for g in grads):
            return (None,) * (2 + len(tensors))
        spec = ctx.spec if ctx.spec.gradients == set(needs) else replace(ctx.spec, gradients=frozenset(needs))
        if torch.is_grad_enabled():
            found = dict(
                zip(needs, _Backward.apply(spec, ctx.backend, needs, *grads, output, lse, *tensors), strict=True)
            )
        else:
            x = Inputs(*tensors)
            found = BACKENDS[ctx.backend].backward(spec, x, Outputs(output, lse, None), grads)  # type: ignore[arg-type]
        return (None, None, *(found.get(n) for n in Inputs._fields))


class _Backward(torch.autograd.Function):
    """The backward pass as a function of its own, so that it can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, spec: AttentionSpec, backend: str, needs: list[str], *tensors: Tensor | None) -> Any:
        grads, (output, lse), x = tensors[:3], tensors[3:5], Inputs(*tensors[5:])  # type: ignore[arg-type]
        ctx.spec, ctx.needs = spec, needs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*grads, *x)
        found = BACKENDS[backend].backward(spec, x, Outputs(output, lse, None), grads)  # type: ignore[arg-type]
        return tuple(found[n] for n in needs)

    @staticmethod
    def backward(ctx: Any, *second: Tensor | None) -> Any:
        given = {n: s for n, s in zip(ctx.needs, second, strict=True) if s is not None}
        grads, x = ctx.saved_tensors[:3], Inputs(*ctx.saved_tensors[3:])
        by_name, incoming = reference.double_backward(ctx.spec, x, grads, given)
        return (None, None, None, *incoming, None, None, *(by_name.get(n) for n in Inputs._fields))


def run(spec: AttentionSpec, backend: str, x: Inputs) -> Outputs:
    """Run one eager call on the chosen backend, on the autograd graph where an input needs gradients."""
    if backend == "reference" or not spec.gradients:
        return BACKENDS[backend].forward(spec, x)
    return Outputs(*_Attention.apply(spec, backend, *x))


class _Joint(torch.autograd.Function):
    """Attention of the parts of one projection, whose gradient is written as one tensor."""

    @staticmethod
    def forward(ctx: Any, spec: AttentionSpec, batch_first: bool, qkv: Tensor) -> tuple[Tensor, Tensor | None]:
        output, lse, weights = cpu.forward_joint(spec, qkv, batch_first, True)
        ctx.spec, ctx.batch_first = spec, batch_first
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(qkv, output, lse)
        return output, weights

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dweights: Tensor | None) -> Any:
        spec, batch_first = ctx.spec, ctx.batch_first
        qkv, output, lse = ctx.saved_tensors
        if dout is None and dweights is None:
            return None, None, None
        if not torch.is_grad_enabled():
            return None, None, cpu.backward_joint(spec, qkv, batch_first, (output, lse), (dout, dweights))
        # To be differentiated again: by tensors of their own, as any other call.
        out, dout = (None if t is None else split_heads(t, spec.heads, batch_first) for t in (output, dout))
        tensors = (*split_joint(qkv, spec.heads, batch_first), *(None,) * (_N_INPUTS - 3))
        needs = ["query", "key", "value"]
        found = _Backward.apply(spec, "cpu", needs, dout, None, dweights, out, lse, *tensors)
        return None, None, torch.stack([merge_heads(t, batch_first) for t in found], -2).flatten(-2)


def run_joint(spec: AttentionSpec, qkv: Tensor, batch_first: bool) -> tuple[Tensor, Tensor | None]:
    """Run one eager call on the parts of a projection: the output, laid out like it, and the weights."""
    if spec.gradients:
        found: tuple[Tensor, Tensor | None] = _Joint.apply(spec, batch_first, qkv)
        return found
    output, _, weights = cpu.forward_joint(spec, qkv, batch_first, False)
    return output, weights


# --- eager and traced -------------------------------------------------------------------------------------------


def value_gradient(x: Inputs, o: Options, dout: Tensor, traced: bool) -> Tensor:
    """The gradient [B, HK, N, DV] of the value alone for an incoming dout [B, H, M, DV], off the graph.

    traced: as the two ops, for torch.compile, torch.export and fake tensors.
    """
    if traced:
        output, lse, _ = _attention_op(*x, *o)
        return _backward_op(dout, None, None, output, lse, *x, *o, "value")[0]
    spec = replace(make_spec(x, o), gradients=frozenset({"value"}))
    if spec.transform:
        raise ArgumentError(f"query: got a tensor in {spec.transform}, expected one outside of transforms")
    backend = BACKENDS[select(spec, Device.of(x.query)).backend]
    return backend.backward(spec, x, backend.forward(spec, x), (dout, None, None))["value"]


# --- traced: torch.compile, torch.export, fake tensors ----------------------------------------------------------


@torch.library.custom_op("fused_attention::attention", mutates_args=())
def _attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seed: Tensor | None,
    block_map: Tensor | None,
    causal: str | None,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    scale: float | None,
    dropout_p: float,
    batch_invariant: bool,
    weights: str | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    block_rows: int | None,
    block_columns: int | None,
    precision: str | None = None,  # graphs that were exported before it do not have it
) -> tuple[Tensor, Tensor, Tensor]:
    optional = (mask, bias, alibi_slopes, sinks, key_lengths, cu_seqlens_q, cu_seqlens_k, seed, block_map)
    x = Inputs(query, key, value, *optional)
    options = (causal, window_left, window_right, softcap, scale, dropout_p, batch_invariant, weights)
    sizes = (max_seqlen_q, max_seqlen_k, block_rows, block_columns, precision)
    spec = make_spec(x, Options(*options, *sizes))  # type: ignore[arg-type]
    out = BACKENDS[select(spec, Device.of(query)).backend].forward(spec, x)
    output = _laid_out_like(query, out.output)
    return output, out.lse.contiguous(), query.new_empty(0) if out.weights is None else out.weights.contiguous()


@_attention_op.register_fake
def _attention_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    weights = rest[_OPTION_START + 7]
    batch, heads, rows, _ = query.shape
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    sizes = {None: (0,), "mean": (batch, rows, key.shape[2]), "heads": (batch, heads, rows, key.shape[2])}
    return (
        output_like(query, batch, value.shape[3]),
        query.new_empty(query.shape[:3], dtype=lse_dtype),
        query.new_empty(sizes[weights]),
    )


_OPTION_START = len(Inputs._fields) - 3  # of the options, within what follows query, key and value
_N_INPUTS = len(Inputs._fields)


def _laid_out_like(like: Tensor, t: Tensor) -> Tensor:
    """`t` in the memory order that `output_like` promises to the tracer."""
    target = output_like(like, t.shape[0], t.shape[3])
    return t if t.stride() == target.stride() else target.copy_(t)


@torch.library.custom_op("fused_attention::attention_backward", mutates_args=())
def _backward_op(
    dout: Tensor | None,
    dlse: Tensor | None,
    dweights: Tensor | None,
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seed: Tensor | None,
    block_map: Tensor | None,
    causal: str | None,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    scale: float | None,
    dropout_p: float,
    batch_invariant: bool,
    weights: str | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    block_rows: int | None,
    block_columns: int | None,
    precision: str | None,
    needs: str,
) -> list[Tensor]:
    optional = (mask, bias, alibi_slopes, sinks, key_lengths, cu_seqlens_q, cu_seqlens_k, seed, block_map)
    x = Inputs(query, key, value, *optional)
    options = (causal, window_left, window_right, softcap, scale, dropout_p, batch_invariant, weights)
    sizes = (max_seqlen_q, max_seqlen_k, block_rows, block_columns, precision)
    names = needs.split(",")
    spec = make_spec(x, Options(*options, *sizes))  # type: ignore[arg-type]
    spec = replace(spec, gradients=frozenset(names))
    chosen = select(spec, Device.of(query)).backend
    found = BACKENDS[chosen].backward(spec, x, Outputs(output, lse, None), (dout, dlse, dweights))
    return [_gradient_laid_out(n, getattr(x, n), found[n]) for n in names]


def _gradient_laid_out(name: str, like: Tensor, grad: Tensor) -> Tensor:
    return _laid_out_like(like, grad) if name in ("query", "key", "value") else grad.contiguous()


@_backward_op.register_fake
def _backward_fake(
    dout: Tensor | None, dlse: Tensor | None, dweights: Tensor | None, output: Tensor, lse: Tensor, *rest: Any
) -> list[Tensor]:
    x = Inputs(*rest[:_N_INPUTS])
    grads: list[Tensor] = []
    for name in rest[-1].split(","):
        t = getattr(x, name)
        if name in ("query", "key", "value"):
            grads.append(output_like(t, t.shape[0], t.shape[3]))
        else:
            grads.append(t.new_empty(t.shape))
    return grads


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.options = inputs[_N_INPUTS:]
    ctx.has_weights = inputs[_N_INPUTS + 7] is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:_N_INPUTS], output[0], output[1])


def _derive_forward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, output, lse = ctx.saved_tensors
    needs = [n for n, need in zip(Inputs._fields, ctx.needs_input_grad, strict=False) if need and n in DIFFERENTIABLE]
    found: dict[str, Tensor] = {}
    dout, dlse, dweights = grads
    if needs and not all(g is None for g in grads):
        args = (dout, dlse, dweights if ctx.has_weights else None, output, lse, *tensors, *ctx.options)
        found = dict(zip(needs, _backward_op(*args, ",".join(needs)), strict=True))
    return (*(found.get(n) for n in Inputs._fields), *(None for _ in ctx.options))


_attention_op.register_autograd(_derive_forward, setup_context=_setup_forward)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.rest, ctx.needs = inputs[5 + _N_INPUTS : -1], inputs[-1].split(",")
    ctx.save_for_backward(*inputs[:3], *inputs[5 : 5 + _N_INPUTS])


def _derive_backward(ctx: Any, second: list[Tensor]) -> tuple[Tensor | None, ...]:
    grads, x = ctx.saved_tensors[:3], Inputs(*ctx.saved_tensors[3:])
    spec = replace(make_spec(x, Options(*ctx.rest)), gradients=frozenset(ctx.needs))
    by_name, incoming = reference.double_backward(spec, x, grads, dict(zip(ctx.needs, second, strict=True)))
    return (*incoming, None, None, *(by_name.get(n) for n in Inputs._fields), *(None for _ in ctx.rest), None)


_backward_op.register_autograd(_derive_backward, setup_context=_setup_backward)


def run_op(x: Inputs, o: Options) -> Outputs:
    """The same call as an op that torch.compile, torch.export and fake tensors see as one node.

    It reads `use_backend` when it runs, not when it is traced.
    """
    output, lse, weights = _attention_op(*x, *o)
    return Outputs(output, lse, weights if o.weights is not None else None)


# --- traced: decoding -----------------------------------------------------------------------------------------------

_HELD = ("cache_key", "cache_value", "lengths", "key_scale", "value_scale")  # what a step writes


@torch.library.custom_op("fused_attention::decode", mutates_args=_HELD)
def _decode_op(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    tree_mask: Tensor | None,
    cache_key: Tensor,
    cache_value: Tensor,
    lengths: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    block_table: Tensor | None,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    scale: float | None,
    batch_invariant: bool,
    interleaved: bool,
    chunk: int | None,
) -> tuple[Tensor, Tensor]:
    held = (lengths, key_scale, value_scale)
    cache: Cache = (
        KVCache(cache_key, cache_value, *held)
        if block_table is None
        else PagedKVCache(cache_key, cache_value, block_table, *held)
    )
    x = DecodeInputs(query, key, value, cos, sin, alibi_slopes, sinks, tree_mask)
    o = Options(None, window_left, window_right, softcap, scale, batch_invariant=batch_invariant)
    out = decode(cache, x, o, interleaved, chunk)
    return _laid_out_like(query, out.output), out.lse.contiguous()


@_decode_op.register_fake
def _decode_fake(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    cache_value = rest[len(DecodeInputs._fields)]
    output = output_like(query, query.shape[0], cache_value.shape[3])
    return output, query.new_empty(query.shape[:3], dtype=lse_dtype)


def run_decode_op(cache: Cache, x: DecodeInputs, o: Options, interleaved: bool, chunk: int | None) -> Outputs:
    """A step as an op, as `run_op`; of a cache of which it changes nothing but the tensors."""
    table = cache.block_table if isinstance(cache, PagedKVCache) else None
    held = (cache.key, cache.value, cache.lengths, cache.key_scale, cache.value_scale, table)
    options = (o.window_left, o.window_right, o.softcap, o.scale, o.batch_invariant)
    output, lse = _decode_op(*x, *held, *options, interleaved, chunk)
    return Outputs(output, lse, None)
