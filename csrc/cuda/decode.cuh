// Decoding for mma.sync: a few rows of queries against a long cache, split along the keys (Dao et al., "Flash-Decoding",
// 2023). For every sequence, key head and split:
//
//   s_j = scores(q k_j);  t = max_j s_j;  l = sum_j exp(s_j - t);  acc = sum_j exp(s_j - t) v_j
//
// and over splits, here in one CTA (finish) or in a kernel after it (combine.cuh):  out = sum acc exp(t - T) / L,
// lse = T + log L,  with the sink in L.
//
// Rows are the queries of all heads that share a key head, 16 of them to a CTA: row r is query r % M of head r / M of the
// group. Each warp goes through tiles of 16 keys of its own, without waiting for the others: its stages of k and v stand in
// its own part of shared memory. Codes of a quantised cache enter the products as they are, in an order of dims that makes
// them words of shared memory; the key's scale multiplies its score, the value's scale its weight, in the exponent.
//
// A page that does not exist and a sequence longer than its cache give NaN. A weight of 0 times NaN is NaN: see
// forward.cuh about `careful`.
#pragma once
#include "combine.cuh"
#include "decode_step.cuh"

namespace fused_attention::cuda {

template <class E, int D, bool CODES>
struct Decode : DecodeStep<E, D, CODES> {
  using Step = DecodeStep<E, D, CODES>;
  using Step::kChunks, Step::kTileBytes, Step::kStageBytes, Step::kSumStep;
  using Step::lost, Step::stages, Step::first, Step::kWarps, Step::kStages, Step::kThreads, Step::NT, Step::DT;
  using Step::Step, Step::p, Step::b, Step::kv_head, Step::row0, Step::split, Step::low, Step::high, Step::lane,
      Step::warp;
  using typename Step::Place16, typename Step::Query;

  // --- with care -----------------------------------------------------------------------------------------------------

  // Values of a tile that are not finite (codes: NaN) become 0; bit j of the result tells that row j had some.
  __device__ __forceinline__ uint32_t clean_values(uint32_t tile) const {
    uint32_t flags = 0;
    if (CODES && !this->e4m3()) return 0;
#pragma unroll 1
    for (int at = lane; at < 16 * kChunks; at += 32) {
      const uint32_t place = tile + Place16::offset(at / kChunks, at % kChunks);
      uint4 bits = load_shared(place);
      const bool bad = CODES ? clean_codes(bits) : clean<E>(bits);
      if (!bad) continue;
      store_shared(place, bits);
      flags |= 1u << (at / kChunks);
    }
    __syncwarp();
#pragma unroll
    for (int step = 1; step < 32; step *= 2) flags |= __shfl_xor_sync(0xffffffffu, flags, step);
    return flags;
  }

  // What clean_values took out of row j, added to the rows that see it.
  __device__ __forceinline__ void add_value(float (&acc)[1][DT][4], const float (&s)[1][NT][4], uint32_t hidden, int j,
                                            const CachedToken& at) const {
    float weight[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float own = 0.0f;
#pragma unroll
      for (int e = 0; e < 2 * NT; ++e) {
        const float w = hidden >> (e / 2 * 4 + 2 * half + e % 2) & 1 ? -1.0f : fabsf(s[0][e / 2][2 * half + e % 2]);
        own += 8 * (e / 2) + 2 * (lane & 3) + e % 2 == j ? w : 0.0f;
      }
      weight[half] = quad_sum(own);
    }
    const int64_t row = at.block * p.cache.v.stride[0] + kv_head * p.cache.v.stride[1] + at.row * p.cache.v.stride[2];
    const char* from = static_cast<const char*>(p.cache.v.data) + row * (CODES ? 1 : 2);
#pragma unroll
    for (int e = 0; e < 2 * DT; ++e) {
      const int d = this->dim_of(e / 2, e % 2);
      if (d >= static_cast<int>(p.DV)) continue;
      float value;
      if (CODES) {
        value = (from[d] & 0x7f) == 0x7f ? __int_as_float(0x7fffffff) : 0.0f;
      } else {
        const uint32_t bits = *reinterpret_cast<const uint16_t*>(from + 2 * d);
        value = (bits & E::kExponent) == E::kExponent ? E::widen(bits) : 0.0f;
      }
      if (value == 0.0f) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (weight[half] != -1.0f) acc[0][e / 2][2 * half + e % 2] += weight[half] * value;
    }
  }

  // --- all of it -------------------------------------------------------------------------------------------------------

