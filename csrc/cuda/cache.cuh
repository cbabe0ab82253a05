// Where the tokens of a key/value cache lie (cache.py).
#pragma once
#include "decode_params.h"
#include "problem.cuh"

namespace fused_attention::cuda {

struct CachedToken {
  int block, row;  // sequence or page (-1: nothing to read), and the row in it
  bool missing;    // wanted, but its page does not exist
};

__device__ __forceinline__ CachedToken find_token(const CacheParams& c, int b, int at, bool wanted) {
  if (!wanted) return {-1, 0, false};
  if (!c.page_size) return {b, at, false};
  const int size = static_cast<int>(c.page_size), page = c.table[b * c.table_step + at / size];
  const bool exists = page >= 0 && page < c.pages;
  return {exists ? page : -1, at % size, !exists};
}

// How many tokens a sequence holds; lost: more than there is room for.
__device__ __forceinline__ int cached_length(const CacheParams& c, int b, bool& lost) {
  const int64_t length = c.long_lengths ? static_cast<const int64_t*>(c.lengths)[b]
                                        : static_cast<int64_t>(static_cast<const int32_t*>(c.lengths)[b]);
  lost = length > c.capacity;
  return static_cast<int>(length < 0 ? 0 : length < c.capacity ? length : c.capacity);
}

__device__ __forceinline__ float* token_scale(const Tensor& scales, const CachedToken& at, int head) {
  return static_cast<float*>(scales.data) + at.block * scales.stride[0] + head * scales.stride[1] +
         at.row * scales.stride[2];
}

}  // namespace fused_attention::cuda
