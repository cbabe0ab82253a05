// What sm_90a adds, one function each, with the section of the PTX ISA that defines it: mbarriers, tensor copies (TMA),
// matrix products of a warpgroup (wgmma), register quotas, named barriers.
//
// Tiles. A tile [rows, columns] of 16-bit numbers lies in panels of 64 columns, one after the other: [columns / 64][rows]
// [128 bytes], chunk c of 16 bytes of row r at place c ^ (r mod 8). Panels begin at multiples of 1024 bytes, so rows are a
// multiple of 8. One box of a tensor map (box {64, rows, 1, 1}, swizzle 128) is one panel: load_tile makes a copy per
// panel. Columns past the tensor's last one, and rows, arrive as zeros and count as bytes of the copy like any others.
//
// Products. A warpgroup has 64 rows of D [64, N]: the accumulator d[N / 8][4] of a thread is the C fragment [16, N] of
// mma.sync (ptx.cuh), warp w of the warpgroup has rows 16 w .. 16 w + 15. An operand in shared memory is a Panels of
// either kind:
//
//   along_columns(tile, row)    K runs along the columns of the tile; M or N along its rows, from `row` (a multiple of 8)
//   along_rows(tile, panel)     K runs along the rows; M or N along its columns, from column 64 * panel
//
// both for A (64 rows or columns of a tile are used) and for B (N of them); step k of an operand is 16 of K. Tiles of 8-bit
// numbers have panels of 128, 64 or 32 columns (ROW_BYTES), with a swizzle as wide (chunk c of 64 bytes at c ^ (r / 2 mod
// 4), of 32 at c ^ (r / 4 mod 2)), and steps of 32; K runs along their columns. Examples, with tiles q [64, D], k [keys, D], v [keys, DV], and P an A fragment in registers:
//
//   S = Q K^T:   multiply<E, keys, D / 16>(s, along_columns<64>(q), along_columns<keys>(k), false)
//   O += P V:    multiply<E, DV>(o, p, along_rows<keys>(v))                p[keys / 16][4]: see pack_fragment
//   S^T = K Q^T: multiply<E, rows, D / 16>(s, along_columns<keys>(k, 64 * warpgroup), along_columns<rows>(q), false)
//   dQ += dS K:  A from shared memory, dS [64, keys] in panels: along_columns<64>(ds), along_rows<keys>(k)
//   dK += dS^T Q with dS [rows, keys] in panels: A = along_rows<rows>(ds, panel), B = along_rows<rows>(q)
//
// Order. products_begin(); any number of multiply(); products_commit(); later products_wait<PENDING>() for all but the
// PENDING last commits, then hold(d) for each accumulator that is read from here on. Between, neither accumulators nor A
// fragments may be touched. What threads themselves write into a tile becomes visible to products and tensor copies by
// fence_async() in each writing thread before the barrier that hands it over; what they have read or written must be
// fenced in the same way before a tensor copy overwrites it.
//
// A pipeline of STAGES: `full` counts one arrival (arrive_expecting, by whoever starts the copies) and the bytes, `empty`
// the arrivals of those that are done with a stage. Producer: wait(empty(s), state.phase ^ 1), then arrive_expecting and
// the copies; consumer: wait(full(s), state.phase), use, arrive(empty(s)). Each keeps a PipelineState of its own.
#pragma once
#include <type_traits>

#include "ptx.cuh"
#include "tensor_map.h"

