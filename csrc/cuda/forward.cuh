// Forward pass for mma.sync: out = softmax(scores) V by the online softmax, one CTA per block of rows.
//
//   for each tile of keys:  S = Q K^T;  finish_scores (mask.cuh);  P, l, t = online_softmax (softmax.cuh);  O += drop(P) V
//   at the end:             store_rows (forward_block.cuh)
//
// Shared memory: q [rows, D], k and v [stages][keys, D], swizzled (tile.cuh); a strip of floats per warp where there is a
// mask or bias; flags. A warp owns 16 MT rows: its part of S, P and O stays in registers, as C fragments.
#pragma once
#include "forward_block.cuh"
#include "tiles.h"

namespace fused_attention::cuda {

template <class E, int D, bool OPTIONS>
struct Forward : Block {
  static constexpr Tile kTile = forward_tile(D, OPTIONS);
  static constexpr int kRows = kTile.rows, kKeys = kTile.keys, kWarps = kTile.warps, kStages = kTile.stages;
  static constexpr int kThreads = 32 * kWarps, MT = kRows / kWarps / 16, NT = kKeys / 8, DT = D / 8;
  static constexpr uint32_t kQuery = kRows * D * 2, kStage = kKeys * D * 2;  // bytes
  using WarpStrip = Strip<false, MT, NT>;
  static constexpr int kFlags = (kKeys + 31) / 32;

  const AttentionParams& p;
  int thread, lane, warp_row;
  uint32_t q, k, v;  // shared memory
  uint32_t* flags;
  float* strip;

  __device__ __forceinline__ Forward(const AttentionParams& p, char* shared) : p(p) {
    thread = static_cast<int>(threadIdx.x), lane = thread & 31, warp_row = (thread >> 5) * 16 * MT;
    q = shared_address(shared), k = q + kQuery, v = k + kStages * kStage;
    flags = reinterpret_cast<uint32_t*>(shared + kQuery + 2 * kStages * kStage);
    strip = reinterpret_cast<float*>(flags + kFlagBytes / 4) + (thread >> 5) * WarpStrip::kFloats;
  }

  // False if there is nothing to do.
  __device__ __forceinline__ bool place() {
    const Place at = find_place(p, p.row_ends, count(p, kRows), heads(p, kRows), true);
    if (!at.idle) set(p, at, kRows);
    return !at.idle;
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

  // O and the state of its rows, over all keys; see above for `careful`.
  __device__ __forceinline__ void attend(float (&acc)[MT][DT][4], RowState<MT>& state, bool careful) {
    const Range range = visible(p, kRows, kKeys);
    const int limit = min(x.seen, range.end);
    const Rows keys = key_rows(p, p.k, limit, p.D), values = key_rows(p, p.v, limit, p.DV);
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
        if (thread < kFlags) flags[thread] = 0;
        __syncthreads();
        clean_values<E, kKeys, D, kThreads>(
            flags, thread, [=](int key, int chunk) { return v + stage + Swizzle<D>::offset(key, chunk); });
        __syncthreads();
        hidden = hidden_elements(s);
      }
      online_softmax(s, state, acc, factor);
      if (OPTIONS && p.dropout_p > 0.0) drop(s, kept);
      if (careful) add_flagged<E>(acc, s, hidden, flags, key_rows(p, p.v, limit, p.DV), key, 0, lane);
      multiply_add<E, D>(acc, s, v + stage, lane);
    }
    wait_copies<0>();
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
    store_rows<E, D, OPTIONS>(p, *this, acc, state, row0 + warp_row, q, warp_row,
                              lane);  // of q, only this warp has read these
  }
};

}  // namespace fused_attention::cuda
