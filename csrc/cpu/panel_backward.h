// dQ, dK and dV on packed panels (panels.h): backward.h's sums. For each panel of 32 rows and each block of up to 128
// keys, all of them [keys, 32]:
//
//   S^T = K Q^T;   dP^T = V dO^T;   P^T = exp2(c S^T - log2(e) lse);   dS^T = P^T (dP^T - delta - rest)
//   dV += P^T dO;   dK += dS^T Q (of up to 128 rows at once);   dQ^T += K^T dS^T
//
// q, k, v and dout are packed once. A task has a chunk of the keys of one (batch, key head): dK and dV of a block of
// keys stay in its scratch, dQ^T goes to the partial sum of the chunk, and the chunks are added in order.
//
// Items of problems with softcap, dropout, a tree mask or a gradient of the weights, and those that have all keys of some
// row, are turned into rows and back: recompute.h's code does them.
#pragma once
#include "panel_scores.h"
#include "recompute.h"

FA_BEGIN

struct PanelBackward {
  Plan<float> general;  // for items as rows
  PackPlan packed;      // 0: K as rows, as columns; 1: V as rows; 2, 3: Q and dO as pairs of columns, of rows
  int64_t d, dv;        // padded
  int64_t chunks, chunk_keys, first_pair, row_panels;
  float* partial;  // [pair, chunks, group, row_panels, d, 32]
  bool by_rows;
  Scores of;  // what an item has, if it is not turned into rows
  float scale, c;
};

struct PanelBackwardScratch {
  Scratch<float> w;
  float *s, *dp, *dk, *dv, *lse, *delta, *rest, *lines;
  Forms forms[2];
  PanelBackwardScratch(const PanelBackward& f, Arena& a) : w(f.general, a) {
    s = a.take<float>(2 * kItem);
    dp = a.take<float>(2 * kItem);
    dk = a.take<float>(kKeyBlock * f.d);
    dv = a.take<float>(kKeyBlock * f.dv);
    lse = a.take<float>(kPanel);
    delta = a.take<float>(kPanel);
    rest = a.take<float>(kPanel);
    lines = a.take<float>(f.of == Scores::scores ? kPanel * kLine : 0);
    for (Forms& form : forms) {
      form.p = a.take<uint16_t>(f.packed.parts * kForm);
      form.ds = a.take<uint16_t>(f.packed.parts * kForm);
      form.ds_pairs = a.take<uint16_t>(f.packed.parts * kForm);
    }
  }
};

class PanelBackwardTask {
 public:
  PanelBackwardTask(const PanelBackward& f, int64_t task, char* scratch)
      : f_(f), p_(f.packed.p), arena_{reinterpret_cast<uintptr_t>(scratch)}, w_(f, arena_) {
    const int64_t pair = f.first_pair + task / f.chunks, group = p_.H / p_.HK;
    b_ = pair / p_.HK, hk_ = pair % p_.HK, chunk_ = task % f.chunks;
    const int64_t size = group * f.row_panels * f.d * kPanel;
    partial_ = p_.dq.data ? f.partial + task * size : nullptr;
    if (partial_) __builtin_memset(partial_, 0, sizeof(float) * static_cast<size_t>(size));
  }

  void run() {
    const Problem any = make_problem(p_, b_, hk_ * (p_.H / p_.HK));
    const int64_t end = min_of(any.keys, (chunk_ + 1) * f_.chunk_keys);
    for (key_ = chunk_ * f_.chunk_keys; key_ < end; key_ += kKeyBlock) {
      __builtin_memset(w_.dk, 0, sizeof(float) * static_cast<size_t>(kKeyBlock * f_.d));
      __builtin_memset(w_.dv, 0, sizeof(float) * static_cast<size_t>(kKeyBlock * f_.dv));
      if (key_ < any.seen) run_block();
      for (int64_t i = 0; i < min_of<int64_t>(kKeyBlock, end - key_); ++i) {
        const int64_t at = any.key0 + key_ + i;
        if (p_.dk.data) store_row(address(p_.dk, any.batch, hk_, at), p_.dk.dtype, w_.dk + i * f_.d, f_.scale, p_.D);
        if (p_.dv.data) store_row(address(p_.dv, any.batch, hk_, at), p_.dv.dtype, w_.dv + i * f_.dv, 1.0f, p_.DV);
      }
    }
  }

