"""Incremental inference: a few rows of queries against a cache of keys and values, which grows in place.

What is new is appended first; then, where row i of a sequence stands at position lengths - M + i,

    output = attention(rope(query), K, V, key_lengths=lengths, causal="bottom_right")
"""

from __future__ import annotations

from torch import Tensor

from . import autograd, steps
from .cache import Cache, DecodeInputs, KVCache, PagedKVCache, describe
from .functional import AttentionResult, any_autocast, autocast
from .spec import Options, Window, window_sides
from .tracing import is_traced


def decode_attention(
    query: Tensor,
    cache: Cache,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    rope: tuple[Tensor, Tensor, bool] | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    tree_mask: Tensor | None = None,
    batch_invariant: bool = False,
    return_lse: bool = False,
    chunk: int | None = None,
) -> Tensor | AttentionResult:
    """Attention of the last M tokens of every sequence to what its cache holds, new tokens appended first.

    Row i of sequence b stands at position lengths[b] - M + i and sees the keys up to there. A sequence of length 0
    gives zeros and lse -inf. Not differentiable: an input that requires grad is an error unless under
    `torch.no_grad()`. Nothing synchronises with a GPU, so that a CUDA graph can hold a step; what cannot be checked
    there without looking (a sequence longer than its cache, a page that does not exist, a position outside the tables)
    gives NaN in the rows that it concerns.

    torch.compile and torch.export see one op that writes the cache's tensors. A rolling cache, and one that a pool
    manages, count on the host what they hold: there a compiled graph ends, and begins again after the call.

    Args:
        query: [B, H, M, D]; float32, bfloat16, float16 or float64; any M, made for a few rows.
        cache: a `KVCache` or `PagedKVCache` for B sequences, in the query's dtype, a narrower one that is exact in it,
            int8 or float8_e4m3fn. A rolling one forgets, and one that a pool manages takes pages, as tokens come.
        key: [B, HK, M, D], new tokens to append in place, at positions lengths[b] .. lengths[b] + M - 1; the lengths
            grow by M. None: nothing is appended.
        value: [B, HK, M, DV], likewise.
        rope: (cos, sin, interleaved), tables [L, R/2] float32 with R <= D: the first R dims of query and new key are
            rotated at their positions, pairs (i, i + R/2) or, interleaved, (2i, 2i + 1), in float32 and before
            rounding (Su et al., "RoFormer", 2021). What the cache holds is rotated already. Tokens that a rolling cache
            has forgotten are counted.
        alibi_slopes: [H] or [B, H]; -slope * distance is added.
        sinks: [H]; exp(sink) joins the softmax's denominator.
        window: (left, right): keys farther left than this from a row's position are hidden; None is open. What lies to
            the right is hidden by causality.
        softcap: scores become softcap * tanh(scores / softcap).
        scale: multiplies QK^T; default 1 / sqrt(D).
        tree_mask: bool [B|1, M, M]: row i sees row j of the last M tokens if tree_mask[b, i, j], and every token
            before them: drafted tokens that branch (Miao et al., "SpecInfer", 2023). The diagonal is True. Row i then
            stands at position lengths[b] - M + (how many of the M it sees beside itself), its depth in the tree, by
            which `rope`, `window` and `alibi_slopes` count. `cache.keep` keeps the accepted ones.
        batch_invariant: rows are bit-equal whatever else is in the batch: the number of splits of the keys follows
            from the capacity alone.
        return_lse: also return the log-sum-exp of the scores.
        chunk: append and attend so many tokens at a time, as for a prompt whose scores or whose copy of a quantised or
            paged cache would be too large at once; without new tokens it changes nothing. None: all at once, but no
            more than a rolling cache has room for beside its window.

    Returns:
        The output [B, H, M, DV] in the query's dtype and memory order, or an `AttentionResult` with lse [B, H, M],
        float32 (float64 for float64 queries), if `return_lse` is set.

    Raises:
        ArgumentError: (a ValueError) a shape, dtype, device or value is wrong; nothing was written.
        TypeError: an argument has the wrong type.
        BackendError: the backend named by `use_backend` does not support the call.
    """
    left, right = window_sides(window)
    cos, sin, interleaved = _rope(rope)
    if any_autocast():
        query, key, value = autocast(query, key, value)
    if isinstance(alibi_slopes, Tensor) and alibi_slopes.dim() == 1:
        alibi_slopes = alibi_slopes[None]
    x = DecodeInputs(query, key, value, cos, sin, alibi_slopes, sinks, tree_mask)
    options = Options(window_left=left, window_right=right, softcap=softcap, scale=scale)
    options = options._replace(batch_invariant=batch_invariant)
    if is_traced(query) and _in_tensors(cache):
        describe(cache, x, options, interleaved)
        out = autograd.run_decode_op(cache, x, options, interleaved, chunk)
    else:
        out = steps.decode(cache, x, options, interleaved, chunk)
    return AttentionResult(out.output, out.lse, None) if return_lse else out.output


def _in_tensors(cache: object) -> bool:
    """Whether a step changes nothing of the cache but its tensors, so that a graph can hold it."""
    if isinstance(cache, KVCache):
        return cache.window is None
    return isinstance(cache, PagedKVCache) and cache.managed_by is None


def _rope(rope: object) -> tuple[Tensor | None, Tensor | None, bool]:
    if rope is None:
        return None, None, False
    if not isinstance(rope, (tuple, list)) or len(rope) != 3:
        raise TypeError(f"rope: got {type(rope).__name__}, expected (cos, sin, interleaved) or None")
    return rope[0], rope[1], rope[2]
