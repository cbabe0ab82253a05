"""Rotary embeddings and their scaling laws, sinusoidal and learned positions, ALiBi slopes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fused_attention as fa
from fused_attention.nn import rope_scaling

from .numerics import assert_close

pytestmark = pytest.mark.fast

# --- frequencies --------------------------------------------------------------------------------------------------

# A law, the length in use, the factor of cos and sin, and the frequencies: what `ROPE_INIT_FUNCTIONS` of transformers
# 5.23.0 gives for head_dim 32, partial_rotary_factor 0.5, rope_theta 10000, max_position_embeddings 2048.
# fmt: off
FREQUENCIES: dict[str, tuple[dict[str, Any], int | None, float, list[float]]] = {
    "linear": (
        {"rope_type": "linear", "factor": 4.0}, None, 1.0,
        [0.25, 0.07905694097280502, 0.02500000037252903, 0.007905694656074047, 0.0024999999441206455,
         0.0007905694656074047, 0.0002500000118743628, 7.905694656074047e-05]),
    "dynamic-short": (
        {"rope_type": "dynamic", "factor": 2.0}, 100, 1.0,
        [1.0, 0.3162277638912201, 0.10000000149011612, 0.03162277862429619, 0.009999999776482582,
         0.003162277862429619, 0.0010000000474974513, 0.0003162277862429619]),
    "dynamic-long": (
        {"rope_type": "dynamic", "factor": 2.0}, 5000, 1.0,
        [1.0, 0.26051709055900574, 0.0678691565990448, 0.017681075260043144, 0.00460622226819396,
         0.001199999707750976, 0.00031262042466551065, 8.144296589307487e-05]),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, None, 1.138629436111989,
        [1.0, 0.2569350600242615, 0.0625, 0.013834965415298939, 0.0024999999441206455, 0.0007905694656074047,
         0.0002500000118743628, 7.905694656074047e-05]),
    "yarn-deepseek": (
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0,
         "mscale_all_dim": 0.707, "beta_fast": 16, "beta_slow": 2}, None, 1.0857263992561355,
        [1.0, 0.3162277638912201, 0.10000000149011612, 0.03162277862429619, 0.006749999243766069,
         0.0011067971354350448, 2.499999936844688e-05, 7.905694474175107e-06]),
    "yarn-given": (
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512, "attention_factor": 1.3,
         "truncate": False}, None, 1.3,
        [1.0, 0.29893627762794495, 0.06546507775783539, 0.011510122567415237, 0.0012499999720603228,
         0.00039528473280370235, 0.0001250000059371814, 3.9528473280370235e-05]),
    "llama3": (
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 1024}, None, 1.0,
        [1.0, 0.3162277638912201, 0.10000000149011612, 0.03162277862429619, 0.003086760640144348,
         0.00039528473280370235, 0.0001250000059371814, 3.9528473280370235e-05]),
}
# fmt: on


def _frequencies(law: dict[str, Any], length: int | None, head_dim: int, part: float, base: float) -> Any:
    rope = fa.RotaryEmbedding(head_dim, base=base, partial_rotary_factor=part, scaling=law, max_positions=2048)
    return rope_scaling.frequencies(rope.rotary_dim, base, rope.scaling, length or 2048, "cpu", torch.float32)


@pytest.mark.parametrize("name", FREQUENCIES)
def test_scaling_laws(name: str) -> None:
    law, length, factor, expected = FREQUENCIES[name]
    found, by = _frequencies(law, length, 32, 0.5, 10000.0)
    assert by == pytest.approx(factor, rel=1e-15)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=2**-22, atol=0.0)
    rope = fa.RotaryEmbedding(32, partial_rotary_factor=0.5, scaling=law, max_positions=2048)
    rows = length or 300
    for got, function in zip(rope.tables(rows), (np.cos, np.sin), strict=True):
        same, exact = (
            function(np.arange(rows, dtype=kind)[:, None] * np.array(expected, kind)) * kind(factor)
            for kind in (np.float32, np.float64)
        )
        assert_close(got, same, exact)


@pytest.mark.parametrize("name", FREQUENCIES)
def test_scaling_laws_are_those_of_the_installed_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    functions = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    law, length, _, _ = FREQUENCIES[name]
    for head_dim, part, base in ((64, 1.0, 10000.0), (128, 0.5, 500000.0), (80, 0.4, 1e6)):
        parameters = {**law, "rope_theta": base, "partial_rotary_factor": part}
        sizes = {"hidden_size": 4 * head_dim, "num_attention_heads": 4, "max_position_embeddings": 2048}
        config = transformers.LlamaConfig(**sizes, head_dim=head_dim, rope_parameters=parameters)
        expected, factor = functions[law["rope_type"]](config, "cpu", seq_len=length)
        found, by = _frequencies(law, length, head_dim, part, base)
        assert by == factor and torch.equal(found, expected)


def test_a_config_s_other_spellings() -> None:
    """The older key "type", None for what is absent, and L0 and yarn's factor from the model's own context."""
    older = fa.RotaryEmbedding(8, scaling={"type": "linear", "factor": 2, "mscale": None})
    assert older.scaling.rope_type == "linear" and older.scaling.factor == 2
    law = {"rope_type": "yarn", "original_max_position_embeddings": 512}
    assert fa.RotaryEmbedding(8, scaling=law, max_positions=2048).scaling.factor == 4.0
    law = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert fa.RotaryEmbedding(8, scaling=law, max_positions=99).scaling.original_max_position_embeddings == 99


# --- rotary embedding ---------------------------------------------------------------------------------------------


def turned(x: Tensor, positions: Tensor, rotary_dim: int, base: float, interleaved: bool, dtype: torch.dtype) -> Tensor:
    """RoFormer's rotation as a product of complex numbers; x [B, H, S, D], positions [B|1, S]."""
    wide = x.to(dtype)
    even = torch.arange(0, rotary_dim, 2, dtype=dtype)
    angles = positions.to(dtype)[:, None, :, None] * (1.0 / base ** (even / rotary_dim))
    part = wide[..., :rotary_dim]
    pairs = part.unflatten(-1, (-1, 2)) if interleaved else part.unflatten(-1, (2, -1)).transpose(-1, -2)
    a, b = pairs.unbind(-1)
    real, imaginary = a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()
    pairs = torch.stack((real, imaginary), -1)
    part = pairs.flatten(-2) if interleaved else pairs.transpose(-1, -2).flatten(-2)
    return torch.cat((part, wide[..., rotary_dim:]), -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("positions", [None, "shared", "batch"])
@pytest.mark.parametrize(("head_dim", "part"), [(16, 1.0), (24, 0.5), (5, 0.4)])
def test_rotary_embedding(interleaved: bool, positions: str | None, head_dim: int, part: float) -> None:
    torch.manual_seed(0)
    rope = fa.RotaryEmbedding(head_dim, base=500.0, partial_rotary_factor=part, interleaved=interleaved)
    q, k = torch.randn(3, 4, 33, head_dim), torch.randn(3, 2, 33, head_dim)
    at = {None: torch.arange(33)[None], "shared": torch.arange(7, 40)[None], "batch": torch.randint(0, 99, (3, 33))}
    given = None if positions is None else at[positions]
    for got, x in zip(rope(q, k, given), (q, k), strict=True):
        arguments = (at[positions], rope.rotary_dim, 500.0, interleaved)
        assert_close(got, turned(x, *arguments, torch.float32), turned(x, *arguments, torch.float64))
    if positions == "shared":
        assert torch.equal(rope(q, k, at["shared"][0])[0], rope(q, k, given)[0])


def test_scores_depend_on_distances_alone() -> None:
    rope = fa.RotaryEmbedding(16).double()
    q, k = torch.randn(1, 1, 9, 16, dtype=torch.float64), torch.randn(1, 1, 9, 16, dtype=torch.float64)
    here, there = (rope(q, k, torch.arange(9) + shift) for shift in (0, 1000))
    torch.testing.assert_close(here[0] @ here[1].mT, there[0] @ there[1].mT)


def test_tables_are_made_in_float32_whatever_the_module_is_cast_to() -> None:
    rope = fa.RotaryEmbedding(64)
    before = rope.tables(5000)
    assert rope.half().tables(5000)[0].dtype == torch.float32 and not list(rope.state_dict())
    assert torch.equal(rope.tables(5000)[0], before[0])
    wide = rope.tables(5000, dtype=torch.float64)
    assert wide[1].dtype == torch.float64
    torch.testing.assert_close(before[1].double(), wide[1], rtol=0.0, atol=5000 * 2**-23)


def test_tables_are_kept_and_grow() -> None:
    rope = fa.RotaryEmbedding(8)
    first = rope.tables(10)[0]
    assert rope.tables(60)[0].data_ptr() == first.data_ptr() and rope.tables(60)[0].shape == (60, 4)
    assert rope.tables(65)[0].data_ptr() != first.data_ptr() and torch.equal(rope.tables(65)[0][:10], first)
    with torch.inference_mode():
        rope.tables(1000)
    leaf = torch.randn(1, 1, 900, 8, requires_grad=True)
    rope(leaf)[0].sum().backward()  # saves the tables that inference mode asked for
    buffer = io.BytesIO()
    torch.save(rope, buffer)
    assert buffer.tell() < 8000  # without the tables
    buffer.seek(0)
    for other in (copy.deepcopy(rope), torch.load(buffer, weights_only=False)):
        assert torch.equal(other.tables(70)[1], rope.tables(70)[1])


def test_dynamic_scaling_follows_the_length() -> None:
    rope = fa.RotaryEmbedding(8, scaling={"rope_type": "dynamic", "factor": 2.0}, max_positions=16)
    plain = fa.RotaryEmbedding(8)
    assert torch.equal(rope.tables(16)[0], plain.tables(16)[0])
    longer = rope.tables(64)
    base = 10000.0 * (2.0 * 64 / 16 - 1.0) ** (8 / 6)
    torch.testing.assert_close(longer[1], fa.RotaryEmbedding(8, base=base).tables(64)[1])
    assert torch.equal(rope.tables(16)[0], plain.tables(16)[0])  # and back
    with pytest.raises(fa.ArgumentError, match="positions"):
        rope(torch.randn(1, 1, 4, 8), None, torch.arange(4))


# --- sinusoidal, learned, ALiBi -----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 7, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sinusoidal(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = fa.SinusoidalPositionalEncoding(width)
    x = torch.randn(2, 33, width).to(dtype)

    def expected(positions: np.ndarray, kind: Any) -> Tensor:
        i = np.arange(width)
        angles = positions[..., None].astype(kind) / kind(10000) ** ((i - i % 2).astype(kind) / kind(width))
        return torch.from_numpy(np.where(i % 2 == 0, np.sin(angles), np.cos(angles)))

    for positions in (None, torch.arange(50, 83), torch.randint(0, 500, (2, 33))):
        at = (torch.arange(33) if positions is None else positions).numpy()
        same, ref = (x.float() + expected(at, np.float32)).to(dtype), x.double() + expected(at, np.float64)
        assert_close(module(x, positions), same, ref)
    assert not list(module.state_dict()) and module(x[:, :3]).shape == (2, 3, width)


def test_learned() -> None:
    torch.manual_seed(0)
    module = fa.LearnedPositionalEmbedding(40, 6)
    assert [(n, tuple(p.shape)) for n, p in module.named_parameters()] == [("weight", (40, 6))]
    assert 0.01 < module.weight.std().item() < 0.03
    x = torch.randn(2, 7, 6)
    assert torch.equal(module(x), x + module.weight[:7])
    positions = torch.randint(0, 40, (2, 7))
    assert torch.equal(module(x, positions), x + module.weight[positions])
    module(x, positions).sum().backward()
    assert module.weight.grad is not None
    assert torch.equal(module.weight.grad[:, 0], torch.bincount(positions.flatten(), minlength=40).float())


def test_alibi_slopes() -> None:
    """Powers of two as the paper's formula, others as its rule; 12 heads are those of its appendix."""
    for n in (1, 2, 4, 8, 16, 64):
        expected = [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]
        assert torch.equal(fa.alibi_slopes(n), torch.tensor(expected))
    for n, below in ((3, 2), (6, 4), (12, 8), (40, 32)):
        rest = fa.alibi_slopes(2 * below)[::2][: n - below]
        assert torch.equal(fa.alibi_slopes(n), torch.cat([fa.alibi_slopes(below), rest]))
    assert fa.alibi_slopes(12)[8:].tolist() == pytest.approx([2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])


@pytest.mark.parametrize("make", [fa.SinusoidalPositionalEncoding, lambda e: fa.LearnedPositionalEmbedding(50, e)])
def test_compiled(make: Callable[[int], torch.nn.Module]) -> None:
    module, x = make(6), torch.randn(2, 9, 6)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
    torch.testing.assert_close(compiled(x, torch.arange(9) + 4), module(x, torch.arange(9) + 4))


# --- bad input ----------------------------------------------------------------------------------------------------

X, T = torch.zeros(2, 5, 6), torch.arange(5)
ROPE, SINES, LEARNED = fa.RotaryEmbedding(6), fa.SinusoidalPositionalEncoding(6), fa.LearnedPositionalEmbedding(5, 6)
LLAMA = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}
CALLS: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("head_dim 0", lambda: fa.RotaryEmbedding(0), ValueError, "head_dim"),
    ("head_dim is a float", lambda: fa.RotaryEmbedding(8.0), TypeError, "head_dim"),  # type: ignore[arg-type]
    ("odd", lambda: fa.RotaryEmbedding(7), ValueError, "partial_rotary_factor"),
    ("too large a part", lambda: fa.RotaryEmbedding(8, partial_rotary_factor=1.5), ValueError, "partial_rotary_factor"),
    ("no dims", lambda: fa.RotaryEmbedding(8, partial_rotary_factor=0.1), ValueError, "partial_rotary_factor"),
    ("base 0", lambda: fa.RotaryEmbedding(8, base=0.0), ValueError, "base"),
    ("base NaN", lambda: fa.RotaryEmbedding(8, base=float("nan")), ValueError, "base"),
    ("base is text", lambda: fa.RotaryEmbedding(8, base="1e4"), TypeError, "base"),  # type: ignore[arg-type]
    ("interleaved is a number", lambda: fa.RotaryEmbedding(8, interleaved=1), TypeError, "interleaved"),  # type: ignore[arg-type]
    ("max_positions 0", lambda: fa.RotaryEmbedding(8, max_positions=0), ValueError, "max_positions"),
    ("scaling is text", lambda: fa.RotaryEmbedding(8, scaling="yarn"), TypeError, "scaling"),  # type: ignore[arg-type]
    ("no law", lambda: fa.RotaryEmbedding(8, scaling={"factor": 2.0}), ValueError, "rope_type"),
    ("unknown law", lambda: fa.RotaryEmbedding(8, scaling={"rope_type": "ntk"}), ValueError, "rope_type"),
    ("no factor", lambda: fa.RotaryEmbedding(8, scaling={"rope_type": "linear"}), ValueError, "'factor'"),
    (
        "a parameter of another law",
        lambda: fa.RotaryEmbedding(8, scaling={"rope_type": "linear", "factor": 2.0, "beta_fast": 3}),
        ValueError,
        "'beta_fast'",
    ),
    ("factor 0", lambda: fa.RotaryEmbedding(8, scaling={"rope_type": "linear", "factor": 0}), ValueError, "'factor'"),
    ("factor is text", lambda: fa.RotaryEmbedding(8, scaling={"type": "linear", "factor": "2"}), TypeError, "'factor'"),
    (
        "truncate is a number",
        lambda: fa.RotaryEmbedding(8, scaling={"type": "yarn", "factor": 2.0, "truncate": 1}, max_positions=9),
        TypeError,
        "'truncate'",
    ),
    (
        "dynamic without its context",
        lambda: fa.RotaryEmbedding(8, scaling={"type": "dynamic", "factor": 2.0}),
        ValueError,
        "max_positions",
    ),
    (
        "dynamic over two dims",
        lambda: fa.RotaryEmbedding(2, scaling={"type": "dynamic", "factor": 2.0}, max_positions=9),
        ValueError,
        "partial_rotary_factor",
    ),
    (
        "yarn without a factor",
        lambda: fa.RotaryEmbedding(8, scaling={"type": "yarn", "original_max_position_embeddings": 9}),
        ValueError,
        "'factor'",
    ),
    ("equal bands", lambda: fa.RotaryEmbedding(8, scaling=LLAMA, max_positions=9), ValueError, "high_freq_factor"),
    ("query of 3 dims", lambda: ROPE(X), ValueError, "query"),
    ("query of another head dim", lambda: ROPE(torch.zeros(1, 1, 5, 8)), ValueError, "query"),
    ("key of another length", lambda: ROPE(X[None], X[None, :, :4], T), ValueError, "key"),
    ("floating positions", lambda: ROPE(X[None], None, T.float()), ValueError, "positions.dtype"),
    ("positions of another length", lambda: ROPE(X[None], None, T[:4]), ValueError, "positions"),
    ("positions of another batch", lambda: ROPE(X[None], None, T.expand(3, 5)), ValueError, "positions"),
    ("positions are a list", lambda: SINES(X, [0, 1, 2, 3, 4]), TypeError, "positions"),
    ("x of another width", lambda: SINES(X[..., :5]), ValueError, "x"),
    ("integer x", lambda: SINES(X.long()), ValueError, "x.dtype"),
    ("x is None", lambda: LEARNED(None), TypeError, "x"),
    ("x of 2 dims", lambda: LEARNED(X[0]), ValueError, "x"),
    ("x too long", lambda: LEARNED(torch.zeros(1, 6, 6)), ValueError, "x"),
    ("position past the end", lambda: LEARNED(X, T + 1), ValueError, "positions"),
    ("negative position", lambda: LEARNED(X, T - 1), ValueError, "positions"),
    ("no embeddings", lambda: fa.LearnedPositionalEmbedding(0, 6), ValueError, "max_positions"),
    ("no width", lambda: fa.SinusoidalPositionalEncoding(0), ValueError, "embed_dim"),
    ("no heads", lambda: fa.alibi_slopes(0), ValueError, "num_heads"),
    ("heads is a bool", lambda: fa.alibi_slopes(True), TypeError, "num_heads"),
]


@pytest.mark.parametrize(("make", "error", "name"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS])
def test_malformed(make: Callable[[], Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value).startswith(name) or name in str(caught.value).split(":")[0]
    assert type(caught.value) in (fa.ArgumentError, TypeError)
