// Tile sizes: a table per kernel, pure functions of the head dim, read by the kernels and by the launcher.
//
// What bounds them: 255 registers a thread, so 8 warps of them fill a multiprocessor; 99 KiB of shared memory a CTA on
// sm_86, sm_89 and sm_12x (163 on sm_80, where two CTAs of up to 81 KiB share a multiprocessor and hide each other's
// waits). A warp with 32 rows instead of 16 reads half the shared memory per product: ldmatrix moves 128 bytes a clock
// where mma takes 2048 operations, so 16 rows a warp would saturate both.
#pragma once

namespace fused_attention::cuda {

constexpr int kFar = 1 << 30;  // a window's side that reaches everywhere and leaves room to add positions in 32 bits

// Other head dims take the next one and are padded with zeros on the way into shared memory.
constexpr int kHeadDims[] = {32, 64, 96, 128, 160, 192, 224, 256};

constexpr int tile_dim(long long d, long long dv) {
  const long long wanted = d > dv ? d : dv;
  for (int dim : kHeadDims)
    if (wanted <= dim) return dim;
  return 0;
}

struct Tile {
  int rows, keys;  // of a tile of scores
  int warps;
  int stages;  // of the pipeline that brings what the loop runs over
};

// Forward: q [rows, D], and stages of k and v [keys, D]. Registers of a thread: out takes rows * D / (32 warps), scores
// rows * keys / (32 warps). `options` (softcap, ALiBi, mask, bias, dropout) want some 30 registers more, and mask or bias
// a strip of up to 5 KiB a warp.
constexpr Tile forward_tile(int d, bool options) {
  switch (d) {
    case 32:  // 24 KiB; 32 + 64 registers
    case 64:  // 48 KiB; 64 + 64 registers
      return {128, 64, 4, 2};
    case 96:  // 48 KiB; 96 + 32 registers
      return {128, 32, 4, 2};
    case 128:  // 64 KiB; 128 + 32 registers; 64 keys would take 96 KiB, and one CTA a multiprocessor
      return {128, 32, options ? 8 : 4, 2};
    case 160:  // 80 KiB; 80 + 16 registers: 32 rows a warp would take twice as many. With strips it would be 100 KiB
    case 192:  // 96 KiB; 96 + 16 registers
      return options ? Tile{64, 32, 4, 2} : Tile{128, 32, 8, 2};
    case 224:  // 84 KiB; 112 + 16 registers; 128 rows would need more than 99 KiB
      return {64, 32, 4, 2};
    default:  // 96 KiB; 128 + 16 registers; with strips it would be 106 KiB
      return {64, options ? 16 : 32, 4, 2};
  }
}

// Forward on sm_90: q [rows, D] and stages of k and v [keys, D] pass from one warpgroup to two others, 64 rows each. All
// registers and 227 KiB of shared memory are for one CTA a multiprocessor: a warpgroup computes with 232 registers a
// thread, of which out takes D / 2, scores keys / 2, and the weights that are multiplied meanwhile keys / 4. Head dims 64,
// 128 and 256. Where there is room, out has shared memory of its own on its way, so that the next q need not wait for it.
// `options` want some 60 registers more.
struct HopperTile {
  int rows, keys, stages;
  bool own_out;
};
constexpr HopperTile hopper_tile(int d, bool options) {
  switch (d) {
    case 64:  // 160 KiB, options 96; 32 + 64 + 32 registers
      return {128, options ? 64 : 128, 4, true};
    case 128:  // 192 KiB; 64 + 64 + 32 registers
      return options ? HopperTile{128, 64, 4, true} : HopperTile{128, 128, 2, true};
    default:  // 192 KiB; 128 + 32 + 16 registers
      return options ? HopperTile{128, 32, 4, false} : HopperTile{128, 64, 2, false};
  }
}
constexpr int kHopperWarps = 12, kHopperConsumers = 8;  // the producer's warpgroup has one warp that works
constexpr int hopper_dim(long long d, long long dv) {
  const int dim = tile_dim(d, dv);
  return dim == 0 ? 0 : dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
}
// The same with products of e4m3 (fp8_operands.cuh): weights take keys / 8 registers as they are multiplied, and q, k and v
// half the shared memory. Keys divide kScaleBlock.
constexpr HopperTile fp8_tile(int d, bool options) {
  switch (d) {
    case 64:   // 88 KiB, options 56; 32 + 64 + 16 registers
    case 128:  // 176 KiB, options 112; 64 + 64 + 16 registers
      return {128, options ? 64 : 128, 4, true};
    default:  // 192 KiB, options 160; 128 + 32 + 8 registers; 128 keys would take 128 + 64 + 16
      return options ? HopperTile{128, 32, 4, true} : HopperTile{128, 64, 3, true};
  }
}
// Rows of q, or keys, that share a scale.
constexpr int kScaleBlock = 128;
// Tiles, mbarriers (full and empty of q, and of each stage of k and v), flags, strips. bytes: of a number of q, k and v.
constexpr int kHopperBarrierBytes = 256;
constexpr int kHopperFlags = 32;  // words: blocks that are to be taken again, one bit each
constexpr int hopper_tiles(int d, const HopperTile& t, int bytes) {
  return bytes * d * (t.rows + 2 * t.stages * t.keys) + (t.own_out ? 2 * d * t.rows : 0);
}

// The backward kernels take their head dims in fewer steps, for the sake of compile time.
constexpr int backward_dim(long long d, long long dv) {
  const int dim = tile_dim(d, dv);
  return dim == 160 ? 192 : dim == 224 ? 256 : dim;
}

// dK and dV: k and v [keys, D] stay, stages of q and dout [rows, D] pass. A warp owns 16 keys; dK and dV take D / 2
// registers each, P, dP and the softcap's derivative rows / 2 each. Two CTAs share a multiprocessor of sm_80.
constexpr Tile key_gradient_tile(int d) {
  switch (d) {
    case 32:  // 24 KiB; 32 + 96 registers
    case 64:  // 48 KiB; 64 + 96 registers
      return {64, 64, 4, 2};
    case 96:   // 48 KiB; 96 + 48 registers
    case 128:  // 64 KiB; 128 + 48 registers
      return {32, 64, 4, 2};
    case 192:  // 72 KiB; 96 + 24 registers, as dK and dV do not fit together; 32 rows and strips would take 106 KiB
      return {16, 64, 4, 2};
    default:  // 80 KiB; 128 + 24 registers; 64 keys and strips would take 101 KiB
      return {16, 48, 3, 2};
  }
}
constexpr bool key_gradients_together(int d) { return d <= 128; }

// dQ: q and dout [rows, D] stay, stages of k and v [keys, D] pass. A warp owns 16 rows; dQ takes D / 2 registers, P, dP
// and the softcap's derivative keys / 2 each.
constexpr Tile query_gradient_tile(int d) {
  switch (d) {
    case 32:  // 24 KiB; 16 + 96 registers
    case 64:  // 48 KiB; 32 + 96 registers
      return {64, 64, 4, 2};
    case 96:   // 48 KiB; 48 + 48 registers
    case 128:  // 64 KiB; 64 + 48 registers
      return {64, 32, 4, 2};
    case 192:  // 72 KiB; 96 + 24 registers; 32 keys and strips would take 106 KiB
      return {64, 16, 4, 2};
    default:  // 80 KiB; 128 + 24 registers; 64 rows and strips would take 102 KiB
      return {48, 16, 3, 2};
  }
}

// dK and dV on sm_90: k and v [keys, D] stay, stages of q and dout [rows, D] pass. A warpgroup owns 64 keys: dK and dV take
// D / 2 registers each, P and dP rows / 2 each, and rows / 4 each as they are multiplied. With `options`, the softcap's
// derivative takes rows / 2 more, and mask or bias a strip a warp. Head dims 64, 128 and 256, the last in two launches.
constexpr Tile hopper_key_gradient_tile(int d, bool options) {
  switch (d) {
    case 64:  // 128 KiB, options 96; 64 + 96 + 48 registers
      return {options ? 64 : 96, 128, kHopperConsumers, 4};
    case 128:  // 192 KiB, options 128; 128 + 64 + 32 registers
      return {options ? 32 : 64, 128, kHopperConsumers, 4};
    default:  // 192 KiB; 128 + 32 + 16 registers
      return {32, 128, kHopperConsumers, 2};
  }
}

// dQ on sm_90: q and dout [rows, D] stay, stages of k and v [keys, D] pass. A warpgroup owns 64 rows: dQ takes D / 2
// registers, P and dP keys / 2 each, dS keys / 4 as it is multiplied.
constexpr Tile hopper_query_gradient_tile(int d, bool options) {
  switch (d) {
    case 64:  // 160 KiB, options 96; 32 + 128 + 32 registers
      return {128, options ? 64 : 128, kHopperConsumers, 4};
    case 128:  // 208 KiB, options 192; 64 + 96 + 24 registers
      return options ? Tile{128, 64, kHopperConsumers, 4} : Tile{128, 96, kHopperConsumers, 3};
    default:  // 192 KiB; 128 + 32 + 8 registers
      return {128, 32, kHopperConsumers, 2};
  }
}

// The gradient of a mask or bias: q, dout [rows, D], k and v [keys, D] of one step. Bound by nothing that a tile decides;
// head dims 64, 128 and 256 do.
constexpr Tile additive_gradient_tile(int d) { return {64, d > 128 ? 16 : 32, 4, 1}; }
constexpr int additive_gradient_dim(long long d, long long dv) {
  const int dim = tile_dim(d, dv);
  return dim == 0 ? 0 : dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
}

// Decoding: a warp takes 16 rows of q and tiles of 16 keys of its own, through a pipeline of its own; head dims 64, 128 and
// 256. A stage of k and v is 64 D bytes, of codes 32 D. Two stages a warp on their way, 64 KiB a multiprocessor, are four
// times what hides the latency of its share of the memory bandwidth.
struct DecodeTile {
  int warps, stages;
};
constexpr DecodeTile decode_tile(int d, bool codes) {
  if (d == 64) return {4, 4};               // 64 KiB; codes 32
  if (d == 128) return {4, codes ? 4 : 3};  // 96 KiB; codes 64
  return {codes ? 4 : 2, 2};                // 72 KiB; out takes 128 registers
}
constexpr bool decode_query_shared(int d) { return d > 128; }  // q would take D / 4 registers
constexpr int decode_dim(long long d, long long dv) {
  const int dim = tile_dim(d, dv);
  return dim == 0 ? 0 : dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
}
// At the end the stages make room for the sums of all warps, [warps][16][step], and two numbers a row. A step spreads the
// rows that are written at once over the banks: four of two numbers a lane, two of four.
constexpr int decode_sum_step(int d, bool codes) { return d + (codes ? 16 : 8); }
constexpr int decode_shared(int d, bool codes) {
  const DecodeTile t = decode_tile(d, codes);
  const int stages = t.warps * t.stages * (32 * d * (codes ? 1 : 2) + 128);
  const int sums = t.warps * 16 * (decode_sum_step(d, codes) + 2) * 4, query = decode_query_shared(d) ? 32 * d : 0;
  return query + stages > sums ? query + stages : sums;
}

constexpr int kCombineWarps = 4, kAppendWarps = 4;
constexpr int kDeltaWarps = 4;  // of a CTA, one row each
constexpr int kSinkWarps = 8;

// Rows that see at most this many keys from the first on have their softmax taken anew in the backward pass: few weights
// must add up to 1 beyond the rounding error of lse. As many keys as one warp owns.
constexpr int kFewKeys = 16;

// Strips of floats, one a warp, for the scores of `rows` rows of q: mask and bias pass through them, at most 32 keys at a
// time. The step from row to row spreads what a warp reads at once over the banks.
constexpr int strip_keys(int keys) { return keys < 32 ? keys : 32; }
constexpr int strip_step(int keys, bool transposed) { return strip_keys(keys) + (transposed ? 4 : 8); }
constexpr int strip_floats(int rows, int keys, bool transposed) { return rows * strip_step(keys, transposed); }

constexpr int kFlagBytes = 16;

// Bytes of shared memory; `terms`: there is a mask or bias.
constexpr int forward_shared(int d, bool options, bool terms) {
  const Tile t = forward_tile(d, options);
  const int strips = terms ? t.warps * strip_floats(t.rows / t.warps, t.keys, false) * 4 : 0;
  return t.rows * d * 2 + 2 * t.stages * t.keys * d * 2 + kFlagBytes + strips;
}
constexpr int hopper_shared(int d, const HopperTile& t, int bytes, bool terms) {
  const int strips = terms ? kHopperConsumers * strip_floats(16, t.keys, false) * 4 : 0;
  return hopper_tiles(d, t, bytes) + kHopperBarrierBytes + kHopperFlags * 4 + kFlagBytes + strips;
}
constexpr int kQuantiseWarps = 8;
constexpr int quantise_shared(int d) { return 2 * kScaleBlock * d + 4 * kQuantiseWarps; }
constexpr int key_gradient_shared(int d, bool terms) {
  const Tile t = key_gradient_tile(d);
  const int strips = terms ? t.warps * strip_floats(t.rows, 16, true) * 4 : 0;
  return 4 * t.keys * d + 4 * t.stages * t.rows * d + 8 * t.stages * t.rows + strips;  // and lse, delta of each stage
}
constexpr int query_gradient_shared(int d, bool terms) {
  const Tile t = query_gradient_tile(d);
  const int strips = terms ? t.warps * strip_floats(16, t.keys, false) * 4 : 0;
  return 4 * t.rows * d + 4 * t.stages * t.keys * d + strips;
}
// Tiles, mbarriers (full of what stays; full and empty of each stage), lse and delta of each stage, strips.
constexpr int kHopperGradientBarrierBytes = 128;
constexpr int hopper_gradient_shared(int d, const Tile& t, int stay, int pass, int strip, bool terms) {
  return 4 * d * (stay + t.stages * pass) + kHopperGradientBarrierBytes + 8 * t.stages * t.rows +
         (terms ? kHopperConsumers * strip * 4 : 0);
}
constexpr int hopper_key_gradient_shared(int d, bool options, bool terms) {
  const Tile t = hopper_key_gradient_tile(d, options);
  return hopper_gradient_shared(d, t, t.keys, t.rows, strip_floats(t.rows, 16, true), terms);
}
constexpr int hopper_query_gradient_shared(int d, bool options, bool terms) {
  const Tile t = hopper_query_gradient_tile(d, options);
  return hopper_gradient_shared(d, t, t.rows, t.keys, strip_floats(16, t.keys, false), terms);
}
constexpr int additive_gradient_shared(int d, bool terms) {
  const Tile t = additive_gradient_tile(d);
  const int strips = terms ? t.warps * strip_floats(16, t.keys, false) * 4 : 0;
  return 4 * (t.rows + t.keys) * d + strips;
}

}  // namespace fused_attention::cuda
