// Forward pass: out = softmax(scores) V by the online softmax, one task per (batch, head, block of rows).
//
// For each block of keys:   S = scale Q K^T;   m' = max(m, rowmax S);   P = exp(S - m');   a = exp(m - m')
//                           l = a l + rowsum P;   O = a O + dropout(P) V
// at the end:               out = O / (l + exp(sink - m)),   lse = m + log(l + exp(sink - m))
//
// A scratch holds q [BM, ldq], kt [D, lds], v [BN, ldo], s [BS, lds], o [BM, ldo] in the compute type. The BM rows share
// the packed K and V; of the scores there are BS rows at a time, which stay in L1 from one product to the other. Where
// the weights are wanted (weights.h), there is an s [BM, lds] and an m for every block of keys.
//
// Where several blocks of rows read the same keys (share_tiles), kt and v of every tile are packed once before, and no
// scratch has them.
#pragma once
#include "pack.h"
#include "scores.h"
#include "threads.h"

FA_BEGIN

template <class T>
struct Forward {
  AttentionParams p;
  int bm, bs, bn;
  int step;        // rows from one block to the next, at most bm
  int64_t blocks;  // of rows
  int64_t kept;    // blocks of keys whose s stays; 0: none, they take turns
  int64_t ldq, lds, ldo;
  int64_t first_pair;  // (batch, key head) pairs of this wave start here
  T* shared;           // [pairs of a wave, tiles, tile_size], or null: a block packs the tiles that it sees
  int64_t tiles;       // of a pair

  int64_t group() const { return p.HK ? p.H / p.HK : 0; }
  int64_t tile_size() const { return p.D * lds + bn * ldo; }  // kt, then v
  T* shared_tile(int64_t pair, int64_t tile) const { return shared + (pair * tiles + tile) * tile_size(); }
};

template <class T>
struct ForwardScratch {
  T *q, *kt, *v, *s, *o, *strip, *m, *l, *alpha, *keep, *tops;
  RowBuffers<T> row;
  ForwardScratch(const Forward<T>& f, Arena& a) {
    q = a.template take<T>(f.bm * f.ldq);
    kt = a.template take<T>(f.shared ? 0 : f.p.D * f.lds);
    v = a.template take<T>(f.shared ? 0 : f.bn * f.ldo);
    s = a.template take<T>((f.kept ? f.kept * f.bm : f.bs) * f.lds);
    o = a.template take<T>(f.bm * f.ldo);
    strip = a.template take<T>(VL<T> * f.ldq);
    m = a.template take<T>(f.bm);
    l = a.template take<T>(f.bm);
    alpha = a.template take<T>(f.bm);
    keep = a.template take<T>(kMaxKeys + 16);
    tops = a.template take<T>(f.kept * f.bm);
    row.mask = a.template take<T>(kMaxKeys + 16);
    row.bias = a.template take<T>(kMaxKeys + 16);
  }
};

// The softmax of one tile: s becomes exp(s - m'), m and l are brought up to date, alpha is what O shrinks by.
template <class T>
[[maybe_unused]] static void online_softmax(const Tile& t, T* s, int64_t ld, T* m, T* l, T* alpha) {
  for (int i = 0; i < t.rows; ++i) {
    T* row = s + i * ld;
    const Span all = panel_span(t, i);
    const int from = all.lo / VL<T> * VL<T>, to = static_cast<int>(round_up(all.hi, VL<T>));
    Vec<T> top = splat<T>(-kInf<T>);
    for (int j = from; j < to; j += VL<T>) top = max_skip_nan<T>(load<T>(row + j), top);
    const T here = reduce_max<T>(top), next = here > m[i] ? here : m[i];
    const T shift = next == -kInf<T> ? T(0) : next;
    alpha[i] = m[i] == next ? T(1) : exp1<T>(m[i] - shift);
    m[i] = next;
    Vec<T> sum{};
    for (int j = from; j < to; j += VL<T>) {
      const Vec<T> e = vexp<T>(load<T>(row + j) - shift);
      store<T>(row + j, e);
      sum += e;
    }
    l[i] = l[i] * alpha[i] + reduce_add<T>(sum);
  }
}

