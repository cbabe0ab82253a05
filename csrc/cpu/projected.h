// Attention between two projections, of which the first gives its inputs and the second takes its output.
#pragma once
#include "../params.h"

namespace fused_attention {

// Without addresses; those of q, k and v are offsets in bytes within what the first step gives.
struct Projected {
  LinearParams first;
  AttentionParams attention;
  LinearParams last;
};

struct ProjectedAddresses {
  uintptr_t x, w1, b1, w2, b2;  // b1, b2: 0 if absent
  uintptr_t joint, attended;    // between the steps, for who needs them afterwards; or both 0
  uintptr_t y, lse, weights;    // lse, weights: 0 if not wanted
};

// False if memory ran out.
bool run_projected(const Projected& steps, const ProjectedAddresses& at, int32_t threads);

}  // namespace fused_attention
