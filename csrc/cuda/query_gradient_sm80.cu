// The kernels of the rest of the backward pass for mma.sync: dQ (query_gradient.cuh), the gradient of a mask or bias
// (additive_gradient.cuh), delta and the gradient of the sinks (row_gradient.cuh).
#include "additive_gradient.cuh"
#include "kernels.h"
#include "query_gradient.cuh"
#include "row_gradient.cuh"

using namespace fused_attention;
using namespace fused_attention::cuda;

#define QUERY(dtype, E, D) QUERY2(dtype, E, D)
#define QUERY2(dtype, E, D)                                                                    \
  FA_KERNEL(query_gradient_sm80_##dtype##_d##D, AttentionParams, query_gradient_tile(D).warps, \
            QueryGradient<E, D>(p, shared).run())
#define QUERIES(D) FA_DTYPES(QUERY, D)
FA_BACKWARD_DIMS(QUERIES)

#define ADDITIVE(dtype, E, D) ADDITIVE2(dtype, E, D)
#define ADDITIVE2(dtype, E, D)                                                                      \
  FA_KERNEL(additive_gradient_sm80_##dtype##_d##D, AdditiveParams, additive_gradient_tile(D).warps, \
            AdditiveGradient<E, D>(p, shared).run(shared))
#define ADDITIVES(D) FA_DTYPES(ADDITIVE, D)
FA_ADDITIVE_DIMS(ADDITIVES)

#define DELTA(dtype, E, _) DELTA2(dtype, E)
#define DELTA2(dtype, E) FA_KERNEL(row_deltas_##dtype, AttentionParams, kDeltaWarps, row_deltas<E>(p))
FA_DTYPES(DELTA, )
FA_KERNEL(sink_gradient, AttentionParams, kSinkWarps, sink_gradients(p, reinterpret_cast<double*>(shared)))

#define QUERY_NAME(dtype, E, D) QUERY_NAME2(dtype, D)
#define QUERY_NAME2(dtype, D) FA_LIST(query_gradient_sm80_##dtype##_d##D)
#define QUERY_NAMES(D) FA_DTYPES(QUERY_NAME, D)
#define ADDITIVE_NAME(dtype, E, D) ADDITIVE_NAME2(dtype, D)
#define ADDITIVE_NAME2(dtype, D) FA_LIST(additive_gradient_sm80_##dtype##_d##D)
#define ADDITIVE_NAMES(D) FA_DTYPES(ADDITIVE_NAME, D)
#define DELTA_NAME(dtype, E, _) DELTA_NAME2(dtype)
#define DELTA_NAME2(dtype) FA_LIST(row_deltas_##dtype)
const Kernel cuda::kQueryGradientSm80[] = {FA_BACKWARD_DIMS(QUERY_NAMES) FA_ADDITIVE_DIMS(ADDITIVE_NAMES)
                                               FA_DTYPES(DELTA_NAME, ) FA_LIST(sink_gradient){nullptr, nullptr}};
