"""The two textbook modules against the code that introductions print."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import fused_attention.nn as fused

from .numerics import assert_close

pytestmark = pytest.mark.filterwarnings("error::fused_attention.FallbackWarning")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [(3, 33, 24, 16), (1, 1, 5, 3), (2, 113, 64, 64)]  # batch, length, input_dim, d_k


def naive_single(m: nn.Module, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(Q K^T / sqrt(d_k)) V, in the dtype of x."""
    q, k, v = m.W_q(x), m.W_k(x), m.W_v(x)
    return _weights(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, mask, causal) @ v


def naive_multi(m: nn.Module, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    q, k, v = (t.unflatten(-1, (m.num_heads, -1)).transpose(1, 2) for t in m.qkv_proj(x).chunk(3, -1))
    p = _weights(q @ k.transpose(-2, -1) / m.head_dim**0.5, mask, causal)
    return m.out_proj((p @ v).transpose(1, 2).flatten(-2))


def _weights(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, -1)


def check(module: nn.Module, x: Tensor, naive: object, **options: object) -> None:
    """Output and all gradients by the rule, against the naive formula in float64 and in the tested dtype."""
    wide = copy.deepcopy(module).double()
    results = []
    for m, dtype, call in ((module, x.dtype, None), (module, x.dtype, naive), (wide, torch.float64, naive)):
        m.zero_grad()
        leaf = x.detach().to(dtype).requires_grad_()
        cast = {n: o.to(dtype) if isinstance(o, Tensor) and o.is_floating_point() else o for n, o in options.items()}
        out = m(leaf, **cast) if call is None else call(m, leaf, **cast)  # type: ignore[operator]
        torch.manual_seed(9)
        (out * torch.randn(out.shape, dtype=torch.float64).to(x.dtype)).sum().backward()
        grads = {n: p.grad for n, p in m.named_parameters()} | {"x": leaf.grad}
        results.append({"output": out} | {f"gradient of {n}": g.clone() for n, g in grads.items()})
    got, same, ref = results
    for name, value in got.items():
        if name == "gradient of W_k.bias":  # a constant added to all scores of a row: zero but for rounding
            assert value.abs().max() <= 100 * torch.finfo(x.dtype).eps
            continue
        if name == "gradient of qkv_proj.bias":  # so are its middle third
            n = value.numel() // 3
            value, same[name], ref[name] = (torch.cat([t[:n], t[2 * n :]]) for t in (value, same[name], ref[name]))
        assert value.dtype == x.dtype
        if x.dtype == torch.float64:  # of which there is no wider type to measure with
            torch.testing.assert_close(value, ref[name], rtol=1e-11, atol=1e-12)
            continue
        assert_close(value, same[name], ref[name], grad="gradient" in name, name=name)


@pytest.mark.fast
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [None, "bool", "float"])
def test_self_attention_is_the_formula(dtype: torch.dtype, causal: bool, masked: str | None) -> None:
    torch.manual_seed(0)
    batch, length, input_dim, d_k = SIZES[0]
    mask = torch.rand(length, length) < 0.7
    mask.fill_diagonal_(True)
    given = {None: None, "bool": mask, "float": torch.randn(batch, length, length).to(dtype)}[masked]
    module = fused.SelfAttention(input_dim, d_k).to(dtype)
    check(module, torch.randn(batch, length, input_dim).to(dtype), naive_single, mask=given, causal=causal)


@pytest.mark.fast
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [None, "bool", "float"])
def test_multi_head_attention_is_the_formula(dtype: torch.dtype, causal: bool, masked: str | None) -> None:
    torch.manual_seed(0)
    batch, length, width, heads = 3, 33, 24, 4
    mask = torch.rand(batch, 1, 1, length) < 0.7
    mask[..., 0] = True
    given = {None: None, "bool": mask, "float": torch.randn(heads, length, length).to(dtype)}[masked]
    module = fused.MultiHeadAttention(width, heads).to(dtype)
    check(module, torch.randn(batch, length, width).to(dtype), naive_multi, mask=given, causal=causal)


@pytest.mark.fast
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_shapes_and_float32_equality(size: tuple[int, int, int, int]) -> None:
    torch.manual_seed(0)
    batch, length, input_dim, d_k = size
    x = torch.randn(batch, length, input_dim)
    one = fused.SelfAttention(input_dim, d_k)
    assert one(x).shape == (batch, length, d_k)
    torch.testing.assert_close(one(x), naive_single(one, x))
    for shaped in (x[0], x[None], x[:, None].expand(-1, 2, -1, -1)):  # any leading dimensions
        torch.testing.assert_close(one(shaped), naive_single(one, shaped))
    many = fused.MultiHeadAttention(input_dim, 1)
    assert many(x).shape == x.shape
    torch.testing.assert_close(many(x), naive_multi(many, x))


@pytest.mark.fast
def test_parameters_have_the_textbook_names_and_initialisation() -> None:
    one = {"W_q": (16, 24), "W_k": (16, 24), "W_v": (16, 24)}
    many = {"qkv_proj": (72, 24), "out_proj": (24, 24)}
    for make, shapes in ((lambda: fused.SelfAttention(24, 16), one), (lambda: fused.MultiHeadAttention(24, 4), many)):
        torch.manual_seed(5)
        module = make()
        torch.manual_seed(5)
        expected = nn.ModuleDict({n: nn.Linear(s[1], s[0]) for n, s in shapes.items()})
        assert list(module.state_dict()) == list(expected.state_dict())
        for name, value in expected.state_dict().items():
            assert torch.equal(module.state_dict()[name], value), name


@pytest.mark.fast
@pytest.mark.parametrize(("width", "heads"), [(10, 3), (8, 0), (0, 1), (-4, 2), (4, 8)])
def test_width_that_heads_do_not_divide(width: int, heads: int) -> None:
    with pytest.raises(ValueError, match="divisible"):
        fused.MultiHeadAttention(width, heads)


@pytest.mark.fast
@pytest.mark.parametrize("make", [lambda: fused.SelfAttention(8, 4), lambda: fused.MultiHeadAttention(8, 2)])
def test_copies_empty_input_and_autocast(make: object) -> None:
    module = make()  # type: ignore[operator]
    x = torch.randn(2, 5, 8)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
    assert module(x[:0]).shape[:2] == (0, 5) and module(x[:, :0]).shape[:2] == (2, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x).dtype == torch.bfloat16


@pytest.mark.parametrize("make", [lambda: fused.SelfAttention(8, 4), lambda: fused.MultiHeadAttention(8, 2)])
def test_compiled(make: object) -> None:
    module = make()  # type: ignore[operator]
    x = torch.randn(2, 5, 8)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
