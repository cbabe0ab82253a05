// The forward kernels for sm_90a whose products are of float8 e4m3 (fp8_operands.cuh), per dtype of q, k, v and out and
// head dim, as forward_sm90.cu has those of 16 bits.
#include "forward_sm90.cuh"
#include "fp8_operands.cuh"
#include "kernels.h"

using namespace fused_attention;
using namespace fused_attention::cuda;

#define FORWARD(dtype, E, D) FORWARD2(dtype, E, D)
#define FORWARD2(dtype, E, D)                                                \
  FA_HOPPER_KERNEL(fp8_forward_sm90_##dtype##_d##D, Fp8Params,               \
                   HopperForward<Fp8Operands<E, D, false>>(p, shared).run()) \
  FA_HOPPER_KERNEL(fp8_forward_sm90_##dtype##_d##D##_options, Fp8Params,     \
                   HopperForward<Fp8Operands<E, D, true>>(p, shared).run())
#define FORWARDS(D) FA_DTYPES(FORWARD, D)
FA_HOPPER_DIMS(FORWARDS)

#define NAMES(dtype, E, D) NAMES2(dtype, D)
#define NAMES2(dtype, D) FA_LIST(fp8_forward_sm90_##dtype##_d##D) FA_LIST(fp8_forward_sm90_##dtype##_d##D##_options)
#define LISTS(D) FA_DTYPES(NAMES, D)
const Kernel cuda::kForwardFp8Sm90[] = {FA_HOPPER_DIMS(LISTS){nullptr, nullptr}};
