"""Two functions beside attention: a row softmax, and RMS norm with rotary embedding of query and key.

    fused_softmax   y = softmax(softcap(scale * x) + mask)
    rope_qk_norm    y = rotation of x * rsqrt(mean(x^2) + eps) * weight

`backends/reference_ops.py` defines both; Triton kernels compute them in one pass. A second derivative differentiates
the gradient's formula, in eager operations.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .backends import reference_ops
from .backends.reference_ops import Softmax, Tables
from .spec import FLOAT_DTYPES, ArgumentError, AttentionSpec, Causal, Device

# --- who computes -------------------------------------------------------------------------------------------------


def _triton_refuses(tensors: tuple[Tensor, ...]) -> str | None:
    """Why the Triton kernels cannot run on these tensors: as for the smallest attention of their kind."""
    like = tensors[0]
    if (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or any(type(t) not in (Tensor, torch.nn.Parameter) for t in tensors)
    ):
        return "a transform, a dispatch mode or a subclass of Tensor needs operations that torch can trace"
    smallest = AttentionSpec(1, 1, 1, 1, 1, 1, 1, like.dtype, 1.0)
    return dispatch.BACKENDS["triton"].supports(smallest, Device.of(like))


def _row_too_long(head_dim: int) -> str | None:
    from .backends.triton import rope_norm

    return None if head_dim <= rope_norm.MAX_DIM else f"head dims up to {rope_norm.MAX_DIM}, not {head_dim}"


def _takes_triton(function: str, tensors: tuple[Tensor | None, ...], head_dim: int | None = None) -> bool:
    """Whether the kernels run a call, as `use_backend` asks; otherwise the definition does.

    Raises:
        BackendError: a backend was named with `strict=True` and does not run the call.
    """
    if torch.compiler.is_compiling():
        return False
    present = tuple(t for t in tensors if t is not None)
    name, strict = dispatch.requested()
    on_gpu = present[0].is_cuda
    if name == "reference" or (name == "auto" and not on_gpu):
        return False
    why = _triton_refuses(present)
    if why is None and head_dim is not None:
        why = _row_too_long(head_dim)
    refusal = why if name in ("auto", "triton") else f"it has no kernel for {function}"
    if refusal is None and (name == "triton" or on_gpu):
        return True
    if name != "auto" and strict:
        raise dispatch.BackendError(f"backend {name!r} was asked for and does not run this call: {refusal}")
    if not on_gpu:
        return False
    if why is not None:
        text = f"fused_attention runs {function} in eager operations, many launches and copies (triton: {why})"
        warnings.warn(text, dispatch.FallbackWarning, stacklevel=3)
    return why is None


def _bad(name: str, was: object, expected: str) -> ArgumentError:
    return ArgumentError(f"{name}: got {was}, expected {expected}")


def _check_tensor(name: str, t: object, dtypes: tuple[torch.dtype, ...], like: Tensor | None = None) -> None:
    """like: another tensor of the call, on whose device it must be."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: got {type(t).__name__}, expected a Tensor")
    if t.layout != torch.strided:
        raise _bad(f"{name}.layout", t.layout, "a strided (dense) tensor")
    if t.dtype not in dtypes:
        raise _bad(f"{name}.dtype", t.dtype, " or ".join(str(dtype) for dtype in dtypes))
    if like is not None and t.device != like.device:
        raise _bad(f"{name}.device", t.device, f"{like.device}, where the other tensors are")


def _number(name: str, value: object, expected: str, low: float = -math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__} {value!r}, expected {expected}")
    if not (low <= value < math.inf and value > -math.inf):  # not isfinite, which cannot be traced
        raise _bad(name, value, expected)
    return float(value)


# --- softmax ------------------------------------------------------------------------------------------------------


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, mask: Tensor | None, o: Softmax) -> Tensor:
        from .backends.triton import softmax

        y = softmax.forward(scores, mask, o, Device.of(scores).arch)
        ctx.o = o
        # Only these: y holds all that the gradient needs, but for the softcap's derivative.
        ctx.save_for_backward(y, scores if o.softcap is not None else None, mask if ctx.needs_input_grad[1] else None)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        y, scores, mask = ctx.saved_tensors
        dx: Tensor | None
        ds: Tensor | None
        if torch.is_grad_enabled():
            dx, ds = reference_ops.softmax_gradients(y, dy, scores, ctx.o)
        else:
            from .backends.triton import softmax

            needs = softmax.Needs(ctx.needs_input_grad[0], mask)
            dx, ds = softmax.backward(scores, y, dy, ctx.o, needs, Device.of(y).arch)
        return dx, None if mask is None or ds is None else reference_ops.sum_to(ds, mask), None


