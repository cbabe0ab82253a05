"""Sequences of different lengths: a padded batch, packed one after another, or a nested tensor; and the ways between.

padded [B, S, ...]   <->   packed [T, ...] with cu_seqlens [B + 1]   <->   nested [B, *, ...], jagged layout
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .spec import ArgumentError, as_offsets, need_tensor, readable, shape_of


def _bad(name: str, was: object, expected: str) -> ArgumentError:
    return ArgumentError(f"{name}: got {was}, expected {expected}")


# --- padded batches -----------------------------------------------------------------------------------------------


class PackedSequences(NamedTuple):
    """values [T, ...], the tokens one sequence after another; cu_seqlens [B + 1] int64, where each starts, from 0 to T;
    max_length, that of the longest."""

    values: Tensor
    cu_seqlens: Tensor
    max_length: int


def _check_lengths(lengths: Tensor, batch: int, longest: int, device: torch.device) -> Tensor:
    need_tensor("lengths", lengths, optional=False)
    as_long = as_offsets("lengths", lengths)
    assert as_long is not None
    if tuple(lengths.shape) != (batch,):
        raise _bad("lengths", f"shape {shape_of(lengths)}", f"[B] = [{batch}]")
    if lengths.device != device:
        raise _bad("lengths.device", lengths.device, f"{device}, where the tokens are")
    if readable(lengths) and batch:
        low, high = (int(n) for n in lengths.aminmax())
        if low < 0 or high > longest:
            raise _bad("lengths", f"a length of {low if low < 0 else high}", f"lengths in 0 .. {longest}")
    return as_long


def _check_valid(valid: Tensor, shape: tuple[int, ...] | None, device: torch.device) -> None:
    need_tensor("valid", valid, optional=False)
    if valid.dtype != torch.bool:
        raise _bad("valid.dtype", valid.dtype, "torch.bool")
    if valid.dim() != 2 or (shape is not None and tuple(valid.shape) != shape):
        raise _bad("valid", f"shape {shape_of(valid)}", "[B, S]" if shape is None else f"[B, S] = {list(shape)}")
    if valid.device != device:
        raise _bad("valid.device", valid.device, f"{device}, where the tokens are")


def _need_dense(name: str, t: Tensor, least: int, layout: str) -> None:
    need_tensor(name, t, optional=False)
    if t.is_nested or t.layout != torch.strided:
        raise _bad(f"{name}.layout", "a nested tensor" if t.is_nested else t.layout, "a dense tensor")
    if t.dim() < least:
        raise _bad(name, f"shape {shape_of(t)}", layout)


def pack_padded(padded: Tensor, lengths: Tensor | None = None, *, valid: Tensor | None = None) -> PackedSequences:
    """The tokens of a padded batch, one sequence after another, for `varlen_attention`. Differentiable.

    How many tokens there are is read from the device, which waits for it.

    Args:
        padded: [B, S, ...] of any dtype; a projection [B, S, H, D] gives [T, H, D].
        lengths: [B] integers in 0 .. S: sequence b is padded[b, :lengths[b]].
        valid: [B, S] bool, True where a token is; padding may stand anywhere. Exactly one of the two is given.

    Raises:
        ArgumentError: (a ValueError) a shape, dtype, device or length is wrong.
        TypeError: an argument is no tensor.
    """
    _need_dense("padded", padded, 2, "[B, S, ...]")
    batch, longest = padded.shape[:2]
    if (lengths is None) == (valid is None):
        raise _bad("lengths", "None beside valid=None" if lengths is None else "lengths beside valid", "one of the two")
    if lengths is not None:
        lengths = _check_lengths(lengths, batch, longest, padded.device)
        valid = torch.arange(longest, device=padded.device) < lengths[:, None]
    assert valid is not None
    _check_valid(valid, (batch, longest), padded.device)
    counts = valid.sum(1)
    tokens = valid.flatten().nonzero().squeeze(1)
    values = padded.flatten(0, 1).index_select(0, tokens)
    cu_seqlens = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return PackedSequences(values, cu_seqlens, int(counts.max()) if batch else 0)


def unpack_padded(
    values: Tensor, cu_seqlens: Tensor, length: int | None = None, *, valid: Tensor | None = None
) -> Tensor:
    """The padded batch [B, S, ...] of packed tokens [T, ...], zeros where no token is. Differentiable.

    Args:
        values: [T, ...], such as the output of `varlen_attention`.
        cu_seqlens: [B + 1] integers, from 0 to T.
        length: S; default that of the longest sequence, which is read from the device.
        valid: [B, S] bool, as it was given to `pack_padded`; None: padding is at the end.

    Raises:
        ArgumentError: (a ValueError) a shape, dtype, device or length is wrong.
        TypeError: an argument has the wrong type.
    """
    _need_dense("values", values, 1, "[T, ...]")
    need_tensor("cu_seqlens", cu_seqlens, optional=False)
    offsets = as_offsets("cu_seqlens", cu_seqlens)
    assert offsets is not None
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise _bad("cu_seqlens", f"shape {shape_of(offsets)}", "[B + 1]")
    if offsets.device != values.device:
        raise _bad("cu_seqlens.device", offsets.device, f"values' {values.device}")
    if readable(offsets) and (int(offsets[0]) != 0 or int(offsets[-1]) != len(values) or (offsets.diff() < 0).any()):
        raise _bad("cu_seqlens", offsets.tolist(), f"offsets that never fall, from 0 to {len(values)}")
    counts = offsets.diff()
    if valid is None:
        valid = _right_padded(counts, length)
    elif length is not None:
        raise _bad("length", length, "None beside valid")
    _check_valid(valid, None, values.device)
    batch, longest = valid.shape
    if batch != len(counts):
        raise _bad("valid", f"{batch} sequences", f"{len(counts)}, as cu_seqlens")
    tokens = valid.flatten().nonzero().squeeze(1)
    if len(tokens) != len(values) or (readable(valid) and not torch.equal(valid.sum(1), counts)):
        raise _bad("valid", f"{valid.sum(1).tolist()} tokens", f"{counts.tolist()}, as cu_seqlens")
    padded = values.new_zeros(batch * longest, *values.shape[1:]).index_copy(0, tokens, values)
    return padded.unflatten(0, (batch, longest))


def _right_padded(counts: Tensor, length: int | None) -> Tensor:
    """bool [B, S], True in the first counts[b] places of row b."""
    longest = int(counts.max()) if len(counts) else 0
    if length is not None:
        if isinstance(length, bool) or not isinstance(length, int):
            raise TypeError(f"length: got {length!r}, expected an int or None")
        if length < longest:
            raise _bad("length", length, f"at least the longest sequence, {longest}")
        longest = length
    return torch.arange(longest, device=counts.device) < counts[:, None]


# --- nested tensors -------------------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """query, key and value packed: [T, H, D], [TK, HK, D], [TK, HK, DV], and their offsets."""

    query: Tensor
    key: Tensor
    value: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor


def any_nested(query: Any, key: Any, value: Any) -> bool:
    """Whether any of the three is a nested tensor."""
    try:
        return query.is_nested or key.is_nested or value.is_nested
    except AttributeError:  # not all are tensors, which `make_spec` refuses; no isinstance on the path of every call
        return False


def _pack(name: str, t: Any) -> tuple[Tensor, Tensor]:
    """A nested [B, H, *, D] of either layout as values [T, H, D] and offsets [B + 1]; differentiable."""
    need_tensor(name, t, optional=False)
    if not t.is_nested or t.dim() != 4:
        kind = "a nested" if t.is_nested else "a dense"
        expected = "nested tensors [B, H, *, D] for query, key and value alike"
        raise _bad(name, f"{kind} tensor of {t.dim()} dimensions", expected)
    if t.layout == torch.jagged:
        if not isinstance(t.shape[1], int) or not isinstance(t.shape[3], int):
            raise _bad(name, f"the nested shape {tuple(t.shape)}", "[B, H, *, D]")
        t = t.transpose(1, 2)
        t = t if t.lengths() is None else t.contiguous()  # closes the holes
        return t.values(), t.offsets()
    sequences = [s.transpose(0, 1) for s in t.unbind()]
    offsets = torch.tensor([0, *(s.shape[0] for s in sequences)], device=t.device).cumsum(0)
    return torch.cat(sequences), offsets


def from_nested(query: Tensor, key: Tensor, value: Tensor, refused: Mapping[str, object]) -> Packed:
    """Packed sequences out of nested tensors [B, H, *, D] of either layout.

    refused: arguments that nested tensors leave no room for; one that is not None is an error.
    """
    for name, given in refused.items():
        if given is not None:
            was = "a Tensor" if isinstance(given, Tensor) else repr(given)
            raise _bad(name, was, "None with nested tensors")
    (q, starts_q), (k, starts_k), (v, starts_v) = (
        _pack(name, t) for name, t in (("query", query), ("key", key), ("value", value))
    )
    if len(starts_k) != len(starts_q):
        raise _bad("key", f"{len(starts_k) - 1} sequences", f"query's {len(starts_q) - 1}")
    if starts_k is not starts_v and not torch.equal(starts_k, starts_v):
        raise _bad("value", f"lengths {starts_v.diff().tolist()}", f"key's {starts_k.diff().tolist()}")
    return Packed(q, k, v, starts_q, starts_k)


def to_nested(values: Tensor, offsets: Tensor, like: Tensor) -> Tensor:
    """values [T, H, ...] as a nested tensor [B, H, *, ...] of `like`'s layout and lengths, which `offsets` are."""
    if like.layout == torch.jagged:
        # The same offsets object gives the same symbolic length: the result adds to `like`.
        return torch.nested.nested_tensor_from_jagged(values, offsets=offsets).transpose(1, 2)
    sequences = values.split(offsets.diff().tolist())
    return torch.nested.as_nested_tensor([s.transpose(0, 1) for s in sequences])