 private:
  struct Work {
    Problem x;
    Item it;
    int64_t group, block;  // head within the group, block of rows
  };

  const PanelBackward& f_;
  const AttentionParams& p_;
  int64_t b_, hk_, chunk_, key_ = 0, group_ = 0, row_ = 0;
  int sub_ = 0;
  float* partial_;
  Arena arena_;
  PanelBackwardScratch w_;
  Queue soon_, later_;      // by the next item; by the end of the next block of rows
  Batch query_gradient_{};  // of the last item
  int form_ = 0;
  uint32_t seen_[kBlockPanels];  // of the block of rows at hand: a bit for each panel of keys that its panels see

  bool next_work(Work& work) {
    for (; group_ < p_.H / p_.HK; ++group_, row_ = 0) {
      work.x = make_problem(p_, b_, hk_ * (p_.H / p_.HK) + group_);
      while (row_ < work.x.rows) {
        work.group = group_, work.block = row_ / (kBlockPanels * kPanel);
        const int panel = static_cast<int>(row_ / kPanel % kBlockPanels);
        const bool found = make_item(work.x, row_, panel, key_, sub_, work.it);
        sub_ = found && p_.block_map.data ? work.it.last : 0;
        if (sub_ == 0) row_ += kPanel;
        if (found) return true;
      }
    }
    return false;
  }

  // All rows of all heads of the group against one block of keys.
  void run_block() {
    group_ = row_ = 0;
    Work now, next;
    int turn = 0;
    bool more = next_work(next);
    clear_panels();
    if (more) push_products(next, turn);
    soon_.run_all();
    while (more) {
      now = next;
      more = next_work(next);
      if (more) push_products(next, turn ^ 1);
      if (more) fetch_for_panel(p_.mask, next.x, next.it), fetch_for_panel(p_.bias, next.x, next.it);
      soon_.push(query_gradient_);
      query_gradient_.count = 0;
      const bool any = by_rows(now) ? general_gradient(now, turn) : gradient(now, turn);
      for (int sub = now.it.first; any && sub < now.it.last; ++sub) seen_[now.it.panel] |= 1u << sub;
      soon_.run_all();
      if (partial_ && any) query_gradient_ = query_gradient_of(now);
      if (!more || next.group != now.group || next.block != now.block) close_block(now);
      turn ^= 1;
    }
    soon_.push(query_gradient_);
    query_gradient_.count = 0;
    soon_.run_all();
    later_.run_all();
  }

  void push_products(const Work& work, int turn) {
    const PackPlan& k = f_.packed;
    const Item& it = work.it;
    const int64_t keys = it.key / kPanel + it.first, rows = it.row / kPanel;
    Product s{};
    s.a = rows_operand(k.panel(0, 0, b_, hk_, keys), f_.d);
    s.b = column_pairs_operand(k.panel(2, 0, b_, work.x.h, rows), f_.d);
    s.c = w_.s + turn * kItem + it.first * kPanel * kPanel, s.c_row_bytes = kPanel * 4;
    s.c_down = kTileRows * kPanel, s.c_right = 16;
    s.steps = static_cast<int>(f_.d / 32), s.terms = kExact[k.parts - 1];
    soon_.push({s, it.last - it.first, k.panel_size(0), 0, kPanel * kPanel});
    Product dp = s;
    dp.a = rows_operand(k.panel(1, 0, b_, hk_, keys), f_.dv);
    dp.b = column_pairs_operand(k.panel(3, 0, b_, work.x.h, rows), f_.dv);
    dp.c = w_.dp + turn * kItem + it.first * kPanel * kPanel;
    dp.steps = static_cast<int>(f_.dv / 32);
    soon_.push({dp, it.last - it.first, k.panel_size(1), 0, kPanel * kPanel});
  }

