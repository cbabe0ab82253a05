"""`fused_softmax` and `rope_qk_norm`: what they mean, and the kernels by the tolerance rule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_attention as fa
from fused_attention.backends import reference_ops
from fused_attention.backends.reference_ops import Softmax, Tables
from fused_attention.ops import fused_softmax, rope_qk_norm

from .fused_ops_cases import (
    HEADS,
    ROWS,
    Heads,
    Rows,
    check_heads,
    check_rows,
    differentiated,
    draw_heads,
    draw_rows,
    run_heads,
)
from .triton_support import DEVICE, needs_triton

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture
def kernels(poison: None) -> Iterator[None]:
    """Run on the Triton kernels, with NaN in all memory that nobody wrote."""
    with fa.use_backend("triton"):
        yield


def on_kernels(test: Any) -> Any:
    return pytest.mark.triton(needs_triton(pytest.mark.usefixtures("kernels")(test)))


# --- softmax ------------------------------------------------------------------------------------------------------


@on_kernels
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_softmax(case: Rows, dtype: str) -> None:
    check_rows(case, DTYPES[dtype])


@on_kernels
@pytest.mark.parametrize("case", [r for r in ROWS if len(r.shape) == 4], ids=str)
def test_softmax_in_bfloat16(case: Rows) -> None:
    check_rows(case, torch.bfloat16)


def _softmax_variants() -> dict[str, tuple[Tensor, dict[str, Any], Tensor]]:
    """Calls whose result torch's softmax gives."""
    x = torch.randn(2, 3, 5, 7)
    tril = torch.ones(5, 7).tril(2).bool()
    mask = torch.rand(2, 1, 5, 7) > 0.3
    mask[..., 0] = True
    term = torch.randn(7)
    return {
        "plain": (x, {}, F.softmax(x, -1)),
        "scale": (x, {"scale": -2.0}, F.softmax(-2.0 * x, -1)),
        "softcap": (x, {"softcap": 1.5, "scale": 3.0}, F.softmax(1.5 * torch.tanh(3.0 * x / 1.5), -1)),
        "bool": (x, {"mask": mask}, F.softmax(x.masked_fill(~mask, float("-inf")), -1)),
        "float": (x, {"mask": term}, F.softmax(x + term, -1)),
        "causal": (x, {"causal": "bottom_right"}, F.softmax(x.masked_fill(~tril, float("-inf")), -1)),
        "float64": (x.double(), {"mask": term}, F.softmax(x.double() + term, -1)),
    }


@pytest.mark.fast
@pytest.mark.parametrize("name", list(_softmax_variants()))
def test_softmax_means_what_torch_means(name: str) -> None:
    x, options, expected = _softmax_variants()[name]
    y = fused_softmax(x, **options)
    assert y.dtype == x.dtype and y.is_contiguous()
    torch.testing.assert_close(y, expected)


def _dead_rows(x: Tensor) -> None:
    """Row 0 shows nothing and holds NaN: zeros, and zero gradients."""
    mask = torch.ones(3, 1, dtype=torch.bool, device=x.device)
    mask[0] = False
    term = torch.where(mask, 0.0, float("-inf")).requires_grad_()
    for m in (mask, term):
        x = x.detach().index_fill(0, torch.tensor([0], device=x.device), float("nan")).requires_grad_()
        y = fused_softmax(x, m, softcap=2.0)
        assert not y[0].any() and not y.isnan().any()
        y.square().sum().backward()
        assert x.grad is not None and not x.grad[0].any() and not x.grad.isnan().any()
    assert term.grad is not None and not term.grad.isnan().any()


@pytest.mark.fast
def test_dead_rows_of_the_definition() -> None:
    _dead_rows(torch.randn(3, 9))


@on_kernels
def test_dead_rows_of_the_kernels() -> None:
    _dead_rows(torch.randn(3, 9, device=DEVICE))


def _arithmetic(device: str) -> None:
    """Only False and -inf hide: NaN and infinities that are visible are arithmetic, as in torch."""
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[nan, 1.0, 2.0], [inf, 1.0, 2.0], [-inf, 1.0, 2.0], [nan, nan, nan]], device=device)
    torch.testing.assert_close(fused_softmax(x), F.softmax(x, -1), equal_nan=True)
    least = torch.full((2, 3), torch.finfo(torch.float32).min, device=device)
    torch.testing.assert_close(fused_softmax(torch.zeros_like(least), least), torch.full_like(least, 1 / 3))
    assert not fused_softmax(torch.full((2, 3), -inf, device=device)).any()


