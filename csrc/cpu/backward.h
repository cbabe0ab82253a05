// Backward pass: dQ, dK, dV, dsinks from out, lse, dout, dlse, dweights. P is recomputed tile by tile (recompute.h).
//
//   dV = dropout(P)^T dO        dK = scale dS^T Q         dQ = scale dS K        dsinks = -sum exp(sink - lse) delta
//
// One task per (batch, key head, chunk of keys). It runs over key blocks, and for each over the heads of the group
// and the row blocks: dK and dV of the key block stay in its scratch; dQ goes to the partial sum of the chunk.
// The partial sums are then added in the order of the chunks, so that every bit is the same at any thread count.
#pragma once
#include "recompute.h"

FA_BEGIN

template <class T>
struct KeyBlock {
  Scratch<T> w;
  T *k, *dk, *dv;  // [keys, ldq], [keys padded, ldq], [keys padded, ldv]
  bool k_finite = true;
  KeyBlock(const Plan<T>& f, Arena& a) : w(f, a) {
    const int64_t rows = round_up(f.bn, MR);
    k = a.template take<T>(rows * f.ldq);
    dk = a.template take<T>(rows * f.ldq);
    dv = a.template take<T>(rows * f.ldv);
  }
};

// For each panel of MR keys, the rows of a ragged tile that see any of them.
FA_INLINE const Span* key_panels(const Tile& t, Span* out) {
  if (!t.ragged) return nullptr;
  for (int i = 0; i * MR < t.keys; ++i) out[i] = {0, 0};
  for (int i = 0; i < t.rows; ++i) {
    const Span s = t.span[i];
    for (int panel = s.lo / MR; panel * MR < s.hi; ++panel) {
      Span& u = out[panel];
      u = u.hi <= u.lo ? Span{i, i + 1} : Span{u.lo, i + 1};
    }
  }
  return out;
}

// c += a^T b or a b, where rows of b that nobody sees may hold NaN.
template <class T, bool AT>
FA_INLINE void accumulate(bool finite, int m, int64_t n, int k, const T* a, int64_t lda, const T* b, int64_t ldb, T* c,
                          const Span* depth) {
  const int width = static_cast<int>(round_up(n, NR<T>));
  if (finite)
    gemm<T, AT, Into::add>(m, width, k, a, lda, b, ldb, c, ldb, nullptr, nullptr, depth);
  else
    gemm_skip_zeros<T, AT, Into::add>(m, width, k, a, lda, b, ldb, c, ldb, nullptr, depth);
}

template <class T>
[[maybe_unused]] static void backward_tile(const Problem& x, const Plan<T>& f, const Tile& t, const KeyBlock<T>& n,
                                           T* dq) {
  const AttentionParams& p = f.p;
  const Scratch<T>& w = n.w;
  pack_queries(w.q, f.ldq, x, t.row, t.rows);
  pack_dout(x, f, t.row, t.rows, w);
  score_gradient<T>(x, f, t, w, true);
  Span spans[kMaxKeys / 4 + 1];
  const Span* rows = key_panels(t, spans);
  const bool hides = may_hide(x, t);
  if (p.dv.data)
    accumulate<T, true>(!hides || all_finite(w.dout, f.ldv, t.rows, round_up(p.DV, NR<T>)), t.keys, p.DV, t.rows, w.s,
                        f.lds, w.dout, f.ldv, n.dv, rows);
  if (p.dk.data)
    accumulate<T, true>(!hides || all_finite(w.q, f.ldq, t.rows, round_up(p.D, NR<T>)), t.keys, p.D, t.rows, w.dp,
                        f.lds, w.q, f.ldq, n.dk, rows);
  if (p.dq.data)
    accumulate<T, false>(!hides || n.k_finite, t.rows, p.D, t.keys, w.dp, f.lds, n.k, f.ldq, dq + t.row * f.ldq,
                         t.panels());
}