  Batch query_gradient_of(const Work& work) const {
    const PackPlan& k = f_.packed;
    const Item& it = work.it;
    Product dq{};
    dq.a = columns_operand(k.panel(0, 1, b_, hk_, it.key / kPanel + it.first), f_.d, k.panel_size(0));
    dq.b = {w_.forms[form_].ds_pairs + it.panel * kItem + it.first * kPanel * kPanel, kPanel * 4, 32, kPanel * kPanel,
            kForm};
    dq.c = partial_ + (work.group * f_.row_panels + it.row / kPanel) * f_.d * kPanel, dq.c_row_bytes = kPanel * 4;
    dq.c_down = kTileRows * kPanel, dq.c_right = 16;
    dq.steps = it.last - it.first, dq.terms = kRounded[k.parts - 1], dq.add = true;
    return {dq, static_cast<int>(f_.d / 32), 2 * kTile, 0, kPanel * kPanel};
  }

  void clear_panels() {
    for (uint32_t& seen : seen_) seen = 0;
  }

  // The block of rows is complete: dV and dK of it wait for the next one's items.
  void close_block(const Work& work) {
    const Forms& form = w_.forms[form_];
    later_.run_all();
    for (int sub = 0; sub < kSubs; ++sub) {
      int from = kBlockPanels, to = 0;
      for (int i = 0; i < kBlockPanels; ++i)
        if (seen_[i] >> sub & 1) from = min_of(from, i), to = i + 1;
      if (from >= to) continue;
      for (int i = from; i < to; ++i)  // a panel in between may see nothing here
        if (!(seen_[i] >> sub & 1))
          for (int part = 0; part < f_.packed.parts; ++part) {
            const int64_t at = part * kForm + i * kItem + sub * 2 * kTile;
            __builtin_memset(form.p + at, 0, 4 * kTile);
            __builtin_memset(form.ds + at, 0, 4 * kTile);
          }
      const int64_t rows = work.block * kBlockPanels + from;
      if (p_.dv.data) push_sum(form.p, 3, work, sub, rows, from, to, w_.dv, f_.dv);
      if (p_.dk.data) push_sum(form.ds, 2, work, sub, rows, from, to, w_.dk, f_.d);
    }
    clear_panels();
    form_ ^= 1;
  }
  void push_sum(const uint16_t* a, int packing, const Work& work, int sub, int64_t rows, int from, int to, float* sum,
                int64_t width) {
    const PackPlan& k = f_.packed;
    Product x{};
    x.a = {a + from * kItem + sub * 2 * kTile, kTileBytes, kTile, kItem, kForm};
    x.b = row_pairs_operand(k.panel(packing, 1, b_, work.x.h, rows), width, k.panel_size(packing));
    x.c = sum + sub * kPanel * width, x.c_row_bytes = width * 4, x.c_down = kTileRows * width, x.c_right = 16;
    x.steps = to - from, x.terms = kRounded[k.parts - 1], x.add = true;
    later_.push({x, static_cast<int>(width / 32), 0, 2 * kTile, 32});
  }

  bool by_rows(const Work& work) const {
    if (f_.by_rows) return true;
    for (int i = 0; i < work.it.rows; ++i) {
      const Range r = visible(work.x, work.it.row + i);
      if (r.hi > r.lo && row_is_whole(work.x, work.it.row + i, work.it.key, kKeyBlock)) return true;
    }
    return false;
  }

  Forms panel_forms(int panel, int sub) const {
    const Forms& form = w_.forms[form_];
    const int64_t at = panel * kItem + sub * kPanel * kPanel;
    return {form.p + at, form.ds + at, form.ds_pairs + at};
  }

  void load_row_statistics(const Work& work) {
    const Problem& x = work.x;
    for (int i = 0; i < kPanel; ++i) {
      w_.lse[i] = kInf<float>, w_.delta[i] = w_.rest[i] = 0;
      if (i >= work.it.rows) continue;
      const int64_t row = work.it.row + i;
      const float lse = *element<float>(p_.lse, x.batch, x.h, x.row0 + row);
      if (lse == -kInf<float>) continue;
      w_.lse[i] = f_.of == Scores::scores ? lse : static_cast<float>(static_cast<double>(lse) / kLn2);
      w_.delta[i] = *element<float>(p_.delta, x.batch, x.h, x.row0 + row);
      if (f_.general.rest) w_.rest[i] = f_.general.rest[rest_index(x, row)];
    }
  }