template <class T>
[[maybe_unused]] static void drop_tile(const Problem& x, const Tile& t, T* s, int64_t ld, T* keep) {
  Philox g = dropout_state(x);
  for (int i = 0; i < t.rows; ++i) {
    const Span own = row_span(t, i);
    const int from = own.lo / 16 * 16;
    g.row = static_cast<uint32_t>(t.row + i);
    dropout_row<T>(g, t.key + from, own.hi - from, T(1), keep + from);
    T* row = s + i * ld;
    for (int j = own.lo; j < own.hi; ++j) row[j] *= keep[j];
  }
}

// out and lse of finished rows, from their largest scores (times unit), sums and weighted sums o [rows, ldo].
// stats (may be null): [rows, 2], the shift of a row's exponentials and 1 / their sum; (0, 0) where no key is seen.
template <class T>
[[maybe_unused]] static void write_rows(const Problem& x, int64_t row, int rows, T* outputs, int64_t ldo, const T* top,
                                        const T* sums, double unit = 1.0, T* stats = nullptr) {
  const AttentionParams& p = *x.p;
  const T keep = has_dropout(p) ? dropout_keep<T>(p) : T(1);
  const double sink = p.sinks.data ? static_cast<double>(*element<T>(p.sinks, x.h, 0, 0)) : -kInf<double>;
  for (int i = 0; i < rows; ++i) {
    const double m = static_cast<double>(top[i]) * unit, l = static_cast<double>(sums[i]);
    const bool dead = m == -kInf<double> && l == 0.0;
    T divisor = 1, shift = 0, inverse = 0;
    double lse = -kInf<double>;
    if (!dead) {
      const double high = sink > m ? sink : m, shrink = high == m ? 1.0 : __builtin_exp(m - high);
      const double total = l * shrink + (p.sinks.data ? __builtin_exp(sink - high) : 0.0);
      divisor = static_cast<T>(total / shrink);
      if (p.lse.data) lse = high + __builtin_log(total);
      shift = static_cast<T>(high), inverse = static_cast<T>(1.0 / total);
    }
    T* o = outputs + i * ldo;
    if (dead)  // what a hidden Inf may have left there
      for (int64_t j = 0; j < p.DV; ++j) o[j] = 0;
    for (int64_t j = 0; j < ldo; ++j) o[j] /= divisor;
    store_row(address(p.out, x.batch, x.h, x.row0 + row + i), p.out.dtype, o, keep, p.DV);
    if (stats) stats[2 * i] = shift, stats[2 * i + 1] = inverse;
    if (p.lse.data) *element<T>(p.lse, x.batch, x.h, x.row0 + row + i) = static_cast<T>(lse);
  }
}

template <class T>
[[maybe_unused]] static void pack_tile(const Problem& x, const Forward<T>& f, int64_t key, int keys, T* kt, T* v,
                                       T* strip) {
  const AttentionParams& p = f.p;
  const char *from_k = row_address(p.k, x, x.hk, x.key0 + key), *from_v = row_address(p.v, x, x.hk, x.key0 + key);
  pack_transposed(kt, f.lds, from_k, p.k.dtype, p.k.stride[2], keys, p.D, strip);
  pack_rows(v, f.ldo, from_v, p.v.dtype, p.v.stride[2], keys, p.DV);
}

// A packed tile. Whether its values are finite is looked up once, where it matters.
template <class T>
struct PackedTile {
  const T *kt = nullptr, *v = nullptr;
  bool checked = false, finite = false;
};

template <class T>
FA_INLINE PackedTile<T> packed_tile(const Problem& x, const Forward<T>& f, int64_t key, int keys,
                                    const ForwardScratch<T>& w) {
  if (f.shared) {
    const T* kt = f.shared_tile(x.b * f.p.HK + x.hk - f.first_pair, key / f.bn);
    return {kt, kt + f.p.D * f.lds};
  }
  pack_tile<T>(x, f, key, keys, w.kt, w.v, w.strip);
  return {w.kt, w.v};
}

