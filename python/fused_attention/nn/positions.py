"""Where a token stands: rotary, sinusoidal and learned positions, and the slopes of ALiBi.

What is constant (tables, slopes) is no part of a module's state: it is made in float32, or float64 for float64, when it
is first needed on a device, is never cast with the module, and is not saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import rope_qk_norm
from ..spec import ArgumentError, readable, shape_of
from . import rope_scaling

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def _bad(name: str, was: object, expected: str) -> ArgumentError:
    return ArgumentError(f"{name}: got {was}, expected {expected}")


def whole_number(name: str, value: object, low: int = 1) -> int:
    """An int of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r}, expected an int of at least {low}")
    if value < low:
        raise _bad(name, value, f"an int of at least {low}")
    return value


def positive_number(name: str, value: object) -> float:
    """A finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {value!r}, expected a positive number")
    if not 0 < value < float("inf"):
        raise _bad(name, value, "a positive, finite number")
    return float(value)


def _traced() -> bool:
    """Whether torch traces or transforms this call: what is made now belongs to it, and must not outlive it."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


class Constants:
    """Tensors that follow from a module's options: one per key, made where and when they are needed."""

    def __init__(self) -> None:
        self._kept: dict[Any, tuple[Any, Any]] = {}

    def get(self, key: Any, wanted: Any, make: Callable[[], Any], serves: Callable[[Any], bool] | None = None) -> Any:
        """What was kept for `key` if it was made for `wanted` (or for what `serves` accepts), else `make()`."""
        if _traced():
            return make()
        kept = self._kept.get(key)
        if kept is not None and (kept[0] == wanted if serves is None else serves(kept[0])):
            return kept[1]
        with torch.inference_mode(False), torch.no_grad():  # autograd cannot save what inference mode makes
            made = make()
        self._kept[key] = (wanted, made)
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": {}}

    def __deepcopy__(self, memo: Any) -> Constants:
        return Constants()


