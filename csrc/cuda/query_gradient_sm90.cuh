// dQ for sm_90, one CTA per block of rows of a query head:
//
//   S = Q K^T;  P = exp(S - lse);  dP = dO V^T;  dS = P (dP - delta);  dQ += dS K
//
//   producer, one warp:         q and dout of the block; k and v of each tile of keys that its rows see
//   consumers, 64 rows each:    for each tile: dP runs in the tensor cores while P is taken from S; dQ, while the other
//                               consumer is at its P and dS
//
// dS, an accumulator, is the left operand of dQ from registers.
//
// Shared memory, in panels (hopper.cuh): q and dout [rows, D] for good; stages of k and v [keys, D]; mbarriers; a strip of
// floats per warp where there is a mask or bias.
//
// A hidden key may hold anything: where it spoils the sum, the sum is taken again with what is not finite as zeros.
#pragma once
#include "gradient_sm90.cuh"

namespace fused_attention::cuda {

template <class E, int D, bool OPTIONS>
struct HopperQueryGradient : HopperGradient {
  static constexpr Tile kTile = hopper_query_gradient_tile(D, OPTIONS);
  static constexpr int kRows = kTile.rows, kKeys = kTile.keys, kStages = kTile.stages;
  static constexpr int NT = kKeys / 8, DT = D / 8, kProducers = 1;
  static constexpr int kRowBytes = kRows * D * 2, kKeyBytes = kKeys * D * 2;
  static constexpr int kTiles = 2 * kRowBytes + 2 * kStages * kKeyBytes;
  using WarpStrip = Strip<false, 1, NT>;
  using State = PipelineState<kStages>;
  using Scores = float[1][NT][4];
  using Sum = float[1][DT][4];
  static_assert(kRows == 64 * 2);

  int head, kv_head, row0;
  Range range;  // tiles of keys
  RowGradient<2> row;
  float dlse[2];

  __device__ __forceinline__ HopperQueryGradient(const HopperGradientParams& all, char* shared)
      : HopperGradient(all, shared, kTiles) {}

  __device__ __forceinline__ uint32_t q() const { return shared_address(shared); }
  __device__ __forceinline__ uint32_t dout() const { return q() + kRowBytes; }
  __device__ __forceinline__ uint32_t k(int stage) const { return dout() + kRowBytes + stage * kKeyBytes; }
  __device__ __forceinline__ uint32_t v(int stage) const { return k(kStages + stage); }
  __device__ __forceinline__ float* strip() const {
    return reinterpret_cast<float*>(shared + kTiles + kHopperGradientBarrierBytes) +
           (4 * consumer + warp) * WarpStrip::kFloats;
  }
  __device__ __forceinline__ int own_row() const { return row0 + 64 * consumer + 16 * warp; }  // of this warp

  __device__ __forceinline__ bool place() {
    const int blocks = (static_cast<int>(p.M) + kRows - 1) / kRows;
    const Place at = find_place(p, p.row_ends, blocks, static_cast<int>(p.H), true);
    if (at.idle) return false;
    x = make_problem(p, at.b);
    head = at.head, kv_head = at.head / static_cast<int>(p.H / p.HK), row0 = at.block * kRows;
    range = visible(0, kRows);
    return true;
  }
  // Tiles of keys that `rows` rows of the block see.
  __device__ __forceinline__ Range visible(int first, int rows) const {
    first += opaque(row0);
    return key_range(p, x, first, min(first + rows, x.rows) - 1, kKeys);
  }

  // --- the producer --------------------------------------------------------------------------------------------------

  __device__ __forceinline__ void load_queries() {
    if (lane != 0) return;
    prefetch_map(all.k), prefetch_map(all.v);
    arrive_expecting(own_full(), 2 * kRowBytes);
    const int first = static_cast<int>(first_row(p, x.b)) + row0;
    load<kRows, D>(q(), all.q, p.q, first, head, own_full());
    load<kRows, D>(dout(), all.dout, p.dout, first, head, own_full());
  }
  __device__ __forceinline__ void load_keys(State& state) {
    const int first = static_cast<int>(first_key(p, x.b));
#pragma unroll 1
    for (int key = range.begin; key < range.end; key += kKeys, state.advance()) {
      const uint32_t ready = full(state.stage);
      wait(empty(state.stage), state.phase ^ 1);
      if (lane == 0) {
        arrive_expecting(ready, 2 * kKeyBytes);
        load<kKeys, D>(k(state.stage), all.k, p.k, first + key, kv_head, ready);
        load<kKeys, D>(v(state.stage), all.v, p.v, first + key, kv_head, ready);
      }
      __syncwarp();
    }
  }

  // --- the consumers -------------------------------------------------------------------------------------------------

