// The kernels of dK and dV for sm_90a, together or one launch each (tiles.h): per dtype and head dim one for plain calls
// (causality, windows, lengths and packed sequences included) and one with all options. What they do is in
// key_gradient_sm90.cuh.
#include "kernels.h"
#include "key_gradient_sm90.cuh"

using namespace fused_attention;
using namespace fused_attention::cuda;

#define GRADIENT(name, E, D, K, V)                                                                    \
  FA_HOPPER_KERNEL(name, HopperGradientParams, HopperKeyGradient<E, D, false, K, V>(p, shared).run()) \
  FA_HOPPER_KERNEL(name##_options, HopperGradientParams, HopperKeyGradient<E, D, true, K, V>(p, shared).run())

#define TOGETHER(dtype, E, D) TOGETHER2(dtype, E, D)
#define TOGETHER2(dtype, E, D) GRADIENT(key_gradients_sm90_##dtype##_d##D, E, D, true, true)
#define ALL_TOGETHER(D) FA_DTYPES(TOGETHER, D)
FA_HOPPER_TOGETHER_DIMS(ALL_TOGETHER)

#define APART(dtype, E, D) APART2(dtype, E, D)
#define APART2(dtype, E, D)                                     \
  GRADIENT(key_gradient_sm90_##dtype##_d##D, E, D, true, false) \
  GRADIENT(value_gradient_sm90_##dtype##_d##D, E, D, false, true)
#define ALL_APART(D) FA_DTYPES(APART, D)
FA_HOPPER_APART_DIMS(ALL_APART)

#define BOTH(name) FA_LIST(name) FA_LIST(name##_options)
#define NAME(dtype, E, D) NAME2(dtype, D)
#define NAME2(dtype, D) BOTH(key_gradients_sm90_##dtype##_d##D)
#define LIST_TOGETHER(D) FA_DTYPES(NAME, D)
#define NAMES(dtype, E, D) NAMES2(dtype, D)
#define NAMES2(dtype, D) BOTH(key_gradient_sm90_##dtype##_d##D) BOTH(value_gradient_sm90_##dtype##_d##D)
#define LIST_APART(D) FA_DTYPES(NAMES, D)
const Kernel cuda::kKeyGradientSm90[] = {FA_HOPPER_TOGETHER_DIMS(LIST_TOGETHER)
                                             FA_HOPPER_APART_DIMS(LIST_APART){nullptr, nullptr}};