template <class T>
[[maybe_unused]] static void backward_task(const void* plan, int64_t task, char* scratch) {
  const Plan<T>& f = *static_cast<const Plan<T>*>(plan);
  const AttentionParams& p = f.p;
  const int64_t pair = f.first_pair + task / f.chunks, chunk = task % f.chunks;
  const int64_t b = pair / p.HK, hk = pair % p.HK, group = p.H / p.HK;
  Arena arena{reinterpret_cast<uintptr_t>(scratch)};
  KeyBlock<T> n(f, arena);
  const int64_t partial_size = f.partial_rows * f.ldq;
  T* partial = p.dq.data ? f.partial + task * group * partial_size : nullptr;
  if (partial) __builtin_memset(partial, 0, sizeof(T) * static_cast<size_t>(group * partial_size));
  const Problem any = make_problem(p, b, hk * group);
  const int64_t end = min_of(any.keys, (chunk + 1) * f.chunk_keys);
  Tile t;
  int keys;
  for (int64_t key = chunk * f.chunk_keys; key < end; key += keys) {
    keys = static_cast<int>(cut_keys(p, key, min_of<int64_t>(f.bn, end - key)));
    const size_t rows = static_cast<size_t>(round_up(f.bn, MR));
    __builtin_memset(n.dk, 0, sizeof(T) * rows * static_cast<size_t>(f.ldq));
    __builtin_memset(n.dv, 0, sizeof(T) * rows * static_cast<size_t>(f.ldv));
    if (key < any.seen) {
      pack_keys(any, f, key, keys, n.w);
      pack_values(any, f, key, keys, n.w);
      pack_rows(n.k, f.ldq, row_address(p.k, any, hk, any.key0 + key), p.k.dtype, p.k.stride[2], keys, p.D);
      n.k_finite = all_finite(n.k, f.ldq, keys, round_up(p.D, NR<T>));
    }
    for (int64_t g = 0; key < any.seen && g < group; ++g) {
      const Problem x = make_problem(p, b, hk * group + g);
      for (int64_t row = 0; row < x.rows; row += f.bm) {
        const int count = static_cast<int>(min_of<int64_t>(f.bm, x.rows - row));
        if (make_tile(x, row, count, key, keys, t))
          backward_tile<T>(x, f, t, n, partial ? partial + g * partial_size : nullptr);
      }
    }
    for (int i = 0; i < keys; ++i) {
      const int64_t at = any.key0 + key + i;
      if (p.dk.data) store_row(address(p.dk, any.batch, hk, at), p.dk.dtype, n.dk + i * f.ldq, score_factor<T>(p), p.D);
      if (p.dv.data) store_row(address(p.dv, any.batch, hk, at), p.dv.dtype, n.dv + i * f.ldv, T(1), p.DV);
    }
  }
}

// dq of one block of rows: the partial sums in the order of their chunks.
template <class T>
[[maybe_unused]] static void sum_dq_task(const void* plan, int64_t task, char* scratch) {
  const Plan<T>& f = *static_cast<const Plan<T>*>(plan);
  const AttentionParams& p = f.p;
  const int64_t group = p.H / p.HK, g = task / f.blocks % group, wave_pair = task / f.blocks / group;
  const int64_t pair = f.first_pair + wave_pair;
  const Problem x = make_problem(p, pair / p.HK, pair % p.HK * group + g);
  const int64_t row = task % f.blocks * f.bm, end = min_of<int64_t>(row + f.bm, x.rows);
  T* sum = reinterpret_cast<T*>(scratch);
  for (int64_t i = row; i < end; ++i) {
    for (int64_t j = 0; j < f.ldq; ++j) sum[j] = 0;
    for (int64_t chunk = 0; chunk < f.chunks; ++chunk) {
      const T* from = f.partial + (((wave_pair * f.chunks + chunk) * group + g) * f.partial_rows + i) * f.ldq;
      for (int64_t j = 0; j < f.ldq; ++j) sum[j] += from[j];
    }
    store_row(address(p.dq, x.batch, x.h, x.row0 + i), p.dq.dtype, sum, static_cast<T>(p.scale), p.D);
  }
}

