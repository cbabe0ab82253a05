// The forward kernels for sm_90a: per dtype and head dim one for plain calls (causality, windows, lengths, sinks and
// packed sequences included) and one with all options. What they do is in forward_sm90.cuh.
#include "forward_sm90.cuh"
#include "kernels.h"

using namespace fused_attention;
using namespace fused_attention::cuda;

#define FORWARD(dtype, E, D) FORWARD2(dtype, E, D)
#define FORWARD2(dtype, E, D)                                                 \
  FA_HOPPER_KERNEL(forward_sm90_##dtype##_d##D, HopperParams,                 \
                   HopperForward<HalfOperands<E, D, false>>(p, shared).run()) \
  FA_HOPPER_KERNEL(forward_sm90_##dtype##_d##D##_options, HopperParams,       \
                   HopperForward<HalfOperands<E, D, true>>(p, shared).run())
#define FORWARDS(D) FA_DTYPES(FORWARD, D)
FA_HOPPER_DIMS(FORWARDS)

#define NAMES(dtype, E, D) NAMES2(dtype, D)
#define NAMES2(dtype, D) FA_LIST(forward_sm90_##dtype##_d##D) FA_LIST(forward_sm90_##dtype##_d##D##_options)
#define LISTS(D) FA_DTYPES(NAMES, D)
const Kernel cuda::kForwardSm90[] = {FA_HOPPER_DIMS(LISTS){nullptr, nullptr}};
