"""One ordered table of backends; who runs a call and why each other one does not."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from .backends import cpu, cuda, reference, triton
from .spec import ArgumentError, AttentionSpec, Causal, Device, Inputs, Options, Outputs, WeightsMode, make_spec

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class Backend(Protocol):
    """What a module in `backends/` offers."""

    def unsupported(self, spec: AttentionSpec) -> str | None: ...  # on any device

    def supports(self, spec: AttentionSpec, device: Device) -> str | None: ...

    def forward(self, spec: AttentionSpec, x: Inputs) -> Outputs: ...

    def backward(self, spec: AttentionSpec, x: Inputs, out: Outputs, grads: Gradients) -> dict[str, Tensor]: ...

    def plan(self, spec: AttentionSpec, device: Device) -> str | None: ...


# In order of preference; the reference is last and refuses nothing but a precision that it is not the definition of.
BACKENDS: dict[str, Backend] = {
    "cpu": cast(Backend, cpu),
    "cuda": cast(Backend, cuda),
    "triton": cast(Backend, triton),
    "reference": cast(Backend, reference),
}


class BackendError(RuntimeError):
    """The backend that was asked for by name cannot run this call, or none can; the message holds the reasons."""


class FallbackWarning(UserWarning):
    """`auto` fell to the reference, which needs O(M N) memory."""


_request: contextvars.ContextVar[tuple[str, bool]] = contextvars.ContextVar("backend", default=("auto", True))


@contextlib.contextmanager
def use_backend(name: str, strict: bool = True) -> Iterator[None]:
    """Run every call inside on the named backend.

    Args:
        name: "auto" (the best backend that supports the call) or a backend's name.
        strict: a named backend that does not support a call raises `BackendError` with its reason. False: such a
            call is chosen as by "auto".

    Raises:
        ArgumentError: no backend has this name.
    """
    if name != "auto" and name not in BACKENDS:
        raise ArgumentError(f"backend: got {name!r}, expected 'auto' or one of {list(BACKENDS)}")
    token = _request.set((name, strict))
    try:
        yield
    finally:
        _request.reset(token)


def requested() -> tuple[str, bool]:
    """The backend that `use_backend` asks for here ("auto" without one), and whether strictly."""
    return _request.get()


@dataclass(frozen=True)
class Choice:
    """Which backend runs a call, and per backend None (able) or the reason why it is not."""

    backend: str
    reasons: dict[str, str | None]


def choose(names: Iterable[str], ask: Callable[[str], str | None], warning: str, stacklevel: int) -> Choice:
    """The first of `names`, in order of preference, that can run a call, or the one that `use_backend` asks for.

    ask: a backend's reason why not, or None. warning: begins the `FallbackWarning` where `auto` falls to "reference".

    Raises:
        BackendError: a backend was named with `strict=True` and does not support the call, or no backend does.
    """
    choice = _first_able(names, ask)
    if choice.backend == "reference" and len(choice.reasons) > 1:
        why = "; ".join(f"{n}: {reason}" for n, reason in choice.reasons.items() if reason)
        warnings.warn(f"fused_attention {warning} ({why})", FallbackWarning, stacklevel=stacklevel)
    return choice


def _first_able(names: Iterable[str], ask: Callable[[str], str | None]) -> Choice:
    name, strict = requested()
    reasons: dict[str, str | None] = {}
    if name != "auto":
        reasons[name] = ask(name)
        if reasons[name] is None:
            return Choice(name, reasons)
        if strict:
            raise BackendError(f"backend {name!r} was asked for and does not run this call: {reasons[name]}")
    for candidate in names:
        if candidate not in reasons:
            reasons[candidate] = ask(candidate)
        if reasons[candidate] is None:
            break
    else:
        why = "; ".join(f"{n}: {reason}" for n, reason in reasons.items())
        raise BackendError(f"no backend runs this call ({why})")
    return Choice(candidate, reasons)


def select(spec: AttentionSpec, device: Device) -> Choice:
    """Choose a backend for one call of `attention`, as `choose` does."""

    def ask(name: str) -> str | None:
        return BACKENDS[name].supports(spec, device)

    return choose(BACKENDS, ask, "runs the eager reference, which needs O(M N) memory", stacklevel=5)


@functools.lru_cache(maxsize=4096)
def select_plain(
    sizes: tuple[torch.Size, ...],
    dtype: torch.dtype,
    device: torch.device,
    gradients: tuple[bool, ...],
    options: Options,
    request: tuple[str, bool],
) -> tuple[AttentionSpec, str]:
    """Spec and backend of an eager call of nothing but query, key and value, which agree in dtype and device.

    Validating and choosing take longer than a small call's kernel: they are done once per kind of call. request: what
    `requested()` says now. A call that the reference would run is for `select`, which warns.
    """
    parts = zip(sizes, gradients, strict=True)
    x = Inputs(*(torch.empty(size, dtype=dtype, device="meta", requires_grad=need) for size, need in parts))
    spec = make_spec(x, options)
    where = Device.at(device)
    return spec, _first_able(BACKENDS, lambda name: BACKENDS[name].supports(spec, where)).backend


@functools.lru_cache(maxsize=4096)
def select_joint(
    shape: torch.Size,
    heads: int,
    batch_first: bool,
    dtype: torch.dtype,
    gradient: bool,
    causal: Causal | None,
    weights: WeightsMode | None,
    request: tuple[str, bool],
) -> AttentionSpec | None:
    """As `select_plain`, for query, key and value in one projection [B, S, 3 H D] or [S, B, 3 H D] on the CPU.

    None where the backend that runs the call is not `cpu`, which alone reads them there by itself.
    """
    batch, length = (shape[0], shape[1]) if batch_first else (shape[1], shape[0])
    size = torch.Size((batch, heads, length, shape[2] // (3 * heads)))
    options = Options(causal, weights=weights)
    spec, backend = select_plain((size,) * 3, dtype, torch.device("cpu"), (gradient,) * 3, options, request)
    return spec if backend == "cpu" else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _options(spec: AttentionSpec) -> list[str]:
    """What a call asks for beyond the plain formula, in words."""
    found = [
        f"{n}={getattr(spec, n)}" for n in ("causal", "window", "softcap", "weights", "precision") if getattr(spec, n)
    ]
    found += [f"{n}={_name(getattr(spec, n))}" for n in ("mask", "bias") if getattr(spec, n)]
    if spec.block_map:
        found.append("block_map={}x{}".format(*spec.block_map))
    found += [n for n in ("alibi_slopes", "sinks", "key_lengths", "batch_invariant") if getattr(spec, n)]
    if spec.dropout_p:
        found.append(f"dropout_p={spec.dropout_p}")
    if spec.gradients:
        found.append("gradients=" + ",".join(sorted(spec.gradients)))
    return found


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: `str()` of it is a table, `to_dict()` is for machines."""

    spec: AttentionSpec
    device: Device
    backend: str | None
    reasons: dict[str, str | None]  # per backend: None if it can run the call
    notes: list[str]
    plan: str | None = None  # what the chosen backend would launch

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        spec = asdict(self.spec)
        for key in ("dtype", "mask", "bias"):
            spec[key] = None if spec[key] is None else _name(spec[key])
        spec["gradients"] = sorted(self.spec.gradients)
        return {
            "backend": self.backend,
            "device": asdict(self.device),
            "reasons": self.reasons,
            "plan": self.plan,
            "notes": self.notes,
            "spec": spec,
        }

    def __str__(self) -> str:
        s = self.spec
        kind = "packed " if s.packed else ""
        lines = [
            f"attention {kind}B={s.batch} H={s.heads} HK={s.kv_heads} M={s.rows} N={s.columns} D={s.head_dim} "
            f"DV={s.value_dim} {_name(s.dtype)} on {self.device.arch or self.device.type}"
        ]
        options = _options(s)
        if options:
            lines.append("  " + " ".join(options))
        for name, reason in self.reasons.items():
            if name == self.backend:
                state = "runs"
            else:
                state = "able, not needed" if reason is None else f"no: {reason}"
            lines.append(f"  {name:<10} {state}")
        if self.plan:
            lines.append(f"  plan: {self.plan}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def explain(spec: AttentionSpec, device: Device, notes: list[str]) -> Explanation:
    """Ask every backend about one call, without running it."""
    name, strict = requested()
    reasons = {n: b.supports(spec, device) for n, b in BACKENDS.items()}
    able = [n for n, reason in reasons.items() if reason is None]
    if name == "auto" or (name not in able and not strict):
        chosen = able[0] if able else None
    else:
        chosen = name if name in able else None
    if chosen == "reference":
        notes = [*notes, "the reference needs O(M N) memory"]
    plan = BACKENDS[chosen].plan(spec, device) if chosen else None
    return Explanation(spec, device, chosen, reasons, notes, plan)
