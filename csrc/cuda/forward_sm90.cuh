// Forward pass for sm_90: out = softmax(scores) V by the online softmax; CTAs that stay take one block of rows after the
// other (schedule.cuh).
//
//   producer, one warp:            q of the block; k and v of each tile of keys that its rows see
//   consumers, two warpgroups:     S = Q K^T
//     for each further tile:       S' = Q K'^T and O += drop(P) V run in the tensor cores,
//                                  as soon as S' is there:  finish_scores, weigh (softmax.cuh), while O += P V goes on
//     at the end:                  O += drop(P) V, store_rows (forward_block.cuh)
//
// The consumers start their products in turn: while one warpgroup weighs its scores, the other has the tensor cores.
//
// Shared memory, in panels (hopper.cuh): q [2][64, D], one tile per consumer; k, v [stages][keys, D]; out, staged as rows
// of D (tile.cuh) where q was or beside it; mbarriers; bits of spoiled blocks, flags of spoiled keys; a strip of floats per
// warp where there is a mask or bias. A warp owns 16 rows: its part of S, P and O stays in registers, as C fragments.
//
// Spoiled blocks (forward_block.cuh) are remembered by round and taken again at the end, by the same roles.
#pragma once
#include "forward_block.cuh"
#include "hopper.cuh"
#include "hopper_params.h"
#include "tiles.h"

namespace fused_attention::cuda {

template <class E, int D, bool OPTIONS>
struct HopperForward : Block {
  static constexpr HopperTile kTile = hopper_tile(D, OPTIONS);
  static constexpr int kRows = kTile.rows, kKeys = kTile.keys, kStages = kTile.stages;
  static constexpr int kConsumers = 32 * kHopperConsumers, NT = kKeys / 8, DT = D / 8;
  static constexpr int kQuery = kRows * D * 2, kStage = kKeys * D * 2, kTiles = hopper_tiles(D, OPTIONS);  // bytes
  static constexpr int kMemory = 32 * kHopperFlags;  // rounds that are remembered apart
  using WarpStrip = Strip<false, 1, NT>;
  using State = PipelineState<kStages>;
  // Named barriers: the turn of consumer 0 and 1, what each of them has for itself, both, everyone at work.
  enum { kTurn = 1, kOwn = 3, kBoth = 5, kEveryone = 6 };
  static_assert((2 + 4 * kStages) * 8 <= kHopperBarrierBytes && kKeys / 32 <= kFlagBytes / 4);

  const HopperParams& all;
  const AttentionParams& p;
  int lane, warp, consumer;  // warp: of its warpgroup; consumer: 0 or 1, -1 the producer
  char* shared;

  __device__ __forceinline__ HopperForward(const HopperParams& all, char* shared) : all(all), p(all.p), shared(shared) {
    const int thread = static_cast<int>(threadIdx.x), warps = same_for_warp(thread >> 5);
    lane = thread & 31, warp = warps & 3, consumer = warps / 4 - 1;
  }

  // It comes from one lane, so that ptxas knows and can keep it in a register of the warp.
  static __device__ __forceinline__ int same_for_warp(int x) { return __shfl_sync(0xffffffffu, x, 0); }

  // Places in shared memory; those of a consumer are its own.
  __device__ __forceinline__ uint32_t q() const { return shared_address(shared); }
  __device__ __forceinline__ uint32_t k(int stage) const { return q() + kQuery + stage * kStage; }
  __device__ __forceinline__ uint32_t v(int stage) const { return k(kStages + stage); }
  __device__ __forceinline__ uint32_t out() const {
    return (kTile.own_out ? v(kStages) : q()) + consumer * (kQuery / 2);
  }
  __device__ __forceinline__ uint32_t* spoiled_rounds() const {
    return reinterpret_cast<uint32_t*>(shared + kTiles + kHopperBarrierBytes);
  }
  __device__ __forceinline__ uint32_t* flags() const { return spoiled_rounds() + kHopperFlags; }
  __device__ __forceinline__ float* strip() const {
    return reinterpret_cast<float*>(flags() + kFlagBytes / 4) + (4 * consumer + warp) * WarpStrip::kFloats;
  }
  __device__ __forceinline__ uint32_t own_q() const { return q() + consumer * (kQuery / 2); }
  __device__ __forceinline__ uint32_t q_full() const { return q() + kTiles; }
  __device__ __forceinline__ uint32_t q_empty() const { return q_full() + 8; }
  __device__ __forceinline__ uint32_t k_full(int stage) const { return q_full() + 16 + 8 * stage; }
  __device__ __forceinline__ uint32_t k_empty(int stage) const { return k_full(stage + kStages); }
  __device__ __forceinline__ uint32_t v_full(int stage) const { return k_full(stage + 2 * kStages); }
  __device__ __forceinline__ uint32_t v_empty(int stage) const { return k_full(stage + 3 * kStages); }

