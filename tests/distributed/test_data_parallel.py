"""A training step of small models with our attention under DDP and FSDP2, over two processes: equal to one process."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fused_attention as fa

from ..numerics import assert_close
from .processes import Processes

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("distributed")]

E, B, S = 32, 4, 10


class Block(nn.Module):
    """x + attention(x), the attention checkpointed or not."""

    def __init__(self, attention: nn.Module, checkpointed: bool = False) -> None:
        super().__init__()
        self.attention, self.checkpointed = attention, checkpointed

    def forward(self, x: Tensor) -> Tensor:
        out = checkpoint(self.attention, x, use_reentrant=False) if self.checkpointed else self.attention(x)
        assert isinstance(out, Tensor)
        return x + out


def _ours() -> nn.Module:
    rope = fa.RotaryEmbedding(8)
    grouped = fa.GroupedQueryAttention(E, 4, 2, causal="top_left", rope=rope, qk_norm_eps=1e-6, sinks=True)
    return nn.Sequential(Block(grouped, checkpointed=True), Block(fa.MultiHeadAttention(E, 4)), nn.Linear(E, 3))


def _replaced() -> nn.Module:
    layer = nn.TransformerEncoderLayer(E, 4, 48, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(E, 3))
    assert len(fa.replace_attention(model).replaced) == 2
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {"ours": _ours, "replaced": _replaced}


def _step(model: nn.Module, parameters: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """One step of SGD: the gradients, and the parameters after it, whole, on every rank."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(x).square().mean().backward()
    optimizer.step()
    found = {}
    for name, p in parameters.named_parameters():
        assert p.grad is not None, name
        for kind, t in (("d", p.grad), ("", p.detach())):
            found[kind + name] = t.full_tensor() if isinstance(t, DTensor) else t.clone()
    return found


def _equals(name: str, way: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name](), torch.randn(B, S, E)
    wide = copy.deepcopy(model).double()
    exact = _step(wide, wide, x.double())
    plain = copy.deepcopy(model)
    with fa.use_backend("reference"):
        same = _step(plain, plain, x)
    own = x.chunk(dist.get_world_size())[dist.get_rank()]
    if way == "ddp":
        found = _step(DistributedDataParallel(model), model, own)
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model:  # type: ignore[attr-defined]
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        found = _step(model, model, own)
        sharded = [p for p in model.parameters() if isinstance(p, DTensor)]
        assert len(sharded) == len(list(model.parameters()))
        assert sum(p.to_local().numel() for p in sharded) < 0.75 * sum(p.numel() for p in sharded)
    assert set(found) == set(exact)
    for key, t in found.items():
        assert_close(t, same[key], exact[key], grad=True, name=f"{name} {way}: {key}")


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_equals_one_process(two_ranks: Processes, name: str, way: str) -> None:
    two_ranks.run(_equals, name, way)


def _mixed(name: str) -> None:
    """FSDP2's own mixed precision: parameters gathered in bfloat16, kept and reduced in float32."""
    torch.manual_seed(0)
    model, x = MODELS[name](), torch.randn(B, S, E)
    expected = copy.deepcopy(model)(x)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), mp_policy=policy)
    out = model(x)
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)
    out.square().mean().backward()
    for p in model.parameters():
        assert isinstance(p.grad, DTensor) and p.grad.dtype == torch.float32 and p.grad.to_local().isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_mixed_precision(two_ranks: Processes, name: str) -> None:
    two_ranks.run(_mixed, name)
