// The arguments of the decoding kernels.
#pragma once
#include "../params.h"

namespace fused_attention::cuda {

// A cache of keys and values: dense [B, HK, capacity, .] or paged [pages, HK, page_size, .].
struct CacheParams {
  Tensor k, v;  // bf16, f16, i8 or e4m3; unit stride in the last dimension
  Tensor k_scale,
      v_scale;  // f32, a number per token and head of a quantised cache: k is the scale times what is stored
  const int32_t* table = nullptr;    // [B, pages of a sequence]: key j of sequence b is in page table[b, j / page_size]
  int64_t table_step = 0;            // from sequence to sequence
  int64_t pages = 0, page_size = 0;  // 0: dense
  int64_t capacity = 0;
  const void* lengths = nullptr;  // [B] tokens of each sequence, int32 or int64
  bool long_lengths = false;
};

struct DecodeParams {
  int64_t B = 0, H = 0, HK = 0, M = 0, D = 0, DV = 0;
  Tensor q;      // [B, H, M, D], bf16 or f16; row i of a sequence stands at position length - M + i
  Tensor alibi;  // [B, H] f32
  Tensor sinks;  // [H] f32
  CacheParams cache;
  double scale = 1.0, softcap = 0.0;
  int64_t window_left = -1;
  int64_t splits = 1;
  Tensor out;      // [B, H, M, DV]
  Tensor lse;      // [B, H, M] f32, dense
  Tensor partial;  // [B, H, M, splits, DV] f32, dense: sums of each split, with splits > 1
  Tensor stats;    // [B, H, M, splits, 2] f32, dense: its largest score and its total
};

// New tokens into the cache, at positions length - M .. length - 1, and the query turned to its positions.
struct AppendParams {
  int64_t B = 0, H = 0, HK = 0, M = 0, D = 0, DV = 0;
  Tensor query, turned;  // [B, H, M, D] and where it goes; absent without tables
  Tensor key, value;     // [B, HK, M, .]; absent: nothing is appended
  CacheParams cache;
  Tensor cos, sin;  // [positions, R / 2] f32; stride[0] from position to position
  int64_t positions = 0, rotary_dim = 0;
  bool interleaved = false;
};

}  // namespace fused_attention::cuda
