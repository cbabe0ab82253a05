// What kernels.cpp exports for each instruction set. Each function returns false if memory ran out.
#pragma once
#include "../params.h"

namespace fused_attention {

struct Kernels {
  const char* isa;
  bool (*forward)(const AttentionParams&);  // with the weights, where these are given
  bool (*backward)(const AttentionParams&);
  bool (*linear)(const LinearParams&);
};

// The table of this machine. Throws std::invalid_argument if FUSED_ATTENTION_CPU_ISA names one that is not built or
// that this processor does not have.
const Kernels& kernels();

}  // namespace fused_attention
