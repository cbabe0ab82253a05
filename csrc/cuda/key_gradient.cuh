// dK and dV for mma.sync, one CTA per block of keys of a key head, over all rows of all query heads that read it:
//
//   S^T = K Q^T;  P^T = exp(S^T - lse);  dV += drop(P^T) dO;  dP^T = V dO^T;  dS^T = P^T (dP^T - delta);  dK += dS^T Q
//
// Shared memory: k and v [keys, D] for good; stages of q and dout [rows, D] and of lse and delta [rows]; a strip of floats
// per warp where there is a mask or bias. A warp owns 16 keys; tiles lie transposed, so that P^T and dS^T, C fragments, are
// the left operands of what follows. Where dK and dV do not fit into the registers together, a launch for each.
//
// A row that sees nothing may hold anything: where it spoils a sum, the sum is taken again with such rows as zeros.
#pragma once
#include "gradient.cuh"
#include "schedule.cuh"

namespace fused_attention::cuda {

template <class E, int D, bool WANT_K, bool WANT_V>
struct KeyGradient {
  static constexpr Tile kTile = key_gradient_tile(D);
  static constexpr int kRows = kTile.rows, kKeys = kTile.keys, kStages = kTile.stages, kThreads = 32 * kTile.warps;
  static constexpr int MT = 1, NT = kRows / 8, DT = D / 8, kSlots = 2 * NT;
  static_assert(kKeys == 16 * kTile.warps && 2 * kRows <= kThreads);
  static constexpr uint32_t kKeyBytes = kKeys * D * 2, kRowBytes = kRows * D * 2, kNumberBytes = 2 * kRows * 4;
  using WarpStrip = Strip<true, MT, NT>;
  using Sum = float[MT][DT][4];

  const AttentionParams& p;
  Problem x;
  int kv_head, key0, thread, lane, warp_key;
  uint32_t k, v, q, dout;  // shared memory
  char* numbers;           // lse [stages][rows], delta likewise
  float* strip;

  // A stage's place in the loop over heads of the group and tiles of rows.
  struct Cursor {
    int head, row;
  };

  __device__ __forceinline__ KeyGradient(const AttentionParams& p, char* shared) : p(p) {
    thread = static_cast<int>(threadIdx.x), lane = thread & 31, warp_key = thread / 32 * 16;
    k = shared_address(shared), v = k + kKeyBytes, q = v + kKeyBytes, dout = q + kStages * kRowBytes;
    numbers = shared + 2 * kKeyBytes + 2 * kStages * kRowBytes;
    strip = reinterpret_cast<float*>(numbers + kStages * kNumberBytes) + thread / 32 * WarpStrip::kFloats;
  }

  __device__ __forceinline__ int group() const { return static_cast<int>(p.H / p.HK); }

  __device__ __forceinline__ bool place() {
    const int blocks = (static_cast<int>(p.N) + kKeys - 1) / kKeys;
    const Place at = find_place(p, p.key_ends, blocks, static_cast<int>(p.HK), false);
    if (at.idle) return false;
    x = make_problem(p, at.b);
    kv_head = at.head, key0 = at.block * kKeys;
    return true;
  }

  __device__ __forceinline__ Rows key_rows(const Tensor& t, int64_t dims) const {
    return {row_address(t, slot(p, x.b), kv_head, first_key(p, x.b)), 2 * t.stride[2], x.seen, static_cast<int>(dims)};
  }
  __device__ __forceinline__ Rows query_rows(const Tensor& t, int head, int64_t dims) const {
    return {row_address(t, slot(p, x.b), head, first_row(p, x.b)), 2 * t.stride[2], x.rows, static_cast<int>(dims)};
  }

  __device__ __forceinline__ void load_stage(int stage, const Cursor& at) {
    load_tile<kRows, D, kThreads>(q + stage * kRowBytes, query_rows(p.q, at.head, p.D), at.row, thread);
    load_tile<kRows, D, kThreads>(dout + stage * kRowBytes, query_rows(p.dout, at.head, p.DV), at.row, thread);
    if (thread < 2 * kRows) {
      const Tensor& from = thread < kRows ? p.lse : p.delta;
      const int row = at.row + thread % kRows;
      const float* source = row_number(from, slot(p, x.b), at.head, first_row(p, x.b) + min(row, x.rows - 1));
      copy_async_word(shared_address(numbers + stage * kNumberBytes) + 4 * thread, source, row < x.rows ? 4 : 0);
    }
  }

  // lse and delta of the lane's rows.
  __device__ __forceinline__ RowGradient<kSlots> row_numbers(int stage, int row) const {
    const float* lse = reinterpret_cast<const float*>(numbers + stage * kNumberBytes);
    RowGradient<kSlots> r;
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
      const int at = Elements<true, MT, NT>::slot_row(j) + 2 * (lane & 3);
      r.lse[j] = row + at < x.rows ? usable_lse(lse[at]) : kInfinity;
      r.delta[j] = lse[kRows + at];
    }
    return r;
  }

