"""The tables of benchmarks.gpu_static: the disassembly reader on small programs, the formulas, a kernel throughout."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from .cuda_support import needs_kernels, needs_nvcc
from .triton_support import INTERPRETED

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import gpu_chips, gpu_static, sass  # noqa: E402
from benchmarks.gpu_kernels import Job, launches  # noqa: E402
from fused_attention.backends.triton import ahead  # noqa: E402

compiles = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 puts an interpreter in the compiler's place")

# A loop with a mask (two selections), one without, a loop that only recomputes scores, a wait out of line and one in
# the way; the rare part of the second loop is skipped by a branch.
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;          /* 0x00000a0000017a02 */
        /*0010*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0020*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0030*/                   FSEL R8, R8, -INF , P1 ;
        /*0038*/                   MUFU.EX2 R8, R8 ;
        /*0040*/              @P1  BRA 0x48 ;
        /*0048*/                   FSEL R9, R9, -INF , P1 ;
        /*004a*/                   FSEL R9, R9, -INF , P1 ;
        /*004c*/                   FSEL R9, R9, -INF , P1 ;
        /*004e*/                   FSEL R9, R9, -INF , P1 ;
        /*0050*/               @P0 BRA 0x10 ;
        /*0060*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0070*/              @!P0 BRA 0x120 ;
        /*0080*/                   MUFU.EX2 R8, R8 ;
        /*0090*/               @P2 BRA 0xc0 ;
        /*0098*/                   BRA.DIV ~URZ, 0x140 ;
        /*00a0*/                   FMUL R9, R9, R9 ;
        /*00b0*/                   FMUL R9, R9, R9 ;
        /*00c0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR4], R5 ;
        /*00d0*/              @!P3 BRA 0xc0 ;
        /*00e0*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*00f0*/               @P0 BRA 0x60 ;
        /*0100*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0110*/               @P0 BRA 0x100 ;
        /*0118*/                   EXIT ;
        /*0120*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R5 ;
        /*0130*/              @!P0 BRA 0x120 ;
        /*0140*/                   BRA 0x80 ;
"""

AMD = """
kernel:
	s_load_dwordx4 s[4:7], s[0:1], 0x0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
	v_exp_f32_e32 v4, v5
	v_pk_mul_f32 v[4:5], v[4:5], v[6:7]
	v_perm_b32 v1, v2, v3, s4
	s_cbranch_scc1 .LBB0_1
; %bb.2:
	s_endpgm
.Lfunc_end0:
	.size	kernel, .Lfunc_end0-kernel
"""


@pytest.mark.fast
def test_the_loop_without_masks_is_read_on_its_usual_way() -> None:
    loop = sass.matrix_loop(sass.read_sass(SASS))
    assert loop is not None
    expected = {"HMMA.16816.F32.BF16": 2, "BRA": 4, "MUFU.EX2": 1, "SYNCS.PHASECHK.TRANS64.TRYWAIT": 1}
    assert loop.each_warp == Counter(expected) and not loop.one_warp


@pytest.mark.fast
def test_an_amd_loop() -> None:
    loop = sass.matrix_loop(sass.read_amd(AMD))
    assert loop is not None
    assert sass.kinds(loop.each_warp) == {"matrix": 1, "exp2": 1, "fma": 1, "alu": 1, "other": 1}


@pytest.mark.fast
def test_a_single_warp_issues_tcgen05() -> None:
    text = SASS.replace("HMMA.16816.F32.BF16 R8, R4, R6, R8", "UTCHMMA gdesc[UR8], gdesc[UR6], tmem[UR22], idesc[UR55]")
    loop = sass.matrix_loop(sass.read_sass(text))
    assert loop is not None and loop.one_warp["UTCHMMA"] == 2 and "UTCHMMA" not in loop.each_warp


@pytest.mark.fast
def test_no_loop_and_no_matrix_instruction() -> None:
    assert sass.matrix_loop(sass.read_sass("/*0000*/ FADD R1, R2, R3 ;\n/*0010*/ EXIT ;")) is None
    fused = "/*0000*/ FFMA R1, R2, R3, R1 ;\n/*0010*/ @P0 BRA 0x0 ;\n/*0020*/ EXIT ;"
    loop = sass.matrix_loop(sass.read_sass(fused))
    assert loop is not None and loop.each_warp == {"FFMA": 1, "BRA": 1}


