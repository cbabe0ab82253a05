// Forward pass for mma.sync: out = softmax(scores) V by the online softmax, one CTA per block of rows.
//
//   for each tile of keys:  S = Q K^T;  finish_scores (mask.cuh);  P, l, t = online_softmax (softmax.cuh);  O += drop(P) V
//   at the end:             out = O / (l + exp(sink - t)),  lse = t + log(l + exp(sink - t))
//
// Shared memory: q [rows, D], k and v [stages][keys, D], swizzled (tile.cuh); a strip of floats per warp where there is a
// mask or bias; flags. A warp owns 16 MT rows: its part of S, P and O stays in registers, as C fragments.
//
// Rows of a block are queries of one head or, where queries are few, of all heads that share a key head.
//
// A weight of 0 times NaN is NaN: what is not finite in a hidden value spoils O. A spoiled O is taken again with care:
// values that are not finite leave the product and are added by hand, to the rows that see them.
#pragma once
#include "schedule.cuh"
#include "softmax.cuh"
#include "tiles.h"

namespace fused_attention::cuda {

template <class E, int D, bool OPTIONS>
struct Forward {
  static constexpr Tile kTile = forward_tile(D, OPTIONS);
  static constexpr int kRows = kTile.rows, kKeys = kTile.keys, kWarps = kTile.warps, kStages = kTile.stages;
  static constexpr int kThreads = 32 * kWarps, MT = kRows / kWarps / 16, NT = kKeys / 8, DT = D / 8;
  static constexpr uint32_t kQuery = kRows * D * 2, kStage = kKeys * D * 2;  // bytes
  using WarpStrip = Strip<false, MT, NT>;
  static constexpr int kFlags = (kKeys + 31) / 32;

  const AttentionParams& p;
  Problem x;
  RowMap map;
  int row0, kv_head, thread, lane, warp_row;
  uint32_t q, k, v;  // shared memory
  uint32_t* flags;
  float* strip;

  __device__ __forceinline__ Forward(const AttentionParams& p, char* shared) : p(p) {
    thread = static_cast<int>(threadIdx.x), lane = thread & 31, warp_row = (thread >> 5) * 16 * MT;
    q = shared_address(shared), k = q + kQuery, v = k + kStages * kStage;
    flags = reinterpret_cast<uint32_t*>(shared + kQuery + 2 * kStages * kStage);
    strip = reinterpret_cast<float*>(flags + kFlagBytes / 4) + (thread >> 5) * WarpStrip::kFloats;
  }

  // Of k or v. Found anew wherever it is needed, rather than kept in registers.
  __device__ __forceinline__ Rows make_rows(const Tensor& t, int count, int64_t dims) const {
    const int b = opaque(x.b), head = opaque(kv_head);
    return {row_address(t, slot(p, b), head, first_key(p, b)), 2 * t.stride[2], count, static_cast<int>(dims)};
  }

  // False if there is nothing to do.
  __device__ __forceinline__ bool place() {
    const int group = static_cast<int>(p.H / p.HK);
    const bool pack = group > 1 && p.M < kRows;
    const int heads = static_cast<int>(pack ? p.HK : p.H), rows = static_cast<int>(p.M) * (pack ? group : 1);
    const Place at = find_place(p, p.row_ends, (rows + kRows - 1) / kRows, heads, true);
    if (at.idle) return false;
    x = make_problem(p, at.b);
    map = {x.rows * (pack ? group : 1), pack ? at.head * group : at.head, pack ? x.rows : 0};
    row0 = at.block * kRows;
    kv_head = pack ? at.head : at.head / group;
    return true;
  }

  struct Queries {  // rows of q, for load_tile
    static constexpr int kUnroll = 1;
    const Forward& f;
    const char* base;
    int64_t steps;
    int dims;
    __device__ __forceinline__ bool vectors() const { return in_vectors(base, steps, dims); }
    __device__ __forceinline__ const char* operator()(int r) const {
      if (r >= f.map.count) return nullptr;
      return base + 2 * (f.map.head_of(r) * f.p.q.stride[1] + f.map.query(r) * f.p.q.stride[2]);
    }
  };
  __device__ __forceinline__ void load_queries() {
    const char* base = row_address(p.q, slot(p, x.b), 0, first_row(p, x.b));
    const int64_t steps = p.q.stride[1] | p.q.stride[2];
    load_tile<kRows, D, kThreads>(q, Queries{*this, base, 2 * steps, static_cast<int>(p.D)}, row0, thread);
  }

  // Of one stage: values that are not finite become 0, and their keys are flagged.
  __device__ __forceinline__ void clean_values(uint32_t tile) {
    if (thread < kFlags) flags[thread] = 0;
    __syncthreads();
#pragma unroll 1
    for (int at = thread; at < kKeys * DT; at += kThreads) {
      const uint32_t place = tile + Swizzle<D>::offset(at / DT, at % DT);
      uint4 x = load_shared(place);
      if (!clean<E>(x)) continue;
      store_shared(place, x);
      atomicOr(&flags[at / DT / 32], 1u << (at / DT % 32));
    }
    __syncthreads();
  }