  // With care: rows of a stage that see nothing become zeros.
  __device__ __forceinline__ void clean_rows(int stage) {
    const float* lse = reinterpret_cast<const float*>(numbers + stage * kNumberBytes);
#pragma unroll 1
    for (int at = thread; at < kRows * DT; at += kThreads) {
      if (lse[at / DT] != -kInfinity) continue;
      const uint32_t offset = stage * kRowBytes + Swizzle<D>::offset(at / DT, at % DT);
      store_shared(q + offset, make_uint4(0, 0, 0, 0));
      store_shared(dout + offset, make_uint4(0, 0, 0, 0));
    }
    __syncthreads();
  }

  __device__ __forceinline__ void add_tile(Sum& dk, Sum& dv, int stage, const Cursor& at, bool partial) {
    const int row = at.row, lane = opaque(this->lane), key = opaque(key0 + warp_key);
    const RowMap map{x.rows, at.head, 0};
    const auto here = make_elements<true, MT, NT>(row, key, lane);
    KeptElements kept{0};
    if (p.dropout_p > 0.0) kept = draw_kept(dropout_state(p, x.b), map, here, lane);
    float s[MT][NT][4], slope[MT][NT][4], dp[MT][NT][4];
    multiply_transposed<E, D>(s, k, warp_key, q + stage * kRowBytes, 0, lane);
    finish_scores<true>(s, slope, p, x, map, here, row, key, strip, lane);
    if (partial) hide(s, p, x, map, here);

    RowGradient<kSlots> numbers = row_numbers(stage, row);
    const bool few = few_keys(p);
    float dlse[kSlots];
    if (few) {
      probabilities_anew<true>(s, numbers, p, at.head);
#pragma unroll
      for (int j = 0; j < kSlots; ++j) {
        const int r = map.clamp(here.row + here.slot_row(j));
        dlse[j] = p.dlse.data ? *row_number(p.dlse, slot(p, x.b), at.head, first_row(p, x.b) + r) : 0.0f;
      }
    } else {
      probabilities<true>(s, numbers, exponent_factor(p));
    }
    if constexpr (WANT_V) {
      if (p.dropout_p > 0.0) {
#pragma unroll
        for (int e = 0; e < MT * NT * 4; ++e) dp[0][e / 4][e % 4] = kept.at(e) ? s[0][e / 4][e % 4] : 0.0f;
        multiply_add<E, D>(dv, dp, dout + stage * kRowBytes, lane);
      } else {
        multiply_add<E, D>(dv, s, dout + stage * kRowBytes, lane);
      }
    }
    if constexpr (WANT_K) {
      multiply_transposed<E, D>(dp, v, warp_key, dout + stage * kRowBytes, 0, lane);
      score_gradient<true>(dp, s, numbers, p, kept, few, dlse);
      through_softcap(dp, slope, p);
      multiply_add<E, D>(dk, dp, q + stage * kRowBytes, lane);
    }
  }

  // dK and dV over all rows of all heads of the group; see above for `careful`.
  __device__ __forceinline__ void add_rows(Sum& dk, Sum& dv, bool careful) {
    const Range range = row_range(p, x, opaque(key0), kKeys, kRows);
    const int first_head = kv_head * group();
    const int total = max(range.end - range.begin + kRows - 1, 0) / kRows * group();
    const auto advance = [&](Cursor& at) {
      at.row += kRows;
      if (at.row >= range.end) at = {at.head + 1, range.begin};
    };
    Cursor next{first_head, range.begin}, at = next;
    clear(dk);
    clear(dv);
#pragma unroll 1
    for (int i = 1 - kStages; i < total; ++i) {
      if (i >= 0) {
        wait_copies<kStages - 2>();
        __syncthreads();
      }
      if (i + kStages - 1 < total) {
        load_stage((i + kStages - 1) % kStages, next);
        advance(next);
      }
      commit_copies();
      if (i < 0) continue;
      if (careful) clean_rows(i % kStages);
      add_tile(dk, dv, i % kStages, at, range.partial(at.row));
      advance(at);
    }
    wait_copies<0>();
  }

  // Nobody else reads the warp's own rows of k and v.
  __device__ __forceinline__ void store(const Tensor& to, uint32_t tile, const Sum& sum, float scale, int64_t dims) {
    char* base = row_address(to, slot(p, x.b), kv_head, first_key(p, x.b));
    store_sum<E, D>(base, 2 * to.stride[2], key0 + warp_key, x.keys, dims, sum, scale, tile, warp_key, lane);
  }

  __device__ __forceinline__ void run() {
    if (!place()) return;
    load_tile<kKeys, D, kThreads>(k, key_rows(p.k, p.D), key0, thread);
    if (WANT_K) load_tile<kKeys, D, kThreads>(v, key_rows(p.v, p.DV), key0, thread);
    commit_copies();
    Sum dk, dv;  // what is not wanted costs nothing
    bool careful = false;
#pragma unroll 1
    while (true) {
      add_rows(dk, dv, careful);
      if (careful || !__syncthreads_or(spoiled(dk) || spoiled(dv))) break;
      careful = true;
    }
    // dK and dV may be wanted one without the other.
    if (WANT_K && p.dk.data) store(p.dk, k, dk, static_cast<float>(p.scale), p.D);
    if (WANT_V && p.dv.data) store(p.dv, v, dv, p.dropout_p > 0.0 ? keep_factor(p) : 1.0f, p.DV);
  }
};

}  // namespace fused_attention::cuda
