// The kernels that make float8 e4m3 of q, k and v (quantise.cuh), per dtype and head dim.
#include "quantise.cuh"

#include "kernels.h"

using namespace fused_attention;
using namespace fused_attention::cuda;

#define QUANTISE(dtype, E, D) QUANTISE2(dtype, E, D)
#define QUANTISE2(dtype, E, D) \
  FA_KERNEL(fp8_quantise_sm90_##dtype##_d##D, Fp8Params, kQuantiseWarps, Quantise<E, D>(p, shared).run())
#define KERNELS(D) FA_DTYPES(QUANTISE, D)
FA_HOPPER_DIMS(KERNELS)

#define NAMES(dtype, E, D) NAMES2(dtype, D)
#define NAMES2(dtype, D) FA_LIST(fp8_quantise_sm90_##dtype##_d##D)
#define LISTS(D) FA_DTYPES(NAMES, D)
const Kernel cuda::kQuantiseSm90[] = {FA_HOPPER_DIMS(LISTS){nullptr, nullptr}};
