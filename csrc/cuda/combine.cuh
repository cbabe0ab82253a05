// The end of decoding: one row's sums become its output, within the kernel in decode.cuh or, over splits, after it.
#pragma once
#include "cache.cuh"

namespace fused_attention::cuda {

// Dim d of one row's output, and lse with the first: a row that saw nothing gives 0 and -inf, a lost sequence NaN.
template <class E>
__device__ __forceinline__ void store_decoded(const DecodeParams& p, int b, int head, int query, int d, float top,
                                              float total, float sum, bool lost) {
  const bool dead = top == -kInfinity && total == 0.0f;  // NaN scores leave the maximum at -inf too, and a total of NaN
  float shift = top == -kInfinity ? 0.0f : top;
  if (p.sinks.data && !dead) {
    const float sink = static_cast<const float*>(p.sinks.data)[head * p.sinks.stride[0]], higher = fmaxf(shift, sink);
    const float fade = exp2_fast((shift - higher) * kLog2E);
    total = fmaf(total, fade, exp2_fast((sink - higher) * kLog2E));
    sum *= fade, shift = higher;
  }
  const float nan = __int_as_float(0x7fffffff), value = lost ? nan : dead ? 0.0f : sum / total;
  if (d < p.DV)
    *reinterpret_cast<uint16_t*>(row_address(p.out, b, head, query) + 2 * d) = E::pack(value, 0.0f) & 0xffffu;
  if (d == 0) {
    const double sum_of_logs = static_cast<double>(shift) + log(static_cast<double>(total));
    const float lse = lost ? nan : dead ? -kInfinity : static_cast<float>(sum_of_logs);
    static_cast<float*>(p.lse.data)[(b * p.H + head) * p.M + query] = lse;
  }
}

// The splits of one row of [B, H, M] by one CTA, in their order.
constexpr int kCombineThreads = 32 * kCombineWarps;

template <class E>
__device__ __forceinline__ void combine_splits(const DecodeParams& p) {
  const int64_t index = blockIdx.x, query = index % p.M, head = index / p.M % p.H, b = index / p.M / p.H;
  const float* stats = static_cast<const float*>(p.stats.data) + 2 * index * p.splits;
  float top = -kInfinity;
  for (int i = 0; i < p.splits; ++i) top = fmaxf(top, stats[2 * i]);
  const float shift = top == -kInfinity ? 0.0f : top;
  bool lost;
  cached_length(p.cache, static_cast<int>(b), lost);
  for (int d = static_cast<int>(threadIdx.x); d < p.DV; d += kCombineThreads) {
    const float* partial = static_cast<const float*>(p.partial.data) + index * p.splits * p.DV + d;
    float total = 0.0f, sum = 0.0f;
    for (int i = 0; i < p.splits; ++i) {
      const float fade = exp2_fast((stats[2 * i] - shift) * kLog2E);
      total = fmaf(stats[2 * i + 1], fade, total);
      sum = fmaf(partial[i * p.DV], fade, sum);
    }
    store_decoded<E>(p, static_cast<int>(b), static_cast<int>(head), static_cast<int>(query), d, top, total, sum, lost);
  }
}

}  // namespace fused_attention::cuda
