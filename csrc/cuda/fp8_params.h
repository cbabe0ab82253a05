// The argument of the kernels for sm_90 that multiply in float8 e4m3: the call, and q, k and v as codes with scales, which
// one kernel writes (quantise.cuh) and the next one reads (fp8_operands.cuh).
//
// Blocks of kScaleBlock rows (or keys) share a scale. A packed sequence begins with a block of its own: sequence b has
// the blocks from first[b] / kScaleBlock + b on, first[b] where it begins.
#pragma once
#include "hopper_params.h"

namespace fused_attention::cuda {

struct Fp8Params {
  HopperParams hopper;  // its maps are those of the codes; boxes of v have all head dims and a tile's keys
  Tensor q_codes;       // [B, H, M, D]          packed as q is: one batch element. Rows begin at multiples of 16 bytes
  Tensor k_codes;       // [B, HK, N, D]
  Tensor v_codes;       // [B, HK, DV, columns]  columns: blocks of keys times kScaleBlock; keys of 16 are permuted
  Tensor q_scales;      // [B, H, blocks]        f32, powers of two: q is the scale times the code
  Tensor k_scales;      // [B, HK, blocks]
  Tensor v_scales;      // [B, HK, blocks]
  int32_t row_blocks = 0;  // of all sequences, for one head; of packed ones a bound
  int32_t key_blocks = 0;
};

}  // namespace fused_attention::cuda
