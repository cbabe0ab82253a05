// A tile of probabilities again, from q, k and lse, and the gradient of its scores: what delta, dQ / dK / dV and the
// gradients of mask and bias share.
//
//   P  = exp(S - lse),  T = dropout factors
//   dP = (dO V^T + dW) * T
//   dS = P * (dP - delta),   delta = rowsum(dO * O) + rest,   rest = rowsum(P * T * dW) - dlse
//
// computed as P * ((dO V^T * T - rowsum(dO * O)) + (dW * T - rest)), because the first two may cancel.
#pragma once
#include "pack.h"
#include "scores.h"
#include "threads.h"

FA_BEGIN

template <class T>
struct Plan {
  AttentionParams p;
  int bm, bn;
  int64_t blocks;         // of rows
  int64_t ldq, ldv, lds;  // row strides of packed [., D], [., DV] and [., keys]
  // dQ, dK and dV only:
  int64_t chunks, chunk_keys;   // tasks per (batch, key head), keys in each
  int64_t first_pair;           // (batch, key head) pairs of this wave start here
  int64_t partial_rows;         // rows of a partial sum of dQ, padded
  T* partial;                   // [pair, chunks, group, partial_rows, ldq]
  const Tensor* additive_grad;  // dmask or dbias
  T* rest;                      // [B, H, M], or null: 0
};

template <class T>
static Plan<T> make_plan(const AttentionParams& p) {
  Plan<T> f{};
  f.p = p;
  const Blocks most = backward_blocks<T>(p.D, p.DV);
  f.bm = even_rows(p.M, most.m);
  f.bn = static_cast<int>(min_of<int64_t>(most.n, max_of<int64_t>(round_up(p.N, NR<T>), NR<T>)));
  f.blocks = ceil_div(p.M, f.bm);
  f.ldq = padded<T>(p.D), f.ldv = padded<T>(p.DV), f.lds = padded<T>(f.bn);
  return f;
}

template <class T>
struct Scratch {
  T *q, *dout, *kt, *vt, *s, *dp, *slope, *strip, *keep, *dw;
  RowBuffers<T> row;
  Scratch(const Plan<T>& f, Arena& a) {
    q = a.template take<T>(f.bm * f.ldq);
    dout = a.template take<T>(f.bm * f.ldv);
    kt = a.template take<T>(f.p.D * f.lds);
    vt = a.template take<T>(f.p.DV * f.lds);
    s = a.template take<T>(f.bm * f.lds + MR);  // read as [keys, rows] in panels of MR keys
    dp = a.template take<T>(f.bm * f.lds + MR);
    slope = f.p.softcap != 0.0 ? a.template take<T>(f.bm * f.lds) : nullptr;
    strip = a.template take<T>(VL<T> * max_of(f.ldq, f.ldv));
    keep = a.template take<T>(kMaxKeys + 16);
    dw = a.template take<T>(kMaxKeys + 16);
    row.mask = a.template take<T>(kMaxKeys + 16);
    row.bias = a.template take<T>(kMaxKeys + 16);
  }
};

template <class T>
[[maybe_unused]] static void pack_dout(const Problem& x, const Plan<T>& f, int64_t row, int rows, const Scratch<T>& w) {
  const Tensor& g = f.p.dout;
  if (g.data)
    pack_panels(w.dout, f.ldv, row_address(g, x, x.h, x.row0 + row), g.dtype, g.stride[2], rows, f.p.DV, T(1));
  else
    __builtin_memset(w.dout, 0, sizeof(T) * static_cast<size_t>(f.bm * f.ldv));
}
template <class T>
[[maybe_unused]] static void pack_keys(const Problem& x, const Plan<T>& f, int64_t key, int keys, const Scratch<T>& w) {
  const Tensor& k = f.p.k;
  pack_transposed(w.kt, f.lds, row_address(k, x, x.hk, x.key0 + key), k.dtype, k.stride[2], keys, f.p.D, w.strip);
}
template <class T>
[[maybe_unused]] static void pack_values(const Problem& x, const Plan<T>& f, int64_t key, int keys,
                                         const Scratch<T>& w) {
  const Tensor& v = f.p.v;
  pack_transposed(w.vt, f.lds, row_address(v, x, x.hk, x.key0 + key), v.dtype, v.stride[2], keys, f.p.DV, w.strip);
}

