// Forward pass that also returns the weights, as nn.MultiheadAttention does: P (after dropout), per head or averaged.
//
// The forward pass with what it computes on the way kept: of a block of rows the P' = exp(S - m') of every block of keys,
// where m' was the largest score so far. Once the last key is seen,
//
//   P = P' exp(m' - m) / (l + exp(sink - m)),   which is added to the mean or goes out as it is
//
// so that scores are not computed a second time. One task per (batch, head or all heads, block of rows); the heads are
// added in order. A scratch holds BM rows of P' and, for the mean, of the sums: O(N) memory per thread.
#pragma once
#include "forward.h"

FA_BEGIN

template <class T>
struct WeightsScratch {
  ForwardScratch<T> forward;
  T *stats, *mean;  // [BM, 2];  [tiles, BM, lds] where the heads are averaged
  WeightsScratch(const Forward<T>& f, Arena& a) : forward(f, a) {
    stats = a.template take<T>(2 * f.bm);
    mean = a.template take<T>(f.p.weights_mode == Weights::mean ? f.kept * f.bm * f.lds : 0);
  }
};

// What row i of a tile is multiplied by: from P' to P, and to its share of the mean.
template <class T>
FA_INLINE T weight_factor(const T* stats, T top, T share) {
  return (top == stats[0] ? T(1) : exp1<T>(top - stats[0])) * stats[1] * share;
}

// Zero is all bits clear in every dtype.
FA_INLINE void store_zeros(char* at, DType type, int64_t n) {
  if (n > 0) __builtin_memset(at, 0, static_cast<size_t>(n * size_of(type)));
}

template <class T>
[[maybe_unused]] static void add_weights(const Forward<T>& f, const Tile& t, const T* s, const T* tops, T share,
                                         const T* stats, T* mean) {
  for (int i = 0; i < t.rows; ++i) {
    const Span own = row_span(t, i);
    const T factor = weight_factor<T>(stats + 2 * i, tops[i], share);
    const T* __restrict from = s + i * f.lds;
    T* __restrict to = mean + i * f.lds;
    for (int j = own.lo; j < own.hi; ++j) to[j] += from[j] * factor;
  }
}

template <class T>
[[maybe_unused]] static void store_weights(const Forward<T>& f, const Problem& x, const Tile& t, const T* s,
                                           const T* tops, T share, const T* stats) {
  const Tensor& to = f.p.weights;
  for (int i = 0; i < t.rows; ++i) {
    const Span own = row_span(t, i);
    char* at = address(to, x.b, x.h, t.row + i, t.key);
    const int64_t size = size_of(to.dtype);
    store_zeros(at, to.dtype, own.lo);
    store_row(at + own.lo * size, to.dtype, s + i * f.lds + own.lo, weight_factor<T>(stats + 2 * i, tops[i], share),
              own.hi - own.lo);
    store_zeros(at + own.hi * size, to.dtype, t.keys - own.hi);
  }
}

// The sums of all heads, or zeros for a tile that none of the rows sees.
template <class T>
[[maybe_unused]] static void store_mean(const Forward<T>& f, const Problem& x, int64_t row, int rows, Range r,
                                        const T* mean) {
  const Tensor& to = f.p.weights;
  int keys;
  for (int64_t key = r.lo; key < r.hi; key += keys, mean += f.bm * f.lds) {
    keys = tile_keys<T>(x, f, row, rows, key, r.hi);
    for (int i = 0; i < rows; ++i) store_row(address(to, x.b, 0, row + i, key), to.dtype, mean + i * f.lds, T(1), keys);
  }
}

