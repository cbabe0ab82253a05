// Forward pass for few rows of queries, as in decoding: bound by reading K and V, each of which is read once, where it
// lies, for all rows of the query heads that share it. The keys are split among tasks (Dao et al., "Flash-Decoding",
// 2023), and the parts of a row are merged in their order:
//
//   top = max_s m_s;   l = sum_s l_s exp(m_s - top);   O = sum_s O_s exp(m_s - top)
//
// K and V may be those of a cache, in pages and quantised (stored.h).
//
// A task has R = heads * M rows of one (batch, key head). Row r is row r % M of head r / M.
#pragma once
#include "few_dots.h"
#include "forward.h"

FA_BEGIN

constexpr int kFewRows = 32;

struct FewRows {
  AttentionParams p;
  int heads;             // query heads of a task
  int64_t head_blocks;   // tasks that share a key head
  int64_t splits, keys;  // of the keys, and how many each has
  int64_t ldq, ldv, lds;
  bool key_dots, value_dots;  // by few_dots.h; q is bf16 then
  float* partial;             // [batch, key head, head block, split, R, ldv + 2]: O, then m and l; null with one split
  int64_t rows() const { return heads * p.M; }
  int64_t part() const { return rows() * (ldv + 2); }
};

struct FewRowsScratch {
  float *q, *k, *v, *s, *o, *m, *l, *alpha, *scales;
  uint16_t* pairs;
  RowBuffers<float> row;
  FewRowsScratch(const FewRows& f, Arena& a) {
    q = a.take<float>(f.rows() * f.ldq);
    k = a.take<float>(kFewKeys * f.ldq);
    v = a.take<float>(kFewKeys * f.ldv);
    s = a.take<float>(f.rows() * f.lds);
    o = a.take<float>(f.rows() * f.ldv);
    m = a.take<float>(f.rows());
    l = a.take<float>(f.rows());
    alpha = a.take<float>(f.rows());
    scales = a.take<float>(kFewKeys);
    pairs = a.take<uint16_t>(f.value_dots ? f.rows() * f.lds : 0);
    row.mask = a.take<float>(kMaxKeys + 16);
    row.bias = a.take<float>(kMaxKeys + 16);
  }
};

// The rows of which dot_scores takes eight at a time.
FA_INLINE int dot_rows_of(const FewRows& f) {
  return f.key_dots ? static_cast<int>(f.rows()) / kScoreRows * kScoreRows : 0;
}

// Calls run(Numbers<type>).
template <class Run>
FA_INLINE void with_numbers(DType type, Run run) {
  switch (type) {
    case DType::bf16:
      return run(Numbers<DType::bf16>{});
    case DType::i8:
      return run(Numbers<DType::i8>{});
    case DType::e4m3:
      return run(Numbers<DType::e4m3>{});
#if defined(__F16C__)
    case DType::f16:
      return run(Numbers<DType::f16>{});
#endif
    default:
      return run(Numbers<DType::f32>{});
  }
}

// The rows from `row` on.
template <class Terms>
[[maybe_unused]] static void score_keys(const FewRows& f, const FewRowsScratch& w, int row, int keys, int64_t width,
                                        const StoredRows& k, const StoredRows& next, float factor) {
  constexpr int most = VL<float> < 4 ? VL<float> : 4;
  const int rows = static_cast<int>(f.rows()), whole = row + (rows - row) / most * most;
  if (row < whole)
    few_products<Terms, most>(whole - row, keys, width, w.q + row * f.ldq, f.ldq, factor, k,
                              Ahead(next, row, whole, rows), w.s + row * f.lds, f.lds);
  if (whole < rows)
    few_products<Terms, 1>(rows - whole, keys, width, w.q + whole * f.ldq, f.ldq, factor, k,
                           Ahead(next, whole, rows, rows), w.s + whole * f.lds, f.lds);
}
// S = scale q K^T.
[[maybe_unused]] static void score_keys(const FewRows& f, const FewRowsScratch& w, int keys, const StoredRows& k,
                                        const StoredRows& next) {
  const float scale = static_cast<float>(f.p.scale);
#if defined(__AVX512BF16__)
  if (f.key_dots) {
    const int rows = static_cast<int>(f.rows()), eights = dot_rows_of(f);
    for (int r = 0; r < eights; r += kScoreRows)
      dot_scores(keys, f.p.D, reinterpret_cast<const char*>(w.q + r * f.ldq), scale, k,
                 Ahead(next, r, r + kScoreRows, rows), w.s + r * f.lds, f.lds);
    return score_keys<PairsOfColumns>(f, w, eights, keys, f.ldq / 2, k, next, scale);
  }
#endif
  with_numbers(k.type, [&](auto numbers) { score_keys<decltype(numbers)>(f, w, 0, keys, f.ldq, k, next, scale); });
}