@pytest.mark.fast
def test_arithmetic_of_the_definition() -> None:
    _arithmetic("cpu")


@on_kernels
def test_arithmetic_of_the_kernels() -> None:
    _arithmetic(DEVICE)


# --- RMS norm and rotary embedding ----------------------------------------------------------------------------------


@on_kernels
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("case", HEADS, ids=str)
def test_rope_norm(case: Heads, dtype: str) -> None:
    check_heads(case, DTYPES[dtype])


@on_kernels
@pytest.mark.parametrize("case", HEADS[:3] + HEADS[-3:], ids=str)
def test_rope_norm_in_bfloat16(case: Heads) -> None:
    check_heads(case, torch.bfloat16)


@pytest.mark.fast
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_that_of_complex_numbers(interleaved: bool) -> None:
    x, angle = torch.randn(2, 3, 5, 10, dtype=torch.float64), torch.rand(5, 4, dtype=torch.float64)
    y, none = rope_qk_norm(x, None, angle.cos(), angle.sin(), interleaved=interleaved)
    assert y is not None and none is None

    def pairs(t: Tensor) -> Tensor:
        a, b = (t[..., 0:8:2], t[..., 1:8:2]) if interleaved else (t[..., :4], t[..., 4:8])
        return torch.complex(a, b)

    torch.testing.assert_close(pairs(y), pairs(x) * torch.exp(1j * angle))
    assert torch.equal(y[..., 8:], x[..., 8:])


@pytest.mark.fast
def test_norm_is_that_of_torch() -> None:
    q, k, weight = torch.randn(2, 4, 5, 12), torch.randn(2, 2, 7, 12), torch.randn(12)
    new_q, new_k = rope_qk_norm(q, k, query_weight=weight, key_weight=-weight, eps=1e-5)
    assert new_q is not None and new_k is not None
    torch.testing.assert_close(new_q, F.rms_norm(q, (12,), weight, 1e-5))
    torch.testing.assert_close(new_k, F.rms_norm(k, (12,), -weight, 1e-5))


