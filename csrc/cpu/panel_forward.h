// Forward pass on packed panels (panels.h): forward.h's online softmax, transposed. For each panel of 32 rows and each
// block of up to 128 keys:
//
//   S^T = K Q^T [keys, 32];   P^T = exp2(c S^T - t);   O^T = alpha O^T + V^T P^T [DV, 32]
//
// K (as rows) and V (as columns) are packed once, for all blocks of rows and all query heads that share them. A task
// has some panels of rows of one (batch, head) and takes them in turns through the blocks of keys. On AMX the tiles have
// the scores of the next item and the values of the last one while the vector unit is at the softmax of this one.
//
// With int8 the scores are of codes (panel_int8.h), and K is packed there.
//
// Softcap, ALiBi, mask and bias come between product and softmax (panel_scores.h). Dropout and tree masks turn an item into
// rows and back: forward.h's code does it.
#pragma once
#include "forward.h"
#include "panel_int8.h"
#include "panel_scores.h"

FA_BEGIN

constexpr int kForwardPanels = 4;  // K and V are read once for so many

struct PanelForward {
  PackPlan packed;  // 0: K as rows, 1: V as columns
  Int8Keys keys;    // with int8: K
  int panels;       // of a task
  int64_t blocks;   // tasks of a (batch, head)
  int64_t d, dv;    // padded
  bool kept;        // the weights of all keys stay, of one panel (panel_weights.h)
  bool by_rows;     // an item is turned into rows
  Scores of;        // what the softmax gets, if not
  float scale, c;
};

struct PanelForwardScratch {
  uint16_t *strip, *q, *pairs;
  float *s, *o, *m, *l, *alpha, *rows, *out, *keep;
  float *tops, *stats;  // where weights are kept: [panels of keys, 32], NaN for none; [32, 2]
  Int8Rows int8;
  RowBuffers<float> row;
  PanelForwardScratch(const PanelForward& f, Arena& a) {
    const int parts = f.packed.parts;
    strip = a.take<uint16_t>(parts * kPanel * f.d);
    q = a.take<uint16_t>(f.panels * parts * kPanel * f.d);  // pairs of columns
    pairs = a.take<uint16_t>(2 * parts * kItem);            // P^T, of two items
    const int64_t codes = f.packed.p.int8 ? f.panels * kPanel : 0;
    int8 = {a.take<float>(codes), a.take<float>(codes), a.take<int32_t>(codes)};
    const int64_t items = f.kept ? ceil_div(f.packed.p.N, kKeyBlock) : 0;
    s = a.take<float>((f.kept ? items : 2) * kItem);  // S^T, of two items where they are not kept
    tops = a.take<float>(items * kSubs * kPanel);
    stats = a.take<float>(f.kept ? 2 * kPanel : 0);
    o = a.take<float>(f.panels * f.dv * kPanel);
    m = a.take<float>(f.panels * kPanel);
    l = a.take<float>(f.panels * kPanel);
    alpha = a.take<float>(kPanel);
    rows = a.take<float>(f.kept || f.by_rows || f.of == Scores::scores ? kPanel * kLine : 0);
    out = a.take<float>(kPanel * f.dv);
    keep = a.take<float>(kMaxKeys + 16);
    row.mask = a.take<float>(kMaxKeys + 16);
    row.bias = a.take<float>(kMaxKeys + 16);
  }
};

class PanelForwardTask {
 public:
  PanelForwardTask(const PanelForward& f, const Problem& x, int64_t row, char* scratch)
      : f_(f), p_(f.packed.p), x_(x), row_(row), arena_{reinterpret_cast<uintptr_t>(scratch)}, w_(f, arena_) {
    panels_ = static_cast<int>(min_of<int64_t>(f.panels, ceil_div(x.rows - row, kPanel)));
    for (int i = 0; i < panels_; ++i) load_queries(i);
    for (int i = 0; i < panels_ * kPanel; ++i) w_.m[i] = -kInf<float>, w_.l[i] = 0;
    for (int i = 0; i < kForwardPanels; ++i) fresh_[i] = true;
    const Range r = visible(x, row, min_of<int64_t>(panels_ * kPanel, x.rows - row));
    key_ = r.lo / kKeyBlock * kKeyBlock, end_ = r.hi;
    for (int64_t i = 0; f.kept && i < ceil_div(p_.N, kKeyBlock) * kSubs; ++i) *tops(i) = __builtin_nanf("");
    for (int i = 0; f.kept && i < 2 * kPanel; ++i) w_.stats[i] = 0;
  }