  __device__ __forceinline__ void init() {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < kHopperFlags) spoiled_rounds()[thread] = 0;
    if (thread == 0) {
      mbarrier_init(q_full(), 1), mbarrier_init(q_empty(), kHopperConsumers);
      for (int i = 0; i < kStages; ++i) {
        mbarrier_init(k_full(i), 1), mbarrier_init(k_empty(i), kHopperConsumers);
        mbarrier_init(v_full(i), 1), mbarrier_init(v_empty(i), kHopperConsumers);
      }
      fence_init();
    }
    __syncthreads();
  }

  // False if there is nothing to do in this round.
  __device__ __forceinline__ bool place(int round) {
    const int i = block_of_round(round);
    if (i >= all.blocks) return false;
    const int blocks = count(p, kRows), heads = Block::heads(p, kRows);
    const Place at = p.row_ends ? find_place(p, p.row_ends, blocks, heads, true, i)
                                : find_place_in_sections(p, blocks, heads, all.section, i);
    if (at.idle) return false;
    set(p, at, kRows);
    for (int* number :
         {&x.b, &x.rows, &x.keys, &x.seen, &x.diagonal, &map.count, &map.head, &map.packed, &row0, &kv_head})
      *number = same_for_warp(*number);
    return true;
  }
  // f(range) for each block of this CTA; again: for those alone that are to be taken again.
  template <class F>
  __device__ __forceinline__ void each_block(bool again, const F& f) {
#pragma unroll 1
    for (int round = 0; round * static_cast<int64_t>(gridDim.x) < all.blocks; ++round) {
      const int bit = round % kMemory;
      if (again && !(spoiled_rounds()[bit / 32] >> (bit % 32) & 1)) continue;
      if (!place(round)) continue;
      Range range = visible(p, kRows, kKeys);
      for (int* number : {&range.begin, &range.full_begin, &range.full_end, &range.end})
        *number = same_for_warp(*number);
      f(range, round);
    }
  }

  // --- the producer --------------------------------------------------------------------------------------------------

  __device__ __forceinline__ void load_queries() {
    arrive_expecting(q_full(), kQuery);
    const int row = static_cast<int>(first_row(p, x.b)) + row0;
    const int head = p.q.stride[1] ? map.head : 0, batch = p.q.stride[0] ? x.b : 0;
    load_tile<64, D>(q(), all.q, row, head, batch, q_full());
    load_tile<64, D>(q() + kQuery / 2, all.q, row + 64, head, batch, q_full());
  }
  // row: in the tensor.
  __device__ __forceinline__ void load_keys(uint32_t to, const TensorMap& tensor, const Tensor& t, int row,
                                            uint32_t full, uint32_t empty, uint32_t phase) {
    wait(empty, phase ^ 1);
    if (lane != 0) return;
    arrive_expecting(full, kStage);
    load_tile<kKeys, D>(to, tensor, row, t.stride[1] ? kv_head : 0, t.stride[0] ? x.b : 0, full);
  }

  __device__ __forceinline__ void produce() {
    if (lane == 0) prefetch_map(all.q), prefetch_map(all.k), prefetch_map(all.v);
    State at;
    uint32_t q_phase = 0;
#pragma unroll 1
    for (int again = 0; again < 2; ++again) {
      each_block(again, [&](const Range& range, int) {
        if (range.begin >= range.end) return;
        if (!map.packed) {
          wait(q_empty(), q_phase ^ 1);
          q_phase ^= 1;
          if (lane == 0) load_queries();
        }
        const int first = static_cast<int>(first_key(p, x.b));
#pragma unroll 1
        for (int key = range.begin; key < range.end; key += kKeys, at.advance()) {
          load_keys(k(at.stage), all.k, p.k, first + key, k_full(at.stage), k_empty(at.stage), at.phase);
          load_keys(v(at.stage), all.v, p.v, first + key, v_full(at.stage), v_empty(at.stage), at.phase);
        }
        __syncwarp();
      });
      if (!again) barrier_sync(kEveryone, kConsumers + 32);
    }
  }

  // --- the consumers -------------------------------------------------------------------------------------------------

  using Scores = float[1][NT][4];
  using Out = float[1][DT][4];

