"""`scaled_dot_product_attention` against PyTorch's own function, on the C++ kernels, by the tolerance rule.

`ref` is the plain formula in float64 (long double for float64 inputs), `same` plain PyTorch in the tested dtype: its
function and the formula. The problems are a seeded random sample of the product of the axes below; every one runs
forward and backward with memory from torch.empty poisoned.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_attention import use_backend
from fused_attention.sdpa import scaled_dot_product_attention
from fused_attention.spec import Inputs, Options, make_spec

from .numerics import Mismatch, assert_close, exact_attention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
PER_DTYPE = {"fp32": 1000, "bf16": 800, "fp16": 700, "fp64": 600}
CHUNK = 50
NAMES = ("output", "dq", "dk", "dv", "dmask")

LENGTHS = [(1, 1), (1, 3), (3, 1), (1, 33), (33, 1), (3, 3), (5, 7), (16, 16), (17, 65), (33, 33), (31, 100), (64, 64)]
LONGER = [(65, 129), (113, 203), (203, 113), (239, 1), (1, 239), (128, 128), (127, 257), (799, 3), (3, 799)]
LONGEST = [(1023, 1024), (1024, 1023), (257, 513)]
DIMS = [1, 2, 3, 5, 8, 13, 16, 17, 24, 31, 32, 33, 40, 48, 64, 65, 72, 80, 96, 100, 127, 128, 129, 160, 192, 255, 256]
DIMS += [257, 320, 384, 511, 512]
HEADS = [(1, 1, 1), (2, 2, 2), (3, 3, 3), (5, 5, 5)]  # of query, key, value
GROUPED = [(4, 2, 2), (4, 1, 1), (6, 3, 3), (8, 2, 2), (5, 1, 1), (6, 2, 3), (6, 3, 2), (4, 4, 1), (4, 1, 2)]
MASK_KINDS = ["none", "none", "bool", "bool", "float32", "float32", "same", "same+grad", "float32+grad"]
MASK_FORMS = ["mn", "1n", "m1", "11", "n", "hmn", "h1n", "b11n", "b1mn", "1hmn", "bhm1", "bhmn", "bh1n"]
MASK_MEMORY = ["contiguous", "transposed", "expanded", "sliced"]
LAYOUTS = ["contiguous", "bshd", "packed", "expanded", "last_strided"]
SCALES = [None, None, None, 0.0, 1.0, -0.3, 0.07]
SHIFTS = [0.0, 0.0, 0.0, 3.0]  # added to query, subtracted from key: logits far below zero


class Problem(NamedTuple):
    dtype: str
    rank: int
    batch: int
    heads: tuple[int, int, int]
    lengths: tuple[int, int]
    dims: tuple[int, int]
    mask: str
    form: str
    memory: str
    hiding: bool  # some of the mask hides
    dead: bool  # some rows see nothing
    causal: bool
    scale: float | None
    layout: str
    shift: float
    seed: int


def _sample(dtype: str, generator: random.Random, seed: int) -> Problem:
    pick = generator.choice
    # Long double has no fast matrix product: its problems are small.
    limit = 4e5 if dtype == "fp64" else 3e6
    while True:
        lengths = pick(generator.choices([LENGTHS, LONGER, LONGEST], [80.0, 19.0, 1.0])[0])
        dim = pick(DIMS)
        dims = (dim, dim if generator.random() < 0.6 else pick(DIMS))
        heads = pick(HEADS if generator.random() < 0.6 else GROUPED)
        rank = 2 if heads[0] == 1 and generator.random() < 0.2 else pick([4, 4, 4, 4, 4, 4, 3, 5])
        batch = 1 if rank < 4 else 4 if rank == 5 else pick([1, 2, 8, 21] if max(lengths) <= 7 else [1, 2, 2, 3])
        large = 1e8 if lengths in LONGEST and dtype != "fp64" and max(dims) <= 64 and heads[0] == batch == 1 else limit
        if batch * heads[0] * lengths[0] * lengths[1] * sum(dims) <= large:
            break
    kind = pick(MASK_KINDS)
    form = pick(MASK_FORMS) if kind != "none" else ""
    if form.endswith("1"):  # its gradient is zero, a matter of test_sdpa_edges.py
        kind = kind.removesuffix("+grad")
    return Problem(
        dtype,
        rank,
        batch,
        heads,
        lengths,
        dims,
        kind,
        form,
        pick(MASK_MEMORY) if kind != "none" else "",
        generator.random() < 0.7,
        generator.random() < 0.3,
        generator.random() < 0.35,
        pick(SCALES),
        pick(LAYOUTS),
        pick(SHIFTS),
        seed,
    )


def _plan() -> list[Problem]:
    generator = random.Random(20240607)
    seeds = itertools.count()
    return [_sample(d, generator, next(seeds)) for d, n in PER_DTYPE.items() for _ in range(n)]


PLAN = _plan()
CHUNKS = {f"{PLAN[i].dtype}-{i}": PLAN[i : i + CHUNK] for i in range(0, len(PLAN), CHUNK)}


# --- tensors ----------------------------------------------------------------------------------------------------------


def _laid_out(layout: str, shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
    """Random [B, H, S, D] float64 values in memory of the layout's order."""
    b, h, s, d = shape
    if layout == "bshd":
        return torch.randn(b, s, h, d, generator=generator, dtype=torch.float64).transpose(1, 2)
    if layout == "last_strided":
        return torch.randn(b, h, d, s, generator=generator, dtype=torch.float64).mT
    return torch.randn(b, h, s, d, generator=generator, dtype=torch.float64)


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype, memory_format=torch.preserve_format)


