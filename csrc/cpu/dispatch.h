// The choice of kernels, for the bindings.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace fused_attention {

struct Variant {
  const char* name;
  const Kernels* kernels;  // null: not built
  std::string refusal;     // why it cannot run here; empty if it can
  bool automatic;          // not only by its name: false for the emulation of the tiles, which is there to be tested
};

// All of them, the best of the automatic ones last.
std::vector<Variant> variants();

}  // namespace fused_attention
