// C [m, n] (+)= A [m, k] B [k, n] on packed blocks that stay in the caches.
//
// A is read through (row, k) strides: row-major A (k stride 1) or transposed A (row stride 1).
// B is row-major with its rows padded to NR. C is MR x NR tiles held in registers while k runs.
// Rows of A and C are padded to MR, so that an edge tile may compute rows nobody reads.
#pragma once
#include "tiles.h"

FA_BEGIN

struct Span {
  int lo, hi;
};

enum class Into { store, add, scale_add };  // C = AB, C += AB, C = alpha[row] C + AB

template <class T, int ROWS, bool AT, Into MODE>
[[maybe_unused]] static void micro(int64_t k, const T* __restrict a, int64_t lda, const T* __restrict b, int64_t ldb,
                                   T* __restrict c, int64_t ldc, const T* __restrict alpha) {
  Vec<T> acc0[ROWS], acc1[ROWS];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) acc0[r] = acc1[r] = Vec<T>{};
  for (int64_t i = 0; i < k; ++i) {
    const Vec<T> b0 = load<T>(b), b1 = load<T>(b + VL<T>);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const Vec<T> x = splat<T>(AT ? a[r] : a[r * lda]);
      acc0[r] += x * b0;
      acc1[r] += x * b1;
    }
    a += AT ? lda : 1;
    b += ldb;
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    T* row = c + r * ldc;
    if (MODE == Into::add) {
      acc0[r] += load<T>(row);
      acc1[r] += load<T>(row + VL<T>);
    } else if (MODE == Into::scale_add) {
      acc0[r] += alpha[r] * load<T>(row);
      acc1[r] += alpha[r] * load<T>(row + VL<T>);
    }
    store<T>(row, acc0[r]);
    store<T>(row + VL<T>, acc1[r]);
  }
}

// columns: for each panel of MR rows, the columns of C wanted (null: all); whole NR tiles are computed.
// depth: for each panel of MR rows, the part of k that is not zero in A (null: all).
template <class T, bool AT, Into MODE>
[[maybe_unused]] static void gemm(int m, int n, int k, const T* a, int64_t lda, const T* b, int64_t ldb, T* c,
                                  int64_t ldc, const T* alpha, const Span* columns, const Span* depth) {
  for (int j = 0; j < n; j += NR<T>) {
    for (int i = 0, panel = 0; i < m; i += MR, ++panel) {
      if (columns && (columns[panel].hi <= j || columns[panel].lo >= j + NR<T>)) continue;
      const int k0 = depth ? depth[panel].lo : 0, k1 = depth ? depth[panel].hi : k;
      if (k1 <= k0 && MODE == Into::add) continue;
      const T* ai = AT ? a + i + k0 * lda : a + i * lda + k0;
      const T* bj = b + k0 * ldb + j;
      const T* scale = MODE == Into::scale_add ? alpha + i : nullptr;
      T* cij = c + i * ldc + j;
      if (m - i == 1)
        micro<T, 1, AT, MODE>(k1 - k0, ai, lda, bj, ldb, cij, ldc, scale);
      else if (m - i <= MR / 2)
        micro<T, MR / 2, AT, MODE>(k1 - k0, ai, lda, bj, ldb, cij, ldc, scale);
      else
        micro<T, MR, AT, MODE>(k1 - k0, ai, lda, bj, ldb, cij, ldc, scale);
    }
  }
}

// C = A B with A row-major, on the wanted columns, each dot product summed in pieces of k (tiles.h: dot_piece) and the
// pieces in order. recompute.h sums dO.O in the same order as dO.V, so that the two cancel to the last bit.
template <class T>
[[maybe_unused]] static void dot_products(int m, int n, int k, int piece, const T* a, int64_t lda, const T* b,
                                          int64_t ldb, T* c, int64_t ldc, const Span* columns) {
  gemm<T, false, Into::store>(m, n, min_of(k, piece), a, lda, b, ldb, c, ldc, nullptr, columns, nullptr);
  for (int i = piece; i < k; i += piece)
    gemm<T, false, Into::add>(m, n, min_of(k - i, piece), a + i, lda, b + i * ldb, ldb, c, ldc, nullptr, columns,
                              nullptr);
}

// C = factor A B with A row-major; the terms k, k + VL, k + 2 VL ... of a dot product in one chain, the chains by halves.
template <class T>
[[maybe_unused]] static void lane_products(int m, int n, int k, const T* a, int64_t lda, const T* b, int64_t ldb, T* c,
                                           int64_t ldc, T factor) {
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; j += VL<T>) {
      Vec<T> acc[VL<T>];
#pragma GCC unroll 16
      for (int l = 0; l < VL<T>; ++l) acc[l] = Vec<T>{};
      for (int d = 0; d < k; d += VL<T>)
        for (int l = 0; l < min_of(VL<T>, k - d); ++l)
          acc[l] += splat<T>(a[i * lda + d + l]) * load<T>(b + (d + l) * ldb + j);
#pragma GCC unroll 4
      for (int half = VL<T> / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int l = 0; l < half; ++l) acc[l] += acc[l + half];
      store<T>(c + i * ldc + j, acc[0] * factor);
    }
  }
}

// Scores of a tile of a problem with M rows and N keys; all of them where rows are few, else those on `columns`, and then
// q has the scale already (pack.h: query_factor).
template <class T>
[[maybe_unused]] static void score_products(int64_t M, int64_t N, int m, int n, int k, const T* q, int64_t ldq,
                                            const T* kt, int64_t ldk, T* s, int64_t lds, const Span* columns, T scale) {
  if (in_lanes<T>(M))
    lane_products<T>(m, n, k, q, ldq, kt, ldk, s, lds, scale);
  else
    dot_products<T>(m, n, k, dot_piece(M, N), q, ldq, kt, ldk, s, lds, columns);
}

// The same product where B holds NaN or Inf in rows that nobody sees: an A of exactly 0 contributes nothing.
template <class T, bool AT, Into MODE>
[[maybe_unused]] static void gemm_skip_zeros(int m, int n, int k, const T* a, int64_t lda, const T* b, int64_t ldb,
                                             T* c, int64_t ldc, const T* alpha, const Span* depth) {
  for (int i = 0; i < m; ++i) {
    T* row = c + i * ldc;
    if (MODE != Into::add)
      for (int j = 0; j < n; ++j) row[j] = MODE == Into::store ? T(0) : row[j] * alpha[i];
    const int k0 = depth ? depth[i / MR].lo : 0, k1 = depth ? depth[i / MR].hi : k;
    for (int l = k0; l < k1; ++l) {
      const T x = AT ? a[i + l * lda] : a[i * lda + l];
      if (x == 0) continue;
      const T* from = b + l * ldb;
      for (int j = 0; j < n; ++j) row[j] += x * from[j];
    }
  }
}

FA_END
