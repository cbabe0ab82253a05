// What the gradient kernels for sm_90 have in common: three warpgroups, the barriers between them, and what they do with a
// fragment of scores (gradient.cuh).
//
//   producer, one or two warps:  the tiles that stay, then a stage for each tile that passes
//   consumers, two warpgroups:   64 rows (dQ) or keys (dK, dV) each
//
// What is not finite and has no weight may spoil a sum: then all of the block is taken again with care.
#pragma once
#include "gradient.cuh"
#include "gradient_params_sm90.h"
#include "hopper.cuh"
#include "schedule.cuh"

namespace fused_attention::cuda {

struct HopperGradient {
  static constexpr int kConsumers = 32 * kHopperConsumers;
  enum { kBoth = 1, kEveryone = 2 };  // named barriers: the consumers, all who work

  const HopperGradientParams& all;
  const AttentionParams& p;
  char* shared;
  uint32_t barriers;  // full of what stays, then full and empty of each stage
  Problem x;
  int lane, warp, consumer;  // warp: of its warpgroup; consumer: 0 or 1, -1 the producer

  __device__ __forceinline__ HopperGradient(const HopperGradientParams& all, char* shared, int tiles)
      : all(all), p(all.p), shared(shared), barriers(shared_address(shared) + tiles) {
    // What is the same for a warp comes from one lane of it: so the compiler knows.
    const int thread = static_cast<int>(threadIdx.x), warps = __shfl_sync(0xffffffffu, thread >> 5, 0);
    lane = thread & 31, warp = warps & 3, consumer = warps / 4 - 1;
  }

  __device__ __forceinline__ uint32_t own_full() const { return barriers; }
  __device__ __forceinline__ uint32_t full(int stage) const { return barriers + 8 + 16 * stage; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return barriers + 16 + 16 * stage; }

  template <int STAGES>
  __device__ __forceinline__ void init(int producers) {
    static_assert(8 + 16 * STAGES <= kHopperGradientBarrierBytes);
    if (threadIdx.x == 0) {
      mbarrier_init(own_full(), 1);
      for (int i = 0; i < STAGES; ++i) mbarrier_init(full(i), producers), mbarrier_init(empty(i), kHopperConsumers);
      fence_init();
    }
    __syncthreads();
  }

  // This warp has read what the barrier guards.
  __device__ __forceinline__ void leave(uint32_t barrier) {
    __syncwarp();
    if (lane == 0) arrive(barrier);
  }

  // By one thread: rows of q or dout, or of k or v, as a tile. row: in the tensor.
  template <int ROWS, int D>
  __device__ __forceinline__ void load(uint32_t tile, const TensorMap& map, const Tensor& t, int row, int head,
                                       uint32_t barrier) {
    load_tile<ROWS, D>(tile, map, row, t.stride[1] ? head : 0, t.stride[0] ? x.b : 0, barrier);
  }

  // s becomes P; slope: see finish_scores; dlse: see score_gradient. row, key: of the fragment's first element.
  template <bool OPTIONS, bool TRANSPOSED, int NT, int SLOTS>
  __device__ __forceinline__ void weigh(float (&s)[1][NT][4], float (&slope)[1][NT][4],
                                        const RowGradient<SLOTS>& numbers, const RowMap& map,
                                        const Elements<TRANSPOSED, 1, NT>& here, int row, int key, bool partial,
                                        float* strip) {
    if constexpr (OPTIONS) finish_scores<true>(s, slope, p, x, map, here, row, key, strip, opaque(lane));
    if (partial) hide(s, p, x, map, here);
    if (OPTIONS && few_keys(p))
      probabilities_anew<TRANSPOSED>(s, numbers, p, map.head);
    else
      probabilities<TRANSPOSED>(s, numbers, exponent_factor(p));
  }

  // dp becomes dS.
  template <bool OPTIONS, bool TRANSPOSED, int NT, int SLOTS>
  __device__ __forceinline__ void differentiate(float (&dp)[1][NT][4], const float (&s)[1][NT][4],
                                                const float (&slope)[1][NT][4], RowGradient<SLOTS>& numbers,
                                                const KeptElements& kept, const float (&dlse)[SLOTS]) {
    score_gradient<TRANSPOSED, OPTIONS>(dp, s, numbers, p, kept, OPTIONS && few_keys(p), dlse);
    if constexpr (OPTIONS) through_softcap(dp, slope, p);
  }
};

}  // namespace fused_attention::cuda
