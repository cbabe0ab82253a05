// The argument of the forward kernels for sm_90: the call, how its blocks are shared out, and its tensor maps.
#pragma once
#include "../params.h"
#include "tensor_map.h"

namespace fused_attention::cuda {

struct HopperParams {
  AttentionParams p;
  int32_t blocks;   // of the call; of packed sequences a bound
  int32_t section;  // heads among which the blocks of a dense batch are sorted by falling work
  // Boxes of 64 columns: of q 64 rows, of k and v as many as a tile has keys. A dimension whose stride is 0 has one element.
  TensorMap q;  // [B, H, M, D]
  TensorMap k;  // [B, HK, N, D]
  TensorMap v;  // [B, HK, N, DV]
};

}  // namespace fused_attention::cuda