def _qkv(p: Problem, generator: torch.Generator) -> list[Tensor]:
    (hq, hk, hv), (m, n), (d, dv) = p.heads, p.lengths, p.dims
    shapes = ((p.batch, hq, m, d), (p.batch, hk, n, d), (p.batch, hv, n, dv))
    tensors = []
    for shape, shift in zip(shapes, (p.shift, -p.shift, 0.0), strict=True):
        if p.layout == "expanded":
            one = torch.randn(1, *shape[1:], generator=generator, dtype=torch.float64) + shift
            tensors.append(one.to(DTYPES[p.dtype]).expand(shape))
        elif p.layout == "packed":  # the cast must not close the gaps
            wide = _laid_out("bshd", (*shape[:3], shape[3] + 5), generator) + shift
            tensors.append(_cast(wide, DTYPES[p.dtype])[..., 3 : 3 + shape[3]])
        else:
            tensors.append(_cast(_laid_out(p.layout, shape, generator) + shift, DTYPES[p.dtype]))
    return tensors


def _mask_shape(p: Problem) -> tuple[int, ...]:
    sizes = {"b": p.batch, "h": p.heads[0], "m": p.lengths[0], "n": p.lengths[1], "1": 1}
    form = p.form[-2:] if p.rank == 2 else p.form[-3:] if p.rank == 3 else p.form
    return tuple(sizes[c] for c in form)


