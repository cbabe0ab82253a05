// The argument of the gradient kernels for sm_90: the call and its tensor maps.
#pragma once
#include "../params.h"
#include "tensor_map.h"

namespace fused_attention::cuda {

struct HopperGradientParams {
  AttentionParams p;
  // Boxes of 64 columns and as many rows as a tile has. A dimension whose stride is 0 has one element.
  TensorMap q;     // [B, H, M, D]
  TensorMap dout;  // [B, H, M, DV]
  TensorMap k;     // [B, HK, N, D]
  TensorMap v;     // [B, HK, N, DV]
};

}  // namespace fused_attention::cuda
