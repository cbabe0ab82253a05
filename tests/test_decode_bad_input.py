"""Malformed decoding calls and caches: each raises an error that names the argument, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fused_attention.cache import Cache, KVCache, PagedKVCache
from fused_attention.decode import decode_attention
from fused_attention.spec import ArgumentError

from .test_decode import BF16, F16, F32, I8, NAN

pytestmark = pytest.mark.fast

Q, K, V = torch.zeros(2, 4, 1, 8), torch.zeros(2, 2, 1, 8), torch.zeros(2, 2, 1, 6)
COS = torch.zeros(16, 4)
E5M2 = torch.float8_e5m2


def dense(length: int = 3, **kind: Any) -> KVCache:
    cache = KVCache.allocate(2, 2, 16, 8, 6, **kind)
    cache.lengths.fill_(length)
    return cache


def paged(length: int = 3, pages: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)) -> PagedKVCache:
    cache = PagedKVCache.allocate(torch.tensor(pages, dtype=torch.int32).reshape(2, 4), 8, 2, 4, 8, 6)
    cache.lengths.fill_(length)
    return cache


def call(cache: Any, *tensors: Any, **options: Any) -> Callable[[], Any]:
    q, k, v = (*tensors, *(Q, K, V)[len(tensors) :])
    return lambda: decode_attention(q, cache, k, v, **options)


def storage(**tensors: Any) -> Callable[[], Any]:
    return lambda: replace(dense(), **tensors)


CALLS: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("cache is a tensor", call(K), TypeError, "cache"),
    ("query is a list", call(dense(), [1.0]), TypeError, "query"),
    ("query of 3 dims", call(dense(), Q[0]), ValueError, "query"),
    ("integer query", call(dense(), Q.long()), ValueError, "query.dtype"),
    ("query of another dtype than the cache", call(dense(), Q.half()), ValueError, "query.dtype"),
    ("float16 query on a bfloat16 cache", call(dense(dtype=BF16), Q.half()), ValueError, "query.dtype"),
    ("query on another device", call(dense(), Q.to("meta")), ValueError, "query.device"),
    ("query of another batch", call(dense(), Q[:1]), ValueError, "query"),
    ("heads that do not divide", call(dense(), Q[:, :3]), ValueError, "query"),
    ("query of another head dim", call(dense(), Q[..., :7]), ValueError, "query"),
    ("key without a value", call(dense(), Q, K, None), ValueError, "value"),
    ("value without a key", call(dense(), Q, None, V), ValueError, "key"),
    ("key of another number of tokens", call(dense(), Q, K.expand(2, 2, 3, 8)), ValueError, "key"),
    ("key of other heads", call(dense(), Q, K[:, :1]), ValueError, "key"),
    ("value of another dim", call(dense(), Q, K, V[..., :5]), ValueError, "value"),
    ("value of another dtype", call(dense(), Q, K, V.double()), ValueError, "value.dtype"),
    ("key is a number", call(dense(), Q, 1.0, V), TypeError, "key"),
    ("full dense cache", call(dense(16)), ValueError, "cache.lengths"),
    ("full paged cache", call(paged(16)), ValueError, "cache.lengths"),
    ("negative length", call(dense(-1)), ValueError, "cache.lengths"),
    ("length past the capacity", call(dense(17), Q, None, None), ValueError, "cache.lengths"),
    ("no page for the new token", call(paged(4, (0, 1, 2, 3, 4, -1, 6, 7))), ValueError, r"cache.block_table\[1, 1\]"),
    ("page past the last", call(paged(3, (0, 1, 2, 3, 8, 5, 6, 7))), ValueError, r"cache.block_table\[1, 0\]"),
    ("two sequences append to one page", call(paged(5, (0, 1, 2, 3, 4, 1, 6, 7))), ValueError, "cache.block_table"),
    ("rope is a tensor", call(dense(), rope=COS), TypeError, "rope"),
    ("rope of two", call(dense(), rope=(COS, COS)), TypeError, "rope"),
    ("rope tables of half precision", call(dense(), rope=(COS.half(), COS.half(), False)), ValueError, "rope"),
    ("rope tables of two shapes", call(dense(), rope=(COS, COS[:, :3], False)), ValueError, "rope"),
    ("rope wider than the head", call(dense(), rope=(COS.repeat(1, 2), COS.repeat(1, 2), False)), ValueError, "rope"),
    ("rope tables too short", call(dense(), rope=(COS[:3], COS[:3], False)), ValueError, "rope"),
    ("rope without sin", call(dense(), rope=(COS, None, False)), TypeError, "rope"),
    ("interleaved is a number", call(dense(), rope=(COS, COS, 1)), TypeError, "rope"),
    ("window is a number", call(dense(), window=3), TypeError, "window"),
    ("negative window", call(dense(), window=(-1, None)), ValueError, "window"),
    ("softcap 0", call(dense(), softcap=0.0), ValueError, "softcap"),
    ("scale NaN", call(dense(), scale=NAN), ValueError, "scale"),
    ("sinks of other heads", call(dense(), sinks=torch.zeros(3)), ValueError, "sinks"),
    ("integer sinks", call(dense(), sinks=torch.zeros(4).long()), ValueError, "sinks.dtype"),
    ("ALiBi slopes of other heads", call(dense(), alibi_slopes=torch.zeros(3)), ValueError, "alibi_slopes"),
    ("tree of integers", call(dense(), tree_mask=torch.ones(2, 1, 1).long()), ValueError, "tree_mask.dtype"),
    ("tree is a list", call(dense(), tree_mask=[[True]]), TypeError, "tree_mask"),
    ("tree of other rows", call(dense(), tree_mask=torch.ones(2, 2, 2).bool()), ValueError, "tree_mask"),
    ("tree of another batch", call(dense(), tree_mask=torch.ones(3, 1, 1).bool()), ValueError, "tree_mask"),
    ("tree of 4 dims", call(dense(), tree_mask=torch.ones(1, 1, 1, 1).bool()), ValueError, "tree_mask"),
    ("tree on another device", call(dense(), tree_mask=torch.ones(1, 1, 1, device="meta").bool()), ValueError,
     "tree_mask.device"),
    ("row that does not see itself", call(dense(), tree_mask=torch.zeros(1, 1, 1).bool()), ValueError,
     r"tree_mask\[0, 0, 0\]"),
    ("tree taken in chunks", call(dense(), *(t.repeat(1, 1, 3, 1) for t in (Q, K, V)), chunk=2,
                                  tree_mask=torch.ones(1, 3, 3).bool().tril()), ValueError, "tree_mask"),
    ("batch_invariant is a number", call(dense(), batch_invariant=1), TypeError, "batch_invariant"),
    ("storage of 3 dims", storage(key=torch.zeros(2, 2, 16)), ValueError, "key"),
    ("storage of integers", storage(key=torch.zeros(2, 2, 16, 8).long()), ValueError, "key.dtype"),
    ("value of another capacity", storage(value=torch.zeros(2, 2, 15, 6)), ValueError, "value"),
    ("value of another storage dtype", storage(value=torch.zeros(2, 2, 16, 6).half()), ValueError, "value.dtype"),
    ("storage whose last dim is strided", storage(key=torch.zeros(2, 2, 8, 16).mT), ValueError, "key"),
    ("expanded storage", storage(key=torch.zeros(1, 2, 16, 8).expand(2, 2, 16, 8)), ValueError, "key"),
    ("scales of a float cache", storage(key_scale=torch.zeros(2, 2, 16)), ValueError, "key_scale"),
    ("int8 without scales", storage(key=torch.zeros(2, 2, 16, 8, dtype=I8), value=torch.zeros(2, 2, 16, 6, dtype=I8)),
     ValueError, "key_scale"),
    ("scales of half precision", lambda: replace(dense(kv_dtype=I8), key_scale=torch.zeros(2, 2, 16).half()),
     ValueError, "key_scale"),
    ("floating lengths", storage(lengths=torch.zeros(2)), ValueError, "lengths"),
    ("lengths of another batch", storage(lengths=torch.zeros(3).int()), ValueError, "lengths"),
    ("strided lengths", storage(lengths=torch.zeros(2, 2).int()[:, 0]), ValueError, "lengths"),
    ("lengths on another device", storage(lengths=torch.zeros(2, device="meta").int()), ValueError, "lengths.device"),
    ("block table of int64", lambda: replace(paged(), block_table=torch.zeros(2, 4).long()), ValueError, "block_table"),
    ("block table of 1 dim", lambda: replace(paged(), block_table=torch.zeros(4).int()), ValueError, "block_table"),
    ("no pages", lambda: PagedKVCache.allocate(torch.zeros(2, 4).int(), 0, 2, 4, 8), ValueError, "key"),
    ("head dim 0", lambda: KVCache.allocate(2, 2, 4, 0), ValueError, "head_dim"),
    ("storage finer than the query", lambda: KVCache.allocate(2, 2, 4, 8, 8, F16, F32), ValueError, "kv_dtype"),
    ("float8 of the other kind", lambda: KVCache.allocate(2, 2, 4, 8, kv_dtype=E5M2), ValueError, "kv_dtype"),
]  # fmt: skip


@pytest.mark.parametrize(("make_call", "error", "name"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS])
def test_malformed(make_call: Callable[[], Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=rf"(^|\s){name}"):
        make_call()


@pytest.mark.parametrize("cache", [dense(16), paged(16)], ids=["dense", "paged"])
def test_nothing_is_lost_where_there_is_no_room(cache: Cache) -> None:
    cache.key.fill_(1.0)
    cache.value.fill_(2.0)
    with pytest.raises(ArgumentError, match="16 tokens and 1 new ones.*the capacity, 16"):
        decode_attention(Q, cache, K, V)
    assert (cache.key == 1.0).all() and (cache.value == 2.0).all() and (cache.lengths == 16).all()
