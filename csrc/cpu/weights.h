// Weights pass: what nn.MultiheadAttention returns, P (after dropout), per head or averaged over the heads.
// One task per (batch, head or all heads, block of rows); the heads are added in order.
#pragma once
#include "recompute.h"

FA_BEGIN

template <class T>
[[maybe_unused]] static void add_weights(const Problem& x, const Plan<T>& f, const Tile& t, const Scratch<T>& w,
                                         T share) {
  pack_queries(w.q, f.ldq, x, t.row, t.rows);
  pack_keys(x, f, t.key, t.keys, w);
  probabilities<T>(x, f, t, w);
  for (int i = 0; i < t.rows; ++i) {
    const Span own = row_span(t, i);
    const T* s = w.s + i * f.lds;
    T* sum = w.dp + i * f.lds;
    if (has_dropout(f.p)) {
      keep_row<T>(x, t, i, whole_vectors(own, VL<T>), w);
      for (int j = own.lo; j < own.hi; ++j) sum[j] += s[j] * w.keep[j] * share;
    } else {
      for (int j = own.lo; j < own.hi; ++j) sum[j] += s[j] * share;
    }
  }
}

template <class T>
[[maybe_unused]] static void weights_task(const void* plan, int64_t task, char* scratch) {
  const Plan<T>& f = *static_cast<const Plan<T>*>(plan);
  const AttentionParams& p = f.p;
  const bool mean = p.weights_mode == Weights::mean;
  const int64_t pair = task / f.blocks, b = mean ? pair : pair / p.H;
  const int64_t first = mean ? 0 : pair % p.H, last = mean ? p.H : first + 1;
  const int64_t row = task % f.blocks * f.bm;
  const int rows = static_cast<int>(min_of<int64_t>(f.bm, p.M - row));
  Arena arena{reinterpret_cast<uintptr_t>(scratch)};
  const Scratch<T> w(f, arena);
  Tile t;
  int keys;
  for (int64_t key = 0; key < p.N; key += keys) {
    keys = static_cast<int>(cut_keys(p, key, min_of<int64_t>(f.bn, p.N - key)));
    __builtin_memset(w.dp, 0, sizeof(T) * static_cast<size_t>(f.bm * f.lds));
    for (int64_t h = first; h < last; ++h) {
      const Problem x = make_problem(p, b, h);
      if (make_tile(x, row, rows, key, keys, t)) add_weights<T>(x, f, t, w, T(1) / static_cast<T>(last - first));
    }
    for (int i = 0; i < rows; ++i)
      store_row(address(p.weights, b, first, row + i, key), p.weights.dtype, w.dp + i * f.lds, T(1), keys);
  }
}

template <class T>
[[maybe_unused]] static bool weights(const AttentionParams& p) {
  Plan<T> f = make_plan<T>(p);
  Arena count{0};
  Scratch<T> layout(f, count);
  const int64_t groups = p.weights_mode == Weights::mean ? p.B : p.B * p.H;
  const double work =
      static_cast<double>(p.B * p.H) * static_cast<double>(p.M) * static_cast<double>(p.N) * static_cast<double>(p.D);
  return run_tasks(groups * f.blocks, p.threads, work, count.used, weights_task<T>, &f);
}

FA_END