// rowsum(dO * O) of up to NR rows, lane by lane in the order in which dot_products sums dO V^T: for a row that sees one
// key, O is V and dS is 0 exactly. gt, ot: [DV, NR].
template <class T>
[[maybe_unused]] static void row_dots(const Problem& x, int64_t row, int rows, T* gt, T* ot, T* strip, T* sum) {
  const AttentionParams& p = *x.p;
  const Tensor &g = p.dout, &o = p.out;
  Vec<T> total0{}, total1{};
  pack_transposed(ot, NR<T>, row_address(o, x, x.h, x.row0 + row), o.dtype, o.stride[2], rows, p.DV, strip);
  pack_transposed(gt, NR<T>, row_address(g, x, x.h, x.row0 + row), g.dtype, g.stride[2], rows, p.DV, strip);
  const int64_t length = dot_piece(p.M, p.N);
  for (int64_t piece = 0; piece < p.DV; piece += length) {
    Vec<T> sum0{}, sum1{};
    for (int64_t d = piece; d < min_of(p.DV, piece + length); ++d) {
      sum0 += load<T>(gt + d * NR<T>) * load<T>(ot + d * NR<T>);
      sum1 += load<T>(gt + d * NR<T> + VL<T>) * load<T>(ot + d * NR<T> + VL<T>);
    }
    total0 += sum0;
    total1 += sum1;
  }
  store<T>(sum, total0);
  store<T>(sum + VL<T>, total1);
}

// rest [rows] += rowsum(P T dW), which needs P: one more pass over the keys.
template <class T>
[[maybe_unused]] static void add_weight_dots(const Problem& x, const Plan<T>& f, int64_t row, int rows,
                                             const Scratch<T>& w, T* rest) {
  const Range r = visible(x, row, rows);
  Tile t;
  pack_queries(w.q, f.ldq, x, row, rows);
  int keys;
  for (int64_t key = r.lo / f.bn * f.bn; key < r.hi; key += keys) {
    keys = static_cast<int>(cut_keys(x, row, rows, key, min_of<int64_t>(f.bn, x.seen - key)));
    if (!make_tile(x, row, rows, key, keys, t)) continue;
    pack_keys(x, f, key, keys, w);
    probabilities<T>(x, f, t, w);
    for (int i = 0; i < rows; ++i) {
      const Span v = whole_vectors(panel_span(t, i), VL<T>);
      const T* s = w.s + i * f.lds;
      dweights_row<T>(x, t, i, v, w);
      if (has_dropout(f.p)) {
        keep_row<T>(x, t, i, v, w);
        for (int j = v.lo; j < v.hi; ++j) w.dw[j] *= w.keep[j];
      }
      Vec<T> sum{};
      for (int j = v.lo; j < v.hi; j += VL<T>) sum += load<T>(s + j) * load<T>(w.dw + j);
      rest[i] += reduce_add<T>(sum);
    }
  }
}

template <class T>
struct DeltaScratch {
  Scratch<T> w;
  T *gt, *ot, *delta, *rest;
  DeltaScratch(const Plan<T>& f, Arena& a) : w(f, a) {
    gt = a.template take<T>(f.p.DV * NR<T>);
    ot = a.template take<T>(f.p.DV * NR<T>);
    delta = a.template take<T>(f.bm + NR<T>);
    rest = a.template take<T>(f.bm + NR<T>);
  }
};