  void run() {
    Item now, next;
    int turn = 0;
    bool more = next_item(next);
    if (more) push_scores(next, turn);
    queue_.run_all();
    while (more) {
      now = next;
      more = next_item(next);
      // The next scores first: they are wanted as soon as this softmax is done, the last values later.
      if (more) push_scores(next, turn ^ 1);
      push_values();
      if (more) fetch_for_panel(p_.mask, x_, next), fetch_for_panel(p_.bias, x_, next);
      if (p_.int8)
        scores_of_codes(now, scores(now, turn), int8_rows(now.panel),
                        f_.keys.scales(x_.b, x_.hk, now.key / kPanel + now.first));
      const bool any = f_.by_rows ? general_softmax(now, turn) : softmax(now, turn);
      queue_.run_all();
      if (any) values_ = values_of(now, turn);
      if (any && f_.kept) keep_tops(now);
      turn ^= 1;
    }
    push_values();
    queue_.run_all();
    for (int i = 0; i < panels_; ++i) write_panel(i);
  }

  // to [N, 32] += share P^T of the one panel of rows, where weights are kept.
  void add_weights(float share, float* to) const {
    const float unit = static_cast<float>(unit_of_tops());
    Vec<float> shift[kLanes], inverse[kLanes];
    for (int i = 0; i < kPanel; ++i) {
      shift[i / VL<float>][i % VL<float>] = w_.stats[2 * i];
      inverse[i / VL<float>][i % VL<float>] = w_.stats[2 * i + 1] * share;
    }
    for (int64_t panel = 0; panel < ceil_div(p_.N, kPanel); ++panel) {
      const float *top = tops(panel), *p = w_.s + panel * kPanel * kPanel;
      if (*top != *top) continue;
      for (int l = 0; l < kLanes; ++l) {
        const Vec<float> factor = vexp<float>(load<float>(top + l * VL<float>) * unit - shift[l]) * inverse[l];
        for (int64_t j = l * VL<float>; j < kPanel * kPanel; j += kPanel) {
          float* at = to + panel * kPanel * kPanel + j;
          store<float>(at, load<float>(at) + load<float>(p + j) * factor);
        }
      }
    }
  }

  // Sums [N, 32] as the weights of these rows of a head.
  void store_weights(int64_t head, const float* from) const {
    const int rows = static_cast<int>(min_of<int64_t>(kPanel, x_.rows - row_));
    for (int64_t key = 0; key < p_.N; key += kKeyBlock) {
      const int keys = static_cast<int>(min_of<int64_t>(kKeyBlock, p_.N - key));
      transpose_words(from + key * kPanel, kPanel, w_.rows, kLine, static_cast<int>(round_up(keys, kPanel)), kPanel);
      for (int i = 0; i < rows; ++i)
        store_row(address(p_.weights, x_.b, head, row_ + i, key), p_.weights.dtype, w_.rows + i * kLine, 1.0f, keys);
    }
  }

 private:
  const PanelForward& f_;
  const AttentionParams& p_;
  const Problem& x_;
  int64_t row_, key_, end_;
  int panels_, panel_ = 0, sub_ = 0;
  bool fresh_[kForwardPanels];  // nothing was added to O of the panel yet
  Arena arena_;
  PanelForwardScratch w_;
  Queue queue_;
  Batch values_{};  // of the last item