template <DType S>
[[maybe_unused]] static void add_values(const FewRows& f, const FewRowsScratch& w, int keys, const StoredRows& v,
                                        const StoredRows& next) {
  const int rows = static_cast<int>(f.rows());
  int64_t done = 0;
  if (rows < 4) done = add_columns<S, 8>(rows, keys, 0, f.ldv, w.s, f.lds, v, next, w.alpha, w.o, f.ldv);
  add_columns<S, 2>(rows, keys, done, f.ldv, w.s, f.lds, v, next, w.alpha, w.o, f.ldv);
}
// O = alpha O + P V.
[[maybe_unused]] static void add_values(const FewRows& f, const FewRowsScratch& w, int keys, StoredRows& v,
                                        const StoredRows& next) {
#if defined(__AVX512BF16__)
  if (f.value_dots)
    return add_values_by_dots(static_cast<int>(f.rows()), keys, f.ldv, w.s, f.lds, w.pairs, v, next, w.alpha, w.o,
                              f.ldv);
#endif
  with_numbers(v.type, [&](auto numbers) { add_values<decltype(numbers)::type>(f, w, keys, v, next); });
}

// The scores of a tile, times the scales of its keys.
[[maybe_unused]] static void scale_scores(const FewRows& f, const FewRowsScratch& w, int keys) {
  for (int64_t r = 0; r < f.rows(); ++r)
    for (int j = 0; j < keys; j += VL<float>) {
      float* at = w.s + r * f.lds + j;
      store<float>(at, load<float>(at) * load<float>(w.scales + j));
    }
}
// The weights, times the scales of its values. hides: the scale of what has no weight may be NaN, and matters not.
[[maybe_unused]] static void scale_weights(const FewRows& f, const FewRowsScratch& w, int keys, bool hides) {
  for (int64_t r = 0; r < f.rows(); ++r)
    for (int j = 0; j < keys; j += VL<float>) {
      float* at = w.s + r * f.lds + j;
      const Vec<float> weight = load<float>(at), scaled = weight * load<float>(w.scales + j);
      store<float>(at, hides ? (weight == 0.0f ? weight : scaled) : scaled);
    }
}

// Rows of K or V that can be read where they lie, and no further than their end, or else a copy. dots: as bfloat16.
[[maybe_unused]] static void make_readable(StoredRows& rows, int64_t columns, int64_t width, float* copy,
                                           [[maybe_unused]] bool dots) {
#if defined(__AVX512BF16__)
  if (dots) {
    if (rows.type != DType::bf16) copy_pairs(rows, columns, reinterpret_cast<uint16_t*>(copy));
    return;
  }
#endif
  const bool as_is = columns == width && direct(rows.type);
  if (!as_is || (rows.type == DType::e4m3 && nan_codes(rows, rows.keys, columns)))
    copy_rows(rows, rows.keys, columns, width, copy);
}

// Writes 0 where `bad`; whether it was anywhere.
template <class T, class Bad>
FA_INLINE bool clear(T* x, int64_t count, Bad bad) {
  bool any = false;
  for (int64_t i = 0; i < count; ++i) {
    any |= bad(x[i]);
    x[i] = bad(x[i]) ? T(0) : x[i];
  }
  return any;
}

