// dK and dV for sm_90, one CTA per block of keys of a key head, over all rows of all query heads that read it:
//
//   S^T = K Q^T;  P^T = exp(S^T - lse);  dV += drop(P^T) dO;  dP^T = V dO^T;  dS^T = P^T (dP^T - delta);  dK += dS^T Q
//
//   producer, two warps:        q and dout of each tile of rows by tensor copies; lse and delta of its rows
//   consumers, 64 keys each:    S^T of the first tile
//     for each tile:            dP^T runs in the tensor cores while P^T is taken from S^T, then
//                               dV while dS^T is taken from dP^T, then dK and S^T of the next tile
//
// Tiles lie transposed, so that P^T and dS^T, accumulators, are the left operands of what follows, from registers.
//
// Shared memory, in panels (hopper.cuh): k and v [keys, D] for good; stages of q and dout [rows, D]; mbarriers; lse, in
// powers of two, and delta [stages][2][rows]; a strip of floats per warp where there is a mask or bias. Where dK and dV do
// not fit into the registers together, a launch for each.
//
// A row that sees nothing may hold anything: where it spoils a sum, the sum is taken again with such rows as zeros.
#pragma once
#include "gradient_sm90.cuh"

namespace fused_attention::cuda {

template <class E, int D, bool OPTIONS, bool WANT_K, bool WANT_V>
struct HopperKeyGradient : HopperGradient {
  static constexpr Tile kTile = hopper_key_gradient_tile(D, OPTIONS);
  static constexpr int kRows = kTile.rows, kKeys = kTile.keys, kStages = kTile.stages;
  static constexpr int NT = kRows / 8, DT = D / 8, kSlots = 2 * NT, kProducers = 2;
  static constexpr int kKeyBytes = kKeys * D * 2, kRowBytes = kRows * D * 2;
  static constexpr int kTiles = 2 * kKeyBytes + 2 * kStages * kRowBytes;
  using WarpStrip = Strip<true, 1, NT>;
  using State = PipelineState<kStages>;
  using Scores = float[1][NT][4];
  using Sum = float[1][DT][4];
  using Weights = uint32_t[NT / 2][4];
  // Whether there are registers for dP^T while P^T is taken.
  static constexpr bool kEarly = !OPTIONS;
  static_assert(kKeys == 64 * 2 && kRows % 32 == 0);

  int kv_head, key0;
  Range range;  // tiles of rows
  int total;    // of all heads of the group

  // A stage's place in the loop over heads of the group and tiles of rows.
  struct Cursor {
    int head, row;
  };

  __device__ __forceinline__ HopperKeyGradient(const HopperGradientParams& all, char* shared)
      : HopperGradient(all, shared, kTiles) {}

  __device__ __forceinline__ uint32_t k() const { return shared_address(shared); }
  __device__ __forceinline__ uint32_t v() const { return k() + kKeyBytes; }
  __device__ __forceinline__ uint32_t q(int stage) const { return v() + kKeyBytes + stage * kRowBytes; }
  __device__ __forceinline__ uint32_t dout(int stage) const { return q(kStages + stage); }
  __device__ __forceinline__ float* numbers(int stage) const {
    return reinterpret_cast<float*>(shared + kTiles + kHopperGradientBarrierBytes) + stage * 2 * kRows;
  }
  __device__ __forceinline__ float* strip() const {
    return numbers(kStages) + (4 * consumer + warp) * WarpStrip::kFloats;
  }
  __device__ __forceinline__ int own_key() const { return key0 + 64 * consumer + 16 * warp; }  // of this warp

  __device__ __forceinline__ bool place() {
    const int blocks = (static_cast<int>(p.N) + kKeys - 1) / kKeys;
    const Place at = find_place(p, p.key_ends, blocks, static_cast<int>(p.HK), false);
    if (at.idle) return false;
    x = make_problem(p, at.b);
    kv_head = at.head, key0 = at.block * kKeys;
    range = row_range(p, x, key0, kKeys, kRows);
    total = max(range.end - range.begin + kRows - 1, 0) / kRows * group();
    return true;
  }
  __device__ __forceinline__ int group() const { return static_cast<int>(p.H / p.HK); }
  __device__ __forceinline__ Cursor first_tile() const { return {kv_head * group(), range.begin}; }
  __device__ __forceinline__ void advance(Cursor& at) const {
    at.row += kRows;
    if (at.row >= range.end) at = {at.head + 1, range.begin};
  }

  // --- the producers -------------------------------------------------------------------------------------------------

