// The gradient of a mask or bias for mma.sync: dS summed over the dimensions in which it is broadcast (stride 0).
//
// One CTA sums its share of the repetitions of one tile of the result, in the order batch, head, block of rows, block of
// keys, in registers; the shares are added afterwards, in order. No atomics, no memory beyond the shares, the same bits
// every time.
//
// Shared memory: q, dout [rows, D], k, v [keys, D] of one step; a strip of floats per warp where there is a mask or bias.
#pragma once
#include "additive_params.h"
#include "gradient.cuh"

namespace fused_attention::cuda {

template <class E, int D>
struct AdditiveGradient {
  static constexpr Tile kTile = additive_gradient_tile(D);
  static constexpr int kRows = kTile.rows, kKeys = kTile.keys, kThreads = 32 * kTile.warps, MT = 1, NT = kKeys / 8;
  static_assert(kRows == 16 * kTile.warps);
  static constexpr uint32_t kRowBytes = kRows * D * 2, kKeyBytes = kKeys * D * 2;
  using WarpStrip = Strip<false, MT, NT>;

  const AdditiveParams& a;
  const AttentionParams& p;
  int thread, lane, warp_row;
  uint32_t q, dout, k, v;
  float* strip;

  __device__ __forceinline__ AdditiveGradient(const AdditiveParams& a, char* shared) : a(a), p(a.p) {
    thread = static_cast<int>(threadIdx.x), lane = thread & 31, warp_row = thread / 32 * 16;
    q = shared_address(shared), dout = q + kRowBytes, k = dout + kRowBytes, v = k + kKeyBytes;
    strip = reinterpret_cast<float*>(shared + 2 * kRowBytes + 2 * kKeyBytes) + thread / 32 * WarpStrip::kFloats;
  }

  __device__ __forceinline__ Rows rows_of(const Tensor& t, const Problem& x, int64_t head, int64_t first, int count,
                                          int64_t dims) const {
    return {row_address(t, slot(p, x.b), head, first), 2 * t.stride[2], count, static_cast<int>(dims)};
  }

  // total += dS of rows row0 .. and keys key0 .. of one element of the batch and head.
  __device__ __forceinline__ void add_tile(float (&total)[MT][NT][4], const Problem& x, int head, int row0, int key0) {
    const Range range = key_range(p, x, row0, min(row0 + kRows, x.rows) - 1, kKeys);
    if (row0 >= x.rows || key0 < range.begin || key0 >= range.end) return;
    const int64_t kv_head = head / (p.H / p.HK), first = first_row(p, x.b), first_k = first_key(p, x.b);
    __syncthreads();  // the tiles of the step before have been read
    load_tile<kRows, D, kThreads>(q, rows_of(p.q, x, head, first, x.rows, p.D), row0, thread);
    load_tile<kRows, D, kThreads>(dout, rows_of(p.dout, x, head, first, x.rows, p.DV), row0, thread);
    load_tile<kKeys, D, kThreads>(k, rows_of(p.k, x, kv_head, first_k, x.seen, p.D), key0, thread);
    load_tile<kKeys, D, kThreads>(v, rows_of(p.v, x, kv_head, first_k, x.seen, p.DV), key0, thread);
    commit_copies();
    RowGradient<2> row;
    float dlse[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int own = row0 + warp_row + (lane >> 2) + 8 * j, r = min(own, x.rows - 1);
      row.lse[j] = own == r ? usable_lse(*row_number(p.lse, slot(p, x.b), head, first + r)) : kInfinity;
      row.delta[j] = *row_number(p.delta, slot(p, x.b), head, first + r);
      dlse[j] = p.dlse.data && few_keys(p) ? *row_number(p.dlse, slot(p, x.b), head, first + r) : 0.0f;
    }
    const RowMap map{x.rows, head, 0};
    const auto here = make_elements<false, MT, NT>(row0 + warp_row, key0, lane);
    KeptElements kept{0};
    if (p.dropout_p > 0.0) kept = draw_kept(dropout_state(p, x.b), map, here, lane);
    wait_copies<0>();
    __syncthreads();
    float s[MT][NT][4], dp[MT][NT][4];
    multiply_transposed<E, D>(s, q, warp_row, k, 0, lane);
    finish_scores<false>(s, s, p, x, map, here, row0 + warp_row, key0, strip, lane);
    hide(s, p, x, map, here);
    const bool few = few_keys(p);
    if (few)
      probabilities_anew<false>(s, row, p, head);
    else
      probabilities<false>(s, row, exponent_factor(p));
    multiply_transposed<E, D>(dp, dout, warp_row, v, 0, lane);
    score_gradient<false>(dp, s, row, p, kept, few, dlse);
#pragma unroll
    for (int e = 0; e < NT * 4; ++e) total[0][e / 4][e % 4] += dp[0][e / 4][e % 4];
  }

