"""The definition of decoding, eager PyTorch: append, gather the pages, dequantise, then `reference.forward`.

    position of row i = dropped + lengths - M + i, after the new tokens are counted
    query, key = rotated at their positions;  cache[position] = quantised(key), quantised(value)
    output = attention(query, K, V, key_lengths=lengths, causal="bottom_right")

Under a tree mask row i stands at position lengths - M + depth, its depth being how many of the last M tokens it sees
beside itself; of those it sees what the mask says, and all before them. Rotation, windows and ALiBi follow positions.

A position outside the rotation's tables turns its row into NaN, a page that does not exist gives NaN, and so does a
sequence longer than its cache: where no check could look (on a GPU), nothing wrong passes for a result.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..cache import LIMITS, Cache, DecodeInputs, DecodeSpec, KVCache, PagedKVCache
from ..cache import bits as _bits
from ..layout import memory_order
from ..spec import AttentionSpec, Inputs, Outputs
from . import reference
from .reference_ops import Tables, accumulator, rotate


def quantise(x: Tensor, kv_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [..., D] and scales [...] of tokens x [..., D]; computed in float32."""
    limit = LIMITS[kv_dtype]
    x = x.float()
    largest = x.abs().amax(-1)
    scale = largest / limit
    scale = torch.where(scale == 0.0, 1.0, scale).masked_fill(~largest.isfinite(), float("nan"))
    codes = (x / scale[..., None]).nan_to_num(0.0).clamp(-limit, limit)
    return (codes.round() if kv_dtype == torch.int8 else codes).to(kv_dtype), scale


def places(cache: Cache, rows: int) -> Tensor:
    """Where the last `rows` tokens of each sequence lie among those that the cache holds, [B, M]."""
    row = torch.arange(rows, device=cache.lengths.device)
    return cache.lengths.long()[:, None] - rows + row


def positions(cache: Cache, places: Tensor) -> Tensor:
    """Where they stand in their sequences: what a rolling cache has forgotten counts."""
    forgotten = cache.dropped if isinstance(cache, KVCache) else None
    return places if forgotten is None else places + forgotten.long()[:, None]


def depths(tree_mask: Tensor) -> Tensor:
    """How many tokens each row of a tree sees beside itself, [B|1, M]."""
    return tree_mask.sum(-1) - 1


def _standing(cache: Cache, x: DecodeInputs, places: Tensor) -> Tensor:
    """The positions of the last rows, which lie in `places`."""
    return positions(cache, places if x.tree_mask is None else places[:, :1] + depths(x.tree_mask))


def _under_tree(spec: DecodeSpec, x: Inputs, tree: Tensor) -> tuple[AttentionSpec, Inputs]:
    """What a tree mask hides as a mask [B, 1, M, N], with the window; ALiBi as a bias [B, H, M, N]."""
    assert x.key_lengths is not None
    rows, columns = spec.rows, x.key.shape[2]
    column = torch.arange(columns, device=tree.device)
    first = (x.key_lengths - rows)[:, None]  # [B, 1]
    new = column - first  # [B, N]: which of the last tokens a key is
    index = new.clamp(0, rows - 1)
    batch = torch.arange(spec.batch, device=tree.device)[:, None]
    tree = tree.expand(spec.batch, rows, rows)
    seen = (new < 0)[:, None] | tree.transpose(1, 2)[batch, index].transpose(1, 2)  # [B, M, N]
    seen &= (first + torch.arange(rows, device=tree.device) >= 0)[..., None]
    depth = depths(tree)
    key_at = torch.where(new < 0, column, first + depth.gather(1, index))
    distance = (first + depth)[..., None] - key_at[:, None]
    left, _ = spec.window or (None, None)
    if left is not None:
        seen &= distance <= left
    bias = None
    if x.alibi_slopes is not None:
        bias = -x.alibi_slopes.to(spec.lse_dtype)[:, :, None, None] * distance.abs()[:, None]
    attention = replace(spec.attention(columns, spec.dtype), window=None, alibi_slopes=False, mask=torch.bool)
    if bias is not None:
        attention = replace(attention, bias=bias.dtype)
    return attention, x._replace(mask=seen[:, None], bias=bias, alibi_slopes=None)


def _rotated(spec: DecodeSpec, x: DecodeInputs, t: Tensor, at: Tensor) -> Tensor:
    """t [B, *, M, D] turned at positions `at`, in the dtype that it is computed in."""
    t = t.to(accumulator(t.dtype))
    if not spec.rotary_dim:
        return t
    assert x.cos is not None and x.sin is not None
    return rotate(t, Tables(x.cos, x.sin, at, spec.interleaved))


