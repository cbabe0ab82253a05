"""The attention modules with their heads over two and four processes: forward, backward, state, a step of a layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fused_attention as fa
from fused_attention.nn.parallel import AttentionParallel, parallelize, tensor_parallel_plan

from ..numerics import assert_close
from .processes import Processes

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("distributed")]

E, B, S = 64, 2, 12
Call = Callable[[nn.Module, dict[str, Tensor]], Any]


def mesh(device: str = "cpu") -> DeviceMesh:
    return init_device_mesh(device, (dist.get_world_size(),))


# --- what is called -------------------------------------------------------------------------------------------------


def _mha(**options: Any) -> Callable[[], nn.Module]:
    return lambda: fa.MultiheadAttention(E, 8, batch_first=True, **options)


def _gqa(**options: Any) -> Callable[[], nn.Module]:
    return lambda: fa.GroupedQueryAttention(E, 8, 4, causal=options.pop("causal", "top_left"), **options)


def _self(**arguments: Any) -> Call:
    return lambda m, t: m(
        t["x"], t["x"], t["x"], **{n: t.get(a, a) if isinstance(a, str) else a for n, a in arguments.items()}
    )


def _one(**arguments: Any) -> Call:
    return lambda m, t: m(t["x"], **{n: t.get(a, a) if isinstance(a, str) else a for n, a in arguments.items()})


ROPE = fa.RotaryEmbedding(8)
EVERYTHING: dict[str, Any] = {"qkv_bias": True, "o_bias": True, "qk_norm_eps": 1e-6, "rope": ROPE, "window": (5, None)}
CASES: dict[str, tuple[Callable[[], nn.Module], Call]] = {
    "mha": (_mha(), _self(need_weights=False)),
    "mha-no-bias-causal": (_mha(bias=False), _self(need_weights=False, attn_mask="hidden", is_causal=True)),
    "mha-weights": (_mha(), _self(key_padding_mask="padding")),
    "mha-weights-of-heads": (_mha(), _self(attn_mask="by_head", average_attn_weights=False)),
    "mha-float-mask": (_mha(), _self(need_weights=False, attn_mask="added")),
    "mha-extra-keys": (_mha(add_bias_kv=True, add_zero_attn=True), _self(need_weights=False)),
    "mha-cross": (_mha(), lambda m, t: m(t["x"], t["y"], t["y"], need_weights=False)),
    "mha-widths": (_mha(kdim=24, vdim=40), lambda m, t: m(t["x"], t["y"][..., :24], t["y"][..., :40])),
    "gqa": (_gqa(), _one()),
    "gqa-everything": (_gqa(**EVERYTHING, softcap=3.0, sinks=True), _one()),
    "gqa-alibi-weights": (_gqa(alibi=True), _one(need_weights=True, key_padding_mask="padding")),
    "gqa-weights-of-heads": (_gqa(causal=None), _one(need_weights="heads", bias="bias_of_heads")),
    "gqa-context": (_gqa(causal=None, context_dim=E, qkv_bias=True), _one(context="y")),
}


def _tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    found = {"x": torch.randn(B, S, E, generator=g), "y": torch.randn(B, 7, E, generator=g)}
    found |= {"added": torch.randn(S, S, generator=g), "by_head": torch.randn(B * 8, S, S, generator=g)}
    found |= {"bias_of_heads": torch.randn(1, 8, S, S, generator=g)}
    found = {n: t.to(dtype).requires_grad_() for n, t in found.items()}
    hidden = torch.ones(S, S, dtype=torch.bool).triu(1)
    padding = torch.arange(S) >= torch.tensor([[S], [S - 4]])
    return found | {"hidden": hidden, "padding": padding}


def _run(module: nn.Module, call: Call, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs, and gradients of the inputs and the parameters by name, q, k and v apart."""
    tensors = _tensors(dtype)
    result = call(module, tensors)
    outputs = [t for t in ([result] if isinstance(result, Tensor) else result) if t is not None]
    g = torch.Generator().manual_seed(2)
    torch.autograd.backward(outputs, [torch.randn(t.shape, generator=g).to(dtype) for t in outputs])
    found = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    found |= {f"d{n}": t.grad for n, t in tensors.items() if t.grad is not None}
    for name, p in module.named_parameters():
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        assert grad is not None, name
        found |= _apart(module, name, grad)
    return found


