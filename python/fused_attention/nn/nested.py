"""Nested tensors as packed sequences: their values, their offsets, and the way back into the same layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Packed:
    """values [T, E]; offsets [B + 1], where each sequence starts and the last one ends; the tensor they came from."""

    values: Tensor
    offsets: Tensor
    source: Tensor

    @property
    def lengths(self) -> Tensor:
        return self.offsets.diff()

    def valid(self) -> Tensor:
        """bool [B, longest]: which positions of the padded batch hold a token."""
        lengths = self.lengths
        longest = int(lengths.max()) if lengths.numel() else 0
        return torch.arange(longest, device=lengths.device) < lengths[:, None]

    def padded(self) -> Tensor:
        """[B, longest, E], zeros beyond each sequence's end."""
        valid = self.valid()
        padded = self.values.new_zeros(*valid.shape, self.values.shape[-1])
        return padded.masked_scatter(valid[..., None], self.values)

    def wrap(self, values: Tensor) -> Tensor:
        """values [T, E'] as a nested tensor with the lengths and the layout of the source."""
        if self.source.layout == torch.jagged:
            # The same offsets object gives the same symbolic length: the result adds to the source.
            return torch.nested.nested_tensor_from_jagged(values, offsets=self.offsets)
        return torch.nested.as_nested_tensor(list(values.split(self.lengths.tolist())))


def unpack(tensor: Tensor) -> Packed:
    """The packed form of a nested tensor [B, *, E] of either layout; differentiable."""
    if not tensor.is_nested:
        raise AssertionError("query, key and value must all be nested tensors, or none of them")
    if tensor.dim() != 3:
        raise AssertionError(f"a nested tensor must have the dimensions [batch, length, features], got {tensor.dim()}")
    if tensor.layout == torch.jagged:
        jagged: Any = tensor
        if jagged.lengths() is not None:
            jagged = jagged.contiguous()  # closes the holes
        return Packed(jagged.values(), jagged.offsets(), jagged)
    sequences = tensor.unbind()
    lengths = [s.shape[0] for s in sequences]
    offsets = torch.tensor([0, *lengths], device=tensor.device).cumsum(0)
    return Packed(torch.cat(sequences), offsets, tensor)


def check(query: Packed, key: Packed, value: Packed, embed_dim: int) -> None:
    """Batch sizes, lengths and features fit together."""
    if query.values.shape[-1] != embed_dim:
        raise AssertionError(
            f"was expecting embedding dimension of {embed_dim}, but got {query.values.shape[-1]} in query"
        )
    if query.offsets.shape != key.offsets.shape:
        raise RuntimeError(f"key has {key.offsets.shape[0] - 1} sequences where query has {query.offsets.shape[0] - 1}")
    if key is not value and not torch.equal(key.offsets, value.offsets):
        raise AssertionError(f"key's lengths {key.lengths.tolist()} do not match value's {value.lengths.tolist()}")