// Rows at, at + 1 ... of the block, whose scores go to s, on the packed keys.
template <class T>
[[maybe_unused]] static void forward_tile(const Problem& x, const Forward<T>& f, const Tile& t, int at,
                                          const ForwardScratch<T>& w, T* s, PackedTile<T>& packed) {
  const AttentionParams& p = f.p;
  T *o = w.o + at * f.ldo, *alpha = w.alpha + at;
  score_products<T>(p.M, p.N, t.rows, t.keys, static_cast<int>(p.D), w.q + at * f.ldq, f.ldq, packed.kt, f.lds, s,
                    f.lds, t.panels(), score_factor<T>(p));
  finish_scores<T>(x, t, s, f.lds, nullptr, w.row);
  online_softmax<T>(t, s, f.lds, w.m + at, w.l + at, alpha);
  if (has_dropout(p)) drop_tile<T>(x, t, s, f.lds, w.keep);
  const int width = static_cast<int>(round_up(p.DV, NR<T>));
  if (may_hide(x, t) && !packed.checked)
    packed.finite = all_finite(packed.v, f.ldo, t.keys, width), packed.checked = true;
  if (may_hide(x, t) && !packed.finite)
    gemm_skip_zeros<T, false, Into::scale_add>(t.rows, width, t.keys, s, f.lds, packed.v, f.ldo, o, f.ldo, alpha,
                                               t.panels());
  else
    gemm<T, false, Into::scale_add>(t.rows, width, t.keys, s, f.lds, packed.v, f.ldo, o, f.ldo, alpha, nullptr,
                                    t.panels());
}

// How many keys the tile at `key` takes. Tiles that stay lie alike for all heads, whatever their block maps hide.
template <class T>
FA_INLINE int tile_keys(const Problem& x, const Forward<T>& f, int64_t row, int rows, int64_t key, int64_t end) {
  const int64_t most = min_of<int64_t>(f.bn, end - key);  // no block behind the last is looked at
  return static_cast<int>(f.kept ? min_of(cut_keys(f.p, key, f.bn), most) : cut_keys(x, row, rows, key, most));
}

// m, l and O of a block of rows, from keys r; with `kept`, the scores of all its tiles and the m after each stay too.
template <class T>
[[maybe_unused]] static void forward_rows(const Problem& x, const Forward<T>& f, int64_t row, int rows, Range r,
                                          const ForwardScratch<T>& w) {
  pack_queries(w.q, f.ldq, x, row, rows);
  for (int i = 0; i < f.bm; ++i) w.m[i] = -kInf<T>, w.l[i] = w.alpha[i] = 0;
  __builtin_memset(w.o, 0, sizeof(T) * static_cast<size_t>(f.bm * f.ldo));
  Tile t;
  int keys;
  int64_t tile = 0;
  for (int64_t key = r.lo; key < r.hi; key += keys, ++tile) {
    keys = tile_keys<T>(x, f, row, rows, key, r.hi);
    PackedTile<T> packed;
    for (int at = 0; at < rows; at += f.bs) {
      if (!make_tile(x, row + at, min_of(f.bs, rows - at), key, keys, t)) continue;
      if (!packed.kt) packed = packed_tile<T>(x, f, key, keys, w);
      forward_tile<T>(x, f, t, at, w, f.kept ? w.s + (tile * f.bm + at) * f.lds : w.s, packed);
    }
    if (f.kept) __builtin_memcpy(w.tops + tile * f.bm, w.m, sizeof(T) * static_cast<size_t>(rows));
  }
}

// The keys that a block of rows sees, from where their tiles start.
FA_INLINE Range tiled_range(const Problem& x, int64_t row, int rows) {
  const Range r = visible(x, row, rows);
  return {r.lo / 16 * 16, r.hi};
}

template <class T>
[[maybe_unused]] static void forward_task(const void* plan, int64_t task, char* scratch) {
  const Forward<T>& f = *static_cast<const Forward<T>*>(plan);
  const AttentionParams& p = f.p;
  const int64_t head = f.first_pair * f.group() + task / f.blocks;
  const Problem x = make_problem(p, head / p.H, head % p.H);
  // Causal rows see the more keys the further down they are: the last block is handed out first.
  const int64_t row = (f.blocks - 1 - task % f.blocks) * f.step;
  if (row >= x.rows) return;
  const int rows = static_cast<int>(min_of<int64_t>(f.step, x.rows - row));
  Arena arena{reinterpret_cast<uintptr_t>(scratch)};
  const ForwardScratch<T> w(f, arena);
  forward_rows<T>(x, f, row, rows, tiled_range(x, row, rows), w);
  write_rows<T>(x, row, rows, w.o, f.ldo, w.m, w.l);
}

