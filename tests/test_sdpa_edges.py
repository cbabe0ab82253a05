"""What `scaled_dot_product_attention` accepts beyond dense 4-D tensors, and its results where PyTorch has several."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.overrides import TorchFunctionMode

from fused_attention import scaled_dot_product_attention, use_backend

pytestmark = [
    pytest.mark.fast,
    pytest.mark.filterwarnings("ignore:Lower right causal bias"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]
torch_sdpa = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def _kernels_on_poisoned_memory(poison: None) -> Iterator[None]:
    torch.manual_seed(0)
    with use_backend("cpu", strict=True):
        yield


def r(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def same(*args: Any, **options: Any) -> None:
    """Equal to PyTorch in float64, values and gradients."""
    sides = []
    for function in (scaled_dot_product_attention, torch_sdpa):
        leaves = [a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        out = function(*leaves, **options)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
        wanted = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
        sides.append((out, *torch.autograd.grad(out, wanted, weights)))
    for ours, theirs in zip(*sides, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 2, 3), (2, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_rank(lead: tuple[int, ...], causal: bool) -> None:
    same(r(*lead, 5, 8), r(*lead, 7, 8), r(*lead, 7, 4), is_causal=causal)


BROADCASTS = {
    "keys over batch": ((2, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 8)),
    "keys over heads": ((2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
    "query over batch": ((1, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    "query over heads": ((2, 1, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    "key over heads, value not": ((2, 3, 5, 8), (2, 1, 7, 8), (2, 3, 7, 8)),
    "value over heads, key not": ((2, 3, 5, 8), (2, 3, 7, 8), (1, 1, 7, 8)),
    "only value": ((1, 1, 5, 8), (1, 1, 7, 8), (2, 3, 7, 8)),
    "ranks 3 and 4": ((3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    "ranks 2 and 4": ((5, 8), (2, 3, 7, 8), (7, 8)),
    "rank 5": ((2, 3, 4, 5, 8), (1, 3, 1, 7, 8), (3, 4, 7, 8)),
}


@pytest.mark.parametrize("name", BROADCASTS)
def test_broadcast(name: str) -> None:
    same(*(r(*s) for s in BROADCASTS[name]))


@pytest.mark.parametrize(
    "heads", [(4, 2, 2), (4, 1, 1), (4, 4, 2), (12, 4, 6), (12, 6, 4), (6, 2, 3), (4, 2, 1)], ids=str
)
@pytest.mark.parametrize("lead", [(), (2,), (2, 2)], ids=str)
def test_grouped_heads(heads: tuple[int, int, int], lead: tuple[int, ...]) -> None:
    hq, hk, hv = heads
    same(r(*lead, hq, 5, 8), r(*lead, hk, 7, 8), r(*lead, hv, 7, 8), r(5, 7), enable_gqa=True)


MASKS: dict[tuple[int, ...], tuple[int, ...]] = {
    (5, 7): (4, 2, 3), (1, 7): (4, 2, 3), (3, 5, 7): (4, 2, 3), (2, 3, 1, 7): (4, 2, 3), (2, 1, 5, 7): (4, 2, 3),
    (4, 1, 1, 5, 7): (4, 2, 3), (1, 1, 1, 1, 7): (4, 2, 3), (4, 2, 3, 5, 7): (4, 2, 3), (1, 2, 1, 5, 1): (4, 2, 3),
    (7,): (3,), (3, 1, 7): (3,), (1, 5, 7): (3,), (5, 1): (),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_mask_of_any_rank(shape: tuple[int, ...], kind: str) -> None:
    lead = MASKS[shape]
    mask = r(*shape)
    same(r(*lead, 5, 8), r(*lead, 7, 8), r(*lead, 7, 8), mask > -1.0 if kind == "bool" else mask)


def test_mask_of_one_or_no_dimension() -> None:
    """PyTorch takes them on one of its paths only."""
    q, k, v, mask = r(2, 3, 5, 8), r(2, 3, 7, 8), r(2, 3, 7, 8), r(7)
    expected = scaled_dot_product_attention(q, k, v, mask.expand(2, 3, 5, 7))
    assert torch.equal(scaled_dot_product_attention(q, k, v, mask), expected)
    unmasked = scaled_dot_product_attention(q, k, v)
    assert torch.equal(scaled_dot_product_attention(q, k, v, torch.tensor(True)), unmasked)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_mask_and_causal_both_apply(kind: str) -> None:
    q, k, v = r(2, 3, 5, 8), r(2, 3, 7, 8), r(2, 3, 7, 8)
    mask = torch.rand(2, 1, 5, 7) > 0.3 if kind == "bool" else r(2, 1, 5, 7)
    lower = torch.ones(5, 7, dtype=torch.bool).tril()
    both = mask & lower if kind == "bool" else mask.masked_fill(~lower, float("-inf"))
    ours = scaled_dot_product_attention(q, k, v, mask, is_causal=True)
    torch.testing.assert_close(ours, torch_sdpa(q, k, v, both).nan_to_num())


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_causal_with_a_scale_that_is_not_positive(scale: float) -> None:
    """PyTorch's fused CPU kernel multiplies its -inf by the scale and answers NaN."""
    q, k, v = r(2, 3, 5, 8), r(2, 3, 7, 8), r(2, 3, 7, 8)
    ours = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    lower = torch.ones(5, 7, dtype=torch.bool).tril()
    torch.testing.assert_close(ours, torch_sdpa(q, k, v, lower, scale=scale))


