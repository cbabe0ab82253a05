// The matrix unit of Intel AMX: eight tile registers of 16 rows of 64 bytes, and products of blocks on them.
//
//   dot:     C [16, 16] f32 += A [16, 32] bf16 * B [32, 16] bf16,  B as 16 rows of 16 pairs (rows 2k and 2k + 1 of B)
//   dot_i8:  C [16, 16] i32 += A [16, 64] i8 * B [64, 16] i8,      B as 16 rows of 16 quadruples
//
// With FA_AMX == 1 these are the instructions. With FA_AMX == 2 they are the same in plain C++, in the order of
// summation and with the roundings that Intel's manual gives for TDPBF16PS ("Software Developer's Manual", volume 2),
// so that everything built on them can be run and tested on any processor.
#pragma once
#include "convert.h"
#if FA_AMX == 1
  #include <immintrin.h>
#endif

FA_BEGIN

// A 2 x 2 block of C takes four registers, two tiles of A and two of B the other four: each tile that is loaded enters
// two products.
enum Register { kC00, kC01, kC10, kC11, kA0, kA1, kB0, kB1, kRegisters };
constexpr int kTileRows = 16, kTileBytes = 64;

struct alignas(64) TileConfig {  // the operand of LDTILECFG; every register has the full size
  uint8_t palette = 1, start_row = 0, reserved0[14] = {};
  uint16_t row_bytes[16] = {kTileBytes, kTileBytes, kTileBytes, kTileBytes,
                            kTileBytes, kTileBytes, kTileBytes, kTileBytes};
  uint8_t rows[16] = {kTileRows, kTileRows, kTileRows, kTileRows, kTileRows, kTileRows, kTileRows, kTileRows};
};
static_assert(sizeof(TileConfig) == 64, "as LDTILECFG reads it");

#if FA_AMX == 1

// Compilers take few or none of the bytes that a tile instruction reads or writes for its operands: what was stored
// before it must be in memory, and what is loaded after it must come from there.
  #define FA_AMX_FENCE(pointer) __asm__ volatile("" ::"r"(pointer) : "memory")

FA_INLINE void tiles_begin() {
  const TileConfig config;
  FA_AMX_FENCE(&config);
  _tile_loadconfig(&config);
}
FA_INLINE void tiles_end() { _tile_release(); }

// The intrinsics put the register's number into the text of the instruction: it must stand there as a literal.
template <Register R>
FA_INLINE void tile_load(const void* from, int64_t step) {
  FA_AMX_FENCE(from);
  if constexpr (R == kC00) _tile_loadd(0, from, step);
  if constexpr (R == kC01) _tile_loadd(1, from, step);
  if constexpr (R == kC10) _tile_loadd(2, from, step);
  if constexpr (R == kC11) _tile_loadd(3, from, step);
  if constexpr (R == kA0) _tile_loadd(4, from, step);
  if constexpr (R == kA1) _tile_loadd(5, from, step);
  if constexpr (R == kB0) _tile_loadd(6, from, step);
  if constexpr (R == kB1) _tile_loadd(7, from, step);
}
template <Register R>
FA_INLINE void tile_store(void* to, int64_t step) {
  if constexpr (R == kC00) _tile_stored(0, to, step);
  if constexpr (R == kC01) _tile_stored(1, to, step);
  if constexpr (R == kC10) _tile_stored(2, to, step);
  if constexpr (R == kC11) _tile_stored(3, to, step);
  FA_AMX_FENCE(to);
}
template <Register R>
FA_INLINE void tile_zero() {
  if constexpr (R == kC00) _tile_zero(0);
  if constexpr (R == kC01) _tile_zero(1);
  if constexpr (R == kC10) _tile_zero(2);
  if constexpr (R == kC11) _tile_zero(3);
}
template <Register C>
FA_INLINE void tile_dot() {
  if constexpr (C == kC00) _tile_dpbf16ps(0, 4, 6);
  if constexpr (C == kC01) _tile_dpbf16ps(1, 4, 7);
  if constexpr (C == kC10) _tile_dpbf16ps(2, 5, 6);
  if constexpr (C == kC11) _tile_dpbf16ps(3, 5, 7);
}
template <Register C>
FA_INLINE void tile_dot_i8() {
  if constexpr (C == kC00) _tile_dpbssd(0, 4, 6);
  if constexpr (C == kC01) _tile_dpbssd(1, 4, 7);
  if constexpr (C == kC10) _tile_dpbssd(2, 5, 6);
  if constexpr (C == kC11) _tile_dpbssd(3, 5, 7);
}

#else

