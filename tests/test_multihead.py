"""`MultiheadAttention` against `torch.nn.MultiheadAttention` with copied weights: forward and every gradient.

A plan of cases is laid out below; each case is run in train mode, in eval mode and without gradients, and a sample of
them compiled. The yardstick is PyTorch's module in float64 (`ref`) and in the tested dtype (`same`), by the rule of
`numerics.py`. Where PyTorch answers NaN (rows that see nothing) it is `plain_multihead` below.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import fused_attention.nn as fused

from .multihead_yardstick import exact_multihead, plain_multihead
from .numerics import assert_close

pytestmark = [
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
    pytest.mark.filterwarnings("error::fused_attention.FallbackWarning"),
]

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_bias": {"bias": False},
    "kdim_vdim": {"kdim": 5, "vdim": 9},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "everything": {"kdim": 7, "vdim": 7, "add_bias_kv": True, "add_zero_attn": True},
}
# name -> (key_padding_mask, attn_mask, is_causal)
MASKS: dict[str, tuple[str | None, str | None, bool]] = {
    "none": (None, None, False),
    "kpm_bool": ("bool", None, False),
    "kpm_float": ("float", None, False),
    "attn_bool_2d": (None, "bool_2d", False),
    "attn_bool_3d": (None, "bool_3d", False),
    "attn_float_2d": (None, "float_2d", False),
    "attn_float_3d": (None, "float_3d", False),
    "attn_finfo_min": (None, "min_2d", False),
    "both_bool_2d": ("bool", "bool_2d", False),
    "both_bool_3d": ("bool", "bool_3d", False),
    "both_float_2d": ("float", "float_2d", False),
    "both_float_3d": ("float", "float_3d", False),
    "mixed_kpm_bool": ("bool", "float_3d", False),
    "mixed_kpm_float": ("float", "bool_2d", False),
    "causal_hint": (None, "causal", True),
    "causal_hint_float": (None, "causal_float", True),
    "causal_hint_kpm": ("bool", "causal", True),
    "dead_kpm": ("dead", None, False),
    "dead_rows": (None, "dead_2d", False),
    "dead_both": ("dead", "bool_3d", False),
}
NEED = {"output": (False, True), "mean": (True, True), "heads": (True, False)}
KINDS = ("self", "shared_key_value", "separate")
SIZES = ((12, 13, 27, 24, 3), (16, 17, 33, 16, 1), (8, 31, 19, 32, 4))  # batch, L, S, embed_dim, heads
ROLES = {1: (0, 0, 0), 2: (0, 1, 1), 3: (0, 1, 2)}  # which of the distinct inputs are query, key and value
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    batch_first: bool
    masks: str
    need: str
    config: str
    kind: str = "self"
    size: tuple[int, int, int, int, int] = SIZES[0]
    batched: bool = True

    def __str__(self) -> str:
        layout = "unbatched" if not self.batched else "batch_first" if self.batch_first else "seq_first"
        return f"{self.dtype} {layout} {self.masks} {self.need} {self.config} {self.kind} {self.size}"


def _plan(dtype: torch.dtype, batch_first: bool, batched: bool = True) -> list[Case]:
    """Every mask with every configuration and return value; inputs and sizes rotate."""
    cases = []
    for i, (masks, need, config) in enumerate(itertools.product(MASKS, NEED, CONFIGS)):
        kind = KINDS[(i + i // len(CONFIGS)) % 3] if "kdim" not in CONFIGS[config] else "separate"
        if MASKS[masks][0] == "dead" and config == "bias_kv" and not batched:
            continue  # rows that see one key have no gradients, of which the rule could measure the error
        size = SIZES[(i + i // 7) % 3]
        size = size if batched else (1, *size[1:])
        cases.append(Case(dtype, batch_first, masks, need, config, kind, size, batched))
    return cases


PLAN: dict[str, list[Case]] = {}
for _i, (_name, _dtype) in enumerate(DTYPES.items()):
    # A share of the combinations for each dtype and layout, in an order that ties no option to another.
    for _j, _layout in enumerate(("seq_first", "batch_first")):
        _cases = _plan(_dtype, _layout == "batch_first")
        random.Random(_i).shuffle(_cases)
        PLAN[f"{_name}-{_layout}"] = _cases[_j * 84 : _j * 84 + 84]
    _cases = _plan(_dtype, _i % 2 == 0, batched=False)
    random.Random(_i).shuffle(_cases)
    PLAN[f"{_name}-unbatched"] = _cases[:24]
# The rule compares two maxima. Over few numbers that would be a comparison of coin tosses: draw several problems.
DRAWS = {"batched": 3, "unbatched": 10}
MODES = ("train", "eval", "no_grad")
# Compiling takes seconds: every mask once, the other choices rotating.
COMPILED = [
    Case(list(DTYPES.values())[i % 4], i % 2 == 0, m, list(NEED)[i % 3], list(CONFIGS)[i % 6], "separate", SIZES[i % 3])
    for i, m in enumerate(MASKS)
] + [Case(torch.float32, True, m, n, "plain") for m in ("kpm_bool", "causal_hint") for n in NEED]
INDUCTOR = [
    Case(torch.float32, True, "kpm_bool", "output", "plain"),
    Case(torch.float32, False, "none", "mean", "plain"),
]


# --- inputs -------------------------------------------------------------------------------------------------------


def _padding_mask(kind: str | None, n: int, s: int, dtype: torch.dtype) -> Tensor | None:
    if kind is None:
        return None
    hidden = torch.arange(s) >= torch.randint(s // 2, s + 1, (n, 1))
    if kind == "dead":
        hidden[-1] = True
    if kind != "float":
        return hidden
    return torch.randn(n, s).to(dtype).masked_fill(hidden, float("-inf"))


def _attention_mask(kind: str | None, n: int, h: int, rows: int, s: int, dtype: torch.dtype) -> Tensor | None:
    if kind is None:
        return None
    if kind.startswith("causal"):
        causal = torch.ones(rows, s, dtype=torch.bool).triu(1)
        return torch.zeros(rows, s, dtype=dtype).masked_fill(causal, float("-inf")) if "float" in kind else causal
    shape = (n * h, rows, s) if kind.endswith("3d") else (rows, s)
    hidden = torch.rand(shape) < 0.4
    hidden[..., 0] = False
    if kind.startswith("dead"):
        hidden[rows // 2] = True
    if kind.startswith(("bool", "dead")):
        return hidden
    fill = torch.finfo(dtype).min if kind.startswith("min") else float("-inf")
    return torch.randn(shape).to(dtype).masked_fill(hidden, fill)


@dataclass
class Problem:
    """The tensors of one case: what `run` feeds to a module."""

    case: Case
    inputs: tuple[Tensor, ...]  # distinct tensors, 1 to 3 of them
    padding: Tensor | None
    attn: Tensor | None
    dout: Tensor
    dweights: Tensor

    def to(self, dtype: torch.dtype) -> Problem:
        def cast(t: Any) -> Any:
            return t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t

        inputs = tuple(cast(t) for t in self.inputs)
        return Problem(self.case, inputs, *(cast(t) for t in (self.padding, self.attn, self.dout, self.dweights)))


def make(case: Case, seed: int = 0) -> tuple[nn.MultiheadAttention, Problem]:
    torch.manual_seed(seed)
    n, rows, s, width, heads = case.size
    s = rows if case.kind == "self" else s
    options = CONFIGS[case.config]
    module = nn.MultiheadAttention(width, heads, batch_first=case.batch_first, dtype=case.dtype, **options)
    for p in module.parameters():  # biases start at zero: give them values, or their handling would not show
        if p.dim() == 1:
            nn.init.normal_(p, std=0.3)

    def tensor(length: int, features: int) -> Tensor:
        shape = (length, features) if not case.batched else (n, length, features)
        if case.batched and not case.batch_first:
            shape = (length, n, features)
        return torch.randn(shape).to(case.dtype)

    count = {"self": 1, "shared_key_value": 2, "separate": 3}[case.kind]
    widths = (width, options.get("kdim", width), options.get("vdim", width))
    inputs = tuple(tensor(rows if i == 0 else s, widths[i]) for i in range(count))
    padding_kind, attn_kind, _ = MASKS[case.masks]
    padding = _padding_mask(padding_kind, n, s, case.dtype)
    attn = _attention_mask(attn_kind, n, heads, rows, s, case.dtype)
    if padding is not None and not case.batched:
        padding = padding[0]
    keys = s + ("add_bias_kv" in options) + ("add_zero_attn" in options)
    shape = (n, rows, keys) if case.need == "mean" else (n, heads, rows, keys)
    dweights = torch.randn(shape if case.batched else shape[1:]).to(case.dtype)
    return module, Problem(case, inputs, padding, attn, torch.randn(inputs[0].shape).to(case.dtype), dweights)


# --- running and comparing ----------------------------------------------------------------------------------------


def run(module: Any, problem: Problem, grad: bool, call: Any = None) -> dict[str, Tensor]:
    """Output, weights and, with `grad`, the gradients of inputs, parameters and floating masks."""
    case = problem.case
    leaves = {f"input {i}": t.detach().clone().requires_grad_(grad) for i, t in enumerate(problem.inputs)}
    masks = {}
    for name, t in (("key_padding_mask", problem.padding), ("attn_mask", problem.attn)):
        masks[name] = t
        if t is not None and t.is_floating_point() and not case.masks.startswith("causal"):
            masks[name] = leaves[name] = t.detach().clone().requires_grad_(grad)
    x = [leaves[f"input {i}"] for i in range(len(problem.inputs))]
    query, key, value = ROLES[len(x)]
    options = {**call_options(problem), **masks}
    module.zero_grad()
    with torch.set_grad_enabled(grad):
        out, weights = (module if call is None else call)(x[query], x[key], x[value], **options)
    found = {"output": out.detach()}
    loss = (out * problem.dout).sum()
    if weights is not None:
        found["weights"] = weights.detach()
        loss = loss + (weights * problem.dweights).sum()
    if grad:
        loss.backward()
        tensors = {**leaves, **dict(module.named_parameters())}
        found |= {f"gradient of {n}": torch.zeros_like(t) if t.grad is None else t.grad for n, t in tensors.items()}
    return found


def call_options(problem: Problem) -> dict[str, Any]:
    need, average = NEED[problem.case.need]
    hint = MASKS[problem.case.masks][2]
    return {"need_weights": need, "average_attn_weights": average, "is_causal": hint}


def yardsticks(module: nn.MultiheadAttention, problem: Problem) -> tuple[dict[str, Any], dict[str, Any]]:
    """`same` and `ref` for a problem.

    One small tensor in one order of operations can come out exact by luck. So `same` is, tensor by tensor, the less
    lucky of two plain eager computations in the tested dtype: PyTorch's module, and the formula written out.
    """
    case = problem.case
    dead = case.masks.startswith("dead")

    def written_out(*args: Any, **options: Any) -> Any:
        return plain_multihead(module, *args, **options)

    plain = run(module, problem, True, written_out)
    torchs = plain if dead else run(module, problem, True)
    ref: dict[str, Any]
    if dead or case.dtype == torch.float64:
        masks = {"key_padding_mask": problem.padding, "attn_mask": problem.attn}
        x = [problem.inputs[i] for i in ROLES[len(problem.inputs)]]
        ref = exact_multihead(module, x, problem.dout, problem.dweights, **masks, **call_options(problem))
    else:
        wide = like(nn.MultiheadAttention, module, replace(case, dtype=torch.float64))
        ref = run(wide, problem.to(torch.float64), True)
    same = {n: max((torchs[n], plain[n]), key=lambda t: _error(t, ref[n])) for n in torchs}
    return same, {n: ref[n] for n in torchs}


def _error(t: Tensor, ref: Any) -> float:
    return float(abs(numpy.asarray(t.double()) - numpy.asarray(ref)).max(initial=0.0))


def like(kind: Any, module: nn.MultiheadAttention, case: Case) -> Any:
    """A module of another class or dtype with the same weights."""
    options = CONFIGS[case.config]
    made = kind(module.embed_dim, module.num_heads, batch_first=case.batch_first, dtype=case.dtype, **options)
    made.load_state_dict(module.state_dict())
    return made


def _joined(parts: list[Any]) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat([p.flatten() for p in parts])
    return numpy.concatenate([p.ravel() for p in parts])


def compare(case: Case, mode: str, draws: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]) -> None:
    """Apply the rule to what (got, same, ref) hold of each draw, taken together."""
    for name in draws[0][2]:
        for got, _, ref in draws:
            assert got.keys() == ref.keys(), f"{case} {mode}: {got.keys() ^ ref.keys()}"
            assert got[name].shape == ref[name].shape, f"{case} {mode} {name}: {got[name].shape}"
            assert got[name].dtype == case.dtype, f"{case} {mode} {name}: {got[name].dtype}"
        got, same, ref = (_joined([draw[i][name] for draw in draws]) for i in range(3))
        is_grad = name.startswith("gradient")
        assert_close(got, same, ref, grad=is_grad, name=f"{case} {mode}: {name}")


def _draw(case: Case, seed: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    module, problem = make(case, seed)
    ours = like(fused.MultiheadAttention, module, case)
    train, evaluated, without_grad = (run(ours.train(mode == "train"), problem, mode != "no_grad") for mode in MODES)
    # The same numbers in every mode: what holds for one then holds for all.
    for name, value in train.items():
        assert torch.equal(value, evaluated[name]), f"{case}: {name} differs between train and eval"
        if not name.startswith("gradient"):
            assert torch.equal(value, without_grad[name]), f"{case}: {name} differs without gradients"
    return train, *yardsticks(module, problem)


def check(case: Case, seed: int) -> None:
    """The rule over a few draws at once."""
    count = DRAWS["batched" if case.batched else "unbatched"]
    compare(case, "train", [_draw(case, 100 * seed + i) for i in range(count)])


@pytest.mark.parametrize("item", PLAN)
def test_parity(item: str) -> None:
    for seed, case in enumerate(PLAN[item]):
        check(case, seed)


@pytest.mark.fast
@pytest.mark.parametrize("item", ["float32-batch_first", "bfloat16-seq_first"])
def test_parity_sample(item: str) -> None:
    for seed, case in enumerate(PLAN[item][::9]):
        check(case, seed)


@pytest.mark.parametrize(
    ("case", "backend"),
    [(c, "aot_eager") for c in COMPILED] + [(c, "inductor") for c in INDUCTOR],
    ids=lambda v: v if isinstance(v, str) else "-".join(str(v).split("(")[0].split()),
)
def test_parity_compiled(case: Case, backend: str) -> None:
    torch._dynamo.reset()
    draws = []
    compiled = None
    for seed in range(DRAWS["batched"]):
        module, problem = make(case, seed)
        if compiled is None:
            ours = like(fused.MultiheadAttention, module, case)
            compiled = torch.compile(ours, backend=backend, fullgraph=True, dynamic=False)
        ours.load_state_dict(module.state_dict())
        draws.append((run(ours, problem, True, compiled), *yardsticks(module, problem)))
    compare(case, "compiled", draws)


def test_yardsticks_are_torch_where_torch_has_an_answer() -> None:
    for case in PLAN["float64-batch_first"][::2] + PLAN["float64-unbatched"][::3]:
        if case.masks.startswith("dead"):
            continue
        module, problem = make(case)
        exact = yardsticks(module, problem)[1]
        plain = run(module, problem, True, lambda *a, m=module, **k: plain_multihead(m, *a, **k))
        for name, expected in run(module, problem, True).items():
            for found in (plain[name], torch.from_numpy(exact[name].astype("float64"))):
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12, msg=f"{case}: {name}")


@pytest.mark.fast
@pytest.mark.parametrize("bug", ["mask inverted", "weights of another head", "scale"])
def test_a_planted_bug_is_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_attention.nn import multihead

    true_attention = multihead.attention

    def wrong(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        if bug == "mask inverted" and options["mask"] is not None:
            options["mask"] = ~options["mask"]
        if bug == "weights of another head":
            v = v.roll(1, 1)
        if bug == "scale":
            options["scale"] = 1.01 * q.shape[-1] ** -0.5
        return true_attention(q, k, v, **options)

    monkeypatch.setattr(multihead, "attention", wrong)
    with pytest.raises(AssertionError):
        check(Case(torch.float32, True, "kpm_bool", "mean", "plain"), 0)


def test_count_of_combinations(say: Callable[[str], None]) -> None:
    """Every parity item above runs its whole list or fails, so the sum of the lists is what was compared."""
    eager = [replace(c) for cases in PLAN.values() for c in cases]
    assert len(set(eager)) == len(eager), "a combination is listed twice"
    total = len(eager) * len(MODES) + len(COMPILED) + len(INDUCTOR)
    compiled = len(COMPILED) + len(INDUCTOR)
    say(
        f"MultiheadAttention against torch.nn.MultiheadAttention: {total} combinations "
        f"({len(eager)} in {', '.join(MODES)}; {compiled} compiled)"
    )
    assert total >= 2000
