"""The frequencies of a rotary embedding, and the laws that stretch them to longer contexts.

With R rotated dims and i = 0 .. R/2 - 1, f_i = base^(-2i/R) (Su et al., "RoFormer", 2021). L is the length in use, L0
the length trained on, s the factor:

    linear    f_i / s                                            Chen et al., "Position interpolation", 2023
    dynamic   f_i of the base  base (s L / L0 - (s - 1))^(R / (R - 2)), L >= L0             NTK-aware scaling, 2023
    yarn      f_i (1 - r_i) + f_i / s r_i, r a ramp over i       Peng et al., "YaRN", 2023
    llama3    f_i / s for wavelengths above L0 / low, f_i below L0 / high, blended in between        Llama 3.1, 2024

The parameters have the names of a Hugging Face config, and the operations their order in transformers, so that float32
results are the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..spec import ArgumentError

# The parameters of each law: those that must be there, and those that may.
LAWS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "dynamic": (frozenset({"factor"}), frozenset({"original_max_position_embeddings"})),
    "yarn": (
        frozenset(),
        frozenset(
            {
                "factor",
                "original_max_position_embeddings",
                "attention_factor",
                "beta_fast",
                "beta_slow",
                "mscale",
                "mscale_all_dim",
                "truncate",
            }
        ),
    ),
    "llama3": (
        frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
        frozenset({"original_max_position_embeddings"}),
    ),
}


@dataclass(frozen=True)
class Scaling:
    """A law with its parameters, checked. `original_max_position_embeddings` is L0."""

    rope_type: str = "default"
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    truncate: bool = True

    @property
    def by_length(self) -> bool:
        """Whether the frequencies depend on the length in use."""
        return self.rope_type == "dynamic"


def _bad(name: str, was: object, expected: str) -> ArgumentError:
    return ArgumentError(f"{name}: got {was}, expected {expected}")


def _checked(name: str, value: Any) -> Any:
    if name == "truncate":
        if not isinstance(value, bool):
            raise TypeError(f"scaling['truncate']: got {value!r}, expected a bool")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"scaling[{name!r}]: got {value!r}, expected a number")
    if not (math.isfinite(value) and value > 0):
        raise _bad(f"scaling[{name!r}]", value, "a positive, finite number")
    return value


def parse(scaling: Mapping[str, Any] | None, max_positions: int | None) -> Scaling:
    """Check the parameters of a law, as they stand in a Hugging Face config's `rope_scaling`.

    scaling: {"rope_type": a name in LAWS, ...}; the older key "type" is taken too, and None values count as absent.
    max_positions: the model's context, `max_position_embeddings`: L0 of "dynamic"; L0 of the others where they name
    none; and yarn's factor, where none is given, is max_positions / L0.
    """
    if scaling is None:
        return Scaling()
    if not isinstance(scaling, Mapping):
        raise TypeError(f"scaling: got {type(scaling).__name__}, expected a mapping or None")
    given = {k: v for k, v in scaling.items() if v is not None}
    law = given.pop("rope_type", None)
    older = given.pop("type", None)
    law = older if law is None else law
    if law not in LAWS:
        raise _bad("scaling['rope_type']", repr(law), f"one of {sorted(LAWS)}")
    required, optional = LAWS[law]
    for name in sorted(set(given) - required - optional):
        raise _bad(f"scaling[{name!r}]", repr(given[name]), f"no such parameter for {law!r}")
    for name in sorted(required - set(given)):
        raise _bad(f"scaling[{name!r}]", "nothing", f"a number: {law!r} needs it")
    values = {name: _checked(name, value) for name, value in given.items()}
    original = values.pop("original_max_position_embeddings", None)
    if law == "dynamic" or original is None:
        original = max_positions
    if law in ("dynamic", "yarn", "llama3") and original is None:
        raise _bad("max_positions", "None", f"the context that the model was trained on: {law!r} needs it")
    if law == "yarn" and "factor" not in values:
        if max_positions is None or original is None:
            raise _bad("scaling['factor']", "nothing", "a number, or max_positions beside L0: 'yarn' needs it")
        values["factor"] = max_positions / original
    if law == "llama3" and not values["high_freq_factor"] > values["low_freq_factor"]:
        raise _bad("scaling['high_freq_factor']", values["high_freq_factor"], "more than low_freq_factor")
    assert set(values) <= {f.name for f in fields(Scaling)}
    return Scaling(law, original_max_position_embeddings=original, **values)


def frequencies(
    dim: int, base: float, scaling: Scaling, length: int, device: Any, dtype: torch.dtype
) -> tuple[Tensor, float]:
    """f [R/2] in float32 or float64, and the number that cos and sin are multiplied by.

    dim: R, even. length: how many positions are in use; only "dynamic" looks at it.
    """
    if scaling.rope_type == "dynamic":
        assert scaling.factor is not None and scaling.original_max_position_embeddings is not None
        trained = scaling.original_max_position_embeddings
        stretch = scaling.factor * max(length, trained) / trained - (scaling.factor - 1)
        base = base * stretch ** (dim / (dim - 2))
    exponents = torch.arange(0, dim, 2, device=device, dtype=dtype) / dim
    if scaling.rope_type == "yarn":
        return _yarn(base**exponents, dim, base, scaling)
    f = 1.0 / base**exponents
    if scaling.rope_type == "linear":
        assert scaling.factor is not None
        f = f / scaling.factor
    elif scaling.rope_type == "llama3":
        f = _llama3(f, scaling)
    return f, 1.0


def _llama3(f: Tensor, scaling: Scaling) -> Tensor:
    factor, trained = scaling.factor, scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    assert factor is not None and trained is not None and low is not None and high is not None
    wavelength = 2 * math.pi / f
    blend = (trained / wavelength - low) / (high - low)
    blended = (1 - blend) * f / factor + blend * f
    stretched = torch.where(wavelength > trained / low, f / factor, f)
    between = (wavelength >= trained / high) & (wavelength <= trained / low)
    return torch.where(between, blended, stretched)


def _magnitude(factor: float, weight: float = 1.0) -> float:
    """YaRN's temperature as a factor of cos and sin."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn(wavelengths: Tensor, dim: int, base: float, scaling: Scaling) -> tuple[Tensor, float]:
    """wavelengths: base^(2i/R), in radians per position."""
    factor, trained = scaling.factor, scaling.original_max_position_embeddings
    assert factor is not None and trained is not None

    def turns(count: float) -> float:
        """The index i whose frequency turns `count` times over the length trained on, for R rather than R/2 indices."""
        return dim * math.log(trained / (count * 2 * math.pi)) / (2 * math.log(base))

    first, last = turns(scaling.beta_fast or 32), turns(scaling.beta_slow or 1)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001
    index = torch.arange(dim // 2, device=wavelengths.device, dtype=wavelengths.dtype)
    keep = 1 - ((index - first) / (last - first)).clamp(0, 1)  # 1: as trained, 0: interpolated
    f = 1.0 / (factor * wavelengths) * (1 - keep) + 1.0 / wavelengths * keep
    if scaling.attention_factor is not None:
        return f, scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return f, _magnitude(factor, scaling.mscale) / _magnitude(factor, scaling.mscale_all_dim)
    return f, _magnitude(factor)
