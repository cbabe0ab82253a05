// What the backward pass needs once per row, and the gradient of the sinks, which is a sum over rows:
//
//   delta = rowsum(dO * O) - dlse,  0 for rows that see nothing
//   dsinks = -sum over rows of exp(sink - lse) delta
//
// Rows of packed sequences lie side by side: to these kernels they are one long sequence.
#pragma once
#include "problem.cuh"

namespace fused_attention::cuda {

constexpr int kSinkThreads = 32 * kSinkWarps;

// A warp per row.
template <class E>
__device__ __forceinline__ void row_deltas(const AttentionParams& p) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int64_t rows = p.cu_seqlens_q ? p.total_rows : p.M, batches = p.cu_seqlens_q ? 1 : p.B;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kDeltaWarps + threadIdx.x / 32;
  if (at >= batches * p.H * rows) return;
  const int64_t row = at % rows, head = at / rows % p.H, batch = at / rows / p.H;
  const bool dead = *row_number(p.lse, batch, head, row) == -kInfinity;
  float sum = 0.0f;
  if (p.dout.data && !dead) {
    const char *out = row_address(p.out, batch, head, row), *dout = row_address(p.dout, batch, head, row);
    for (int d = lane; d < static_cast<int>(p.DV); d += 32)
      sum = fmaf(E::widen(*reinterpret_cast<const uint16_t*>(out + 2 * d)),
                 E::widen(*reinterpret_cast<const uint16_t*>(dout + 2 * d)), sum);
  }
#pragma unroll
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (lane) return;
  if (p.dlse.data && !dead) sum -= *row_number(p.dlse, batch, head, row);
  *row_number(p.delta, batch, head, row) = sum;
}

// A CTA per head. Each thread adds its rows in order, then the threads' sums are added in pairs: a fixed order. In double:
// one number from very many that nearly cancel.
__device__ __forceinline__ void sink_gradients(const AttentionParams& p, double* shared) {
  const int64_t rows = p.cu_seqlens_q ? p.total_rows : p.M, batches = p.cu_seqlens_q ? 1 : p.B, head = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  const float sink = static_cast<const float*>(p.sinks.data)[head * p.sinks.stride[0]];
  double sum = 0.0;
  for (int64_t at = thread; at < batches * rows; at += kSinkThreads) {
    const float lse = *row_number(p.lse, at / rows, head, at % rows);
    if (lse == -kInfinity) continue;
    sum -= exp(static_cast<double>(sink) - static_cast<double>(lse)) *
           static_cast<double>(*row_number(p.delta, at / rows, head, at % rows));
  }
  shared[thread] = sum;
  for (int half = kSinkThreads / 2; half; half /= 2) {
    __syncthreads();
    if (thread < half) shared[thread] += shared[thread + half];
  }
  if (thread == 0) static_cast<float*>(p.dsinks.data)[head * p.dsinks.stride[0]] = static_cast<float>(shared[0]);
}

}  // namespace fused_attention::cuda
