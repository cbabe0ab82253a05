"""The vocabulary of the package: what one attention call is, and the only place where arguments are checked.

`AttentionSpec` is frozen, hashable and holds no tensor; backends answer `supports(spec, device)` from it alone.
`Inputs` and `Outputs` carry the tensors beside it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .arguments import ArgumentError as ArgumentError
from .arguments import Window as Window
from .arguments import as_offsets as as_offsets
from .arguments import block_sides as block_sides
from .arguments import need as _need
from .arguments import need_tensor as need_tensor
from .arguments import number as _number
from .arguments import shape_of as shape_of
from .arguments import window_sides as window_sides
from .device import Device as Device

Causal = Literal["top_left", "bottom_right"]
WeightsMode = Literal["mean", "heads"]
Precision = Literal["fp8", "int8"]

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Inputs(NamedTuple):
    """The tensors of one call, validated and in kernel layout.

    query [B, H, M, D], key [B, HK, N, D], value [B, HK, N, DV]; packed sequences are [1, H, T, D] with cumulative
    lengths. mask and bias keep their own sizes, 1 where they broadcast: [B|1, H|1, M|1, N|1].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None  # [B|1, H] float32
    sinks: Tensor | None = None  # [H]
    key_lengths: Tensor | None = None  # [B] int64
    cu_seqlens_q: Tensor | None = None  # [B + 1] int64
    cu_seqlens_k: Tensor | None = None  # [B + 1] int64
    seed: Tensor | None = None  # [1] int64, the Philox key of the dropout mask
    block_map: Tensor | None = None  # [B|1, H|1, ceil(M / BM), ceil(N / BN)] bool

    @property
    def plain(self) -> bool:
        """Query, key and value alone."""
        _, _, _, a, b, c, d, e, f, g, h, i = self
        return a is b is c is d is e is f is g is h is i is None


DIFFERENTIABLE = ("query", "key", "value", "mask", "bias", "alibi_slopes", "sinks")


class Outputs(NamedTuple):
    """output [B, H, M, DV]; lse [B, H, M]; weights [B, M, N] ("mean") or [B, H, M, N] ("heads") or None."""

    output: Tensor
    lse: Tensor
    weights: Tensor | None


class Options(NamedTuple):
    """Everything a caller chooses that is not a tensor; flat, so that a torch.library op can carry it."""

    causal: Causal | None = None
    window_left: int | None = None
    window_right: int | None = None
    softcap: float | None = None
    scale: float | None = None
    dropout_p: float = 0.0
    batch_invariant: bool = False
    weights: WeightsMode | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    block_rows: int | None = None  # BM, of a block map
    block_columns: int | None = None  # BN
    precision: Precision | None = None


@dataclass(frozen=True)
class AttentionSpec:
    """One attention problem without its data: sizes, dtype, options, which tensors are present or need gradients."""

    batch: int
    heads: int
    kv_heads: int
    rows: int  # M; the longest sequence where packed
    columns: int  # N; likewise
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    scale: float
    causal: Causal | None = None
    window: Window | None = None
    softcap: float | None = None
    dropout_p: float = 0.0
    batch_invariant: bool = False
    weights: WeightsMode | None = None
    packed: bool = False
    mask: torch.dtype | None = None
    bias: torch.dtype | None = None
    alibi_slopes: bool = False
    sinks: bool = False
    key_lengths: bool = False
    block_map: tuple[int, int] | None = None  # rows and keys of a block
    gradients: frozenset[str] = field(default_factory=frozenset)
    part_of_keys: bool = False  # backward: output and lse are of rows that see more keys than these
    transform: str | None = None  # "forward-mode AD", "torch.func": the call is traced by a transform of torch
    precision: Precision | None = None  # of products; None: that of the inputs

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // max(self.kv_heads, 1)

    @property
    def lse_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def __hash__(self) -> int:
        return self._hash  # a spec is the key of every cache on the way to a launch

    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple(self.__dict__.values()))


def only_full_precision(spec: AttentionSpec) -> str | None:
    """Why a backend whose products are of the inputs as they are cannot run `spec`; None if it may."""
    return f"products in the precision of the inputs, not in {spec.precision}" if spec.precision else None


def beyond(spec: AttentionSpec, dtypes: tuple[torch.dtype, ...], head_dim: int, precision: str = "") -> str | None:
    """Why kernels for these dtypes, head dims up to `head_dim` and a precision cannot run `spec`; None if they may."""
    if spec.transform:
        return f"{spec.transform} needs operations that torch can trace"
    if spec.precision not in (None, precision):
        return only_full_precision(spec)
    if spec.dtype not in dtypes:
        *names, last, own = (str(t).removeprefix("torch.") for t in (*dtypes, spec.dtype))
        return f"{', '.join(names)} and {last}, not {own}"
    if max(spec.head_dim, spec.value_dim) > head_dim:
        return f"head dims up to {head_dim}, not {max(spec.head_dim, spec.value_dim)}"
    if "alibi_slopes" in spec.gradients:
        return "no gradient for alibi_slopes"
    return None