namespace fused_attention::cuda {

constexpr int kWarpgroup = 128;
constexpr int kPanelColumns = 64, kPanelRowBytes = 128;

// --- registers: "setmaxnreg" -----------------------------------------------------------------------------------------
// All warps of a warpgroup; what one gives up another may take. Multiples of 8.
template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// --- named barriers: "bar"; 1 to 15, 0 is that of __syncthreads -----------------------------------------------------
__device__ __forceinline__ void barrier_sync(int name, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}
// Counts as arrived, without waiting.
__device__ __forceinline__ void barrier_arrive(int name, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");
}
// Whether `x` holds for any thread.
__device__ __forceinline__ bool barrier_or(int name, int threads, bool x) {
  int any;
  asm volatile("{\n.reg .pred p, q;\nsetp.ne.s32 p, %3, 0;\nbar.red.or.pred q, %1, %2, p;\nselp.s32 %0, 1, 0, q;\n}"
               : "=r"(any)
               : "r"(name), "r"(threads), "r"(static_cast<int>(x))
               : "memory");
  return any != 0;
}

// --- fences: "membar / fence" ---------------------------------------------------------------------------------------
// This thread's reads and writes of shared memory, before what tensor copies and products do with it from here on.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// After mbarrier_init, before the barrier behind which others use them.
__device__ __forceinline__ void fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// --- mbarriers: "mbarrier"; 8 bytes of shared memory each -----------------------------------------------------------
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives and says how many bytes of copies complete this phase.
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Until the phase of this parity is complete; before the first phase, that of parity 1 is.
__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra finished;\n"
      "bra again;\nfinished:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

template <int STAGES>
struct PipelineState {
  int stage = 0;
  uint32_t phase = 0;  // its parity
  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
};

// --- tensor copies: "cp.async.bulk.tensor"; coordinates in elements, the innermost dimension first -------------------
__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// By one thread: a box to shared memory (aligned to 1024 bytes); its bytes count for the mbarrier.
__device__ __forceinline__ void load_box(uint32_t to, const TensorMap& map, int c0, int c1, int c2, int c3,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(to),
      "l"(&map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(barrier)
      : "memory");
}
// By one thread: a box of shared memory to global memory, what lies outside of the tensor left out. The thread waits by
// stores_commit and stores_wait before shared memory is written again.
__device__ __forceinline__ void store_box(const TensorMap& map, int c0, int c1, int c2, int c3, uint32_t from) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(&map),
               "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(from)
               : "memory");
}
__device__ __forceinline__ void stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int PENDING>  // until all but PENDING of this thread's groups have read shared memory
__device__ __forceinline__ void stores_wait() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// ROWS rows of a tensor [batch, head, row, column], from `row` on, as the panels of a tile with D columns.
template <int ROWS, int D>
__device__ __forceinline__ void load_tile(uint32_t tile, const TensorMap& map, int row, int head, int batch,
                                          uint32_t barrier) {
#pragma unroll
  for (int panel = 0; panel < D / kPanelColumns; ++panel)
    load_box(tile + panel * ROWS * kPanelRowBytes, map, panel * kPanelColumns, row, head, batch, barrier);
}

// Where 16-byte chunk `chunk` of a row of a tile with ROWS rows lies.
template <int ROWS, int ROW_BYTES = kPanelRowBytes>
__device__ __forceinline__ uint32_t panel_offset(int row, int chunk) {
  constexpr int kChunks = ROW_BYTES / 16;
  const int place = (chunk ^ row * kChunks / 8) & (kChunks - 1);
  return static_cast<uint32_t>((chunk / kChunks * ROWS + row) * ROW_BYTES + (place << 4));
}

// --- operands: "Matrix-descriptor format" ---------------------------------------------------------------------------

// An operand in a tile of ROWS rows. TRANSPOSED ("MN-major"): K runs along the rows.
template <int ROWS, bool TRANSPOSED, int ROW_BYTES = kPanelRowBytes>
struct Panels {
  static_assert(ROWS % (TRANSPOSED ? 16 : 8) == 0);
  static_assert(ROW_BYTES == 128 || ((ROW_BYTES == 64 || ROW_BYTES == 32) && !TRANSPOSED));
  static constexpr bool kTransposed = TRANSPOSED;
  static constexpr int kPanel = ROWS * ROW_BYTES;
  uint32_t tile;  // where step 0 begins
  // Bits 0-13: address / 16, 16-29: leading byte offset / 16, 32-45: stride byte offset / 16, 62-63: 1, 128-byte swizzle,
  // 2, 64-byte, or 3, 32-byte. Eight rows of a panel follow the eight before; where K runs along them, panels are `leading` bytes
  // apart. A step of K along columns is 32 bytes: 16 numbers of 16 bits, 32 of 8.
  __device__ __forceinline__ uint64_t operator()(int step) const {
    constexpr uint32_t kLeading = TRANSPOSED ? kPanel >> 4 << 16 : 0;
    constexpr uint32_t kHigh = 8 * ROW_BYTES >> 4 | (ROW_BYTES == 128 ? 1u : ROW_BYTES == 64 ? 2u : 3u) << 30;
    constexpr int kSteps = ROW_BYTES / 32;
    const int bytes = TRANSPOSED ? step * 16 * kPanelRowBytes : step / kSteps * kPanel + step % kSteps * 32;
    return static_cast<uint64_t>(kHigh) << 32 | ((tile >> 4 | kLeading) + (bytes >> 4));
  }
};
// The address is opaque, so that descriptors are computed where they are used, not kept in registers.
template <int ROWS, int ROW_BYTES = kPanelRowBytes>
__device__ __forceinline__ Panels<ROWS, false, ROW_BYTES> along_columns(uint32_t tile, int row = 0) {
  return {static_cast<uint32_t>(opaque(static_cast<int>(tile + row * ROW_BYTES)))};
}
template <int ROWS>
__device__ __forceinline__ Panels<ROWS, true> along_rows(uint32_t tile, int panel = 0) {
  return {static_cast<uint32_t>(opaque(static_cast<int>(tile + panel * ROWS * kPanelRowBytes)))};
}