  // Queries of several heads do not follow each other in the tensor: each consumer copies its rows.
  __device__ __forceinline__ void gather_queries() {
    const char* base = row_address(p.q, slot(p, x.b), 0, first_row(p, x.b));
    if (!kTile.own_out) barrier_sync(kOwn + consumer, kWarpgroup);  // the block before has left for global memory
#pragma unroll 1
    for (int r = 4 * warp + (lane >> 3); r < 64; r += 16) {
      const int own = row0 + 64 * consumer + r, last = map.clamp(own);
      const char* row = base + 2 * (map.head_of(last) * p.q.stride[1] + map.query(last) * p.q.stride[2]);
#pragma unroll
      for (int i = 0; i < DT / 8; ++i) {
        const int chunk = 8 * i + (lane & 7), dims = min(static_cast<int>(p.D) - 8 * chunk, 8);
        const int bytes = own == last && dims > 0 ? 2 * dims : 0;
        copy_async(own_q() + panel_offset<64>(r, chunk), bytes ? row + 16 * chunk : base, bytes);
      }
    }
    commit_copies();
    wait_copies<0>();
    fence_async();
    barrier_sync(kOwn + consumer, kWarpgroup);
  }
  __device__ __forceinline__ void await_queries(uint32_t& phase) {
    if (map.packed) return gather_queries();
    wait(q_full(), phase);
    phase ^= 1;
  }

  // This warp has read what the barrier guards.
  __device__ __forceinline__ void leave(uint32_t empty) {
    if (lane == 0) arrive(empty);
  }
  __device__ __forceinline__ void start_scores(Scores& s, int stage) {
    products_begin();
    multiply<E, kKeys, D / 16>(s[0], along_columns<64>(own_q()), along_columns<kKeys>(k(stage)), false);
    products_commit();
  }
  __device__ __forceinline__ void start_sum(Out& acc, const uint32_t (&weights)[NT / 2][4], int stage) {
    products_begin();
    multiply<E, D>(acc[0], weights, along_rows<kKeys>(v(stage)));
    products_commit();
  }

  // Products become scores. row: of this warp.
  template <int PART>
  __device__ __forceinline__ void finish(float (&s)[1][PART][4], bool partial, int row, int key) {
    row = opaque(row);
    const int lane = opaque(this->lane);
    const auto here = make_elements<false, 1, PART>(row, key, lane);
    if constexpr (OPTIONS) finish_scores<false>(s, s, p, x, map, here, row, key, strip(), lane);
    if (partial) hide(s, p, x, map, here);
  }
  template <int PART>
  __device__ __forceinline__ KeptElements draw(int row, int key) {
    if constexpr (OPTIONS)
      if (p.dropout_p > 0.0) {
        const int lane = opaque(this->lane);
        return draw_kept(dropout_state(p, x.b), map, make_elements<false, 1, PART>(opaque(row), key, lane), lane);
      }
    return {0};
  }
  // Weights as they are multiplied with v.
  template <int PART>
  __device__ __forceinline__ void pack(uint32_t (&weights)[PART / 2][4], float (&s)[1][PART][4],
                                       const KeptElements& kept) {
    if (OPTIONS && p.dropout_p > 0.0) drop(s, kept);
    pack_fragment<E>(weights, s[0]);
  }

  // O and the state of its rows, over all keys. k runs one tile ahead of v.
  __device__ __forceinline__ void attend(Out& acc, RowState<1>& state, const Range& range, int row, State& at) {
    const float factor = exponent_factor(p);
    Scores s;
    uint32_t weights[NT / 2][4];
    wait(k_full(at.stage), at.phase);
    start_scores(s, at.stage);
    KeptElements kept = draw<NT>(row, range.begin);
    products_wait<0>();
    hold(s[0]);
    leave(k_empty(at.stage));
    finish(s, range.partial(range.begin), row, range.begin);
    weigh_row(s, state, 0, 0, factor), weigh_row(s, state, 0, 1, factor);
    pack(weights, s, kept);
#pragma unroll 1
    for (int key = range.begin + kKeys; key < range.end; key += kKeys) {
      State next = at;
      next.advance();
      wait(k_full(next.stage), next.phase);
      barrier_sync(kTurn + consumer, kConsumers);
      start_scores(s, next.stage);
      wait(v_full(at.stage), at.phase);
      start_sum(acc, weights, at.stage);
      barrier_arrive(kTurn + (consumer ^ 1), kConsumers);
      kept = draw<NT>(row, key);
      products_wait<1>();
      hold(s[0]);
      leave(k_empty(next.stage));
      finish(s, range.partial(key), row, key);
      const float fade[2] = {weigh_row(s, state, 0, 0, factor), weigh_row(s, state, 0, 1, factor)};
      keep_before(state.total[0] + state.total[1]);
      products_wait<0>();
      hold(acc[0]);
      leave(v_empty(at.stage));
      shrink_row(acc, 0, 0, fade[0]), shrink_row(acc, 0, 1, fade[1]);
      pack(weights, s, kept);
      at = next;
    }
    wait(v_full(at.stage), at.phase);
    start_sum(acc, weights, at.stage);
    products_wait<0>();
    hold(acc[0]);
    leave(v_empty(at.stage));
    at.advance();
  }

