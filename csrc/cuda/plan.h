// From a call to launches: which kernels, on which grid, with how much shared memory. Numbers only, no CUDA: the same
// plan is launched on a GPU and run by an emulator where there is none.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "../params.h"
#include "decode_params.h"
#include "fp8_params.h"

namespace fused_attention::cuda {

// A tensor map that is to be written into a kernel's argument: boxes whose swizzle is as wide as their rows, 128, 64 or 32
// bytes; what is outside reads as 0.
struct MapPlan {
  int offset;  // in the argument
  const void* address;
  DType dtype;
  std::array<int64_t, 4> dims;     // the innermost first
  std::array<int64_t, 3> strides;  // bytes
  std::array<int, 4> box;
};

struct Launch {
  std::string kernel;
  int64_t grid;  // one dimension
  int threads;
  int shared_bytes;
  std::vector<unsigned char> params;  // the kernel's one argument
  std::vector<MapPlan> maps;
};

// Blocks in which the kernels of a call take rows and keys: what row_ends and key_ends of packed sequences count.
struct Blocks {
  int forward_rows, backward_rows, backward_keys;
  int64_t forward_group;  // the forward kernel takes the rows of this many heads together
};
Blocks block_sizes(const AttentionParams& p);

// In how many shares the gradients of mask and bias (dmask, dbias: their strides are looked at) are summed: enough blocks
// for a large chip, by shape alone.
struct Shares {
  int64_t mask, bias;
};
Shares additive_shares(const AttentionParams& p);

// Of the kernels that multiply in float8: rows of a block, heads taken together there, and rows or keys that share a scale.
struct Fp8Blocks {
  int rows;
  int64_t group;
  int scale;
};
Fp8Blocks fp8_blocks(const AttentionParams& p);

// Why the kernels cannot run a call; empty if they can.
std::string refusal(const AttentionParams& p);
std::string refusal(const Fp8Params& p);

std::string refusal(const DecodeParams& p);
std::string refusal(const AppendParams& p);

// In order. `refusal` must be empty. Nothing to do gives no launches.
std::vector<Launch> plan_forward(const AttentionParams& p);
std::vector<Launch> plan_forward_fp8(const Fp8Params& p);
std::vector<Launch> plan_backward(const AttentionParams& p);
std::vector<Launch> plan_decode(const DecodeParams& p);
std::vector<Launch> plan_append(const AppendParams& p);

}  // namespace fused_attention::cuda