// --- products: "wgmma.mma_async", "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group" ---------------------------

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// From here on, these registers are what they are now: the compiler moves no use of them to before this point, nor a
// definition to after it.
template <int NT>
__device__ __forceinline__ void hold(float (&d)[NT][4]) {
#pragma unroll
  for (int nt = 0; nt < NT; ++nt)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[nt][i])::"memory");
}

// What leads to x, which is not negative, is done by now. A wait names no registers, and without this ptxas moves it ahead
// of the arithmetic that should go on meanwhile.
__device__ __forceinline__ void keep_before(float x) {
  if (x < 0.0f) asm volatile("nanosleep.u32 1;" ::: "memory");
}

// The registers of an accumulator [64, N]: their places in the instruction, and the operands.
#define FA_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FA_NAMES_32 FA_NAMES_16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FA_NAMES_48 FA_NAMES_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define FA_NAMES_64 FA_NAMES_48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define FA_NAMES_80 FA_NAMES_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define FA_NAMES_96 FA_NAMES_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define FA_NAMES_128               \
  FA_NAMES_96                      \
  ", %48, %49, %50, %51, %52, %53" \
  ", %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FA_NAMES_192                                                                 \
  FA_NAMES_128                                                                       \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FA_NAMES_256                                                                             \
  FA_NAMES_192                                                                                   \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FA_FOUR(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define FA_FLOATS_16 FA_FOUR(0), FA_FOUR(1)
#define FA_FLOATS_32 FA_FLOATS_16, FA_FOUR(2), FA_FOUR(3)
#define FA_FLOATS_48 FA_FLOATS_32, FA_FOUR(4), FA_FOUR(5)
#define FA_FLOATS_64 FA_FLOATS_48, FA_FOUR(6), FA_FOUR(7)
#define FA_FLOATS_80 FA_FLOATS_64, FA_FOUR(8), FA_FOUR(9)
#define FA_FLOATS_96 FA_FLOATS_80, FA_FOUR(10), FA_FOUR(11)
#define FA_FLOATS_128 FA_FLOATS_96, FA_FOUR(12), FA_FOUR(13), FA_FOUR(14), FA_FOUR(15)
#define FA_FLOATS_192 \
  FA_FLOATS_128, FA_FOUR(16), FA_FOUR(17), FA_FOUR(18), FA_FOUR(19), FA_FOUR(20), FA_FOUR(21), FA_FOUR(22), FA_FOUR(23)
#define FA_FLOATS_256 \
  FA_FLOATS_192, FA_FOUR(24), FA_FOUR(25), FA_FOUR(26), FA_FOUR(27), FA_FOUR(28), FA_FOUR(29), FA_FOUR(30), FA_FOUR(31)

// Operands of 8 bits (float8 e4m3: s eeee mmm, bias 7, no infinities), of which both run along K.
struct E4m3 {
  // Four numbers, the first in the lowest byte, to nearest even; what is too large becomes the largest, 448. "cvt"
  static __device__ __forceinline__ uint32_t pack(float a, float b, float c, float d) {
    uint32_t r;
    asm("{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\nmov.b32 %0, {low, high};\n}"
        : "=r"(r)
        : "f"(a), "f"(b), "f"(c), "f"(d));
    return r;
  }
};

// One instruction: d = add ? d + A B : A B, A [64, K], B [K, N]. P1 ...: places of the operands after the accumulator.
template <int N>
struct Product;

#define FA_SHARED_OPERANDS(type, N, P1, P2, P3, P4, P5)                                                              \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P3 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type \
               "." type " {" FA_NAMES_##N "}, %" #P1 ", %" #P2 ", p, 1, 1, %" #P4 ", %" #P5 ";\n}"                   \
               : FA_FLOATS_##N                                                                                       \
               : "l"(a), "l"(b), "r"(add), "n"(A_TRANSPOSED), "n"(B_TRANSPOSED))
#define FA_REGISTER_OPERAND(type, N, P1, P2, P3, P4, P5, P6, P7)                                                     \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P6 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type \
               "." type " {" FA_NAMES_##N "}, {%" #P1 ", %" #P2 ", %" #P3 ", %" #P4 "}, %" #P5 ", p, 1, 1, %" #P7    \
                                          ";\n}"                                                                     \
               : FA_FLOATS_##N                                                                                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(B_TRANSPOSED))