  uint16_t* queries(int panel) const { return w_.q + panel * f_.packed.parts * kPanel * f_.d; }
  Int8Rows int8_rows(int panel) const {
    const int64_t at = panel * kPanel;
    return {w_.int8.scale + at, w_.int8.common + at, w_.int8.excess + at};
  }
  float* scores(const Item& it, int turn) const { return w_.s + (f_.kept ? it.key / kKeyBlock : turn) * kItem; }
  uint16_t* pairs(int turn) const { return w_.pairs + turn * f_.packed.parts * kItem; }

  void load_queries(int panel) {
    const int64_t row = row_ + panel * kPanel;
    const int rows = static_cast<int>(min_of<int64_t>(kPanel, x_.rows - row));
    if (p_.int8)
      return quantise_queries(f_.keys, x_, row, rows, p_.scale < 0, w_.strip, queries(panel), int8_rows(panel));
    load_strip(w_.strip, f_.d, row_address(p_.q, x_, x_.h, x_.row0 + row), p_.q.dtype, p_.q.stride[2], rows, p_.D,
               p_.scale < 0);
    for (int part = 0; part < f_.packed.parts; ++part)
      pairs_of_columns(queries(panel) + part * kPanel * f_.d, w_.strip + part * kPanel * f_.d, f_.d);
  }

  // The panels take turns with a block of keys, which stays in the caches meanwhile.
  bool next_item(Item& it) {
    for (; key_ < end_; key_ += kKeyBlock, panel_ = 0)
      while (panel_ < panels_) {
        const bool found = make_item(x_, row_ + panel_ * kPanel, panel_, key_, sub_, it);
        sub_ = found && p_.block_map.data ? it.last : 0;
        panel_ += sub_ == 0;
        if (found) return true;
      }
    return false;
  }

  void push_scores(const Item& it, int turn) {
    const PackPlan& packed = f_.packed;
    const int64_t at = it.key / kPanel + it.first, width = p_.int8 ? f_.keys.width / 2 : f_.d;
    const uint16_t* k = p_.int8 ? f_.keys.panel(x_.b, x_.hk, at) : packed.panel(0, 0, x_.b, x_.hk, at);
    Product s{};
    s.a = rows_operand(k, width), s.b = column_pairs_operand(queries(it.panel), width);
    s.c = scores(it, turn) + it.first * kPanel * kPanel, s.c_row_bytes = kPanel * 4;
    s.c_down = kTileRows * kPanel, s.c_right = 16;
    s.steps = static_cast<int>(width / 32), s.terms = p_.int8 ? 1 : kExact[packed.parts - 1], s.int8 = p_.int8;
    queue_.push({s, it.last - it.first, p_.int8 ? f_.keys.panel_size() : packed.panel_size(0), 0, kPanel * kPanel});
  }
  void push_values() {
    queue_.push(values_);
    values_.count = 0;
  }
  Batch values_of(const Item& it, int turn) {
    const PackPlan& packed = f_.packed;
    const uint16_t* v = packed.panel(1, 0, x_.b, x_.hk, it.key / kPanel + it.first);
    Product o{};
    o.a = columns_operand(v, f_.dv, packed.panel_size(1));
    o.b = {pairs(turn) + it.first * kPanel * kPanel, kPanel * 4, 32, kPanel * kPanel, kItem};
    o.c = w_.o + it.panel * f_.dv * kPanel, o.c_row_bytes = kPanel * 4;
    o.c_down = kTileRows * kPanel, o.c_right = 16;
    o.steps = it.last - it.first, o.terms = kRounded[packed.parts - 1];
    o.add = !fresh_[it.panel];
    fresh_[it.panel] = false;
    return {o, static_cast<int>(f_.dv / 32), 2 * kTile, 0, kPanel * kPanel};
  }

  // O of a panel times alpha, after all that was to be added to it.
  void shrink(int panel) {
    if (fresh_[panel]) return;
    queue_.run_all();
    float* o = w_.o + panel * f_.dv * kPanel;
    for (int64_t i = 0; i < f_.dv; ++i, o += kPanel)
      for (int l = 0; l < kPanel; l += VL<float>) store<float>(o + l, load<float>(o + l) * load<float>(w_.alpha + l));
  }

