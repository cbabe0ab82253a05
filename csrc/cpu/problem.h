// One batch element (or packed sequence) with one query head: its sizes, and which keys each of its rows sees.
//
// Row i sees the keys of one interval [lo, hi), whose ends do not decrease with i; a mask or a block map may hide more of
// them. A block map hides whole tiles, or whole rows of a tile: no tile has keys of which a row sees some blocks only.
#pragma once
#include "convert.h"
#include "gemm.h"
#include "philox.h"
#include "tiles.h"

FA_BEGIN

struct Problem {
  const AttentionParams* p;
  int64_t b, h, hk;
  int64_t batch;       // index into the batch dimension of q, k, v ...: b, or 0 where sequences are packed
  int64_t row0, key0;  // first row and key of a packed sequence
  int64_t rows, keys;  // rows of q; rows of k
  int64_t seen;        // keys below key_lengths
  int64_t diagonal;
};

FA_INLINE Problem make_problem(const AttentionParams& p, int64_t b, int64_t h) {
  Problem x{};
  x.p = &p, x.b = b, x.h = h, x.hk = p.H ? h / (p.H / p.HK) : 0;  // the mean of no heads asks too
  x.batch = b, x.rows = p.M, x.keys = p.N;
  if (p.cu_seqlens_q) {
    x.batch = 0;
    x.row0 = p.cu_seqlens_q[b], x.rows = p.cu_seqlens_q[b + 1] - x.row0;
    x.key0 = p.cu_seqlens_k[b], x.keys = p.cu_seqlens_k[b + 1] - x.key0;
  }
  x.seen = p.key_lengths ? max_of<int64_t>(min_of(p.key_lengths[b], x.keys), 0) : x.keys;
  x.diagonal = p.causal == Causal::bottom_right ? x.seen - x.rows : 0;
  return x;
}

struct Range {
  int64_t lo, hi;
};
// Under a tree mask a row stands at its depth, and the window on its left begins no further left than that of a root's.
FA_INLINE Range visible(const Problem& x, int64_t row) {
  const bool tree = x.p->tree.data != nullptr;
  const int64_t center = row + x.diagonal, left = x.p->window_left, right = tree ? -1 : x.p->window_right;
  const int64_t standing = tree ? x.seen - x.rows : center;
  Range r{0, x.seen};
  if (left >= 0 && left < standing) r.lo = standing - left;
  if (x.p->causal != Causal::none) r.hi = min_of(r.hi, center + 1);
  if (right >= 0 && right < x.seen - center) r.hi = min_of(r.hi, center + right + 1);
  r.hi = max_of<int64_t>(r.hi, 0);
  r.lo = min_of(r.lo, r.hi);
  return r;
}
FA_INLINE Range visible(const Problem& x, int64_t row, int64_t rows) {  // of a block of rows
  const Range first = visible(x, row), last = visible(x, row + rows - 1);
  return {min_of(first.lo, last.lo), last.hi};
}

// --- block maps -------------------------------------------------------------------------------------------------------

FA_INLINE bool block_shown(const Problem& x, int64_t band, int64_t column) {
  return *address(x.p->block_map, x.b, x.h, band, column) != 0;
}

// How many keys a tile takes that begins at `key`, at most `most`: all of them in one block, and a block in even pieces.
FA_INLINE int64_t cut_keys(const AttentionParams& p, int64_t key, int64_t most) {
  if (!p.block_map.data) return most;
  const int64_t piece = round_up(ceil_div(p.block_n, ceil_div(p.block_n, most)), 16), inside = key % p.block_n;
  return min_of(min_of(most, p.block_n - inside), piece - inside % piece);
}

// The same for a tile of rows row .. row + rows alone: neighbouring blocks are one where none of the rows tells them
// apart.
FA_INLINE int64_t cut_keys(const Problem& x, int64_t row, int64_t rows, int64_t key, int64_t most) {
  const AttentionParams& p = *x.p;
  if (!p.block_map.data) return most;
  const int64_t column = key / p.block_n, first = row / p.block_m, last = (row + rows - 1) / p.block_m;
  int64_t next = column + 1;
  for (bool same = true; same && next * p.block_n < key + most; next += same)
    for (int64_t band = first; same && band <= last; ++band)
      same = block_shown(x, band, column) == block_shown(x, band, next);
  return min_of(most, next * p.block_n - key);
}

// Rows from one tile to the next: none of them in two bands of blocks, unless those are short.
FA_INLINE int cut_rows(const AttentionParams& p, int most) {
  if (!p.block_map.data || p.block_m < 32) return even_rows(p.M, most);
  return static_cast<int>(min_of(ceil_div(p.block_m, ceil_div(p.block_m, most)), max_of<int64_t>(p.M, 1)));
}

