"""Loads, stores, atomics, small copies and mbarriers in PTX written by hand, and the arguments of a launch."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from . import EmulationError, Module, load, pointer
from .snippets import HEAD, snippet
from .test_instructions import run

pytestmark = pytest.mark.emulator

LANES = np.arange(32, dtype=np.int32)
SEEDS = range(6)


# --- addresses ----------------------------------------------------------------------------------------------------
def test_generic_addresses_of_every_space() -> None:
    body = """
    .local .align 8 .b8 here[16];
    mov.u64 %l0, here; cvta.local.u64 %l1, %l0; st.u32 [%l1+4], %a0; ld.local.u32 %d0, [%l0+4];
    mov.u32 %i0, tile; mad.lo.u32 %i0, %t, 4, %i0; cvt.u64.u32 %l2, %i0; cvta.shared.u64 %l3, %l2;
    st.u32 [%l3], %a0; ld.shared.u32 %d1, [%i0];
    isspacep.shared %p0, %l3; isspacep.global %p1, %l1;
    selp.b32 %i1, 1, 0, %p0; selp.b32 %i2, 2, 0, %p1; or.b32 %d2, %i1, %i2;
    ld.local.u32 %d3, [%l0+12];
    cvta.to.shared.u64 %l4, %l3; cvt.u32.u64 %i3, %l4; sub.u32 %d4, %i3, %i0;
    """
    found = run(body, [("b32", LANES)], [("b32", np.int32)] * 5, shared=128)
    for values, expected in zip(found, (LANES, LANES, 3, -1, 0), strict=True):
        np.testing.assert_array_equal(values, np.zeros(32, np.int32) + np.asarray(expected))


def test_variables_with_initial_values() -> None:
    text = (
        HEAD.format(target="sm_80")
        + """
    .global .align 8 .u32 numbers[4] = {1, 0x10, -3};
    .const .align 4 .f32 factor = 0f40200000;
    .global .align 8 .u64 table[2] = {numbers+4, generic(numbers)};
    .visible .entry test(.param .u64 out) {
      .reg .b32 %r<8>; .reg .b64 %d<4>; .reg .f32 %f;
      ld.param.u64 %d0, [out];
      ld.global.v2.u32 {%r0, %r1}, [numbers]; ld.global.u32 %r2, [numbers+8]; ld.global.u32 %r3, [numbers+12];
      ld.global.u64 %d1, [table]; ld.global.u32 %r4, [%d1];
      ld.const.f32 %f, [factor]; mov.b32 %r5, %f;
      st.global.v4.u32 [%d0], {%r0, %r1, %r2, %r3}; st.global.v2.b32 [%d0+16], {%r4, %r5};
      st.global.u32 [numbers], 7;
      ret;
    }"""
    )
    out = np.zeros(6, np.int32)
    module = Module(text)
    for first in (1, 7):  # memory of a module lives as long as it does
        module.launch("test", 1, 1, [out])
        np.testing.assert_array_equal(out[:5], [first, 16, -3, 0, 16])
        assert out[5:].view(np.float32)[0] == 2.5


def test_branches_by_table() -> None:
    text = (
        HEAD.format(target="sm_80")
        + """
    .visible .entry test(.param .u64 out) {
      .reg .b32 %r<4>; .reg .b64 %d<4>;
      ld.param.u64 %d0, [out]; mov.u32 %r0, %tid.x; mad.wide.u32 %d1, %r0, 4, %d0; rem.u32 %r1, %r0, 3;
      targets: .branchtargets zero, one, two;
      brx.idx %r1, targets;
      zero: mov.u32 %r2, 100; bra done;
      one: mov.u32 %r2, 200; bra done;
      two: mov.u32 %r2, 300;
      done: st.global.u32 [%d1], %r2; ret;
    }"""
    )
    out = np.zeros(32, np.int32)
    load(text).launch("test", 1, 32, [out])
    np.testing.assert_array_equal(out, np.array([100, 200, 300])[LANES % 3])


def test_addresses_that_are_wrong() -> None:
    cases = {
        "ld.global.u32 %d0, [%v0+124];": None,
        "ld.global.u32 %d0, [%v0+128];": "out of bounds: read of global memory",
        "st.global.u32 [%v0+-4], %t;": "out of bounds: write to global memory",
        "ld.global.u32 %d0, [%v0+2];": "not aligned to 4 bytes",
        "ld.u32 %d0, [0];": "out of bounds: read of global memory 0x0",
        "ld.shared.u32 %d0, [tile+64];": "shared address 0x440 .* is out of range: the CTA has 0x400 to 0x440",
        "ld.shared.u32 %d0, [0];": "out of range",
        "ld.shared.v2.u32 {%d0, %i0}, [tile+4];": "not aligned to 8 bytes",
        "trap;": r"thread \(0,0,0\): trap",
    }
    data = np.zeros(32, np.int32)
    for body, message in cases.items():
        module = load(snippet(body, [], ["b32"], ["data"], shared=64))
        arguments = [np.zeros(1, np.int32), pointer(data)]
        if message is None:
            module.launch("test", 1, 1, arguments, memory=[data])
            continue
        with pytest.raises(EmulationError, match=message + r"(.|\n)*line \d+"):
            module.launch("test", 1, 1, arguments, memory=[data])


# --- atomics, order -----------------------------------------------------------------------------------------------
def test_atomics() -> None:
    names = ["add.u32", "min.s32", "max.u32", "and.b32", "or.b32", "xor.b32", "exch.b32", "inc.u32", "dec.u32"]
    body = "\n".join(f"atom.global.{op} %i0, [%v0+{4 * n}], %a0;" for n, op in enumerate(names))
    body += """
    red.global.add.f32 [%v0+64], %a1; red.global.add.noftz.f16x2 [%v0+68], %a2;
    red.global.add.v2.f32 [%v0+72], {%a1, %a1};
    again: ld.relaxed.gpu.global.u32 %i1, [%v0+80]; add.u32 %i2, %i1, 3;
    atom.acq_rel.gpu.global.cas.b32 %i3, [%v0+80], %i1, %i2; setp.ne.u32 %p0, %i3, %i1; @%p0 bra again;
    mov.u32 %d0, 0;
    """
    halves = np.array([0.5, 2], np.float16).view(np.int32).repeat(32)
    data = np.zeros(32, np.int32)
    data[1] = data[3] = 99
    module = load(snippet(body, ["b32", "f32", "b32"], ["b32"], ["data"]))
    for seed in SEEDS:
        found, out = data.copy(), np.zeros(32, np.int32)
        arguments = [LANES, LANES.astype(np.float32), halves, out, pointer(found)]
        module.launch("test", 1, 32, arguments, seed=seed, memory=[found])
        np.testing.assert_array_equal(found[:4], [LANES.sum(), 0, 31, 0])
        assert found[4] == 31 and found[5] == 0 and found[6] in LANES and found[20] == 96
        np.testing.assert_array_equal(found[[16, 18, 19]].view(np.float32), [LANES.sum()] * 3)
        np.testing.assert_array_equal(found[17:18].view(np.float16), [16, 64])


def test_release_and_acquire_order_shared_memory() -> None:
    """Thread 0 writes, then sets a flag that thread 32 of another warp spins on."""
    body = """
    mov.u32 %i0, tile; setp.eq.u32 %p0, %t, 0; setp.eq.u32 %p1, %t, 32; mov.u32 %d0, 0;
    @%p0 st.shared.u32 [%i0+64], 0;
    bar.sync 0;
    @%p0 st.shared.u32 [%i0], 42;
    @%p0 st.{release}.cta.shared.u32 [%i0+64], 1;
    @!%p1 bra done;
    spin: ld.{acquire}.cta.shared.u32 %i1, [%i0+64]; setp.ne.u32 %p2, %i1, 1; @%p2 bra spin;
    ld.shared.u32 %d0, [%i0];
    done:
    """
    for release, acquire, races in (("release", "acquire", False), ("relaxed", "relaxed", True)):
        text = snippet(body.format(release=release, acquire=acquire), [], ["b32"], shared=128)
        for seed in SEEDS:
            out = np.zeros(64, np.int32)
            report = load(text).launch("test", 1, 64, [out], seed=seed)
            assert out[32] == 42 and bool(report.races) == races


def test_barriers_that_reduce() -> None:
    body = """
    setp.gt.s32 %p0, %a0, 40; bar.red.popc.u32 %d0, 0, %p0; bar.red.and.pred %p1, 0, %p0; bar.red.or.pred %p2, 0, %p0;
    selp.b32 %d1, 1, 0, %p1; selp.b32 %d2, 1, 0, %p2;
    """
    count, every, some = run(body, [("b32", np.arange(64, dtype=np.int32))], [("b32", np.int32)] * 3)
    assert (count == 23).all() and not every.any() and some.all()


def test_a_thread_that_ends_is_not_waited_for() -> None:
    body = "setp.ge.u32 %p0, %t, 40; @%p0 exit; bar.sync 0; shfl.sync.idx.b32 %d0, %a0, 7, 31, -1;"
    for seed in SEEDS:
        out = np.zeros(64, np.int32)
        text = snippet(body, ["b32"], ["b32"])
        load(text).launch("test", 1, 64, [np.arange(64, dtype=np.int32), out], seed=seed)
        np.testing.assert_array_equal(out, np.where(np.arange(64) < 40, np.arange(64) // 32 * 32 + 7, 0))


# --- cp.async, mbarriers ------------------------------------------------------------------------------------------
def test_small_copies_and_zero_fill() -> None:
    body = """
    mov.u32 %i0, tile; mad.lo.u32 %i1, %t, 16, %i0; mad.wide.u32 %l0, %t, 16, %v0;
    cp.async.ca.shared.global.L2::128B [%i1], [%l0], 4; cp.async.ca.shared.global [%i1+8], [%l0+8], 8, %a0;
    cp.async.commit_group; ld.shared.u32 %d3, [%i1];
    cp.async.cg.shared.global [%i1+512], [%l0], 16, %p7;
    cp.async.wait_group 0; ld.shared.u32 %d0, [%i1]; ld.shared.v2.u32 {%d1, %d2}, [%i1+8];
    cp.async.wait_all; ld.shared.u32 %d4, [%i1+512];
    """
    data = np.arange(128, dtype=np.int32)
    out = [np.zeros(32, np.int32) for _ in range(5)]
    text = snippet("setp.gt.u32 %p7, %t, 15;" + body, ["b32"], ["b32"] * 5, ["data"], shared=1024)
    report = load(text).launch("test", 1, 32, [LANES % 3 * 4, *out, pointer(data)], memory=[data])
    rows = data.reshape(32, 4)
    np.testing.assert_array_equal(out[0], rows[:, 0])
    np.testing.assert_array_equal(out[1], np.where(LANES % 3 >= 1, rows[:, 2], 0))
    np.testing.assert_array_equal(out[2], np.where(LANES % 3 == 2, rows[:, 3], 0))
    assert (out[3] == -1).all() and len(report.races) == 1  # it was read before the wait
    np.testing.assert_array_equal(out[4], np.where(LANES > 15, 0, rows[:, 0]))


@pytest.mark.parametrize("noinc", [False, True])
def test_copies_that_arrive_on_an_mbarrier(noinc: bool) -> None:
    """Each thread copies 16 bytes and reads those of its neighbour; without .noinc an arrival counts itself first."""
    body = f"""
    mov.u32 %i0, tile; setp.eq.u32 %p0, %t, 0; mad.lo.u32 %i1, %t, 16, %i0; mad.wide.u32 %l0, %t, 16, %v0;
    @%p0 mbarrier.init.shared.b64 [%i0+1024], {64 if noinc else 128};
    bar.sync 0;
    cp.async.cg.shared.global [%i1], [%l0], 16;
    cp.async.mbarrier.arrive{".noinc" * noinc}.shared.b64 [%i0+1024];
    {"" if noinc else "mbarrier.arrive.shared.b64 %l2, [%i0+1024], 2;"}
    again: mbarrier.try_wait.parity.shared.b64 %p1, [%i0+1024], 0; @!%p1 bra again;
    xor.b32 %i2, %t, 33; mad.lo.u32 %i3, %i2, 16, %i0; ld.shared.u32 %d0, [%i3];
    """
    data = np.arange(256, dtype=np.int32)
    for seed in SEEDS:
        out = np.zeros(64, np.int32)
        text = snippet(body, [], ["b32"], ["data"], shared=1032)
        report = load(text).launch("test", 1, 64, [out, pointer(data)], seed=seed, memory=[data])
        np.testing.assert_array_equal(out, (np.arange(64) ^ 33) * 4)
        assert not report.races


def test_states_and_drops_of_mbarriers() -> None:
    """Warp 1 leaves the barrier after the first phase; warp 0 goes on alone, by the state that each arrival returns."""
    body = """
    mov.u32 %i0, tile; setp.eq.u32 %p0, %t, 0; setp.lt.u32 %p1, %t, 32; mov.u32 %d0, 0; mov.u32 %i1, 0;
    @%p0 mbarrier.init.shared.b64 [%i0], 64;
    bar.sync 0;
    @!%p1 mbarrier.arrive_drop.shared.b64 %l0, [%i0];
    @!%p1 bra done;
    phase: mbarrier.arrive.shared.b64 %l1, [%i0];
    wait: mbarrier.test_wait.shared.b64 %p2, [%i0], %l1; @!%p2 bra wait;
    add.u32 %i1, %i1, 1; setp.lt.u32 %p3, %i1, 5; @%p3 bra phase;
    mov.u32 %d0, %i1;
    done:
    """
    for seed in SEEDS:
        out = np.zeros(64, np.int32)
        load(snippet(body, [], ["b32"], shared=8)).launch("test", 1, 64, [out], seed=seed)
        np.testing.assert_array_equal(out, np.where(np.arange(64) < 32, 5, 0))


def test_wrong_use_of_mbarriers() -> None:
    init = "mov.u32 %i0, tile; mbarrier.init.shared.b64 [%i0], 1;"
    test = "mbarrier.test_wait.parity.shared.b64 %p0, [%i0], 0;"
    cases = {
        "mov.u32 %i0, tile; mbarrier.arrive.shared.b64 _, [%i0];": "there is no mbarrier at shared 0x400",
        init + "mbarrier.init.shared.b64 [%i0], 1;": "is an mbarrier already",
        init + "mbarrier.inval.shared.b64 [%i0];" + test: "there is no mbarrier",
        init + "mbarrier.arrive.shared.b64 _, [%i0], 2;": "2 arrivals where 1 are pending of 1",
        init + "loop:" + test + "@!%p0 bra loop;": "deadlock",
        "loop: ld.volatile.global.u32 %i1, [%v0]; setp.ne.u32 %p0, %i1, 5; @%p0 bra loop;": "threads spin",
    }
    data = np.zeros(1, np.int32)
    for body, message in cases.items():
        module = load(snippet(body, [], ["b32"], ["data"], shared=16))
        with pytest.raises(EmulationError, match=message):
            module.launch("test", 1, 1, [np.zeros(1, np.int32), pointer(data)], memory=[data])


# --- arguments ----------------------------------------------------------------------------------------------------
def test_arguments_of_every_kind() -> None:
    text = (
        HEAD.format(target="sm_80")
        + """
    .visible .entry test(.param .align 8 .b8 s[24], .param .f32 f, .param .u8 b, .param .u64 nothing) .reqntid 1 {
      .reg .b32 %r<8>; .reg .b64 %d<4>; .reg .b16 %h;
      ld.param.u64 %d0, [s]; ld.param.u32 %r0, [s+8]; ld.param.f32 %r1, [f]; ld.param.u8 %h, [b]; cvt.u32.u16 %r2, %h;
      ld.param.u64 %d1, [nothing]; cvt.u32.u64 %r3, %d1; st.global.v4.b32 [%d0], {%r0, %r1, %r2, %r3}; ret;
    }"""
    )
    module, out = load(text), np.zeros(4, np.int32)
    arguments = [struct.pack("Qi", pointer(out), -5), 1.5, 200, None]
    module.launch("test", 1, 1, arguments, memory=[out], check_races=False)
    np.testing.assert_array_equal(out, [-5, np.float32(1.5).view(np.int32), 200, 0])
    with pytest.raises(EmulationError, match="out of bounds"):
        module.launch("test", 1, 1, arguments)
    module.launch("test", 1, 1, arguments, check_bounds=False)
    kernel = module.kernels["test"]
    assert [(s, a) for _, s, a in kernel.params] == [(24, 8), (4, 4), (1, 1), (8, 8)]
    assert kernel.offsets == [0, 24, 28, 32]
    first, *rest = arguments
    for wrong, message in (
        ([first, *rest[:-1]], "got 3 arguments, expected 4"),
        ([bytes(30), *rest], "the parameter has 24 bytes"),
        ([out, *rest], "the parameter has 24 bytes"),
        ([first, 1.5, 0.5, None], "has 1 bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            module.launch("test", 1, 1, wrong)
    for sizes, message in (((2, 1, 0), ".reqntid"), ((1, 3, 0), "clusters of"), ((1, 2, 1 << 20), "of shared memory")):
        with pytest.raises(ValueError, match=message):
            module.launch("test", sizes[1], sizes[0], arguments, shared=sizes[2], cluster=2, memory=[out])


def test_races_are_not_looked_for_where_they_are_not_wanted() -> None:
    body = "mov.u32 %i0, tile; st.shared.u32 [%i0], %t; ld.shared.u32 %d0, [%i0];"
    module = load(snippet(body, [], ["b32"], shared=4))
    out = np.zeros(64, np.int32)
    found = [module.launch("test", 1, 64, [out], check_races=check).races for check in (True, False)]
    assert found[0] and not found[1]
    assert "write" in found[0][0] and "thread (" in found[0][0] and "st.shared.u32 [%i0], %t" in found[0][0]
