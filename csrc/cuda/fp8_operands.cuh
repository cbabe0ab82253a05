// Products of float8 e4m3 for the forward kernel for sm_90 (forward_sm90.cuh). quantise.cuh has made codes of q, k and v.
//
//   S = sq sk (q' k'^T),   O = sum over tiles of  sv (P' v')   with codes ' and scales s of blocks, powers of two
//
// Scales. That of a row of q and of the tile of k join the exponent (weigh_row); where scores need more than that
// (OPTIONS), they multiply the scores. O is kept in units of the last tile's sv: as it shrinks with a growing maximum, it
// shrinks by the ratio of two sv too, which is 1 wherever values are alike. P' is 2^8 P, of which e4m3 has 4 bits down to
// 2^-14 and some to 2^-18; the sum of the row, l, is that of P before it is rounded.
//
// Layout. wgmma takes 8-bit operands from shared memory along K alone, so v comes transposed, [DV, keys]. P comes from
// registers, and there lies one permutation. Of 16 keys, thread t of a quad has of S ("wgmma", register fragment of D)
//
//   keys 2t, 2t + 1, 2t + 8, 2t + 9,     where the product wants (fragment of A)   positions 4t .. 4t + 3.
//
// A sum does not care in which order its terms are taken: quantise.cuh puts key 8 (p / 2 mod 2) + 2 (p / 4) + p mod 2 of
// each 16 at position p of v's rows, and what a thread has is what it multiplies. k and masks keep their order.
//
// Numbers that are not finite have the code of NaN. In v they are taken out and added by hand, from v itself, as in 16
// bits; in q and k an infinity counts as NaN. Accumulators are float32 in PTX; the hardware keeps fewer bits of the sums.
#pragma once
#include "fp8_params.h"
#include "operands_sm90.cuh"

namespace fused_attention::cuda {

// Where the blocks of sequence b begin; of a dense batch, each element has its own.
__device__ __forceinline__ int first_block(const int64_t* starts, int b) {
  return starts ? static_cast<int>(starts[b]) / kScaleBlock + b : 0;
}
// The scale of block 0 of a head.
__device__ __forceinline__ float* block_scales(const Tensor& t, int64_t batch, int64_t head, int first) {
  return static_cast<float*>(t.data) + batch * t.stride[0] + head * t.stride[1] + first;
}

constexpr float kRaise = 8.0f;  // P' is 2^kRaise P

template <class E, int D, bool OPTIONS>
struct Fp8Operands {
  using Element = E;
  using Operand = E4m3;
  using Params = Fp8Params;
  static constexpr int kDim = D, kBytes = 1;
  static constexpr bool kOptions = OPTIONS;
  static constexpr HopperTile kTile = fp8_tile(D, OPTIONS);
  static constexpr int kKeys = kTile.keys, kPanelBytes = D < 128 ? D : 128, kPart = 32;
  static_assert(kScaleBlock % kKeys == 0 && kTile.own_out);
  template <int KEYS>
  using Weights = uint32_t[KEYS / 32][4];

  static __device__ __forceinline__ const HopperParams& hopper(const Params& p) { return p.hopper; }
  static __device__ __forceinline__ const Tensor& queries(const Params& p) { return p.q_codes; }

  // Packed sequences are one element of the batch.
  static __device__ __forceinline__ int batch(const Params& p, const Block& at) {
    return static_cast<int>(slot(p.hopper.p, at.x.b));
  }
  template <int ROWS>
  static __device__ __forceinline__ void load_panels(uint32_t to, const TensorMap& map, int row, int head, int batch,
                                                     uint32_t full) {
#pragma unroll
    for (int panel = 0; panel < D / kPanelBytes; ++panel)
      load_box(to + panel * ROWS * kPanelBytes, map, panel * kPanelBytes, row, head, batch, full);
  }
  static __device__ __forceinline__ void load_queries(uint32_t to, const Params& p, const Block& at, int row,
                                                      uint32_t full) {
    load_panels<64>(to, p.hopper.q, row, at.map.head, batch(p, at), full);
  }
  static __device__ __forceinline__ void load_keys(uint32_t to, const Params& p, const Block& at, int first, int key,
                                                   uint32_t full) {
    load_panels<kKeys>(to, p.hopper.k, first + key, at.kv_head, batch(p, at), full);
  }
  static __device__ __forceinline__ void load_values(uint32_t to, const Params& p, const Block& at, int first, int key,
                                                     uint32_t full) {
    load_box(to, p.hopper.v, first + key, 0, at.kv_head, batch(p, at), full);
  }
  static __device__ __forceinline__ int first_value(const Params& p, const Block& at) {
    return first_block(p.hopper.p.cu_seqlens_k, at.x.b) * kScaleBlock;
  }

