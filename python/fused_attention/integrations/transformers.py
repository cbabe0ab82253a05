"""Hugging Face transformers' models on these kernels: `attn_implementation="fused_attention"`.

    from fused_attention.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fused_attention")

transformers hands every layer's attention to a function and every mask to another; `register` adds both. Nothing is
patched, and what a keyword asks for is computed or refused, never left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, __version__

from ..functional import attention, varlen_attention
from ..spec import ArgumentError, Causal, Window
from .transformers_masks import Plan, StructuredMask, make_mask

NAME = "fused_attention"
_OLDEST = (5, 23)
_CONTINUOUS = "paged|eager"

# What models hand down to every attention function and what does not bear on the result here. position_ids: packing
# by position is in the mask. max_seqlen, kernel_options, deterministic: hints to other kernels. The last ones are the
# paged cache's own.
_IRRELEVANT = frozenset(
    "cache_params cache_position deterministic inputs_embeds kernel_options logits_to_keep max_seqlen "
    "num_items_in_batch output_hidden_states output_router_logits past_key_values position_embeddings position_ids "
    "return_dict seq_idx use_cache logits_indices logits_processor_args read_index write_index".split()
)
_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")

_Pair = tuple[Tensor, Tensor]  # of the queries, of the keys


class _Call(NamedTuple):
    """One layer's attention: query [B, H, M, D], key [B, HK, N, D], value [B, HK, N, DV], and what goes with them."""

    query: Tensor
    key: Tensor
    value: Tensor
    options: dict[str, Any]  # scale, softcap, sinks, dropout_p
    bias: Tensor | None
    weights: bool

    def run(
        self, mask: Tensor | None = None, causal: Causal | None = None, window: Window | None = None, **more: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[B, M, H, DV], and the weights [B, H, M, N] where they were asked for."""
        options = {**self.options, **more, "mask": mask, "bias": self.bias, "causal": causal, "window": window}
        tensors = (self.query, self.key, self.value)
        if not self.weights:
            return attention(*tensors, **options).transpose(1, 2).contiguous(), None
        result = attention(*tensors, return_weights="heads", **options)
        return result.output.transpose(1, 2).contiguous(), result.weights

    def run_packed(
        self, offsets: _Pair, longest: tuple[int | None, int | None], causal: Causal | None, window: Window | None
    ) -> tuple[Tensor, None]:
        """The batch's rows, one after another, are sequences that start at the offsets."""
        batch, heads, rows, _ = self.query.shape
        query, key, value = (t.transpose(1, 2).flatten(0, 1) for t in (self.query, self.key, self.value))  # [T, H, D]
        options = {**self.options, "causal": causal, "window": window}
        options |= {"max_seqlen_q": longest[0], "max_seqlen_k": longest[1]}
        out = varlen_attention(query, key, value, *offsets, **options)
        assert isinstance(out, Tensor)
        return out.view(batch, rows, heads, self.value.shape[-1]), None

    def first_keys(self, columns: int) -> _Call:
        bias = self.bias
        if bias is not None and bias.shape[-1] != 1:
            bias = bias[..., :columns]
        return self._replace(key=self.key[:, :, :columns], value=self.value[:, :, :columns], bias=bias)


def _refuse(what: str) -> ArgumentError:
    return ArgumentError(f"fused_attention in transformers: {what}")


def _check_keywords(keywords: dict[str, Any]) -> None:
    unknown = sorted(k for k, v in keywords.items() if k not in _IRRELEVANT and v is not None)
    if unknown:
        raise _refuse(
            f"the model passes {', '.join(unknown)}, which this integration does not know and which may change the "
            "result; load the model with attn_implementation='eager'"
        )


def _left(sliding_window: int | None) -> int | None:
    """transformers counts the token itself among the window's."""
    return None if sliding_window is None else sliding_window - 1


# --- each kind of mask ------------------------------------------------------------------------------------------------


def _plan_without_mask(call: _Call, causal: bool, sliding_window: int | None) -> Plan:
    columns = call.key.shape[2]
    if causal:
        return Plan("bottom_right", (_left(sliding_window), None), columns)
    if sliding_window is not None and columns > sliding_window:
        raise _refuse(
            f"a window of {sliding_window} over {columns} keys without causality and without a mask: models differ in "
            "which keys that means"
        )
    return Plan(None, (None, None), columns)


def _without_mask(call: _Call, causal: bool, sliding_window: int | None) -> tuple[Tensor, Tensor | None]:
    rows, columns = call.query.shape[2], call.key.shape[2]
    if causal and rows != 1 and rows != columns:
        raise _refuse(
            f"no mask for {rows} causal queries and {columns} keys, which leaves open where the queries stand; pass "
            "an attention_mask or the past_key_values to the model"
        )
    plan = _plan_without_mask(call, causal, sliding_window)
    return call.run(causal=plan.causal, window=plan.window)


def _check_sizes(call: _Call, mask: Tensor) -> None:
    sizes = (call.query.shape[2], call.key.shape[2])
    if tuple(mask.shape[2:]) != sizes or mask.shape[0] not in (1, call.query.shape[0]):
        batch = call.query.shape[0]
        raise _refuse(
            f"a mask of shape {list(mask.shape)} for attention of [B, H, M, N] = [{batch}, H, {sizes[0]}, {sizes[1]}]"
        )


def _structured(call: _Call, plan: Plan | None) -> tuple[Tensor, Tensor | None]:
    assert plan is not None
    if plan.offsets is not None:
        return call.run_packed((plan.offsets,) * 2, (plan.longest,) * 2, plan.causal, plan.window)
    kept = call.first_keys(plan.columns)
    out, weights = kept.run(plan.padding, plan.causal, plan.window, key_lengths=plan.key_lengths)
    missing = call.key.shape[2] - plan.columns
    return out, weights if weights is None else nn.functional.pad(weights, (0, missing))


def _expressible(call: _Call, plan: Plan | None) -> bool:
    """Whether a plan serves this call: packed sequences have no bias and no weights."""
    return plan is not None and (plan.offsets is None or (call.bias is None and not call.weights))


def _same_sequence(offsets: _Pair, call: _Call) -> Tensor:
    """bool [B, 1, M, N]: whether a query and a key belong to one packed sequence."""
    batch, rows, columns = call.query.shape[0], call.query.shape[2], call.key.shape[2]
    ids = []
    for starts, length in zip(offsets, (rows, columns), strict=True):
        token = torch.arange(batch * length, device=starts.device)
        ids.append(torch.bucketize(token, starts[1:], right=True).view(batch, length))
    return ids[0][:, None, :, None] == ids[1][:, None, None, :]


def _packed(
    call: _Call, mask: Tensor | None, plan: Plan | None, offsets: _Pair, longest: tuple[int | None, int | None]
) -> tuple[Tensor, Tensor | None]:
    """The caller says where the sequences start; a mask that says more is applied as well."""
    simple = plan is not None and plan.key_lengths is None and plan.padding is None and not plan.chunked
    if plan is not None and simple and call.bias is None and not call.weights:
        return call.run_packed(offsets, longest, plan.causal, plan.window)
    if mask is None:
        raise _refuse("packed sequences with a position_bias or with attention weights need an attention_mask")
    dense = mask.dense() if isinstance(mask, StructuredMask) else mask
    same = _same_sequence(offsets, call)
    return call.run(dense & same if dense.dtype == torch.bool else dense.masked_fill(~same, -torch.inf))


def _take_packing(keywords: dict[str, Any]) -> tuple[_Pair, tuple[int | None, int | None]] | None:
    """cu_seq_lens_* and max_length_*, out of the keywords."""
    starts_q, starts_k, longest_q, longest_k = (keywords.pop(name, None) for name in _PACKING)
    if starts_q is None and starts_k is None:
        return None
    if starts_q is None or starts_k is None:
        raise _refuse("cu_seq_lens_q and cu_seq_lens_k come together")
    longest = tuple(None if n is None else int(n) for n in (longest_q, longest_k))
    return (starts_q, starts_k), longest  # type: ignore[return-value]


def _from_cache(
    module: nn.Module, call: _Call, cache: Any, sliding_window: int | None, keywords: dict[str, Any]
) -> tuple[Tensor, None]:
    """Continuous batching: the paged cache takes the new keys and gives back every sequence's, packed."""
    if call.bias is not None or call.weights:
        raise _refuse("continuous batching with a position_bias or with attention weights")
    if keywords.get("block_table") is not None:
        raise _refuse("continuous batching with a block table, which transformers makes for flash-attn alone")
    key, value = cache.update(key_states=call.key, value_states=call.value, layer_idx=module.layer_idx, kwargs=keywords)
    starts_q, starts_k, longest_q, longest_k = (keywords.pop(name) for name in _PACKING)
    keywords.pop("block_table", None)
    _check_keywords(keywords)
    # A batch may be filled up to a fixed size: what lies past its sequences is one more, perhaps empty.
    tokens_q, tokens_k = call.query.shape[2], key.shape[2]
    starts_q = torch.cat([starts_q, starts_q.new_tensor([tokens_q])])
    starts_k = torch.cat([starts_k, starts_k.new_tensor([tokens_k])])
    longest = (max(int(longest_q), tokens_q), max(int(longest_k), tokens_k))
    filled = call._replace(key=key, value=value)
    return filled.run_packed((starts_q, starts_k), longest, "bottom_right", (_left(sliding_window), None))


# --- the function -----------------------------------------------------------------------------------------------------


def fused_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    output_attentions: bool | None = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:
    """One layer's attention, in the signature of transformers' `AttentionInterface`.

    Args:
        module: the layer; `is_causal` counts where no mask and no keyword says whether keys to the right are hidden.
        query: [B, H, M, D].
        key: [B, HK, N, D], not repeated; query head h reads key/value head h // (H // HK).
        value: [B, HK, N, DV].
        attention_mask: from `make_mask`, or any bool (True is visible) or additive tensor that broadcasts to
            [B, H, M, N]; it says everything about which keys are hidden. None: causal where `is_causal` and M > 1.
        dropout: probability that a weight is zeroed while `module` is training.
        scaling: multiplies the scores; default 1 / sqrt(D).
        is_causal: False drops the causality of a mask from `make_mask` too.
        sliding_window: tokens that a row sees, itself among them; in the mask already where there is one.
        softcap, s_aux, position_bias: see `attention`: softcap, sinks [H], and bias [B or 1, H, M, N].
        cache: a paged cache of transformers' continuous batching.
        output_attentions: also return the weights [B, H, M, N].
        keywords: cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k of packed sequences, and what models hand
            down that has no bearing here.

    Returns:
        The output [B, M, H, DV], and the weights or None.

    Raises:
        ArgumentError: a keyword that is not known here and is not None, or a combination that has no one meaning.
    """
    options = {"scale": scaling, "softcap": softcap, "sinks": s_aux, "dropout_p": dropout if module.training else 0.0}
    if query.shape[0] == 1 != key.shape[0]:
        query = query.expand(key.shape[0], -1, -1, -1)  # learned queries, the same for the whole batch
    call = _Call(query, key, value, options, position_bias, bool(output_attentions))
    if cache is not None:
        return _from_cache(module, call, cache, sliding_window, keywords)
    packing = _take_packing(keywords)
    _check_keywords(keywords)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if isinstance(attention_mask, StructuredMask) and attention_mask.looked_into:
        if is_causal is False and attention_mask.causal:
            _bidirectional(None)
        attention_mask = attention_mask.dense()
    if not isinstance(attention_mask, StructuredMask):
        if packing is not None:
            plan = _plan_without_mask(call, causal, sliding_window) if attention_mask is None else None
            return _packed(call, attention_mask, plan, *packing)
        return call.run(attention_mask) if attention_mask is not None else _without_mask(call, causal, sliding_window)
    _check_sizes(call, attention_mask)
    plan = attention_mask.plan
    if is_causal is False and attention_mask.causal:
        plan = _bidirectional(plan)
    if packing is not None:
        return _packed(call, attention_mask, plan, *packing)
    return _structured(call, plan) if _expressible(call, plan) else call.run(attention_mask.dense())


def _bidirectional(plan: Plan | None) -> Plan:
    """is_causal=False on a decoder: its causal mask without causality, where nothing else hangs on the direction."""
    if plan is None or plan.offsets is not None or plan.window != (None, None) or plan.causal != "top_left":
        raise _refuse(
            "is_causal=False, and a causal mask with a window, packed sequences, a cache or a pattern of its own; set "
            "is_causal to False in the model's config instead"
        )
    return plan._replace(causal=None)


def register(model: PreTrainedModel | None = None) -> None:
    """Make `attn_implementation="fused_attention"` a choice for every model of transformers.

    Args:
        model: a model that is loaded already, to be switched over, its sub-models too.

    Raises:
        ImportError: this version of transformers is too old.
        ValueError: a part of `model` brings its own attention and does not use the interface.
    """
    if tuple(int(n) for n in __version__.split(".")[:2]) < _OLDEST:
        raise ImportError(f"transformers {__version__}: fused_attention needs 5.23 or newer, whose masks it reads")
    AttentionInterface.register(NAME, fused_attention_forward)
    AttentionMaskInterface.register(NAME, make_mask)
    if model is None:
        return
    parts = [(n, m) for n, m in model.named_modules() if isinstance(m, PreTrainedModel)]
    fixed = [n or type(m).__name__ for n, m in parts if not m._can_set_attn_implementation()]
    if fixed:
        raise ValueError(
            f"not switched: {', '.join(fixed)} computes its own attention, outside transformers' interface"
        )
    model.set_attn_implementation(NAME)


@contextmanager
def continuous_batching(model: PreTrainedModel) -> Iterator[None]:
    """Within this block `model.generate_batch` and the continuous batching manager run on these kernels.

    transformers lets no added name into continuous batching. So for the time of the block the model carries the name of
    transformers' own eager implementation for it, and that name stands for ours, in the whole process.
    """
    before, theirs = model.config._attn_implementation, AttentionInterface._global_mapping[_CONTINUOUS]
    AttentionInterface.register(_CONTINUOUS, fused_attention_forward)
    model.set_attn_implementation(_CONTINUOUS)
    try:
        yield
    finally:
        AttentionInterface.register(_CONTINUOUS, theirs)
        model.set_attn_implementation(before)
