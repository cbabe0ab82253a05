// What the forward kernels of all chips share: the rows of a block, values that are not finite, and the end of a block.
//
//   out = O / (l + exp(sink - t)),  lse = t + log(l + exp(sink - t))
//
// Rows of a block are queries of one head or, where queries are few, of all heads that share a key head.
//
// A weight of 0 times NaN is NaN: what is not finite in a hidden value spoils O. A spoiled O is taken again with care:
// values that are not finite leave the product and are added by hand, to the rows that see them.
#pragma once
#include "schedule.cuh"
#include "softmax.cuh"

namespace fused_attention::cuda {

struct Block {
  Problem x;
  RowMap map;
  int row0, kv_head;

  static __device__ __forceinline__ int group(const AttentionParams& p) {
    return static_cast<int>(p.H) / static_cast<int>(p.HK);
  }
  // Whether the heads that share a key head share blocks of `rows` rows.
  static __device__ __forceinline__ bool packs(const AttentionParams& p, int rows) { return p.H > p.HK && p.M < rows; }
  static __device__ __forceinline__ int heads(const AttentionParams& p, int rows) {
    return static_cast<int>(packs(p, rows) ? p.HK : p.H);
  }
  // Blocks of one head of a dense batch.
  static __device__ __forceinline__ int count(const AttentionParams& p, int rows) {
    return (static_cast<int>(p.M) * (packs(p, rows) ? group(p) : 1) + rows - 1) / rows;
  }

  __device__ __forceinline__ void set(const AttentionParams& p, const Place& at, int rows) {
    const int group = Block::group(p);
    const bool pack = packs(p, rows);
    x = make_problem(p, at.b);
    map = {x.rows * (pack ? group : 1), pack ? at.head * group : at.head, pack ? x.rows : 0};
    row0 = at.block * rows;
    kv_head = pack ? at.head : at.head / group;
  }

  // Tiles of keys that its rows see.
  __device__ __forceinline__ Range visible(const AttentionParams& p, int rows, int keys) const {
    const int first = opaque(row0), last = min(first + rows, map.count) - 1;
    return key_range(p, x, map.packed ? 0 : first, map.packed ? x.rows - 1 : last, keys);
  }

  // Of k or v. Found anew wherever it is needed, rather than kept in registers.
  __device__ __forceinline__ Rows key_rows(const AttentionParams& p, const Tensor& t, int count, int64_t dims) const {
    const int b = opaque(x.b), head = opaque(kv_head);
    return {row_address(t, slot(p, b), head, first_key(p, b)), 2 * t.stride[2], count, static_cast<int>(dims)};
  }
};

// --- values that are not finite ------------------------------------------------------------------------------------

// Those of a tile of v become 0, and their keys are flagged. place(row, chunk): where 16 bytes lie.
template <class E, int KEYS, int D, int THREADS, class PlaceOf>
__device__ __forceinline__ void clean_values(uint32_t* flags, int thread, const PlaceOf& place) {
#pragma unroll 1
  for (int at = thread; at < KEYS * (D / 8); at += THREADS) {
    const uint32_t to = place(at / (D / 8), at % (D / 8));
    uint4 x = load_shared(to);
    if (!clean<E>(x)) continue;
    store_shared(to, x);
    atomicOr(&flags[at / (D / 8) / 32], 1u << (at / (D / 8) % 32));
  }
}

// Which scores of a fragment are hidden: bit (mt * NT + nt) * 4 + i.
template <int MT, int NT>
__device__ __forceinline__ uint64_t hidden_elements(const float (&s)[MT][NT][4]) {
  static_assert(MT * NT <= 16);
  uint64_t hidden = 0;
#pragma unroll
  for (int e = 0; e < MT * NT * 4; ++e)
    hidden |= static_cast<uint64_t>(s[e / (4 * NT)][e / 4 % NT][e % 4] == -kInfinity) << e;
  return hidden;
}

// What clean_values took out of row `key` of the tile, added to the rows that see it: acc += s[key] v[key].
template <class E, int MT, int NT, int DT>
__device__ __forceinline__ void add_value(float (&acc)[MT][DT][4], const float (&s)[MT][NT][4], uint64_t hidden,
                                          const Rows& values, int first, int key, int lane) {
  float weight[2 * MT];  // -1: not seen
#pragma unroll
  for (int j = 0; j < 2 * MT; ++j) {
    float own = 0.0f;
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int element = ((j >> 1) * NT + nt) * 4 + 2 * (j & 1) + i;
        const float w = hidden >> element & 1 ? -1.0f : s[j >> 1][nt][2 * (j & 1) + i];
        own += 8 * nt + 2 * (lane & 3) + i == key ? w : 0.0f;
      }
    weight[j] = quad_sum(own);
  }
  const char* row = values(first + key);
#pragma unroll
  for (int dt = 0; dt < DT; ++dt)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int d = 8 * dt + 2 * (lane & 3) + i;
      const uint32_t bits = row && d < values.dims ? *reinterpret_cast<const uint16_t*>(row + 2 * d) : 0;
      if ((bits & E::kExponent) != E::kExponent) continue;
#pragma unroll
      for (int j = 0; j < 2 * MT; ++j)
        if (weight[j] != -1.0f) acc[j >> 1][dt][2 * (j & 1) + i] += weight[j] * E::widen(bits);
    }
}