  template <int STEPS>
  static __device__ __forceinline__ void add_products(float (&acc)[D / 8][4], const uint32_t (&weights)[STEPS][4],
                                                      uint32_t v, int part = 0) {
    multiply<E4m3, D>(acc, weights, along_columns<D, kKeys>(v + part));
  }
  template <int NT>
  static __device__ __forceinline__ void pack(uint32_t (&weights)[NT / 4][4], const float (&s)[NT][4]) {
#pragma unroll
    for (int step = 0; step < NT / 4; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&a)[4] = s[4 * step + i / 2 * 2], (&b)[4] = s[4 * step + i / 2 * 2 + 1];
        const int half = 2 * (i & 1);
        weights[step][i] = E4m3::pack(a[half], a[half + 1], b[half], b[half + 1]);
      }
  }
  template <int THREADS>
  static __device__ __forceinline__ void clean(uint32_t* flags, int thread, uint32_t v) {
#pragma unroll 1
    for (int at = thread; at < D * (kKeys / 16); at += THREADS) {
      const int chunk = at % (kKeys / 16);
      const uint32_t to = v + panel_offset<D, kKeys>(at / (kKeys / 16), chunk);
      uint4 x = load_shared(to);
      uint32_t* word[4] = {&x.x, &x.y, &x.z, &x.w};
      uint32_t keys = 0;  // of these 16
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const uint32_t nan = ((*word[t] & 0x7F7F7F7Fu) + 0x01010101u & 0x80808080u) >> 7;
        *word[t] &= ~(nan * 0xFFu);
        keys |= ((nan & 1) | (nan >> 7 & 2) | (nan >> 8 & 0x100) | (nan >> 15 & 0x200)) << 2 * t;
      }
      if (!keys) continue;
      store_shared(to, x);
      atomicOr(&flags[chunk / 2], keys << 16 * (chunk & 1));
    }
  }

  struct Scales {
    float row[2], unit[2];  // of this lane's rows; those times the tile's
    float value, shrink;    // of the last tile, and the ratio of the one before to it

    // row: the first one of the warp.
    __device__ __forceinline__ void begin(const Params& p, const Block& at, int first_row, int lane) {
      const AttentionParams& a = p.hopper.p;
      const int64_t batch = slot(a, at.x.b);
      const int rows = first_block(a.cu_seqlens_q, at.x.b);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int r = at.map.clamp(first_row + (lane >> 2) + 8 * j);
        row[j] = block_scales(p.q_scales, batch, at.map.head_of(r), rows)[at.map.query(r) / kScaleBlock];
      }
      value = 1.0f;
    }
    // Addresses are found anew for each tile, rather than kept in registers.
    __device__ __forceinline__ void take(const Params& p, const Block& at, int key) {
      const int b = opaque(at.x.b), head = opaque(at.kv_head);
      const int64_t batch = slot(p.hopper.p, b);
      const int block = first_block(p.hopper.p.cu_seqlens_k, b) + key / kScaleBlock;
      const float tile = *block_scales(p.k_scales, batch, head, block);
      const float next = *block_scales(p.v_scales, batch, head, block);
      unit[0] = row[0] * tile, unit[1] = row[1] * tile;
      shrink = value * __uint_as_float(0x7F000000u - __float_as_uint(next));  // 1 / a power of two
      value = next;
    }
    template <int NT>
    __device__ __forceinline__ void apply(float (&s)[1][NT][4]) const {
#pragma unroll
      for (int e = 0; e < 4 * NT; ++e) s[0][e / 4][e % 4] *= unit[e % 4 / 2];
    }
    template <int NT>
    __device__ __forceinline__ float weigh(float (&s)[1][NT][4], RowState<1>& state, int half, float factor) const {
      return weigh_row<true>(s, state, 0, half, factor, OPTIONS ? 1.0f : unit[half], kRaise) * shrink;
    }
    __device__ __forceinline__ void end(float (&acc)[1][D / 8][4], RowState<1>& state) const {
      const float lower = 1.0f / (1 << static_cast<int>(kRaise));
#pragma unroll
      for (int j = 0; j < 2; ++j) state.total[j] *= lower;
#pragma unroll
      for (int e = 0; e < D / 2; ++e) acc[0][e / 4][e % 4] *= value * lower;
    }
  };
};

}  // namespace fused_attention::cuda