  // What clean_values took out of row `key` of the tile, added to the rows that see it: acc += s[key] v[key].
  __device__ __forceinline__ void add_value(float (&acc)[MT][DT][4], const float (&s)[MT][NT][4], uint64_t hidden,
                                            const Rows& values, int first, int key) {
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

  __device__ __forceinline__ void add_flagged(float (&acc)[MT][DT][4], const float (&s)[MT][NT][4], uint64_t hidden,
                                              const Rows& values, int first) {
#pragma unroll 1
    for (int key = 0; key < kKeys; ++key)
      if (flags[key / 32] >> (key % 32) & 1) add_value(acc, s, hidden, values, first, key);
  }

  // O and the state of its rows, over all keys; see above for `careful`.
  __device__ __forceinline__ void attend(float (&acc)[MT][DT][4], RowState<MT>& state, bool careful) {
    const int first = opaque(row0), last = min(first + kRows, map.count) - 1;
    const Range range = key_range(p, x, map.packed ? 0 : first, map.packed ? x.rows - 1 : last, kKeys);
    const int limit = min(x.seen, range.end);
    const Rows keys = make_rows(p.k, limit, p.D), values = make_rows(p.v, limit, p.DV);
    const float factor = exponent_factor(p);
    clear(acc);
    state.clear();
    const auto following = [](uint32_t at) { return at == (kStages - 1) * kStage ? 0 : at + kStage; };
    uint32_t filled = 0;  // the stage that is filled in this round; the one after it is the oldest, and computed with
#pragma unroll 1
    for (int key = range.begin - (kStages - 1) * kKeys; key < range.end; key += kKeys, filled = following(filled)) {
      if (key >= range.begin) {
        wait_copies<kStages - 2>();
        __syncthreads();  // the stage is here for all threads, and all have left the one that is filled next
      }
      const int next = key + (kStages - 1) * kKeys;
      if (next < range.end) {
        load_tile<kKeys, D, kThreads>(k + filled, keys, next, thread);
        load_tile<kKeys, D, kThreads>(v + filled, values, next, thread);
      }
      commit_copies();
      if (key < range.begin) continue;

      const uint32_t stage = following(filled);
      float s[MT][NT][4];
      const int row = opaque(row0 + warp_row), lane = opaque(this->lane);
      const auto here = make_elements<false, MT, NT>(row, key, lane);
      KeptElements kept{0};  // drawn first, while s takes no registers
      if (OPTIONS && p.dropout_p > 0.0) kept = draw_kept(dropout_state(p, x.b), map, here, lane);
      multiply_transposed<E, D>(s, q, warp_row, k + stage, 0, lane);
      if constexpr (OPTIONS) finish_scores<false>(s, s, p, x, map, here, row, key, strip, lane);
      if (range.partial(key)) hide(s, p, x, map, here);
      uint64_t hidden = 0;
      if (careful) {
        clean_values(v + stage);
#pragma unroll
        for (int e = 0; e < MT * NT * 4; ++e)
          hidden |= static_cast<uint64_t>(s[e / (4 * NT)][e / 4 % NT][e % 4] == -kInfinity) << e;
      }
      online_softmax(s, state, acc, factor);
      if (OPTIONS && p.dropout_p > 0.0) drop(s, kept);
      if (careful) add_flagged(acc, s, hidden, make_rows(p.v, limit, p.DV), key);
      multiply_add<E, D>(acc, s, v + stage, lane);
    }
    wait_copies<0>();
  }

  __device__ __forceinline__ void store(const float (&acc)[MT][DT][4], const RowState<MT>& state) {
    float factor[2 * MT];
    const int64_t batch = slot(p, x.b), first = first_row(p, x.b);
#pragma unroll
    for (int j = 0; j < 2 * MT; ++j) {
      const int own = row0 + warp_row + (lane >> 2) + 8 * j, r = map.clamp(own), head = map.head_of(r);
      const float* sink = p.sinks.data ? static_cast<const float*>(p.sinks.data) + head * p.sinks.stride[0] : nullptr;
      const RowEnd end = finish_row(state.top[j], quad_sum(state.total[j]), exponent_factor(p), score_unit(p), sink);
      factor[j] = OPTIONS && p.dropout_p > 0.0 ? end.factor * keep_factor(p) : end.factor;
      if ((lane & 3) == 0 && own == r) *row_number(p.lse, batch, head, first + map.query(r)) = end.lse;
    }
    __syncwarp();  // of q, this warp alone has read these rows
    stage_rows<E, D, MT>(q, warp_row, acc, factor, lane);
    __syncwarp();
    const char* base = row_address(p.out, batch, 0, first);
    const bool vectors = in_vectors(base, 2 * (p.out.stride[1] | p.out.stride[2]), p.DV);
#pragma unroll 1
    for (int i = lane >> 3; i < 16 * MT; i += 4) {
      const int r = row0 + warp_row + i;
      if (r >= map.count) break;
      char* to = row_address(p.out, batch, map.head_of(r), first + map.query(r));
      store_row<D, 8>(to, q, warp_row + i, static_cast<int>(p.DV), vectors, lane & 7);
    }
  }

  __device__ __forceinline__ void run() {
    if (!place()) return;
    load_queries();
    commit_copies();
    float acc[MT][DT][4];
    RowState<MT> state;
    bool careful = false;
#pragma unroll 1
    while (true) {
      attend(acc, state, careful);
      if (careful || !__syncthreads_or(spoiled(acc))) break;
      careful = true;
    }
    store(acc, state);
  }
};

}  // namespace fused_attention::cuda