@pytest.mark.fast
@pytest.mark.parametrize(
    ("op", "kind"),
    [
        ("HGMMA.64x128x16.F32.BF16", "matrix"), ("QGMMA.64x128x32.F32.E4M3.E4M3", "matrix"),
        ("UTCHMMA", "matrix"), ("MUFU.EX2", "exp2"), ("MUFU.RCP", "special"),
        ("FFMA", "fma"), ("IMAD.MOV.U32", "fma"), ("FMNMX", "alu"), ("F2FP.BF16.F32.PACK_AB", "alu"), ("MOV", "alu"),
        ("LDGSTS.E.BYPASS.128", "memory"), ("UTMALDG.4D", "memory"), ("UIADD3", "other"), ("BAR.SYNC", "other"),
        ("v_mfma_f32_16x16x16_bf16", "matrix"), ("v_exp_f32_e32", "exp2"), ("v_rcp_f32_e32", "special"),
        ("v_fma_f32", "fma"), ("v_cndmask_b32_e64", "alu"), ("v_max3_f32", "alu"), ("ds_read_b64", "memory"),
        ("s_waitcnt", "other"),
    ],
)  # fmt: skip
def test_kinds_of_instructions(op: str, kind: str) -> None:
    assert sass.kind(op) == kind


@pytest.mark.fast
@pytest.mark.parametrize(("arch", "teraflops"), [("sm_80", 312), ("sm_90", 989), ("sm_100", 2250), ("gfx942", 1307)])
def test_the_rates_give_the_published_peaks(arch: str, teraflops: float) -> None:
    assert gpu_chips.CHIPS[arch].peak / 1e12 == pytest.approx(teraflops, rel=0.005)


@pytest.mark.fast
def test_the_rate_of_float8() -> None:
    assert gpu_chips.CHIPS["sm_90"].peak_of("fp8") / 1e12 == pytest.approx(1979, rel=0.005)
    assert gpu_chips.rate_name("QGMMA.64x128x32.F32.E4M3.E4M3") == "fp8"
    loop = sass.Loop(Counter({"QGMMA.64x64x32.F32.E4M3.E4M3": 4, "MUFU.EX2": 32}), Counter())
    found = gpu_static.roofline(loop, 8, [], "sm_90")
    assert found["clocks"]["matrix unit"] == 256 and found["limit"] == "exp2 and other functions"
    assert found["of_peak"] == pytest.approx(0.5)


def _needs(**changes: Any) -> ahead.Resources:
    return ahead.Resources("k", 128, 0, 0, 0, 0, 256, 0, {})._replace(**changes)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("needs", "arch", "expected"),
    [
        (_needs(), "sm_90", (2, "registers")),  # 65536 / (128 * 256)
        (_needs(registers=129), "sm_90", (1, "registers")),  # rounded up to 136 a thread
        (_needs(registers=32, threads=128), "sm_90", (16, "threads")),
        (_needs(registers=32, threads=128, shared_bytes=75 * 1024), "sm_90", (3, "shared memory")),  # 3 * 76 = 228
        (_needs(registers=32, threads=128, shared_bytes=76 * 1024), "sm_90", (2, "shared memory")),
        (_needs(tensor_memory=512), "sm_100", (1, "tensor memory")),
        (_needs(registers=256, scalar_registers=90), "gfx942", (2, "registers")),  # two waves on each of four SIMDs
        (_needs(registers=100, scalar_registers=90, shared_bytes=33 * 1024), "gfx942", (1, "shared memory")),
    ],
)
def test_blocks_per_multiprocessor(needs: ahead.Resources, arch: str, expected: tuple[int, str]) -> None:
    assert gpu_chips.blocks_per_unit(needs, arch) == expected