template <class T>
static Forward<T> make_forward(const AttentionParams& p, int most_rows) {
  Forward<T> f{};
  f.p = p;
  f.step = cut_rows(p, most_rows);
  f.bm = static_cast<int>(round_up(f.step, MR));
  f.bs = even_rows(f.bm, score_rows<T>(p.D, p.DV));
  f.bn =
      static_cast<int>(min_of<int64_t>(forward_blocks<T>(p.D, p.DV).n, max_of<int64_t>(round_up(p.N, NR<T>), NR<T>)));
  f.blocks = ceil_div(p.M, f.step);
  f.ldq = padded<T>(p.D), f.lds = padded<T>(f.bn), f.ldo = padded<T>(p.DV);
  return f;
}

FA_INLINE double forward_work(const AttentionParams& p) {
  return static_cast<double>(p.B * p.H) * static_cast<double>(p.M) * static_cast<double>(p.N + 1) *
         static_cast<double>(p.D + p.DV);
}

// --- tiles packed once ------------------------------------------------------------------------------------------------

// Where tiles begin at multiples of BN, and packing, 2 to 4 % of a block's work, is repeated often: shared tiles come from
// L3. A matter of time: the numbers are the same either way.
template <class T>
FA_INLINE bool share_tiles(const Forward<T>& f) {
  const AttentionParams& p = f.p;
  const bool aligned = !p.cu_seqlens_q && !p.block_map.data && !p.tree.data && p.window_left < 0;
  return aligned && f.blocks * f.group() >= 8 && forward_work(p) >= 2e7;
}

template <class T>
[[maybe_unused]] static void share_task(const void* plan, int64_t task, char* scratch) {
  const Forward<T>& f = *static_cast<const Forward<T>*>(plan);
  const int64_t pair = f.first_pair + task / f.tiles, tile = task % f.tiles, key = tile * f.bn;
  const Problem x = make_problem(f.p, pair / f.p.HK, pair % f.p.HK * f.group());
  if (key >= x.seen) return;
  T* kt = f.shared_tile(task / f.tiles, tile);
  const int keys = static_cast<int>(min_of<int64_t>(f.bn, x.seen - key));
  pack_tile<T>(x, f, key, keys, kt, kt + f.p.D * f.lds, reinterpret_cast<T*>(scratch));
}

// Runs the blocks of `units` units, `tasks` of each, one after the other in memory and of so many (batch, key head) pairs.
// Tiles that are shared are packed in waves of units, of 8 MB a thread or one unit: Scratch has the layout of a scratch.
template <class T, class Scratch>
[[maybe_unused]] static bool run_blocks(Forward<T>& f, int64_t units, int64_t tasks, int64_t pairs, Task run) {
  const AttentionParams& p = f.p;
  int64_t wave = units;
  if (share_tiles<T>(f)) {
    f.tiles = ceil_div(p.N, f.bn);
    const int64_t bytes = pairs * f.tiles * f.tile_size() * static_cast<int64_t>(sizeof(T));
    wave = max_of<int64_t>(min_of<int64_t>((static_cast<int64_t>(p.threads) << 23) / bytes, units), 1);
    f.shared = static_cast<T*>(allocate(static_cast<size_t>(wave * bytes)));
    if (!f.shared) return false;
    prefer_large_pages(f.shared, static_cast<size_t>(wave * bytes));
  }
  Arena count{0};
  Scratch layout(f, count);
  const double work = forward_work(p),
               packing = static_cast<double>(p.B * p.HK * p.N) * static_cast<double>(p.D + p.DV);
  bool ok = true;
  for (int64_t unit = 0; ok && unit < units; unit += wave) {
    const int64_t here = min_of(wave, units - unit);
    f.first_pair = unit * pairs;
    if (f.shared)
      ok = run_tasks(here * pairs * f.tiles, p.threads, packing, sizeof(T) * VL<T> * static_cast<size_t>(f.ldq),
                     share_task<T>, &f);
    ok = ok && run_tasks(here * tasks, p.threads, work, count.used, run, &f);
  }
  release(f.shared);
  return ok;
}

template <class T>
[[maybe_unused]] static bool forward(const AttentionParams& p) {
  const int64_t heads = (p.batch_invariant ? 1 : p.B) * p.H;
  Forward<T> f = make_forward<T>(p, shared_rows(p.M, heads, forward_blocks<T>(p.D, p.DV).m));
  return run_blocks<T, ForwardScratch<T>>(f, p.B * p.HK, f.group() * f.blocks, 1, forward_task<T>);
}

FA_END