// delta and rest of one block of rows; a row that sees nothing has 0.
template <class T>
[[maybe_unused]] static void delta_task(const void* plan, int64_t task, char* scratch) {
  const Plan<T>& f = *static_cast<const Plan<T>*>(plan);
  const AttentionParams& p = f.p;
  const int64_t pair = task / f.blocks, row = task % f.blocks * f.bm;
  const Problem x = make_problem(p, pair / p.H, pair % p.H);
  if (row >= x.rows) return;
  const int rows = static_cast<int>(min_of<int64_t>(f.bm, x.rows - row));
  Arena arena{reinterpret_cast<uintptr_t>(scratch)};
  const DeltaScratch<T> n(f, arena);
  for (int i = 0; i < rows; i += NR<T>) {
    if (p.dout.data)
      row_dots<T>(x, row + i, min_of(rows - i, NR<T>), n.gt, n.ot, n.w.strip, n.delta + i);
    else
      for (int j = 0; j < NR<T>; ++j) n.delta[i + j] = 0;
  }
  for (int i = 0; i < rows; ++i) n.rest[i] = 0;
  if (p.dweights.data) add_weight_dots<T>(x, f, row, rows, n.w, n.rest);
  for (int i = 0; i < rows; ++i) {
    const int64_t at = x.row0 + row + i;
    const bool dead = *element<T>(p.lse, x.batch, x.h, at) == -kInf<T>;
    const T dlse = p.dlse.data ? *element<T>(p.dlse, x.batch, x.h, at) : T(0);
    *element<T>(p.delta, x.batch, x.h, at) = dead ? T(0) : n.delta[i];
    if (f.rest) f.rest[rest_index(x, row + i)] = dead ? T(0) : n.rest[i] - dlse;
  }
}

template <class T>
[[maybe_unused]] static void sinks_task(const void* plan, int64_t h, char*) {
  const Plan<T>& f = *static_cast<const Plan<T>*>(plan);
  const AttentionParams& p = f.p;
  const double sink = static_cast<double>(*element<T>(p.sinks, h, 0, 0));
  double sum = 0, lost = 0;  // Kahan: one sum over all rows of all batches
  for (int64_t b = 0; b < p.B; ++b) {
    const Problem x = make_problem(p, b, h);
    for (int64_t i = 0; i < x.rows; ++i) {
      const double lse = static_cast<double>(*element<T>(p.lse, x.batch, h, x.row0 + i));
      if (lse == -kInf<double>) continue;
      double delta = static_cast<double>(*element<T>(p.delta, x.batch, h, x.row0 + i));
      if (f.rest) delta += static_cast<double>(f.rest[rest_index(x, i)]);
      const double term = -__builtin_exp(sink - lse) * delta - lost, next = sum + term;
      lost = (next - sum) - term;
      sum = next;
    }
  }
  *element<T>(p.dsinks, h, 0, 0) = static_cast<T>(sum);
}

// All (batch, key head) pairs, in waves whose partial sums fit in memory; the waves do not change any number.
template <class T>
[[maybe_unused]] static bool backward_qkv(Plan<T>& f, double work) {
  const AttentionParams& p = f.p;
  const int64_t pairs = p.B * p.HK;
  if (pairs == 0) return true;
  const int64_t group = p.H / p.HK, batch = p.batch_invariant ? 1 : p.B;
  f.chunks = backward_chunks<T>(batch, p.HK, group, p.M, p.N, p.D, f.bn);
  f.chunk_keys = round_up(ceil_div(max_of<int64_t>(p.N, 1), f.chunks), p.block_map.data ? p.block_n : f.bn);
  f.partial_rows = round_up(p.M, MR);
  const int64_t per_pair = f.chunks * group * f.partial_rows * f.ldq * static_cast<int64_t>(sizeof(T));
  int64_t wave = pairs;
  if (p.dq.data) wave = min_of(pairs, max_of<int64_t>((24 << 20) / max_of<int64_t>(per_pair, 1), p.threads));
  f.partial = p.dq.data ? static_cast<T*>(allocate(static_cast<size_t>(wave * per_pair))) : nullptr;
  if (p.dq.data && !f.partial) return false;
  Arena count{0};
  KeyBlock<T> layout(f, count);
  const size_t row_bytes = sizeof(T) * static_cast<size_t>(f.ldq);
  bool ok = true;
  for (f.first_pair = 0; ok && f.first_pair < pairs; f.first_pair += wave) {
    const int64_t here = min_of(wave, pairs - f.first_pair);
    ok = run_tasks(here * f.chunks, p.threads, work, count.used, backward_task<T>, &f);
    if (ok && p.dq.data) ok = run_tasks(here * group * f.blocks, p.threads, work, row_bytes, sum_dq_task<T>, &f);
  }
  release(f.partial);
  return ok;
}

FA_END
