"""The one registry of what is timed: suites of shapes, with the sizes of models that people run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

Mask = Literal["bool", "float", "padding"]


@dataclass(frozen=True)
class AttentionShape:
    """One call of attention.

    group: what its ratio is averaged with. mask: "bool" or "float" [B, 1, M, N]; "padding" hides the last eighth of the
    keys. window: keys to the left that a row sees, with causality.
    """

    name: str
    group: str
    batch: int
    heads: int
    kv_heads: int
    rows: int
    columns: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    causal: bool = False
    mask: Mask | None = None
    window: int | None = None
    backward: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def visible(self) -> float:
        """Scores per head that are not hidden."""
        if self.window is not None:
            return float(self.rows * min(self.window + 1, self.columns))
        share = (0.5 if self.causal else 1.0) * (7 / 8 if self.mask == "padding" else 1.0)
        return self.rows * self.columns * share

    @property
    def flops(self) -> float:
        """Of the matrix products, hidden scores left out: two forward; backward, which takes the scores anew, five."""
        return (14.0 if self.backward else 4.0) * self.batch * self.heads * self.visible * self.head_dim

    @property
    def bytes(self) -> float:
        """Of query, key, value and output, each once."""
        elements = 2 * self.heads * self.rows + 2 * self.kv_heads * self.columns
        return float(self.batch * elements * self.head_dim * self.dtype.itemsize)


@dataclass(frozen=True)
class ModuleShape:
    """One call of a multi-head self-attention module: inference in eval mode, or (`backward`) a training step."""

    name: str
    group: str
    batch: int
    tokens: int
    width: int
    heads: int
    dtype: torch.dtype = torch.float32
    padding: bool = False
    need_weights: bool = False
    backward: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def flops(self) -> float:
        """As of attention, the four projections included."""
        visible = self.tokens * (7 / 8 if self.padding else 1.0)
        once = self.batch * self.tokens * self.width * (8.0 * self.width + 4.0 * visible)
        return once * (3.0 if self.backward else 1.0)

    @property
    def bytes(self) -> float:
        """Of input and output."""
        return 2.0 * self.batch * self.tokens * self.width * self.dtype.itemsize


@dataclass(frozen=True)
class CacheShape:
    """One step of decoding, a query per head of each sequence, from a cache in `dtype`; others store it in less."""

    name: str
    group: str
    batch: int
    heads: int
    kv_heads: int
    columns: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    backward: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def flops(self) -> float:
        """Of the two products."""
        return 4.0 * self.batch * self.heads * self.columns * self.head_dim

    @property
    def bytes(self) -> float:
        """Of the keys and values in the cache."""
        return 2.0 * self.batch * self.kv_heads * self.columns * self.head_dim * self.dtype.itemsize


Shape = AttentionShape | ModuleShape | CacheShape

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def _square(
    tokens: int, dim: int, dtype: torch.dtype, causal: bool, backward: bool, batch: int = 1, heads: int = 0
) -> AttentionShape:
    kind = "training" if backward else "forward"
    heads = heads or max(2, 8192 // tokens)
    name = f"{kind} {_NAMES[dtype]} D{dim} S{tokens}" + (" causal" if causal else "")
    sizes = (batch, heads, heads, tokens, tokens, dim)
    return AttentionShape(name, f"{kind} {_NAMES[dtype]}", *sizes, dtype, causal, backward=backward)


def _masked() -> Iterator[AttentionShape]:
    group = "masks and groups bf16"
    plain = AttentionShape("", group, 1, 8, 8, 2048, 2048, 64, BF16)
    yield replace(plain, name="bool mask bf16 D64 S2048", mask="bool")
    yield replace(plain, name="float mask bf16 D64 S2048", mask="float")
    yield replace(plain, name="padding bf16 D64 S2048", mask="padding")
    yield replace(plain, name="window 256 bf16 D64 S2048", window=256)
    yield replace(plain, name="heads 8:1 bf16 D64 S2048 causal", kv_heads=1, causal=True)


def _decode(dtype: torch.dtype, batch: int = 1) -> Iterator[AttentionShape]:
    for columns in (4096, 16384, 65536):
        name = f"decode {_NAMES[dtype]} 32:4 D128 N{columns}"
        yield AttentionShape(name, f"decode {_NAMES[dtype]}", batch, 32, 4, 1, columns, 128, dtype)


def _caches() -> Iterator[CacheShape]:
    sizes = ((8, 1, 4096), (8, 1, 16384), (8, 1, 65536), (32, 4, 4096), (32, 4, 65536), (1, 1, 16384), (8, 8, 16384))
    for heads, kv_heads, columns in sizes:
        name = f"bf16 cache {heads}:{kv_heads} D128 N{columns}"
        yield CacheShape(name, "bf16 cache", 1, heads, kv_heads, columns, 128)


def _growth() -> Iterator[AttentionShape]:
    for backward, causal in ((False, False), (False, True), (True, False)):
        for tokens in (1024, 2048, 4096, 8192, 16384):
            shape = _square(tokens, 64, F32, causal, backward, heads=1)
            yield replace(shape, group=shape.group + " causal" * causal)


def _cpu() -> Iterator[Shape]:
    for dtype in (BF16, F16, F32):
        for dim in (64, 128):
            for tokens in (512, 1024, 2048, 4096, 8192):
                yield _square(tokens, dim, dtype, False, False)
                yield _square(tokens, dim, dtype, True, False)
    for dtype in (BF16, F32):
        for dim in (64, 128):
            for tokens in (512, 2048):
                yield _square(tokens, dim, dtype, False, True)
                yield _square(tokens, dim, dtype, True, True)
    yield from _masked()
    yield from _decode(BF16)


def _gpu(backward: bool) -> Iterator[AttentionShape]:
    for dim in (64, 96, 128, 256, 512):
        for tokens in (2048, 4096, 16384):
            heads = 2048 // dim
            for causal in (False, True):
                yield _square(tokens, dim, BF16, causal, backward, max(1, 16384 // tokens), heads)


def _module() -> Iterator[ModuleShape]:
    sizes = ((1, 8, 64, 4), (64, 8, 64, 4), (8, 128, 768, 12), (2, 512, 512, 8), (1, 2048, 128, 4), (16, 2048, 128, 4))
    for batch, tokens, width, heads in sizes:
        for dtype in (F32, BF16):
            for weights in (False, True):
                for backward in (False, True):
                    kind = "training" if backward else "inference"
                    name = f"{kind} {_NAMES[dtype]} {batch} x {tokens}, width {width}" + ", weights" * weights
                    group = f"module {kind} {_NAMES[dtype]}"
                    yield ModuleShape(name, group, batch, tokens, width, heads, dtype, False, weights, backward)


def _models() -> Iterator[Shape]:
    """A short tour: one shape each of what people run."""
    attention = (
        AttentionShape("digits-8", "", 64, 4, 4, 8, 8, 16),
        AttentionShape("bert-128-padded", "", 8, 12, 12, 128, 128, 64, mask="padding"),
        AttentionShape("vit-197", "", 8, 12, 12, 197, 197, 64),
        AttentionShape("vit-197-bf16", "", 8, 12, 12, 197, 197, 64, BF16),
        AttentionShape("bert-512-padded", "", 2, 12, 12, 512, 512, 64, mask="padding"),
        AttentionShape("gpt2-1024-causal", "", 1, 12, 12, 1024, 1024, 64, causal=True),
        AttentionShape("llama-1024-gqa-causal", "", 1, 16, 4, 1024, 1024, 128, causal=True),
        AttentionShape("llama-1024-gqa-causal-bf16", "", 1, 16, 4, 1024, 1024, 128, BF16, causal=True),
        AttentionShape("long-8192", "", 1, 1, 1, 8192, 8192, 64),
        AttentionShape("decode-4096-gqa", "", 4, 16, 4, 1, 4096, 128),
        AttentionShape("decode-4096-gqa-bf16", "", 4, 16, 4, 1, 4096, 128, BF16),
    )
    for a in attention:
        yield replace(a, name=f"attention {a.name} forward", group="attention forward")
        if a.rows > 1:
            yield replace(a, name=f"attention {a.name} fwd+bwd", group="attention fwd+bwd", backward=True)
    modules = (
        ModuleShape("digits-8", "", 64, 8, 64, 4, padding=True),
        ModuleShape("bert-128-padded", "", 8, 128, 768, 12, padding=True),
        ModuleShape("vit-197", "", 4, 197, 768, 12),
        ModuleShape("vit-197-bf16", "", 4, 197, 768, 12, BF16),
        ModuleShape("encoder-512-padded", "", 2, 512, 512, 8, padding=True),
        ModuleShape("encoder-512-weights", "", 2, 512, 512, 8, need_weights=True),
        ModuleShape("narrow-2048", "", 1, 2048, 128, 4),
    )
    for m in modules:
        yield replace(m, name=f"module {m.name} inference", group="module inference")
        if m.dtype == F32:  # without 16-bit instructions the projections alone, PyTorch's in both, take ten seconds
            yield replace(m, name=f"module {m.name} training", group="module training", backward=True)


SUITES: dict[str, tuple[Shape, ...]] = {
    "models": tuple(_models()),
    "cpu": tuple(_cpu()),
    "module": tuple(_module()),
    "decode": (*_decode(F32), *_decode(BF16), *_decode(F16), *_caches()),
    "growth": tuple(_growth()),
    "gpu": (*_gpu(False), *_decode(BF16, 16)),
    "train": tuple(_gpu(True)),
}
