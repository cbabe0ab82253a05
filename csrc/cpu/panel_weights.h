// Forward pass on packed panels that also returns the weights: weights.h's way, transposed. A task has one panel of rows,
// and keeps its P' = exp(S - m') for all keys until the last one is seen; then
//
//   P = P' exp(m' - m) / (l + exp(sink - m))
//
// is added to the sums [N, 32] of all heads, or goes out as it is.
#pragma once
#include "panel_forward.h"
#include "weights.h"

FA_BEGIN

FA_INLINE size_t weight_sums(const AttentionParams& p) {  // bytes
  return sizeof(float) * static_cast<size_t>(round_up(p.N, kKeyBlock) * kPanel);
}

[[maybe_unused]] static void panel_weights_task(const void* plan, int64_t task, char* scratch) {
  const PanelForward& f = *static_cast<const PanelForward*>(plan);
  const AttentionParams& p = f.packed.p;
  const bool mean = p.weights_mode == Weights::mean;
  const int64_t pair = task / f.blocks, b = mean ? pair : pair / p.H;
  const int64_t first = mean ? 0 : pair % p.H, last = mean ? p.H : first + 1;
  const int64_t row = (f.blocks - 1 - task % f.blocks) * kPanel;
  const float kept = has_dropout(p) ? dropout_keep<float>(p) : 1.0f;
  const float share = mean ? kept / static_cast<float>(p.H) : kept;
  float* sums = reinterpret_cast<float*>(scratch);
  __builtin_memset(sums, 0, weight_sums(p));
  tiles_begin();
  for (int64_t h = first; h < last; ++h) {
    const Problem x = make_problem(p, b, h);
    PanelForwardTask head(f, x, row, scratch + weight_sums(p));
    head.run();
    head.add_weights(share, sums);
    if (h + 1 == last) head.store_weights(first, sums);
  }
  tiles_end();
}

// What a thread keeps is 8 MB for so many keys.
FA_INLINE bool panel_weights_wanted(const AttentionParams& p) {
  return panels_wanted(p) && !p.cu_seqlens_q && p.N <= 32768;
}

[[maybe_unused]] static bool panel_weights(const AttentionParams& p) {
  PanelForward f = make_panel_forward(p);
  f.kept = true, f.panels = 1, f.blocks = ceil_div(p.M, kPanel);
  const Packed packed = pack_all(f.packed);
  bool ok = packed != Packed::no_memory;
  if (packed == Packed::done) {
    Arena count{0};
    PanelForwardScratch layout(f, count);
    const int64_t groups = p.weights_mode == Weights::mean ? p.B : p.B * p.H;
    prefer_large_pages(p.weights.data, static_cast<size_t>(groups * p.M * p.N * size_of(p.weights.dtype)));
    ok = run_tasks(groups * f.blocks, p.threads, panel_work(f), weight_sums(p) + count.used, panel_weights_task, &f);
  }
  release(f.packed.memory);
  return packed == Packed::unfit ? weights<float>(p) : ok;
}

FA_END
