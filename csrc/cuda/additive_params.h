// The argument of the kernel in additive_gradient.cuh.
#pragma once
#include "../params.h"

namespace fused_attention::cuda {

struct AdditiveParams {
  AttentionParams p;
  Tensor grad;         // [B, H, M, N] f32 of one share, stride 0 where it is summed
  int64_t share_step;  // from share to share, in elements
  int64_t chunk;       // repetitions in a share
  int64_t kept[4];     // batch, heads, blocks of rows, blocks of keys of the result; 1 where it is summed
  int64_t summed[4];   // repetitions; 1 where it is kept
};

}  // namespace fused_attention::cuda
