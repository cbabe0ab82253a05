// dQ for mma.sync, one CTA per block of rows of a query head:
//
//   S = Q K^T;  P = exp(S - lse);  dP = dO V^T;  dS = P (dP - delta);  dQ += dS K
//
// Shared memory: q and dout [rows, D] for good; stages of k and v [keys, D]; a strip of floats per warp where there is a
// mask or bias. A warp owns 16 rows.
//
// A hidden key may hold anything: where it spoils the sum, the sum is taken again with what is not finite as zeros.
#pragma once
#include "gradient.cuh"
#include "schedule.cuh"

namespace fused_attention::cuda {

template <class E, int D>
struct QueryGradient {
  static constexpr Tile kTile = query_gradient_tile(D);
  static constexpr int kRows = kTile.rows, kKeys = kTile.keys, kStages = kTile.stages, kThreads = 32 * kTile.warps;
  static constexpr int MT = 1, NT = kKeys / 8, DT = D / 8;
  static_assert(kRows == 16 * kTile.warps);
  static constexpr uint32_t kRowBytes = kRows * D * 2, kKeyBytes = kKeys * D * 2;
  using WarpStrip = Strip<false, MT, NT>;
  using Sum = float[MT][DT][4];

  const AttentionParams& p;
  Problem x;
  int head, row0, thread, lane, warp_row;
  uint32_t q, dout, k, v;  // shared memory
  float* strip;
  RowGradient<2> row;
  float dlse[2];

  __device__ __forceinline__ QueryGradient(const AttentionParams& p, char* shared) : p(p) {
    thread = static_cast<int>(threadIdx.x), lane = thread & 31, warp_row = thread / 32 * 16;
    q = shared_address(shared), dout = q + kRowBytes, k = dout + kRowBytes, v = k + kStages * kKeyBytes;
    strip =
        reinterpret_cast<float*>(shared + 2 * kRowBytes + 2 * kStages * kKeyBytes) + thread / 32 * WarpStrip::kFloats;
  }

  __device__ __forceinline__ bool place() {
    const int blocks = (static_cast<int>(p.M) + kRows - 1) / kRows;
    const Place at = find_place(p, p.row_ends, blocks, static_cast<int>(p.H), true);
    if (at.idle) return false;
    x = make_problem(p, at.b);
    head = at.head, row0 = at.block * kRows;
    return true;
  }

  // lse and delta of the lane's two rows; dlse where it is not in delta.
  __device__ __forceinline__ void load_numbers() {
    const int64_t batch = slot(p, x.b), first = first_row(p, x.b);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int own = row0 + warp_row + (lane >> 2) + 8 * j, r = min(own, x.rows - 1);
      row.lse[j] = own == r ? usable_lse(*row_number(p.lse, batch, head, first + r)) : kInfinity;
      row.delta[j] = *row_number(p.delta, batch, head, first + r);
      dlse[j] = p.dlse.data && few_keys(p) ? *row_number(p.dlse, batch, head, first + r) : 0.0f;
    }
  }

  __device__ __forceinline__ Rows query_rows(const Tensor& t, int64_t dims) const {
    return {row_address(t, slot(p, x.b), head, first_row(p, x.b)), 2 * t.stride[2], x.rows, static_cast<int>(dims)};
  }
  __device__ __forceinline__ Rows key_rows(const Tensor& t, int count, int64_t dims) const {
    const int kv_head = head / static_cast<int>(p.H / p.HK);
    return {row_address(t, slot(p, x.b), kv_head, first_key(p, x.b)), 2 * t.stride[2], count, static_cast<int>(dims)};
  }

  // With care: numbers of a tile of keys that are not finite become 0, once all scores have been taken from it.
  __device__ __forceinline__ void clean_keys(uint32_t tile) {
    __syncthreads();
#pragma unroll 1
    for (int at = thread; at < kKeys * DT; at += kThreads) {
      const uint32_t place = tile + Swizzle<D>::offset(at / DT, at % DT);
      uint4 bits = load_shared(place);
      if (clean<E>(bits)) store_shared(place, bits);
    }
    __syncthreads();
  }

  __device__ __forceinline__ void add_tile(Sum& dq, uint32_t stage, int key, bool partial, bool careful) {
    const int first = opaque(row0 + warp_row), lane = opaque(this->lane);
    const RowMap map{x.rows, head, 0};
    const auto here = make_elements<false, MT, NT>(first, key, lane);
    KeptElements kept{0};
    if (p.dropout_p > 0.0) kept = draw_kept(dropout_state(p, x.b), map, here, lane);
    float s[MT][NT][4], slope[MT][NT][4], dp[MT][NT][4];
    multiply_transposed<E, D>(s, q, warp_row, k + stage, 0, lane);
    finish_scores<true>(s, slope, p, x, map, here, first, key, strip, lane);
    if (partial) hide(s, p, x, map, here);
    const bool few = few_keys(p);
    if (few)
      probabilities_anew<false>(s, row, p, head);
    else
      probabilities<false>(s, row, exponent_factor(p));
    multiply_transposed<E, D>(dp, dout, warp_row, v + stage, 0, lane);
    score_gradient<false>(dp, s, row, p, kept, few, dlse);
    through_softcap(dp, slope, p);
    if (careful) clean_keys(k + stage);
    multiply_add<E, D>(dq, dp, k + stage, lane);
  }

  __device__ __forceinline__ void add_keys(Sum& dq, bool careful) {
    const int first = opaque(row0), last = min(first + kRows, x.rows) - 1;
    const Range range = key_range(p, x, first, last, kKeys);
    const int limit = min(x.seen, range.end);
    const Rows keys = key_rows(p.k, limit, p.D), values = key_rows(p.v, limit, p.DV);
    const auto following = [](uint32_t at) { return at == (kStages - 1) * kKeyBytes ? 0 : at + kKeyBytes; };
    uint32_t filled = 0;  // as in forward.cuh
    clear(dq);
#pragma unroll 1
    for (int key = range.begin - (kStages - 1) * kKeys; key < range.end; key += kKeys, filled = following(filled)) {
      if (key >= range.begin) {
        wait_copies<kStages - 2>();
        __syncthreads();
      }
      const int next = key + (kStages - 1) * kKeys;
      if (next < range.end) {
        load_tile<kKeys, D, kThreads>(k + filled, keys, next, thread);
        load_tile<kKeys, D, kThreads>(v + filled, values, next, thread);
      }
      commit_copies();
      if (key < range.begin) continue;
      add_tile(dq, following(filled), key, range.partial(key), careful);
    }
    wait_copies<0>();
  }

  // Nobody else reads the warp's own rows of q.
  __device__ __forceinline__ void store(const Sum& dq) {
    char* base = row_address(p.dq, slot(p, x.b), head, first_row(p, x.b));
    store_sum<E, D>(base, 2 * p.dq.stride[2], row0 + warp_row, x.rows, p.D, dq, static_cast<float>(p.scale), q,
                    warp_row, lane);
  }

  __device__ __forceinline__ void run() {
    if (!place()) return;
    load_tile<kRows, D, kThreads>(q, query_rows(p.q, p.D), row0, thread);
    load_tile<kRows, D, kThreads>(dout, query_rows(p.dout, p.DV), row0, thread);
    commit_copies();
    load_numbers();
    Sum dq;
    bool careful = false;
#pragma unroll 1
    while (true) {
      add_keys(dq, careful);
      if (careful || !__syncthreads_or(spoiled(dq))) break;
      careful = true;
    }
    store(dq);
  }
};

}  // namespace fused_attention::cuda