@pytest.mark.parametrize("sizes", [(5, 7), (7, 5), (5, 5), (1, 7)], ids=str)
@pytest.mark.parametrize("alignment", [causal_upper_left, causal_lower_right])
def test_causal_bias(alignment: Any, sizes: tuple[int, int]) -> None:
    m, n = sizes
    q, k, v = r(2, 4, m, 8), r(2, 2, n, 8), r(2, 2, n, 8)
    offset = n - m if alignment is causal_lower_right else 0
    mask = torch.ones(m, n, dtype=torch.bool).tril(offset)
    expected = scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)
    ours = scaled_dot_product_attention(q, k, v, alignment(m, n), scale=0.3, enable_gqa=True)
    assert type(ours) is Tensor
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", ["batch", "heads", "rows", "D", "DV", "D and DV"])
@pytest.mark.parametrize("rank", [3, 4])
def test_empty(name: str, rank: int) -> None:
    b, h, m, d, dv = (0 if n in name.split(" and ") else s for n, s in
                      {"batch": 2, "heads": 3, "rows": 5, "D": 8, "DV": 8}.items())  # fmt: skip
    lead = (b, h)[4 - rank :]
    same(r(*lead, m, d), r(*lead, 7, d), r(*lead, 7, dv))


def test_no_keys_give_zeros() -> None:
    q = r(2, 3, 5, 8).requires_grad_()
    out = scaled_dot_product_attention(q, r(2, 3, 0, 8), r(2, 3, 0, 6))
    assert torch.equal(out, torch.zeros(2, 3, 5, 6, dtype=q.dtype))
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert torch.equal(grad, torch.zeros_like(q))


def test_dropout() -> None:
    q, k, v = r(2, 3, 40, 8), r(2, 3, 50, 8), r(2, 3, 50, 8)
    assert torch.equal(scaled_dot_product_attention(q, k, v, dropout_p=1.0), torch.zeros_like(q))
    torch.manual_seed(3)
    first = scaled_dot_product_attention(q, k, v, dropout_p=0.4)
    second = scaled_dot_product_attention(q, k, v, dropout_p=0.4)
    torch.manual_seed(3)
    again = scaled_dot_product_attention(q, k, v, dropout_p=0.4)
    assert torch.equal(first, again) and not torch.equal(first, second)
    expected = scaled_dot_product_attention(q, k, v)
    for number in (0, True, torch.tensor(0.0)):
        out = scaled_dot_product_attention(q, k, v, dropout_p=number)  # type: ignore[arg-type]
        assert torch.equal(out, torch.zeros_like(q) if number is True else expected)


def test_dead_rows_give_zeros_and_zero_gradients() -> None:
    q, k, v = (r(2, 3, 33, 16).requires_grad_() for _ in range(3))
    mask = torch.ones(33, 33, dtype=torch.bool)
    mask[::5] = False
    for dead in (mask, torch.zeros(33, 33).masked_fill(~mask, float("-inf"))):
        out = scaled_dot_product_attention(q, k, v, dead)
        assert torch.equal(out[:, :, ::5], torch.zeros(2, 3, 7, 16, dtype=q.dtype))
        grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        assert all(g.isfinite().all() for g in grads) and not grads[0][:, :, ::5].any()


def test_a_row_of_finfo_min_averages() -> None:
    q, k, v = r(2, 3, 5, 8), r(2, 3, 7, 8), r(2, 3, 7, 8)
    mask = torch.full((5, 7), torch.finfo(torch.float64).min, dtype=torch.float64)
    out = scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3)], ids=str)
