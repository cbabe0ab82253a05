"""Swap the attention of a model that exists already, and back."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from .multihead import MultiheadAttention

# What `replace_attention` leaves in the `__dict__` of what it changed, for `restore_attention` to find; copies keep it.
_MARK = "_fused_attention_replaced"


@dataclass
class ReplacementReport:
    """What `replace_attention` or `restore_attention` did.

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

    Parametrizations and weight norm go on. Other subclasses of `torch.nn.MultiheadAttention` (quantizable ones
    among them) may compute something else; they are left alone and reported.
    """
    report = ReplacementReport()
    for name, module in model.named_modules():
        if not isinstance(module, nn.MultiheadAttention) or isinstance(module, MultiheadAttention):
            continue
        reason = _reason_to_skip(module)
        if reason is not None:
            report.skipped.append((name, reason))
            continue
        _change_class(module, MultiheadAttention)
        vars(module)[_MARK] = True
        report.replaced.append(name)
    for name, module in model.named_modules():
        if _packs_padded_batches(module):
            module.use_nested_tensor = False
            vars(module)[_MARK] = True
            report.notes.append(
                f"{_label(name)}: use_nested_tensor set to False, so that padded positions come out the same in "
                "train and eval"
            )
    return report


def restore_attention(model: nn.Module) -> ReplacementReport:
    """Undo `replace_attention` in place: the swapped modules are `torch.nn.MultiheadAttention` again.

    They are the same objects with the weights they have by now. A `fused_attention.MultiheadAttention` that was
    built as one stays one.
    """
    report = ReplacementReport()
    for name, module in model.named_modules():
        if _MARK not in vars(module):
            continue
        del vars(module)[_MARK]
        if isinstance(module, MultiheadAttention):
            _change_class(module, nn.MultiheadAttention)
            report.replaced.append(name)
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = True
            report.notes.append(f"{_label(name)}: use_nested_tensor set to True again")
    return report


def _change_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """A parametrized module has a class of its own, below its true one, whose properties compute the weights."""
    now = type(module)
    if torch.nn.utils.parametrize.is_parametrized(module):
        body = {k: v for k, v in vars(now).items() if k not in ("__dict__", "__weakref__")}
        kind = type(f"Parametrized{kind.__name__}", (kind,), body)
    module.__class__ = kind


def _label(name: str) -> str:
    return name or "(the model itself)"


def _reason_to_skip(module: nn.MultiheadAttention) -> str | None:
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "a TorchScript module, compiled already"
    if torch.nn.utils.parametrize.is_parametrized(module):
        (kind,) = kind.__bases__
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
