// A tensor map: 128 bytes that tell the copy engine of sm_90 how a tensor lies. The driver writes them (launch.cpp) from a
// description that a plan makes (plan.h), and a kernel takes them by value, as a part of its argument.
#pragma once

namespace fused_attention::cuda {

struct alignas(64) TensorMap {
  unsigned char bytes[128];
};

}  // namespace fused_attention::cuda
