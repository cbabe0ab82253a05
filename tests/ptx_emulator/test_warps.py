"""What threads do together: shuffles, votes, matrix fragments, wgmma from every layout, TMA with every swizzle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from . import EmulationError, TensorMap, load
from .snippets import snippet
from .test_instructions import run

pytestmark = pytest.mark.emulator

LANES = np.arange(32)
TORCH = {
    "f16": torch.float16, "bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2,
    "tf32": torch.float32, "s8": torch.int8, "u8": torch.uint8, "f32": torch.float32, "s32": torch.int32,
}  # fmt: skip


# --- shuffles, votes ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("segment", [32, 8])
def test_shuffle(mode: str, segment: int) -> None:
    values, by = LANES.astype(np.int32) * 3 + 1, (LANES * 7 % 13).astype(np.int32)
    c = (32 - segment) << 8 | (0 if mode == "up" else 31)
    got, valid = run(f"shfl.sync.{mode}.b32 %d0|%p0, %a0, %a1, {c}, -1; selp.b32 %d1, 1, 0, %p0;",
                     [("b32", values), ("b32", by)], [("b32", np.int32)] * 2)  # fmt: skip
    first = LANES // segment * segment
    source = {"up": LANES - by, "down": LANES + by, "bfly": LANES ^ by, "idx": first + by % segment}[mode]
    inside = (source >= first) if mode == "up" else (source <= first + segment - 1)
    np.testing.assert_array_equal(valid, inside)
    np.testing.assert_array_equal(got, values[np.where(inside, source, LANES)])


def test_votes_in_two_groups_of_a_warp() -> None:
    """Threads of two masks vote on their own, in branches that the others do not take."""
    x = (LANES * 5 % 7).astype(np.int32)
    body = """
    setp.lt.u32 %p0, %t, 20;
    selp.b32 %i0, 0x000FFFFF, 0xFFF00000, %p0;
    setp.gt.s32 %p1, %a0, 3;
    @%p0 bra low;
    vote.sync.ballot.b32 %d0, %p1, %i0;
    match.any.sync.b32 %d1, %a0, %i0;
    bra joined;
    low:
    vote.sync.ballot.b32 %d0, %p1, 0x000FFFFF;
    match.any.sync.b32 %d1, %a0, 0x000FFFFF;
    joined:
    vote.sync.any.pred %p2, %p1, -1;
    selp.b32 %d2, 1, 0, %p2;
    redux.sync.add.s32 %d3, %a0, -1;
    redux.sync.max.s32 %d4, %a0, -1;
    elect.sync %i1|%p3, %i0;
    selp.b32 %d5, 1, 0, %p3;
    """
    ballot, match, anyone, total, most, leads = run(body, [("b32", x)], [("b32", np.uint32)] * 6)
    group = LANES < 20
    for lane in range(32):
        mine = group == group[lane]
        assert ballot[lane] == sum(1 << o for o in LANES[mine & (x > 3)])
        assert match[lane] == sum(1 << o for o in LANES[mine & (x == x[lane])])
    assert anyone.all() and (total == x.sum()).all() and (most == x.max()).all()
    assert leads[:20].sum() == 1 and leads[20:].sum() == 1


def test_an_order_by_shuffle_is_a_race() -> None:
    body = "mov.u32 %i0, tile; shl.b32 %i1, %t, 2; add.u32 %i2, %i0, %i1; st.shared.b32 [%i2], %a0; {}"
    body += "xor.b32 %i3, %i1, 4; add.u32 %i4, %i0, %i3; ld.shared.b32 %d0, [%i4];"
    races = {}
    for order in ("shfl.sync.idx.b32 %i5, %a0, 0, 31, -1;", "bar.warp.sync -1;"):
        module = load(snippet(body.format(order), ["b32"], ["b32"], shared=128))
        reports = [
            module.launch("test", 1, 32, [LANES.astype(np.int32), np.zeros(32, np.int32)], seed=s) for s in range(4)
        ]
        races[order] = [r.races for r in reports]
    shuffle, barrier = races.values()
    assert all(shuffle) and not any(barrier)
    assert "read" in shuffle[0][0] and "st.shared.b32 [%i2], %a0" in shuffle[0][0]


# --- fragments: 9.7.14.5 ------------------------------------------------------------------------------------------
def packed(x: torch.Tensor) -> np.ndarray:
    """Registers of 32 bits from elements along the last dimension."""
    return x.contiguous().view(torch.uint8).numpy().view(np.int32)


def a_fragment(a: torch.Tensor, per: int) -> list[np.ndarray]:
    """Registers of A [16, K]: the pairs (quads, ...) that thread l holds, l / 4 and l % 4 counting rows and groups."""
    words = packed(a)  # [16, K / per]
    return [words[LANES // 4 + 8 * (r % 2), LANES % 4 + 4 * (r // 2)] for r in range(words.shape[1] // 2)]


def b_fragment(b: torch.Tensor, per: int) -> list[np.ndarray]:
    words = packed(b.T)  # [N, K / per]
    return [words[LANES // 4, LANES % 4 + 4 * r] for r in range(words.shape[1] // 4)]


def operand(kind: str, shape: tuple[int, int], seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    if kind in ("s8", "u8"):
        return torch.randint(-128 if kind == "s8" else 0, 128 if kind == "s8" else 256, shape, generator=g).to(
            TORCH[kind]
        )
    x = torch.randn(shape, generator=g).to(TORCH[kind])
    return (x.view(torch.int32) & -8192).view(torch.float32) if kind == "tf32" else x


MMA = [("bf16", 16, "f32"), ("f16", 16, "f32"), ("f16", 16, "f16"), ("bf16", 8, "f32"), ("f16", 8, "f32"),
       ("tf32", 8, "f32"), ("tf32", 4, "f32"), ("e4m3", 32, "f32"), ("e5m2", 32, "f32"), ("s8", 32, "s32"),
       ("u8", 32, "s32"), ("s8", 16, "s32")]  # fmt: skip


@pytest.mark.parametrize(("kind", "k", "sum_type"), MMA)
def test_mma(kind: str, k: int, sum_type: str) -> None:
    a, b = operand(kind, (16, k), 1), operand(kind, (k, 8), 2)
    c = (torch.randn(16, 8) * 4).to(TORCH[sum_type])
    per = 4 // a.element_size()
    fragments = [*a_fragment(a, per), *b_fragment(b, per)]
    rows, columns = LANES // 4, LANES % 4 * 2
    wide = [(rows + 8 * (i // 2), columns + i % 2) for i in range(4)]
    if sum_type == "f16":
        words = packed(c)
        fragments += [words[rows + 8 * i, LANES % 4] for i in range(2)]
    else:
        fragments += [c.view(torch.int32).numpy()[at] for at in wide]
    na, nb, nc = len(a_fragment(a, per)), len(b_fragment(b, per)), 2 if sum_type == "f16" else 4
    names = [f"%a{n}" for n in range(len(fragments))]

    def group(first: int, count: int) -> str:
        return "{" + ", ".join(names[first : first + count]) + "}"

    d = "{" + ", ".join(f"%d{n}" for n in range(nc)) + "}"
    types = f"{sum_type}.{kind}.{kind}.{sum_type}"
    body = f"mma.sync.aligned.m16n8k{k}.row.col.{types} {d}, {group(0, na)}, {group(na, nb)}, {group(na + nb, nc)};"
    found = run(body, [("b32", f.astype(np.int32)) for f in fragments], [("b32", np.int32)] * nc)
    exact = a.double() @ b.double() + c.double()
    if sum_type == "f16":
        got = torch.empty(16, 8, dtype=torch.float16)
        for i in range(2):
            got[rows + 8 * i, columns], got[rows + 8 * i, columns + 1] = torch.from_numpy(
                found[i].view(np.float16).reshape(32, 2)
            ).unbind(1)
        torch.testing.assert_close(got.double(), exact, rtol=2**-10, atol=2**-14)
        return
    for values, at in zip(found, wide, strict=True):
        got = torch.from_numpy(values).view(TORCH[sum_type])
        if sum_type == "s32":
            assert torch.equal(got.long(), exact[at].long())
        else:
            torch.testing.assert_close(got.double(), exact[at], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix(count: int, transposed: bool) -> None:
    image = np.arange(32 * 8, dtype=np.int16).reshape(32, 8)  # row r of matrix r / 8
    order = np.random.default_rng(0).permutation(32)  # where in shared memory each row lies
    registers = "{" + ", ".join(f"%d{n}" for n in range(count)) + "}"
    trans = ".trans" if transposed else ""
    body = f"""
    mov.u32 %i0, tile; mad.lo.u32 %i1, %a0, 16, %i0;
    st.shared.v4.b32 [%i1], {{%a1, %a2, %a3, %a4}};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {registers}, [%i1];
    bar.sync 0;
    stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%i1+512], {registers};
    bar.sync 0;
    ld.shared.v4.b32 {{%d4, %d5, %d6, %d7}}, [%i1+512];
    movmatrix.sync.aligned.m8n8.trans.b16 %d8, %d0;
    """
    words = image.view(np.int32)
    inputs = [("b32", order.astype(np.int32)), *(("b32", words[:, i].copy()) for i in range(4))]
    text_outputs = [("b32", np.int32)] * 9
    found = run(body, inputs, text_outputs, shared=1024)
    matrices = image.reshape(4, 8, 8)
    for n in range(count):
        m = matrices[n].T if transposed else matrices[n]
        np.testing.assert_array_equal(found[n].view(np.int16).reshape(8, 8), m)
    np.testing.assert_array_equal(np.stack(found[4:8], 1)[: 8 * count], words[: 8 * count])
    first = matrices[0].T if transposed else matrices[0]
    np.testing.assert_array_equal(found[8].view(np.int16).reshape(8, 8), first.T)


# --- wgmma: 9.7.15 ------------------------------------------------------------------------------------------------
def exchanged(image: np.ndarray, width: int) -> np.ndarray:
    """A swizzled image of bytes: in groups of 8 rows of `width` bytes, chunk c of row r goes to chunk c ^ r.

    For 64 (32) bytes, two (four) rows share 128 bytes, and r counts those.
    """
    out = np.empty_like(image)
    for at in range(0, len(image), 16):
        shift = {128: at // 128 % 8, 64: at // 128 % 4, 32: at // 128 % 2, 16: 0}[width]
        out[at ^ shift * 16 : (at ^ shift * 16) + 16] = image[at : at + 16]
    return out


def stored(x: torch.Tensor, width: int, mn_major: bool) -> tuple[np.ndarray, int, int]:
    """The shared memory image of an operand [rows, k], and its leading and stride byte offsets.

    K-major: blocks of 8 rows, one after the other; in each, panels of `width` bytes of k. MN-major: panels of `width`
    bytes of rows, in each all of k, so that 8 of k are 8 * width bytes.
    """
    size = x.element_size()
    across = x.shape[0] if mn_major else x.shape[1]
    lines = (x.T if mn_major else x).contiguous().view(torch.uint8).numpy()  # [k, rows] or [rows, k], as bytes
    panels = [lines[:, p : p + width] for p in range(0, across * size, width)]
    if mn_major:
        image, leading, stride = np.concatenate([p.ravel() for p in panels]), panels[0].size, 8 * width
        if width == 16:  # 9.7.15.5.1.2: without swizzle the two offsets change places
            leading, stride = stride, leading
    else:
        blocks = [p[r : r + 8].ravel() for r in range(0, len(lines), 8) for p in panels]
        image, leading, stride = np.concatenate(blocks), 8 * width, 8 * width * len(panels)
    return exchanged(image, width), leading, stride


def wgmma_text(n: int, kind: str, sum_type: str, in_registers: bool, transposed: str, size: int) -> str:
    registers = n // 4 if sum_type == "f16" else n // 2
    k = 32 // torch.empty(0, dtype=TORCH[kind]).element_size()
    d = "{" + ", ".join(f"%d{i}" for i in range(registers)) + "}"
    a = "{%a0, %a1, %a2, %a3}" if in_registers else "%v1"
    zero = "\n".join(f"mov.b32 %d{i}, 0;" for i in range(registers))
    body = f"""
    mov.u32 %i0, tile; shl.b32 %i1, %t, 4;
    next: setp.ge.u32 %p0, %i1, {size}; @%p0 bra done;
    cvt.u64.u32 %l0, %i1; add.u64 %l0, %v0, %l0; ld.global.v4.b32 {{%i2, %i3, %i4, %i5}}, [%l0];
    add.u32 %i6, %i0, %i1; st.shared.v4.b32 [%i6], {{%i2, %i3, %i4, %i5}};
    add.u32 %i1, %i1, 2048; bra next;
    done: fence.proxy.async; bar.sync 0; {zero}
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n{n}k{k}.{sum_type}.{kind}.{kind} {d}, {a}, %v2, 1, 1, -1{transposed};
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
    """
    return snippet(body, ["b32"] * (4 if in_registers else 0), ["b32"] * registers, ["image", "a", "b"], shared=size)


def wgmma_cases() -> Iterator[Any]:
    for n in (8, 24, 64, 256):
        yield n, "bf16", "f32", 128, False, False, False
    for width in (16, 32, 64, 128):
        for mn_major in (False, True):
            yield 64, "f16", "f32", width, mn_major, mn_major, False
    yield 128, "bf16", "f32", 128, False, True, False
    yield 128, "bf16", "f32", 128, False, True, True
    yield 32, "f16", "f16", 64, False, False, False
    yield 96, "tf32", "f32", 128, False, False, False
    yield 64, "e4m3", "f32", 128, False, False, False
    for n, width in ((128, 128), (256, 64), (256, 32)):  # P V of a forward kernel, with tiles of as many keys as bytes
        yield n, "e4m3", "f32", width, False, False, True
    yield 64, "e5m2", "f32", 32, False, False, True


@pytest.mark.parametrize(("n", "kind", "sum_type", "width", "a_mn", "b_mn", "in_registers"), list(wgmma_cases()))
def test_wgmma(n: int, kind: str, sum_type: str, width: int, a_mn: bool, b_mn: bool, in_registers: bool) -> None:
    """D = -A B: descriptors for operands that the formulas of the layouts put into shared memory."""
    k = 32 // torch.empty(0, dtype=TORCH[kind]).element_size()
    a, b = operand(kind, (64, k), 1), operand(kind, (k, n), 2)
    # A swizzle wider than the 32 bytes of k that an instruction takes: the rest of the panel belongs to other steps.
    wide = max(1, width // 32)
    whole_a = (
        torch.cat([a.float()] + [torch.full(a.shape, float("nan"))] * (wide - 1), 1).to(a.dtype) if not a_mn else a
    )
    whole_b = (
        torch.cat([b.float().T] + [torch.full((n, k), float("nan"))] * (wide - 1), 1).to(b.dtype) if not b_mn else b.T
    )
    if b_mn and n * b.element_size() < width or a_mn and 64 * a.element_size() < width:
        pytest.skip("the operand is narrower than the swizzle")
    image_a, *offsets_a = stored(whole_a, width, a_mn)
    image_b, *offsets_b = stored(whole_b, width, b_mn)
    start = -(-len(image_a) // 1024) * 1024
    image = np.zeros(start + -(-len(image_b) // 1024) * 1024, np.uint8)
    image[: len(image_a)], image[start : start + len(image_b)] = image_a, image_b

    def descriptor(at: int, leading: int, stride: int) -> int:
        mode = {16: 0, 128: 1, 64: 2, 32: 3}[width]
        return (1024 + at) >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62

    halves = kind in ("f16", "bf16")
    transposed = ("" if in_registers else f", {int(a_mn)}") + f", {int(b_mn)}" if halves else ""
    text = wgmma_text(n, kind, sum_type, in_registers, transposed, len(image))
    registers = n // 4 if sum_type == "f16" else n // 2
    words = packed(a)
    threads = np.arange(128)
    rows = threads // 32 * 16 + threads % 32 // 4
    fragments = (
        [words[rows + 8 * (r % 2), threads % 4 + 4 * (r // 2)].astype(np.int32) for r in range(4)]
        if in_registers
        else []
    )
    found = [np.zeros(128, np.int32) for _ in range(registers)]
    args = [*fragments, *found, image, descriptor(0, *offsets_a), descriptor(start, *offsets_b)]
    for seed in range(2):
        assert not load(text).launch("test", 1, 128, args, seed=seed).races
        exact = -(a.double() @ b.double())
        got = torch.empty(64, n, dtype=torch.float64)
        for i, values in enumerate(found):
            parts = values.view(np.float16).reshape(128, 2).T if sum_type == "f16" else values.view(np.float32)[None]
            for j, part in enumerate(parts):
                e = i * len(parts) + j
                got[rows + e // 2 % 2 * 8, e // 4 * 8 + threads % 4 * 2 + e % 2] = torch.from_numpy(
                    part.astype(np.float64)
                )
        torch.testing.assert_close(
            got, exact, rtol=1e-5 if sum_type == "f32" else 2**-9, atol=1e-4 if sum_type == "f32" else 0.01
        )


# --- TMA: 9.7.9.27 ------------------------------------------------------------------------------------------------
def boxes() -> Iterator[Any]:
    yield (200,), (64,), (150,), 0
    yield (40, 48), (32, 16), (20, 30), 64  # reaches past both sizes
    yield (40, 64), (64, 8), (0, -3), 128
    yield (33, 32), (16, 40), (16, 5), 32
    yield (5, 12, 40), (40, 4, 2), (0, 10, 1), 0
    yield (3, 4, 9, 64), (64, 5, 2, 1), (0, 6, 1, 2), 128
    yield (2, 3, 2, 5, 16), (16, 2, 2, 2, 2), (0, 4, 1, -1, 1), 32


@pytest.mark.parametrize("swizzle", [32, 64, 128])
def test_tma_of_bytes(swizzle: int) -> None:
    """Boxes as wide as their swizzle, past both sizes; what is outside reads as 0."""
    x = torch.arange(1, 50 * 160 + 1).remainder(251).to(torch.uint8).reshape(50, 160)
    body = f"""
    mov.u32 %i5, tile; setp.eq.u32 %p0, %t, 0; mov.b32 %i0, {160 - swizzle // 2}; mov.b32 %i1, 30;
    @%p0 mbarrier.init.shared.b64 [%i5+4096], 1;
    @%p0 mbarrier.arrive.expect_tx.shared.b64 %l0, [%i5+4096], {32 * swizzle};
    @%p0 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes
        [%i5], [%v0, {{%i0, %i1}}], [%i5+4096];
    bar.sync 0;
    again: mbarrier.try_wait.parity.shared.b64 %p1, [%i5+4096], 0; @!%p1 bra again;
    mad.lo.u32 %i6, %t, 4, %i5; ld.shared.b32 %d0, [%i6];
    """
    text = snippet(body, [], ["b32"], ["map"], shared=4096 + 16)
    image = np.zeros(8 * swizzle, np.int32)
    assert not load(text).launch("test", 1, 8 * swizzle, [image, TensorMap(x, (swizzle, 32), swizzle=swizzle)]).races
    expected = np.zeros((32, swizzle), np.uint8)
    expected[:20, : swizzle // 2] = x.numpy()[30:, 160 - swizzle // 2 :]
    np.testing.assert_array_equal(image.view(np.uint8), exchanged(expected.ravel(), swizzle))


@pytest.mark.parametrize(("shape", "box", "at", "swizzle"), list(boxes()))
def test_tma_load_and_store(shape: tuple[int, ...], box: tuple[int, ...], at: tuple[int, ...], swizzle: int) -> None:
    rank, count = len(shape), int(np.prod(box))
    x = torch.randn(shape).half()
    y = torch.zeros(shape).half()
    places = ", ".join(f"%i{n}" for n in range(rank))
    coordinates = " ".join(f"mov.b32 %i{n}, {c};" for n, c in enumerate(at))
    body = f"""
    mov.u32 %i5, tile; setp.eq.u32 %p0, %t, 0; {coordinates}
    @%p0 mbarrier.init.shared.b64 [%i5+{count * 2}], 1;
    @%p0 mbarrier.arrive.expect_tx.shared.b64 %l0, [%i5+{count * 2}], {count * 2};
    @%p0 cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes
        [%i5], [%v0, {{{places}}}], [%i5+{count * 2}];
    bar.sync 0;
    again: mbarrier.try_wait.parity.shared.b64 %p1, [%i5+{count * 2}], 0; @!%p1 bra again;
    mad.lo.u32 %i6, %t, 2, %i5; ld.shared.b16 %d0, [%i6];
    bar.sync 0;
    @%p0 cp.async.bulk.tensor.{rank}d.global.shared::cta.tile.bulk_group [%v1, {{{places}}}], [%i5];
    cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
    """
    text = snippet(body, [], ["b16"], ["map", "map"], shared=count * 2 + 16)
    image = np.zeros(count, np.int16)
    report = load(text).launch(
        "test", 1, count, [image, TensorMap(x, box, swizzle=swizzle), TensorMap(y, box, swizzle=swizzle)]
    )
    assert not report.races
    index = np.meshgrid(*(np.arange(b) + a for b, a in zip(reversed(box), reversed(at), strict=True)), indexing="ij")
    inside = np.logical_and.reduce([(i >= 0) & (i < n) for i, n in zip(index, shape, strict=True)])
    clipped = tuple(np.clip(i, 0, n - 1) for i, n in zip(index, shape, strict=True))
    expected = np.where(inside, x.numpy()[clipped], 0).astype(np.float16).ravel()
    np.testing.assert_array_equal(image, exchanged(expected.view(np.uint8), swizzle or 16).view(np.int16))
    written = np.zeros(shape, bool)
    written[tuple(c[inside] for c in clipped)] = True
    np.testing.assert_array_equal(y.numpy(), np.where(written, x.numpy(), 0))


def test_tensor_maps_that_hardware_refuses() -> None:
    x = torch.zeros(8, 64, dtype=torch.float16)
    for bad in (
        {"box": (64, 8), "swizzle": 64},
        {"box": (64,)},
        {"box": (300, 1)},
        {"box": (4, 1)},
        {"box": (8, 1), "strides_bytes": [8]},
    ):
        with pytest.raises(ValueError, match="tensor map: "):
            TensorMap(x, **bad)
    body = "mov.b32 %i0, 0; mov.u32 %i1, tile; prefetch.tensormap [%v0];"
    body += "cp.async.bulk.tensor.1d.global.shared::cta.bulk_group [%v0, {%i0}], [%i1];"
    text = snippet(body, [], ["b32"], ["map"], shared=128)
    with pytest.raises(EmulationError, match="no tensor map"):
        load(text).launch("test", 1, 1, [np.zeros(1, np.int32), bytes(128)])