// Where keys are hidden, a V that is not finite must not meet a weight of 0: it is 0 in a copy, from which the sums are
// made as from V itself, and what it gives the rows that do see it is added after them. So hidden values cannot change
// a bit of the output.

// That copy, of V's own type for dot products; false if all of it is finite.
[[maybe_unused]] static bool clear_values(const FewRows& f, const FewRowsScratch& w, int keys, StoredRows& v) {
#if defined(__AVX512BF16__)
  if (f.value_dots) {
    uint16_t* to = reinterpret_cast<uint16_t*>(w.v);
    copy_pairs(v, f.p.DV, to);
    return clear(to, keys * f.p.DV, [](uint16_t x) { return (x & 0x7f80) == 0x7f80; });
  }
#endif
  copy_rows(v, keys, f.p.DV, f.ldv, w.v);
  return clear(w.v, keys * f.ldv, [](float x) { return x - x != 0.0f; });
}
// O += P V for what was cleared. The copy is of no use any more.
[[maybe_unused]] static void add_cleared(const FewRows& f, const FewRowsScratch& w, int keys, const StoredRows& v) {
  float* value = w.v;
  for (int j = 0; j < keys; ++j) {
    load_row(value, v.row[j], v.type, f.p.DV);
    for (int64_t d = 0; d < f.p.DV; ++d) {
      if (value[d] - value[d] == 0.0f) continue;
      for (int64_t r = 0; r < f.rows(); ++r)
        if (w.s[r * f.lds + j] != 0.0f) w.o[r * f.ldv + d] += w.s[r * f.lds + j] * value[d];
    }
  }
}

// One tile of keys for all rows of a task.
[[maybe_unused]] static void few_tile(const FewRows& f, const Problem* heads, const Tile& t, int64_t end,
                                      const FewRowsScratch& w) {
  const AttentionParams& p = f.p;
  const Problem& any = heads[0];
  const int m = static_cast<int>(p.M);
  StoredRows k, v, next;
  find_rows(p.v, any, t.key, t.keys, p.DV, v);
  find_rows(p.k, any, t.key, t.keys, p.D, k);
  find_rows(p.k, any, t.key + t.keys, static_cast<int>(min_of<int64_t>(kFewKeys, end - t.key - t.keys)), p.D, next);
  make_readable(k, p.D, f.ldq, w.k, f.key_dots);
  score_keys(f, w, t.keys, k, v);
  if (find_scales(p.k_scale, any, t.key, t.keys, w.scales)) scale_scores(f, w, t.keys);
  const int width = static_cast<int>(round_up(t.keys, VL<float>));
  for (int g = 0; g < f.heads; ++g) {
    float* s = w.s + g * m * f.lds;
    finish_scores<float>(heads[g], t, s, f.lds, nullptr, w.row);
    online_softmax<float>(t, s, f.lds, w.m + g * m, w.l + g * m, w.alpha + g * m);
    for (int i = 0; t.ragged && i < m; ++i) {  // what finish_scores leaves undefined
      const Span own = panel_span(t, i);
      for (int j = 0; j < own.lo; ++j) s[i * f.lds + j] = 0;
      for (int j = own.hi; j < width; ++j) s[i * f.lds + j] = 0;
    }
  }
  const bool hides = may_hide(any, t);
  if (find_scales(p.v_scale, any, t.key, t.keys, w.scales)) scale_weights(f, w, t.keys, hides);
  StoredRows read = v;
  const bool clears = hides && p.v.dtype != DType::i8;
  const bool cleared = clears && clear_values(f, w, t.keys, read);
  if (!clears) make_readable(read, p.DV, f.ldv, w.v, f.value_dots);
  add_values(f, w, t.keys, read, next);
  if (cleared) add_cleared(f, w, t.keys, v);
}

// What a task is: (batch, key head), block of its query heads, split.
struct FewRowsTask {
  int64_t b, hk, head, split;
};
FA_INLINE FewRowsTask few_rows_task_of(const FewRows& f, int64_t task) {
  const int64_t split = task % f.splits, block = task / f.splits % f.head_blocks,
                pair = task / f.splits / f.head_blocks;
  const int64_t hk = pair % f.p.HK;
  return {pair / f.p.HK, hk, hk * (f.p.H / f.p.HK) + block * f.heads, split};
}