def _apart(module: nn.Module, name: str, t: Tensor) -> dict[str, Tensor]:
    """A packed weight as the three that a module spread over ranks has."""
    if name == "in_proj_weight":
        return {f"d{n}_proj_weight": part for n, part in zip("qkv", t.chunk(3), strict=True)}
    fused, _, kind = name.partition(".")
    if isinstance(module, fa.GroupedQueryAttention) and fused in ("qkv_proj", "kv_proj"):
        parts = module._fused()[1]
        return {f"d{n}.{kind}": part for n, part in zip(parts, t.split(list(parts.values())), strict=True)}
    return {f"d{name}": t}


def _equals(name: str) -> None:
    make, call = CASES[name]
    torch.manual_seed(0)
    module = make()
    with torch.no_grad():  # biases and sinks begin at 0
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    exact = _run(copy.deepcopy(module).double(), call, torch.float64)
    with fa.use_backend("reference"):
        same = _run(copy.deepcopy(module), call, torch.float32)
    spread = parallelize(module, mesh())
    got = _run(spread, call, torch.float32)
    assert set(got) == set(exact)
    for key in exact:
        assert_close(got[key], same[key], exact[key], grad=key.startswith("d"), name=f"{name}: {key}")
    world = dist.get_world_size()
    for weight in ("q_proj_weight", "q_proj.weight", "o_proj.weight", "out_proj.weight"):
        p = dict(spread.named_parameters()).get(weight)
        assert p is None or (isinstance(p, DTensor) and p.to_local().numel() * world == p.numel()), weight


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(ranks: Processes, name: str) -> None:
    ranks.run(_equals, name)


# --- in a model -----------------------------------------------------------------------------------------------------