  bool softmax(const Item& it, int turn) {
    float *s = scores(it, turn), *m = w_.m + it.panel * kPanel, *sums = w_.l + it.panel * kPanel;
    const bool natural = f_.of == Scores::scores;
    const float unit = natural ? 1.0f : f_.c, slack = natural ? kSlack * static_cast<float>(kLn2) : kSlack;
    if (natural) finish_panel(x_, it, f_.scale, w_.rows, s);
    if (!it.whole) hide_scores(x_, it, s);
    Vec<float> top[kLanes], shift[kLanes], sum[kLanes];
    largest(it, s, top);
    int32_t moved = 0;
    for (int l = 0; l < kLanes; ++l) {
      const Vec<float> old = load<float>(m + l * VL<float>), wanted = top[l] * unit;
      const IVec<float> grows = wanted > old + slack;
      const Vec<float> next = grows ? wanted : old, shrunk = vexp2(natural ? (old - next) * f_.c : old - next);
      store<float>(w_.alpha + l * VL<float>, grows ? shrunk : splat<float>(1.0f));
      store<float>(m + l * VL<float>, next);
      shift[l] = next == -kInf<float> ? Vec<float>{} : next;
      sum[l] = Vec<float>{};
      for (int i = 0; i < VL<float>; ++i) moved |= grows[i];
    }
    if (moved) {
      shrink(it.panel);
      for (int i = 0; i < kPanel; ++i) sums[i] *= w_.alpha[i];
    }
    for (int sub = it.first; sub < it.last; ++sub) {
      const int64_t at = sub * kPanel * kPanel;
      uint16_t* to = pairs(turn) + at;
      with_parts(f_.packed.parts, [&](auto n) {
        if (f_.kept && natural)
          weights_of<n.value, Scores::scores, true>(s + at, f_.c, shift, sum, to, kItem);
        else if (f_.kept)
          weights_of<n.value, Scores::products, true>(s + at, f_.c, shift, sum, to, kItem);
        else if (natural)
          weights_of<n.value, Scores::scores, false>(s + at, f_.c, shift, sum, to, kItem);
        else
          weights_of<n.value, Scores::products, false>(s + at, f_.c, shift, sum, to, kItem);
      });
      queue_.run_share(it.last - sub);
    }
    for (int l = 0; l < kLanes; ++l) store<float>(sums + l * VL<float>, load<float>(sums + l * VL<float>) + sum[l]);
    return true;
  }

  // False if no row sees any key.
  bool general_softmax(const Item& it, int turn) {
    Tile t;
    const int keys = static_cast<int>(min_of<int64_t>(kKeyBlock, x_.seen - it.key));
    if (!make_tile(x_, it.row, it.rows, it.key, keys, t, keys_of(it))) return false;
    float* s = scores(it, turn);
    to_rows(it, s, f_.scale, w_.rows, kLine);
    finish_scores<float>(x_, t, w_.rows, kLine, nullptr, w_.row);
    for (int i = 0; i < kPanel; ++i) w_.alpha[i] = 1;
    online_softmax<float>(t, w_.rows, kLine, w_.m + it.panel * kPanel, w_.l + it.panel * kPanel, w_.alpha);
    if (has_dropout(p_)) drop_tile<float>(x_, t, w_.rows, kLine, w_.keep);
    clear_hidden(it, t, w_.rows, kLine);
    from_rows(it, w_.rows, kLine, s);
    const int64_t at = it.first * kPanel * kPanel;
    const int count = (it.last - it.first) * kPanel;
    with_parts(f_.packed.parts, [&](auto n) { pairs_of_keys<n.value>(s + at, count, pairs(turn) + at, kItem); });
    bool moved = false;
    for (int i = 0; i < it.rows; ++i) moved = moved || w_.alpha[i] != 1;
    if (moved) shrink(it.panel);
    return true;
  }