// The rows of one head, the first of which is row `first` of the task.
[[maybe_unused]] static void few_queries(const FewRows& f, const Problem& x, int first, const FewRowsScratch& w) {
  const AttentionParams& p = f.p;
  const char* from = row_address(p.q, x, x.h, 0);
  const int m = static_cast<int>(p.M);
  if (!f.key_dots) return pack_rows(w.q + first * f.ldq, f.ldq, from, p.q.dtype, p.q.stride[2], m, p.D);
#if defined(__AVX512BF16__)
  for (int r = first; r < first + m; ++r, from += p.q.stride[2] * size_of(p.q.dtype))
    if (r < dot_rows_of(f))
      put_query(reinterpret_cast<char*>(w.q + r / kScoreRows * kScoreRows * f.ldq), r % kScoreRows, from, p.D);
    else
      __builtin_memcpy(w.q + r * f.ldq, from, sizeof(uint16_t) * static_cast<size_t>(p.D));
#endif
}

[[maybe_unused]] static void few_rows_task(const void* plan, int64_t task, char* scratch) {
  const FewRows& f = *static_cast<const FewRows*>(plan);
  const AttentionParams& p = f.p;
  const FewRowsTask at = few_rows_task_of(f, task);
  Arena arena{reinterpret_cast<uintptr_t>(scratch)};
  const FewRowsScratch w(f, arena);
  const int m = static_cast<int>(p.M);
  Problem heads[kFewRows];
  for (int g = 0; g < f.heads; ++g) {
    heads[g] = make_problem(p, at.b, at.head + g);
    few_queries(f, heads[g], g * m, w);
  }
  for (int64_t i = 0; i < f.rows(); ++i) w.m[i] = -kInf<float>, w.l[i] = w.alpha[i] = 0;
  __builtin_memset(w.o, 0, sizeof(float) * static_cast<size_t>(f.rows() * f.ldv));
  const Range seen = visible(heads[0], 0, m);
  const int64_t begin = max_of(seen.lo / kFewKeys * kFewKeys, at.split * f.keys);
  const int64_t end = min_of(seen.hi, (at.split + 1) * f.keys);
  Tile t;
  for (int64_t key = begin; key < end; key += kFewKeys) {
    const int keys = static_cast<int>(min_of<int64_t>(kFewKeys, end - key));
    if (make_tile(heads[0], 0, m, key, keys, t)) few_tile(f, heads, t, end, w);
  }
  if (f.partial) {
    float* to = f.partial + task * f.part();
    __builtin_memcpy(to, w.o, sizeof(float) * static_cast<size_t>(f.rows() * f.ldv));
    __builtin_memcpy(to + f.rows() * f.ldv, w.m, sizeof(float) * static_cast<size_t>(f.rows()));
    __builtin_memcpy(to + f.rows() * (f.ldv + 1), w.l, sizeof(float) * static_cast<size_t>(f.rows()));
  } else {
    for (int g = 0; g < f.heads; ++g)
      write_rows<float>(heads[g], 0, m, w.o + g * m * f.ldv, f.ldv, w.m + g * m, w.l + g * m);
  }
}

// The splits of all rows of one (batch, key head, block of heads), merged into the first.
[[maybe_unused]] static void merge_task(const void* plan, int64_t task, char*) {
  const FewRows& f = *static_cast<const FewRows*>(plan);
  const FewRowsTask at = few_rows_task_of(f, task * f.splits);
  const int64_t rows = f.rows(), m = f.p.M;
  float* first = f.partial + task * f.splits * f.part();
  float *top = first + rows * f.ldv, *sum = top + rows;
  for (int64_t r = 0; r < rows; ++r) {
    float high = top[r];
    for (int64_t s = 1; s < f.splits; ++s) high = max_of(high, top[s * f.part() + r]);
    const float shift = high == -kInf<float> ? float(0) : high;
    for (int64_t s = 0; s < f.splits; ++s) {
      const float factor = exp1<float>(top[s * f.part() + r] - shift);
      const float* from = first + s * f.part() + r * f.ldv;
      float* to = first + r * f.ldv;
      for (int64_t j = 0; j < f.ldv; ++j) to[j] = s ? to[j] + from[j] * factor : from[j] * factor;
      sum[r] = s ? sum[r] + sum[s * f.part() + r] * factor : sum[r] * factor;
    }
    top[r] = high;
  }
  for (int g = 0; g < f.heads; ++g)
    write_rows<float>(make_problem(f.p, at.b, at.head + g), 0, static_cast<int>(m), first + g * m * f.ldv, f.ldv,
                      top + g * m, sum + g * m);
}

