// The gradient of a tile of scores, recomputed from lse (Dao et al., "FlashAttention", 2022). With Z the dropout mask
// times 1 / (1 - p):
//
//   P = exp(S - lse);   dP = Z (dO V^T);   dS = P (dP - delta),   delta = rowsum(dO * O) - dlse
//
// A row that sees nothing has lse +inf here, so that P is 0. What has no weight gets dS = 0, whatever dP is: a hidden
// value may be NaN.
#pragma once
#include "softmax.cuh"

namespace fused_attention::cuda {

// Of each row of a fragment: lse in powers of two, delta, dlse, and what its sink weighs.
template <int SLOTS>
struct RowGradient {
  float lse[SLOTS], delta[SLOTS];
};

__device__ __forceinline__ float usable_lse(float lse) { return lse == -kInfinity ? kInfinity : lse * kLog2E; }

// How many keys from the first on the rows see together: kFewKeys or less have their softmax taken anew.
__device__ __forceinline__ bool few_keys(const AttentionParams& p) {
  if (p.part_of_keys) return false;
  if (p.N <= kFewKeys) return true;
  return right_side(p) < kFar && p.causal != Causal::bottom_right && p.M + right_side(p) <= kFewKeys;
}

// s becomes P.
template <bool TRANSPOSED, int MT, int NT, int SLOTS>
__device__ __forceinline__ void probabilities(float (&s)[MT][NT][4], const RowGradient<SLOTS>& row, float factor) {
  using W = Elements<TRANSPOSED, MT, NT>;
#pragma unroll
  for (int mt = 0; mt < MT; ++mt)
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[mt][nt][i] = exp2_fast(fmaf(s[mt][nt][i], factor, -row.lse[W::slot(mt, nt, i)]));
}

// Sums (or maxima) over all keys of a fragment, for the row of each slot.
template <bool TRANSPOSED>
__device__ __forceinline__ float over_keys(float x, bool maximum) {
#pragma unroll
  for (int step = TRANSPOSED ? 4 : 1; step < (TRANSPOSED ? 32 : 4); step *= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, x, step);
    x = maximum ? fmaxf(x, other) : x + other;
  }
  return x;
}

// The same where the fragment holds all keys that its rows see: the softmax is taken anew, lse tells dead rows only.
template <bool TRANSPOSED, int MT, int NT, int SLOTS>
__device__ __forceinline__ void probabilities_anew(float (&s)[MT][NT][4], const RowGradient<SLOTS>& row,
                                                   const AttentionParams& p, int head) {
  using W = Elements<TRANSPOSED, MT, NT>;
  const float factor = exponent_factor(p);
  float top[SLOTS], total[SLOTS];
#pragma unroll
  for (int j = 0; j < SLOTS; ++j) top[j] = -kInfinity, total[j] = 0.0f;
#pragma unroll
  for (int e = 0; e < MT * NT * 4; ++e) {
    float& x = top[W::slot(e / (4 * NT), e / 4 % NT, e % 4)];
    x = fmaxf(x, s[e / (4 * NT)][e / 4 % NT][e % 4]);
  }
#pragma unroll
  for (int j = 0; j < SLOTS; ++j) {
    top[j] = over_keys<TRANSPOSED>(top[j], true);
    top[j] = top[j] == -kInfinity ? 0.0f : top[j];
  }
#pragma unroll
  for (int e = 0; e < MT * NT * 4; ++e) {
    float& x = s[e / (4 * NT)][e / 4 % NT][e % 4];
    const int j = W::slot(e / (4 * NT), e / 4 % NT, e % 4);
    x = exp2_fast((x - top[j]) * factor);
    total[j] += x;
  }
#pragma unroll
  for (int j = 0; j < SLOTS; ++j) {
    total[j] = over_keys<TRANSPOSED>(total[j], false);
    if (p.sinks.data) {
      const float sink = static_cast<const float*>(p.sinks.data)[head * p.sinks.stride[0]];
      total[j] += exp2_fast(fmaf(sink, kLog2E, -top[j] * factor));
    }
    total[j] = row.lse[j] == kInfinity || total[j] == 0.0f ? 0.0f : 1.0f / total[j];
  }
#pragma unroll
  for (int e = 0; e < MT * NT * 4; ++e)
    s[e / (4 * NT)][e / 4 % NT][e % 4] *= total[W::slot(e / (4 * NT), e / 4 % NT, e % 4)];
}