  __device__ __forceinline__ void attend(float (&acc)[1][DT][4], RowState<1>& state, const Query& q,
                                         bool careful) const {
    constexpr int kStep = 16 * kWarps;
    clear(acc);
    state.clear();
    const int start = low + 16 * warp;
    CachedToken next = this->token(start + lane % 16);  // looked up one tile ahead of the copies
#pragma unroll 1
    for (int i = 1 - kStages; start + i * kStep < high; ++i) {
      if (i >= 0) {
        wait_copies<kStages - 2>();
        __syncwarp();  // the stage is here for all lanes, and all have left the one that is filled next
      }
      const int load = i + kStages - 1;
      if (start + load * kStep < high) {
        this->load_stage(load % kStages * kStageBytes, next);
        next = this->token(start + (load + 1) * kStep + lane % 16);
      }
      commit_copies();
      if (i < 0) continue;
      const int key = start + i * kStep;
      const uint32_t stage = i % kStages * kStageBytes, values = first + stage + kTileBytes;
      const float* factors = reinterpret_cast<const float*>(stages + stage + 2 * kTileBytes);
      float s[1][NT][4];
      this->products(s, q, first + stage);
      this->finish(s, factors, key);
      uint32_t hidden = 0, flags = 0;
      if (careful) {
        flags = clean_values(values);
#pragma unroll
        for (int e = 0; e < NT * 4; ++e) hidden |= static_cast<uint32_t>(s[0][e / 4][e % 4] == -kInfinity) << e;
      }
      this->softmax(s, state, acc, factors);
#pragma unroll 1
      for (int j = 0; flags >> j; ++j)
        if (flags >> j & 1) add_value(acc, s, hidden, j, this->token(key + j));
      this->add_values(acc, s, values);
    }
    wait_copies<0>();
  }

  // The sums of all warps, then this CTA's result: the output, or what the kernel after it combines.
  __device__ __forceinline__ void store(const float (&acc)[1][DT][4], const RowState<1>& state, char* shared) const {
    float* sums = reinterpret_cast<float*>(shared);  // [warps][16][kSumStep]
    float* stats = sums + kWarps * 16 * kSumStep;    // [warps][16][2]
    __syncthreads();                                 // all stages have been read
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp * 16 + (lane >> 2) + 8 * half;
      const float total = quad_sum(state.total[half]);
      if ((lane & 3) == 0) stats[2 * row] = state.top[half], stats[2 * row + 1] = total;
#pragma unroll
      for (int dt = 0; dt < DT; dt += 2) {
        const float (&x)[4] = acc[0][dt], (&y)[4] = acc[0][dt + 1];
        float* to = sums + row * kSumStep + this->dim_of(dt, 0);
        if (CODES) {
          store_shared(shared_address(to), make_float4(x[2 * half], y[2 * half], x[2 * half + 1], y[2 * half + 1]));
        } else {
          store_shared(shared_address(to), make_float2(x[2 * half], x[2 * half + 1]));
          store_shared(shared_address(to + 8), make_float2(y[2 * half], y[2 * half + 1]));
        }
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int at = static_cast<int>(threadIdx.x); at < 16 * D; at += kThreads) {
      const int row = at / D, d = at % D, r = row0 + row;
      if (r >= this->rows()) break;
      const int head = this->map().head_of(r), query = this->map().query(r);
      float top = -kInfinity, total = 0.0f, sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) top = fmaxf(top, stats[2 * (16 * w + row)]);
      const float shift = top == -kInfinity ? 0.0f : top;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float fade = exp2_fast((stats[2 * (16 * w + row)] - shift) * kLog2E);
        total = fmaf(stats[2 * (16 * w + row) + 1], fade, total);
        sum = fmaf(sums[(16 * w + row) * kSumStep + d], fade, sum);
      }
      const int64_t index = (b * p.H + head) * p.M + query;
      if (p.splits > 1) {
        const int64_t part = index * p.splits + split;
        if (d < p.DV) static_cast<float*>(p.partial.data)[part * p.DV + d] = sum;
        if (d < 2) static_cast<float*>(p.stats.data)[2 * part + d] = d ? total : top;
      } else {
        store_decoded<E>(p, b, head, query, d, top, total, sum, lost);
      }
    }
  }

  __device__ __forceinline__ void run(char* shared) {
    this->place();
    Query q;
    this->load_query(q);
    float acc[1][DT][4];
    RowState<1> state;
    bool careful = false;
#pragma unroll 1
    while (true) {
      attend(acc, state, q, careful);
      if (careful || !__any_sync(0xffffffffu, spoiled(acc))) break;
      careful = true;
    }
    store(acc, state, shared);
  }
};

}  // namespace fused_attention::cuda