  bool gradient(const Work& work, int turn) {
    const Item& it = work.it;
    float *s = w_.s + turn * kItem, *dp = w_.dp + turn * kItem;
    const float* rest = f_.general.rest ? w_.rest : nullptr;
    if (f_.of == Scores::scores) finish_panel(work.x, it, f_.scale, w_.lines, s);
    if (!it.whole) hide_scores(work.x, it, s);
    load_row_statistics(work);
    for (int sub = it.first; sub < it.last; ++sub) {
      const int64_t at = sub * kPanel * kPanel;
      const Forms to = panel_forms(it.panel, sub);
      with_parts(f_.packed.parts, [&](auto n) {
        if (f_.of == Scores::scores)
          gradients_of<n.value, Scores::scores>(s + at, dp + at, f_.c, w_.lse, w_.delta, rest, to);
        else
          gradients_of<n.value, Scores::products>(s + at, dp + at, f_.c, w_.lse, w_.delta, rest, to);
      });
      soon_.run_share(it.last - sub);
      later_.run_share((kBlockPanels - it.panel) * kSubs - sub);
    }
    return true;
  }

  // False if no row sees any key.
  bool general_gradient(const Work& work, int turn) {
    const Item& it = work.it;
    Tile t;
    const int keys = static_cast<int>(min_of<int64_t>(kKeyBlock, work.x.seen - it.key));
    if (!make_tile(work.x, it.row, it.rows, it.key, keys, t, keys_of(it))) return false;
    float *s = w_.s + turn * kItem, *dp = w_.dp + turn * kItem;
    const int64_t ld = f_.general.lds;
    to_rows(it, s, f_.scale, w_.w.s, ld);
    to_rows(it, dp, 1.0f, w_.w.dp, ld);
    finish_probabilities<float>(work.x, f_.general, t, w_.w);
    finish_gradient<float>(work.x, f_.general, t, w_.w, true);
    clear_hidden(it, t, w_.w.s, ld);
    clear_hidden(it, t, w_.w.dp, ld);
    from_rows(it, w_.w.s, ld, s);
    from_rows(it, w_.w.dp, ld, dp);
    for (int sub = it.first; sub < it.last; ++sub) {
      const int64_t at = sub * kPanel * kPanel;
      const Forms to = panel_forms(it.panel, sub);
      with_parts(f_.packed.parts, [&](auto n) {
        gradients_of<n.value, Scores::ready>(s + at, dp + at, f_.c, w_.lse, w_.delta, nullptr, to);
      });
    }
    return true;
  }
};

[[maybe_unused]] static void panel_backward_task(const void* plan, int64_t task, char* scratch) {
  tiles_begin();
  PanelBackwardTask(*static_cast<const PanelBackward*>(plan), task, scratch).run();
  tiles_end();
}

// dq of one panel of rows: the partial sums in the order of their chunks.
[[maybe_unused]] static void panel_sum_dq_task(const void* plan, int64_t task, char* scratch) {
  const PanelBackward& f = *static_cast<const PanelBackward*>(plan);
  const AttentionParams& p = f.packed.p;
  const int64_t group = p.H / p.HK, panel = task % f.row_panels, g = task / f.row_panels % group;
  const int64_t wave_pair = task / f.row_panels / group, pair = f.first_pair + wave_pair;
  const Problem x = make_problem(p, pair / p.HK, pair % p.HK * group + g);
  const int64_t row = panel * kPanel, size = f.d * kPanel;
  if (row >= x.rows) return;
  float *sum = reinterpret_cast<float*>(scratch), *rows = sum + size;
  for (int64_t chunk = 0; chunk < f.chunks; ++chunk) {
    const float* from = f.partial + (((wave_pair * f.chunks + chunk) * group + g) * f.row_panels + panel) * size;
    for (int64_t i = 0; i < size; ++i) sum[i] = chunk ? sum[i] + from[i] : from[i];
  }
  transpose_words(sum, kPanel, rows, f.d, static_cast<int>(f.d), kPanel);
  for (int64_t i = 0; i < min_of<int64_t>(kPanel, x.rows - row); ++i)
    store_row(address(p.dq, x.batch, x.h, x.row0 + row + i), p.dq.dtype, rows + i * f.d, static_cast<float>(p.scale),
              p.D);
}

