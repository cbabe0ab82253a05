"""What transformers' mask functions mean: lengths, windows and packed sequences instead of [B, 1, M, N] tensors.

transformers describes a mask by a function of (batch, head, query, key) indices, put together from a few known parts.
`read` names those parts, `make_plan` says how the kernels express them, and `StructuredMask` carries the plan through a
model as the boolean tensor that it stands for, which is made only if something else than attention looks inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import masking_utils
from transformers.utils.import_utils import is_tracing

from ..spec import Causal, Window

Side = int | None


class Pattern(NamedTuple):
    """The parts of a mask function; all of them must allow a key.

    window: (left, right) in tokens from the query's own position. chunk: (size, [B] first positions). packed: [B, M]
    sequence ids. remapped: positions count within the sequences of `packed`.
    """

    causal: bool = False
    window: Window = (None, None)
    chunk: tuple[int, Tensor] | None = None
    packed: Tensor | None = None
    remapped: bool = False


def _nearer(a: Side, b: Side) -> Side:
    return b if a is None else a if b is None else min(a, b)


def _both(a: Pattern, b: Pattern) -> Pattern | None:
    if (a.chunk and b.chunk) or (a.packed is not None and b.packed is not None):
        return None
    return Pattern(
        a.causal or b.causal,
        (_nearer(a.window[0], b.window[0]), _nearer(a.window[1], b.window[1])),
        a.chunk or b.chunk,
        b.packed if a.packed is None else a.packed,
        a.remapped or b.remapped,
    )


def _closure(function: Callable) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))


def _read_part(maker: str, values: dict[str, Any]) -> Pattern | None:
    """What the inner function that `masking_utils.<maker>` returned means, from the values it closes over."""
    if maker == "sliding_window_overlay":
        return Pattern(window=(int(values["sliding_window"]) - 1, None))
    if maker == "sliding_window_bidirectional_overlay":
        return Pattern(window=(int(values["sliding_window"]), int(values["sliding_window"])))
    if maker == "chunked_overlay":
        return Pattern(chunk=(int(values["chunk_size"]), values["left_padding"]))
    if maker == "packed_sequence_mask_function":
        return Pattern(packed=values["packed_sequence_mask"])
    if maker == "remap_positions_for_packed_sequence":
        inner = read(values["mask_function"])
        return None if inner is None else inner._replace(remapped=True)
    if maker == "and_masks":
        found: Pattern | None = Pattern()
        for function in values["mask_functions"]:
            part = read(function)
            found = None if found is None or part is None else _both(found, part)
        return found
    return None


def read(function: Callable) -> Pattern | None:
    """The parts of one of transformers' mask functions; None where any part of it is not known here."""
    if function is masking_utils.causal_mask_function:
        return Pattern(causal=True)
    if function is masking_utils.bidirectional_mask_function:
        return Pattern()
    name = getattr(function, "__qualname__", "")
    if getattr(function, "__module__", None) != masking_utils.__name__ or ".<locals>." not in name:
        return None
    return _read_part(name.split(".")[0], _closure(function))


class Plan(NamedTuple):
    """A mask as arguments of `attention`, or of `varlen_attention` where `offsets` is set.

    columns: keys to take, from the first. key_lengths: [B]. padding: bool [B, 1, 1, columns], True is visible.
    offsets: [S + 1], where the sequences start in the flattened batch [B * M]. longest: the longest of them. chunked:
    they are pieces of sequences.
    """

    causal: Causal | None
    window: Window
    columns: int
    key_lengths: Tensor | None = None
    padding: Tensor | None = None
    offsets: Tensor | None = None
    longest: int = 0
    chunked: bool = False


class Sizes(NamedTuple):
    """Query i stands at position q_offset + i, key j at kv_offset + j."""

    batch: int
    rows: int
    columns: int
    q_offset: int
    kv_offset: int

    @property
    def diagonal(self) -> int:
        """The key at query 0's own position."""
        return self.q_offset - self.kv_offset


def _plan_packed(pattern: Pattern, starts: Tensor, sizes: Sizes) -> Plan | None:
    """starts: bool [B, M], True where a sequence begins."""
    if sizes.diagonal != 0 or sizes.rows != sizes.columns:
        return None
    starts = starts.expand(sizes.batch, sizes.rows).clone()
    starts[:, 0] = True
    total = sizes.batch * sizes.rows
    end = torch.tensor([total], device=starts.device)
    offsets = torch.cat([starts.flatten().nonzero().flatten(), end])
    causal: Causal | None = "top_left" if pattern.causal else None
    return Plan(causal, pattern.window, sizes.columns, offsets=offsets, longest=int(offsets.diff().max()))


def _plan_chunks(pattern: Pattern, sizes: Sizes, padding: Tensor | None) -> Plan | None:
    assert pattern.chunk is not None
    size, first = pattern.chunk
    if not pattern.causal or pattern.packed is not None or first.any():
        return None
    if sizes.q_offset + sizes.rows <= size:
        return make_plan(pattern._replace(chunk=None), sizes, padding)
    if padding is not None or sizes.q_offset != 0:
        return None
    starts = torch.arange(sizes.rows, device=first.device) % size == 0
    plan = _plan_packed(pattern, starts[None], sizes)
    return None if plan is None else plan._replace(chunked=True)


