"""Swap the attention of a model that exists already."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from .multihead import MultiheadAttention


@dataclass
class ReplacementReport:
    """What `replace_attention` did.

    replaced: names of the modules that were swapped; "" is the model itself.
    skipped: (name, reason) of attention modules left as they were.
    notes: what else was changed, or is worth knowing.
    """

    replaced: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)} attention module{'' if len(self.replaced) == 1 else 's'}"]
        lines += [f"  {_label(name)}" for name in self.replaced]
        if self.skipped:
            lines += ["left as they were"] + [f"  {_label(name)}: {why}" for name, why in self.skipped]
        if self.notes:
            lines += ["notes"] + [f"  {note}" for note in self.notes]
        return "\n".join(lines)


def replace_attention(model: nn.Module) -> ReplacementReport:
    """Make every `torch.nn.MultiheadAttention` in `model` a `fused_attention.MultiheadAttention`, in place.

    The module objects stay the same objects: only their class changes. So parameters, optimizer state, hooks,
    training flag, device, dtype, names, modules used in several places and references held elsewhere all stay
    valid, and the model itself may be the module. A `torch.nn.TransformerEncoder` around a swapped module
    stops packing padded batches into nested tensors, which would lose the rows at padded positions.

    Subclasses of `torch.nn.MultiheadAttention` (parametrized and quantizable ones among them) may compute
    something else; they are left alone and reported.
    """
    report = ReplacementReport()
    for name, module in model.named_modules():
        if not isinstance(module, nn.MultiheadAttention) or isinstance(module, MultiheadAttention):
            continue
        reason = _reason_to_skip(module)
        if reason is not None:
            report.skipped.append((name, reason))
            continue
        module.__class__ = MultiheadAttention
        report.replaced.append(name)
    for name, module in model.named_modules():
        if _packs_padded_batches(module):
            module.use_nested_tensor = False
            report.notes.append(
                f"{_label(name)}: use_nested_tensor set to False, so that padded positions come out the same in "
                "train and eval"
            )
    return report


def _label(name: str) -> str:
    return name or "(the model itself)"


def _reason_to_skip(module: nn.MultiheadAttention) -> str | None:
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "a TorchScript module, compiled already"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "parametrized; remove the parametrizations, replace, and register them again"
    if kind is not nn.MultiheadAttention:
        where = f"{kind.__module__}.{kind.__qualname__}"
        if kind.__module__.startswith("torch.ao."):
            return f"a quantization class, {where}"
        return f"a subclass, {where}, which may compute something else"
    if "forward" in vars(module):
        return "its forward was replaced on the instance, and would go on calling PyTorch's"
    return None


def _packs_padded_batches(module: nn.Module) -> bool:
    """A `torch.nn.TransformerEncoder` that was built to use nested tensors and has one of our modules inside."""
    if not isinstance(module, nn.TransformerEncoder) or not getattr(module, "use_nested_tensor", False):
        return False
    return any(isinstance(getattr(layer, "self_attn", None), MultiheadAttention) for layer in module.layers)
