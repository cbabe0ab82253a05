"""Instructions one by one, against NumPy, torch and the formulas of the PTX ISA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from . import EmulationError, load
from .snippets import snippet

pytestmark = pytest.mark.emulator

RANDOM = np.random.default_rng(0)
N = 256
LIMITS = (lambda i: i.max, lambda i: i.max - 1, lambda i: i.min)
EDGES = {
    kind: np.array([0, 1, 2, 3, 31, 32, 33, 63, 64, 127, 128, *(f(np.iinfo(kind)) for f in LIMITS)], kind)
    for kind in (np.int32, np.uint32, np.int16, np.uint16, np.int64, np.uint64)
}  # fmt: skip


def run(body: str, inputs: Sequence[tuple[str, np.ndarray]], outputs: Sequence[tuple[str, Any]], **options: Any) -> Any:
    """Results of a snippet on arrays of one element a thread."""
    text = snippet(body, [t for t, _ in inputs], [t for t, _ in outputs], **options)
    n = len(inputs[0][1])
    found = [np.zeros(n, dtype) for _, dtype in outputs]
    load(text).launch("test", 1, n, [*(a for _, a in inputs), *found])
    return found[0] if len(found) == 1 else found


def integers(dtype: Any, seed: int = 0) -> np.ndarray:
    """Edge cases, each beside each, and random numbers."""
    rng, edges = np.random.default_rng(seed), EDGES[dtype]
    info = np.iinfo(dtype)
    rest = rng.integers(info.min, info.max, N - len(edges) ** 2 if len(edges) ** 2 < N else 0, dtype, endpoint=True)
    grid = np.repeat(edges, len(edges)) if seed == 0 else np.tile(edges, len(edges))
    return np.concatenate([grid, rest])[:N]


def floats(seed: int = 0, scale: float = 8.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    special = np.array(
        [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 1e-40, 6e-8, 65504, 65520, 1e5, 448, 464, 3e38, 0.5]
    )
    grid = np.repeat(special, 8) if seed == 0 else np.tile(special, 8)
    return np.concatenate(
        [grid, rng.normal(size=N - len(grid)) * np.exp(rng.normal(size=N - len(grid)) * scale)]
    ).astype(np.float32)


def same(found: np.ndarray, expected: Any) -> None:
    """Bit by bit, but a NaN is a NaN."""
    expected = np.asarray(expected).astype(found.dtype)
    np.testing.assert_array_equal(found, expected)
    if found.dtype.kind == "f":
        known = ~np.isnan(expected)
        np.testing.assert_array_equal(np.signbit(found[known]), np.signbit(expected[known]))


# --- integers -----------------------------------------------------------------------------------------------------
def wide(x: np.ndarray) -> np.ndarray:
    return np.array([int(v) for v in x], dtype=object)


def wrapped(values: Any, dtype: Any) -> np.ndarray:
    bits = np.iinfo(dtype).bits
    return np.array([int(v) & ((1 << bits) - 1) for v in values], dtype=f"u{bits // 8}").view(dtype)


def truncated(a: Any, b: Any) -> int:
    return int(abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)


BINARY: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul.lo": lambda a, b: a * b, "min": min, "max": max,
    "div": lambda a, b: truncated(a, b) if b else -1, "rem": lambda a, b: a - b * truncated(a, b) if b else a,
}  # fmt: skip


@pytest.mark.parametrize("type_", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_integer_arithmetic(type_: str) -> None:
    dtype = np.dtype(f"{'i' if type_[0] == 's' else 'u'}{int(type_[1:]) // 8}").type
    a, b = integers(dtype, 0), integers(dtype, 1)
    body = "\n".join(f"{op}.{type_} %d{n}, %a0, %a1;" for n, op in enumerate(BINARY))
    found = run(body, [(type_, a), (type_, b)], [(type_, dtype)] * len(BINARY))
    for (op, formula), values in zip(BINARY.items(), found, strict=True):
        expected = wrapped([formula(x, y) for x, y in zip(wide(a), wide(b), strict=True)], dtype)
        np.testing.assert_array_equal(values, expected, err_msg=op)


@pytest.mark.parametrize("type_", ["s32", "u32"])
def test_products_of_64_bits(type_: str) -> None:
    dtype, double = (np.int32, np.int64) if type_ == "s32" else (np.uint32, np.uint64)
    a, b, c = integers(dtype, 0), integers(dtype, 1), integers(double, 2)
    body = f"mul.wide.{type_} %d0, %a0, %a1; mad.wide.{type_} %d1, %a0, %a1, %a2; mul.hi.{type_} %d2, %a0, %a1;"
    body += f"mad.lo.{type_} %d3, %a0, %a1, %a0; mul24.lo.{type_} %d4, %a0, %a1;"
    types = [(type_[0] + "64", double)] * 2 + [(type_, dtype)] * 3
    found = run(body, [(type_, a), (type_, b), (type_[0] + "64", c)], types)
    product = wide(a) * wide(b)
    low = [x - (x >> 24 << 24) for x in wide(a)], [x - (x >> 24 << 24) for x in wide(b)]
    short = [[x - (1 << 24) if type_ == "s32" and x >> 23 else x for x in part] for part in low]
    expected = [product, product + wide(c), [p >> 32 for p in product], product + wide(a),
                [x * y for x, y in zip(*short, strict=True)]]  # fmt: skip
    for values, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(values, wrapped(wanted, values.dtype.type))


def test_carries_make_128_bits() -> None:
    a, b, c, d = (integers(np.uint64, seed) for seed in range(4))
    body = "add.cc.u64 %d0, %a0, %a1; addc.u64 %d1, %a2, %a3; sub.cc.u64 %d2, %a0, %a1; subc.u64 %d3, %a2, %a3;"
    low, high, less, more = run(body, [("u64", x) for x in (a, b, c, d)], [("u64", np.uint64)] * 4)
    total, rest = wide(a) + wide(b) + (wide(c) + wide(d)) * 2**64, wide(a) - wide(b) + (wide(c) - wide(d)) * 2**64
    for found_low, found_high, wanted in ((low, high, total), (less, more, rest)):
        np.testing.assert_array_equal(found_low, wrapped(wanted, np.uint64))
        np.testing.assert_array_equal(found_high, wrapped([w >> 64 for w in wanted], np.uint64))


def test_shifts_clamp_at_the_width() -> None:
    a, n = integers(np.int32, 0), integers(np.uint32, 1)
    body = "shl.b32 %d0, %a0, %a1; shr.s32 %d1, %a0, %a1; shr.u32 %d2, %a0, %a1;"
    body += "shf.l.wrap.b32 %d3, %a0, %a1, %a1; shf.r.clamp.b32 %d4, %a0, %a1, %a1;"
    found = run(body, [("s32", a), ("u32", n)], [("b32", np.int32)] * 5)
    u, by, both = wide(a.view(np.uint32)), np.minimum(n, 32).astype(object), wide(a.view(np.uint32)) + wide(n) * 2**32
    expected = [[x << y for x, y in zip(u, by, strict=True)], [x >> y for x, y in zip(wide(a), by, strict=True)],
                [x >> y for x, y in zip(u, by, strict=True)],
                [x << int(y) % 32 >> 32 for x, y in zip(both, n, strict=True)],
                [x >> y for x, y in zip(both, by, strict=True)]]  # fmt: skip
    for values, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(values, wrapped(wanted, np.int32))


def test_bits() -> None:
    a, b, c = (integers(np.uint32, seed) for seed in range(3))
    body = "popc.b32 %d0, %a0; clz.b32 %d1, %a0; brev.b32 %d2, %a0; bfind.u32 %d3, %a0; prmt.b32 %d4, %a0, %a1, %a2;"
    body += "lop3.b32 %d5, %a0, %a1, %a2, 0xCA; bfe.u32 %d6, %a0, 5, 9; bfi.b32 %d7, %a0, %a1, 7, 12; not.b32 %d8, %a0;"
    body += "bfe.s32 %d9, %a0, 5, 9; dp4a.u32.s32 %d10, %a0, %a1, %a2; sad.u32 %d11, %a0, %a1, %a2;"
    found = run(body, [("b32", x) for x in (a, b, c)], [("b32", np.uint32)] * 12)
    x, y, z = wide(a), wide(b), wide(c)
    binary = [f"{v:032b}" for v in x]

    def permuted(low: int, high: int, selector: int) -> int:
        source, out = (low + (high << 32)).to_bytes(8, "little"), 0
        for i in range(4):
            nibble = selector >> 4 * i & 15
            byte = source[nibble & 7]
            out |= ((255 if byte & 128 else 0) if nibble & 8 else byte) << 8 * i
        return out

    fields = [v >> 5 & 511 for v in x]
    bytes_ = a.view(np.uint8).reshape(-1, 4).astype(object), b.view(np.int8).reshape(-1, 4).astype(object)
    dots = (bytes_[0] * bytes_[1]).sum(1)
    expected = [[s.count("1") for s in binary], [32 - int(v).bit_length() for v in x],
                [int(s[::-1], 2) for s in binary],
                [int(v).bit_length() - 1 for v in x], [permuted(*t) for t in zip(x, y, z, strict=True)],
                [(p & q) | (~p & r) for p, q, r in zip(x, y, z, strict=True)], fields,
                [(q & ~(4095 << 7)) | (p & 4095) << 7 for p, q in zip(x, y, strict=True)], [~v for v in x],
                [f - 512 if f >> 8 else f for f in fields], [d + r for d, r in zip(dots, z, strict=True)],
                [r + abs(p - q) for p, q, r in zip(x, y, z, strict=True)]]  # fmt: skip
    for n, (values, wanted) in enumerate(zip(found, expected, strict=True)):
        np.testing.assert_array_equal(values, wrapped(wanted, np.uint32), err_msg=f"%d{n}")


# --- floating point -----------------------------------------------------------------------------------------------
def test_float32_arithmetic() -> None:
    a, b, c = floats(0), floats(1), floats(2)
    body = "add.f32 %d0, %a0, %a1; mul.rn.f32 %d1, %a0, %a1; fma.rn.f32 %d2, %a0, %a1, %a2; div.rn.f32 %d3, %a0, %a1;"
    body += "sqrt.rn.f32 %d4, %a0; min.f32 %d5, %a0, %a1; max.NaN.f32 %d6, %a0, %a1; abs.f32 %d7, %a0;"
    body += "add.sat.f32 %d8, %a0, %a1; mul.ftz.f32 %d9, %a0, %a1; rcp.rn.f32 %d10, %a0; copysign.f32 %d11, %a0, %a1;"
    found = run(body, [("f32", x) for x in (a, b, c)], [("f32", np.float32)] * 12)
    with np.errstate(all="ignore"):
        exact = a.astype(np.longdouble) * b.astype(np.longdouble) + c.astype(np.longdouble)

        def flushed(x: np.ndarray) -> np.ndarray:
            return np.where(np.abs(x) < np.float32(2**-126), np.copysign(np.float32(0), x), x)

        least = np.where(np.isnan(a), b, np.where(np.isnan(b), a, np.minimum(a, b)))
        expected = [a + b, a * b, exact.astype(np.float32), a / b, np.sqrt(a), least, np.maximum(a, b), np.abs(a),
                    np.clip(np.nan_to_num(a + b, nan=0, posinf=2, neginf=-2), 0, 1), flushed(flushed(a) * flushed(b)),
                    np.float32(1) / a, np.copysign(b, a)]  # fmt: skip
    for n, (values, wanted) in enumerate(zip(found, expected, strict=True)):
        if n in (5, 6):  # which zero is smaller is said by PTX alone: -0
            values, wanted = values + np.float32(0), wanted + np.float32(0)
        np.testing.assert_array_equal(values, wanted, err_msg=f"%d{n}")
    signs = np.array([[0.0, -0.0], [-0.0, 0.0]], np.float32)
    body = "min.f32 %d0, %a0, %a1; max.f32 %d1, %a0, %a1;"
    zeros = run(body, [("f32", s) for s in signs], [("f32", np.float32)] * 2)
    assert np.signbit(zeros[0]).all() and not np.signbit(zeros[1]).any()


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_other_roundings(mode: str) -> None:
    a, b, c = (RANDOM.normal(size=N).astype(np.float32) for _ in range(3))
    body = f"add.{mode}.f32 %d0, %a0, %a1; mul.{mode}.f32 %d1, %a0, %a1; fma.{mode}.f32 %d2, %a0, %a1, %a2;"
    found = run(body, [("f32", x) for x in (a, b, c)], [("f32", np.float32)] * 3)
    x, y, z = (v.astype(np.longdouble) for v in (a, b, c))
    for values, exact in zip(found, (x + y, x * y, x * y + z), strict=True):
        nearest = exact.astype(np.float32)
        down = np.where(nearest > exact, np.nextafter(nearest, np.float32(-np.inf)), nearest)
        up = np.where(nearest < exact, np.nextafter(nearest, np.float32(np.inf)), nearest)
        np.testing.assert_array_equal(values, {"rz": np.where(exact > 0, down, up), "rm": down, "rp": up}[mode])


@pytest.mark.parametrize("type_", ["f16", "bf16"])
def test_half_arithmetic_rounds_once(type_: str) -> None:
    dtype = torch.float16 if type_ == "f16" else torch.bfloat16
    tensors = [torch.from_numpy(floats(seed, 2.0)).to(dtype) for seed in range(3)]
    body = f"add.{type_} %d0, %a0, %a1; mul.{type_} %d1, %a0, %a1; fma.rn.{type_} %d2, %a0, %a1, %a2;"
    body += f"max.NaN.{type_} %d3, %a0, %a1; fma.rn.relu.{type_} %d4, %a0, %a1, %a2; neg.{type_} %d5, %a0;"
    inputs = [("b16", t.view(torch.int16).numpy()) for t in tensors]
    found = [torch.from_numpy(x).view(dtype) for x in run(body, inputs, [("b16", np.int16)] * 6)]
    with np.errstate(all="ignore"):
        x, y, z = (t.double().numpy().astype(np.longdouble) for t in tensors)
        # float32 holds a sum of halves to far more digits than it takes to round it once more to nearest.
        fused = rounded_to(x * y + z, dtype)
        expected = [rounded_to(x + y, dtype), rounded_to(x * y, dtype), fused, torch.maximum(tensors[0], tensors[1]),
                    torch.where(fused.isnan(), fused, fused.clamp(min=0)), -tensors[0]]  # fmt: skip
    for values, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(values, wanted, rtol=0, atol=0, equal_nan=True)


def rounded_to(x: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """A long double to 16 bits in one rounding: float64 to odd first."""
    near = x.astype(np.float64)
    bits = near.view(np.int64)
    inexact = (near.astype(np.longdouble) != x) & np.isfinite(near) & (bits % 2 == 0)
    toward = np.where(near < x, np.inf, -np.inf)
    return torch.from_numpy(np.where(inexact, np.nextafter(near, toward), near)).to(dtype)


def test_comparisons_with_nan() -> None:
    a, b = floats(0), floats(1)
    names = ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"]
    body = "\n".join(f"setp.{c}.f32 %p0, %a0, %a1; selp.b32 %d{n}, 1, 0, %p0;" for n, c in enumerate(names))
    found = run(body, [("f32", a), ("f32", b)], [("b32", np.int32)] * len(names))
    nan = np.isnan(a) | np.isnan(b)
    plain = {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}
    for name, values in zip(names, found, strict=True):
        expected = {"num": ~nan, "nan": nan}.get(name)
        if expected is None:
            expected = plain[name[:2]] & ~nan if len(name) == 2 else plain[name[:2]] | nan
        np.testing.assert_array_equal(values, expected, err_msg=name)


def test_a_predicate_joins_a_comparison() -> None:
    a = np.arange(8, dtype=np.int32)
    body = "setp.ge.s32 %p0, %a0, 4; setp.lt.and.s32 %p1|%p2, %a0, 6, !%p0;"
    body += "selp.b32 %d0, 1, 0, %p1; selp.b32 %d1, 1, 0, %p2;"
    first, second = run(body, [("s32", a)], [("b32", np.int32)] * 2)
    np.testing.assert_array_equal(first, (a < 6) & (a < 4))
    np.testing.assert_array_equal(second, (a >= 6) & (a < 4))


# --- conversions --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_to_and_from_halves(dtype: torch.dtype) -> None:
    name = "f16" if dtype == torch.float16 else "bf16"
    x = floats(0)
    body = f"cvt.rn.{name}.f32 %h0, %a0; mov.b16 %d0, %h0; cvt.f32.{name} %d1, %h0; cvt.rn.{name}x2.f32 %d2, %a0, %a1;"
    body += f"cvt.rz.{name}.f32 %d3, %a0; cvt.rn.relu.{name}.f32 %d4, %a0;"
    y = x[::-1].copy()
    outputs = [("b16", np.int16), ("f32", np.float32), ("b32", np.int32), ("b16", np.int16), ("b16", np.int16)]
    half, back, pair, zero, positive = run(body, [("f32", x), ("f32", y)], outputs)
    want = torch.from_numpy(x).to(dtype)

    def equal(found: np.ndarray, expected: torch.Tensor) -> None:
        torch.testing.assert_close(torch.from_numpy(found.copy()).view(dtype), expected, rtol=0, atol=0, equal_nan=True)

    equal(half, want)
    same(back, want.float().numpy())
    equal(pair.view(np.int16)[0::2], torch.from_numpy(y).to(dtype))  # the second source lies low
    equal(pair.view(np.int16)[1::2], want)
    equal(positive, torch.where(want.isnan(), want, want.clamp(min=0)))
    cut = torch.from_numpy(zero).view(dtype).double()
    known = torch.from_numpy(np.isfinite(x))
    above = torch.nextafter(torch.from_numpy(zero).view(dtype).abs(), torch.tensor(torch.inf, dtype=dtype)).double()
    size = torch.from_numpy(x).double().abs()
    assert (cut.abs() <= size)[known].all() and (above > size)[known & (above < torch.inf)].all()


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_to_and_from_fp8(name: str, dtype: torch.dtype) -> None:
    x = np.concatenate([floats(0), RANDOM.normal(size=512).astype(np.float32) * 30])
    largest = torch.finfo(dtype).max
    body = f"cvt.rn.satfinite.{name}x2.f32 %d0, %a0, %a1; cvt.rn.f16x2.{name}x2 %d1, %a2;"
    codes = np.arange(len(x)).astype(np.int16)
    found, halves = run(body, [("f32", x), ("f32", -x), ("b16", codes)], [("b16", np.int16), ("b32", np.int32)])
    want = torch.from_numpy(np.clip(x, -largest, largest)).to(dtype)
    got = torch.from_numpy(found.view(np.uint8)[1::2].copy()).view(dtype)
    torch.testing.assert_close(got.float(), want.float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(torch.from_numpy(found.view(np.uint8)[0::2].copy()).view(dtype).float(), -want.float(),
                               rtol=0, atol=0, equal_nan=True)  # fmt: skip
    low = torch.from_numpy((codes & 255).astype(np.uint8)).view(dtype)
    torch.testing.assert_close(
        torch.from_numpy(halves.view(np.float16)[0::2].copy()), low.half(), rtol=0, atol=0, equal_nan=True
    )


def test_floats_to_integers_clamp() -> None:
    numbers = [0.5, 1.5, 2.5, -0.5, -1.5, 1e20, -1e20, np.nan, np.inf, 2147483648, 127.6, -128.6, 300, -3.7, 3.2, 0]
    x = np.array(numbers, np.float32)
    body = "cvt.rni.s32.f32 %d0, %a0; cvt.rzi.u32.f32 %d1, %a0; cvt.rmi.s16.f32 %d2, %a0; cvt.rpi.s64.f32 %d3, %a0;"
    body += "cvt.rni.f32.f32 %d4, %a0; cvt.rzi.s32.f32 %i0, %a0; cvt.sat.s8.s32 %h0, %i0; cvt.s32.s8 %d5, %h0;"
    outputs = [
        ("b32", np.int32),
        ("b32", np.uint32),
        ("b16", np.int16),
        ("b64", np.int64),
        ("f32", np.float32),
        ("b32", np.int32),
    ]
    found = run(body, [("f32", x)], outputs)

    def clamped(values: np.ndarray, dtype: Any, nan: int = 0) -> list[int]:
        info = np.iinfo(dtype)
        return [
            nan if np.isnan(v) else info.max if v > info.max else info.min if v < info.min else int(v) for v in values
        ]

    d = x.astype(np.float64)
    expected = [clamped(np.rint(d), np.int32), clamped(np.trunc(d), np.uint32), clamped(np.floor(d), np.int16),
                clamped(np.ceil(d), np.int64, -(2**63)), np.rint(x), clamped(np.trunc(d), np.int8)]  # fmt: skip
    for n, (values, wanted) in enumerate(zip(found, expected, strict=True)):
        np.testing.assert_array_equal(values, np.array(wanted, dtype=values.dtype), err_msg=f"%d{n}")


def test_integers_to_floats_and_tf32() -> None:
    i = integers(np.int32)
    x = RANDOM.normal(size=N).astype(np.float32)
    body = "cvt.rn.f32.s32 %d0, %a0; cvt.rz.f32.u32 %d1, %a0; cvt.rn.f64.s32 %d2, %a0; cvt.rna.tf32.f32 %d3, %a1;"
    outputs = [("f32", np.float32), ("f32", np.float32), ("f64", np.float64), ("b32", np.uint32)]
    near, cut, double, tf32 = run(body, [("b32", i), ("f32", x)], outputs)
    same(near, i.astype(np.float32))
    u = i.view(np.uint32).astype(np.float64)
    assert (cut <= u).all() and (np.nextafter(cut, np.float32(np.inf)) > u).all()
    same(double, i.astype(np.float64))
    np.testing.assert_array_equal(tf32, (x.view(np.uint32) + 0x1000) & 0xFFFFE000)


def test_packed_values() -> None:
    a, b = integers(np.int32, 0), integers(np.int32, 1)
    body = "add.u16x2 %d0, %a0, %a1; min.s16x2 %d1, %a0, %a1; cvt.pack.sat.s8.s32.b32 %d2, %a0, %a1, 0x12345;"
    body += (
        "mov.b32 {%h0, %h1}, %a0; mov.b32 %d3, {%h1, %h0}; setp.gt.f16x2 %p0|%p1, %a0, %a1; selp.b32 %i0, 1, 0, %p0;"
    )
    body += (
        "selp.b32 %i1, 2, 0, %p1; or.b32 %d4, %i0, %i1; set.lt.f32.s32 %d5, %a0, %a1; slct.b32.s32 %d6, %a0, 7, %a1;"
    )
    body += "set.neu.bf16x2.bf16x2 %d7, %a0, %a0; ex2.approx.ftz.f16x2 %d8, %a0; abs.bf16x2 %d9, %a0;"
    found = run(body, [("b32", a), ("b32", b)], [("b32", np.int32)] * 10)
    x, y = (v.view(np.int16).reshape(-1, 2) for v in (a, b))
    half = [v.view(np.float16) for v in (x, y)]
    with np.errstate(all="ignore"):
        greater, power = half[0] > half[1], np.exp2(half[0].astype(np.float32)).astype(np.float16)
    low, high = (np.clip(v, -128, 127).astype(np.int8).view(np.uint8).astype(np.int32) for v in (b, a))
    nan = torch.from_numpy(x.copy()).view(torch.bfloat16).isnan().numpy()
    expected = [(x + y).view(np.int32)[:, 0], np.minimum(x, y).view(np.int32)[:, 0], 0x23450000 | high << 8 | low,
                x[:, ::-1].copy().view(np.int32)[:, 0], greater[:, 0] + 2 * greater[:, 1], (a < b) * 0x3F800000,
                np.where(b >= 0, a, 7), (nan * 0x3F80) @ [1, 65536], None, a & 0x7FFF7FFF]  # fmt: skip
    for n, (values, wanted) in enumerate(zip(found, expected, strict=True)):
        if wanted is not None:
            np.testing.assert_array_equal(values, wanted, err_msg=f"%d{n}")
    np.testing.assert_array_equal(found[8].view(np.float16), power.ravel())


# --- what is not known --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("frobnicate.b32 %d0, %a0;", "unknown opcode frobnicate.b32"),
        ("add.rq.f32 %d0, %a0, %a0;", "the modifier .rq is not modelled"),
        ("tcgen05.fence::before_thread_sync;", "unknown opcode tcgen05"),
        ("mov.u32 %d0, %nosuch;", "special register %nosuch"),
        ("mov.u32 %d0, nothing;", "'nothing' is not declared"),
        (
            "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%f0, %f1, %f2, %f3}, %l0, %l1, 1, 1, 1, 0, 1;",
            "only operands of 16 bits can be transposed",
        ),
        ("wgmma.mma_async.sync.aligned.m64n12k16.f32.bf16.bf16 {%f0}, %l0, %l1, 1, 1, 1, 0, 0;", "not modelled"),
    ],
)
def test_what_is_not_known_is_an_error_at_load(body: str, message: str) -> None:
    with pytest.raises(EmulationError, match=message.replace(".", r"\.")):
        load(snippet(body, ["b32"], ["b32"]))
