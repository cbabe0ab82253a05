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
// OPERANDS: what the products are made of, 16-bit numbers (operands_sm90.cuh) or codes of 8 bits (fp8_operands.cuh).
//
// Spoiled blocks (forward_block.cuh) are remembered by round and taken again at the end, by the same roles.
#pragma once
#include "operands_sm90.cuh"

namespace fused_attention::cuda {

template <class OPERANDS>
struct HopperForward : Block {
  using E = typename OPERANDS::Element;
  using Params = typename OPERANDS::Params;
  using Scales = typename OPERANDS::Scales;
  static constexpr int D = OPERANDS::kDim;
  static constexpr bool OPTIONS = OPERANDS::kOptions;
  static constexpr HopperTile kTile = OPERANDS::kTile;
  static constexpr int kRows = kTile.rows, kKeys = kTile.keys, kStages = kTile.stages;
  static constexpr int kConsumers = 32 * kHopperConsumers, NT = kKeys / 8, DT = D / 8;
  static constexpr int kBytes = OPERANDS::kBytes, kPanelBytes = OPERANDS::kPanelBytes;
  static constexpr int kQuery = kRows * D * kBytes, kStage = kKeys * D * kBytes;  // bytes
  static constexpr int kTiles = hopper_tiles(D, kTile, kBytes);
  static constexpr int kMemory = 32 * kHopperFlags;  // rounds that are remembered apart
  using WarpStrip = Strip<false, 1, NT>;
  using State = PipelineState<kStages>;
  // Named barriers: the turn of consumer 0 and 1, what each of them has for itself, both, everyone at work.
  enum { kTurn = 1, kOwn = 3, kBoth = 5, kEveryone = 6 };
  static_assert((2 + 4 * kStages) * 8 <= kHopperBarrierBytes && kKeys / 32 <= kFlagBytes / 4);

  const Params& params;
  const HopperParams& all;
  const AttentionParams& p;
  int lane, warp, consumer;  // warp: of its warpgroup; consumer: 0 or 1, -1 the producer
  char* shared;

