"""Malformed calls: each raises a ValueError or TypeError that names the argument, and none reaches a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fused_attention as fa
from fused_attention.dispatch import BACKENDS

pytestmark = pytest.mark.fast

Q, K, V = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8), torch.zeros(2, 2, 7, 6)
P = torch.zeros(10, 4, 8)  # packed
NAN = float("nan")
MAP = torch.ones(1, 1, 3, 2, dtype=torch.bool)  # blocks of 2 rows and 4 keys
NESTED = [torch.nested.nested_tensor([torch.zeros(4, n, 8) for n in (3, 5)], layout=torch.jagged) for _ in range(3)]


def call(*tensors: Any, **options: Any) -> Callable[[], Any]:
    q, k, v = (*tensors, *(Q, K, V)[len(tensors) :])
    return lambda: fa.attention(q, k, v, **options)


def packed(q: Any, k: Any, starts_q: Any, starts_k: Any, **options: Any) -> Callable[[], Any]:
    return lambda: fa.varlen_attention(q, k, k, starts_q, starts_k, **options)


def offsets(*values: int) -> torch.Tensor:
    return torch.tensor(values)


CALLS: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("query is a list", call([1.0]), TypeError, "query"),
    ("key is None", call(Q, None), TypeError, "key"),
    ("value is an array", call(Q, K, V.numpy()), TypeError, "value"),
    ("query of 3 dims", call(Q[0]), ValueError, "query"),
    ("key of 5 dims", call(Q, K[None]), ValueError, "key"),
    ("integer query", call(Q.long()), ValueError, "query.dtype"),
    ("complex value", call(Q, K, V.to(torch.complex64)), ValueError, "value.dtype"),
    ("key in another dtype", call(Q, K.half()), ValueError, "key.dtype"),
    ("value in another dtype", call(Q, K, V.double()), ValueError, "value.dtype"),
    ("key on another device", call(Q, K.to("meta")), ValueError, "key.device"),
    ("sparse query", call(Q.to_sparse()), ValueError, "query.layout"),
    ("key of another batch", call(Q, K[:1]), ValueError, "key"),
    ("value of another batch", call(Q, K, V[:1]), ValueError, "value"),
    ("key of another head dim", call(Q, K[..., :7]), ValueError, "key"),
    ("heads that do not divide", call(Q, torch.zeros(2, 3, 7, 8), torch.zeros(2, 3, 7, 6)), ValueError, "key"),
    ("value of other heads", call(Q, K, V[:, :1]), ValueError, "value"),
    ("value of another length", call(Q, K, V[:, :, :6]), ValueError, "value"),
    ("head dim 0", call(Q[..., :0], K[..., :0]), ValueError, "query"),
    ("no key heads", call(Q, K[:, :0], V[:, :0]), ValueError, "key"),
    ("mask of another length", call(mask=torch.ones(5, 8, dtype=torch.bool)), ValueError, "mask"),
    ("mask of 5 dims", call(mask=torch.ones(1, 2, 4, 5, 7, dtype=torch.bool)), ValueError, "mask"),
    ("integer mask", call(mask=torch.ones(5, 7, dtype=torch.int32)), ValueError, "mask.dtype"),
    ("mask is a bool", call(mask=True), TypeError, "mask"),
    ("mask on another device", call(mask=torch.ones(5, 7, device="meta")), ValueError, "mask.device"),
    ("bool bias", call(bias=torch.ones(5, 7, dtype=torch.bool)), ValueError, "bias.dtype"),
    ("bias of other heads", call(bias=torch.ones(3, 5, 7)), ValueError, "bias"),
    ("bias is a number", call(bias=0.5), TypeError, "bias"),
    ("ALiBi slopes of other heads", call(alibi_slopes=torch.ones(3)), ValueError, "alibi_slopes"),
    ("integer ALiBi slopes", call(alibi_slopes=torch.ones(4).long()), ValueError, "alibi_slopes.dtype"),
    ("sinks of other heads", call(sinks=torch.ones(5)), ValueError, "sinks"),
    ("sinks are a list", call(sinks=[0.0] * 4), TypeError, "sinks"),
    ("lengths of another batch", call(key_lengths=torch.tensor([1, 2, 3])), ValueError, "key_lengths"),
    ("length past the end", call(key_lengths=torch.tensor([1, 8])), ValueError, "key_lengths"),
    ("negative length", call(key_lengths=torch.tensor([-1, 3])), ValueError, "key_lengths"),
    ("floating lengths", call(key_lengths=torch.tensor([1.0, 2.0])), ValueError, "key_lengths.dtype"),
    ("lengths are a list", call(key_lengths=[1, 2]), TypeError, "key_lengths"),
    ("block map without a size", call(block_map=MAP), TypeError, "block_size"),
    ("block size without a map", call(block_size=(2, 4)), ValueError, "block_size"),
    ("block size is a number", call(block_map=MAP, block_size=128), TypeError, "block_size"),
    ("block size of three", call(block_map=MAP, block_size=(2, 4, 4)), TypeError, "block_size"),
    ("fractional block size", call(block_map=MAP, block_size=(2.5, 4)), TypeError, "block_size[0] (rows)"),
    ("block of no keys", call(block_map=MAP, block_size=(2, 0)), ValueError, "block_size"),
    ("block map is a list", call(block_map=[[True]], block_size=(2, 4)), TypeError, "block_map"),
    ("floating block map", call(block_map=MAP.float(), block_size=(2, 4)), ValueError, "block_map.dtype"),
    ("block map of another size", call(block_map=MAP, block_size=(2, 2)), ValueError, "block_map"),
    ("block map of other heads", call(block_map=MAP.expand(1, 3, 3, 2), block_size=(2, 4)), ValueError, "block_map"),
    ("block map on another device", call(block_map=MAP.to("meta"), block_size=(2, 4)), ValueError, "block_map.device"),
    (
        "block map of nested tensors",
        lambda: fa.attention(*NESTED, block_map=MAP, block_size=(2, 4)),
        ValueError,
        "block_map",
    ),
    ("unknown alignment", call(causal="lower_right"), ValueError, "causal"),
    ("causal=True has no alignment", call(causal=True), TypeError, "causal"),
    ("negative window", call(window=(-1, 3)), ValueError, "window"),
    ("window of three", call(window=(1, 2, 3)), TypeError, "window"),
    ("window is a number", call(window=128), TypeError, "window"),
    ("fractional window", call(window=(1.5, None)), TypeError, "window"),
    ("softcap 0", call(softcap=0.0), ValueError, "softcap"),
    ("softcap NaN", call(softcap=NAN), ValueError, "softcap"),
    ("softcap is a string", call(softcap="50"), TypeError, "softcap"),
    ("scale NaN", call(scale=NAN), ValueError, "scale"),
    ("scale infinite", call(scale=float("inf")), ValueError, "scale"),
    ("scale is a tensor", call(scale=torch.tensor(1.0)), TypeError, "scale"),
    ("dropout above 1", call(dropout_p=1.1), ValueError, "dropout_p"),
    ("negative dropout", call(dropout_p=-0.1), ValueError, "dropout_p"),
    ("dropout NaN", call(dropout_p=NAN), ValueError, "dropout_p"),
    ("dropout is None", call(dropout_p=None), TypeError, "dropout_p"),
    ("unknown weights", call(return_weights="sum"), ValueError, "return_weights"),
    ("batch_invariant is a number", call(batch_invariant=1), TypeError, "batch_invariant"),
    ("unknown precision", call(precision="fp4"), ValueError, "precision: got 'fp4', expected 'fp8', 'int8' or None"),
    ("precision is a dtype", call(precision=torch.float8_e4m3fn), TypeError, "precision"),
    ("precision is a list", call(precision=["fp8"]), TypeError, "precision"),
    ("unknown keyword", call(is_causal=True), TypeError, "is_causal"),
    ("packed query of 4 dims", packed(Q, P, offsets(0, 10), offsets(0, 10)), ValueError, "query"),
    ("packed, unknown precision", packed(P, P, offsets(0, 10), offsets(0, 10), precision=8), TypeError, "precision"),
    ("offsets that fall", packed(P, P, offsets(0, 7, 5, 10), offsets(0, 3, 6, 10)), ValueError, "cu_seqlens_q"),
    ("offsets past the end", packed(P, P, offsets(0, 11), offsets(0, 10)), ValueError, "cu_seqlens_q"),
    ("offsets that stop early", packed(P, P, offsets(0, 10), offsets(0, 9)), ValueError, "cu_seqlens_k"),
    ("offsets not from 0", packed(P, P, offsets(1, 10), offsets(0, 10)), ValueError, "cu_seqlens_q"),
    ("offsets of other batches", packed(P, P, offsets(0, 10), offsets(0, 5, 10)), ValueError, "cu_seqlens_k"),
    ("floating offsets", packed(P, P, offsets(0, 10).float(), offsets(0, 10)), ValueError, "cu_seqlens_q"),
    ("offsets are a list", packed(P, P, [0, 10], offsets(0, 10)), TypeError, "cu_seqlens_q"),
    ("no offsets", packed(P, P, offsets(), offsets()), ValueError, "cu_seqlens_q"),
    ("max_seqlen too small", packed(P, P, offsets(0, 10), offsets(0, 10), max_seqlen_q=3), ValueError, "max_seqlen_q"),
]


@pytest.mark.parametrize(("make", "error", "name"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS])
def test_malformed_call(
    make: Callable[[], Any], error: type[Exception], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launched(*_: Any, **__: Any) -> None:
        raise AssertionError("a kernel was launched")

    for backend in BACKENDS.values():
        monkeypatch.setattr(backend, "forward", launched)
    with pytest.raises(error) as caught:
        make()
    assert name in str(caught.value)
    assert type(caught.value) in (fa.ArgumentError, TypeError)


def test_there_are_at_least_sixty() -> None:
    assert len(CALLS) >= 60


def test_argument_error_is_what_torch_users_catch() -> None:
    assert issubclass(fa.ArgumentError, ValueError) and issubclass(fa.ArgumentError, RuntimeError)


@pytest.mark.parametrize(("options", "name"), [({"batch_invariant": 1}, "batch_invariant"), ({"causal": []}, "causal")])
def test_a_call_seen_before_does_not_vouch_for_another(options: dict[str, Any], name: str) -> None:
    """True equals 1 where calls are remembered, and a list cannot be looked up there."""
    call(batch_invariant=True)()
    with pytest.raises(TypeError, match=name):
        call(**options)()