FA_INLINE int64_t rest_index(const Problem& x, int64_t row) { return (x.b * x.p->H + x.h) * x.p->M + row; }

FA_INLINE Span whole_vectors(Span s, int vector) {
  return {s.lo / vector * vector, static_cast<int>(round_up(s.hi, vector))};
}

// s = P on the tile from the products s and lse: defined on the span of each row's panel, rounded out to whole vectors.
template <class T>
[[maybe_unused]] static void finish_probabilities(const Problem& x, const Plan<T>& f, const Tile& t,
                                                  const Scratch<T>& w) {
  finish_scores<T>(x, t, w.s, f.lds, w.slope, w.row);
  for (int i = 0; i < t.rows; ++i) {
    const Span v = whole_vectors(panel_span(t, i), VL<T>);
    const int64_t at = x.row0 + t.row + i;
    probabilities_row<T>(w.s + i * f.lds, v.lo, v.hi, *element<T>(f.p.lse, x.batch, x.h, at));
  }
}

// The same from the packed q and k.
template <class T>
[[maybe_unused]] static void probabilities(const Problem& x, const Plan<T>& f, const Tile& t, const Scratch<T>& w) {
  score_products<T>(f.p.M, f.p.N, t.rows, t.keys, static_cast<int>(f.p.D), w.q, f.ldq, w.kt, f.lds, w.s, f.lds,
                    t.panels(), score_factor<T>(f.p));
  finish_probabilities<T>(x, f, t, w);
}

// The dropout factors of row i of a tile in w.keep, over the whole vectors of its panel.
template <class T>
FA_INLINE void keep_row(const Problem& x, const Tile& t, int i, Span v, const Scratch<T>& w) {
  Philox g = dropout_state(x);
  g.row = static_cast<uint32_t>(t.row + i);
  const int from = v.lo / 16 * 16;
  dropout_row<T>(g, t.key + from, v.hi - from, dropout_keep<T>(*x.p), w.keep + from);
}

// The incoming gradient of the weights of row i in w.dw, likewise; 0 where the row sees nothing.
template <class T>
FA_INLINE void dweights_row(const Problem& x, const Tile& t, int i, Span v, const Scratch<T>& w) {
  const Tensor& g = x.p->dweights;
  const Span own = row_span(t, i);
  const T share = x.p->weights_mode == Weights::mean ? T(1) / static_cast<T>(x.p->H) : T(1);
  for (int j = v.lo; j < v.hi; ++j) w.dw[j] = 0;
  if (!g.data) return;
  load_strided(w.dw + own.lo, address(g, x.batch, x.h, t.row + i, t.key + own.lo), g.dtype, g.stride[3],
               own.hi - own.lo);
  for (int j = own.lo; j < own.hi; ++j) w.dw[j] *= share;
}

// Row i: s = P becomes dropout(P), dp = dO V^T becomes dS. What is hidden, or has no weight, gets exactly 0,
// whatever its V or dO holds.
template <class T>
FA_INLINE void gradient_row(T* s, T* dp, const T* slope, const T* keep, const T* dw, Span v, T delta, T rest) {
  for (int j = v.lo; j < v.hi; j += VL<T>) {
    const Vec<T> p = load<T>(s + j);
    Vec<T> d = load<T>(dp + j), e = dw ? load<T>(dw + j) : Vec<T>{};
    if (keep) {
      const Vec<T> factor = load<T>(keep + j);
      d *= factor;
      e *= factor;
      store<T>(s + j, p * factor);
    }
    d -= delta;
    if (dw) d += e - rest;
    d *= p;
    if (slope) d *= load<T>(slope + j);
    store<T>(dp + j, p == 0 ? Vec<T>{} : d);
  }
}