def test_layout_follows_the_query(order: tuple[int, ...]) -> None:
    inverse = [order.index(i) for i in range(4)]
    q, k, v = (torch.randn([(2, 3, 5, 8)[i] for i in order]).permute(inverse) for _ in range(3))
    assert scaled_dot_product_attention(q, k, v).stride() == torch_sdpa(q, k, v).stride()


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_autocast(cast: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    half = torch.float16 if cast is torch.bfloat16 else torch.bfloat16
    with torch.autocast("cpu", dtype=cast):
        for args in ((q, k, v), (q, k.to(half), v.to(cast)), (q.to(half), k, v)):
            assert scaled_dot_product_attention(*args).dtype == torch_sdpa(*args).dtype == cast
        for mask in (torch.randn(5, 5), torch.randn(5, 5).to(half), torch.ones(5, 5, dtype=torch.bool)):
            out, theirs = scaled_dot_product_attention(q, k, v, mask), torch_sdpa(q, k, v, mask)
            assert out.dtype == cast
            torch.testing.assert_close(out, theirs, rtol=0.03, atol=0.03)
        assert scaled_dot_product_attention(q.double(), k.double(), v.double()).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_zero_gradient(dtype: torch.dtype) -> None:
    """The softmax does not see a constant: a mask that is one number for each row has the gradient zero."""
    q, k, v = (torch.randn(2, 3, 33, 16).to(dtype).requires_grad_() for _ in range(3))
    for shape in ((1, 1, 33, 1), (2, 3, 33, 1), (1, 1, 1, 1)):
        mask = torch.randn(shape).to(dtype).requires_grad_()
        out = scaled_dot_product_attention(q, k, v, mask)
        dout = torch.randn_like(out)
        (grad,) = torch.autograd.grad(out, mask, dout)
        # The terms of a row add up to at most |dO| |V|, each rounded once.
        terms = float((dout.norm(dim=-1) * v.detach().norm(dim=-1).max()).double().sum()) / mask.numel()
        assert float(grad.abs().max()) <= torch.finfo(dtype).eps * terms


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_nested(layout: torch.layout, causal: bool) -> None:
    lengths = (3, 5, 1)
    parts = [r(4, n, 8).requires_grad_() for n in lengths]  # [H, n, D]
    if layout == torch.jagged:
        rows_first = [p.transpose(0, 1) for p in parts]
        nested = torch.nested.as_nested_tensor(rows_first, layout=layout).transpose(1, 2)
    else:
        nested = torch.nested.as_nested_tensor(parts, layout=layout)
    out = scaled_dot_product_attention(nested, nested, nested, is_causal=causal)
    assert out.is_nested and out.layout == layout
    got = torch.autograd.grad(sum(o.square().sum() for o in out.unbind()), parts)
    for i, part in enumerate(parts):
        alone = scaled_dot_product_attention(part, part, part, is_causal=causal)
        torch.testing.assert_close(out.unbind()[i], alone)
        torch.testing.assert_close(got[i], torch.autograd.grad(alone.square().sum(), part)[0])


class _Marked(Tensor):
    """A subclass with PyTorch's own handling."""


class _Recorder:
    """A tensor-like class of somebody else's."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func, args, kwargs


def test_torch_function_protocol() -> None:
    q = r(2, 3, 5, 8)
    assert type(scaled_dot_product_attention(q.as_subclass(_Marked), q, q)) is _Marked
    theirs: Any = _Recorder()
    for arguments in ((theirs, q, q), (q, theirs, q), (q, q, theirs), (q, q, q, theirs)):
        func, args, kwargs = scaled_dot_product_attention(*arguments, scale=2.0)
        assert func is scaled_dot_product_attention and len(args) == 3 and kwargs["scale"] == 2.0
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        out = scaled_dot_product_attention(q, q, q, causal_lower_right(5, 5))
    assert seen.count(scaled_dot_product_attention) == 1
    torch.testing.assert_close(out, scaled_dot_product_attention(q, q, q, is_causal=True))


@pytest.mark.parametrize("name", ["plain", "causal", "mask", "bias", "gqa", "rank 3", "rank 5"])
def test_compiles_without_graph_break(name: str) -> None:
    torch._dynamo.reset()
    q, k, v = r(2, 4, 5, 8), r(2, 4, 7, 8), r(2, 4, 7, 8)
    options: dict[str, Any] = {
        "causal": {"is_causal": True, "scale": 0.3},
        "mask": {"attn_mask": r(5, 7)},
        "bias": {"attn_mask": causal_lower_right(5, 7)},
        "gqa": {"enable_gqa": True},
    }.get(name, {})
    if name == "gqa":
        k, v = k[:, :2], v[:, :1]
    if name.startswith("rank"):
        q, k, v = (t[0] if name == "rank 3" else t[None] for t in (q, k, v))
    compiled = torch.compile(scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out, expected = compiled(*leaves, **options), scaled_dot_product_attention(*leaves, **options)
    torch.testing.assert_close(out, expected)
    for a, b in zip(*(torch.autograd.grad(o.square().sum(), leaves) for o in (out, expected)), strict=True):
        torch.testing.assert_close(a, b)
