// Which element of the batch, head and block a CTA works on.
//
// Dense: blocks of one head follow each other, so that they share K and V in the L2 cache; the heaviest first, which
// under causality are the last rows and the first keys. Packed: sequences by falling work (params: order), all heads of
// a block side by side, so that one long sequence starts first and does not hold up the end.
//
// Persistent CTAs take the blocks in rounds, forwards and backwards in turn: where blocks are sorted by falling work, what
// a CTA gets more in one round it gets less in the next. For them, dense blocks are sorted across a section of heads.
#pragma once
#include "problem.cuh"

namespace fused_attention::cuda {

struct Place {
  int b, head, block;
  bool idle;  // past the last block of packed sequences, of which the host knows only a bound
};

// The first i with ends[i] > slot; count if there is none.
__device__ __forceinline__ int find(const int64_t* ends, int64_t slot, int count) {
  int low = 0, high = count;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (ends[middle] > slot)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

// ends: [B] blocks of order[0] .. order[i] together, or null. blocks: of one head of a dense batch. i: of all blocks.
__device__ __forceinline__ Place find_place(const AttentionParams& p, const int64_t* ends, int blocks, int heads,
                                            bool last_first, int i = static_cast<int>(blockIdx.x)) {
  if (!ends) {
    const int block = i % blocks;
    return {i / blocks / heads, i / blocks % heads, last_first ? blocks - 1 - block : block, false};
  }
  const int slot = i / heads, at = find(ends, slot, static_cast<int>(p.B));
  if (at == static_cast<int>(p.B)) return {0, 0, 0, true};
  const int before = at ? static_cast<int>(ends[at - 1]) : 0, after = static_cast<int>(ends[at]);
  return {static_cast<int>(p.order[at]), i % heads, last_first ? after - 1 - slot : slot - before, false};
}

// The block of this CTA in a round; it may be past the last one.
__device__ __forceinline__ int block_of_round(int round) {
  const int ctas = static_cast<int>(gridDim.x), cta = static_cast<int>(blockIdx.x);
  return round * ctas + (round & 1 ? ctas - 1 - cta : cta);
}

// Of a dense batch: the last blocks of `section` heads, then the blocks before them, and so on; then the next heads.
__device__ __forceinline__ Place find_place_in_sections(const AttentionParams& p, int blocks, int heads, int section,
                                                        int i) {
  const int first = i / (section * blocks) * section, here = min(section, static_cast<int>(p.B) * heads - first);
  const int at = i - first * blocks, head = first + at % here;
  return {head / heads, head % heads, blocks - 1 - at / here, false};
}

}  // namespace fused_attention::cuda
