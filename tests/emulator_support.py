"""Triton's launches in the emulator, unchanged: compiled for a chip, run on the arguments that the launcher passes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_attention.backends import triton as triton_backend
from fused_attention.backends.triton import ahead
from fused_attention.backends.triton.launch import Launch
from fused_attention.spec import AttentionSpec, Device, Inputs, Outputs

from . import ptx_emulator as emu

SWIZZLES = (0, 32, 64, 128)  # by CUtensorMapSwizzle


def _tensor_map(descriptor: Any, meta: dict[str, Any]) -> emu.TensorMap:
    """What Triton's driver encodes for a TensorDescriptor, from the metadata of the compiled kernel."""
    size = descriptor.base.element_size()
    return emu.TensorMap(
        descriptor.base,
        box=list(reversed(meta["block_size"])),
        sizes=list(reversed(descriptor.shape)),
        strides_bytes=[s * size for s in reversed(descriptor.strides)][1:],
        swizzle=SWIZZLES[meta["swizzle"]],
        oob_fill=descriptor.padding,
    )


def _flat(signature: Any, value: Any, metas: Iterator[Any]) -> Iterator[Any]:
    """The kernel's parameters for one argument: tuples become their members, what is constexpr is not passed."""
    if isinstance(signature, tuple):
        for s, v in zip(signature, value, strict=True):
            yield from _flat(s, v, metas)
    elif signature.startswith("tensordesc"):
        meta = next(metas)
        if meta is None:  # chips without TMA
            yield from (value.base, *value.shape, *value.strides, value.padding == "nan", value.round_f32_to_tf32)
        else:
            yield _tensor_map(value, meta)
        yield from (*value.shape, *value.strides)
    elif signature in ("fp32", "f32"):
        yield float(value)
    elif signature != "constexpr":
        yield value


def arguments(launch: Launch, compiled: Any) -> list[Any]:
    """The parameters that Triton's launcher passes, without the pointers to scratch memory at the end."""
    signature = list(compiled.src.signature.values())[: len(launch.args)]
    metas = itertools.chain(getattr(compiled.metadata, "tensordesc_meta", None) or (), itertools.repeat(None))
    return [p for s, v in zip(signature, launch.args, strict=True) for p in _flat(s, v, metas)]


def emulate(launch: Launch, compiled: Any, seed: int = 0, **options: Any) -> emu.Report:
    """Run one compiled launch; tensors are changed in place."""
    module = emu.load(compiled.asm["ptx"])
    metadata, args = compiled.metadata, arguments(launch, compiled)
    scratch = len(module.kernels[metadata.name].params) - len(args)
    assert scratch in (1, 2) and metadata.global_scratch_size == 0, "these kernels need no scratch memory"
    options = {"shared": metadata.shared, "cluster": metadata.num_ctas, **options}
    threads = metadata.num_warps * 32
    return module.launch(metadata.name, launch.grid, threads, [*args, *[None] * scratch], seed=seed, **options)


class Emulated:
    """The Triton backend of a chip, its launches emulated; a backend for `cases.check` and `test_decode.check`.

    Each call runs with every seed in turn. Results must not depend on the schedule: they are compared bit by bit.
    """

    def __init__(self, arch: str, seeds: Iterable[int] = (0,)) -> None:
        self.arch = arch
        self.seeds = list(seeds)
        self.reports: list[tuple[str, int, emu.Report]] = []

    def supports(self, spec: Any, device: Device) -> str | None:
        return triton_backend.supports(spec, replace(device, type="cuda", arch=self.arch))

    def run(self, launches: list[Launch], results: Iterable[Tensor | None]) -> None:
        """Compile and emulate launches; `results` are the tensors that they fill."""
        kept: list[Tensor] = [t for t in results if t is not None]
        compiled = ahead.compile_ahead(launches, self.arch)
        first: list[Tensor] = []
        for seed in self.seeds:
            for launch, kernel in zip(launches, compiled, strict=True):
                report = emulate(launch, kernel, seed)
                self.reports.append((kernel.metadata.name, seed, report))
                assert not report.races, f"{kernel.metadata.name}, seed {seed}:\n" + "\n".join(report.races)
            if not first:
                first = [_bits(t).clone() for t in kept]
            for t, before in zip(kept, first, strict=True):
                assert torch.equal(_bits(t), before), f"seed {seed} gives other bits than seed {self.seeds[0]}"

    def forward(self, spec: AttentionSpec, x: Inputs) -> Outputs:
        from fused_attention.backends.triton import attention

        launches, out = attention.forward_launches(spec, x, self.arch)
        self.run(launches, out)
        return out

    def backward(self, spec: AttentionSpec, x: Inputs, out: Outputs, grads: Any) -> dict[str, Tensor]:
        from fused_attention.backends.triton import gradients

        launches, found = gradients.backward_launches(spec, x, out, grads, self.arch)
        self.run(launches, found.values())
        return gradients.finish(spec, x, out, found)

    def summary(self) -> str:
        """One line per kernel: how often it ran, its bank conflicts."""
        lines = []
        for name in dict.fromkeys(n for n, _, _ in self.reports):
            mine = [r.bank_conflicts for n, _, r in self.reports if n == name]
            total, extra = sum(b.total for b in mine), sum(b.extra for b in mine)
            share = 100 * extra / total if total else 0.0
            lines.append(
                f"{self.arch} {name}: {len(mine)} launches, no race, bank conflicts {share:.1f}% of wavefronts"
            )
        return "\n".join(lines)


def _bits(t: Tensor) -> Tensor:
    """As integers, so that NaN equals itself."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.view(kinds[t.element_size()])
