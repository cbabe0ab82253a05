"""A device as backends see it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Device:
    """A device as a backend needs to see it: the kind of tensor and the instruction set or architecture."""

    type: str  # "cpu", "cuda", "mps", "meta", ...
    arch: str | None = None  # "sm_90", "gfx942"; None on a CPU

    @classmethod
    def of(cls, tensor: Tensor) -> Device:
        return cls.at(tensor.device)

    @classmethod
    @functools.cache
    def at(cls, device: torch.device) -> Device:
        if device.type != "cuda":
            return cls(device.type)
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            return cls("cuda", properties.gcnArchName.split(":")[0])
        return cls("cuda", f"sm_{properties.major}{properties.minor}")

    @classmethod
    def parse(cls, text: str) -> Device:
        """A kind of device that need not be here ("cpu", "cuda:sm_90", "cuda:gfx942"), or one that is ("cuda:0")."""
        kind, _, which = text.partition(":")
        if kind == "cuda" and which.startswith(("sm_", "gfx")):
            return cls(kind, which)
        if kind == "cuda":
            return cls.of(torch.empty(0, device=text))
        return cls(torch.device(text).type)