@pytest.mark.fast
@pytest.mark.parametrize(
    ("op", "flops"),
    [
        ("HMMA.16816.F32.BF16", 2 * 16 * 8 * 16), ("HMMA.1688.F32.TF32", 2 * 16 * 8 * 8),
        ("HGMMA.64x128x16.F32.BF16", 2 * 64 * 128 * 16 // 4),
        ("QGMMA.64x128x32.F32.E4M3.E4M3", 2 * 64 * 128 * 32 // 4), ("v_mfma_f32_32x32x8_bf16", 2 * 32 * 32 * 8),
        ("v_mfma_f32_4x4x4_16b_f16", 2 * 4 * 4 * 4 * 16), ("UTCHMMA", None), ("FFMA", None),
    ],
)  # fmt: skip
def test_operations_of_a_matrix_instruction(op: str, flops: int | None) -> None:
    assert gpu_chips.matrix_flops(op) == flops


@pytest.mark.fast
def test_the_bound_of_a_loop_by_hand() -> None:
    """128 x 64 scores and 128 x 64 x 64 twice, on 8 warps: 512 clocks of wgmma against 2 * 8 * 32 of exp2."""
    ttir = """
    %0 = scf.for %i = %a to %b step %c -> (tensor<128x64xf32>) {
      %1 = tt.dot %q, %k, %z : tensor<128x64xbf16> * tensor<64x64xbf16> -> tensor<128x64xf32>
      %2 = scf.for %j = %a to %b step %c -> (tensor<128x64xf32>) {
      } loc(#loc)
      %3 = tt.dot %p, %v, %acc : tensor<128x64xbf16> * tensor<64x64xbf16> -> tensor<128x64xf32>
    } loc(#loc1)
"""
    assert gpu_static.loop_products(ttir) == [[(128, 64, 64), (128, 64, 64)]]
    loop = sass.Loop(Counter({"HGMMA.64x64x16.F32.BF16": 8, "MUFU.EX2": 32}), Counter())
    found = gpu_static.roofline(loop, 8, gpu_static.triton_work(ttir), "sm_90")
    assert found["clocks"]["matrix unit"] == found["clocks"]["exp2 and other functions"] == 512
    assert found["repeated"] == 1 and found["of_peak"] == pytest.approx(1)
    assert found["serial_tflops"] == pytest.approx(found["bound_tflops"] / 2)


@pytest.mark.fast
def test_the_document_is_updated_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- gpu_static -->\nold\n<!-- /gpu_static -->\nafter\n")
    gpu_static.update_docs("new", page)
    assert page.read_text() == "before\n<!-- gpu_static -->\nnew\n<!-- /gpu_static -->\nafter\n"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="no region"):
        gpu_static.update_docs("new", page)


@compiles
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_one_kernel_throughout(arch: str) -> None:
    """The counts of the forward kernel's inner loop are at least what its tile asks for."""
    (row,) = gpu_static.measure(Job("forward", arch, "bfloat16", 64))
    scores = row["tile"]["BLOCK_M"] * row["tile"]["BLOCK_N"] // row["threads"]
    assert row["kernel"] == "forward" and row["blocks"] >= 1
    assert scores <= row["loop"]["exp2"] <= 1.25 * scores
    assert row["loop"]["matrix"] > 0 and row["loop"]["vector"] > scores
    assert row["roofline"]["repeated"] >= 1 and 0 < row["roofline"]["of_peak"] <= 1
    assert row["roofline"]["serial_tflops"] < row["roofline"]["bound_tflops"]
    page = gpu_static.document([row])
    assert "computed and not measured" in page and f"({arch})" in page


@compiles
def test_a_spill_is_seen() -> None:
    """A kernel that may have 64 registers a thread, where it wants three times as many."""
    job = Job("forward", "sm_80", "bfloat16", 64)
    starved = [k._replace(options={**k.options, "maxnreg": 64}) for k in launches(job)]
    (compiled,) = ahead.compile_ahead(starved, job.arch)
    found = ahead.resources(compiled, job.arch)
    assert found.registers <= 64 and found.spilled_bytes > 0


@compiles
@needs_nvcc
@needs_kernels
def test_one_cuda_kernel_throughout() -> None:
    """Per thread the inner loop has the products and the exponentials of its tile of scores, and nothing spills."""
    (row,) = gpu_static.measure(Job("cuda forward", "sm_80", "bfloat16", 64))
    m, n = row["tile"]["BLOCK_M"], row["tile"]["BLOCK_N"]
    assert row["kernel"] == "CUDA forward" and row["spilled_bytes"] == 0
    assert row["loop"]["matrix"] == 2 * m * n * 64 // (16 * 8 * 16) // (row["threads"] // 32)
    assert m * n // row["threads"] <= row["loop"]["exp2"] <= 1.25 * m * n // row["threads"]
    assert "CUDA forward | A100" in gpu_static.document([row])


@compiles
@needs_nvcc
@needs_kernels
def test_the_float8_kernels_throughout() -> None:
    """A kernel without products makes the codes; the other one multiplies them at the rate of float8."""
    first, second = gpu_static.measure(Job("cuda fp8", "sm_90", "bfloat16", 64))
    assert gpu_static.measure(Job("cuda fp8", "sm_80", "bfloat16", 64)) == []
    assert (first["kernel"], second["kernel"]) == ("CUDA fp8 quantise", "CUDA fp8 forward")
    assert first["spilled_bytes"] == second["spilled_bytes"] == 0 and first["loop"] is None
    m, n, warps = second["tile"]["BLOCK_M"], second["tile"]["BLOCK_N"], second["threads"] // 32 - 4
    assert (m, n) == (128, 128) and all(op.startswith("QGMMA") for op in second["mnemonics"] if "GMMA" in op)
    assert second["roofline"]["clocks"]["matrix unit"] == 4 * m * n * 64 / 8192
    assert m * n // (32 * warps) <= second["loop"]["exp2"] <= 1.25 * m * n // (32 * warps)
    assert "CUDA fp8 forward | H100" in gpu_static.document([first, second])
