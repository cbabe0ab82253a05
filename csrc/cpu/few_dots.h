// The products of few_rows.h by dot products of bfloat16 (dots.h: VDPBF16PS), where q, K and V are bfloat16:
//
//   S = scale q K^T   along the columns, 32 of them in a register;   O = alpha O + bf16(P) V   over pairs of keys
//
// The weights are rounded to bfloat16, as on panels. few_rows.h asks where `dots_fit`.
#pragma once
#include "few_products.h"
#if defined(__AVX512BF16__)
  #include "panels.h"
#endif

FA_BEGIN

constexpr int kDotColumns = 2 * VL<float>;

// Whether they are there, and fit.
FA_INLINE bool dots_fit(DType query, DType stored, int64_t columns) {
#if defined(__AVX512BF16__)
  return query == DType::bf16 && stored == DType::bf16 && columns % kDotColumns == 0;
#else
  (void)query, (void)stored, (void)columns;
  return false;
#endif
}

#if defined(__AVX512BF16__)

FA_INLINE IVec<float> load_pairs(const char* p) { return bits<float>(load<float>(reinterpret_cast<const float*>(p))); }

// For few_products: 16 pairs of columns in a vector.
struct PairsOfColumns {
  static constexpr int64_t bytes = kVectorBytes;
  static Vec<float> load_key(const char* p) { return from_bits<float>(load_pairs(p)); }
  static Vec<float> add(Vec<float> sum, Vec<float> q, Vec<float> k) {
    return add_pairs(sum, bits<float>(q), bits<float>(k));
  }
};

// Two rows of 32 numbers as pairs: of columns 0 .. 3, 8 .. 11 ... and of 4 .. 7, 12 .. 15 ...
struct RowPairs {
  IVec<float> low, high;
};
FA_INLINE RowPairs pair_rows(const char* a, const char* b) {
  const __m512i x = (__m512i)load_pairs(a), y = (__m512i)load_pairs(b);
  return {(IVec<float>)_mm512_unpacklo_epi16(x, y), (IVec<float>)_mm512_unpackhi_epi16(x, y)};
}
// o [32] = alpha o + the sums of such pairs.
FA_INLINE void add_row_pairs(float* o, float alpha, Vec<float> low, Vec<float> high) {
  const Vec<float> first = __builtin_shufflevector(low, high, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const Vec<float> second =
      __builtin_shufflevector(low, high, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  store<float>(o, alpha * load<float>(o) + first);
  store<float>(o + VL<float>, alpha * load<float>(o + VL<float>) + second);
}

// o [ROWS, SLICES * 32] = alpha o + p v over all keys of the tile. p: [ROWS, ldp] of bf16.
template <int ROWS, int SLICES>
FA_INLINE void dot_sums(int keys, int64_t from, const uint16_t* p, int64_t ldp, const StoredRows& v,
                        const StoredRows& next, const float* alpha, float* o, int64_t ldo) {
  const int fetched = from ? 0 : next.keys;
  Vec<float> low[ROWS][SLICES], high[ROWS][SLICES];
  #pragma GCC unroll 8
  for (int a = 0; a < ROWS; ++a)
  #pragma GCC unroll 4
    for (int c = 0; c < SLICES; ++c) low[a][c] = high[a][c] = Vec<float>{};
  for (int j = 0; j < keys; j += 2) {
    for (int b = j; b < min_of(j + 2, fetched); ++b) fetch(next, b);
    RowPairs value[SLICES];
  #pragma GCC unroll 4
    for (int c = 0; c < SLICES; ++c) {
      const int64_t at = 2 * (from + c * kDotColumns);
      value[c] = pair_rows(v.row[j] + at, v.row[j + 1] + at);
    }
  #pragma GCC unroll 8
    for (int a = 0; a < ROWS; ++a) {
      int32_t pair;
      __builtin_memcpy(&pair, p + a * ldp + j, sizeof pair);
      const IVec<float> weights = pair - IVec<float>{};
  #pragma GCC unroll 4
      for (int c = 0; c < SLICES; ++c) {
        low[a][c] = add_pairs(low[a][c], weights, value[c].low);
        high[a][c] = add_pairs(high[a][c], weights, value[c].high);
      }
    }
  }
  #pragma GCC unroll 8
  for (int a = 0; a < ROWS; ++a)
  #pragma GCC unroll 4
    for (int c = 0; c < SLICES; ++c)
      add_row_pairs(o + a * ldo + from + c * kDotColumns, alpha[a], low[a][c], high[a][c]);
}

// p [R, ldp] of bf16 = s [R, lds], a row of zeros behind an odd number of keys.
FA_INLINE void round_weights(int rows, int keys, const float* s, int64_t lds, uint16_t* p, int64_t ldp, StoredRows& v) {
  alignas(64) static const char zeros[2 * kMaxHeadDim] = {};
  if (keys % 2) v.row[keys] = zeros;
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < keys; j += kDotColumns)
      store_bf16(p + r * ldp + j, load<float>(s + r * lds + j), load<float>(s + r * lds + j + VL<float>));
}

template <int ROWS, int SLICES>
FA_INLINE int dot_rows(int r, int rows, int keys, int64_t width, const uint16_t* p, int64_t ldp, const StoredRows& v,
                       const StoredRows& next, const float* alpha, float* o, int64_t ldo) {
  StoredRows none;
  none.keys = 0;
  for (; r + ROWS <= rows; r += ROWS) {
    const StoredRows& ahead = r ? none : next;
    int64_t from = 0;
    for (; from + SLICES * kDotColumns <= width; from += SLICES * kDotColumns)
      dot_sums<ROWS, SLICES>(keys, from, p + r * ldp, ldp, v, ahead, alpha + r, o + r * ldo, ldo);
    for (; from < width; from += kDotColumns)
      dot_sums<ROWS, 1>(keys, from, p + r * ldp, ldp, v, ahead, alpha + r, o + r * ldo, ldo);
  }
  return r;
}

// O [R, width] = alpha O + bf16(P) V.
[[maybe_unused]] static void add_values_by_dots(int rows, int keys, int64_t width, const float* s, int64_t lds,
                                                uint16_t* p, StoredRows& v, const StoredRows& next, const float* alpha,
                                                float* o, int64_t ldo) {
  round_weights(rows, keys, s, lds, p, lds, v);
  int r = dot_rows<8, 1>(0, rows, keys, width, p, lds, v, next, alpha, o, ldo);
  r = dot_rows<4, 2>(r, rows, keys, width, p, lds, v, next, alpha, o, ldo);
  r = dot_rows<2, 4>(r, rows, keys, width, p, lds, v, next, alpha, o, ldo);
  dot_rows<1, 4>(r, rows, keys, width, p, lds, v, next, alpha, o, ldo);
}

#endif

FA_END
