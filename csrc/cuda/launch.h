// Launches of a plan on the current device. The CUDA runtime is linked statically; the stream comes from the caller.
#pragma once
#include <string>
#include <vector>

#include "plan.h"

namespace fused_attention::cuda {

// Starts the launches in order on a stream (a cudaStream_t) and waits for nothing. Returns what went wrong; empty: nothing.
std::string run(std::vector<Launch> launches, void* stream);

// The architectures that the kernels are compiled for, such as "80;90a", and by which compiler.
const char* built_architectures();
const char* built_by();

}  // namespace fused_attention::cuda