struct TileFile {
  bool configured = false;
  alignas(64) unsigned char bytes[kRegisters][kTileRows][kTileBytes];
};
static thread_local TileFile tile_file;

// Each thread has its own registers, and without a configuration their instructions fault.
FA_INLINE TileFile& configured_tiles() {
  if (!tile_file.configured) __builtin_trap();
  return tile_file;
}
FA_INLINE void tiles_begin() {
  __builtin_memset(tile_file.bytes, 0, sizeof tile_file.bytes);
  tile_file.configured = true;
}
FA_INLINE void tiles_end() { tile_file.configured = false; }

template <Register R>
FA_INLINE void tile_load(const void* from, int64_t step) {
  TileFile& t = configured_tiles();
  for (int i = 0; i < kTileRows; ++i)
    __builtin_memcpy(t.bytes[R][i], static_cast<const char*>(from) + i * step, kTileBytes);
}
template <Register R>
FA_INLINE void tile_store(void* to, int64_t step) {
  TileFile& t = configured_tiles();
  for (int i = 0; i < kTileRows; ++i) __builtin_memcpy(static_cast<char*>(to) + i * step, t.bytes[R][i], kTileBytes);
}
template <Register R>
FA_INLINE void tile_zero() {
  __builtin_memset(configured_tiles().bytes[R], 0, sizeof tile_file.bytes[R]);
}

// Subnormal numbers are zero, going in and coming out.
FA_INLINE float flush(float x) { return __builtin_fabsf(x) < 0x1p-126f ? 0.0f : x; }

// A fused multiply-add of two bf16 and an f32, rounded once: in double the product is exact, and the sum unless one of
// its terms is too small to matter to the float.
FA_INLINE float multiply_add(float a, float b, float c) {
  return flush(static_cast<float>(static_cast<double>(a) * static_cast<double>(b) + static_cast<double>(c)));
}

[[maybe_unused]] static void emulated_dot(float* c, const uint16_t* a, const uint16_t* b) {
  constexpr int N = kTileBytes / 4;
  float b_even[kTileRows][N], b_odd[kTileRows][N];
  for (int k = 0; k < kTileRows; ++k)
    for (int n = 0; n < N; ++n) {
      b_even[k][n] = flush(from_bf16(b[k * 2 * N + 2 * n]));
      b_odd[k][n] = flush(from_bf16(b[k * 2 * N + 2 * n + 1]));
    }
  for (int m = 0; m < kTileRows; ++m) {
    float even[N] = {}, odd[N] = {};
    for (int k = 0; k < N; ++k) {
      const float a_even = flush(from_bf16(a[m * 2 * N + 2 * k])), a_odd = flush(from_bf16(a[m * 2 * N + 2 * k + 1]));
      for (int n = 0; n < N; ++n) {
        even[n] = multiply_add(a_even, b_even[k][n], even[n]);
        odd[n] = multiply_add(a_odd, b_odd[k][n], odd[n]);
      }
    }
    for (int n = 0; n < N; ++n) c[m * N + n] = flush(flush(c[m * N + n]) + flush(even[n] + odd[n]));
  }
}
template <Register C>
FA_INLINE void tile_dot() {
  TileFile& t = configured_tiles();
  float c[kTileRows * kTileBytes / 4];
  uint16_t a[kTileRows * kTileBytes / 2], b[kTileRows * kTileBytes / 2];
  __builtin_memcpy(c, t.bytes[C], sizeof c);
  __builtin_memcpy(a, t.bytes[C == kC00 || C == kC01 ? kA0 : kA1], sizeof a);
  __builtin_memcpy(b, t.bytes[C == kC00 || C == kC10 ? kB0 : kB1], sizeof b);
  emulated_dot(c, a, b);
  __builtin_memcpy(t.bytes[C], c, sizeof c);
}
template <Register C>
FA_INLINE void tile_dot_i8() {
  TileFile& t = configured_tiles();
  int32_t c[kTileRows][kTileBytes / 4];
  int8_t a[kTileRows][kTileBytes], b[kTileRows][kTileBytes];
  __builtin_memcpy(c, t.bytes[C], sizeof c);
  __builtin_memcpy(a, t.bytes[C == kC00 || C == kC01 ? kA0 : kA1], sizeof a);
  __builtin_memcpy(b, t.bytes[C == kC00 || C == kC10 ? kB0 : kB1], sizeof b);
  for (int m = 0; m < kTileRows; ++m)
    for (int k = 0; k < kTileBytes; ++k)
      for (int n = 0; n < kTileBytes / 4; ++n) c[m][n] += int32_t{a[m][k]} * int32_t{b[k / 4][4 * n + k % 4]};
  __builtin_memcpy(t.bytes[C], c, sizeof c);
}

