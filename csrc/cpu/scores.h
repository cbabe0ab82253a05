// From the products x = (scale q).k of a tile to final scores, and from those to probabilities.
//
//   s = c tanh(x / c) - slope |row + diagonal - column| + mask + bias,  -inf where hidden, whatever x is
#pragma once
#include "problem.h"

FA_BEGIN

template <class T>
struct RowBuffers {  // one row of a tile each, [kMaxKeys + 16]
  T *mask, *bias;    // under a tree, which comes without a mask: mask holds where the keys stand
};

// Whether the products are the scores already.
FA_INLINE bool plain_scores(const AttentionParams& p) {
  return p.softcap == 0.0 && !p.mask.data && !p.bias.data && !p.alibi.data && !p.tree.data;
}

// s[j] += a[j], where -inf hides even a NaN.
template <class T>
FA_INLINE void add_hiding(T* __restrict s, const T* __restrict a, int lo, int hi) {
  for (int j = lo; j < hi; ++j) s[j] = a[j] == -kInf<T> ? -kInf<T> : s[j] + a[j];
}

template <class T>
FA_INLINE void softcap_row(T* s, T* slope, int lo, int hi, T cap) {
  for (int j = lo; j < hi; j += VL<T>) {
    const Vec<T> t = vtanh<T>(load<T>(s + j) / cap);
    store<T>(s + j, t * cap);
    if (slope) store<T>(slope + j, 1 - t * t);
  }
}

// One row of one additive tensor into buf [0, keys); rows that share it (row stride 0) reuse the first.
template <class T>
FA_INLINE void load_additive(const Problem& x, const Tensor& a, const Tile& t, int i, T* buf) {
  if (i > 0 && a.stride[2] == 0) return;
  load_strided(buf, address(a, x.b, x.h, t.row + i, t.key), a.dtype, a.stride[3], t.keys);
}

// How deep row r of a tree is: how many rows it sees beside itself.
FA_INLINE int64_t tree_depth(const Problem& x, int64_t r) {
  int64_t depth = -1;
  for (int64_t j = 0; j < x.rows; ++j) depth += *address(x.p->tree, x.b, r, j) != 0;
  return depth;
}

// Where the keys of a tile stand, counted from the first token of the tree.
template <class T>
FA_INLINE void tree_positions(const Problem& x, const Tile& t, T* at) {
  const int64_t before = x.seen - x.rows - t.key;
  for (int j = 0; j < t.keys; ++j)
    at[j] = static_cast<T>(j < before ? j - before : tree_depth(x, min_of<int64_t>(j - before, x.rows - 1)));
}

// What a tree mask makes of row i, given where keys stand: distances for ALiBi and the window; hidden are other branches,
// and all from a row that does not exist: one that stands before the first key.
template <class T>
FA_INLINE void tree_row(const Problem& x, const Tile& t, int i, T* row, Span own, T alibi, const T* at) {
  const int64_t first = x.seen - x.rows, r = t.row + i, before = first - t.key;
  const T depth = static_cast<T>(tree_depth(x, r)), left = static_cast<T>(x.p->window_left);
  const bool exists = first + r >= 0;
  for (int j = own.lo; j < own.hi; ++j) {
    const T away = depth - at[j];
    const bool seen = exists && (j < before || *address(x.p->tree, x.b, r, j - before) != 0);
    row[j] = seen && (left < 0 || away <= left) ? row[j] - alibi * (away < 0 ? -away : away) : -kInf<T>;
  }
}

// Finishes a tile s [rows, ld]. Each row is defined on the span of its panel, rounded out to whole vectors, and -inf
// there outside of the row's own span.
// slope (with softcap; may be null): [rows, ld], d(c tanh(y / c)) / dy.
template <class T>
[[maybe_unused]] static void finish_scores(const Problem& x, const Tile& t, T* s, int64_t ld, T* slope,
                                           const RowBuffers<T>& buf) {
  const AttentionParams& p = *x.p;
  const bool plain = plain_scores(p);
  const T alibi = p.alibi.data ? static_cast<T>(*reinterpret_cast<const float*>(address(p.alibi, x.b, x.h, 0))) : T(0);
  if (p.tree.data) tree_positions<T>(x, t, buf.mask);
  for (int i = 0; i < t.rows; ++i) {
    T* row = s + i * ld;
    const Span own = row_span(t, i), all = panel_span(t, i);
    const int from = all.lo / VL<T> * VL<T>, to = static_cast<int>(round_up(all.hi, VL<T>));
    if (!plain) {
      if (p.softcap != 0.0) softcap_row<T>(row, slope ? slope + i * ld : nullptr, from, to, static_cast<T>(p.softcap));
      if (p.alibi.data && !p.tree.data) {
        const T center = static_cast<T>(t.row + i + x.diagonal - t.key);
        for (int j = own.lo; j < own.hi; ++j) {
          const T away = center - static_cast<T>(j);
          row[j] -= alibi * (away < 0 ? -away : away);
        }
      }
      if (p.mask.data) {
        load_additive(x, p.mask, t, i, buf.mask);
        add_hiding(row, buf.mask, own.lo, own.hi);
      }
      if (p.bias.data) {
        load_additive(x, p.bias, t, i, buf.bias);
        add_hiding(row, buf.bias, own.lo, own.hi);
      }
      if (p.tree.data) tree_row<T>(x, t, i, row, own, alibi, buf.mask);
    }
    for (int j = from; j < own.lo; ++j) row[j] = -kInf<T>;
    for (int j = own.hi; j < to; ++j) row[j] = -kInf<T>;
  }
}

// p = exp(s - lse) in place on [from, to); a row with lse = -inf has no probability anywhere.
template <class T>
FA_INLINE void probabilities_row(T* s, int from, int to, T lse) {
  const T shift = lse == -kInf<T> ? kInf<T> : lse;
  for (int j = from; j < to; j += VL<T>) store<T>(s + j, vexp<T>(load<T>(s + j) - shift));
}

FA_END
