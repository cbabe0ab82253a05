"""Tensor parallelism (Shoeybi et al., "Megatron-LM", 2019): the heads of an attention module over the ranks of a mesh.

    rank r:   q_r, k_r, v_r = x Wq_r^T, x Wk_r^T, x Wv_r^T     columns: W.._r are the rows of its heads
              y_r = attention(q_r, k_r, v_r) Wo_r^T            rows: Wo_r are the columns of its heads
    output  = sum_r y_r + bo                                   one all-reduce; backward one more, for dx

The rows of q, k and v in a packed weight (`in_proj_weight`, `qkv_proj`) belong to different ranks in turn, which no
placement of one tensor says of grouped heads. They become three parameters, each a DTensor that is sharded by its rows,
under the names that the modules' state has for separate projections: what `full_tensor` or torch.distributed.checkpoint
makes of them loads into a module on one process.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from ..spec import ArgumentError
from .grouped import GroupedQueryAttention
from .multihead import MultiheadAttention


def _bad(name: str, was: object, expected: str) -> ArgumentError:
    return ArgumentError(f"{name}: got {was}, expected {expected}")


# --- one module's place in the mesh ---------------------------------------------------------------------------------


class _Place:
    """The mesh, this rank's heads, and how tokens come in and go out."""

    def __init__(self, mesh: DeviceMesh, heads: int, tokens_in: Placement, tokens_out: Placement) -> None:
        self.mesh, self.tokens_in, self.tokens_out = mesh, tokens_in, tokens_out
        share = heads // mesh.size()
        rank = mesh.get_local_rank()
        self.heads, self.own = heads, slice(rank * share, (rank + 1) * share)

    def enter(self, t: Tensor, placement: Placement | None = None) -> Tensor:
        """What every rank reads whole; the gradients of all ranks are summed on the way back."""
        if not isinstance(t, DTensor):
            t = DTensor.from_local(t, self.mesh, [placement or Replicate()], run_check=False)
        return t.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])

    def tokens(self, t: Tensor) -> Tensor:
        return self.enter(t, self.tokens_in)

    def leave(self, t: Tensor, placement: Placement) -> Tensor:
        """The ranks' terms of a sum, or their heads, as one tensor on all of them."""
        whole = DTensor.from_local(t, self.mesh, [placement], run_check=False)
        return whole.redistribute(placements=[self.tokens_out if placement.is_partial() else Replicate()]).to_local()

    def local(self, parameter: Any) -> Any:
        """A sharded parameter's own part; one that all ranks share, whole."""
        if not isinstance(parameter, DTensor):
            return parameter
        part = parameter.to_local()
        return self.enter(part) if parameter.placements[0].is_replicate() else part

    def of_own_heads(self, t: Tensor | None) -> Tensor | None:
        """A mask or bias that broadcasts to [B, H, M, N], for this rank's heads."""
        if t is None:
            return None
        if t.requires_grad:
            t = self.enter(t)
        return t[..., self.own, :, :] if t.dim() > 2 and t.shape[-3] == self.heads > 1 else t

    def weights(self, weights: Tensor, heads_kept: bool) -> Tensor:
        """Attention weights [B, H / W, M, N] as [B, H, M, N], or their mean over a rank's heads as that over all."""
        if heads_kept:
            return self.leave(weights, Shard(1))
        whole = DTensor.from_local(weights / self.mesh.size(), self.mesh, [Partial()], run_check=False)
        return whole.redistribute(placements=[Replicate()]).to_local()

    def output(self, attended: Tensor, projection: nn.Linear) -> Tensor:
        """attended [..., H / W * D] through this rank's columns of the projection, summed over ranks."""
        summed = self.leave(F.linear(attended, self.local(projection.weight)), Partial())
        if projection.bias is None:
            return summed
        bias: Any = projection.bias
        whole = self.tokens_out.is_replicate()
        # Each rank adds the whole bias to its own tokens: its gradient is in parts where the tokens are.
        own = bias.to_local() if whole else self.enter(bias)
        return summed + own.to(summed.dtype)


def _check_training(module: Any) -> None:
    if module.training and module.dropout:
        expected = "0.0, or eval(): a rank counts its own heads only, and would drop what no one process drops"
        raise _bad("dropout", module.dropout, expected)


# --- the modules ----------------------------------------------------------------------------------------------------


