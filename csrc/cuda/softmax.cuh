// The online softmax of a warp's rows (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018), in
// powers of two, and dropout.
//
//   t' = max(t, max_j s_j);   p_j = exp(s_j - t');   l = l exp(t - t') + sum_j p_j
//
// Scores are in units of `factor`: exp(s) is 2^(factor s). A slot is one of the lane's 2 MT rows.
#pragma once
#include "mask.cuh"
#include "philox.cuh"

namespace fused_attention::cuda {

// top: the largest score so far, -inf at first. total: this lane's part of the sum.
template <int MT>
struct RowState {
  float top[2 * MT], total[2 * MT];
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int j = 0; j < 2 * MT; ++j) top[j] = -kInfinity, total[j] = 0.0f;
  }
};

// The row of a slot: s becomes p. Returns exp(t - t'), by which what has been summed so far shrinks.
// SCALED: s times `unit` are the scores, and p becomes 2^raise p.
template <bool SCALED = false, int MT, int NT>
__device__ __forceinline__ float weigh_row(float (&s)[MT][NT][4], RowState<MT>& state, int mt, int half, float factor,
                                           float unit = 1.0f, float raise = 0.0f) {
  float& top = state.top[2 * mt + half];
  float here = SCALED ? -kInfinity : top;
#pragma unroll
  for (int nt = 0; nt < NT; ++nt) here = fmaxf(here, fmaxf(s[mt][nt][2 * half], s[mt][nt][2 * half + 1]));
  here = quad_max(here);  // a NaN is no maximum, but makes p NaN
  if constexpr (SCALED) here = fmaxf(top, here * unit);
  const float shift = here == -kInfinity ? 0.0f : here * factor;
  const float fade = here == top ? 1.0f : exp2_fast(fmaf(top, factor, -shift));
  const float slope = SCALED ? unit * factor : factor, base = SCALED ? raise - shift : -shift;
  top = here;
  float sum = 0.0f;
#pragma unroll
  for (int nt = 0; nt < NT; ++nt)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float& x = s[mt][nt][2 * half + i];
      x = exp2_fast(fmaf(x, slope, base));
      sum += x;
    }
  float& total = state.total[2 * mt + half];
  total = fmaf(total, fade, sum);
  return fade;
}

template <int MT, int OT>
__device__ __forceinline__ void shrink_row(float (&acc)[MT][OT][4], int mt, int half, float fade) {
  if (!__any_sync(0xffffffffu, fade != 1.0f)) return;
#pragma unroll
  for (int ot = 0; ot < OT; ++ot)
#pragma unroll
    for (int i = 0; i < 2; ++i) acc[mt][ot][2 * half + i] *= fade;
}

// s becomes p; acc, what has been summed so far, shrinks as the maximum grows.
template <int MT, int NT, int OT>
__device__ __forceinline__ void online_softmax(float (&s)[MT][NT][4], RowState<MT>& state, float (&acc)[MT][OT][4],
                                               float factor) {
#pragma unroll
  for (int mt = 0; mt < MT; ++mt)
#pragma unroll
    for (int half = 0; half < 2; ++half) shrink_row(acc, mt, half, weigh_row(s, state, mt, half, factor));
}

// What ends a row: lse, and the factor by which its sums become outputs. A row that saw nothing gives -inf and 0.
struct RowEnd {
  float lse, factor;
};
// unit: a score's in natural logarithms. sink: another score, natural, or null.
__device__ __forceinline__ RowEnd finish_row(float top, float total, float factor, double unit, const float* sink) {
  if (top == -kInfinity && total == 0.0f) return {-kInfinity, 0.0f};  // where all scores are NaN, total is NaN
  top = top == -kInfinity ? 0.0f : top;
  const float shift = top * factor;
  // What the sums are relative to is shift, as it was rounded, and not quite the exponent of the largest score.
  float log_base = static_cast<float>(top * unit), log_rest = -kLn2 * fmaf(top, factor, -shift), fade = 1.0f;
  if (sink) {
    const float other = *sink * kLog2E;
    if (other > shift) {
      fade = exp2_fast(shift - other);
      total = fmaf(total, fade, 1.0f);
      log_base = *sink, log_rest = 0.0f;
    } else {
      total += exp2_fast(other - shift);
    }
  }
  return {log_base + (log_rest + logf(total)), fade / total};
}

// --- dropout -------------------------------------------------------------------------------------------------------

// Which elements of a fragment are kept: bit (mt * NT + nt) * 4 + i. Lanes share counters, each draws its part of them.
struct KeptElements {
  uint64_t bits;
  __device__ __forceinline__ bool at(int element) const { return bits >> element & 1; }
};

// Rows along rows: the two lanes of a pair hold neighbouring keys of one counter; the even one draws for even column
// fragments, the odd one for odd ones.
template <int MT, int NT>
__device__ __forceinline__ KeptElements draw_kept(const Philox& g, const RowMap& map, const Elements<false, MT, NT>& w,
                                                  int lane) {
  static_assert(MT * NT <= 16);
  KeptElements kept{0};
  const int odd = lane & 1, first = (w.key & ~3) + 8 * odd;
#pragma unroll 1
  for (int slot = 0; slot < 2 * MT; ++slot) {
    const int r = w.row + 8 * slot, query = map.query(r), head = map.head_of(r);
#pragma unroll 1
    for (int pair = 0; pair < NT / 2; ++pair) {
      const uint32_t own = kept_bits(g, (first + 16 * pair) >> 2, query, head);
      const uint32_t other = __shfl_xor_sync(0xffffffffu, own, 1);
      const uint32_t even_bits = (odd ? other : own) >> (2 * odd) & 3, odd_bits = (odd ? own : other) >> (2 * odd) & 3;
      const int at = ((slot >> 1) * NT + 2 * pair) * 4 + 2 * (slot & 1);
      kept.bits |= static_cast<uint64_t>(even_bits | odd_bits << 4) << at;
    }
  }
  return kept;
}

// Rows along columns: four lanes, one for each word of a counter, hold the same rows; of the four counters of a column
// fragment (two rows, two halves of keys) each lane draws one.
template <int MT, int NT>
__device__ __forceinline__ KeptElements draw_kept(const Philox& g, const RowMap& map, const Elements<true, MT, NT>& w,
                                                  int lane) {
  static_assert(MT * NT <= 16);
  KeptElements kept{0};
  const int word = lane >> 2 & 3;
#pragma unroll 1
  for (int tile = 0; tile < MT * NT; ++tile) {
    const int mt = tile / NT, nt = tile % NT;
    const int key = w.key + 16 * mt + 8 * (word >> 1), query = map.query(w.row + 8 * nt + (word & 1));
    const uint32_t own = kept_bits(g, key >> 2, query, map.head);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t drawn = __shfl_sync(0xffffffffu, own, (lane & ~12) | i << 2);
      kept.bits |= static_cast<uint64_t>(drawn >> word & 1) << (tile * 4 + i);
    }
  }
  return kept;
}

template <int MT, int NT>
__device__ __forceinline__ void drop(float (&s)[MT][NT][4], const KeptElements& kept) {
#pragma unroll
  for (int mt = 0; mt < MT; ++mt)
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (!kept.at((mt * NT + nt) * 4 + i)) s[mt][nt][i] = 0.0f;
}

}  // namespace fused_attention::cuda