// Whether these kernels are the faster ones, or the only ones. What they leave to forward.h: dropout, packed sequences,
// block maps, which differ from head to head, many rows.
[[maybe_unused]] static bool few_rows_wanted(const AttentionParams& p) {
  if (p.lengths) return p.M > 0 && p.N > 0 && p.B * p.H > 0;
  return p.M > 0 && p.M <= kLaneRows && p.N > 0 && p.B * p.H > 0 && !p.cu_seqlens_q && !has_dropout(p) &&
         !p.block_map.data;
}

[[maybe_unused]] static bool few_rows(const AttentionParams& p) {
  FewRows f{};
  f.p = p;
  const int64_t group = p.H / p.HK;
  int64_t heads = min_of<int64_t>(group, max_of<int64_t>(kFewRows / p.M, 1));
  while (group % heads) --heads;
  f.heads = static_cast<int>(heads), f.head_blocks = group / heads;
  f.ldq = round_up(p.D, VL<float>), f.ldv = round_up(p.DV, NR<float>), f.lds = kFewKeys + VL<float>;
  f.key_dots = dots_fit(p.q.dtype, p.k.dtype, p.D, f.rows());
  f.value_dots = dots_fit(p.q.dtype, p.v.dtype, p.DV, f.rows());
  // Splits by shape alone: 32 tasks keep any desktop busy, and 512 keys outweigh the merging.
  const int64_t pairs = (p.batch_invariant ? 1 : p.B) * p.HK * f.head_blocks;
  f.splits = max_of<int64_t>(min_of(ceil_div(32, pairs), p.N / 512), 1);
  f.keys = round_up(ceil_div(p.N, f.splits), kFewKeys);
  f.splits = ceil_div(p.N, f.keys);
  const int64_t blocks = p.B * p.HK * f.head_blocks;
  if (f.splits > 1) {
    f.partial = static_cast<float*>(allocate(sizeof(float) * static_cast<size_t>(blocks * f.splits * f.part())));
    if (!f.partial) return false;
  }
  Arena count{0};
  FewRowsScratch layout(f, count);
  const double work = static_cast<double>(p.B * p.H) * static_cast<double>(p.M) * static_cast<double>(p.N + 1) *
                      static_cast<double>(p.D + p.DV);
  bool ok = run_tasks(blocks * f.splits, p.threads, work, count.used, few_rows_task, &f);
  if (ok && f.partial)
    ok = run_tasks(blocks, p.threads, static_cast<double>(blocks * f.splits * f.part()), 0, merge_task, &f);
  release(f.partial);
  return ok;
}

// The same for the rows of a cache: what is new is counted and written before anything is read.
[[maybe_unused]] static bool few_rows_of_cache(const AttentionParams& p) {
  int64_t* lengths = static_cast<int64_t*>(allocate(sizeof(int64_t) * static_cast<size_t>(p.B)));
  if (!lengths) return false;
  for (int64_t b = 0; b < p.B; ++b) lengths[b] = count_tokens(p, b);
  AttentionParams counted = p;
  counted.key_lengths = lengths;
  if (p.new_k) append_tokens(counted, p.new_k, p.k, p.D), append_tokens(counted, p.new_v, p.v, p.DV);
  const bool ok = few_rows(counted);
  release(lengths);
  return ok;
}

FA_END