  // The same with care: v is cleaned before it is multiplied, and there is one product after the other, of few keys each.
  __device__ __forceinline__ void attend_carefully(Out& acc, RowState<1>& state, const Range& range, int row,
                                                   State& at) {
    constexpr int kPart = D > 128 ? 16 : 32;
#pragma unroll 1
    for (int key = range.begin; key < range.end; key += kKeys, at.advance()) {
      const int thread = opaque(consumer * kWarpgroup + warp * 32 + lane);
      const uint32_t keys = k(at.stage), values = v(at.stage);
      if (thread < kKeys / 32) flags()[thread] = 0;
      wait(k_full(at.stage), at.phase);
      wait(v_full(at.stage), at.phase);
      barrier_sync(kBoth, kConsumers);
      clean_values<E, kKeys, D, kConsumers>(
          flags(), thread, [=](int row, int chunk) { return values + panel_offset<kKeys>(row, chunk); });
      fence_async();
      barrier_sync(kBoth, kConsumers);
#pragma unroll 1
      for (int part = 0; part < kKeys; part += kPart) {
        float s[1][kPart / 8][4];
        uint32_t weights[kPart / 16][4];
        products_begin();
        multiply<E, kPart, D / 16>(s[0], along_columns<64>(own_q()), along_columns<kKeys>(keys, part), false);
        products_commit();
        const KeptElements kept = draw<kPart / 8>(row, key + part);
        products_wait<0>();
        hold(s[0]);
        finish(s, true, row, key + part);
        const uint64_t hidden = hidden_elements(s);
        online_softmax(s, state, acc, exponent_factor(p));
        pack(weights, s, kept);
        products_begin();
        multiply<E, D>(acc[0], weights, along_rows<kKeys>(values + part * kPanelRowBytes));
        products_commit();
        products_wait<0>();
        hold(acc[0]);
        const Rows source = key_rows(p, p.v, x.seen, p.DV);
        add_flagged<E>(acc, s, hidden, flags(), source, key, part, lane);
      }
      leave(k_empty(at.stage));
      leave(v_empty(at.stage));
      barrier_sync(kBoth, kConsumers);  // all have read the flags
    }
  }

  __device__ __forceinline__ void finish_block(const Out& acc, const RowState<1>& state, int row) {
    barrier_sync(kOwn + consumer, kWarpgroup);  // the warpgroup has read q, whose place out may take
    store_rows<E, D, OPTIONS>(p, *this, acc, state, row, out(), 16 * warp, opaque(lane));
  }

  __device__ __forceinline__ void consume() {
    State at;
    uint32_t q_phase = 0;
    if (consumer == 1) barrier_arrive(kTurn, kConsumers);  // the first turn is that of consumer 0
#pragma unroll 1
    for (int again = 0; again < 2; ++again) {
      each_block(again, [&](const Range& range, int round) {
        const int row = row0 + 64 * consumer + 16 * warp;
        Out acc;
        RowState<1> state;
        clear(acc);
        state.clear();
        const bool any = range.begin < range.end;
        if (any) {
          await_queries(q_phase);
          if (again)
            attend_carefully(acc, state, range, row, at);
          else
            attend(acc, state, range, row, at);
          if (kTile.own_out && !map.packed) leave(q_empty());
          if (!again && __any_sync(0xffffffffu, spoiled(acc)) && lane == 0)
            atomicOr(&spoiled_rounds()[round % kMemory / 32], 1u << (round % 32));
        }
        finish_block(acc, state, row);
        if (any && !kTile.own_out && !map.packed) {
          fence_async();
          __syncwarp();
          leave(q_empty());
        }
      });
      if (!again) barrier_sync(kEveryone, kConsumers + 32);
    }
  }

  __device__ __forceinline__ void run() {
    init();
    if (consumer < 0) {
      give_registers<40>();
      if (warp == 0) produce();
    } else {
      take_registers<232>();
      consume();
    }
  }
};

}  // namespace fused_attention::cuda
