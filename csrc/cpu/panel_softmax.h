// Softmax between two products of tiles, on scores S^T [keys, 32] of a panel of 32 rows of queries: a lane is a row, so
// that maxima and sums of rows need no shuffles, and what a row shrinks by is a vector.
//
//   P = exp2(c S - t),   c = |scale| log2(e) (its sign is in Q),   t the shift of the row: c S once S was the largest
//
// of products, and of scores (panel_scores.h), where a product with log2(e) might overflow:
//
//   P = exp2(c (S - t)),   c = log2(e),   t = S once S was the largest
//
// t follows the largest score only where that would leave P larger than 2^8; then O and the sum shrink with it. The
// exponent of products is one fused multiply-add, and t is exactly what lse adds.
#pragma once
#include "panels.h"
#include "scores.h"

FA_BEGIN

constexpr int kKeyBlock = 128;                 // keys of an item of work, at most
constexpr int kSubs = kKeyBlock / kPanel;      // panels of keys in it
constexpr int kLanes = kPanel / VL<float>;     // vectors of a panel of rows
constexpr int64_t kItem = kKeyBlock * kPanel;  // scores
constexpr float kSlack = 8.0f;                 // of the largest score over t, in powers of two
constexpr double kLn2 = 0.69314718055994530942;
static_assert(kKeyBlock <= kMaxKeys, "general scores go through the buffers of scores.h");

enum class Scores { products, scores, ready };  // ready: probabilities already

template <Scores OF>
FA_INLINE Vec<float> weight_of(Vec<float> s, float c, Vec<float> t) {
  return OF == Scores::scores ? vexp2((s - t) * c) : vexp2(s * c - t);
}

// One panel of rows against one block of keys: what it sees of it are some of the panels first .. last - 1 of keys.
struct Item {
  int64_t row, key;
  int rows, panel;  // the panel's index in its task
  int first, last;
  bool whole;  // every row sees every key of these panels
};

// False if the panel of rows sees none of the keys key + 32 from .. key + kKeyBlock. Where a block map hides some in
// between, those beyond are another item.
FA_INLINE bool make_item(const Problem& x, int64_t row, int panel, int64_t key, int from, Item& it) {
  it.row = row, it.key = key, it.panel = panel;
  it.rows = static_cast<int>(min_of<int64_t>(kPanel, x.rows - row));
  const Range first = visible(x, row), last = visible(x, row + it.rows - 1);
  const int64_t lo = max_of<int64_t>(min_of(first.lo, last.lo) - key, 0);
  const int64_t hi = min_of<int64_t>(last.hi - key, kKeyBlock);
  if (hi <= lo) return false;
  it.first = max_of(static_cast<int>(lo / kPanel), from), it.last = static_cast<int>(ceil_div(hi, kPanel));
  if (x.p->block_map.data) {
    const auto shown = [&](int sub) { return block_shown(x, row / x.p->block_m, (key + sub * kPanel) / x.p->block_n); };
    while (it.first < it.last && !shown(it.first)) ++it.first;
    const int end = it.last;
    for (it.last = it.first; it.last < end && shown(it.last);) ++it.last;
  }
  if (it.last <= it.first) return false;
  it.whole = last.lo - key <= it.first * kPanel && first.hi - key >= it.last * kPanel;
  return true;
}

// S = -inf where it is hidden. Rows past the last one may hold anything: they stay in their lanes.
FA_OUTLINE void hide_scores(const Problem& x, const Item& it, float* s) {
  alignas(64) int32_t lo[kPanel] = {}, hi[kPanel] = {};
  int32_t last_lo = 0, first_hi = kKeyBlock;
  for (int i = 0; i < it.rows; ++i) {
    const Range r = visible(x, it.row + i);
    lo[i] = static_cast<int32_t>(min_of<int64_t>(max_of<int64_t>(r.lo - it.key, 0), kKeyBlock));
    hi[i] = static_cast<int32_t>(min_of<int64_t>(max_of<int64_t>(r.hi - it.key, 0), kKeyBlock));
    last_lo = max_of(last_lo, lo[i]), first_hi = min_of(first_hi, hi[i]);
  }
  for (int sub = it.first; sub < it.last; ++sub) {
    if (last_lo <= sub * kPanel && first_hi >= (sub + 1) * kPanel) continue;
    for (int l = 0; l < kLanes; ++l) {
      IVec<float> from, to;
      __builtin_memcpy(&from, lo + l * VL<float>, sizeof from);
      __builtin_memcpy(&to, hi + l * VL<float>, sizeof to);
      for (int j = sub * kPanel; j < (sub + 1) * kPanel; ++j) {
        float* at = s + j * kPanel + l * VL<float>;
        const IVec<float> seen = (from <= j) & (to > j);
        store<float>(at, seen ? load<float>(at) : splat<float>(-kInf<float>));
      }
    }
  }
}