def _check_softmax(scores: Tensor, mask: Tensor | None, causal: object) -> None:
    _check_tensor("scores", scores, FLOAT_DTYPES)
    if scores.dim() < 2:
        raise _bad("scores", f"{scores.dim()} dimensions {list(scores.shape)}", "2 dimensions or more, [..., M, N]")
    if causal is not None and causal not in ("top_left", "bottom_right"):
        kind = ArgumentError if isinstance(causal, str) else TypeError
        raise kind(f"causal: got {causal!r}, expected 'top_left', 'bottom_right' or None")
    if mask is None:
        return
    _check_tensor("mask", mask, (torch.bool, *FLOAT_DTYPES), scores)
    extra = scores.dim() - mask.dim()
    if extra < 0 or any(n not in (1, want) for n, want in zip(mask.shape, scores.shape[max(extra, 0) :], strict=True)):
        raise _bad("mask", f"shape {list(mask.shape)}", f"one that broadcasts to that of scores, {list(scores.shape)}")


def fused_softmax(
    scores: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    causal: Causal | None = None,
) -> Tensor:
    """Softmax over the last dimension of softcap(scale * scores) + mask, in one pass over memory.

    A row that shows nothing gives zeros and zero gradients, and an entry that is hidden never reaches the result, even
    where it holds NaN. Accumulates in float32, in float64 for float64 (which the eager definition computes). Gradients
    for scores and for a floating mask are the same from run to run. Triton kernels compute it on a GPU, eager
    operations elsewhere and in float64; under `torch.compile` the eager definition is traced for the compiler to fuse.

    Args:
        scores: [..., M, N]; float32, bfloat16, float16 or float64. Any strides (a last dimension that is not
            contiguous is copied), rows of any length.
        mask: bool (True is visible) or floating (added; -inf hides), broadcastable to `scores`; never expanded in
            memory.
        scale: multiplies the scores.
        softcap: scores become softcap * tanh(scores / softcap) after the scale (Gemma 2).
        causal: hide columns right of the diagonal. "top_left": that of row i is column i; "bottom_right": i + N - M.

    Returns:
        [..., M, N], contiguous, in the dtype of `scores`.

    Raises:
        ArgumentError: (a ValueError) a shape, dtype, device or value is wrong.
        TypeError: an argument has the wrong type.
        BackendError: the backend named by `use_backend` has no kernel for the call.
    """
    _check_softmax(scores, mask, causal)
    expected = "a positive, finite number or None"
    cap = None if softcap is None else _number("softcap", softcap, expected)
    if cap is not None and cap <= 0.0:
        raise _bad("softcap", cap, expected)
    o = Softmax(_number("scale", scale, "a finite number"), cap, causal)
    if not _takes_triton("fused_softmax", (scores, mask)):
        return reference_ops.softmax(scores, mask, o)
    if torch.is_grad_enabled() and (scores.requires_grad or (mask is not None and mask.requires_grad)):
        return _Softmax.apply(scores, mask, o)
    from .backends.triton import softmax

    return softmax.forward(scores, mask, o, Device.of(scores).arch)


# --- RMS norm and rotary embedding ----------------------------------------------------------------------------------