template <class T>
[[maybe_unused]] static void head_weights(const Problem& x, const Forward<T>& f, int64_t row, int rows, Range r,
                                          const WeightsScratch<T>& w) {
  const AttentionParams& p = f.p;
  const bool mean = p.weights_mode == Weights::mean;
  const T kept = has_dropout(p) ? dropout_keep<T>(p) : T(1);
  const T share = mean ? kept / static_cast<T>(p.H) : kept;
  forward_rows<T>(x, f, row, rows, r, w.forward);
  write_rows<T>(x, row, rows, w.forward.o, f.ldo, w.forward.m, w.forward.l, 1.0, w.stats);
  Tile t;
  int keys;
  int64_t tile = 0;
  for (int64_t key = r.lo; key < r.hi; key += keys, ++tile) {
    keys = tile_keys<T>(x, f, row, rows, key, r.hi);
    const bool seen = make_tile(x, row, rows, key, keys, t);
    const T *s = w.forward.s + tile * f.bm * f.lds, *tops = w.forward.tops + tile * f.bm;
    if (seen && mean)
      add_weights<T>(f, t, s, tops, share, w.stats, w.mean + tile * f.bm * f.lds);
    else if (seen)
      store_weights<T>(f, x, t, s, tops, share, w.stats);
    else if (!mean)
      for (int i = 0; i < rows; ++i) store_zeros(address(p.weights, x.b, x.h, row + i, key), p.weights.dtype, keys);
  }
}

template <class T>
[[maybe_unused]] static void weights_task(const void* plan, int64_t task, char* scratch) {
  const Forward<T>& f = *static_cast<const Forward<T>*>(plan);
  const AttentionParams& p = f.p;
  const bool mean = p.weights_mode == Weights::mean;
  const int64_t unit = task / f.blocks, head = f.first_pair * f.group() + unit;
  const int64_t b = mean ? (p.HK ? f.first_pair / p.HK : 0) + unit : head / p.H, first = mean ? 0 : head % p.H;
  const int64_t last = mean ? p.H : first + 1;
  const int64_t row = (f.blocks - 1 - task % f.blocks) * f.step;
  const int rows = static_cast<int>(min_of<int64_t>(f.step, p.M - row));
  Arena arena{reinterpret_cast<uintptr_t>(scratch)};
  const WeightsScratch<T> w(f, arena);
  const Range r = tiled_range(make_problem(p, b, first), row, rows);  // the same for every head
  const int64_t tiles = p.block_map.data ? f.kept : ceil_div(r.hi - r.lo, f.bn);
  if (mean) __builtin_memset(w.mean, 0, sizeof(T) * static_cast<size_t>(tiles * f.bm * f.lds));
  for (int64_t h = first; h < last; ++h) head_weights<T>(make_problem(p, b, h), f, row, rows, r, w);
  const Problem x = make_problem(p, b, first);
  if (mean) store_mean<T>(f, x, row, rows, r, w.mean);
  for (int i = 0; i < rows; ++i) {
    store_zeros(address(p.weights, b, first, row + i, 0), p.weights.dtype, r.lo);
    store_zeros(address(p.weights, b, first, row + i, r.hi), p.weights.dtype, p.N - r.hi);
  }
}

template <class T>
[[maybe_unused]] static bool weights(const AttentionParams& p) {
  const int held = p.weights_mode == Weights::mean ? 2 : 1;
  Forward<T> f = make_forward<T>(p, weights_rows<T>(p.N, held, min_of(forward_blocks<T>(p.D, p.DV).m, kMaxRows)));
  f.kept = max_of<int64_t>(ceil_div(p.N, f.bn), 1);
  if (p.block_map.data) {  // narrow tiles, or those of a small block would mostly be padding
    f.bn = static_cast<int>(cut_keys(p, 0, f.bn));
    f.lds = padded<T>(f.bn);
    f.kept = ceil_div(max_of<int64_t>(p.N, 1), p.block_n) * ceil_div(p.block_n, f.bn);
  }
  const bool mean = p.weights_mode == Weights::mean;
  const int64_t groups = mean ? p.B : p.B * p.H;
  prefer_large_pages(p.weights.data, static_cast<size_t>(groups * p.M * p.N * size_of(p.weights.dtype)));
  if (mean) return run_blocks<T, WeightsScratch<T>>(f, p.B, f.blocks, p.HK, weights_task<T>);
  return run_blocks<T, WeightsScratch<T>>(f, p.B * p.HK, f.group() * f.blocks, 1, weights_task<T>);
}

FA_END
