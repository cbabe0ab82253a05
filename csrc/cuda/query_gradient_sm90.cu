// The kernels of dQ for sm_90a: per dtype and head dim one for plain calls (causality, windows, lengths and packed sequences
// included) and one with all options. What they do is in query_gradient_sm90.cuh.
#include "kernels.h"
#include "query_gradient_sm90.cuh"

using namespace fused_attention;
using namespace fused_attention::cuda;

#define QUERY(dtype, E, D) QUERY2(dtype, E, D)
#define QUERY2(dtype, E, D)                                                            \
  FA_HOPPER_KERNEL(query_gradient_sm90_##dtype##_d##D, HopperGradientParams,           \
                   HopperQueryGradient<E, D, false>(p, shared).run())                  \
  FA_HOPPER_KERNEL(query_gradient_sm90_##dtype##_d##D##_options, HopperGradientParams, \
                   HopperQueryGradient<E, D, true>(p, shared).run())
#define QUERIES(D) FA_DTYPES(QUERY, D)
FA_HOPPER_DIMS(QUERIES)

#define NAMES(dtype, E, D) NAMES2(dtype, D)
#define NAMES2(dtype, D) \
  FA_LIST(query_gradient_sm90_##dtype##_d##D) FA_LIST(query_gradient_sm90_##dtype##_d##D##_options)
#define LISTS(D) FA_DTYPES(NAMES, D)
const Kernel cuda::kQueryGradientSm90[] = {FA_HOPPER_DIMS(LISTS){nullptr, nullptr}};