def uneven_blocks(spec: AttentionSpec) -> str | None:
    """Why kernels whose tiles begin at multiples of 16 keys cannot follow a block map."""
    if spec.block_map is None or spec.block_map[1] % 16 == 0:
        return None
    return f"blocks of a multiple of 16 keys, not {spec.block_map[1]}"


_spec = functools.lru_cache(maxsize=4096)(AttentionSpec)  # the same call, the same object


# --- checks ---------------------------------------------------------------------------------------------------


def _qkv_agree(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """All that `_check_qkv` checks, without composing a message: this is on the path of every call."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4 or not q.dtype == k.dtype == v.dtype or q.dtype not in FLOAT_DTYPES:
        return False
    (b, h, _, d), (kb, hk, n, kd), (vb, vh, vn, _) = q.shape, k.shape, v.shape
    if not (kb == b and vb == b and kd == d and vh == hk and vn == n and d > 0 and hk > 0 and h % hk == 0):
        return False
    return q.device == k.device == v.device and q.layout == k.layout == v.layout == torch.strided


def _check_qkv(x: Inputs) -> None:
    q, k, v = x.query, x.key, x.value
    if isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor) and _qkv_agree(q, k, v):
        return
    for name, t in (("query", q), ("key", k), ("value", v)):
        need_tensor(name, t, optional=False)
        _need(t.layout == torch.strided, f"{name}.layout", t.layout, "a strided (dense) tensor")
        _need(t.dim() == 4, name, f"{t.dim()} dimensions {shape_of(t)}", "4 dimensions [B, H, S, D]")
        _need(t.dtype in FLOAT_DTYPES, f"{name}.dtype", t.dtype, "float32, bfloat16, float16 or float64")
        _need(t.dtype == q.dtype, f"{name}.dtype", t.dtype, f"query's {q.dtype}")
        _need(t.device == q.device, f"{name}.device", t.device, f"query's {q.device}")
    b, h, _, d = q.shape
    _need(k.shape[0] == b, "key", f"batch size {k.shape[0]} in {shape_of(k)}", f"query's batch size {b}")
    _need(v.shape[0] == b, "value", f"batch size {v.shape[0]} in {shape_of(v)}", f"query's batch size {b}")
    _need(k.shape[3] == d, "key", f"head dim {k.shape[3]} in {shape_of(k)}", f"query's head dim {d}")
    _need(v.shape[1] == k.shape[1], "value", f"{v.shape[1]} heads in {shape_of(v)}", f"key's {k.shape[1]} heads")
    _need(v.shape[2] == k.shape[2], "value", f"length {v.shape[2]} in {shape_of(v)}", f"key's length {k.shape[2]}")
    hk = k.shape[1]
    _need(
        h % hk == 0 if hk else h == 0,
        "key",
        f"{hk} heads in {shape_of(k)}",
        f"a number of heads that divides query's {h}",
    )
    _need(d > 0, "query", f"head dim 0 in {shape_of(q)}", "a head dim of at least 1")


def _check_additive(name: str, t: Tensor | None, x: Inputs, full: tuple[int, ...], boolean: bool) -> None:
    need_tensor(name, t)
    if t is None:
        return
    kinds = "bool, float32, bfloat16, float16 or float64" if boolean else "float32, bfloat16, float16 or float64"
    _need(t.dtype in FLOAT_DTYPES or (boolean and t.dtype == torch.bool), f"{name}.dtype", t.dtype, kinds)
    _need(t.device == x.query.device, f"{name}.device", t.device, f"query's {x.query.device}")
    ok = t.dim() == 4 and all(have in (1, want) for have, want in zip(t.shape, full, strict=True))
    _need(ok, name, f"shape {shape_of(t)}", f"a shape that broadcasts to [B, H, M, N] = {list(full)}")


def check_vector(name: str, t: Tensor | None, x: Inputs, shapes: tuple[tuple[int, ...], ...]) -> None:
    need_tensor(name, t)
    if t is None:
        return
    _need(t.device == x.query.device, f"{name}.device", t.device, f"query's {x.query.device}")
    _need(tuple(t.shape) in shapes, name, f"shape {shape_of(t)}", "shape " + " or ".join(str(list(s)) for s in shapes))


def _check_block_map(x: Inputs, o: Options, full: tuple[int, int, int, int], packed: bool) -> tuple[int, int] | None:
    """The size of a block; None without a map."""
    t, size = x.block_map, (o.block_rows, o.block_columns)
    need_tensor("block_map", t)
    if t is None:
        _need(size == (None, None), "block_size", size, "None without a block_map")
        return None
    if size[0] is None or size[1] is None:
        raise TypeError(f"block_size: got {size!r} beside a block_map, expected (rows, keys) of a block")
    rows, columns = size[0], size[1]
    _need(rows >= 1 and columns >= 1, "block_size", size, "at least one row and one key")
    _need(not packed, "block_map", "a Tensor", "None with packed sequences, which begin anywhere in a block")
    _need(t.dtype == torch.bool, "block_map.dtype", t.dtype, "bool")
    _need(t.device == x.query.device, "block_map.device", t.device, f"query's {x.query.device}")
    blocks = (full[0], full[1], -(-full[2] // rows), -(-full[3] // columns))
    ok = t.dim() == 4 and t.shape[0] in (1, blocks[0]) and t.shape[1] in (1, blocks[1]) and t.shape[2:] == blocks[2:]
    _need(
        ok, "block_map", f"shape {shape_of(t)}", f"[B|1, H|1, ceil(M / {rows}), ceil(N / {columns})] = {list(blocks)}"
    )
    return rows, columns


def _check_offsets(name: str, t: Tensor | None, x: Inputs, total: int, what: str) -> None:
    need_tensor(name, t, optional=False)
    assert t is not None
    _need(t.dim() == 1 and t.shape[0] >= 1, name, f"shape {shape_of(t)}", "shape [B + 1]")
    _need(t.dtype == torch.int64, f"{name}.dtype", t.dtype, "an integer dtype (int32 or int64)")
    _need(t.device == x.query.device, f"{name}.device", t.device, f"query's {x.query.device}")
    if not readable(t):
        return
    offsets = t.tolist()
    _need(offsets[0] == 0, name, f"a first offset of {offsets[0]}", "0")
    _need(offsets[-1] == total, name, f"a last offset of {offsets[-1]}", f"{what}'s total length {total}")
    for i, (a, b) in enumerate(zip(offsets, offsets[1:], strict=False)):
        _need(a <= b, name, f"{a} then {b} at position {i}", "offsets that never fall")


def check_packed(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Packed sequences have three dimensions; the rest is checked once they are in kernel layout."""
    for name, t in (("query", query), ("key", key), ("value", value)):
        need_tensor(name, t, optional=False)
        _need(not t.is_nested, name, "a nested tensor", "a dense one [T, H, D] (`attention` takes nested tensors)")
        _need(t.dim() == 3, name, f"{t.dim()} dimensions {shape_of(t)}", "3 dimensions [T, H, D]")


def readable(t: Tensor) -> bool:
    """Whether the values can be looked at without a device synchronisation: real CPU data only."""
    plain = t.device.type == "cpu" and type(t) in (Tensor, torch.nn.Parameter)
    return plain and not torch.compiler.is_compiling() and not _in_transform()


def _in_transform() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def _check_lengths(x: Inputs, batch: int, columns: int) -> None:
    t = x.key_lengths
    check_vector("key_lengths", t, x, ((batch,),))
    if t is None:
        return
    _need(t.dtype == torch.int64, "key_lengths.dtype", t.dtype, "an integer dtype (int32 or int64)")
    if readable(t) and t.numel():
        low, high = (int(n) for n in t.aminmax())
        _need(low >= 0, "key_lengths", f"a length of {low}", f"lengths in 0 .. {columns}")
        _need(high <= columns, "key_lengths", f"a length of {high}", f"lengths in 0 .. {columns}")


_DEFAULTS = Options()


def check_options(o: Options) -> None:
    if o == _DEFAULTS:
        return
    if o.causal is not None and o.causal not in ("top_left", "bottom_right"):
        kind = ArgumentError if isinstance(o.causal, str) else TypeError
        raise kind(f"causal: got {o.causal!r}, expected 'top_left', 'bottom_right' or None")
    for name, side in (("window[0] (left)", o.window_left), ("window[1] (right)", o.window_right)):
        if side is not None:
            if isinstance(side, bool) or not isinstance(side, (int, torch.SymInt)):
                raise TypeError(f"{name}: got {side!r}, expected an int of at least 0, or None")
            _need(side >= 0, name, side, "an int of at least 0, or None")
    if o.softcap is not None:
        cap = _number("softcap", o.softcap, "a positive number or None")
        _need(math.isfinite(cap) and cap > 0, "softcap", cap, "a positive, finite number or None")
    if o.scale is not None:
        scale = _number("scale", o.scale, "a number or None")
        _need(math.isfinite(scale), "scale", scale, "a finite number or None")
    p = _number("dropout_p", o.dropout_p, "a probability in [0, 1]")
    _need(0.0 <= p <= 1.0, "dropout_p", p, "a probability in [0, 1]")
    _need(o.weights in (None, "mean", "heads"), "return_weights", repr(o.weights), "'mean', 'heads' or None")
    if not isinstance(o.batch_invariant, bool):
        raise TypeError(f"batch_invariant: got {o.batch_invariant!r}, expected a bool")
    if o.precision is not None and not isinstance(o.precision, str):
        raise TypeError(f"precision: got {o.precision!r}, expected 'fp8', 'int8' or None")
    _need(o.precision in (None, "fp8", "int8"), "precision", repr(o.precision), "'fp8', 'int8' or None")


def _check_optional(x: Inputs, full: tuple[int, int, int, int]) -> None:
    batch, heads, _, columns = full
    _check_additive("mask", x.mask, x, full, boolean=True)
    _check_additive("bias", x.bias, x, full, boolean=False)
    check_vector("alibi_slopes", x.alibi_slopes, x, ((batch, heads), (1, heads)))
    check_vector("sinks", x.sinks, x, ((heads,),))
    for name in ("alibi_slopes", "sinks"):
        t = getattr(x, name)
        if t is not None:
            _need(t.dtype in FLOAT_DTYPES, f"{name}.dtype", t.dtype, "a floating dtype")
    _check_lengths(x, batch, columns)


def _longest(t: Tensor, given: int | None, name: str) -> int:
    if given is None:
        return int((t[1:] - t[:-1]).max()) if t.shape[0] > 1 else 0
    if isinstance(given, bool) or not isinstance(given, (int, torch.SymInt)):
        raise TypeError(f"{name}: got {given!r}, expected an int or None")
    if readable(t) and t.shape[0] > 1:
        longest = int((t[1:] - t[:-1]).max())
        _need(given >= longest, name, given, f"at least the longest sequence, {longest}")
    return given


def transform_of(x: Inputs) -> str | None:
    """The torch transform that is tracing these tensors, if any: kernels see only plain data."""
    if _in_transform():
        return "torch.func"
    if torch.autograd.forward_ad._current_level >= 0:
        for t in x:
            if t is not None and torch.autograd.forward_ad.unpack_dual(t).tangent is not None:
                return "forward-mode AD"
    return None


def make_spec(x: Inputs, o: Options) -> AttentionSpec:
    """Validate one call and describe it.

    Raises:
        ArgumentError: a shape, dtype, device or value is wrong; the message names the argument, what it was and
            what was expected.
        TypeError: an argument is of the wrong Python type.
    """
    check_options(o)
    _check_qkv(x)
    batch, heads, rows, head_dim = x.query.shape
    kv_heads, columns, value_dim = x.key.shape[1], x.key.shape[2], x.value.shape[3]
    packed = x.cu_seqlens_q is not None or x.cu_seqlens_k is not None
    if packed:
        _check_offsets("cu_seqlens_q", x.cu_seqlens_q, x, rows, "query")
        _check_offsets("cu_seqlens_k", x.cu_seqlens_k, x, columns, "key")
        assert x.cu_seqlens_q is not None and x.cu_seqlens_k is not None
        batch = x.cu_seqlens_q.shape[0] - 1
        offsets = f"{x.cu_seqlens_k.shape[0]} offsets"
        _need(x.cu_seqlens_k.shape[0] == batch + 1, "cu_seqlens_k", offsets, f"{batch + 1}, as cu_seqlens_q")
        rows = _longest(x.cu_seqlens_q, o.max_seqlen_q, "max_seqlen_q")
        columns = _longest(x.cu_seqlens_k, o.max_seqlen_k, "max_seqlen_k")
    if any(t is not None for t in x[3:8]):
        _check_optional(x, (batch, heads, rows, columns))
    block_map = None
    if x.block_map is not None or o.block_rows is not None or o.block_columns is not None:
        block_map = _check_block_map(x, o, (batch, heads, rows, columns), packed)
    named = zip(Inputs._fields, x, strict=True) if torch.is_grad_enabled() else ()
    gradients = frozenset(n for n, t in named if t is not None and t.requires_grad)
    rest = (gradients, False, transform_of(x), o.precision)
    window = None if o.window_left is o.window_right is None else (o.window_left, o.window_right)
    scale = head_dim**-0.5 if o.scale is None else float(o.scale)
    softcap = None if o.softcap is None else float(o.softcap)
    sizes = (batch, heads, kv_heads, rows, columns, head_dim, value_dim)
    options = (o.causal, window, softcap, float(o.dropout_p), o.batch_invariant, o.weights)
    mask, bias = (None if t is None else t.dtype for t in (x.mask, x.bias))
    present = (x.alibi_slopes is not None, x.sinks is not None, x.key_lengths is not None, block_map)
    # Sizes may be symbols under torch.compile, which cannot be hashed.
    build = _spec if type(batch) is type(heads) is type(rows) is type(columns) is int else AttentionSpec
    return build(*sizes, x.query.dtype, scale, *options, packed, mask, bias, *present, *rest)
