// The products of few_rows.h by dot products of bfloat16 (dots.h: VDPBF16PS), where q, K and V are bfloat16 or exact in it:
//
//   S = scale q K^T   along the columns, 32 of them in a register, or 4 of each of eight rows
//   O = alpha O + bf16(P) V   over pairs of keys
//
// K and V may be codes of a quantised cache. The weights are rounded to bfloat16, as on panels. few_rows.h asks where
// `dots_fit`.
#pragma once
#include "few_products.h"
#if defined(__AVX512BF16__)
  #include "panels.h"
#endif

FA_BEGIN

constexpr int kDotColumns = 2 * VL<float>;
constexpr int kScoreRows = 8;

// Whether they are there, and fit. Codes are exact in bfloat16, but making a copy of them pays only for several rows.
FA_INLINE bool dots_fit(DType query, DType stored, int64_t columns, int64_t rows) {
#if defined(__AVX512BF16__)
  const bool codes = stored == DType::i8 || stored == DType::e4m3;
  return query == DType::bf16 && (stored == DType::bf16 || (codes && rows >= 4)) && columns % kDotColumns == 0;
#else
  (void)query, (void)stored, (void)columns, (void)rows;
  return false;
#endif
}

#if defined(__AVX512BF16__)

FA_INLINE IVec<float> load_pairs(const char* p) { return bits<float>(load<float>(reinterpret_cast<const float*>(p))); }

// Rows [keys, columns] as bfloat16 in `to`, and points to them.
template <DType S>
FA_INLINE void round_rows(StoredRows& rows, int64_t columns, uint16_t* to) {
  for (int j = 0; j < rows.keys; ++j, to += columns) {
    for (int64_t d = 0; d < columns; d += kDotColumns) {
      const char* from = rows.row[j] + d * stored_size(S);
      store_bf16(to + d, load_as<S>(from), load_as<S>(from + VL<float> * stored_size(S)));
    }
    rows.row[j] = reinterpret_cast<const char*>(to);
  }
}
[[maybe_unused]] static void copy_pairs(StoredRows& rows, int64_t columns, uint16_t* to) {
  if (rows.type == DType::bf16) {
    for (int j = 0; j < rows.keys; ++j, to += columns) {
      __builtin_memcpy(to, rows.row[j], sizeof(uint16_t) * static_cast<size_t>(columns));
      rows.row[j] = reinterpret_cast<const char*>(to);
    }
  } else if (rows.type == DType::i8) {
    round_rows<DType::i8>(rows, columns, to);
  } else if (nan_codes(rows, rows.keys, columns)) {
    alignas(64) float line[kMaxHeadDim];
    for (int j = 0; j < rows.keys; ++j, to += columns) {
      load_row(line, rows.row[j], rows.type, columns);
      for (int64_t d = 0; d < columns; d += kDotColumns)
        store_bf16(to + d, load<float>(line + d), load<float>(line + d + VL<float>));
      rows.row[j] = reinterpret_cast<const char*>(to);
    }
  } else {
    round_rows<DType::e4m3>(rows, columns, to);
  }
  rows.type = DType::bf16;
}

// For few_products: 16 pairs of columns in a vector.
struct PairsOfColumns {
  static constexpr int64_t bytes = kVectorBytes;
  static Vec<float> load_key(const char* p) { return from_bits<float>(load_pairs(p)); }
  static Vec<float> add(Vec<float> sum, Vec<float> q, Vec<float> k) {
    return add_pairs(sum, bits<float>(q), bits<float>(k));
  }
};

// kScoreRows rows of q for dot_scores: lanes 2 r and 2 r + 1 of vector d are columns 4 d .. 4 d + 3 of row r.
FA_INLINE void put_query(char* to, int row, const char* from, int64_t columns) {
  for (int64_t d = 0; d < columns; d += 4) __builtin_memcpy(to + d * 16 + row * 8, from + d * 2, 8);
}

