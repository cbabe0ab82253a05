"""`GroupedQueryAttention` against the layer written out: values, gradients, masks, memory, and torch's machinery."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attention as fa
from fused_attention.nn import grouped

from .grouped_cases import MODELS, D, E, Model, eager, widened
from .numerics import assert_close

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
BY_NAME = {m.name: m for m in MODELS}
Results = dict[str, Tensor]


def _cast(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    floating = {n for n, t in options.items() if isinstance(t, Tensor) and t.is_floating_point()}
    return {n: t.to(dtype) if n in floating else t for n, t in options.items()}


def differentiated(module: fa.GroupedQueryAttention, inputs: list[Tensor], run: Any, g: Tensor) -> Results:
    """Output, weights and the gradients of the inputs and of all parameters."""
    module.zero_grad()
    leaves = [t.detach().requires_grad_() for t in inputs]
    output, weights = run(*leaves)
    output.backward(g.to(output.dtype))
    found = {"output": output.detach(), "weights": weights.detach()}
    found |= {f"d{i}": t.grad for i, t in enumerate(leaves) if t.grad is not None}
    return found | {f"d{n}": p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def check(module: fa.GroupedQueryAttention, inputs: list[Tensor], given: dict[str, Any], known: dict[str, Any]) -> None:
    """given: arguments of the module; known: what they mean to `eager`."""
    dtype = inputs[0].dtype
    g = torch.randn(*inputs[0].shape[:2], E, dtype=F64)

    def ours(*x: Tensor) -> Any:
        if "seed" in known:
            torch.manual_seed(known["seed"])
        return module(*x, need_weights="heads", **given)

    wide = widened(module)
    got = differentiated(module, inputs, ours, g)
    same = differentiated(module, inputs, lambda *x: eager(module, *x, **_cast(known, dtype)), g)
    ref = differentiated(wide, [t.double() for t in inputs], lambda *x: eager(wide, *x, **_cast(known, F64)), g)
    assert set(got) == set(ref) and len(got) >= 2 + len(inputs) + 2
    for name, value in got.items():
        assert value.dtype == dtype
        assert_close(value, same[name], ref[name], grad=name.startswith("d"), name=name)
    module.zero_grad()
    with torch.no_grad():  # without weights it is the same computation
        if "seed" not in known:
            assert_close(module(*inputs, **given), same["output"], ref["output"])


@pytest.mark.fast
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_is_the_formula(model: Model, dtype: torch.dtype) -> None:
    module = model.build(dtype)
    check(module, [torch.randn(3, 33, E).to(dtype)], {}, {})


@pytest.mark.fast
@pytest.mark.parametrize("case", ["positions", "positions-shared", "mask", "bias", "padding", "padding-and-mask",
                                  "lengths", "dropout"])  # fmt: skip
def test_arguments(case: str) -> None:
    torch.manual_seed(1)
    module = BY_NAME["norm-rope"].build()
    lengths = torch.tensor([17, 3, 11])
    beyond = torch.arange(17) >= lengths[:, None]  # [B, N]
    mask = torch.rand(3, 1, 17, 17) > 0.3
    bias = torch.randn(4, 17, 17)
    known: dict[str, Any] = {}
    if case == "positions":
        given = known = {"positions": torch.randint(0, 90, (3, 17))}
    elif case == "positions-shared":
        given = known = {"positions": torch.arange(17) + 5}
    elif case == "mask":
        given, known = {"mask": mask}, {"visible": mask}
    elif case == "bias":
        given = known = {"bias": bias}
    elif case == "padding":
        given, known = {"key_padding_mask": beyond, "bias": bias}, {"visible": ~beyond[:, None, None], "bias": bias}
    elif case == "padding-and-mask":
        given, known = {"key_padding_mask": beyond, "mask": mask}, {"visible": mask & ~beyond[:, None, None]}
    elif case == "lengths":
        given, known = {"key_lengths": lengths}, {"visible": ~beyond[:, None, None]}
    else:
        module.dropout = 0.4
        given, known = {}, {"seed": 5}
    check(module, [torch.randn(3, 17, E)], given, known)


@pytest.mark.fast
@pytest.mark.parametrize(
    "options", [{}, {"qk_norm_eps": 1e-6, "sinks": True, "softcap": 3.0, "qkv_bias": True}], ids=str
)
def test_cross_attention(options: dict[str, Any]) -> None:
    module = Model("cross", (4, 2), None, {"context_dim": 10, "causal": None, **options}).build()
    check(module, [torch.randn(3, 9, E), torch.randn(3, 21, 10)], {}, {})


@pytest.mark.fast
def test_averaged_weights_and_a_row_that_sees_nothing() -> None:
    module = BY_NAME["plain"].build()
    x = torch.randn(2, 9, E)
    heads, mean = module(x, need_weights="heads")[1], module(x, need_weights=True)[1]
    assert heads.shape == (2, 4, 9, 9) and mean.shape == (2, 9, 9)
    torch.testing.assert_close(mean, heads.mean(1))
    assert not module(x, mask=torch.zeros(9, 9, dtype=torch.bool))[1].any()  # o_proj has no bias


@pytest.mark.fast
@pytest.mark.parametrize("name", ["plain", "mqa", "norm-rope", "everything"])
def test_one_call_on_views(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One functional call; keys and values are not repeated; nothing is transposed in memory on the way."""
    module, calls = BY_NAME[name].build(), []
    real = grouped.attention

    def watched(*tensors: Tensor, **options: Any) -> Any:
        calls.append((tensors, out := real(*tensors, **options)))
        return out

    monkeypatch.setattr(grouped, "attention", watched)
    merged: list[Tensor] = []
    module.o_proj.register_forward_pre_hook(lambda _, x: merged.append(x[0]))
    module(torch.randn(3, 33, E))
    ((query, key, value), out), = calls  # fmt: skip
    assert key.shape == value.shape == (3, module.num_kv_heads, 33, D)
    rows = (module.num_heads + 2 * module.num_kv_heads) * D
    assert value.stride() == (33 * rows, D, rows, 1)
    if module.q_norm is None and module.rope is None:
        assert (
            query.untyped_storage().data_ptr() == key.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
        )
    else:
        assert query.transpose(1, 2).is_contiguous() and key.transpose(1, 2).is_contiguous()
    assert merged[0].untyped_storage().data_ptr() == out.untyped_storage().data_ptr()