def _mask(p: Problem, generator: torch.Generator) -> Tensor | None:
    """The mask as the caller holds it, of rank at most 4 (the first dimension is split for rank 5)."""
    if p.mask == "none":
        return None
    shape = _mask_shape(p)
    hidden = torch.rand(shape, generator=generator) < (0.4 if p.hiding else 0.0)
    if p.dead and hidden.dim() > 1 and hidden.shape[-2] > 1:
        hidden[..., :: max(2, hidden.shape[-2] // 2), :] = True
    elif p.dead:
        hidden[..., : max(1, hidden.shape[-1] // 2)] = True
        hidden[:1] = True
    if p.mask == "bool":
        mask = ~hidden
    else:
        dtype = torch.float32 if p.mask.startswith("float32") else DTYPES[p.dtype]
        mask = torch.randn(shape, generator=generator).masked_fill(hidden, float("-inf")).to(dtype)
    if p.memory == "transposed" and mask.dim() > 1:
        mask = mask.mT.contiguous().mT
    elif p.memory == "sliced":
        mask = F.pad(mask, (2, 3))[..., 2:-3]
    elif p.memory == "expanded" and mask.dim() > 1:
        full = (p.batch, p.heads[0], *p.lengths)
        mask = mask.expand(full[-mask.dim() :] if p.rank < 4 else full)
    return mask


def _leaves(*tensors: Tensor | None, grad_mask: bool) -> list[Any]:
    """Detached views with the same strides that require gradients."""
    *qkv, mask = tensors
    leaves: list[Any] = [t.detach().requires_grad_() for t in qkv if t is not None]
    return [*leaves, mask if mask is None or not grad_mask else mask.detach().requires_grad_()]


# --- the three results ------------------------------------------------------------------------------------------------


def _visible(p: Problem, mask: Tensor | None) -> Tensor:
    """bool [B, H, M, N]"""
    full = (p.batch, p.heads[0], *p.lengths)
    visible = torch.ones(full, dtype=torch.bool)
    if p.causal:
        visible = visible.tril()
    if mask is not None:
        visible = visible & (mask if mask.dtype == torch.bool else mask != float("-inf"))
    return visible


def _order(p: Problem, order: int) -> tuple[Tensor, Tensor]:
    """Permutations of keys and head dim: an order of summation. 0 is as they are."""
    generator = torch.Generator().manual_seed(order)
    sizes = (p.lengths[1], p.dims[0])
    keys, dim = (torch.randperm(n, generator=generator) if order else torch.arange(n) for n in sizes)
    return keys, dim


def _reordered(mask: Tensor, keys: Tensor) -> Tensor:
    return mask[..., keys] if mask.dim() and mask.shape[-1] > 1 else mask


def _formula(
    p: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dout: Tensor,
    dtype: torch.dtype,
    order: int = 0,
) -> list[Tensor]:
    """The output and the gradients of q, k, v (and a floating mask), in the given dtype by the plain formula."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
    wide = [t.repeat_interleave(p.heads[0] // t.shape[1], dim=1) for t in leaves]
    visible = _visible(p, mask)
    dead = ~visible.any(-1, keepdim=True)
    keys, dim = _order(p, order)
    wide = [wide[0][..., dim], wide[1][:, :, keys][..., dim], wide[2][:, :, keys]]
    visible = visible[..., keys]
    scores = (wide[0] @ wide[1].mT) * (p.dims[0] ** -0.5 if p.scale is None else p.scale)
    if mask is not None and mask.dtype != torch.bool:
        leaves.append(mask.detach().to(dtype if dtype == torch.float64 else mask.dtype).requires_grad_())
        scores = scores + _reordered(leaves[3], keys).to(dtype)
    scores = scores.masked_fill(~visible, float("-inf")).masked_fill(dead, 0.0)
    out = scores.softmax(-1).masked_fill(dead, 0.0) @ wide[2]
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]


def _exact(p: Problem, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dout: Tensor) -> list[Any]:
    """`_formula` in long double."""
    repeated = [t.detach().repeat_interleave(p.heads[0] // t.shape[1], dim=1) for t in (q, k, v)]
    x = Inputs(*repeated, mask=None if mask is None else mask.detach()[(None,) * (4 - mask.dim())])
    found = exact_attention(make_spec(x, Options("top_left" if p.causal else None, scale=p.scale)), x, dout)

    def grouped(name: str, t: Tensor) -> np.ndarray:
        grad = found[name]
        return grad.reshape(grad.shape[0], t.shape[1], -1, *grad.shape[2:]).sum(2)

    grads = [grouped(n, t) for n, t in (("query", q), ("key", k), ("value", v))]
    return [
        found["output"],
        *grads,
        *([found["mask"].reshape(mask.shape)] if mask is not None and "mask" in found else []),
    ]


def _torch(
    p: Problem, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dout: Tensor, order: int = 0
) -> list[Tensor]:
    """PyTorch's function in the tested dtype, in the form that its fused kernel takes.

    Mask and `is_causal` become one mask, heads are repeated, and head dims padded to one size. Rows that see nothing,
    where its paths answer NaN or zero by turns, are given something to see and no incoming gradient. A mask's gradient
    takes its unfused path.
    """
    leaves = _leaves(q, k, v, mask, grad_mask=mask is not None and mask.dtype != torch.bool)
    used = leaves[3]
    dead = ~_visible(p, mask).any(-1, keepdim=True)
    scale = p.dims[0] ** -0.5 if p.scale is None else p.scale
    if mask is None and p.causal and (order or scale <= 0):  # with scale <= 0 its is_causal gives NaN
        used = _visible(p, None)
    elif mask is not None and (p.causal or dead.any() or mask.dim() < 2):
        lower = _visible(p, None) | dead
        hidden = float("-inf") if mask.dtype != torch.bool else False
        open_value = 0.0 if mask.dtype != torch.bool else True
        used = torch.where(lower, torch.where(dead, open_value, used), hidden)
    causal = p.causal and used is None
    keys, dim = _order(p, order)
    used = None if used is None else _reordered(used, keys)
    wide = [t.repeat_interleave(p.heads[0] // t.shape[1], dim=1) for t in leaves[:3]]
    wide = [wide[0][..., dim], wide[1][:, :, keys][..., dim], wide[2][:, :, keys]]
    wide = [F.pad(t, (0, max(p.dims) - t.shape[-1])) for t in wide]
    found: list[Tensor] = []
    for inputs, held in ((leaves[:3], None if used is None else used.detach()), (leaves[3:], used)):
        if found and (held is None or not held.requires_grad):
            break
        out = F.scaled_dot_product_attention(*wide, held, is_causal=causal, scale=scale)[..., : p.dims[1]]
        if not found:
            found.append(out.detach().masked_fill(dead, 0.0))
        found += torch.autograd.grad(out, inputs, dout.masked_fill(dead, 0.0), retain_graph=True)
    return found


def _farthest(peers: tuple[Tensor, ...], ref: Any) -> Tensor:
    """The peer with the largest error."""
    if isinstance(ref, Tensor):
        errors = [float((t.double() - ref).abs().max()) if t.numel() else 0.0 for t in peers]
    else:
        errors = [float(np.abs(t.numpy() - ref).max(initial=0.0)) for t in peers]
    assert np.isfinite(errors).all()
    return peers[int(np.argmax(errors))]


def _with_rank(p: Problem, t: Tensor | None) -> Tensor | None:
    """[B, H, S, D] as the problem's rank has it; views only."""
    if t is None or p.rank == 4 or (p.rank == 5 and t.dim() < 4):
        return t
    if p.rank == 5:
        return t.unflatten(0, (2, 2)) if t.shape[0] == 4 else t[None]
    return t[(0,) * max(0, t.dim() - p.rank)]


def _ours(p: Problem, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dout: Tensor) -> list[Tensor]:
    leaves = _leaves(*(_with_rank(p, t) for t in (q, k, v, mask)), grad_mask=p.mask.endswith("+grad"))
    held = [None if t is None else t.detach().clone() for t in leaves]
    out = scaled_dot_product_attention(
        *leaves, is_causal=p.causal, scale=p.scale, enable_gqa=len(set(p.heads)) > 1 and p.rank > 2
    )
    wanted = leaves if p.mask.endswith("+grad") else leaves[:3]
    grads = torch.autograd.grad(out, wanted, _with_rank(p, dout))
    for before, after in zip(held, leaves, strict=True):
        assert before is None or torch.equal(before, after.detach()), "an input was modified"
    assert out.shape == (*leaves[0].shape[:-1], p.dims[1]) and out.dtype == q.dtype
    for leaf, grad in zip(wanted, grads, strict=True):
        assert grad.shape == leaf.shape and grad.dtype == leaf.dtype
    return [out.detach(), *grads]


ORDERS = 12
SHARE_OF_LUCK = 0.1  # of the problems may need more than one order


def check(p: Problem) -> bool:
    """Run one problem forward and backward and apply the rule to each result.

    `same` is the farther from `ref` of PyTorch's function and the plain formula. Of a few numbers, one evaluation may
    be exact by luck; then both are evaluated again in other orders of summation. Returns whether that was needed.
    """
    generator = torch.Generator().manual_seed(p.seed)
    q, k, v = _qkv(p, generator)
    mask = _mask(p, generator)
    dout = torch.randn(p.batch, p.heads[0], p.lengths[0], p.dims[1], generator=generator).to(q.dtype)
    call = (p, q, k, v, mask, dout)
    refs = _exact(*call) if p.dtype == "fp64" else _formula(*call, torch.float64)
    outs = _ours(*call)
    peers: list[list[Tensor]] = []
    for order in range(ORDERS):
        peers += [_torch(*call, order), _formula(*call, q.dtype, order)]
        try:
            for name, out, ref, *same in zip(NAMES, outs, refs, *peers, strict=False):
                assert_close(out.reshape(ref.shape), _farthest(tuple(same), ref), ref, name != "output", name)
            return order > 0
        except Mismatch as error:
            mismatch = error
    raise mismatch


def check_all(problems: Any) -> int:
    """Check every problem; returns how many needed more than one order."""
    failures: list[str] = []
    again = 0
    for p in problems:
        try:
            again += check(p)
        except (Mismatch, AssertionError) as error:
            failures.append(f"{error}\n    {p}")
    if failures:
        pytest.fail(f"{len(failures)} of {len(problems)} problems failed:\n" + "\n".join(failures[:10]))
    return again


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _kernels_on_poisoned_memory(poison: None) -> Iterator[None]:
    """Only the C++ kernels may serve, and what they do not write is NaN."""
    with use_backend("cpu", strict=True):
        yield


@pytest.mark.parametrize("chunk", CHUNKS)
def test_random_problems(chunk: str) -> None:
    assert check_all(CHUNKS[chunk]) <= len(CHUNKS[chunk]) * SHARE_OF_LUCK


@pytest.mark.fast
def test_a_sample_of_the_random_problems() -> None:
    small = [p for p in PLAN if p.lengths[0] * p.lengths[1] * sum(p.dims) < 2e5]
    check_all(small[::40])


@pytest.mark.fast
def test_number_of_problems(say: Callable[[str], None]) -> None:
    run = [p for chunk in CHUNKS.values() for p in chunk]
    different = len({p._replace(seed=0) for p in run})
    for axis in ("rank", "mask", "form", "memory", "layout", "causal", "scale", "shift"):
        assert len({getattr(p, axis) for p in run}) > 1
    say(f"scaled_dot_product_attention: {len(run)} problems ({different} different), forward and gradients")
    assert different >= 3000 and len(run) == sum(PER_DTYPE.values())