// --- tiles ------------------------------------------------------------------------------------------------------------

// A tile of the scores: rows row .. row + rows, keys key .. key + keys.
struct Tile {
  int64_t row, key;
  int rows, keys;
  Span within;                   // of its keys: those that are looked at
  bool ragged;                   // not every row sees all keys of the tile
  Span span[kMaxRows];           // for each row, the keys it sees, relative to `key`
  Span panel[kMaxRows / 4 + 1];  // the union over each panel of MR rows
  const Span* panels() const { return ragged ? panel : nullptr; }
};

// False if the tile is hidden altogether. within: the keys that are looked at, if not all.
[[maybe_unused]] static bool make_tile(const Problem& x, int64_t row, int rows, int64_t key, int keys, Tile& t,
                                       Span within = {0, kMaxKeys}) {
  const Range first = visible(x, row), last = visible(x, row + rows - 1);
  within.hi = min_of(within.hi, keys);
  t.row = row, t.key = key, t.rows = rows, t.keys = keys, t.within = within;
  if (last.hi <= key + within.lo || first.lo >= key + within.hi) return false;
  t.ragged = !(last.lo <= key && first.hi >= key + keys && within.lo == 0 && within.hi == keys);
  const bool mapped = x.p->block_map.data != nullptr;
  const int64_t size = x.p->block_m, column = mapped ? (key + within.lo) / x.p->block_n : 0;
  if (mapped) {
    int64_t bands = 0, shown = 0;
    for (int64_t band = row / size; band * size < row + rows; ++band, ++bands) shown += block_shown(x, band, column);
    if (shown == 0) return false;
    t.ragged = t.ragged || shown < bands;
  }
  bool any = !t.ragged;
  for (int i = 0; t.ragged && i < rows; ++i) {
    const Range r = visible(x, row + i);
    Span s{static_cast<int>(max_of<int64_t>(r.lo - key, within.lo)),
           static_cast<int>(min_of<int64_t>(r.hi - key, within.hi))};
    if (s.hi <= s.lo || (mapped && !block_shown(x, (row + i) / size, column))) s = {0, 0};
    t.span[i] = s;
    Span& u = t.panel[i / MR];
    if (i % MR == 0 || u.hi <= u.lo)
      u = s;
    else if (s.hi > s.lo)
      u = {min_of(u.lo, s.lo), max_of(u.hi, s.hi)};
    any = any || s.hi > s.lo;
  }
  return any;
}
FA_INLINE Span row_span(const Tile& t, int i) { return t.ragged ? t.span[i] : Span{0, t.keys}; }
FA_INLINE Span panel_span(const Tile& t, int i) { return t.ragged ? t.panel[i / MR] : Span{0, t.keys}; }

// Whether a tile may hide some of its elements: only then can a NaN in K or V matter to nobody.
FA_INLINE bool may_hide(const Problem& x, const Tile& t) {
  const bool tree = x.p->tree.data && (x.p->window_left >= 0 || t.key + t.keys > x.seen - x.rows);
  return t.ragged || x.p->mask.data || x.p->bias.data || tree;
}

FA_INLINE bool has_dropout(const AttentionParams& p) { return p.dropout_p > 0.0; }
FA_INLINE Philox dropout_state(const Problem& x) {
  const AttentionParams& p = *x.p;
  Philox g{};
  g.key[0] = static_cast<uint32_t>(p.seed), g.key[1] = static_cast<uint32_t>(p.seed >> 32);
  g.head = static_cast<uint32_t>(x.h), g.batch = static_cast<uint32_t>(x.b);
  g.threshold = p.dropout_p < 1.0 ? static_cast<uint32_t>(p.dropout_p * 4294967296.0) : 0;
  return g;
}
template <class T>
FA_INLINE T dropout_keep(const AttentionParams& p) {  // the factor of what is kept; dropout_p = 1 keeps nothing
  return p.dropout_p < 1.0 ? static_cast<T>(1.0 / (1.0 - p.dropout_p)) : T(0);
}

// A bump allocator over a thread's scratch; with base 0 it only counts.
struct Arena {
  uintptr_t base;
  size_t used = 0;
  template <class T>
  T* take(int64_t n) {
    const uintptr_t at = base + used;
    used += static_cast<size_t>(round_up(n * static_cast<int64_t>(sizeof(T)), 64));
    return reinterpret_cast<T*>(at);
  }
};

FA_END