  __device__ __forceinline__ HopperForward(const Params& params, char* shared)
      : params(params), all(OPERANDS::hopper(params)), p(all.p), shared(shared) {
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
    return (kTile.own_out ? v(kStages) : q()) + consumer * (64 * D * 2);
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
    OPERANDS::load_queries(q(), params, *this, row, q_full());
    OPERANDS::load_queries(q() + kQuery / 2, params, *this, row + 64, q_full());
  }
  // Whether this thread is to start copies into a stage, once it is empty.
  __device__ __forceinline__ bool begin_stage(uint32_t full, uint32_t empty, uint32_t phase) {
    wait(empty, phase ^ 1);
    if (lane == 0) arrive_expecting(full, kStage);
    return lane == 0;
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
        const int first = static_cast<int>(first_key(p, x.b)), first_value = OPERANDS::first_value(params, *this);
#pragma unroll 1
        for (int key = range.begin; key < range.end; key += kKeys, at.advance()) {
          if (begin_stage(k_full(at.stage), k_empty(at.stage), at.phase))
            OPERANDS::load_keys(k(at.stage), params, *this, first, key, k_full(at.stage));
          if (begin_stage(v_full(at.stage), v_empty(at.stage), at.phase))
            OPERANDS::load_values(v(at.stage), params, *this, first_value, key, v_full(at.stage));
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
    constexpr int kChunks = D * kBytes / 16, kNumbers = 16 / kBytes;
    const Tensor& t = OPERANDS::queries(params);
    const char* base =
        static_cast<const char*>(t.data) + kBytes * (slot(p, x.b) * t.stride[0] + first_row(p, x.b) * t.stride[2]);
    if (!kTile.own_out) barrier_sync(kOwn + consumer, kWarpgroup);  // the block before has left for global memory
#pragma unroll 1
    for (int r = 4 * warp + (lane >> 3); r < 64; r += 16) {
      const int own = row0 + 64 * consumer + r, last = map.clamp(own);
      const char* row = base + kBytes * (map.head_of(last) * t.stride[1] + map.query(last) * t.stride[2]);
#pragma unroll
      for (int i = 0; i < (kChunks + 7) / 8; ++i) {
        const int chunk = 8 * i + (lane & 7), dims = min(static_cast<int>(p.D) - kNumbers * chunk, kNumbers);
        if (kChunks % 8 != 0 && chunk >= kChunks) break;
        const int bytes = own == last && dims > 0 ? kBytes * dims : 0;
        copy_async(own_q() + panel_offset<64, kPanelBytes>(r, chunk), bytes ? row + 16 * chunk : base, bytes);
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
  // Of the rows of k from `part` on.
  template <int PART>
  __device__ __forceinline__ void start_scores(float (&s)[1][PART][4], uint32_t keys, int part = 0) {
    products_begin();
    multiply<typename OPERANDS::Operand, 8 * PART, D * kBytes / 32>(
        s[0], along_columns<64, kPanelBytes>(own_q()), along_columns<kKeys, kPanelBytes>(keys, part), false);
    products_commit();
  }
  template <int STEPS>
  __device__ __forceinline__ void start_sum(Out& acc, const uint32_t (&weights)[STEPS][4], uint32_t values,
                                            int part = 0) {
    products_begin();
    OPERANDS::add_products(acc[0], weights, values, part);
    products_commit();
  }

  // Products become scores. row: of this warp.
  template <int PART>
  __device__ __forceinline__ void finish(float (&s)[1][PART][4], const Scales& scales, bool partial, int row, int key) {
    row = opaque(row);
    const int lane = opaque(this->lane);
    const auto here = make_elements<false, 1, PART>(row, key, lane);
    if constexpr (OPTIONS) {
      scales.apply(s);
      finish_scores<false>(s, s, p, x, map, here, row, key, strip(), lane);
    }
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
  template <int STEPS, int PART>
  __device__ __forceinline__ void pack(uint32_t (&weights)[STEPS][4], float (&s)[1][PART][4],
                                       const KeptElements& kept) {
    if (OPTIONS && p.dropout_p > 0.0) drop(s, kept);
    OPERANDS::pack(weights, s[0]);
  }

  // O and the state of its rows, over all keys. k runs one tile ahead of v.
  __device__ __forceinline__ void attend(Out& acc, RowState<1>& state, Scales& scales, const Range& range, int row,
                                         State& at) {
    const float factor = exponent_factor(p);
    Scores s;
    typename OPERANDS::template Weights<kKeys> weights;
    wait(k_full(at.stage), at.phase);
    start_scores(s, k(at.stage));
    scales.take(params, *this, range.begin);
    KeptElements kept = draw<NT>(row, range.begin);
    products_wait<0>();
    hold(s[0]);
    leave(k_empty(at.stage));
    finish(s, scales, range.partial(range.begin), row, range.begin);
    scales.weigh(s, state, 0, factor), scales.weigh(s, state, 1, factor);
    pack(weights, s, kept);
#pragma unroll 1
    for (int key = range.begin + kKeys; key < range.end; key += kKeys) {
      State next = at;
      next.advance();
      wait(k_full(next.stage), next.phase);
      barrier_sync(kTurn + consumer, kConsumers);
      start_scores(s, k(next.stage));
      wait(v_full(at.stage), at.phase);
      start_sum(acc, weights, v(at.stage));
      barrier_arrive(kTurn + (consumer ^ 1), kConsumers);
      scales.take(params, *this, key);
      kept = draw<NT>(row, key);
      products_wait<1>();
      hold(s[0]);
      leave(k_empty(next.stage));
      finish(s, scales, range.partial(key), row, key);
      const float fade[2] = {scales.weigh(s, state, 0, factor), scales.weigh(s, state, 1, factor)};
      keep_before(state.total[0] + state.total[1]);
      products_wait<0>();
      hold(acc[0]);
      leave(v_empty(at.stage));
      shrink_row(acc, 0, 0, fade[0]), shrink_row(acc, 0, 1, fade[1]);
      pack(weights, s, kept);
      at = next;
    }
    wait(v_full(at.stage), at.phase);
    start_sum(acc, weights, v(at.stage));
    products_wait<0>();
    hold(acc[0]);
    leave(v_empty(at.stage));
    at.advance();
  }

  // The same with care: v is cleaned before it is multiplied, and there is one product after the other, of few keys each.
  __device__ __forceinline__ void attend_carefully(Out& acc, RowState<1>& state, Scales& scales, const Range& range,
                                                   int row, State& at) {
    constexpr int kPart = OPERANDS::kPart;
#pragma unroll 1
    for (int key = range.begin; key < range.end; key += kKeys, at.advance()) {
      const int thread = opaque(consumer * kWarpgroup + warp * 32 + lane);
      const uint32_t keys = k(at.stage), values = v(at.stage);
      if (thread < kKeys / 32) flags()[thread] = 0;
      wait(k_full(at.stage), at.phase);
      wait(v_full(at.stage), at.phase);
      barrier_sync(kBoth, kConsumers);
      OPERANDS::template clean<kConsumers>(flags(), thread, values);
      fence_async();
      barrier_sync(kBoth, kConsumers);
#pragma unroll 1
      for (int part = 0; part < kKeys; part += kPart) {
        float s[1][kPart / 8][4];
        typename OPERANDS::template Weights<kPart> weights;
        start_scores(s, keys, part);
        scales.take(params, *this, key + part);
        const KeptElements kept = draw<kPart / 8>(row, key + part);
        products_wait<0>();
        hold(s[0]);
        finish(s, scales, true, row, key + part);
        const uint64_t hidden = hidden_elements(s);
#pragma unroll
        for (int half = 0; half < 2; ++half) shrink_row(acc, 0, half, scales.weigh(s, state, half, exponent_factor(p)));
        pack(weights, s, kept);
        start_sum(acc, weights, values, part);
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
        Scales scales;
        scales.begin(params, *this, row, lane);
        clear(acc);
        state.clear();
        const bool any = range.begin < range.end;
        if (any) {
          await_queries(q_phase);
          if (again)
            attend_carefully(acc, state, scales, range, row, at);
          else
            attend(acc, state, scales, range, row, at);
          if (kTile.own_out && !map.packed) leave(q_empty());
          if (!again && __any_sync(0xffffffffu, spoiled(acc)) && lane == 0)
            atomicOr(&spoiled_rounds()[round % kMemory / 32], 1u << (round % 32));
        }
        scales.end(acc, state);
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
