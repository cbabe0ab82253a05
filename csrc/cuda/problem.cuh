// One element of the batch (or packed sequence): where it lies, how long it is, and which keys its rows see.
//
// Row i sees key j if j < seen and i + diagonal - left <= j <= i + diagonal + right. Before a launch, plan.h puts kFar in
// place of an open side, and 0 in place of causality's right side. Positions are 32-bit, addresses 64-bit.
#pragma once
#include "../params.h"
#include "tile.cuh"
#include "tiles.h"

namespace fused_attention::cuda {

struct Problem {
  int b;           // index in the batch
  int rows, keys;  // rows of q; rows of k
  int seen;        // keys below key_lengths
  int diagonal;
};

__device__ __forceinline__ Problem make_problem(const AttentionParams& p, int b) {
  Problem x{b, static_cast<int>(p.M), static_cast<int>(p.N), 0, 0};
  if (p.cu_seqlens_q) {
    x.rows = static_cast<int>(p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b]);
    x.keys = static_cast<int>(p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b]);
  }
  x.seen = x.keys;
  if (p.key_lengths) {
    const int64_t length = p.key_lengths[b];
    x.seen = length < 0 ? 0 : length < x.keys ? static_cast<int>(length) : x.keys;
  }
  if (p.causal == Causal::bottom_right) x.diagonal = x.seen - x.rows;
  return x;
}
// Packed sequences share one element of the batch in q, k, v ...; these are where one begins.
__device__ __forceinline__ int64_t slot(const AttentionParams& p, int b) { return p.cu_seqlens_q ? 0 : b; }
__device__ __forceinline__ int64_t first_row(const AttentionParams& p, int b) {
  return p.cu_seqlens_q ? p.cu_seqlens_q[b] : 0;
}
__device__ __forceinline__ int64_t first_key(const AttentionParams& p, int b) {
  return p.cu_seqlens_k ? p.cu_seqlens_k[b] : 0;
}

__device__ __forceinline__ int left_side(const AttentionParams& p) { return static_cast<int>(p.window_left); }
__device__ __forceinline__ int right_side(const AttentionParams& p) { return static_cast<int>(p.window_right); }

__device__ __forceinline__ int round_down(int x, int block) { return x / block * block; }
__device__ __forceinline__ int round_up(int x, int block) { return (x + block - 1) / block * block; }

// Tiles that are visited: begin .. end, begin a multiple of the block. Those in full_begin .. full_end are visible as a
// whole, the others in part.
struct Range {
  int begin, full_begin, full_end, end;
  __device__ __forceinline__ bool partial(int at) const { return at < full_begin || at >= full_end; }
};

// Tiles of keys that rows first .. last see.
__device__ __forceinline__ Range key_range(const AttentionParams& p, const Problem& x, int first, int last, int block) {
  const int left = left_side(p), right = right_side(p);
  Range r{0, 0, x.seen, x.seen};
  if (left < kFar) {
    r.begin = round_down(max(first + x.diagonal - left, 0), block);
    r.full_begin = round_up(max(last + x.diagonal - left, 0), block);
  }
  if (right < kFar) {
    r.end = min(r.end, last + x.diagonal + right + 1);
    r.full_end = min(r.full_end, first + x.diagonal + right + 1);
  }
  r.full_end = round_down(max(r.full_end, 0), block);
  return r;
}

// Tiles of rows that see any of the keys first .. first + keys.
__device__ __forceinline__ Range row_range(const AttentionParams& p, const Problem& x, int first, int keys, int block) {
  const int left = left_side(p), right = right_side(p);
  const int last = min(first + keys, x.seen) - 1;
  Range r{0, 0, x.rows, x.rows};
  if (right < kFar) {
    r.begin = round_down(max(first - x.diagonal - right, 0), block);
    r.full_begin = round_up(max(last - x.diagonal - right, 0), block);
  }
  if (left < kFar) {
    r.end = min(r.end, last - x.diagonal + left + 1);
    r.full_end = min(r.full_end, first - x.diagonal + left + 1);
  }
  // A tile that reaches past the last key is never wholly visible; one beyond it is not visible at all.
  r.full_end = first + keys > x.seen ? 0 : round_down(max(r.full_end, 0), block);
  if (first >= x.seen) r.end = 0;
  return r;
}

// Rows of q, k, v, out ... as a tile reads them; `row` counts within the sequence. Strides are in elements of 16 bits.
__device__ __forceinline__ char* row_address(const Tensor& t, int64_t batch, int64_t head, int64_t row) {
  return static_cast<char*>(t.data) + 2 * (batch * t.stride[0] + head * t.stride[1] + row * t.stride[2]);
}
// A number per row: lse, delta and their like, [B, H, M].
__device__ __forceinline__ float* row_number(const Tensor& t, int64_t batch, int64_t head, int64_t row) {
  return static_cast<float*>(t.data) + batch * t.stride[0] + head * t.stride[1] + row * t.stride[2];
}

}  // namespace fused_attention::cuda
