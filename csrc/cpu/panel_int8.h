// Scores of queries and keys that are rounded to 8 bits, for the forward pass on packed panels (opt-in):
//
//   k' = k - mean(k) over the keys of its head;   q ~ a_i q8_i,  k' ~ b_j k8_j,  a = max|q_i| / 127,  b = max|k'_j| / 127
//   q_i.k_j = a_i b_j (q8_i.k8_j) + q_i.mean(k)
//
// What all keys have in common costs no bits that way (Zhang et al., "SageAttention", 2024); a row's own term is added in
// float32, so that scores, and lse, are those of k. The mean is over the keys that key_lengths leaves.
//
// The codes lie as bf16 numbers would that are half as many: two columns in the place of one (panels.h).
#pragma once
#include "panel_softmax.h"

FA_BEGIN

FA_INLINE int64_t codes_width(int64_t columns) { return round_up(columns, kTileBytes); }

// A row of float32 as codes [width], zeros past its columns; returns the scale.
FA_INLINE float quantise_row(const float* x, int64_t columns, int64_t width, int8_t* codes) {
  float largest = 0;
  for (int64_t j = 0; j < columns; ++j) largest = max_of(largest, __builtin_fabsf(x[j]));
  const float scale = largest / 127, inverse = largest > 0 ? 127 / largest : 0;
  for (int64_t j = 0; j < columns; ++j) codes[j] = static_cast<int8_t>(__builtin_lrintf(x[j] * inverse));
  for (int64_t j = columns; j < width; ++j) codes[j] = 0;
  return scale;
}

struct Int8Keys {
  static constexpr int kChunk = 8;  // panels of a task
  AttentionParams p;
  Panels panels;
  int64_t width;
  char* memory = nullptr;
  uint16_t* codes;      // [HK, panels, 32 * width] of i8: as_rows
  float *scale, *mean;  // [HK, panels, 32]; [B, HK, D]

  int64_t panel_size() const { return kPanel * width / 2; }
  int64_t chunks() const { return ceil_div(panels.each, kChunk); }
  const uint16_t* panel(int64_t b, int64_t head, int64_t at) const {
    return codes + (panels.of(b, head) + at) * panel_size();
  }
  const float* scales(int64_t b, int64_t head, int64_t at) const { return scale + (panels.of(b, head) + at) * kPanel; }
  float* mean_of(int64_t b, int64_t head) const { return mean + (b * p.HK + head) * p.D; }
};

[[maybe_unused]] static void key_mean_task(const void* plan, int64_t task, char*) {
  const Int8Keys& f = *static_cast<const Int8Keys*>(plan);
  const AttentionParams& p = f.p;
  const int64_t b = task / p.HK, head = task % p.HK;
  const Problem x = make_problem(p, b, head * (p.H / p.HK));
  double sum[kMaxHeadDim] = {};
  float line[kMaxHeadDim];
  for (int64_t key = 0; key < x.seen; ++key) {
    load_row(line, row_address(p.k, x, head, x.key0 + key), p.k.dtype, p.D);
    for (int64_t j = 0; j < p.D; ++j) sum[j] += static_cast<double>(line[j]);
  }
  float* mean = f.mean_of(b, head);
  for (int64_t j = 0; j < p.D; ++j)
    mean[j] = static_cast<float>(sum[j] / static_cast<double>(max_of<int64_t>(x.seen, 1)));
}

[[maybe_unused]] static void key_codes_task(const void* plan, int64_t task, char* scratch) {
  const Int8Keys& f = *static_cast<const Int8Keys*>(plan);
  const AttentionParams& p = f.p;
  const int64_t chunk = task % f.chunks(), head = task / f.chunks() % p.HK, b = task / f.chunks() / p.HK;
  const Problem x = make_problem(p, b, head * (p.H / p.HK));
  const float* mean = f.mean_of(b, head);
  int8_t* strip = reinterpret_cast<int8_t*>(scratch);
  float line[kMaxHeadDim];
  for (int64_t panel = chunk * Int8Keys::kChunk; panel < (chunk + 1) * Int8Keys::kChunk; ++panel) {
    if (panel * kPanel >= x.seen) break;
    const int64_t at = f.panels.of(b, head) + panel;
    for (int i = 0; i < kPanel; ++i) {
      const int64_t key = panel * kPanel + i, columns = key < x.seen ? p.D : 0;
      if (columns) load_row(line, row_address(p.k, x, head, x.key0 + key), p.k.dtype, p.D);
      for (int64_t j = 0; j < columns; ++j) line[j] -= mean[j];
      f.scale[at * kPanel + i] = quantise_row(line, columns, f.width, strip + i * f.width);
      for (int64_t j = 0; j < f.width; ++j) strip[i * f.width + j] ^= static_cast<int8_t>(kCodeZero);
    }
    as_rows(f.codes + at * f.panel_size(), reinterpret_cast<const uint16_t*>(strip), f.width / 2);
  }
}