  void write_panel(int panel) {
    float* o = w_.o + panel * f_.dv * kPanel;
    const int64_t row = row_ + panel * kPanel;
    if (fresh_[panel]) __builtin_memset(o, 0, sizeof(float) * static_cast<size_t>(f_.dv * kPanel));
    transpose_words(o, kPanel, w_.out, f_.dv, static_cast<int>(f_.dv), kPanel);
    write_rows<float>(x_, row, static_cast<int>(min_of<int64_t>(kPanel, x_.rows - row)), w_.out, f_.dv,
                      w_.m + panel * kPanel, w_.l + panel * kPanel, unit_of_tops(), f_.kept ? w_.stats : nullptr);
  }

  // Of m, in natural logarithms.
  double unit_of_tops() const { return f_.by_rows || f_.of == Scores::scores ? 1.0 : kLn2; }

  void keep_tops(const Item& it) {
    for (int sub = it.first; sub < it.last; ++sub)
      __builtin_memcpy(tops(it.key / kPanel + sub), w_.m, sizeof(float) * kPanel);
  }
  float* tops(int64_t panel) const { return w_.tops + panel * kPanel; }
};

[[maybe_unused]] static void panel_forward_task(const void* plan, int64_t task, char* scratch) {
  const PanelForward& f = *static_cast<const PanelForward*>(plan);
  const int64_t pair = task / f.blocks;
  const Problem x = make_problem(f.packed.p, pair / f.packed.p.H, pair % f.packed.p.H);
  // Causal rows see the more keys the further down they are: the last block is handed out first.
  const int64_t row = (f.blocks - 1 - task % f.blocks) * f.panels * kPanel;
  if (row >= x.rows) return;
  tiles_begin();
  PanelForwardTask(f, x, row, scratch).run();
  tiles_end();
}

// As many panels a task as share K and V, unless that leaves fewer than 32 tasks, which keep any desktop busy. A row is
// the same to the last bit in any of them.
FA_INLINE void share_rows(PanelForward& f, int64_t heads, int64_t rows) {
  const int64_t panels = ceil_div(rows, kPanel);
  const int64_t blocks = min_of(panels, max_of(ceil_div(panels, kForwardPanels), ceil_div(32, heads)));
  f.panels = static_cast<int>(ceil_div(panels, blocks));
  f.blocks = ceil_div(panels, f.panels);
}

[[maybe_unused]] static PanelForward make_panel_forward(const AttentionParams& p) {
  PanelForward f{};
  f.packed.p = p, f.packed.parts = parts_of(p.q.dtype);
  f.packed.add(p.k, true, p.D, false, p.int8 ? nullptr : as_rows, nullptr);
  f.packed.add(p.v, true, p.DV, false, as_columns, nullptr);
  f.d = panel_width(p.D), f.dv = panel_width(p.DV);
  f.by_rows = p.tree.data || has_dropout(p);
  f.of = scores_of(p);
  f.scale = static_cast<float>(__builtin_fabs(p.scale));
  f.c = exponent_factor(p);
  return f;
}

FA_INLINE double panel_work(const PanelForward& f) {
  return forward_work(f.packed.p) * kExact[f.packed.parts - 1] / kProductSpeed;
}

[[maybe_unused]] static bool panel_forward(const AttentionParams& p) {
  PanelForward f = make_panel_forward(p);
  share_rows(f, p.B * p.H, p.M);
  Packed packed = pack_all(f.packed);
  bool ok = packed != Packed::no_memory && (packed == Packed::unfit || !p.int8 || quantise_keys(f.keys, p));
  if (ok && packed == Packed::done) {
    Arena count{0};
    PanelForwardScratch layout(f, count);
    ok = run_tasks(p.B * p.H * f.blocks, p.threads, panel_work(f), count.used, panel_forward_task, &f);
  }
  release(f.keys.memory);
  release(f.packed.memory);
  return packed == Packed::unfit ? forward<float>(p) : ok;
}

FA_END
