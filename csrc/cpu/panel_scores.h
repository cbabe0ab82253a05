// From the products of an item, S^T [keys, 32], to its scores: what scores.h does to rows, where a lane is a row.
//
//   s = c tanh(x / c) - slope |row + diagonal - column| + mask + bias,  x the product times |scale|
//
// All but tree masks, whose distances are found row by row.
#pragma once
#include "panel_softmax.h"

FA_BEGIN

// What a softmax gets: products need no more than their scale, and not 0, which would make NaN of what is hidden.
FA_INLINE Scores scores_of(const AttentionParams& p) {
  return plain_scores(p) && p.scale != 0.0 ? Scores::products : Scores::scores;
}
FA_INLINE float exponent_factor(const AttentionParams& p) {
  return static_cast<float>((scores_of(p) == Scores::products ? __builtin_fabs(p.scale) : 1.0) / kLn2);
}

constexpr int64_t kLine = kKeyBlock + 16;  // of a mask's row in its buffer

// Asks for what an item to come adds: pieces of rows far apart, which the processor does not guess. Into L2, because rows
// that lie a power of two apart share few places in L1.
FA_INLINE void fetch_for_panel(const Tensor& a, const Problem& x, const Item& it) {
  if (!a.data || a.stride[3] != 1) return;
  const int64_t size = size_of(a.dtype), from = it.first * kPanel,
                to = min_of<int64_t>(it.last * kPanel, x.keys - it.key);
  for (int i = 0; i < (a.stride[2] == 0 ? 1 : it.rows); ++i) {
    const char* row = address(a, x.b, x.h, it.row + i, it.key);
    for (int64_t at = from * size; at < to * size; at += 64) __builtin_prefetch(row + at, 0, 2);
  }
}

FA_INLINE Vec<float> add_or_hide(Vec<float> s, Vec<float> a) {
  return a == -kInf<float> ? splat<float>(-kInf<float>) : s + a;
}

// One additive tensor. lines: [32, kLine].
[[maybe_unused]] static void add_to_panel(const Problem& x, const Tensor& a, const Item& it, float* lines, float* s) {
  const int from = it.first * kPanel, to = it.last * kPanel;
  const int64_t there = max_of<int64_t>(min_of<int64_t>(to - from, x.keys - it.key - from), 0);
  const bool shared = a.stride[2] == 0;
  for (int i = 0; i < (shared ? 1 : kPanel); ++i) {
    float* line = lines + i * kLine;
    const int64_t n = i < it.rows ? there : 0;
    if (n) load_strided(line, address(a, x.b, x.h, it.row + i, it.key + from), a.dtype, a.stride[3], n);
    for (int64_t j = n; j < to - from; ++j) line[j] = 0;
  }
  if (shared) {
    for (int j = from; j < to; ++j)
      for (int l = 0; l < kPanel; l += VL<float>)
        store<float>(s + j * kPanel + l, add_or_hide(load<float>(s + j * kPanel + l), splat<float>(lines[j - from])));
    return;
  }
  for (int l = 0; l < kPanel; l += VL<float>)
    for (int j = from; j < to; j += VL<float>) {
      Vec<float> square[VL<float>];
#pragma GCC unroll 16
      for (int i = 0; i < VL<float>; ++i) square[i] = load<float>(lines + (l + i) * kLine + j - from);
      transpose_vectors<float>(square);
#pragma GCC unroll 16
      for (int i = 0; i < VL<float>; ++i) {
        float* at = s + (j + i) * kPanel + l;
        store<float>(at, add_or_hide(load<float>(at), square[i]));
      }
    }
}

[[maybe_unused]] static void finish_panel(const Problem& x, const Item& it, float scale, float* lines, float* s) {
  const AttentionParams& p = *x.p;
  const float cap = static_cast<float>(p.softcap);
  const float slope = p.alibi.data ? *reinterpret_cast<const float*>(address(p.alibi, x.b, x.h, 0)) : 0.0f;
  for (int l = 0; l < kPanel; l += VL<float>) {
    Vec<float> center{};
    for (int i = 0; i < VL<float>; ++i) center[i] = static_cast<float>(it.row + l + i + x.diagonal - it.key);
    for (int j = it.first * kPanel; j < it.last * kPanel; ++j) {
      Vec<float> y = load<float>(s + j * kPanel + l) * scale;
      if (p.softcap != 0.0) y = vtanh<float>(y / cap) * cap;
      if (p.alibi.data) {
        const Vec<float> away = center - static_cast<float>(j);
        y -= slope * (away < 0 ? -away : away);
      }
      store<float>(s + j * kPanel + l, y);
    }
  }
  if (p.mask.data) add_to_panel(x, p.mask, it, lines, s);
  if (p.bias.data) add_to_panel(x, p.bias, it, lines, s);
}

FA_END