  __device__ __forceinline__ void load_keys() {
    if (lane != 0) return;
    prefetch_map(all.q), prefetch_map(all.dout);
    arrive_expecting(own_full(), (WANT_K ? 2 : 1) * kKeyBytes);
    const int first = static_cast<int>(first_key(p, x.b)) + key0;
    load<kKeys, D>(k(), all.k, p.k, first, kv_head, own_full());
    if (WANT_K) load<kKeys, D>(v(), all.v, p.v, first, kv_head, own_full());
  }
  __device__ __forceinline__ void load_rows(State& state) {
    const int first = static_cast<int>(first_row(p, x.b));
    Cursor at = first_tile();
#pragma unroll 1
    for (int i = 0; i < total; ++i, advance(at), state.advance()) {
      const uint32_t ready = full(state.stage);
      wait(empty(state.stage), state.phase ^ 1);
      if (lane == 0) {
        arrive_expecting(ready, 2 * kRowBytes);
        load<kRows, D>(q(state.stage), all.q, p.q, first + at.row, at.head, ready);
        load<kRows, D>(dout(state.stage), all.dout, p.dout, first + at.row, at.head, ready);
      }
      __syncwarp();
    }
  }
  __device__ __forceinline__ void load_numbers(State& state) {
    constexpr int kEach = kRows / 32;
    const int64_t batch = slot(p, x.b), first = first_row(p, x.b);
    Cursor at = first_tile();
#pragma unroll 1
    for (int i = 0; i < total; ++i, advance(at), state.advance()) {
      float lse[kEach], delta[kEach];
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int row = at.row + 32 * j + lane;
        const int64_t own = first + min(row, x.rows - 1);
        lse[j] = row < x.rows ? usable_lse(*row_number(p.lse, batch, at.head, own)) : kInfinity;
        delta[j] = *row_number(p.delta, batch, at.head, own);
      }
      wait(empty(state.stage), state.phase ^ 1);
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        numbers(state.stage)[32 * j + lane] = lse[j];
        numbers(state.stage)[kRows + 32 * j + lane] = delta[j];
      }
      leave(full(state.stage));
    }
  }

  // --- the consumers -------------------------------------------------------------------------------------------------

  __device__ __forceinline__ void start_scores(Scores& s, int stage) {
    products_begin();
    multiply<E, kRows, D / 16>(s[0], along_columns<kKeys>(k(), 64 * consumer), along_columns<kRows>(q(stage)), false);
    products_commit();
  }
  __device__ __forceinline__ void start_weight_gradients(Scores& dp, int stage) {
    products_begin();
    multiply<E, kRows, D / 16>(dp[0], along_columns<kKeys>(v(), 64 * consumer), along_columns<kRows>(dout(stage)),
                               false);
    products_commit();
  }
  __device__ __forceinline__ void start_sum(Sum& sum, const Weights& a, uint32_t tile) {
    products_begin();
    multiply<E, D>(sum[0], a, along_rows<kRows>(tile));
    products_commit();
  }

  // Of the lane's rows: which = 0, lse; 1, delta.
  __device__ __forceinline__ void read_numbers(float (&to)[kSlots], int stage, int which) const {
    const float* from = numbers(stage) + which * kRows + 2 * (lane & 3);
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      const float2 two = *reinterpret_cast<const float2*>(from + 8 * nt);
      to[2 * nt] = two.x, to[2 * nt + 1] = two.y;
    }
  }
  __device__ __forceinline__ KeptElements draw(const Cursor& at) {
    if constexpr (OPTIONS)
      if (p.dropout_p > 0.0) {
        const int lane = opaque(this->lane);
        return draw_kept(dropout_state(p, x.b), {x.rows, at.head, 0},
                         make_elements<true, 1, NT>(at.row, own_key(), lane), lane);
      }
    return {0};
  }
  // s becomes P^T, and `weights` what is multiplied with dout.
  __device__ __forceinline__ void take_weights(Scores& s, Scores& slope, Weights& weights, const KeptElements& kept,
                                               const Cursor& at, int stage, bool partial) {
    const RowMap map{x.rows, at.head, 0};
    const int row = opaque(at.row), key = opaque(own_key());
    RowGradient<kSlots> own;
    read_numbers(own.lse, stage, 0);
    weigh<OPTIONS>(s, slope, own, map, make_elements<true, 1, NT>(row, key, opaque(lane)), row, key, partial, strip());
    if constexpr (WANT_V) {
      if (OPTIONS && p.dropout_p > 0.0) {
        Scores rest;
#pragma unroll
        for (int e = 0; e < NT * 4; ++e) rest[0][e / 4][e % 4] = kept.at(e) ? s[0][e / 4][e % 4] : 0.0f;
        pack_fragment<E>(weights, rest[0]);
      } else {
        pack_fragment<E>(weights, s[0]);
      }
    }
  }
  // dp becomes dS^T, and `weights` what is multiplied with q.
  __device__ __forceinline__ void take_gradients(Scores& dp, const Scores& s, const Scores& slope, Weights& weights,
                                                 const KeptElements& kept, const Cursor& at, int stage) {
    RowGradient<kSlots> own;
    float dlse[kSlots];
    read_numbers(own.delta, stage, 1);
    if (OPTIONS && few_keys(p)) {
#pragma unroll
      for (int j = 0; j < kSlots; ++j) {
        const int row = min(at.row + 2 * (lane & 3) + Elements<true, 1, NT>::slot_row(j), x.rows - 1);
        dlse[j] = p.dlse.data ? *row_number(p.dlse, slot(p, x.b), at.head, first_row(p, x.b) + row) : 0.0f;
      }
    }
    differentiate<OPTIONS, true>(dp, s, slope, own, kept, dlse);
    pack_fragment<E>(weights, dp[0]);
  }

  // With care: rows of a stage that see nothing become zeros.
  __device__ __forceinline__ void clean_rows(int stage) {
    const float* lse = numbers(stage);
#pragma unroll 1
    for (int at = 32 * (4 * consumer + warp) + lane; at < kRows * DT; at += kConsumers) {
      if (lse[at / DT] != kInfinity) continue;
      const uint32_t offset = panel_offset<kRows>(at / DT, at % DT);
      store_shared(q(stage) + offset, make_uint4(0, 0, 0, 0));
      store_shared(dout(stage) + offset, make_uint4(0, 0, 0, 0));
    }
    fence_async();
    barrier_sync(kBoth, kConsumers);
  }

  // dK and dV over all rows of all heads of the group. No product is under way where the loop turns: ptxas would let each
  // wait for the one before.
  __device__ __forceinline__ void add_rows(Sum& dk, Sum& dv, State& state, bool careful) {
    const Range own = row_range(p, x, opaque(key0) + 64 * consumer, 64, kRows);
    Cursor at = first_tile();
    clear(dk);
    clear(dv);
#pragma unroll 1
    for (int i = 0; i < total; ++i, advance(at), state.advance()) {
      Scores s, slope, dp;
      Weights weights, gradients;
      wait(full(state.stage), state.phase);
      if (careful) clean_rows(state.stage);
      start_scores(s, state.stage);
      if constexpr (WANT_K && kEarly) start_weight_gradients(dp, state.stage);
      const KeptElements kept = draw(at);
      products_wait<WANT_K && kEarly>();
      hold(s[0]);
      take_weights(s, slope, weights, kept, at, state.stage, own.partial(at.row));
      if constexpr (WANT_K && !kEarly) start_weight_gradients(dp, state.stage);
      if constexpr (WANT_V) start_sum(dv, weights, dout(state.stage));
      if constexpr (WANT_K) {
        products_wait<WANT_V>();
        hold(dp[0]);
        take_gradients(dp, s, slope, gradients, kept, at, state.stage);
        start_sum(dk, gradients, q(state.stage));
      }
      products_wait<0>();
      if constexpr (WANT_V) hold(dv[0]);
      if constexpr (WANT_K) hold(dk[0]);
      leave(empty(state.stage));
    }
  }

  __device__ __forceinline__ void store(const Tensor& to, uint32_t tile, const Sum& sum, float scale, int64_t dims) {
    char* base = row_address(to, slot(p, x.b), kv_head, first_key(p, x.b));
    store_sum<E, D>(base, 2 * to.stride[2], own_key(), x.keys, dims, sum, scale, tile, 64 * consumer + 16 * warp, lane);
  }

  // --- all of it -----------------------------------------------------------------------------------------------------

  __device__ __forceinline__ bool again(bool spoiled) {
    return barrier_or(kEveryone, kConsumers + 32 * kProducers, spoiled);
  }
  __device__ __forceinline__ void produce() {
    if (warp >= kProducers) return;
    State state;
    if (warp == 0 && total) load_keys();
    for (int careful = 0; careful < 2; ++careful) {
      if (warp == 0)
        load_rows(state);
      else
        load_numbers(state);
      if (!careful && !again(false)) return;
    }
  }
  __device__ __forceinline__ void consume() {
    State state;
    Sum dk, dv;  // what is not wanted costs nothing
    bool careful = false;
    if (total) wait(own_full(), 0);
#pragma unroll 1
    while (true) {
      add_rows(dk, dv, state, careful);
      if (careful || !again((WANT_K && spoiled(dk)) || (WANT_V && spoiled(dv)))) break;
      careful = true;
    }
    if (careful) barrier_sync(kBoth, kConsumers);
    // All have read k and v, whose place the sums may take. dK and dV may be wanted one without the other.
    if (WANT_K && p.dk.data) store(p.dk, k(), dk, static_cast<float>(p.scale), p.D);
    if (WANT_V && p.dv.data) store(p.dv, v(), dv, OPTIONS && p.dropout_p > 0.0 ? keep_factor(p) : 1.0f, p.DV);
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
