// Products of blocks (product.h) with the dot products of AVX-512: VDPBF16PS adds two products of bf16 to each of 16
// lanes, VPDPBUSD four of i8. Each four bytes of A go to all lanes of a register, a row of B's lies in two, and eight rows
// of C stay in registers meanwhile.
//
// VPDPBUSD takes the codes of A without a sign, so they have kCodeZero added: C holds that many times the sums of B's
// columns too much.
//
// Without the instructions they are the same in plain C++, for tests: VDPBF16PS as Intel's manual has it, the odd product
// first, both by fused multiply-adds, subnormal numbers zero ("Software Developer's Manual", volume 2).
#pragma once
#include "product.h"

FA_BEGIN

constexpr uint8_t kCodeZero = 128;
constexpr double kProductSpeed = 2;  // multiply-adds of bf16 in the time of one of float32
constexpr bool kParts = false;       // whether several of them are faster than one of float32

FA_INLINE void tiles_begin() {}
FA_INLINE void tiles_end() {}

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)

FA_INLINE Vec<float> add_dots(Vec<float> c, IVec<float> a, IVec<float> b) { return add_pairs(c, a, b); }
FA_INLINE Vec<float> add_codes(Vec<float> c, IVec<float> a, IVec<float> b) {
  return (Vec<float>)_mm512_dpbusd_epi32((__m512i)c, (__m512i)a, (__m512i)b);
}

#else

FA_INLINE Vec<float> add_dots(Vec<float> c, IVec<float> a, IVec<float> b) {
  for (int i = 0; i < VL<float>; ++i)
    for (int half = 1; half >= 0; --half) {
      const float x = flush(from_bf16(static_cast<uint16_t>(static_cast<uint32_t>(a[i]) >> 16 * half)));
      const float y = flush(from_bf16(static_cast<uint16_t>(static_cast<uint32_t>(b[i]) >> 16 * half)));
      c[i] = multiply_add(x, y, flush(c[i]));
    }
  return c;
}
FA_INLINE Vec<float> add_codes(Vec<float> c, IVec<float> a, IVec<float> b) {
  IVec<float> sum = bits<float>(c);
  for (int i = 0; i < VL<float>; ++i)
    for (int j = 0; j < 32; j += 8)
      sum[i] += static_cast<uint8_t>(a[i] >> j) * static_cast<int8_t>(static_cast<uint8_t>(b[i] >> j));
  return from_bits<float>(sum);
}

#endif

template <bool INT8>
FA_INLINE Vec<float> add_products(Vec<float> c, IVec<float> a, IVec<float> b) {
  if constexpr (INT8)
    return add_codes(c, a, b);
  else
    return add_dots(c, a, b);
}

// Both vectors in registers: GCC 12 would read them from the stack 16 times.
FA_INLINE void hold(IVec<float>& a, IVec<float>& b) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(a), "+v"(b));
#else
  (void)a, (void)b;
#endif
}
FA_INLINE IVec<float> words(const uint16_t* p) {
  IVec<float> x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
FA_INLINE IVec<float> word(const uint16_t* p) {
  int32_t x;
  __builtin_memcpy(&x, p, sizeof x);
  return x - IVec<float>{};
}

constexpr int kDotRows = 8;  // 16 chains of dot products hide their latency

// Rows row .. row + kDotRows of C.
template <bool INT8>
FA_INLINE void multiply_rows(const Product& p, int row) {
  const int64_t ldc = p.c_row_bytes / 4, lda = p.a.row_bytes / 2, ldb = p.b.row_bytes / 2;
  const int64_t tile = row / kTileRows, within = row % kTileRows;
  float* c = p.c + tile * p.c_down + within * ldc;
  Vec<float> acc0[kDotRows], acc1[kDotRows];
#pragma GCC unroll 16
  for (int r = 0; r < kDotRows; ++r) {
    acc0[r] = p.add ? load<float>(c + r * ldc) : Vec<float>{};
    acc1[r] = p.add ? load<float>(c + r * ldc + p.c_right) : Vec<float>{};
  }
  for (int term = 0; term < p.terms; ++term) {
    const uint16_t* a = p.a.at + kTerms[term].a * p.a.part + tile * p.a.neighbour + within * lda;
    const uint16_t* b = p.b.at + kTerms[term].b * p.b.part;
    for (int i = 0; i < p.steps; ++i, a += p.a.step, b += p.b.step)
      for (int k = 0; k < kTileRows; ++k) {
        IVec<float> b0 = words(b + k * ldb), b1 = words(b + k * ldb + p.b.neighbour);
        hold(b0, b1);
#pragma GCC unroll 16
        for (int r = 0; r < kDotRows; ++r) {
          const IVec<float> x = word(a + r * lda + 2 * k);
          acc0[r] = add_products<INT8>(acc0[r], x, b0);
          acc1[r] = add_products<INT8>(acc1[r], x, b1);
        }
      }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kDotRows; ++r) {
    store<float>(c + r * ldc, acc0[r]);
    store<float>(c + r * ldc + p.c_right, acc1[r]);
  }
}

template <bool INT8>
FA_OUTLINE void multiply(const Product& p) {
  for (int row = 0; row < p.rows; row += kDotRows) multiply_rows<INT8>(p, row);
}

FA_END