  // lse and delta of the lane's two rows; dlse where it is not in delta.
  __device__ __forceinline__ void load_numbers() {
    const int64_t batch = slot(p, x.b), first = first_row(p, x.b);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int own = own_row() + (lane >> 2) + 8 * j, r = min(own, x.rows - 1);
      row.lse[j] = own == r ? usable_lse(*row_number(p.lse, batch, head, first + r)) : kInfinity;
      row.delta[j] = *row_number(p.delta, batch, head, first + r);
      dlse[j] = OPTIONS && p.dlse.data && few_keys(p) ? *row_number(p.dlse, batch, head, first + r) : 0.0f;
    }
  }

  __device__ __forceinline__ void start_scores(Scores& s, uint32_t rows, uint32_t keys) {
    products_begin();
    multiply<E, kKeys, D / 16>(s[0], along_columns<kRows>(rows, 64 * consumer), along_columns<kKeys>(keys), false);
    products_commit();
  }
  __device__ __forceinline__ void start_sum(Sum& dq, const uint32_t (&a)[NT / 2][4], uint32_t keys) {
    products_begin();
    multiply<E, D>(dq[0], a, along_rows<kKeys>(keys));
    products_commit();
  }

  // With care: numbers of a tile of keys that are not finite become 0, once all scores have been taken from it.
  __device__ __forceinline__ void clean_keys(uint32_t tile) {
    barrier_sync(kBoth, kConsumers);
#pragma unroll 1
    for (int at = 32 * (4 * consumer + warp) + lane; at < kKeys * DT; at += kConsumers) {
      const uint32_t place = tile + panel_offset<kKeys>(at / DT, at % DT);
      uint4 bits = load_shared(place);
      if (clean<E>(bits)) store_shared(place, bits);
    }
    fence_async();
    barrier_sync(kBoth, kConsumers);
  }

  // dQ over all keys. No product is under way where the loop turns: ptxas would let each wait for the one before.
  __device__ __forceinline__ void add_keys(Sum& dq, State& state, bool careful) {
    const Range own = visible(64 * consumer, 64);
    clear(dq);
#pragma unroll 1
    for (int key = range.begin; key < range.end; key += kKeys, state.advance()) {
      const int lane = opaque(this->lane), first = opaque(own_row());
      const RowMap map{x.rows, head, 0};
      const auto here = make_elements<false, 1, NT>(first, key, lane);
      Scores s, slope, dp;
      uint32_t gradients[NT / 2][4];
      wait(full(state.stage), state.phase);
      start_scores(s, q(), k(state.stage));
      start_scores(dp, dout(), v(state.stage));
      KeptElements kept{0};
      if constexpr (OPTIONS)
        if (p.dropout_p > 0.0) kept = draw_kept(dropout_state(p, x.b), map, here, lane);
      products_wait<1>();
      hold(s[0]);
      weigh<OPTIONS>(s, slope, row, map, here, first, key, own.partial(key), strip());
      products_wait<0>();
      hold(dp[0]);
      differentiate<OPTIONS, false>(dp, s, slope, row, kept, dlse);
      pack_fragment<E>(gradients, dp[0]);
      if (careful) clean_keys(k(state.stage));
      start_sum(dq, gradients, k(state.stage));
      products_wait<0>();
      hold(dq[0]);
      leave(empty(state.stage));
    }
  }

  __device__ __forceinline__ void store(const Sum& dq) {
    char* base = row_address(p.dq, slot(p, x.b), head, first_row(p, x.b));
    store_sum<E, D>(base, 2 * p.dq.stride[2], own_row(), x.rows, p.D, dq, static_cast<float>(p.scale), q(),
                    64 * consumer + 16 * warp, lane);
  }

  // --- all of it -----------------------------------------------------------------------------------------------------

  __device__ __forceinline__ bool again(bool spoiled) {
    return barrier_or(kEveryone, kConsumers + 32 * kProducers, spoiled);
  }
  __device__ __forceinline__ void produce() {
    if (warp >= kProducers) return;
    State state;
    if (range.begin < range.end) load_queries();
    load_keys(state);
    if (again(false)) load_keys(state);
  }
  __device__ __forceinline__ void consume() {
    State state;
    Sum dq;
    bool careful = false;
    load_numbers();
    if (range.begin < range.end) wait(own_full(), 0);
#pragma unroll 1
    while (true) {
      add_keys(dq, state, careful);
      if (careful || !again(spoiled(dq))) break;
      careful = true;
    }
    if (careful) barrier_sync(kBoth, kConsumers);
    store(dq);  // all have read q, whose place it may take
  }

  __device__ __forceinline__ void run() {
    if (!place()) return;
    init<kStages>(kProducers);
    if (consumer < 0) {
      give_registers<24>();
      produce();
    } else {
      take_registers<240>();
      consume();
    }
  }
};

}  // namespace fused_attention::cuda
