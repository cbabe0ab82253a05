"""Padded, packed and nested: the ways between them, and attention on each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attention as fa

pytestmark = [
    pytest.mark.fast,
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("error::fused_attention.FallbackWarning"),
]

LENGTHS = [[5, 0, 9, 1], [9], [0, 0], [3, 3, 3], []]
JAGGED, STRIDED = torch.jagged, torch.strided


def _left(lengths: list[int], longest: int) -> Tensor:
    """bool [B, S]: padding stands before the tokens."""
    return torch.arange(longest) >= longest - torch.tensor(lengths, dtype=torch.long)[:, None]


# --- padded and packed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rest", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_right_padded_round_trip(lengths: list[int], rest: tuple[int, ...]) -> None:
    padded = torch.randn(len(lengths), 9, *rest)
    parts = [row[:n] for row, n in zip(padded, lengths, strict=True)]
    for dtype in (torch.int64, torch.int32):
        packed = fa.pack_padded(padded, torch.tensor(lengths, dtype=dtype))
        assert torch.equal(packed.values, torch.cat(parts) if parts else padded.flatten(0, 1))
        assert packed.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        assert packed.max_length == max(lengths, default=0)
    back = fa.unpack_padded(packed.values, packed.cu_seqlens, 9)
    for row, original, n in zip(back, padded, lengths, strict=True):
        assert torch.equal(row[:n], original[:n]) and not row[n:].any()
    assert fa.unpack_padded(packed.values, packed.cu_seqlens.int()).shape[1] == max(lengths, default=0)


@pytest.mark.parametrize("kind", ["left", "holes"])
def test_padding_anywhere(kind: str) -> None:
    torch.manual_seed(0)
    valid = _left([5, 0, 9, 1], 9) if kind == "left" else torch.rand(4, 9) > 0.5
    padded = torch.randn(4, 9, 2, 3)
    packed = fa.pack_padded(padded, valid=valid)
    assert torch.equal(packed.values, padded[valid]) and packed.max_length == int(valid.sum(1).max())
    back = fa.unpack_padded(packed.values, packed.cu_seqlens, valid=valid)
    assert torch.equal(back[valid], padded[valid]) and not back[~valid].any()


def test_strides_dtypes_and_gradients() -> None:
    lengths = torch.tensor([4, 0, 6])
    heads_first = torch.randn(3, 2, 6, 5)
    packed = fa.pack_padded(heads_first.transpose(1, 2), lengths)
    assert torch.equal(packed.values[:4], heads_first[0, :, :4].transpose(0, 1))
    assert fa.pack_padded(torch.arange(18).view(3, 6), lengths).values.tolist() == [0, 1, 2, 3, *range(12, 18)]
    x = torch.randn(3, 6, 2, dtype=torch.float64, requires_grad=True)

    def there_and_back(x: Tensor) -> Tensor:
        values, starts, _ = fa.pack_padded(x.sin(), lengths)
        return fa.unpack_padded(values.exp(), starts, 7)

    assert torch.autograd.gradcheck(there_and_back, (x,))


def test_packed_attention_is_padded_attention() -> None:
    lengths = torch.tensor([7, 0, 12, 3])
    q, k, v = (torch.randn(4, 12, h, 8, requires_grad=True) for h in (4, 2, 2))  # [B, S, H, D], as projected
    packed = [fa.pack_padded(t, lengths) for t in (q, k, v)]
    starts = packed[0].cu_seqlens
    out = fa.varlen_attention(*(p.values for p in packed), starts, starts, max_seqlen_q=12, causal="top_left")
    out = fa.unpack_padded(out, starts)
    valid = torch.arange(12) < lengths[:, None]
    expected = fa.attention(*(t.transpose(1, 2) for t in (q, k, v)), key_lengths=lengths, causal="top_left")
    expected = expected.transpose(1, 2).masked_fill(~valid[..., None, None], 0.0)
    torch.testing.assert_close(out, expected)
    g = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, (q, k, v), g), torch.autograd.grad(expected, (q, k, v), g), strict=True):
        torch.testing.assert_close(a, b)


# --- nested ---------------------------------------------------------------------------------------------------------


def nested(sequences: list[Tensor], layout: torch.layout) -> Tensor:
    """[B, H, *, D] of sequences [S, H, D]; differentiable."""
    made = torch.nested.as_nested_tensor(sequences, layout=layout)
    return made.transpose(1, 2)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal-window": {"causal": "bottom_right", "window": (3, 0)},
    "everything": {
        "causal": "top_left",
        "softcap": 3.0,
        "scale": 0.2,
        "sinks": torch.randn(4),
        "alibi_slopes": torch.rand(3, 4),
        "batch_invariant": True,
    },
}


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("layout", [JAGGED, STRIDED], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_nested_attention(name: str, layout: torch.layout, cross: bool) -> None:
    torch.manual_seed(0)
    rows, keys = [5, 1, 9], [7, 3, 2] if cross else [5, 1, 9]
    parts = [[torch.randn(n, h, d, requires_grad=True) for n in ns]
             for ns, h, d in ((rows, 4, 8), (keys, 2, 8), (keys, 2, 6))]  # fmt: skip
    q, k, v = (nested(p, layout) for p in parts)
    options = OPTIONS[name]
    out = fa.attention(q, k, v, return_lse=True, **options)
    assert out.output.is_nested and out.output.layout == layout and out.weights is None and out.lse is not None
    alone = fa.attention(q, k, v, **options)
    leaves = [t for p in parts for t in p]
    total, expected_total = torch.zeros(()), torch.zeros(())
    for b, (o, lse, a) in enumerate(zip(out.output.unbind(), out.lse.unbind(), alone.unbind(), strict=True)):
        slopes = options["alibi_slopes"][b] if "alibi_slopes" in options else None
        one = [p[b].transpose(0, 1)[None] for p in parts]
        expected = fa.attention(*one, return_lse=True, **options | {"alibi_slopes": slopes})
        assert expected.lse is not None
        torch.testing.assert_close(o, expected.output[0])
        torch.testing.assert_close(lse, expected.lse[0])
        assert torch.equal(a, o)
        g = torch.randn_like(o)
        total, expected_total = total + (o * g).sum(), expected_total + (expected.output[0] * g).sum()
    for x, y in zip(torch.autograd.grad(total, leaves), torch.autograd.grad(expected_total, leaves), strict=True):
        torch.testing.assert_close(x, y)


def test_nested_result_adds_to_the_query_and_holes_are_closed() -> None:
    values, offsets = torch.randn(12, 4, 8), torch.tensor([0, 5, 6, 12])
    q = torch.nested.nested_tensor_from_jagged(values, offsets=offsets).transpose(1, 2)
    assert (fa.attention(q, q, q) + q).is_nested
    holes = torch.nested.nested_tensor_from_jagged(values, offsets=offsets, lengths=torch.tensor([3, 1, 4]))
    out = fa.attention(*(holes.transpose(1, 2),) * 3)
    for o, start, n in zip(out.unbind(), (0, 5, 6), (3, 1, 4), strict=True):
        one = values[start : start + n].transpose(0, 1)[None]
        torch.testing.assert_close(o, fa.attention(one, one, one)[0])


def test_explain_of_a_nested_call() -> None:
    q = nested([torch.randn(n, 4, 8) for n in (5, 1)], JAGGED)
    found = fa.explain(q, q, q, causal="top_left")
    assert found.spec.packed and found.backend == "cpu" and found.spec.rows == 5
    with pytest.raises(fa.ArgumentError, match="^mask"):
        fa.explain(q, q, q, mask=torch.ones(1))


# --- malformed ------------------------------------------------------------------------------------------------------

P, V, C = torch.zeros(2, 5, 3), torch.zeros(7, 3), torch.tensor([0, 3, 7])
VALID = torch.ones(2, 5, dtype=torch.bool)
N = nested([torch.zeros(3, 4, 8), torch.zeros(5, 4, 8)], JAGGED)
OTHER = nested([torch.zeros(4, 4, 8), torch.zeros(4, 4, 8)], JAGGED)
MORE = nested([torch.zeros(3, 4, 8)] * 3, JAGGED)
DENSE = torch.zeros(2, 4, 5, 8)


def pack(*tensors: Any, **given: Any) -> Callable[[], Any]:
    return lambda: fa.pack_padded(*tensors, **given)


def unpack(*tensors: Any, **given: Any) -> Callable[[], Any]:
    return lambda: fa.unpack_padded(*tensors, **given)


def attend(*tensors: Any, **given: Any) -> Callable[[], Any]:
    return lambda: fa.attention(*tensors, **given)


CALLS: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("no lengths", pack(P), ValueError, "lengths"),
    ("lengths and valid", pack(P, C[:2], valid=VALID), ValueError, "lengths"),
    ("padded is a list", pack([P], C), TypeError, "padded"),
    ("padded of 1 dim", pack(P[0, 0], C), ValueError, "padded"),
    ("padded is nested", pack(N, C), ValueError, "padded.layout"),
    ("lengths of another batch", pack(P, C), ValueError, "lengths"),
    ("lengths are a list", pack(P, [1, 2]), TypeError, "lengths"),
    ("floating lengths", pack(P, torch.ones(2)), ValueError, "lengths.dtype"),
    ("negative length", pack(P, torch.tensor([-1, 2])), ValueError, "lengths"),
    ("length past the end", pack(P, torch.tensor([6, 2])), ValueError, "lengths"),
    ("lengths elsewhere", pack(P, torch.ones(2, device="meta").long()), ValueError, "lengths.device"),
    ("valid is a number", pack(P, valid=1), TypeError, "valid"),
    ("integer valid", pack(P, valid=VALID.long()), ValueError, "valid.dtype"),
    ("valid of another length", pack(P, valid=VALID[:, :4]), ValueError, "valid"),
    ("valid elsewhere", pack(P, valid=VALID.to("meta")), ValueError, "valid.device"),
    ("values are a number", unpack(3.0, C), TypeError, "values"),
    ("values are a scalar", unpack(torch.tensor(1.0), C), ValueError, "values"),
    ("offsets are a list", unpack(V, [0, 7]), TypeError, "cu_seqlens"),
    ("floating offsets", unpack(V, C.float()), ValueError, "cu_seqlens.dtype"),
    ("offsets of 2 dims", unpack(V, C[None]), ValueError, "cu_seqlens"),
    ("no offsets", unpack(V, C[:0]), ValueError, "cu_seqlens"),
    ("offsets that fall", unpack(V, torch.tensor([0, 8, 7])), ValueError, "cu_seqlens"),
    ("offsets that stop early", unpack(V, C[:2]), ValueError, "cu_seqlens"),
    ("offsets elsewhere", unpack(V, C.to("meta")), ValueError, "cu_seqlens.device"),
    ("too short", unpack(V, C, 3), ValueError, "length"),
    ("length is a float", unpack(V, C, 9.0), TypeError, "length"),
    ("length beside valid", unpack(V, C, 9, valid=VALID), ValueError, "length"),
    ("other tokens", unpack(V, C, valid=VALID), ValueError, "valid"),
    ("another batch", unpack(V, C, valid=VALID[:1]), ValueError, "valid"),
    (
        "as many tokens in other sequences",
        unpack(V, C, valid=torch.arange(5) < torch.tensor([[4], [3]])),
        ValueError,
        "valid",
    ),
    ("nested beside dense", attend(N, DENSE, DENSE), ValueError, "key"),
    ("dense beside nested", attend(DENSE, N, N), ValueError, "query"),
    ("nested beside None", attend(N, N, None), TypeError, "value"),
    ("nested of 3 dims", attend(*(torch.nested.nested_tensor([P[0]], layout=JAGGED),) * 3), ValueError, "query"),
    ("lengths in another place", attend(*(N.transpose(1, 2),) * 3), ValueError, "query"),
    ("values of other lengths", attend(N, N, OTHER), ValueError, "value"),
    ("keys of another batch", attend(N, MORE, MORE), ValueError, "key"),
    ("nested with a mask", attend(N, N, N, mask=torch.ones(5, 5)), ValueError, "mask"),
    ("nested with a bias", attend(N, N, N, bias=torch.ones(5, 5)), ValueError, "bias"),
    ("nested with lengths", attend(N, N, N, key_lengths=C[:2]), ValueError, "key_lengths"),
    ("nested with weights", attend(N, N, N, return_weights="mean"), ValueError, "return_weights"),
    ("packed of nested", lambda: fa.varlen_attention(N, N, N, C, C), ValueError, "query"),
]


@pytest.mark.parametrize(("make", "error", "name"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS])
def test_malformed(make: Callable[[], Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value).startswith(f"{name}:")
    assert type(caught.value) in (fa.ArgumentError, TypeError)