# --- torch's machinery --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::fused_attention.FallbackWarning")  # forward mode uses the reference
@pytest.mark.parametrize("name", ["plain", "norm-rope", "everything"])
def test_gradcheck(name: str) -> None:
    module = BY_NAME[name].build(F64)
    names, parameters = zip(*module.named_parameters(), strict=True)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    inputs = (torch.randn(2, 4, E, dtype=F64, requires_grad=True), *parameters)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["norm-rope", "everything", "alibi"])
def test_compiled(name: str) -> None:
    module = BY_NAME[name].build()
    x = torch.randn(3, 17, E, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for given in ({}, {"key_padding_mask": torch.rand(3, 17) > 0.6}):
        plain, traced = module(x, **given), compiled(x, **given)
        torch.testing.assert_close(traced, plain)
        inputs = (x, *module.parameters())
        for a, b in zip(torch.autograd.grad(traced.square().sum(), inputs),
                        torch.autograd.grad(plain.square().sum(), inputs), strict=True):  # fmt: skip
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_compiled_with_dynamic_lengths_does_not_recompile() -> None:
    module = BY_NAME["everything"].build()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(module, backend=counter, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for length in (5, 9, 33, 70):
            x = torch.randn(2, length, E)
            torch.testing.assert_close(compiled(x), module(x))
    assert counter.frame_count == 1


def test_exported() -> None:
    module, x = BY_NAME["everything"].build(), torch.randn(2, 9, E)
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.filterwarnings("ignore::fused_attention.FallbackWarning")  # transforms use the reference
def test_functional_transforms() -> None:
    module, x = BY_NAME["everything"].build(F64), torch.randn(3, 9, E, dtype=F64)
    torch.testing.assert_close(torch.func.vmap(lambda x: module(x[None])[0])(x), module(x))
    parameters = dict(module.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    for name, grad in torch.func.grad(loss)(parameters).items():
        (expected,) = torch.autograd.grad(module(x).square().sum(), parameters[name])
        torch.testing.assert_close(grad, expected)


@pytest.mark.fast
def test_autocast_and_casts() -> None:
    module, x = BY_NAME["everything"].build(), torch.randn(3, 33, E)
    with torch.autocast("cpu", BF16):
        out = module(x)
    assert out.dtype == BF16
    wide = widened(module)
    with torch.no_grad():
        same, exact = eager(copy.deepcopy(module).bfloat16(), x.bfloat16())[0], eager(wide, x.double())[0]
        assert_close(out, same, exact)
        assert module.double()(x.double()).dtype == F64
        torch.testing.assert_close(module(x.double()), exact)


@pytest.mark.fast
def test_empty_batch_and_sequence() -> None:
    module = BY_NAME["norm-rope"].build()
    x = torch.randn(2, 5, E)
    assert module(x[:0]).shape == (0, 5, E) and module(x[:, :0]).shape == (2, 0, E)


def test_checkpointed() -> None:
    module, x = BY_NAME["everything"].build(), torch.randn(2, 9, E, requires_grad=True)
    module.dropout = 0.3
    torch.manual_seed(0)
    (expected,) = torch.autograd.grad(module(x).square().sum(), x)
    torch.manual_seed(0)
    saved = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(saved.square().sum(), x)[0], expected)