class TensorParallelMultiheadAttention(MultiheadAttention):
    """What `AttentionParallel` makes of a `MultiheadAttention`: the same call, on this rank's heads."""

    _place: _Place

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As `MultiheadAttention.forward`, for dense tensors; every rank gives the same arguments."""
        _check_training(self)
        if any(isinstance(t, Tensor) and t.is_nested for t in (query, key, value)):
            raise _bad("query", "a nested tensor", "a dense one in a module that is spread over ranks")
        entered: dict[int, Tensor] = {}
        for t in (query, key, value):
            if id(t) not in entered:  # a tensor given twice stays one
                entered[id(t)] = self._place.tokens(t)
        query, key, value = (entered[id(t)] for t in (query, key, value))
        return super().forward(query, key, value, *args, **kwargs)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases: Any = (None, None, None)
        if self.in_proj_bias is not None:  # [3 E] on every rank: three blocks, of which each rank reads a part
            blocks = self.in_proj_bias.view(3, -1).redistribute(placements=[Shard(1)])
            biases = blocks.to_local().unbind(0)
        local = [self._local(w) for w in weights]
        projected = [F.linear(x, w, b) for x, w, b in zip((query, key, value), local, biases, strict=True)]
        return [y.unflatten(-1, (-1, self.head_dim)) for y in projected]

    def _merge(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        if key_padding_mask is not None and key_padding_mask.requires_grad:
            key_padding_mask = self._place.enter(key_padding_mask)
        if attn_mask is not None and attn_mask.dim() == 3:
            by_head = attn_mask.unflatten(0, (q.shape[0], self.num_heads))
            own = self._place.of_own_heads(by_head)
            attn_mask = None if own is None else own.flatten(0, 1)
        else:
            attn_mask = self._place.of_own_heads(attn_mask)
        return super()._merge(attn_mask, key_padding_mask, q)

    def _attend(self, *args: Any) -> tuple[Tensor, Tensor | None]:
        attended, weights = super()._attend(*args)
        return attended, None if weights is None else self._place.weights(weights, heads_kept=weights.dim() == 4)

    def _output(self, attended: Tensor) -> Tensor:
        return self._place.output(attended, self.out_proj)

    def _local(self, parameter: Any) -> Any:
        return self._place.local(parameter)


class TensorParallelGroupedQueryAttention(GroupedQueryAttention):
    """What `AttentionParallel` makes of a `GroupedQueryAttention`: the same call, on this rank's heads.

    A cache holds this rank's key/value heads: it is made for num_kv_heads / W of them.
    """

    _place: _Place

    def forward(self, x: Tensor, context: Tensor | None = None, **options: Any) -> Any:
        """As `GroupedQueryAttention.forward`; every rank gives the same arguments, but for the cache."""
        _check_training(self)
        for name in ("mask", "bias"):
            if isinstance(options.get(name), Tensor):
                options[name] = self._place.of_own_heads(options[name])
        x, context = self._place.tokens(x), None if context is None else self._place.tokens(context)
        result = super().forward(x, context, **options)
        if isinstance(result, Tensor):
            return result
        return result[0], self._place.weights(result[1], heads_kept=result[1].dim() == 4)

    def _project(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        keys = x if context is None else context
        found = []
        projections: tuple[Any, ...] = (self.q_proj, self.k_proj, self.v_proj)
        for projection, tokens in zip(projections, (x, keys, keys), strict=True):
            y = F.linear(tokens, self._local(projection.weight), self._local(projection.bias))
            found.append(y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2))
        return found[0], found[1], found[2]

    def _slopes(self, like: Tensor) -> Tensor | None:
        slopes = super()._slopes(like)
        return None if slopes is None else slopes[self._place.own]

    def _output(self, attended: Tensor) -> Tensor:
        return self._place.output(attended.transpose(1, 2).flatten(-2), self.o_proj)

    def _local(self, parameter: Any) -> Any:
        return self._place.local(parameter)

    def _load_from_state_dict(self, *args: Any) -> None:
        nn.Module._load_from_state_dict(self, *args)  # the projections are separate here too

    def separate_state_dict(self) -> dict[str, Tensor]:
        """The `state_dict`, whose projections are separate already: DTensors."""
        return self.state_dict()


# --- the style and the plan -----------------------------------------------------------------------------------------


class AttentionParallel(ParallelStyle):
    """A style for `torch.distributed.tensor.parallel.parallelize_module`: one attention module over a 1-D mesh.

    For `MultiheadAttention` and `GroupedQueryAttention`, whose heads and key/value heads are multiples of the ranks.
    The module stays the object it is; its parameters become DTensors. Training with dropout raises.

    Args:
        input_layouts: how the tokens come in, as in `PrepareModuleInput`: `Replicate()`, or `Shard(dim)` along the
            sequence, which is gathered.
        output_layouts: how they go out: `Replicate()` (an all-reduce), or `Shard(dim)` (a reduce-scatter).
    """

    def __init__(self, *, input_layouts: Placement | None = None, output_layouts: Placement | None = None) -> None:
        super().__init__()
        self.input_layouts = input_layouts or Replicate()
        self.output_layouts = output_layouts or Replicate()

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _check_module(module, device_mesh)
        tensor = _Sharding(device_mesh, self.src_data_rank)
        if isinstance(module, MultiheadAttention):
            _spread_multihead(module, tensor)
        else:
            assert isinstance(module, GroupedQueryAttention)
            _spread_grouped(module, tensor)
        place = _Place(device_mesh, module.num_heads, self.input_layouts, self.output_layouts)
        vars(module)["_place"] = place
        return module


class _Sharding:
    """Parameters as DTensors on one mesh."""

    def __init__(self, mesh: DeviceMesh, source: int | None) -> None:
        self.mesh, self.source = mesh, source

    def parameter(self, t: Tensor, placement: Placement, like: Tensor) -> nn.Parameter:
        placed = distribute_tensor(t.detach(), self.mesh, [placement], src_data_rank=self.source)
        return nn.Parameter(placed, requires_grad=like.requires_grad)

    def set(self, module: nn.Module, name: str, placement: Placement) -> None:
        parameter = module._parameters.get(name)
        if parameter is not None:
            module.register_parameter(name, self.parameter(parameter, placement, parameter))


def _check_module(module: nn.Module, mesh: DeviceMesh) -> None:
    if mesh.ndim != 1:
        raise _bad("device_mesh", f"{mesh.ndim} dimensions", "one: slice it, as mesh['tp']")
    if not isinstance(module, (MultiheadAttention, GroupedQueryAttention)) or hasattr(module, "_place"):
        expected = "a fused_attention MultiheadAttention or GroupedQueryAttention (`replace_attention` makes the first)"
        raise _bad("module", type(module).__name__, f"{expected}, each spread once")
    kv_heads = module.num_kv_heads if isinstance(module, GroupedQueryAttention) else module.num_heads
    for name, heads in (("num_heads", module.num_heads), ("num_kv_heads", kv_heads)):
        if heads % mesh.size():
            raise _bad(name, heads, f"a multiple of the {mesh.size()} ranks: each has whole heads of its own")
    for name, part in module.named_modules():
        if torch.nn.utils.parametrize.is_parametrized(part):
            raise _bad("module", f"a parametrized {name or 'module'}", "one without parametrizations")
        if name.endswith("proj") and type(part) not in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
            raise _bad("module", f"{name} of type {type(part).__name__}", "a torch.nn.Linear")


def _spread_multihead(module: MultiheadAttention, tensor: _Sharding) -> None:
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    packed = module.in_proj_weight
    if packed is not None:
        for name, block in zip(names, packed.chunk(3), strict=True):
            module.register_parameter(name, tensor.parameter(block, Shard(0), packed))
        module.register_parameter("in_proj_weight", None)
    else:
        for name in names:
            tensor.set(module, name, Shard(0))
    tensor.set(module, "in_proj_bias", Replicate())
    tensor.set(module, "bias_k", Shard(2))
    tensor.set(module, "bias_v", Shard(2))
    tensor.set(module.out_proj, "weight", Shard(1))
    tensor.set(module.out_proj, "bias", Replicate())
    module.__class__ = TensorParallelMultiheadAttention


def _spread_grouped(module: GroupedQueryAttention, tensor: _Sharding) -> None:
    name, parts = module._fused()
    fused: nn.Linear = getattr(module, name)
    rows = list(parts.values())
    biases = [None] * len(rows) if fused.bias is None else fused.bias.split(rows)
    delattr(module, name)
    for part, weight, bias in zip(parts, fused.weight.split(rows), biases, strict=True):
        projection = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        projection.train(fused.training)
        projection.register_parameter("weight", tensor.parameter(weight, Shard(0), fused.weight))
        if bias is not None:
            projection.register_parameter("bias", tensor.parameter(bias, Shard(0), fused.bias))
        setattr(module, part, projection)
    if module.context_dim is not None:
        tensor.set(module.q_proj, "weight", Shard(0))
        tensor.set(module.q_proj, "bias", Shard(0))
    tensor.set(module.o_proj, "weight", Shard(1))
    tensor.set(module.o_proj, "bias", Replicate())
    tensor.set(module, "sinks", Shard(0))
    for norm in (module.q_norm, module.k_norm):
        if norm is not None:
            tensor.set(norm, "weight", Replicate())
    module.__class__ = TensorParallelGroupedQueryAttention


def tensor_parallel_plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """A plan for `parallelize_module`: each of our attention modules in `model`, by name, with `AttentionParallel()`.

    Join it to what spreads the rest of the model: `tensor_parallel_plan(model) | {"layers.*.up": ColwiseParallel()}`.
    """
    ours = (MultiheadAttention, GroupedQueryAttention)
    return {name: AttentionParallel() for name, module in model.named_modules() if isinstance(module, ours)}


def parallelize(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Spread the heads of every `MultiheadAttention` and `GroupedQueryAttention` in `model` over a 1-D mesh, in place.

    Every rank calls it with the same model; the values are those of the mesh's first rank.

    Returns:
        `model`. Its optimizer is made afterwards: the parameters are new.

    Raises:
        ArgumentError: (a ValueError) the model has no such module, heads cannot be divided among the ranks, the mesh is
            not 1-D, or a module has parametrizations.
    """
    plan = tensor_parallel_plan(model)
    if not plan:
        raise _bad("model", f"a {type(model).__name__} without our attention", "some (`replace_attention` swaps it in)")
    return parallelize_module(model, mesh, plan)
