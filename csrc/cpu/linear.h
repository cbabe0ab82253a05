// A projection: Y [rows, out] = X [rows, in] W^T + b, as torch.nn.functional.linear has it, for a module's small calls.
//
// One task per block of rows and 96 columns of Y. Slices of X and of W, so many terms each, are packed as the products
// read them (gemm.h; of bfloat16 products.h, where the processor has such) and added up in C, which stays in L2.
#pragma once
#if defined(FA_PRODUCTS)
  #include "panels.h"
#endif
#include "pack.h"
#include "threads.h"

FA_BEGIN

constexpr int kLinearRows = 192, kLinearColumns = 96, kLinearTerms = 256;  // whole panels of every MR and NR, and of 32

struct Linear {
  LinearParams p;
  int64_t step, blocks;  // rows of a block, and blocks of rows
};

struct LinearBlock {
  int64_t row, column;
  int rows, columns;
};
FA_INLINE LinearBlock linear_block(const Linear& f, int64_t task) {
  const int64_t row = task % f.blocks * f.step, column = task / f.blocks * kLinearColumns;
  return {row, column, static_cast<int>(min_of(f.step, f.p.rows - row)),
          static_cast<int>(min_of<int64_t>(kLinearColumns, f.p.out - column))};
}
FA_INLINE char* linear_row(const Tensor& t, int64_t row, int64_t at) {
  return static_cast<char*>(t.data) + (row * t.stride[0] + at) * size_of(t.dtype);
}

// c [rows, ld] + b goes out.
template <class T>
[[maybe_unused]] static void store_linear(const LinearParams& p, const LinearBlock& n, T* c, int64_t ld, T* bias) {
  if (p.b.data) load_row(bias, linear_row(p.b, 0, n.column), p.b.dtype, n.columns);
  for (int i = 0; i < n.rows; ++i) {
    T* row = c + i * ld;
    if (p.b.data)
      for (int j = 0; j < n.columns; ++j) row[j] += bias[j];
    store_row(linear_row(p.y, n.row + i, n.column), p.y.dtype, row, T(1), n.columns);
  }
}

template <class T>
struct LinearScratch {
  int64_t ldx, ldc;
  T *x, *w, *c, *strip, *bias;
  LinearScratch(const Linear& f, Arena& a) {
    const int64_t terms = min_of<int64_t>(f.p.in, kLinearTerms);
    ldx = padded<T>(terms), ldc = padded<T>(kLinearColumns);
    x = a.template take<T>(round_up(f.step, MR) * ldx);
    w = a.template take<T>(terms * ldc);
    c = a.template take<T>(round_up(f.step, MR) * ldc);
    strip = a.template take<T>(VL<T> * ldx);
    bias = a.template take<T>(kLinearColumns);
  }
};

template <class T>
[[maybe_unused]] static void linear_task(const void* plan, int64_t task, char* scratch) {
  const Linear& f = *static_cast<const Linear*>(plan);
  const LinearParams& p = f.p;
  const LinearBlock n = linear_block(f, task);
  Arena arena{reinterpret_cast<uintptr_t>(scratch)};
  const LinearScratch<T> w(f, arena);
  const int width = static_cast<int>(round_up(n.columns, NR<T>)), piece = 64;  // of a chain, as of a score (tiles.h)
  for (int64_t from = 0; from < p.in; from += kLinearTerms) {
    const int terms = static_cast<int>(min_of<int64_t>(kLinearTerms, p.in - from));
    pack_transposed(w.w, w.ldc, linear_row(p.w, n.column, from), p.w.dtype, p.w.stride[0], n.columns, terms, w.strip);
    pack_panels(w.x, w.ldx, linear_row(p.x, n.row, from), p.x.dtype, p.x.stride[0], n.rows, terms, T(1));
    for (int i = 0; i < terms; i += piece) {
      const int k = min_of(piece, terms - i);
      const T *a = w.x + i, *b = w.w + i * w.ldc;
      if (from + i == 0)
        gemm<T, false, Into::store>(n.rows, width, k, a, w.ldx, b, w.ldc, w.c, w.ldc, nullptr, nullptr, nullptr);
      else
        gemm<T, false, Into::add>(n.rows, width, k, a, w.ldx, b, w.ldc, w.c, w.ldc, nullptr, nullptr, nullptr);
    }
  }
  store_linear<T>(p, n, w.c, w.ldc, w.bias);
}