class _RopeNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        eps: float,
        interleaved: bool,
        query: Tensor | None,
        key: Tensor | None,
        query_weight: Tensor | None,
        key_weight: Tensor | None,
        *turn: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.eps, ctx.interleaved = eps, interleaved
        ctx.set_materialize_grads(False)
        # A rotation alone is linear: its gradient reads no input.
        kept = (query if query_weight is not None else None, key if key_weight is not None else None)
        ctx.save_for_backward(*kept, query_weight, key_weight, *turn)
        return _rope_norm_kernels(query, key, query_weight, key_weight, _tables(turn, interleaved), eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        tables = _tables(ctx.saved_tensors[4:], ctx.interleaved)
        sides = list(zip(ctx.saved_tensors[0:2], ctx.saved_tensors[2:4], grads, ctx.needs_input_grad[4:6], strict=True))
        found: list[tuple[Tensor | None, Tensor | None]] = [(None, None), (None, None)]
        if torch.is_grad_enabled():
            for i, (x, weight, dy, _) in enumerate(sides):
                if dy is not None:
                    found[i] = reference_ops.rope_norm_gradients(dy if x is None else x, dy, weight, tables, ctx.eps)
        elif any(dy is not None for dy in grads):
            found = _rope_norm_backward_kernels(sides, tables, ctx.eps)
        (dquery, dquery_weight), (dkey, dkey_weight) = found
        return None, None, dquery, dkey, dquery_weight, dkey_weight, None, None, None


def _tables(turn: tuple[Tensor | None, ...], interleaved: bool) -> Tables | None:
    cos, sin, positions = turn
    return None if cos is None or sin is None else Tables(cos, sin, positions, interleaved)


def _rope_norm_kernels(
    query: Tensor | None,
    key: Tensor | None,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    tables: Tables | None,
    eps: float,
) -> tuple[Tensor | None, Tensor | None]:
    from .backends.triton.rope_norm import Given, rope_norm

    like = query if query is not None else key
    assert like is not None
    made = rope_norm(Given(query, query_weight), Given(key, key_weight), tables, eps, Device.of(like).arch)
    return made[0].y, made[1].y


def _rope_norm_backward_kernels(
    sides: list[tuple[Tensor | None, Tensor | None, Tensor | None, bool]], tables: Tables | None, eps: float
) -> list[tuple[Tensor | None, Tensor | None]]:
    """dx and dweight for query and for key. sides: x (if there is a weight), weight, dy, whether dweight is wanted."""
    from .backends.triton.rope_norm import Given, rope_norm

    given = [Given() if dy is None else Given(x, weight, dy, wanted) for x, weight, dy, wanted in sides]
    like = next(g.dy for g in given if g.dy is not None)
    found: list[tuple[Tensor | None, Tensor | None]] = []
    for g, made in zip(given, rope_norm(given[0], given[1], tables, eps, Device.of(like).arch), strict=True):
        dweight = None
        if g.weight is not None and g.weight_gradient:
            # No partial sums: there are no rows.
            dweight = torch.zeros_like(g.weight) if made.partial is None else made.partial.sum(0).to(g.weight.dtype)
        found.append((made.y, dweight))
    return found


def _check_rows(query: Tensor | None, key: Tensor | None) -> Tensor:
    """Checks query and key; returns the first that is there."""
    if query is None and key is None:
        raise _bad("query", "None, and None for key", "a tensor for at least one of them")
    like: Tensor | None = None
    for name, t in (("query", query), ("key", key)):
        if t is None:
            continue
        _check_tensor(name, t, FLOAT_DTYPES if like is None else (like.dtype,), like)
        if t.dim() != 4:
            raise _bad(name, f"{t.dim()} dimensions {list(t.shape)}", "4 dimensions [B, H, S, D]")
        if t.shape[3] == 0:
            raise _bad(name, f"head dim 0 in {list(t.shape)}", "a head dim of at least 1")
        like = t if like is None else like
        for what, dim in (("batch size", 0), ("head dim", 3)):
            if t.shape[dim] != like.shape[dim]:
                raise _bad(name, f"{what} {t.shape[dim]} in {list(t.shape)}", f"query's, {like.shape[dim]}")
    assert like is not None
    return like


def _check_tables(cos: Tensor | None, sin: Tensor | None, like: Tensor) -> None:
    if cos is None or sin is None:
        if cos is not None or sin is not None:
            raise _bad("sin" if sin is None else "cos", "None", "a tensor: cos and sin come together")
        return
    dtypes = (torch.float32, torch.float64) if like.dtype == torch.float64 else (torch.float32,)
    for name, t in (("cos", cos), ("sin", sin)):
        _check_tensor(name, t, dtypes, like)
        if t.dim() != 2 or 2 * t.shape[1] > like.shape[3]:
            raise _bad(name, f"shape {list(t.shape)}", f"[L, R / 2] with R at most the head dim {like.shape[3]}")
        if t.requires_grad and torch.is_grad_enabled():
            raise _bad(name, "a tensor that requires gradients", "a constant table: it gets no gradient")
    if sin.shape != cos.shape:
        raise _bad("sin", f"shape {list(sin.shape)}", f"that of cos, {list(cos.shape)}")


def _check_positions(positions: Tensor | None, cos: Tensor | None, query: Tensor | None, key: Tensor | None) -> None:
    lengths = [(name, t.shape[2]) for name, t in (("query", query), ("key", key)) if t is not None]
    if positions is None:
        for name, length in lengths:
            if cos is not None and length > cos.shape[0]:
                raise _bad("cos", f"{cos.shape[0]} rows", f"at least {name}'s length {length}")
        return
    like = query if query is not None else key
    assert like is not None
    if cos is None:
        raise _bad("positions", "a tensor", "None without cos and sin")
    _check_tensor("positions", positions, (torch.int64, torch.int32, torch.int16, torch.uint8), like)
    for name, length in lengths:
        if positions.dim() != 2 or positions.shape[0] not in (1, like.shape[0]) or positions.shape[1] != length:
            raise _bad("positions", f"shape {list(positions.shape)}", f"[B or 1, {length}], {name}'s length")
    readable = not torch.compiler.is_compiling() and positions.device.type == "cpu" and type(positions) is Tensor
    if readable and positions.numel() and torch._C._functorch.peek_interpreter_stack() is None:
        low, high = (int(n) for n in positions.aminmax())
        if low < 0 or high >= cos.shape[0]:
            raise _bad(
                "positions", f"a position of {low if low < 0 else high}", f"0 .. {cos.shape[0] - 1}, rows of cos"
            )


def _check_weight(name: str, weight: Tensor | None, x: Tensor | None) -> None:
    if weight is None:
        return
    if x is None:
        raise _bad(name, "a tensor", f"None without {name.removesuffix('_weight')}")
    _check_tensor(name, weight, FLOAT_DTYPES, x)
    if tuple(weight.shape) != (x.shape[3],):
        raise _bad(name, f"shape {list(weight.shape)}", f"[{x.shape[3]}], the head dim")


def rope_qk_norm(
    query: Tensor | None,
    key: Tensor | None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    positions: Tensor | None = None,
    query_weight: Tensor | None = None,
    key_weight: Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """RMS norm of every head of query and key, then rotary embedding, both in one launch.

    With a weight, x becomes x * rsqrt(mean(x^2) + eps) * weight over D (Zhang & Sennrich, "Root mean square layer
    normalization", 2019; for query and key: Henry et al., 2020; Dehghani et al., 2023); without one it is left as it
    is. Then the first R dims turn pair by pair, (a, b) -> (a cos - b sin, b cos + a sin) (Su et al., "RoFormer", 2021),
    and the others pass through. Computed in float32, rounded once; float64 by the eager definition. Gradients are the
    same from run to run. Triton kernels compute it on a GPU, eager operations elsewhere; under `torch.compile` the
    eager definition is traced for the compiler to fuse.

    Args:
        query: [B, H, M, D] or None; float32, bfloat16, float16 or float64, any strides (a last dimension that is not
            contiguous is copied).
        key: [B, HK, N, D] or None.
        cos: [L, R / 2] float32 (or float64 with a float64 query), R <= D; None: no rotation. Gets no gradient, and is
            refused if it requires one.
        sin: likewise, of cos's shape.
        positions: [B, S] or [1, S] integers, the row of cos and sin for each token; S is the length of query and of
            key. Default 0, 1, 2, ... A position outside the table raises on a CPU; elsewhere, where looking would
            wait for the device, the dims that it turns become NaN.
        query_weight: [D], floating; None: query is not normalised.
        key_weight: [D], likewise.
        eps: added to the mean square.
        interleaved: pairs are (0, 1), (2, 3), ... (GPT-J) instead of (0, R/2), (1, R/2 + 1), ... (GPT-NeoX, Llama).

    Returns:
        (query, key) in their dtypes and memory order; None for what was None.

    Raises:
        ArgumentError: (a ValueError) a shape, dtype, device or value is wrong.
        TypeError: an argument has the wrong type.
        BackendError: the backend named by `use_backend` has no kernel for the call.
    """
    like = _check_rows(query, key)
    _check_tables(cos, sin, like)
    _check_positions(positions, cos, query, key)
    _check_weight("query_weight", query_weight, query)
    _check_weight("key_weight", key_weight, key)
    eps = _number("eps", eps, "a finite number of at least 0", low=0.0)
    if not isinstance(interleaved, bool):
        raise TypeError(f"interleaved: got {interleaved!r}, expected a bool")
    tables = _tables((cos, sin, positions), interleaved)
    differentiable = (query, key, query_weight, key_weight)
    if not _takes_triton("rope_qk_norm", (*differentiable, cos, sin, positions), like.shape[3]):
        return (
            None if query is None else reference_ops.rope_norm(query, query_weight, tables, eps),
            None if key is None else reference_ops.rope_norm(key, key_weight, tables, eps),
        )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable):
        return _RopeNorm.apply(eps, interleaved, *differentiable, cos, sin, positions)
    return _rope_norm_kernels(*differentiable, tables, eps)