#define FA_SHARED_CODES(N, P1, P2, P3)                                                               \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P3 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N \
               "k32.f32.e4m3.e4m3 {" FA_NAMES_##N "}, %" #P1 ", %" #P2 ", p, 1, 1;\n}"               \
               : FA_FLOATS_##N                                                                       \
               : "l"(a), "l"(b), "r"(add))
#define FA_REGISTER_CODES(N, P1, P2, P3, P4, P5, P6)                                                                   \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P6 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N                   \
               "k32.f32.e4m3.e4m3 {" FA_NAMES_##N "}, {%" #P1 ", %" #P2 ", %" #P3 ", %" #P4 "}, %" #P5 ", p, 1, 1;\n}" \
               : FA_FLOATS_##N                                                                                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add))
#define FA_PRODUCT(N, P1, P2, P3, P4, P5, P6, P7)                                                                   \
  template <>                                                                                                       \
  struct Product<N> {                                                                                               \
    template <class E, int A_TRANSPOSED, int B_TRANSPOSED>                                                          \
    static __device__ __forceinline__ void run(float (&d)[N / 8][4], uint64_t a, uint64_t b, int add) {             \
      if constexpr (std::is_same_v<E, E4m3>)                                                                        \
        FA_SHARED_CODES(N, P1, P2, P3);                                                                             \
      else if constexpr (std::is_same_v<E, Bf16>)                                                                   \
        FA_SHARED_OPERANDS("bf16", N, P1, P2, P3, P4, P5);                                                          \
      else                                                                                                          \
        FA_SHARED_OPERANDS("f16", N, P1, P2, P3, P4, P5);                                                           \
    }                                                                                                               \
    template <class E, int B_TRANSPOSED>                                                                            \
    static __device__ __forceinline__ void run(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, int add) { \
      if constexpr (std::is_same_v<E, E4m3>)                                                                        \
        FA_REGISTER_CODES(N, P1, P2, P3, P4, P5, P6);                                                               \
      else if constexpr (std::is_same_v<E, Bf16>)                                                                   \
        FA_REGISTER_OPERAND("bf16", N, P1, P2, P3, P4, P5, P6, P7);                                                 \
      else                                                                                                          \
        FA_REGISTER_OPERAND("f16", N, P1, P2, P3, P4, P5, P6, P7);                                                  \
    }                                                                                                               \
  };
FA_PRODUCT(16, 8, 9, 10, 11, 12, 13, 14)
FA_PRODUCT(32, 16, 17, 18, 19, 20, 21, 22)
FA_PRODUCT(48, 24, 25, 26, 27, 28, 29, 30)
FA_PRODUCT(64, 32, 33, 34, 35, 36, 37, 38)
FA_PRODUCT(80, 40, 41, 42, 43, 44, 45, 46)
FA_PRODUCT(96, 48, 49, 50, 51, 52, 53, 54)
FA_PRODUCT(128, 64, 65, 66, 67, 68, 69, 70)
FA_PRODUCT(192, 96, 97, 98, 99, 100, 101, 102)
FA_PRODUCT(256, 128, 129, 130, 131, 132, 133, 134)
#undef FA_PRODUCT
#undef FA_REGISTER_CODES
#undef FA_SHARED_CODES
#undef FA_REGISTER_OPERAND
#undef FA_SHARED_OPERANDS

// d [64, N] += A [64, K STEPS] B [K STEPS, N], K 16 or, of E4m3, 32; unless `add`, d is overwritten. A, B: Panels.
template <class E, int N, int STEPS, class A, class B>
__device__ __forceinline__ void multiply(float (&d)[N / 8][4], A a, B b, bool add) {
#pragma unroll
  for (int step = 0; step < STEPS; ++step)
    Product<N>::template run<E, A::kTransposed, B::kTransposed>(d, a(step), b(step), add || step);
}

// The same with A in registers, fragments [64, K] one after the other.
template <class E, int N, int STEPS, class B>
__device__ __forceinline__ void multiply(float (&d)[N / 8][4], const uint32_t (&a)[STEPS][4], B b, bool add = true) {
#pragma unroll
  for (int step = 0; step < STEPS; ++step)
    Product<N>::template run<E, B::kTransposed>(d, a[step], b(step), add || step);
}

// An accumulator [64, 8 NT], rounded to 16 bits, as the A fragments of a product over its columns.
template <class E, int NT>
__device__ __forceinline__ void pack_fragment(uint32_t (&a)[NT / 2][4], const float (&c)[NT][4]) {
#pragma unroll
  for (int step = 0; step < NT / 2; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&from)[4] = c[2 * step + i / 2];
      a[step][i] = E::pack(from[2 * (i & 1)], from[2 * (i & 1) + 1]);
    }
}

}  // namespace fused_attention::cuda
