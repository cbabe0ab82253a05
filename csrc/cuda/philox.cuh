// Dropout's decisions: Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), bit for
// bit those of csrc/cpu/philox.h. Element (batch, head, row, column) is word column % 4 of the counter
// (column / 4, row, head, batch); it is kept where the word is at least the threshold.
#pragma once
#include "../params.h"
#include "ptx.cuh"

namespace fused_attention::cuda {

struct Philox {
  uint32_t key[2], batch, threshold;
};

__device__ __forceinline__ Philox dropout_state(const AttentionParams& p, int batch) {
  const uint64_t seed = p.seed_at ? static_cast<uint64_t>(*p.seed_at) : p.seed;
  // dropout_p = 1 keeps nothing: keep_factor is 0 then.
  const double limit = p.dropout_p < 1.0 ? opaque(p.dropout_p) * 4294967296.0 : 0.0;
  return {{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
          static_cast<uint32_t>(batch),
          static_cast<uint32_t>(limit)};
}
__device__ __forceinline__ float keep_factor(const AttentionParams& p) {
  return p.dropout_p < 1.0 ? 1.0f / static_cast<float>(1.0 - p.dropout_p) : 0.0f;
}

// Bit j: whether column 4 block + j is kept.
__device__ __forceinline__ uint32_t kept_bits(const Philox& g, uint32_t block, uint32_t row, uint32_t head) {
  uint32_t c0 = block, c1 = row, c2 = head, c3 = g.batch, k0 = g.key[0], k1 = g.key[1];
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u, p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return static_cast<uint32_t>(c0 >= g.threshold) | static_cast<uint32_t>(c1 >= g.threshold) << 1 |
         static_cast<uint32_t>(c2 >= g.threshold) << 2 | static_cast<uint32_t>(c3 >= g.threshold) << 3;
}

}  // namespace fused_attention::cuda