// All (batch, key head) pairs, in waves whose partial sums fit in memory; the waves do not change any number.
[[maybe_unused]] static bool run_backward_waves(PanelBackward& f, double work) {
  const AttentionParams& p = f.packed.p;
  const int64_t pairs = p.B * p.HK, group = p.H / p.HK;
  const int64_t per_pair = f.chunks * group * f.row_panels * f.d * kPanel * static_cast<int64_t>(sizeof(float));
  int64_t wave = pairs;
  if (p.dq.data) wave = min_of(pairs, max_of<int64_t>((24 << 20) / max_of<int64_t>(per_pair, 1), p.threads));
  f.partial = p.dq.data ? static_cast<float*>(allocate(static_cast<size_t>(wave * per_pair))) : nullptr;
  if (p.dq.data && !f.partial) return false;
  Arena count{0};
  PanelBackwardScratch layout(f, count);
  const size_t sum_bytes = 2 * sizeof(float) * static_cast<size_t>(f.d * kPanel);
  bool ok = true;
  for (f.first_pair = 0; ok && f.first_pair < pairs; f.first_pair += wave) {
    const int64_t here = min_of(wave, pairs - f.first_pair);
    ok = run_tasks(here * f.chunks, p.threads, work, count.used, panel_backward_task, &f);
    if (ok && p.dq.data)
      ok = run_tasks(here * group * f.row_panels, p.threads, work / kProductSpeed, sum_bytes, panel_sum_dq_task, &f);
  }
  release(f.partial);
  return ok;
}

// The gradients of q, k and v, given delta and rest in the plan; unfit: nothing was done.
[[maybe_unused]] static Packed panel_backward(const Plan<float>& given, double work) {
  PanelBackward f{};
  const AttentionParams& p = given.p;
  f.general = given;
  f.general.bm = kPanel, f.general.bn = kKeyBlock, f.general.lds = kKeyBlock + 16;
  f.packed.p = p, f.packed.parts = parts_of(p.q.dtype);
  const bool negate = p.scale < 0;
  f.packed.add(p.k, true, p.D, false, as_rows, p.dq.data ? as_columns : nullptr);
  f.packed.add(p.v, true, p.DV, false, as_rows, nullptr);
  f.packed.add(p.q, false, p.D, negate, pairs_of_columns, p.dk.data ? pairs_of_rows : nullptr);
  f.packed.add(p.dout, false, p.DV, false, pairs_of_columns, p.dv.data ? pairs_of_rows : nullptr);
  f.d = panel_width(p.D), f.dv = panel_width(p.DV);
  f.by_rows = p.tree.data || has_dropout(p) || p.dweights.data || p.softcap != 0.0;
  f.of = scores_of(p);
  f.scale = static_cast<float>(__builtin_fabs(p.scale));
  f.c = exponent_factor(p);
  f.row_panels = ceil_div(p.M, kPanel);
  const int64_t batch = p.batch_invariant ? 1 : p.B;
  f.chunks = backward_chunks<float>(batch, p.HK, p.H / p.HK, p.M, p.N, p.D, kKeyBlock);
  f.chunk_keys = round_up(ceil_div(max_of<int64_t>(p.N, 1), f.chunks), kKeyBlock);
  Packed result = pack_all(f.packed);
  if (result == Packed::done && !run_backward_waves(f, work * kExact[f.packed.parts - 1] / kProductSpeed))
    result = Packed::no_memory;
  release(f.packed.memory);
  return result;
}

FA_END
