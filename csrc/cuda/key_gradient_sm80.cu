// The kernels of dK and dV for mma.sync, together or one launch each (tiles.h). What they do is in key_gradient.cuh.
#include "kernels.h"
#include "key_gradient.cuh"

using namespace fused_attention;
using namespace fused_attention::cuda;

#define GRADIENT(name, E, D, K, V) \
  FA_KERNEL(name, AttentionParams, key_gradient_tile(D).warps, KeyGradient<E, D, K, V>(p, shared).run())

#define TOGETHER(dtype, E, D) TOGETHER2(dtype, E, D)
#define TOGETHER2(dtype, E, D) GRADIENT(key_gradients_sm80_##dtype##_d##D, E, D, true, true)
#define ALL_TOGETHER(D) FA_DTYPES(TOGETHER, D)
FA_TOGETHER_DIMS(ALL_TOGETHER)

#define APART(dtype, E, D) APART2(dtype, E, D)
#define APART2(dtype, E, D)                                     \
  GRADIENT(key_gradient_sm80_##dtype##_d##D, E, D, true, false) \
  GRADIENT(value_gradient_sm80_##dtype##_d##D, E, D, false, true)
#define ALL_APART(D) FA_DTYPES(APART, D)
FA_APART_DIMS(ALL_APART)

#define NAME(dtype, E, D) NAME2(dtype, D)
#define NAME2(dtype, D) FA_LIST(key_gradients_sm80_##dtype##_d##D)
#define LIST_TOGETHER(D) FA_DTYPES(NAME, D)
#define NAMES(dtype, E, D) NAMES2(dtype, D)
#define NAMES2(dtype, D) FA_LIST(key_gradient_sm80_##dtype##_d##D) FA_LIST(value_gradient_sm80_##dtype##_d##D)
#define LIST_APART(D) FA_DTYPES(NAMES, D)
const Kernel cuda::kKeyGradientSm80[] = {FA_TOGETHER_DIMS(LIST_TOGETHER) FA_APART_DIMS(LIST_APART){nullptr, nullptr}};
