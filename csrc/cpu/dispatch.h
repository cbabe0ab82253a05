// The choice of kernels, for the bindings.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace fused_attention {

// Those that are built and that this processor runs, the best last.
std::vector<const Kernels*> supported_kernels();

// After a fork, the child runs on one thread: the pool did not survive. Call once, when the library is loaded.
void watch_forks();

}  // namespace fused_attention
