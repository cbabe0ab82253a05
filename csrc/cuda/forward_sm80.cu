// The forward kernels for mma.sync: per dtype and head dim one for plain calls (causality, windows, lengths, sinks and
// packed sequences included) and one with all options. What they do is in forward.cuh.
#include "forward.cuh"
#include "kernels.h"

using namespace fused_attention;
using namespace fused_attention::cuda;

#define FORWARD(dtype, E, D) FORWARD2(dtype, E, D)
#define FORWARD2(dtype, E, D)                                                                    \
  FA_KERNEL(forward_sm80_##dtype##_d##D, AttentionParams, forward_tile(D, false).warps,          \
            Forward<E, D, false>(p, shared).run())                                               \
  FA_KERNEL(forward_sm80_##dtype##_d##D##_options, AttentionParams, forward_tile(D, true).warps, \
            Forward<E, D, true>(p, shared).run())
#define FORWARDS(D) FA_DTYPES(FORWARD, D)
FA_HEAD_DIMS(FORWARDS)

#define NAMES(dtype, E, D) NAMES2(dtype, D)
#define NAMES2(dtype, D) FA_LIST(forward_sm80_##dtype##_d##D) FA_LIST(forward_sm80_##dtype##_d##D##_options)
#define LISTS(D) FA_DTYPES(NAMES, D)
const Kernel cuda::kForwardSm80[] = {FA_HEAD_DIMS(LISTS){nullptr, nullptr}};
