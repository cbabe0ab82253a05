// Products of blocks of bf16 or i8 numbers that lie in tiles of 16 rows of 64 bytes, as Intel AMX has them in registers:
//
//   bf16:  C [16, 16] f32 += A [16, 32] B [32, 16],  B as 16 rows of 16 pairs (rows 2k and 2k + 1 of B)
//   i8:    C [16, 16] i32 += A [16, 64] B [64, 16],  B as 16 rows of 16 quadruples
//
// amx.h computes them with the tiles, dots.h with the dot products of AVX-512.
#pragma once
#include "convert.h"

FA_BEGIN

constexpr int kTileRows = 16, kTileBytes = 64;

#if defined(__AVX512BF16__)
// c plus the dot products of pairs of bf16, lane by lane: VDPBF16PS.
FA_INLINE Vec<float> add_pairs(Vec<float> c, IVec<float> a, IVec<float> b) {
  return (Vec<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
}
#endif

// Where an instruction is imitated. Subnormal numbers are zero, going in and coming out; the sign stays.
FA_INLINE float flush(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x; }

// A fused multiply-add of two bf16 and an f32, rounded once: in double the product is exact, and the sum unless one of
// its terms is too small to matter to the float.
FA_INLINE float multiply_add(float a, float b, float c) {
  return flush(static_cast<float>(static_cast<double>(a) * static_cast<double>(b) + static_cast<double>(c)));
}

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
  bool int8;      // A and B are of i8, two in the place of one bf16, and C is of i32
  int rows = 32;  // of C that are wanted; the others may be computed
};

FA_END