#if defined(FA_PRODUCTS)
constexpr int kLinearPairs = 512;  // terms of a slice in bfloat16

struct LinearPanels {
  int64_t width, ldc;
  uint16_t *x, *w, *strip;
  float *c, *bias;
  LinearPanels(const Linear& f, Arena& a) {
    width = panel_width(min_of<int64_t>(f.p.in, kLinearPairs)), ldc = padded<float>(kLinearColumns);
    x = a.take<uint16_t>(kPanel * width);
    w = a.take<uint16_t>(kLinearColumns * width);
    strip = a.take<uint16_t>(kPanel * width);
    c = a.take<float>(round_up(f.step, kPanel) * ldc);
    bias = a.take<float>(kLinearColumns);
  }
};

[[maybe_unused]] static void linear_panels_task(const void* plan, int64_t task, char* scratch) {
  const Linear& f = *static_cast<const Linear*>(plan);
  const LinearParams& p = f.p;
  const LinearBlock n = linear_block(f, task);
  Arena arena{reinterpret_cast<uintptr_t>(scratch)};
  const LinearPanels w(f, arena);
  tiles_begin();
  for (int64_t from = 0; from < p.in; from += kLinearPairs) {
    const int64_t terms = min_of<int64_t>(kLinearPairs, p.in - from), width = panel_width(terms);
    for (int j = 0; j < n.columns; j += kPanel) {
      load_strip(w.strip, width, linear_row(p.w, n.column + j, from), DType::bf16, p.w.stride[0],
                 min_of(kPanel, n.columns - j), terms, false);
      pairs_of_columns(w.w + j * width, w.strip, width);
    }
    for (int i = 0; i < n.rows; i += kPanel) {
      const int rows = min_of(kPanel, n.rows - i);
      load_strip(w.strip, width, linear_row(p.x, n.row + i, from), DType::bf16, p.x.stride[0], rows, terms, false);
      as_rows(w.x, w.strip, width);
      for (int j = 0; j < n.columns; j += kPanel)
        multiply<false>({rows_operand(w.x, width), column_pairs_operand(w.w + j * width, width), w.c + i * w.ldc + j,
                         w.ldc * 4, kTileRows * w.ldc, kTileRows, static_cast<int>(width / 32), 1, from > 0, false,
                         rows});
    }
  }
  tiles_end();
  store_linear<float>(p, n, w.c, w.ldc, w.bias);
}
#endif

// X, W, b and Y are of one dtype; `in` is not 0.
[[maybe_unused]] static bool linear(const LinearParams& p) {
  Linear f{p, kLinearRows, 1};
  const int64_t across = ceil_div(p.out, kLinearColumns), wanted = p.threads > 1 ? 2 * p.threads : 1;
  while (f.step > 48 && ceil_div(p.rows, f.step) * across < wanted) f.step /= 2;
  f.step = min_of(f.step, p.rows);
  f.blocks = ceil_div(p.rows, max_of<int64_t>(f.step, 1));
  const double work = static_cast<double>(p.rows) * static_cast<double>(p.in) * static_cast<double>(p.out);
  Arena count{0};
  Task task = linear_task<float>;
  bool packed = false;
#if defined(FA_PRODUCTS)
  if (p.x.dtype == DType::bf16) {
    LinearPanels layout(f, count);
    task = linear_panels_task, packed = true;
  }
#endif
  if (p.x.dtype == DType::f64) {
    LinearScratch<double> layout(f, count);
    task = linear_task<double>;
  } else if (!packed) {
    LinearScratch<float> layout(f, count);
  }
  return run_tasks(f.blocks * across, p.threads, work, count.used, task, &f);
}

FA_END
