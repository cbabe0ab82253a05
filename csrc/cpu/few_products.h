// The products of few_rows.h: S = q K^T and O = alpha O + P V, on rows of K and V where they lie.
#pragma once
#include "stored.h"

FA_BEGIN

// How few_products takes a vector of a query and of a key: numbers of type S, multiplied in float32.
template <DType S>
struct Numbers {
  static constexpr DType type = S;
  static constexpr int64_t bytes = VL<float> * stored_size(S);
  static Vec<float> load_key(const char* p) { return load_as<S>(p); }
  static Vec<float> add(Vec<float> sum, Vec<float> q, Vec<float> k) { return sum + q * k; }
};

// s [R, keys] = factor q k^T, ROWS rows and VL / ROWS keys at a time: each sum is one accumulator, all of them in
// registers. q: [R, width], whatever a lane of it holds.
template <class Terms, int ROWS>
[[maybe_unused]] static void few_products(int rows, int keys, int64_t width, const float* q, int64_t ldq, float factor,
                                          const StoredRows& k, const Ahead& next, float* s, int64_t lds) {
  constexpr int KEYS = VL<float> / ROWS;
  for (int j = 0; j < keys; j += KEYS) {
    const char* key[KEYS];  // the last keys are taken twice where they do not fill a vector
    for (int b = 0; b < KEYS; ++b) key[b] = k.row[min_of(j + b, keys - 1)];
    for (int b = j; b < min_of(j + KEYS, next.keys); ++b) next.fetch(b);
    for (int r = 0; r < rows; r += ROWS) {
      Vec<float> acc[VL<float>];
#pragma GCC unroll 16
      for (int i = 0; i < VL<float>; ++i) acc[i] = Vec<float>{};
      const float* row = q + r * ldq;
      for (int64_t d = 0; d * VL<float> < width; ++d) {
        Vec<float> query[ROWS];
#pragma GCC unroll 16
        for (int a = 0; a < ROWS; ++a) query[a] = load<float>(row + a * ldq + d * VL<float>);
#pragma GCC unroll 16
        for (int b = 0; b < KEYS; ++b) {
          const Vec<float> kd = Terms::load_key(key[b] + d * Terms::bytes);
#pragma GCC unroll 16
          for (int a = 0; a < ROWS; ++a) acc[a * KEYS + b] = Terms::add(acc[a * KEYS + b], query[a], kd);
        }
      }
      const Vec<float> sums = sum_each<float>(acc) * factor;
      float lane[VL<float>];
      store<float>(lane, sums);
#pragma GCC unroll 16
      for (int a = 0; a < ROWS; ++a)
        __builtin_memcpy(s + (r + a) * lds + j, lane + a * KEYS, sizeof(float) * static_cast<size_t>(KEYS));
    }
  }
}

// o [R, width] = alpha o + s v, ROWS rows and VECTORS vectors of o at a time in registers, over all keys of the tile.
// Even and odd keys are summed apart where there are registers for it, which rounds less. from: the first column.
template <DType S, int ROWS, int VECTORS>
FA_INLINE void few_sums(int keys, int64_t from, const float* s, int64_t lds, const StoredRows& v, const Ahead& next,
                        const float* alpha, float* o, int64_t ldo) {
  constexpr int CHAINS = kVectorBytes == 64 ? 2 : 1;  // 32 registers
  constexpr int64_t size = stored_size(S);
  Vec<float> acc[CHAINS][ROWS][VECTORS];
#pragma GCC unroll 2
  for (int i = 0; i < CHAINS; ++i)
#pragma GCC unroll 8
    for (int a = 0; a < ROWS; ++a)
#pragma GCC unroll 8
      for (int c = 0; c < VECTORS; ++c) acc[i][a][c] = Vec<float>{};
  const auto add_key = [&](int j, Vec<float>(&sums)[ROWS][VECTORS]) __attribute__((always_inline)) {
    const char* row = v.row[j] + from * size;
    if (j < next.keys) next.fetch(j);
    Vec<float> value[VECTORS];
#pragma GCC unroll 8
    for (int c = 0; c < VECTORS; ++c) value[c] = load_as<S>(row + c * VL<float> * size);
#pragma GCC unroll 8
    for (int a = 0; a < ROWS; ++a) {
      const Vec<float> weight = splat<float>(s[a * lds + j]);
#pragma GCC unroll 8
      for (int c = 0; c < VECTORS; ++c) sums[a][c] += weight * value[c];
    }
  };
  int j = 0;
  for (; j + CHAINS <= keys; j += CHAINS)
#pragma GCC unroll 2
    for (int i = 0; i < CHAINS; ++i) add_key(j + i, acc[i]);
  for (; j < keys; ++j) add_key(j, acc[0]);
#pragma GCC unroll 8
  for (int a = 0; a < ROWS; ++a)
#pragma GCC unroll 8
    for (int c = 0; c < VECTORS; ++c) {
      float* sum = o + a * ldo + from + c * VL<float>;
      const Vec<float> own = CHAINS == 2 ? acc[0][a][c] + acc[CHAINS - 1][a][c] : acc[0][a][c];
      store<float>(sum, alpha[a] * load<float>(sum) + own);  // last: a shorter chain of roundings
    }
}
template <DType S, int VECTORS>
FA_INLINE int64_t add_columns(int rows, int keys, int64_t from, int64_t width, const float* s, int64_t lds,
                              const StoredRows& v, const StoredRows& next, const float* alpha, float* o, int64_t ldo) {
  constexpr int64_t step = VECTORS * VL<float>;
  for (; from + step <= width; from += step) {
    const auto ahead = [&](int64_t r, int64_t count) {
      const int64_t done = from * rows + r * step;
      return Ahead(next, done, done + count * step, rows * width);
    };
    int r = 0;
    if constexpr (VECTORS <= 2)
      for (; r + 4 <= rows; r += 4)
        few_sums<S, 4, VECTORS>(keys, from, s + r * lds, lds, v, ahead(r, 4), alpha + r, o + r * ldo, ldo);
    for (; r < rows; ++r)
      few_sums<S, 1, VECTORS>(keys, from, s + r * lds, lds, v, ahead(r, 1), alpha + r, o + r * ldo, ldo);
  }
  return from;
}

FA_END