@on_kernels
def test_some_gradients_alone() -> None:
    """Frozen weights, frozen inputs, and an output that nobody uses."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 5, 8, device=DEVICE), torch.randn(1, 1, 5, 8, device=DEVICE)
    w, cos, sin = torch.randn(8, device=DEVICE), torch.randn(5, 4, device=DEVICE), torch.randn(5, 4, device=DEVICE)
    for names in (("q",), ("w",), ("q", "k"), ("k", "w")):
        found = {}
        for backend in ("triton", "reference"):
            leaves = {n: t.clone().requires_grad_(n in names) for n, t in (("q", q), ("k", k), ("w", w))}
            with fa.use_backend(backend):
                a, b = rope_qk_norm(leaves["q"], leaves["k"], cos, sin, query_weight=leaves["w"], key_weight=w)
            used = b if "k" in names else a
            assert used is not None
            wanted = [leaves[n] for n in names]
            found[backend] = torch.autograd.grad(used.square().sum(), wanted, allow_unused=True)
        for one, other in zip(found["triton"], found["reference"], strict=True):
            assert (one is None or not one.any()) if other is None else True
            if other is not None:
                torch.testing.assert_close(one, other)


@on_kernels
def test_gradient_of_the_mask_alone() -> None:
    """With an incoming gradient of one number, and of rows that are not contiguous."""
    x, mask = torch.randn(3, 4, 9, device=DEVICE), torch.randn(4, 1, device=DEVICE, requires_grad=True)
    for dy in (torch.randn(3, 4, 1, device=DEVICE).expand(3, 4, 9), torch.randn(3, 9, 4, device=DEVICE).mT):
        found = torch.autograd.grad(fused_softmax(x, mask, softcap=1.0), mask, dy)
        with fa.use_backend("reference"):
            expected = torch.autograd.grad(fused_softmax(x, mask, softcap=1.0), mask, dy)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@on_kernels
def test_positions_outside_the_table() -> None:
    """Where they cannot be looked at first: NaN in the dims that turn, in the kernel as in the definition."""
    from fused_attention.backends.triton.rope_norm import Given, rope_norm

    x, weight = torch.randn(1, 1, 3, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    angle = torch.rand(4, 2, device=DEVICE)
    tables = Tables(angle.cos(), angle.sin(), torch.tensor([[3, 4, -1]], device=DEVICE), False)
    made, _ = rope_norm(Given(x, weight), Given(), tables, 1e-6, None)
    assert made.y is not None
    for y in (made.y, reference_ops.rope_norm(x, weight, tables, 1e-6)):
        assert y.isfinite()[0, 0, 0].all() and y[0, 0, 1:, :4].isnan().all() and y[0, 0, 1:, 4:].isfinite().all()


# --- both -----------------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_gradcheck() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True)

    def softmax(x: Tensor, mask: Tensor) -> Tensor:
        return fused_softmax(x, mask, scale=0.7, softcap=1.5, causal="bottom_right")

    assert torch.autograd.gradcheck(softmax, (x, mask)) and torch.autograd.gradgradcheck(softmax, (x, mask))
    q = torch.randn(1, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(5, dtype=torch.float64, requires_grad=True)
    angle = torch.rand(3, 2, dtype=torch.float64)
    for interleaved in (False, True):

        def rotated(q: Tensor, w: Tensor, interleaved: bool = interleaved) -> Any:
            cos, sin = angle.cos(), angle.sin()
            return rope_qk_norm(q, q * 2.0, cos, sin, query_weight=w, interleaved=interleaved)

        assert torch.autograd.gradcheck(rotated, (q, w)) and torch.autograd.gradgradcheck(rotated, (q, w))


@pytest.mark.fast
def test_gradient_formulas_are_the_derivatives() -> None:
    """What second derivatives of the kernels go through, in float64."""
    torch.manual_seed(0)
    x, dy = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True), torch.randn(2, 5, 6, dtype=torch.float64)
    o = Softmax(0.7, 1.5, "top_left")
    y = reference_ops.softmax(x, None, o)
    dx, _ = reference_ops.softmax_gradients(y, dy, x, o)
    torch.testing.assert_close(dx, torch.autograd.grad(y, x, dy)[0])
    q = torch.randn(2, 3, 4, 7, dtype=torch.float64, requires_grad=True)
    w = torch.randn(7, dtype=torch.float64, requires_grad=True)
    angle = torch.rand(9, 2, dtype=torch.float64)
    for weight in (w, None):
        tables = Tables(angle.cos(), angle.sin(), torch.randint(0, 9, (2, 4)), True)
        out = reference_ops.rope_norm(q, weight, tables, 1e-6)
        dout = torch.randn_like(out)
        found = reference_ops.rope_norm_gradients(q, dout, weight, tables, 1e-6)
        expected = torch.autograd.grad(out, [t for t in (q, weight) if t is not None], dout)
        for one, other in zip(found, expected, strict=False):
            torch.testing.assert_close(one, other)


@on_kernels
def test_second_derivatives_of_the_kernels() -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(2, 5, 9, device=DEVICE), torch.randn(1, 5, 1, device=DEVICE)
    q, w = torch.randn(1, 2, 5, 8, device=DEVICE), torch.randn(8, device=DEVICE)
    angle = torch.rand(5, 3, device=DEVICE)

    def derive(backend: str, softcap: float | None) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, mask, q, w)]
        with fa.use_backend(backend):
            y = fused_softmax(leaves[0], leaves[1], softcap=softcap, causal="top_left")
            a, b = rope_qk_norm(leaves[2], leaves[2], angle.cos(), angle.sin(), query_weight=leaves[3])
            assert a is not None and b is not None
            loss = y.square().sum() + a.pow(3).sum() + (b * a).sum()
            first = torch.autograd.grad(loss, leaves, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        return [*first, *second]

    for softcap in (None, 1.3):
        for one, other in zip(derive("triton", softcap), derive("reference", softcap), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@on_kernels
def test_two_runs_give_the_same_bits() -> None:
    """Gradients that are sums over many rows: of a broadcast mask, and of the weights."""
    rows = Rows((2, 3, 7, 50), "hiding:1,3,1,50")
    heads = Heads("many", (2, 3, 1, 65, 65, 8))
    problems: list[Any] = [
        (lambda t: (fused_softmax(t["scores"], t["mask"]),), draw_rows(rows, torch.float32, 0), ["scores", "mask"]),
        (run_heads(heads), draw_heads(heads, torch.float16, 0), ["query", "key", "query_weight", "key_weight"]),
    ]
    for run, tensors, wanted in problems:
        tensors = {n: t.to(DEVICE) for n, t in tensors.items()}
        cotangents = [torch.randn(o.shape) for o in run(tensors)]
        one, other = (differentiated(run, tensors, wanted, cotangents) for _ in range(2))
        assert all(torch.equal(one[n], other[n]) for n in one)


@on_kernels
def test_row_numbers_of_64_bits() -> None:
    """Where there are so many rows that their number needs them."""
    from fused_attention.backends.triton import launch, rope_norm, softmax

    def wide(launches: list[Any]) -> list[Any]:
        return [one._replace(options=one.options | {"WIDE": True}) for one in launches]

    x = torch.randn(2, 3, 5, 8, device=DEVICE)
    launches, y = softmax.forward_launches(x, None, Softmax(), None)
    launch.run(wide(launches), x)
    torch.testing.assert_close(y, F.softmax(x, -1))
    weight = torch.ones(8, device=DEVICE)
    launches, made, _ = rope_norm.launches(rope_norm.Given(x, weight), rope_norm.Given(), None, 1e-6, None)
    launch.run(wide(launches), x)
    torch.testing.assert_close(made.y, F.rms_norm(x, (8,), eps=1e-6))


@pytest.mark.triton
@needs_triton
def test_strides_beyond_32_bits() -> None:
    """Elements 4 GiB apart; only the few pages that are touched take memory."""
    far = 2**31 + 16
    memory = torch.empty(2 * far, dtype=torch.float16, device=DEVICE)
    x = memory.as_strided((2, 1, 3, 8), (far, 24, 8, 1)).copy_(torch.randn(2, 1, 3, 8))
    with fa.use_backend("triton"):
        torch.testing.assert_close(fused_softmax(x), F.softmax(x, -1))
        y, _ = rope_qk_norm(x, None, query_weight=torch.ones(8, device=DEVICE))
    torch.testing.assert_close(y, F.rms_norm(x, (8,), eps=1e-6))


@pytest.mark.fast
@pytest.mark.parametrize("shape", [(0, 3, 4, 8), (2, 0, 4, 8), (2, 3, 0, 8), (2, 3, 4, 0)])
def test_sizes_of_zero(shape: tuple[int, ...]) -> None:
    _sizes_of_zero(shape, "cpu")


@on_kernels
@pytest.mark.parametrize("shape", [(0, 3, 4, 8), (2, 0, 4, 8), (2, 3, 0, 8), (2, 3, 4, 0)])
def test_sizes_of_zero_on_kernels(shape: tuple[int, ...]) -> None:
    _sizes_of_zero(shape, DEVICE)


def _sizes_of_zero(shape: tuple[int, ...], device: str) -> None:
    x, mask = (
        torch.zeros(shape, device=device, requires_grad=True),
        torch.zeros(1, 1, device=device, requires_grad=True),
    )
    y = fused_softmax(x, mask)
    assert y.shape == shape
    dx, dmask = torch.autograd.grad(y.sum(), (x, mask))
    assert dx.shape == shape and not dmask.any()
    if shape[3] == 0:
        return
    w = torch.ones(8, device=device, requires_grad=True)
    other = torch.zeros(shape[0], 2, 4, 8, device=device)
    a, b = rope_qk_norm(x, other, query_weight=w, key_weight=w)
    assert a is not None and b is not None and a.shape == shape and b.shape == other.shape
    (dw,) = torch.autograd.grad(a.sum() + b.sum(), w)
    assert not dw.any()


@pytest.mark.fast
def test_compiled_without_a_break() -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(2, 3, 5, 5, requires_grad=True), torch.rand(5, 5) > 0.5
    weight, angle = torch.randn(5, requires_grad=True), torch.rand(9, 2)

    def step(x: Tensor, positions: Tensor) -> Tensor:
        q, k = rope_qk_norm(x, x, angle.cos(), angle.sin(), positions=positions, query_weight=weight)
        assert q is not None and k is not None
        return fused_softmax(q @ k.mT, mask, softcap=3.0, scale=0.5)

    positions = torch.randint(0, 9, (2, 5))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for one, other in zip(*(_with_gradients(f(x, positions), [x, weight]) for f in (compiled, step)), strict=True):
        torch.testing.assert_close(one, other)


def _with_gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [y, *torch.autograd.grad(y.square().sum(), leaves)]


@pytest.mark.fast
def test_transforms_of_torch() -> None:
    x, angle = torch.randn(4, 3, 5), torch.rand(3, 2)
    torch.testing.assert_close(
        torch.func.vmap(lambda t: fused_softmax(t, softcap=2.0))(x), fused_softmax(x, softcap=2.0)
    )
    _, tangent = torch.func.jvp(fused_softmax, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, torch.zeros_like(x), atol=1e-6, rtol=0.0)
    q = torch.randn(1, 2, 3, 4)
    grad = torch.func.grad(lambda t: rope_qk_norm(t, None, angle.cos(), angle.sin())[0].square().sum())(q)
    torch.testing.assert_close(grad, 2 * q)
