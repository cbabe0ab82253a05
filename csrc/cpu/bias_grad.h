// The gradient of a float mask or bias: dS summed over the dimensions along which it is broadcast (stride 0).
// One task per tile of the result, which adds up its contributions in the order batch, head, row, key: no atomics,
// the same bits at any thread count, no memory beyond the tile.
#pragma once
#include "recompute.h"

FA_BEGIN

// The tile of the result that a task owns, and where its contributions come from.
struct Reduction {
  bool sum_rows, sum_keys;
  Range b, h, row, key;
};

template <class T>
[[maybe_unused]] static Reduction make_reduction(const Plan<T>& f, int64_t task) {
  const AttentionParams& p = f.p;
  const int64_t* stride = f.additive_grad->stride;
  Reduction r{stride[2] == 0, stride[3] == 0, {0, p.B}, {0, p.H}, {0, p.M}, {0, p.N}};
  const auto take = [&task](bool summed, int64_t blocks, int64_t block, Range& range) {
    if (summed) return;
    const int64_t i = task % blocks;
    task /= blocks;
    range = {i * block, min_of(range.hi, (i + 1) * block)};
  };
  take(r.sum_keys, ceil_div(p.N, f.bn), f.bn, r.key);
  take(r.sum_rows, f.blocks, f.bm, r.row);
  take(stride[1] == 0, p.H, 1, r.h);
  take(stride[0] == 0, p.B, 1, r.b);
  return r;
}

// acc [rows or 1, keys or 1] += dS of one tile, in double: the sum of very many terms that nearly cancel.
template <class T>
[[maybe_unused]] static void reduce_tile(const Reduction& r, const Tile& t, const T* ds, int64_t ld, double* acc) {
  for (int i = 0; i < t.rows; ++i) {
    const T* from = ds + i * ld;
    double* to = acc + (r.sum_rows ? 0 : i * ld);
    if (r.sum_keys) {
      double sum = 0;
      for (int j = 0; j < t.keys; ++j) sum += static_cast<double>(from[j]);
      to[0] += sum;
    } else {
      for (int j = 0; j < t.keys; ++j) to[j] += static_cast<double>(from[j]);
    }
  }
}

template <class T>
[[maybe_unused]] static void bias_grad_task(const void* plan, int64_t task, char* scratch) {
  const Plan<T>& f = *static_cast<const Plan<T>*>(plan);
  const Reduction r = make_reduction(f, task);
  Arena arena{reinterpret_cast<uintptr_t>(scratch)};
  const Scratch<T> w(f, arena);
  double* acc = arena.take<double>(f.bm * f.lds);
  for (int64_t i = 0; i < f.bm * f.lds; ++i) acc[i] = 0;
  Tile t;
  for (int64_t b = r.b.lo; b < r.b.hi; ++b) {
    for (int64_t h = r.h.lo; h < r.h.hi; ++h) {
      const Problem x = make_problem(f.p, b, h);
      for (int64_t row = r.row.lo; row < r.row.hi; row += f.bm) {
        const int rows = static_cast<int>(min_of<int64_t>(f.bm, r.row.hi - row));
        bool packed = false;
        int keys;
        for (int64_t key = r.key.lo; key < r.key.hi; key += keys) {
          keys = static_cast<int>(cut_keys(f.p, key, min_of<int64_t>(f.bn, r.key.hi - key)));
          if (!make_tile(x, row, rows, key, keys, t)) continue;
          if (!packed) pack_queries(w.q, f.ldq, x, row, rows), pack_dout(x, f, row, rows, w);
          packed = true;
          pack_keys(x, f, key, keys, w);
          pack_values(x, f, key, keys, w);
          score_gradient<T>(x, f, t, w, false);
          reduce_tile(r, t, w.dp, f.lds, r.sum_keys ? acc : acc + (key - r.key.lo));
        }
      }
    }
  }
  const Tensor& g = *f.additive_grad;
  const int64_t rows = r.sum_rows ? 1 : r.row.hi - r.row.lo, keys = r.sum_keys ? 1 : r.key.hi - r.key.lo;
  for (int64_t i = 0; i < rows; ++i) {
    T* to = element<T>(g, r.b.lo, r.h.lo, r.row.lo + i) + r.key.lo * g.stride[3];
    for (int64_t j = 0; j < keys; ++j) to[j * g.stride[3]] = static_cast<T>(acc[i * f.lds + j]);
  }
}

template <class T>
[[maybe_unused]] static bool bias_grad(Plan<T>& f, const Tensor& g, double work) {
  const AttentionParams& p = f.p;
  f.additive_grad = &g;
  const int64_t tasks = (g.stride[0] ? p.B : 1) * (g.stride[1] ? p.H : 1) * (g.stride[2] ? f.blocks : 1) *
                        (g.stride[3] ? ceil_div(p.N, f.bn) : 1);
  Arena count{0};
  Scratch<T> layout(f, count);
  count.take<double>(f.bm * f.lds);
  return run_tasks(tasks, p.threads, work, count.used, bias_grad_task<T>, &f);
}

FA_END