def make_plan(pattern: Pattern, sizes: Sizes, padding: Tensor | None) -> Plan | None:
    """How the kernels express a pattern; None where they cannot.

    padding: bool [B or 1, columns], True is visible; None where all of it is.
    """
    if pattern.chunk is not None:
        return _plan_chunks(pattern, sizes, padding)
    if pattern.packed is not None:
        ids = pattern.packed
        changes = torch.cat([torch.ones_like(ids[:, :1], dtype=torch.bool), ids[:, 1:] != ids[:, :-1]], 1)
        return None if padding is not None else _plan_packed(pattern, changes, sizes)
    if pattern.remapped:
        return None
    columns, causal = sizes.columns, None
    if pattern.causal:
        columns = sizes.diagonal + sizes.rows  # what lies beyond is in every row's future
        if sizes.diagonal < 0 or columns > sizes.columns:
            return None
        causal = "top_left" if sizes.diagonal == 0 else "bottom_right"
    elif pattern.window != (None, None) and sizes.diagonal != 0:
        return None
    plan = Plan(causal, pattern.window, columns)  # type: ignore[arg-type]
    return plan if padding is None else _with_padding(plan, padding[:, :columns].expand(sizes.batch, columns))


def _with_padding(plan: Plan, visible: Tensor) -> Plan:
    if bool(visible.all()):
        return plan
    lengths = visible.sum(-1)
    at_the_end = torch.equal(visible, torch.arange(plan.columns, device=visible.device) < lengths[:, None])
    # Lengths would move the diagonal of "bottom_right".
    if at_the_end and plan.causal != "bottom_right":
        return plan._replace(key_lengths=lengths)
    return plan._replace(padding=visible[:, None, None, :])


# What means something else on a boolean mask than on the additive one that a model with attention of its own expects.
_REFUSED = tuple(
    getattr(torch.ops.aten, name) for name in "add add_ sub sub_ rsub mul mul_ div baddbmm lt gt le ge".split()
)


def _on_numbers(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a mask is turned into numbers or meets them."""
    packet, first = func.overloadpacket, args[0]
    if packet in (torch.ops.aten.masked_fill, torch.ops.aten.masked_fill_):
        return first.dtype != torch.bool
    if packet is torch.ops.aten._to_copy:
        dtype = kwargs.get("dtype")
        return dtype is not None and dtype.is_floating_point
    return packet in _REFUSED


class StructuredMask(Tensor):
    """A bool mask [B, 1, M, N] (True is visible) of which only the description is held.

    An operation on it makes the tensor, once, and from then on this is what counts, written in place or not.
    Arithmetic on it, and on what is cut out of it, is refused: a model that adds the mask to its scores does not use
    transformers' attention interface.
    """

    plan: Plan | None
    causal: bool  # for certain; not known of a function that is not
    _make: Callable[[], Tensor]
    _dense: Tensor | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, plan: Plan | None, causal: bool, make: Callable[[], Tensor], shape: tuple[int, ...], device: Any
    ) -> StructuredMask:
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=torch.device(device))
        self.plan, self.causal, self._make, self._dense = plan, causal, make, None
        return self

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"StructuredMask({list(self.shape)}, {self.plan})"

    @property
    def looked_into(self) -> bool:
        return self._dense is not None

    def dense(self) -> Tensor:
        """The mask as a plain tensor."""
        if self._dense is None:
            self._dense = self._make()
        return self._dense

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if _on_numbers(func, args, kwargs):
            raise NotImplementedError(
                f"fused_attention: the model computes {func.overloadpacket.__name__} on a boolean attention mask, as "
                "code does that brings its own attention; it does not use transformers' attention interface. Load it "
                "with attn_implementation='eager' or 'sdpa'"
            )
        out = func(*tree_map(_plain, args), **tree_map(_plain, kwargs))
        return _wrapped(out) if isinstance(out, Tensor) and out.dtype == torch.bool else out


def _plain(x: Any) -> Any:
    return x.dense() if isinstance(x, StructuredMask) else x


def _wrapped(dense: Tensor) -> StructuredMask:
    """A tensor that came from a mask, held to the same rules."""
    mask = StructuredMask(None, False, lambda: dense, tuple(dense.shape), dense.device)
    mask._dense = dense
    return mask


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Tensor | None:
    """The mask of one kind of layer, in the signature of transformers' `AttentionMaskInterface`.

    Args:
        batch_size, q_length, kv_length: B, M, N.
        q_offset: position of query 0. kv_offset: position of key 0.
        mask_function: (batch, head, query, key) indices -> bool, True is visible.
        attention_mask: bool [B, positions], False is padding.
        allow_is_causal_skip, allow_is_bidirectional_skip: whether None may stand for a mask that says no more.
        device: where the mask lies.

    Returns:
        A `StructuredMask`; for one row of queries, and while a graph is traced, what transformers makes for sdpa: None
        or a bool tensor [B, 1, M, N].
    """
    arguments: dict[str, Any] = {
        **options,
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "device": device,
    }
    # One row's mask is no larger than its keys; tracing must not read values.
    if q_length == 1 or is_tracing(attention_mask):
        return masking_utils.sdpa_mask(
            **arguments,
            allow_is_causal_skip=allow_is_causal_skip,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        )

    def make() -> Tensor:
        mask = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
        assert mask is not None  # only what may be skipped is None
        return mask

    pattern = read(mask_function)
    plan = None
    if pattern is not None:
        padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        padding = None if padding is None else padding[:, kv_offset : kv_offset + kv_length].bool()
        padding = None if padding is None or bool(padding.all()) else padding
        plan = make_plan(pattern, Sizes(batch_size, q_length, kv_length, int(q_offset), kv_offset), padding)
    causal = pattern is not None and pattern.causal
    return StructuredMask(plan, causal, make, (batch_size, 1, q_length, kv_length), device)
