// What the forward kernel for sm_90 (forward_sm90.cuh) multiplies: here q, k and v as they are, 16-bit numbers.
// fp8_operands.cuh has another kind.
#pragma once
#include "forward_block.cuh"
#include "hopper.cuh"
#include "hopper_params.h"

namespace fused_attention::cuda {

template <class E, int D, bool OPTIONS>
struct HalfOperands {
  using Element = E;  // of q, k, v and out in memory
  using Operand = E;  // of a product
  using Params = HopperParams;
  static constexpr int kDim = D, kBytes = 2;
  static constexpr bool kOptions = OPTIONS;
  static constexpr HopperTile kTile = hopper_tile(D, OPTIONS);
  static constexpr int kKeys = kTile.keys, kPanelBytes = kPanelRowBytes;
  static constexpr int kPart = D > 128 ? 16 : 32;  // keys of a product that is taken with care
  template <int KEYS>
  using Weights = uint32_t[KEYS / 16][4];

  static __device__ __forceinline__ const HopperParams& hopper(const Params& p) { return p; }
  static __device__ __forceinline__ const Tensor& queries(const Params& p) { return p.p.q; }

  // By one thread: 64 rows of q; a tile of k, of v. Rows are counted in the tensor.
  static __device__ __forceinline__ void load_queries(uint32_t to, const Params& p, const Block& at, int row,
                                                      uint32_t full) {
    load_tile<64, D>(to, p.q, row, p.p.q.stride[1] ? at.map.head : 0, p.p.q.stride[0] ? at.x.b : 0, full);
  }
  static __device__ __forceinline__ void load_keys(uint32_t to, const Params& p, const Block& at, int first, int key,
                                                   uint32_t full) {
    load_rows(to, p.k, p.p.k, at, first + key, full);
  }
  static __device__ __forceinline__ void load_values(uint32_t to, const Params& p, const Block& at, int first, int key,
                                                     uint32_t full) {
    load_rows(to, p.v, p.p.v, at, first + key, full);
  }
  static __device__ __forceinline__ int first_value(const Params& p, const Block& at) {
    return static_cast<int>(first_key(p.p, at.x.b));
  }
  static __device__ __forceinline__ void load_rows(uint32_t to, const TensorMap& map, const Tensor& t, const Block& at,
                                                   int row, uint32_t full) {
    load_tile<kKeys, D>(to, map, row, t.stride[1] ? at.kv_head : 0, t.stride[0] ? at.x.b : 0, full);
  }

  // acc += weights v, keys `part` and on.
  template <int STEPS>
  static __device__ __forceinline__ void add_products(float (&acc)[D / 8][4], const uint32_t (&weights)[STEPS][4],
                                                      uint32_t v, int part = 0) {
    multiply<E, D>(acc, weights, along_rows<kKeys>(v + part * kPanelRowBytes));
  }
  template <int NT>
  static __device__ __forceinline__ void pack(uint32_t (&weights)[NT / 2][4], const float (&s)[NT][4]) {
    pack_fragment<E>(weights, s);
  }
  // What is not finite in a tile of v becomes 0, and its keys are flagged.
  template <int THREADS>
  static __device__ __forceinline__ void clean(uint32_t* flags, int thread, uint32_t v) {
    clean_values<E, kKeys, D, THREADS>(flags, thread,
                                       [=](int row, int chunk) { return v + panel_offset<kKeys>(row, chunk); });
  }

  // What turns products into scores and sums, where operands have scales: nothing here.
  struct Scales {
    __device__ __forceinline__ void begin(const Params&, const Block&, int, int) {}
    __device__ __forceinline__ void take(const Params&, const Block&, int) {}  // those of the tile that holds this key
    template <int NT>
    __device__ __forceinline__ void apply(float (&)[1][NT][4]) const {}
    // weigh_row; returns by how much what has been summed so far shrinks.
    template <int NT>
    __device__ __forceinline__ float weigh(float (&s)[1][NT][4], RowState<1>& state, int half, float factor) const {
      return weigh_row(s, state, 0, half, factor);
    }
    __device__ __forceinline__ void end(float (&)[1][D / 8][4], RowState<1>&) const {}
  };
};

}  // namespace fused_attention::cuda