// The largest score of each row.
FA_OUTLINE void largest(const Item& it, const float* s, Vec<float>* top) {
  Vec<float> part[4][kLanes];
#pragma GCC unroll 4
  for (int u = 0; u < 4; ++u)
#pragma GCC unroll 8
    for (int l = 0; l < kLanes; ++l) part[u][l] = splat<float>(-kInf<float>);
  for (int j = it.first * kPanel; j < it.last * kPanel; j += 4) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u)
#pragma GCC unroll 8
      for (int l = 0; l < kLanes; ++l)
        part[u][l] = max_skip_nan<float>(load<float>(s + (j + u) * kPanel + l * VL<float>), part[u][l]);
  }
#pragma GCC unroll 8
  for (int l = 0; l < kLanes; ++l)
    top[l] =
        max_skip_nan<float>(max_skip_nan<float>(part[0][l], part[1][l]), max_skip_nan<float>(part[2][l], part[3][l]));
}

// A panel of 32 keys: P as pairs of keys [16, 32], in parts, and the sums of its rows. KEEP: P takes the place of S, too.
template <int PARTS, Scores OF, bool KEEP>
FA_OUTLINE void weights_of(float* s, float c, const Vec<float>* shift, Vec<float>* sum, uint16_t* pairs, int64_t part) {
  Vec<float> t[kLanes], even[kLanes], odd[kLanes];
#pragma GCC unroll 8
  for (int l = 0; l < kLanes; ++l) t[l] = shift[l], even[l] = odd[l] = Vec<float>{};
  for (int j = 0; j < kPanel; j += 2, s += 2 * kPanel, pairs += 2 * kPanel) {
#pragma GCC unroll 8
    for (int l = 0; l < kLanes; ++l) {
      const Vec<float> a = weight_of<OF>(load<float>(s + l * VL<float>), c, t[l]);
      const Vec<float> b = weight_of<OF>(load<float>(s + kPanel + l * VL<float>), c, t[l]);
      even[l] += a;
      odd[l] += b;
      if (KEEP) store<float>(s + l * VL<float>, a), store<float>(s + kPanel + l * VL<float>, b);
      store_pairs<PARTS>(pairs + 2 * l * VL<float>, part, a, b);
    }
  }
#pragma GCC unroll 8
  for (int l = 0; l < kLanes; ++l) sum[l] += even[l] + odd[l];
}

// Values [keys, 32] in float as pairs of keys.
template <int PARTS>
FA_INLINE void pairs_of_keys(const float* from, int keys, uint16_t* pairs, int64_t part) {
  for (int j = 0; j < keys; j += 2, from += 2 * kPanel, pairs += 2 * kPanel) {
#pragma GCC unroll 8
    for (int l = 0; l < kLanes; ++l) {
      const Vec<float> a = load<float>(from + l * VL<float>), b = load<float>(from + kPanel + l * VL<float>);
      store_pairs<PARTS>(pairs + 2 * l * VL<float>, part, a, b);
    }
  }
}

constexpr int kBlockPanels = 4;  // of rows, before they are added to dK and dV
constexpr int64_t kForm = kBlockPanels * kItem;

// P^T and dS^T of a block of rows, [parts, panels, 128 keys, 32 rows] each; dS^T as pairs of keys too.
struct Forms {
  uint16_t *p, *ds, *ds_pairs;
};

// 2 x 32 values as two rows of bf16, in parts.
template <int PARTS>
FA_INLINE void store_panel_rows(const Vec<float>* a, const Vec<float>* b, uint16_t* to) {
#pragma GCC unroll 4
  for (int l = 0; l < kLanes; l += 2) {
    Vec<float> rest[] = {a[l], a[l + 1], b[l], b[l + 1]};
#pragma GCC unroll 3
    for (int part = 0; part < PARTS; ++part) {
      uint16_t* at = to + part * kForm + l * VL<float>;
      store_bf16(at, rest[0], rest[1]);
      store_bf16(at + kPanel, rest[2], rest[3]);
      if (part + 1 == PARTS) break;
#pragma GCC unroll 4
      for (Vec<float>& x : rest) x -= bf16_rounded(x);
    }
  }
}

