"""What `precision="fp8"` computes, in plain eager PyTorch, and what it is measured against.

A block of 128 rows of a head has the smallest power of two s with |x| <= 448 s as its scale, and codes of float8 e4m3.
Scores and sums are taken from the codes times their scales; the weights, relative to the largest of their row, are
rounded to e4m3 too, before they multiply the values.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fused_attention.backends import reference
from fused_attention.spec import AttentionSpec, Inputs

E4M3 = torch.float8_e4m3fn
BLOCK = 128


def scale_of(block: Tensor) -> Tensor:
    """[..., rows, dims] -> [..., 1]; what is not finite does not count."""
    top = torch.where(block.isfinite(), block, 0).abs().float().amax((-2, -1))[..., None]
    mantissa, exponent = torch.frexp(top)  # in 0.5 .. 1; 448 is 0.875 * 2^9
    exponent = torch.where(top == 0, 0, exponent - 9 + (mantissa > 0.875).int()).clamp(-60, 120)
    return torch.ldexp(torch.ones_like(top), exponent)


class Codes(NamedTuple):
    """codes [..., rows, dims] and the scale of each block [..., blocks]; values, float32: their product."""

    codes: Tensor
    scales: Tensor
    values: Tensor


def quantise(t: Tensor, length: int) -> Codes:
    """A tensor [..., rows, dims] of which `length` rows count; the codes of the others are 0."""
    starts = range(0, length, BLOCK)
    blocks = [t[..., first : min(first + BLOCK, length), :] for first in starts]
    scales = torch.cat([t.new_empty(*t.shape[:-2], 0).float(), *map(scale_of, blocks)], -1)
    by_row = torch.ones(t.shape[:-1])
    by_row[..., :length] = scales.repeat_interleave(BLOCK, -1)[..., :length]
    scaled = t.float() / by_row[..., None]
    scaled = torch.where(scaled.isfinite(), scaled, float("nan"))
    scaled[..., length:, :] = 0
    codes = scaled.to(E4M3)
    return Codes(codes, scales, codes.float() * by_row[..., None])


class Expected(NamedTuple):
    """Of float64 attention over what the codes stand for, of the recipe, and of float64 attention over the inputs."""

    exact: Tensor
    same: Tensor
    lse: Tensor
    same_lse: Tensor
    unquantised: Tensor


def _dense(spec: AttentionSpec, x: Inputs, b: int) -> Expected:
    """One element of the batch; b: its number in the dropout counter."""
    rows, columns = x.query.shape[2], x.key.shape[2]
    length = columns if x.key_lengths is None else int(x.key_lengths[0])
    codes = (quantise(t, n) for t, n in ((x.query, rows), (x.key, length), (x.value, length)))
    rounded = x._replace(**dict(zip(("query", "key", "value"), (c.values for c in codes), strict=True)))
    batch = torch.tensor([b])
    wide = replace(
        spec, batch=1, rows=rows, columns=columns, dtype=torch.float64, precision=None, packed=False, weights=None
    )

    def attend(spec: AttentionSpec, x: Inputs, acc: torch.dtype) -> reference.Outputs:
        return reference._attend(spec, x, batch, acc)

    exact = attend(wide, rounded, torch.float64)
    narrow = replace(wide, dtype=torch.float32, weights="heads")
    dropped, full = (
        attend(narrow, rounded, torch.float32),
        attend(replace(narrow, dropout_p=0.0), rounded, torch.float32),
    )
    assert dropped.weights is not None and full.weights is not None
    top = full.weights.amax(-1, keepdim=True) if columns else full.weights.new_ones(1)
    top = torch.where(top > 0, top, 1)
    weights = (256 * full.weights / top).to(E4M3).float() / 256
    weights = weights * torch.where(full.weights > 0, dropped.weights / full.weights, 0)
    value = torch.where(rounded.value.isfinite(), rounded.value, 0).repeat_interleave(spec.group, 1)
    same = (weights @ value * top).to(spec.dtype)
    return Expected(
        exact.output, same, exact.lse, full.lse, attend(wide, x._replace(query=x.query), torch.float64).output
    )


def expected(spec: AttentionSpec, x: Inputs) -> Expected:
    """The results of a call of finite numbers (where they are seen)."""
    if spec.packed:
        parts = [_dense(spec, one, b) for b, one in enumerate(reference.sequences(x))]
        return Expected(*(torch.cat(part, 2) for part in zip(*parts, strict=True)))

    def one(b: int) -> Inputs:
        def of(t: Tensor | None) -> Tensor | None:
            return t if t is None or t.dim() == 0 or t.shape[0] != spec.batch else t[b : b + 1]

        return x._replace(**{n: of(t) for n, t in x._asdict().items() if n not in ("sinks", "seed")})

    parts = [_dense(spec, one(b), b) for b in range(spec.batch)]
    return Expected(*(torch.cat(part) for part in zip(*parts, strict=True)))