def check_positions(positions: object, batch: int, length: int) -> None:
    """positions: integers [S], [1, S] or [B, S], or None."""
    if positions is None:
        return
    if not isinstance(positions, Tensor):
        raise TypeError(f"positions: got {type(positions).__name__}, expected a Tensor or None")
    if positions.dtype not in _INTEGERS:
        raise _bad("positions.dtype", positions.dtype, "an integer dtype")
    if tuple(positions.shape) not in ((length,), (1, length), (batch, length)):
        raise _bad("positions", f"shape {shape_of(positions)}", f"[S] = [{length}] or [B, S] = [{batch}, {length}]")


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (Su et al., "RoFormer", 2021), with the scaling laws of `rope_scaling.py`.

    The first R = int(head_dim * partial_rotary_factor) dims of query and key turn by position * frequency. One module
    may serve all layers of a model, which then share its tables. It has no parameters and no state.

    Args:
        head_dim: D.
        base: "rope_theta" of a Hugging Face config.
        partial_rotary_factor: which part of the head dim is turned.
        interleaved: pairs are (0, 1), (2, 3), ... (GPT-J) instead of (0, R/2), (1, R/2 + 1), ... (GPT-NeoX, Llama).
        scaling: {"rope_type": "linear", "dynamic", "yarn" or "llama3", ...} with the parameters of a Hugging Face
            config's `rope_scaling`; None: as trained.
        max_positions: the config's `max_position_embeddings`; "dynamic" needs it.

    Raises:
        ArgumentError: (a ValueError) an option is out of range; scaling lacks a parameter or has one too many.
        TypeError: an option has the wrong type.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        base: float = 10000.0,
        partial_rotary_factor: float = 1.0,
        interleaved: bool = False,
        scaling: Mapping[str, Any] | None = None,
        max_positions: int | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = whole_number("head_dim", head_dim)
        self.base = positive_number("base", base)
        part = positive_number("partial_rotary_factor", partial_rotary_factor)
        if not isinstance(interleaved, bool):
            raise TypeError(f"interleaved: got {interleaved!r}, expected a bool")
        self.interleaved = interleaved
        self.max_positions = None if max_positions is None else whole_number("max_positions", max_positions)
        self.rotary_dim = int(head_dim * part)
        self.scaling = rope_scaling.parse(scaling, self.max_positions)
        least = 4 if self.scaling.by_length else 2  # the dynamic law divides by R - 2
        if part > 1.0 or self.rotary_dim % 2 or self.rotary_dim < least:
            was = f"{part} of head_dim {head_dim}, {self.rotary_dim} dims"
            raise _bad("partial_rotary_factor", was, f"an even number of dims from {least} to head_dim")
        self._constants = Constants()

    def extra_repr(self) -> str:
        law = self.scaling.rope_type
        return f"{self.head_dim}, rotary_dim={self.rotary_dim}, base={self.base}, scaling={law!r}"

    def _tables(self, positions: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        f, factor = rope_scaling.frequencies(self.rotary_dim, self.base, self.scaling, length, positions.device, dtype)
        angles = positions.to(dtype)[:, None] * f
        return angles.cos() * factor, angles.sin() * factor

    def tables(self, length: int, device: Any = None, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """cos and sin [length, R/2] of positions 0, 1, 2, ..., as `rope_qk_norm` and `decode_attention` read them.

        dtype: float32 or float64. By the "dynamic" law, for a sequence of `length`.
        """
        device = torch.empty(0, device=device).device

        def make(rows: int) -> tuple[Tensor, Tensor]:
            return self._tables(torch.arange(rows, device=device), length, dtype)

        if self.scaling.by_length or _traced():
            return self._constants.get((device, dtype), length, lambda: make(length))
        # A sequence that grows one by one finds room in the table of the next power of two.
        rows = 1 << max(length - 1, 63).bit_length()
        cos, sin = self._constants.get((device, dtype), rows, lambda: make(rows), lambda kept: kept >= length)
        return cos[:length], sin[:length]

    def tables_at(
        self, positions: Tensor, dtype: torch.dtype = torch.float32, length: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """cos and sin with a row for every token of positions [S] or [B, S], and the rows' numbers for `rope_qk_norm`.

        Any positions will do: nothing is looked up, so nothing can be out of range. The numbers are [B, S], or None
        where all sequences have the same positions.

        length: how long the sequence is, for the "dynamic" law, which would have to read the positions to know.
        """
        if self.scaling.by_length and length is None:
            raise _bad("positions", "a tensor", "None: the 'dynamic' law needs the length, which a tensor hides")
        if positions.dim() == 1 or positions.shape[0] == 1:
            return *self._tables(positions.flatten(), length or 0, dtype), None
        cos, sin = self._tables(positions.flatten(), length or 0, dtype)
        return cos, sin, torch.arange(positions.numel(), device=positions.device).view(positions.shape)

    def tables_for(
        self, like: Tensor, positions: Tensor | None, length: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The tables that turn `like` [B, H, S, D] at the given positions, by default 0, 1, 2, ..., S - 1."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        if positions is None:
            return *self.tables(like.shape[2], like.device, dtype), None
        return self.tables_at(positions, dtype, length)

    def forward(
        self, query: Tensor, key: Tensor | None = None, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Turn query [B, H, S, D] and key [B, HK, S, D].

        positions: [S] or [B, S] integers; default 0, 1, 2, ... Returns (query, key) in their dtypes and memory order.
        """
        cos: Tensor | None = None
        sin: Tensor | None = None
        rows: Tensor | None = None
        if isinstance(query, Tensor) and query.dim() == 4:  # anything else rope_qk_norm refuses
            check_positions(positions, query.shape[0], query.shape[2])
            if query.shape[3] != self.head_dim:
                raise _bad("query", f"head dim {query.shape[3]} in {shape_of(query)}", f"{self.head_dim}")
            if positions is not None and isinstance(key, Tensor) and key.shape[2:3] != query.shape[2:3]:
                raise _bad("key", f"shape {shape_of(key)}", f"query's length {query.shape[2]}: positions are of both")
            cos, sin, rows = self.tables_for(query, positions)
        turned, key = rope_qk_norm(query, key, cos, sin, positions=rows, interleaved=self.interleaved)
        assert turned is not None
        return turned, key


class SinusoidalPositionalEncoding(nn.Module):
    """Adds sin and cos of position * base^(-2i/E) in dims 2i and 2i + 1 (Vaswani et al., 2017). No parameters.

    Args:
        embed_dim: E, any size; the last dim of an odd one is a sine.
        base: the longest wavelength is 2 pi base.
    """

    def __init__(self, embed_dim: int, *, base: float = 10000.0) -> None:
        super().__init__()
        self.embed_dim = whole_number("embed_dim", embed_dim)
        self.base = positive_number("base", base)
        self._constants = Constants()

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, base={self.base}"

    def _encode(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """[*, S] -> [*, S, E]."""
        even = torch.arange(0, self.embed_dim, 2, device=positions.device, dtype=dtype)
        angles = positions.to(dtype)[..., None] * self.base ** (-even / self.embed_dim)
        return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)[..., : self.embed_dim]

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """x [B, S, E] plus the encoding of its positions, in x's dtype.

        positions: [S] or [B, S] integers; default 0, 1, 2, ...
        """
        _check_tokens(x, positions, self.embed_dim)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        length, device = x.shape[1], x.device
        if positions is None:
            encoded = self._constants.get(
                (device, dtype), length, lambda: self._encode(torch.arange(length, device=device), dtype)
            )
        else:
            encoded = self._encode(positions, dtype)
        return x + encoded.to(x.dtype)


class LearnedPositionalEmbedding(nn.Module):
    """Adds a learned vector per position (GPT-2, BERT). `weight` [max_positions, E] begins as N(0, 0.02^2).

    Args:
        max_positions: how many positions there are.
        embed_dim: E.
    """

    def __init__(self, max_positions: int, embed_dim: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.max_positions = whole_number("max_positions", max_positions)
        self.embed_dim = whole_number("embed_dim", embed_dim)
        self.weight = nn.Parameter(torch.empty(max_positions, embed_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new vectors."""
        nn.init.normal_(self.weight, std=0.02)

    def extra_repr(self) -> str:
        return f"{self.max_positions}, {self.embed_dim}"

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """x [B, S, E] plus the vectors of its positions.

        positions: [S] or [B, S] integers below max_positions, which is checked on a CPU; default 0, 1, 2, ...
        """
        _check_tokens(x, positions, self.embed_dim)
        if positions is None:
            if x.shape[1] > self.max_positions:
                raise _bad("x", f"{x.shape[1]} positions in {shape_of(x)}", f"at most {self.max_positions}")
            return x + self.weight[: x.shape[1]]
        if readable(positions) and positions.numel():
            low, high = (int(n) for n in positions.aminmax())
            if low < 0 or high >= self.max_positions:
                was = f"a position of {low if low < 0 else high}"
                raise _bad("positions", was, f"0 .. {self.max_positions - 1}")
        return x + F.embedding(positions, self.weight)


def _check_tokens(x: object, positions: Tensor | None, width: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got {type(x).__name__}, expected a Tensor")
    if x.is_nested or x.dim() != 3 or x.shape[2] != width:
        was = "a nested tensor" if x.is_nested else f"shape {shape_of(x)}"
        raise _bad("x", was, f"[B, S, {width}]")
    if not x.is_floating_point():
        raise _bad("x.dtype", x.dtype, "a floating dtype")
    check_positions(positions, x.shape[0], x.shape[1])


def alibi_slopes(num_heads: int, *, device: Any = None) -> Tensor:
    """The slopes of ALiBi (Press et al., "Train short, test long", 2022), [num_heads] float32.

    For a power of two n, 2^(-8/n), 2^(-16/n), ..., 2^-8. Another number of heads takes those of the power of two below
    it and fills up with every other slope of the power of two above, from the first.

    Raises:
        ArgumentError: num_heads is below 1.
    """
    below = 1 << (whole_number("num_heads", num_heads).bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / below) for i in range(below)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / below) for i in range(num_heads - below)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)