// A panel of 32 keys in the forms that the products read. Where they are ready, s and dp hold P and dS.
template <int PARTS, Scores OF>
FA_OUTLINE void gradients_of(const float* s, const float* dp, float c, const float* lse, const float* delta,
                             const float* rest, Forms to) {
  Vec<float> base[kLanes], lost[kLanes];
#pragma GCC unroll 8
  for (int l = 0; l < kLanes; ++l)
    base[l] = load<float>(lse + l * VL<float>), lost[l] = load<float>(delta + l * VL<float>);
  for (int j = 0; j < kPanel; j += 2) {
    Vec<float> p[2][kLanes], ds[2][kLanes];
#pragma GCC unroll 2
    for (int u = 0; u < 2; ++u) {
#pragma GCC unroll 8
      for (int l = 0; l < kLanes; ++l) {
        p[u][l] = load<float>(s + l * VL<float>), ds[u][l] = load<float>(dp + l * VL<float>);
        if (OF == Scores::ready) continue;
        p[u][l] = weight_of<OF>(p[u][l], c, base[l]);
        ds[u][l] -= lost[l];
        if (rest) ds[u][l] -= load<float>(rest + l * VL<float>);
        ds[u][l] *= p[u][l];
      }
      s += kPanel, dp += kPanel;
    }
    store_panel_rows<PARTS>(p[0], p[1], to.p);
    store_panel_rows<PARTS>(ds[0], ds[1], to.ds);
#pragma GCC unroll 8
    for (int l = 0; l < kLanes; ++l) {
      store_pairs<PARTS>(to.ds_pairs + 2 * l * VL<float>, kForm, ds[0][l], ds[1][l]);
    }
    to.p += 2 * kPanel, to.ds += 2 * kPanel, to.ds_pairs += 2 * kPanel;
  }
}

// to [32, ldt] = factor from^T [keys, 32], and back.
FA_INLINE void to_rows(const Item& it, const float* from, float factor, float* to, int64_t ldt) {
  transpose_words(from + it.first * kItem / kSubs, kPanel, to + it.first * kPanel, ldt, (it.last - it.first) * kPanel,
                  kPanel);
  if (factor != 1.0f)
    for (int i = 0; i < kPanel; ++i)
      for (int j = it.first * kPanel; j < it.last * kPanel; ++j) to[i * ldt + j] *= factor;
}
FA_INLINE void from_rows(const Item& it, const float* from, int64_t ldf, float* to) {
  transpose_words(from + it.first * kPanel, ldf, to + it.first * kItem / kSubs, kPanel, kPanel,
                  (it.last - it.first) * kPanel);
}

// 0 for what finish_scores leaves undefined in an item as rows.
FA_INLINE void clear_hidden(const Item& it, const Tile& t, float* rows, int64_t ld) {
  for (int i = 0; i < kPanel; ++i) {
    const Span all = i < t.rows ? panel_span(t, i) : Span{0, 0};
    const int from = all.lo / VL<float> * VL<float>, to = static_cast<int>(round_up(all.hi, VL<float>));
    for (int j = it.first * kPanel; j < it.last * kPanel; ++j)
      if (j < from || j >= to) rows[i * ld + j] = 0;
  }
}

// The keys of an item, relative to its first.
FA_INLINE Span keys_of(const Item& it) { return {it.first * kPanel, it.last * kPanel}; }

// Whether panels are the better way: enough rows and keys to fill some of a tile, and no block that ends within a
// panel. float32, which takes six products, has to fill panels of rows and of keys.
FA_INLINE bool panels_wanted(const AttentionParams& p) {
  const bool wide = p.q.dtype == DType::f32;
  const bool known = p.q.dtype == DType::bf16 || (kParts && (wide || p.q.dtype == DType::f16));
  const int64_t more_than = wide ? kPanel - 1 : kLaneRows;
  return known && p.k.dtype == p.q.dtype && p.v.dtype == p.q.dtype && p.M > more_than && p.N > more_than &&
         p.B * p.H > 0 && max_of(p.D, p.DV) <= kMaxHeadDim &&
         (!p.block_map.data || (p.block_m % kPanel == 0 && p.block_n % kPanel == 0));
}

FA_END