// dp = dO V^T becomes dS, from s = P. few: delta is summed here too, so that dS cancels as it should; dlse: the rows'
// incoming gradients of lse.
template <bool TRANSPOSED, bool DROPOUT = true, int MT, int NT, int SLOTS>
__device__ __forceinline__ void score_gradient(float (&dp)[MT][NT][4], const float (&s)[MT][NT][4],
                                               RowGradient<SLOTS>& row, const AttentionParams& p,
                                               const KeptElements& kept, bool few, const float (&dlse)[SLOTS]) {
  using W = Elements<TRANSPOSED, MT, NT>;
  if (DROPOUT && p.dropout_p > 0.0) {
    const float keep = keep_factor(p);
#pragma unroll
    for (int e = 0; e < MT * NT * 4; ++e) {
      float& x = dp[e / (4 * NT)][e / 4 % NT][e % 4];
      x = kept.at(e) ? x * keep : 0.0f;
    }
  }
  if (few) {
    float delta[SLOTS];
#pragma unroll
    for (int j = 0; j < SLOTS; ++j) delta[j] = 0.0f;
#pragma unroll
    for (int e = 0; e < MT * NT * 4; ++e) {
      const float w = s[e / (4 * NT)][e / 4 % NT][e % 4];
      if (w != 0.0f) delta[W::slot(e / (4 * NT), e / 4 % NT, e % 4)] += w * dp[e / (4 * NT)][e / 4 % NT][e % 4];
    }
#pragma unroll
    for (int j = 0; j < SLOTS; ++j) row.delta[j] = over_keys<TRANSPOSED>(delta[j], false);
  }
#pragma unroll
  for (int e = 0; e < MT * NT * 4; ++e) {
    const int j = W::slot(e / (4 * NT), e / 4 % NT, e % 4);
    const float w = s[e / (4 * NT)][e / 4 % NT][e % 4];
    float& x = dp[e / (4 * NT)][e / 4 % NT][e % 4];
    x -= row.delta[j];
    if (few) x += dlse[j];  // last: the difference before it cancels
    x = w == 0.0f ? 0.0f : w * x;
  }
}

// What the softcap makes of it: slope is its derivative (scale_and_cap).
template <int MT, int NT>
__device__ __forceinline__ void through_softcap(float (&ds)[MT][NT][4], const float (&slope)[MT][NT][4],
                                                const AttentionParams& p) {
  if (p.softcap == 0.0) return;
#pragma unroll
  for (int e = 0; e < MT * NT * 4; ++e) {
    float& x = ds[e / (4 * NT)][e / 4 % NT][e % 4];
    x = x == 0.0f ? 0.0f : x * slope[e / (4 * NT)][e / 4 % NT][e % 4];
  }
}

// A warp's sum [16, D], times scale, to rows first .. first + 16 of a tensor that has `count` of them: `base` is row 0, `step`
// bytes lie between rows. It passes through rows tile_row .. of a tile that nobody else uses by now.
template <class E, int D>
__device__ __forceinline__ void store_sum(char* base, int64_t step, int first, int count, int64_t dims,
                                          const float (&sum)[1][D / 8][4], float scale, uint32_t tile, int tile_row,
                                          int lane) {
  const float factor[2] = {scale, scale};
  __syncwarp();
  stage_rows<E, D, 1>(tile, tile_row, sum, factor, lane);
  __syncwarp();
  const bool vectors = in_vectors(base, step, dims);
#pragma unroll 1
  for (int i = lane >> 3; i < 16; i += 4) {
    if (first + i >= count) break;
    store_row<D, 8>(base + step * (first + i), tile, tile_row + i, static_cast<int>(dims), vectors, lane & 7);
  }
}

}  // namespace fused_attention::cuda