#endif

// An operand of a product, in tiles: the address of the first, bytes from row to row, and elements to its neighbour (the
// next 16 rows of A or columns of B), to the next 32 terms of the sum, and from part to part. A bf16 number is its one
// part, a float16 is the sum of two, a float32 of three: each part is what the ones before leave, rounded to bf16.
struct Operand {
  const uint16_t* at;
  int64_t row_bytes, neighbour, step, part;
};

// Which parts of A and of B are multiplied. The first one is for bf16; the first three for two parts, where one of the
// operands was rounded to them; four are the exact product of two parts; six leave of three what is below 2^-24 of the
// product (Henry, Tang and Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype", 2019).
struct Term {
  int8_t a, b;
};
constexpr Term kTerms[] = {{0, 0}, {1, 0}, {0, 1}, {1, 1}, {2, 0}, {0, 2}};
// How many of them for one, two and three parts: of numbers as they are, and where one operand was rounded to parts.
constexpr int kExact[] = {1, 4, 6}, kRounded[] = {1, 3, 6};

// C [32, 32] = or += A [32, 32 steps] B [32 steps, 32], summed over pairs of parts.
struct Product {
  Operand a, b;
  float* c;
  int64_t c_row_bytes, c_down, c_right;  // elements to the tile below and to the one beside
  int steps;
  int terms;  // of kTerms, from the first
  bool add;
  bool int8;  // A and B are of i8, two in the place of one bf16, and C is of i32
};

template <bool INT8, Register C>
FA_INLINE void dot_of() {
  if constexpr (INT8)
    tile_dot_i8<C>();
  else
    tile_dot<C>();
}

template <bool INT8>
FA_OUTLINE void multiply(const Product& p) {
  float *c0 = p.c, *c1 = p.c + p.c_down;
  if (p.add) {
    tile_load<kC00>(c0, p.c_row_bytes);
    tile_load<kC01>(c0 + p.c_right, p.c_row_bytes);
    tile_load<kC10>(c1, p.c_row_bytes);
    tile_load<kC11>(c1 + p.c_right, p.c_row_bytes);
  } else {
    tile_zero<kC00>();
    tile_zero<kC01>();
    tile_zero<kC10>();
    tile_zero<kC11>();
  }
  for (int term = 0; term < p.terms; ++term) {
    const uint16_t* a = p.a.at + kTerms[term].a * p.a.part;
    const uint16_t* b = p.b.at + kTerms[term].b * p.b.part;
    for (int i = 0; i < p.steps; ++i, a += p.a.step, b += p.b.step) {
      tile_load<kA0>(a, p.a.row_bytes);
      tile_load<kB0>(b, p.b.row_bytes);
      dot_of<INT8, kC00>();
      tile_load<kB1>(b + p.b.neighbour, p.b.row_bytes);
      dot_of<INT8, kC01>();
      tile_load<kA1>(a + p.a.neighbour, p.a.row_bytes);
      dot_of<INT8, kC10>();
      dot_of<INT8, kC11>();
    }
  }
  tile_store<kC00>(c0, p.c_row_bytes);
  tile_store<kC01>(c0 + p.c_right, p.c_row_bytes);
  tile_store<kC10>(c1, p.c_row_bytes);
  tile_store<kC11>(c1 + p.c_right, p.c_row_bytes);
}

// Products that wait to be run between pieces of vector work, so that both units are busy: `count` of them, each so many
// elements further on.
struct Batch {
  Product first;
  int count;
  int64_t a, b, c;
};
class Queue {
 public:
  void push(const Batch& batch) {
    if (batch.count <= 0 || batch.first.steps <= 0) return;
    if (end_ == kMost) run_all();
    batches_[end_++] = batch;
    left_ += batch.count;
  }
  // The share of what is left that falls to one of `pieces` pieces of vector work.
  void run_share(int pieces) {
    for (int n = (left_ + pieces - 1) / pieces; n > 0; --n) run_one();
  }
  void run_all() {
    while (left_) run_one();
  }

 private:
  static constexpr int kMost = 16;
  Batch batches_[kMost];
  int begin_ = 0, end_ = 0, left_ = 0;

  void run_one() {
    Batch& b = batches_[begin_];
    if (b.first.int8)
      multiply<true>(b.first);
    else
      multiply<false>(b.first);
    b.first.a.at += b.a, b.first.b.at += b.b, b.first.c += b.c;
    if (--b.count == 0) ++begin_;
    if (--left_ == 0) begin_ = end_ = 0;
  }
};

FA_END