def _layer_step() -> None:
    """A torch encoder layer with its feed-forward spread too, two steps of AdamW; the first rank has the weights."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, 8, 96, dropout=0.0, batch_first=True)
    fa.replace_attention(layer)
    single, x, target = copy.deepcopy(layer), torch.randn(B, S, E), torch.randn(B, S, E)
    for p in layer.parameters():
        if dist.get_rank():
            p.data.normal_()  # the first rank's values count
    for norm, like in ((layer.norm1, single.norm1), (layer.norm2, single.norm2)):
        norm.load_state_dict(like.state_dict())  # not in the plan
    plan = tensor_parallel_plan(layer) | {"linear1": ColwiseParallel(), "linear2": RowwiseParallel()}
    assert set(plan) == {"self_attn", "linear1", "linear2"}
    parallelize_module(layer, mesh(), plan)
    for model in (single, layer):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
        for _ in range(2):
            optimizer.zero_grad()
            (model(x) - target).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(layer(x), single(x), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), single.eval()(x), rtol=1e-4, atol=1e-4)


def test_a_training_step_of_a_layer(two_ranks: Processes) -> None:
    two_ranks.run(_layer_step)


def _along_the_sequence() -> None:
    """Sequence parallelism: tokens come and go in parts of the sequence."""
    torch.manual_seed(0)
    module = fa.GroupedQueryAttention(E, 8, 4, causal="top_left", o_bias=True)
    single, here = copy.deepcopy(module), mesh()
    nn.init.normal_(module.o_proj.bias), nn.init.constant_(single.o_proj.bias, 0.0)  # type: ignore[arg-type]
    single.o_proj.bias.data.copy_(module.o_proj.bias)  # type: ignore[union-attr]
    style = AttentionParallel(input_layouts=Shard(1), output_layouts=Shard(1))
    parallelize_module(module, here, style)
    x = torch.randn(B, S, E)
    part = x.chunk(here.size(), 1)[here.get_local_rank()].requires_grad_()
    x.requires_grad_()
    out, expected = module(part), single(x)
    torch.testing.assert_close(out, expected.chunk(here.size(), 1)[here.get_local_rank()])
    dout = torch.randn_like(expected)
    expected.backward(dout)
    out.backward(dout.chunk(here.size(), 1)[here.get_local_rank()])
    assert x.grad is not None
    torch.testing.assert_close(part.grad, x.grad.chunk(here.size(), 1)[here.get_local_rank()], rtol=1e-4, atol=1e-5)
    for mine, theirs in ((module.o_proj.bias, single.o_proj.bias), (module.o_proj.weight, single.o_proj.weight)):
        torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]


def test_along_the_sequence(ranks: Processes) -> None:
    ranks.run(_along_the_sequence)


def _state() -> None:
    torch.manual_seed(0)
    for make in (_mha(kdim=24, vdim=40), _gqa(qkv_bias=True, sinks=True), _gqa(causal=None, context_dim=E)):
        module, other = make(), make()
        before = {n: t.clone() for n, t in module.state_dict().items()}
        parallelize(module, mesh())
        whole = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in module.state_dict().items()}
        other.load_state_dict(whole)
        assert all(torch.equal(t, before[n]) for n, t in other.state_dict().items())
        module.load_state_dict(module.state_dict())
    for name, p in module.named_parameters():
        assert isinstance(p, DTensor) and p.placements[0] in (Shard(0), Shard(1), Replicate()), name


def test_the_state_loads_into_one_process(two_ranks: Processes) -> None:
    two_ranks.run(_state)


def _decoding() -> None:
    torch.manual_seed(0)
    module = fa.GroupedQueryAttention(E, 8, 4, causal="top_left", rope=fa.RotaryEmbedding(8), sinks=True).eval()
    single, world = copy.deepcopy(module), dist.get_world_size()
    parallelize(module, mesh())
    x = torch.randn(B, 5, E)
    caches = [fa.KVCache.allocate(B, heads, 16, 8) for heads in (4, 4 // world)]
    with torch.no_grad():
        for tokens in (x[:, :3], x[:, 3:4], x[:, 4:]):
            torch.testing.assert_close(module(tokens, cache=caches[1]), single(tokens, cache=caches[0]))


def test_decoding(two_ranks: Processes) -> None:
    two_ranks.run(_decoding)


def _compiled() -> None:
    torch.manual_seed(0)
    module, x = CASES["gqa-everything"][0](), torch.randn(B, S, E)
    parallelize(module, mesh())
    assert torch.equal(torch.compile(module, backend="aot_eager")(x), module(x))


def test_under_compile(two_ranks: Processes) -> None:
    two_ranks.run(_compiled)


def _with_fsdp() -> None:
    """Two by two: heads over one dimension of the mesh, what is left of the parameters and the batch over the other."""
    from torch.distributed.fsdp import fully_shard

    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    model = nn.Sequential(fa.GroupedQueryAttention(E, 8, 4, causal="top_left"), fa.GroupedQueryAttention(E, 8, 2))
    single = copy.deepcopy(model)
    parallelize(model, both["tp"])
    for layer in model:
        fully_shard(layer, mesh=both["dp"])
    fully_shard(model, mesh=both["dp"])
    x = torch.randn(4, S, E)
    own = x.chunk(2)[both["dp"].get_local_rank()]
    for _ in range(2):
        for run, tokens in ((model, own), (single, x)):
            optimizer = torch.optim.SGD(run.parameters(), lr=0.1)
            optimizer.zero_grad()
            run(tokens).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(model(own), single(own), rtol=1e-4, atol=1e-5)


def test_with_fsdp() -> None:
    processes = Processes(4)
    try:
        processes.run(_with_fsdp)
    finally:
        processes.stop()


# --- refusals -------------------------------------------------------------------------------------------------------


def _refusals() -> None:
    here = mesh()
    x = torch.randn(B, S, E)
    dropping = parallelize(fa.MultiheadAttention(E, 8, dropout=0.5, batch_first=True), here)
    with pytest.raises(fa.ArgumentError, match="dropout.*own heads"):
        dropping(x, x, x)
    dropping.eval()(x, x, x)
    with pytest.raises(fa.ArgumentError, match="nested"):
        dropping(*[torch.nested.as_nested_tensor([x[0]])] * 3)
    with pytest.raises(fa.ArgumentError, match="module.*spread once"):
        AttentionParallel()._apply(dropping, here)
    with pytest.raises(fa.ArgumentError, match="num_heads.*3.*multiple of the 2 ranks"):
        parallelize(fa.MultiheadAttention(24, 3), here)
    with pytest.raises(fa.ArgumentError, match="num_kv_heads.*1.*multiple of the 2 ranks"):
        parallelize(fa.GroupedQueryAttention(E, 8, 1), here)
    with pytest.raises(fa.ArgumentError, match="without our attention.*replace_attention"):
        parallelize(nn.MultiheadAttention(E, 8), here)
    with pytest.raises(fa.ArgumentError, match="a fused_attention"):
        parallelize_module(nn.Linear(3, 3), here, AttentionParallel())
    with pytest.raises(fa.ArgumentError, match="2 dimensions"):
        AttentionParallel()._apply(fa.MultiheadAttention(E, 8), init_device_mesh("cpu", (2, 1)))
    normed = fa.MultiheadAttention(E, 8)
    torch.nn.utils.parametrizations.weight_norm(normed.out_proj)
    with pytest.raises(fa.ArgumentError, match="parametrized out_proj"):
        parallelize(normed, here)


def test_what_is_refused(two_ranks: Processes) -> None:
    two_ranks.run(_refusals)