def _places(cache: Cache, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Block (sequence or page) and row of the storage where positions lie, and whether they do; [B, M] each."""
    inside = (at >= 0) & (at < cache.capacity)
    if not isinstance(cache, PagedKVCache):
        block = torch.arange(cache.batch, device=at.device)[:, None].expand_as(at)
        return block, at, inside
    at = torch.where(inside, at, 0)
    if not cache.capacity:
        return at, at, inside
    page = cache.block_table.long().gather(1, at // cache.page_size)
    return page, at % cache.page_size, inside & (page >= 0) & (page < cache.num_pages)


def append(spec: DecodeSpec, cache: Cache, x: DecodeInputs) -> Tensor:
    """Write the new tokens into the cache, in place, and count them; returns the query, rotated where tables are given.

    What has no place in the cache is not written.
    """
    if spec.appends:
        cache.lengths.add_(spec.rows)
    if not spec.appends and not spec.rotary_dim:
        return x.query
    here = places(cache, spec.rows)
    at = _standing(cache, x, here)
    if spec.appends:
        assert x.key is not None and x.value is not None
        block, row, inside = _places(cache, here)
        b, i = inside.nonzero(as_tuple=True)
        block, row = block[b, i], row[b, i]
        new = ((cache.key, cache.key_scale, _rotated(spec, x, x.key, at)), (cache.value, cache.value_scale, x.value))
        for storage, scales, t in new:
            t = t.transpose(1, 2)[b, i]  # [tokens, HK, D]
            if scales is not None:
                t, scales[block, :, row] = quantise(t, spec.kv_dtype)
            _bits(storage)[block, :, row] = _bits(t.to(spec.kv_dtype))
    if not spec.rotary_dim:
        return x.query
    order, back = memory_order(x.query)
    return _rotated(spec, x, x.query, at).to(spec.dtype).permute(order).contiguous().permute(back)


def _dense(cache: Cache, storage: Tensor, scales: Tensor | None, columns: int, dtype: torch.dtype) -> Tensor:
    if not isinstance(cache, PagedKVCache):
        t = storage[:, :, :columns].to(dtype)
        return t if scales is None else t.mul_(scales[:, :, :columns, None])
    table = cache.block_table[:, : -(-columns // cache.page_size)].long()
    known = (table >= 0) & (table < cache.num_pages)
    page = torch.where(known, table, 0)
    t = _bits(storage).transpose(0, 1)[:, page].view(storage.dtype).to(dtype)  # [HK, B, pages, page_size, D]
    if scales is not None:
        t.mul_(scales.transpose(0, 1)[:, page][..., None])
    if not known.is_cpu or not known.all():
        t.masked_fill_(~known[:, :, None, None], float("nan"))
    return t.flatten(2, 3).transpose(0, 1)[:, :, :columns]


def dense(cache: Cache, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The first `columns` keys [B, HK, columns, D] and values of every sequence; a dense cache in `dtype` is a view."""
    key = _dense(cache, cache.key, cache.key_scale, columns, dtype)
    return key, _dense(cache, cache.value, cache.value_scale, columns, dtype)


def longest(cache: Cache) -> int:
    """As many columns as any sequence needs: the longest on a CPU, the capacity where looking would synchronise."""
    if cache.lengths.is_cpu and cache.batch:
        return min(max(0, *cache.lengths.tolist()), cache.capacity)
    return cache.capacity


def attend(spec: DecodeSpec, cache: Cache, x: DecodeInputs, compute_dtype: torch.dtype | None = None) -> Outputs:
    """Attention of x.query, already rotated, to what the cache holds.

    compute_dtype: default `spec.lse_dtype`; the query's own dtype gives what plain eager code in that dtype gives.
    """
    acc = compute_dtype or spec.lse_dtype
    columns = cache.capacity if spec.batch_invariant else longest(cache)
    key, value = dense(cache, columns, acc)
    lengths = cache.lengths.long()
    inputs = Inputs(x.query, key, value, alibi_slopes=x.alibi_slopes, sinks=x.sinks, key_lengths=lengths)
    attention = spec.attention(columns, spec.dtype)
    if x.tree_mask is not None and spec.rows:
        attention, inputs = _under_tree(spec, inputs, x.tree_mask)
    out = reference.forward(attention, inputs, acc)
    lost = (lengths > cache.capacity)[:, None, None]
    out.output.masked_fill_(lost[..., None], float("nan"))
    out.lse.masked_fill_(lost, float("nan"))
    return out


def forward(spec: DecodeSpec, cache: Cache, x: DecodeInputs) -> Outputs:
    """One step of decoding: append, then attend."""
    return attend(spec, cache, x._replace(query=append(spec, cache, x)))