// Lanes 2 r and 2 r + 1 of eight sums, one for each key, added up: to[r * ld + key].
FA_INLINE void store_scores(const Vec<float> (&sums)[8], float factor, float* to, int64_t ld) {
  Vec<float> by_row[4];  // lane 2 r + i: row r, key 2 b + i
  #pragma GCC unroll 4
  for (int b = 0; b < 4; ++b) {
    const Vec<float> x = sums[2 * b], y = sums[2 * b + 1];
    by_row[b] = factor * (__builtin_shufflevector(x, y, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
                          __builtin_shufflevector(x, y, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31));
  }
  #pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {  // four keys
    const Vec<float> x = by_row[2 * half], y = by_row[2 * half + 1];
    alignas(64) float even[VL<float>], odd[VL<float>];  // rows 0, 2, 4, 6 and 1, 3, 5, 7
    store<float>(even, __builtin_shufflevector(x, y, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29));
    store<float>(odd, __builtin_shufflevector(x, y, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31));
  #pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      __builtin_memcpy(to + 2 * r * ld + 4 * half, even + 4 * r, 16);
      __builtin_memcpy(to + (2 * r + 1) * ld + 4 * half, odd + 4 * r, 16);
    }
  }
}

// s [8, keys] = factor q k^T, eight keys at a time: four columns of a key in all lanes at a time. Adding up the lanes of
// every score, as few_products does, would take nearly as long as the products.
[[maybe_unused]] static void dot_scores(int keys, int64_t columns, const char* q, float factor, const StoredRows& k,
                                        const Ahead& next, float* s, int64_t lds) {
  for (int j = 0; j < keys; j += 8) {
    Vec<float> sums[8];
    const char* key[8];
  #pragma GCC unroll 8
    for (int b = 0; b < 8; ++b) sums[b] = Vec<float>{}, key[b] = k.row[min_of(j + b, keys - 1)];
    for (int part = 0; part < 8; ++part) {
      if (j + part < next.keys) next.fetch(j + part);
      for (int64_t d = columns / 8 * part; d < columns / 8 * (part + 1); d += 4) {
        const IVec<float> query = load_pairs(q + d * 16);
  #pragma GCC unroll 8
        for (int b = 0; b < 8; ++b) {
          int64_t four;
          __builtin_memcpy(&four, key[b] + d * 2, sizeof four);
          sums[b] = add_pairs(sums[b], query, (IVec<float>)_mm512_set1_epi64(four));
        }
      }
    }
    store_scores(sums, factor, s + j, lds);
  }
}

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
FA_INLINE void dot_sums(int keys, int64_t from, const uint16_t* p, int64_t ldp, const StoredRows& v, const Ahead& next,
                        const float* alpha, float* o, int64_t ldo) {
  Vec<float> low[ROWS][SLICES], high[ROWS][SLICES];
  #pragma GCC unroll 8
  for (int a = 0; a < ROWS; ++a)
  #pragma GCC unroll 4
    for (int c = 0; c < SLICES; ++c) low[a][c] = high[a][c] = Vec<float>{};
  for (int j = 0; j < keys; j += 2) {
    for (int b = j; b < min_of(j + 2, next.keys); ++b) next.fetch(b);
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
  for (; r + ROWS <= rows; r += ROWS) {
    const auto ahead = [&](int64_t from, int64_t columns) {
      const int64_t done = r * width + ROWS * from;
      return Ahead(next, done, done + ROWS * columns, rows * width);
    };
    constexpr int64_t step = SLICES * kDotColumns;
    int64_t from = 0;
    for (; from + step <= width; from += step)
      dot_sums<ROWS, SLICES>(keys, from, p + r * ldp, ldp, v, ahead(from, step), alpha + r, o + r * ldo, ldo);
    for (; from < width; from += kDotColumns)
      dot_sums<ROWS, 1>(keys, from, p + r * ldp, ldp, v, ahead(from, kDotColumns), alpha + r, o + r * ldo, ldo);
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