// The same for a row all of whose keys lie in this tile. Its delta is summed here, from P and not from a rounded O:
// exact where the row sees one key, in any dtype and with dropout, as short rows would otherwise not be.
// lse is rounded, by more the larger it is, so P does not add up to 1: it is divided by its sum and the sink's share,
// or dP - delta would not cancel.
template <class T>
FA_INLINE void gradient_whole_row(T* s, T* dp, const T* slope, const T* keep, const T* dw, Span v, T dlse, T sink) {
  Vec<T> total{};
  for (int j = v.lo; j < v.hi; j += VL<T>) total += load<T>(s + j);
  const T weight = reduce_add<T>(total) + sink;
  const T divisor = weight > T(0) ? weight : T(1);
  Vec<T> sum{};
  for (int j = v.lo; j < v.hi; j += VL<T>) {
    const Vec<T> p =
        load<T>(s + j) / divisor;  // a key alone has the weight 1 exactly, as it would not with 1 / divisor
    Vec<T> d = load<T>(dp + j);
    if (dw) d += load<T>(dw + j);
    if (keep) d *= load<T>(keep + j);
    d = p == 0 ? Vec<T>{} : d;
    store<T>(s + j, p);
    store<T>(dp + j, d);
    sum += p * d;
  }
  const T delta = reduce_add<T>(sum);
  for (int j = v.lo; j < v.hi; j += VL<T>) {
    const Vec<T> p = load<T>(s + j);
    Vec<T> d = p * ((load<T>(dp + j) - delta) + dlse);
    if (slope) d *= load<T>(slope + j);
    if (keep) store<T>(s + j, p * load<T>(keep + j));
    store<T>(dp + j, p == 0 ? Vec<T>{} : d);
  }
}

// Whether all keys that a row sees lie in the tile.
FA_INLINE bool row_is_whole(const Problem& x, int64_t row, int64_t key, int64_t keys) {
  if (x.p->part_of_keys) return false;
  const Range r = visible(x, row);
  return r.lo >= key && r.hi <= key + keys;
}

// s = P and dp = dO V^T become dropout(P) and dS, 0 elsewhere in the rows of the tile. through_softcap: dS of q.k, not
// of the capped score.
template <class T>
[[maybe_unused]] static void finish_gradient(const Problem& x, const Plan<T>& f, const Tile& t, const Scratch<T>& w,
                                             bool through_softcap) {
  const AttentionParams& p = f.p;
  const bool drop = has_dropout(p);
  const int width = static_cast<int>(round_up(t.keys, NR<T>));
  for (int i = 0; i < t.rows; ++i) {
    const Span v = whole_vectors(panel_span(t, i), VL<T>);
    T *s = w.s + i * f.lds, *dp = w.dp + i * f.lds;
    const T* slope = through_softcap && w.slope ? w.slope + i * f.lds : nullptr;
    if (drop) keep_row<T>(x, t, i, v, w);
    if (f.rest) dweights_row<T>(x, t, i, v, w);
    const int64_t at = x.row0 + t.row + i;
    if (row_is_whole(x, t.row + i, t.key + t.within.lo, t.within.hi - t.within.lo)) {
      const T dlse = p.dlse.data ? *element<T>(p.dlse, x.batch, x.h, at) : T(0);
      T sink = 0;  // its share of the softmax
      if (p.sinks.data) {
        const double lse = static_cast<double>(*element<T>(p.lse, x.batch, x.h, at));
        sink = static_cast<T>(__builtin_exp(static_cast<double>(*element<T>(p.sinks, x.h, 0, 0)) - lse));
      }
      gradient_whole_row<T>(s, dp, slope, drop ? w.keep : nullptr, f.rest ? w.dw : nullptr, v, dlse, sink);
    } else {
      const T delta = *element<T>(p.delta, x.batch, x.h, at);
      const T rest = f.rest ? f.rest[rest_index(x, t.row + i)] : T(0);
      gradient_row<T>(s, dp, slope, drop ? w.keep : nullptr, f.rest ? w.dw : nullptr, v, delta, rest);
    }
    for (int j = 0; j < v.lo; ++j) s[j] = dp[j] = 0;
    for (int j = v.hi; j < width; ++j) s[j] = dp[j] = 0;
  }
}

// The same from the packed q, k, v and dout.
template <class T>
[[maybe_unused]] static void score_gradient(const Problem& x, const Plan<T>& f, const Tile& t, const Scratch<T>& w,
                                            bool through_softcap) {
  probabilities<T>(x, f, t, w);
  dot_products<T>(t.rows, t.keys, static_cast<int>(f.p.DV), dot_piece(f.p.M, f.p.N), w.dout, f.ldv, w.vt, f.lds, w.dp,
                  f.lds, t.panels());
  finish_gradient<T>(x, f, t, w, through_softcap);
}

FA_END
