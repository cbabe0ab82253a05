// The matrix unit of Intel AMX: eight tile registers of 16 rows of 64 bytes, and products of blocks on them.
//
// TDPBF16PS for bf16, TDPBSSD for i8.
//
// With FA_PRODUCTS == 1 these are the instructions. With FA_PRODUCTS == 2 they are the same in plain C++, in the order of
// summation and with the roundings that Intel's manual gives for TDPBF16PS ("Software Developer's Manual", volume 2),
// so that everything built on them can be run and tested on any processor.
#pragma once
#include "product.h"
#if FA_PRODUCTS == 1
  #include <immintrin.h>
#endif

FA_BEGIN

constexpr uint8_t kCodeZero = 0;      // what stands for 0 in the codes of A
constexpr double kProductSpeed = 16;  // multiply-adds of bf16 in the time of one of float32
constexpr bool kParts = true;         // whether several of them are faster than one of float32

// A 2 x 2 block of C takes four registers, two tiles of A and two of B the other four: each tile that is loaded enters
// two products.
enum Register { kC00, kC01, kC10, kC11, kA0, kA1, kB0, kB1, kRegisters };

struct alignas(64) TileConfig {  // the operand of LDTILECFG; every register has the full size
  uint8_t palette = 1, start_row = 0, reserved0[14] = {};
  uint16_t row_bytes[16] = {kTileBytes, kTileBytes, kTileBytes, kTileBytes,
                            kTileBytes, kTileBytes, kTileBytes, kTileBytes};
  uint8_t rows[16] = {kTileRows, kTileRows, kTileRows, kTileRows, kTileRows, kTileRows, kTileRows, kTileRows};
};
static_assert(sizeof(TileConfig) == 64, "as LDTILECFG reads it");

#if FA_PRODUCTS == 1

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

FA_END