// The fragment begins with key `part` of the tile, which begins with key `first` of all.
template <class E, int MT, int NT, int DT>
__device__ __forceinline__ void add_flagged(float (&acc)[MT][DT][4], const float (&s)[MT][NT][4], uint64_t hidden,
                                            const uint32_t* flags, const Rows& values, int first, int part, int lane) {
#pragma unroll 1
  for (int key = 0; key < 8 * NT; ++key)
    if (flags[(part + key) / 32] >> ((part + key) % 32) & 1)
      add_value<E>(acc, s, hidden, values, first + part, key, lane);
}

// --- the end of a block --------------------------------------------------------------------------------------------

// Rows row .. row + 16 MT of the block from a warp's fragment to out and lse. They pass through `tile`, [16 MT, D] of
// shared memory that only this warp uses, from row tile_row on.
template <class E, int D, bool OPTIONS, int MT>
__device__ __forceinline__ void store_rows(const AttentionParams& p, const Block& at, const float (&acc)[MT][D / 8][4],
                                           const RowState<MT>& state, int row, uint32_t tile, int tile_row, int lane) {
  const RowMap& map = at.map;
  float factor[2 * MT];
  const int64_t batch = slot(p, at.x.b), first = first_row(p, at.x.b);
#pragma unroll
  for (int j = 0; j < 2 * MT; ++j) {
    const int own = row + (lane >> 2) + 8 * j, r = map.clamp(own), head = map.head_of(r);
    const float* sink = p.sinks.data ? static_cast<const float*>(p.sinks.data) + head * p.sinks.stride[0] : nullptr;
    const RowEnd end = finish_row(state.top[j], quad_sum(state.total[j]), exponent_factor(p), score_unit(p), sink);
    factor[j] = OPTIONS && p.dropout_p > 0.0 ? end.factor * keep_factor(p) : end.factor;
    if ((lane & 3) == 0 && own == r) *row_number(p.lse, batch, head, first + map.query(r)) = end.lse;
  }
  __syncwarp();
  stage_rows<E, D, MT>(tile, tile_row, acc, factor, lane);
  __syncwarp();
  const char* base = row_address(p.out, batch, 0, first);
  const bool vectors = in_vectors(base, 2 * (p.out.stride[1] | p.out.stride[2]), p.DV);
#pragma unroll 1
  for (int i = lane >> 3; i < 16 * MT; i += 4) {
    const int r = row + i;
    if (r >= map.count) break;
    char* to = row_address(p.out, batch, map.head_of(r), first + map.query(r));
    store_row<D, 8>(to, tile, tile_row + i, static_cast<int>(p.DV), vectors, lane & 7);
  }
}

}  // namespace fused_attention::cuda
