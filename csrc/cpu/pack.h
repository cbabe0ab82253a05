// Blocks of q, k, v, dout converted to the compute type and padded, as gemm.h wants them.
#pragma once
#include "problem.h"

FA_BEGIN

FA_INLINE const char* row_address(const Tensor& t, const Problem& x, int64_t head, int64_t row) {
  return address(t, x.batch, head, row);
}

// dst [rows, ld] = rows of a tensor, 0 from `columns` up to a multiple of NR.
template <class T>
[[maybe_unused]] static void pack_rows(T* dst, int64_t ld, const char* src, DType type, int64_t stride, int rows,
                                       int64_t columns) {
  const int64_t step = stride * size_of(type), width = round_up(columns, NR<T>);
  for (int i = 0; i < rows; ++i) {
    T* row = dst + i * ld;
    load_row(row, src + i * step, type, columns);
    for (int64_t j = columns; j < width; ++j) row[j] = 0;
  }
}
// The same for the left operand of a product: times factor, and the last panel of MR rows filled up with 0.
template <class T>
[[maybe_unused]] static void pack_panels(T* dst, int64_t ld, const char* src, DType type, int64_t stride, int rows,
                                         int64_t columns, T factor) {
  pack_rows(dst, ld, src, type, stride, rows, columns);
  const int64_t width = round_up(columns, NR<T>);
  if (factor != 1)
    for (int i = 0; i < rows; ++i)
      for (int64_t j = 0; j < width; ++j) dst[i * ld + j] *= factor;
  for (int64_t i = rows; i < round_up(rows, MR); ++i)
    for (int64_t j = 0; j < width; ++j) dst[i * ld + j] = 0;
}

// The scale is in q or, of few rows, in the scores, which rounds once less; never in the exponent: the largest score of a
// row is the shift of its softmax to the last bit, and a row that sees one key has the weight 1 exactly.
template <class T>
FA_INLINE T query_factor(const AttentionParams& p) {
  return in_lanes<T>(p.M) ? T(1) : static_cast<T>(p.scale);
}
template <class T>
FA_INLINE T score_factor(const AttentionParams& p) {
  return in_lanes<T>(p.M) ? static_cast<T>(p.scale) : T(1);
}
template <class T>
[[maybe_unused]] static void pack_queries(T* dst, int64_t ld, const Problem& x, int64_t row, int rows) {
  const Tensor& q = x.p->q;
  pack_panels(dst, ld, row_address(q, x, x.h, x.row0 + row), q.dtype, q.stride[2], rows, x.p->D, query_factor<T>(*x.p));
}

// VL vectors of VL elements, by log2(VL) rounds of perfect shuffles: what was element c of a[r] is element r of a[c].
template <class T>
FA_INLINE void transpose_vectors(Vec<T>* a) {
  constexpr int W = VL<T>;
  Vec<T> b[W];
#pragma GCC unroll 4
  for (int round = 1; round < W; round *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; ++i) {
      b[2 * i] = interleave_low<T>(a[i], a[i + W / 2]);
      b[2 * i + 1] = interleave_high<T>(a[i], a[i + W / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) a[i] = b[i];
  }
}
// dst[c][r] = src[r][c].
template <class T>
FA_INLINE void transpose_square(const T* src, int64_t lds, T* dst, int64_t ldd) {
  constexpr int W = VL<T>;
  Vec<T> a[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) a[i] = load<T>(src + i * lds);
  transpose_vectors<T>(a);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) store<T>(dst + i * ldd, a[i]);
}

// dst [columns, ld] = the transpose of rows of a tensor; beyond rows it is 0 up to a multiple of NR.
// strip: [VL, padded columns], for rows that need converting or filling up.
template <class T>
[[maybe_unused]] static void pack_transposed(T* dst, int64_t ld, const char* src, DType type, int64_t stride, int rows,
                                             int64_t columns, T* strip) {
  constexpr int W = VL<T>;
  const int64_t step = stride * size_of(type), lds = padded<T>(columns);
  const bool ready = type == (sizeof(T) == sizeof(float) ? DType::f32 : DType::f64);
  for (int r = 0; r < static_cast<int>(round_up(rows, NR<T>)); r += W) {
    const bool direct = ready && r + W <= rows;
    for (int i = 0; i < W && !direct; ++i) {
      T* row = strip + i * lds;
      if (r + i < rows)
        load_row(row, src + (r + i) * step, type, columns);
      else
        for (int64_t j = 0; j < columns; ++j) row[j] = 0;
    }
    const T* from = direct ? reinterpret_cast<const T*>(src + r * step) : strip;
    const int64_t ldf = direct ? stride : lds;
    int64_t c = 0;
    for (; c + W <= columns; c += W) transpose_square<T>(from + c, ldf, dst + c * ld + r, ld);
    for (; c < columns; ++c)
      for (int i = 0; i < W; ++i) dst[c * ld + r + i] = from[i * ldf + c];
  }
}

// Whether all of a packed block [rows, width] is finite.
template <class T>
[[maybe_unused]] static bool all_finite(const T* a, int64_t ld, int rows, int64_t width) {
  T worst = 0;
  for (int i = 0; i < rows; ++i) {
    Vec<T> sum{};
    for (int64_t j = 0; j < width; j += VL<T>) sum += load<T>(a + i * ld + j) * T(0);  // 0, or NaN
    worst += reduce_add<T>(sum);
  }
  return worst == 0;
}

FA_END