// All keys as codes; the caller releases f.memory.
[[maybe_unused]] static bool quantise_keys(Int8Keys& f, const AttentionParams& p) {
  f.p = p, f.panels = make_panels(p.cu_seqlens_k, p.B, p.N), f.width = codes_width(p.D);
  const int64_t panels = p.HK * f.panels.per_head, codes = panels * kPanel * f.width;
  const int64_t floats = panels * kPanel + p.B * p.HK * p.D;
  f.memory = static_cast<char*>(allocate(static_cast<size_t>(codes) + sizeof(float) * static_cast<size_t>(floats)));
  if (!f.memory) return false;
  f.codes = reinterpret_cast<uint16_t*>(f.memory);
  f.scale = reinterpret_cast<float*>(f.memory + codes), f.mean = f.scale + panels * kPanel;
  const double work = static_cast<double>(codes);
  return run_tasks(p.B * p.HK, p.threads, work, 0, key_mean_task, &f) &&
         run_tasks(p.B * p.HK * f.chunks(), p.threads, work, static_cast<size_t>(kPanel * f.width), key_codes_task, &f);
}

// What scores_of_codes knows of a row of queries: its scale, q.mean(k), and what its products hold too much.
struct Int8Rows {
  float *scale, *common;
  int32_t* excess;
};

// A panel of queries: codes as B = Q^T (quadruples of columns), and what is known of its rows.
[[maybe_unused]] static void quantise_queries(const Int8Keys& f, const Problem& x, int64_t row, int rows, bool negate,
                                              uint16_t* strip, uint16_t* codes, const Int8Rows& to) {
  const AttentionParams& p = f.p;
  const float* mean = f.mean_of(x.b, x.hk);
  float line[kMaxHeadDim];
  for (int i = 0; i < kPanel; ++i) {
    const int64_t columns = i < rows ? p.D : 0;
    if (columns) load_row(line, row_address(p.q, x, x.h, x.row0 + row + i), p.q.dtype, p.D);
    float sum = 0, finite = 0;
    for (int64_t j = 0; j < columns; ++j) {
      line[j] = negate ? -line[j] : line[j];
      sum += line[j] * mean[j], finite += line[j] * 0.0f;
    }
    if (finite != 0.0f)  // NaN or an infinity: a row of NaN
      for (int64_t j = 0; j < columns; ++j) line[j] = 0;
    int8_t* own = reinterpret_cast<int8_t*>(strip) + i * f.width;
    to.scale[i] = quantise_row(line, columns, f.width, own);
    to.common[i] = sum + finite, to.excess[i] = 0;
    for (int64_t j = 0; j < columns; ++j) to.excess[i] += kCodeZero * own[j];
  }
  pairs_of_columns(codes, strip, f.width / 2);
}

// S^T of an item, from integers to scores. b: the scales of its keys from the item's first on.
FA_OUTLINE void scores_of_codes(const Item& it, float* s, const Int8Rows& a, const float* b) {
  for (int l = 0; l < kLanes; ++l) {
    const Vec<float> row = load<float>(a.scale + l * VL<float>), own = load<float>(a.common + l * VL<float>);
    IVec<float> excess;
    __builtin_memcpy(&excess, a.excess + l * VL<float>, sizeof excess);
    for (int j = it.first * kPanel; j < it.last * kPanel; ++j) {
      float* at = s + j * kPanel + l * VL<float>;
      const Vec<float> product = __builtin_convertvector(bits<float>(load<float>(at)) - excess, Vec<float>);
      store<float>(at, product * (row * b[j - it.first * kPanel]) + own);
    }
  }
}

FA_END