  // A tile's sums over keys, rows or both, where the result has one of them; what is summed over stands at 0. `sums`:
  // [warps][keys] floats of shared memory.
  __device__ __forceinline__ void store(float (&total)[MT][NT][4], float* sums, float* to, int row0, int key0) {
    const Tensor& g = a.grad;
    if (g.stride[3] == 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = 0.0f;
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) sum += total[0][nt][2 * half] + total[0][nt][2 * half + 1];
        sum = quad_sum(sum);
#pragma unroll
        for (int nt = 0; nt < NT; ++nt)
          total[0][nt][2 * half] = nt == 0 && (lane & 3) == 0 ? sum : 0.0f, total[0][nt][2 * half + 1] = 0.0f;
      }
    }
    const int row = row0 + warp_row + (lane >> 2), key = key0 + 2 * (lane & 3);
    if (g.stride[2] != 0) {
#pragma unroll
      for (int e = 0; e < NT * 4; ++e) {
        const int m = row + 8 * (e % 4 / 2), n = key + e / 4 * 8 + e % 2;
        if (m < p.M && n < (g.stride[3] ? p.N : 1)) to[m * g.stride[2] + n * g.stride[3]] = total[0][e / 4][e % 4];
      }
      return;
    }
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float sum = total[0][nt][i] + total[0][nt][2 + i];
#pragma unroll
        for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        if (lane < 4) sums[thread / 32 * kKeys + 8 * nt + 2 * lane + i] = sum;
      }
    __syncthreads();
    for (int j = thread; j < kKeys; j += kThreads) {
      float sum = 0.0f;
      for (int warp = 0; warp < kTile.warps; ++warp) sum += sums[warp * kKeys + j];
      if (key0 + j < (g.stride[3] ? p.N : 1)) to[(key0 + j) * g.stride[3]] = sum;
    }
  }

  __device__ __forceinline__ void run(char* shared) {
    // The tile of the result, from the innermost dimension outwards, then the share.
    const int64_t *kept = a.kept, *summed = a.summed;  // batch, head, blocks of rows, blocks of keys
    int64_t i = blockIdx.x;
    const int key_block = static_cast<int>(i % kept[3]), row_block = static_cast<int>(i / kept[3] % kept[2]);
    const int h = static_cast<int>(i / kept[3] / kept[2] % kept[1]);
    i = i / kept[3] / kept[2] / kept[1];
    const int b = static_cast<int>(i % kept[0]);
    const int64_t share = i / kept[0], steps = summed[0] * summed[1] * summed[2] * summed[3];
    float total[MT][NT][4];
    clear(total);
    Problem x;
    x.b = -1;
    for (int64_t step = share * a.chunk; step < min(steps, (share + 1) * a.chunk); ++step) {
      const int element = b + static_cast<int>(step / summed[3] / summed[2] / summed[1]);
      if (x.b != element) x = make_problem(p, element);
      add_tile(total, x, h + static_cast<int>(step / summed[3] / summed[2] % summed[1]),
               (row_block + static_cast<int>(step / summed[3] % summed[2])) * kRows,
               (key_block + static_cast<int>(step % summed[3])) * kKeys);
    }
    __syncthreads();  // q is read no more: its place serves for the sums
    float* to = static_cast<float*>(a.grad.data) + share * a.share_step + b * a.grad.stride[0] + h * a.grad.stride[1];
    store(total, reinterpret_cast<float*>(shared), to, row_block * kRows, key_block * kKeys);
  }
};

}  // namespace fused_attention::cuda
