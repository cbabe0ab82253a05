// From products q.k in a C fragment to final scores:
//
//   s = c tanh(x / c) - slope |row + diagonal - key| + mask + bias,  x = scale q.k;  -inf where hidden, whatever x is
//
// A fragment lies one of two ways: rows of q along its rows (forward, dQ) or along its columns (TRANSPOSED: dK and dV).
// Options are asked for at run time; what they ask is the same for all threads of a CTA.
#pragma once
#include "problem.cuh"

namespace fused_attention::cuda {

// The rows of a tile: row r is query r of one head or, where `packed`, query r % packed of head `head` + r / packed. A
// tile may have more rows than there are; `clamp` gives one whose memory may be read.
struct RowMap {
  int count, head, packed;
  __device__ __forceinline__ int clamp(int r) const { return min(r, count - 1); }
  __device__ __forceinline__ int query(int r) const { return packed ? r % packed : r; }
  __device__ __forceinline__ int head_of(int r) const { return packed ? head + r / packed : head; }
};

// Where a lane's elements of a fragment [16 MT, 8 NT] lie: rows of q (numbers in a RowMap) and keys.
template <bool TRANSPOSED, int MT, int NT>
struct Elements {
  static constexpr int kSlots = TRANSPOSED ? 2 * NT : 2 * MT;
  int row, key;  // of the first element
  static __device__ __forceinline__ int slot(int mt, int nt, int i) {
    return TRANSPOSED ? 2 * nt + (i & 1) : 2 * mt + (i >> 1);
  }
  static __device__ __forceinline__ int slot_row(int s) { return TRANSPOSED ? 8 * (s >> 1) + (s & 1) : 8 * s; }
  static __device__ __forceinline__ int key_step(int mt, int nt, int i) {
    return TRANSPOSED ? 16 * mt + 8 * (i >> 1) : 8 * nt + (i & 1);
  }
};

// row, key: of the fragment's first element.
template <bool TRANSPOSED, int MT, int NT>
__device__ __forceinline__ Elements<TRANSPOSED, MT, NT> make_elements(int row, int key, int lane) {
  return {row + (TRANSPOSED ? 2 * (lane & 3) : lane >> 2), key + (TRANSPOSED ? lane >> 2 : 2 * (lane & 3))};
}

// Whether the products are the scores but for a positive factor, which is left to the exponent.
__device__ __forceinline__ bool raw_scores(const AttentionParams& p) {
  return p.scale > 0.0 && p.softcap == 0.0 && !p.mask.data && !p.bias.data && !p.alibi.data;
}
__device__ __forceinline__ double score_unit(const AttentionParams& p) { return raw_scores(p) ? p.scale : 1.0; }
// What turns a difference of scores into the argument of exp2.
__device__ __forceinline__ float exponent_factor(const AttentionParams& p) {
  return static_cast<float>(score_unit(p) * 1.4426950408889634);
}

// --- mask and bias -------------------------------------------------------------------------------------------------

constexpr int kBatch = 4;  // loads on their way at once

__device__ __forceinline__ int element_bytes(DType t) {
  return t == DType::f64 ? 8 : t == DType::f32 ? 4 : t == DType::boolean ? 1 : 2;
}

// Numbers of any dtype; a boolean becomes what is added to a score. A null address gives 0.
__device__ __forceinline__ void load_numbers(const char* const (&from)[kBatch], DType type, float (&value)[kBatch]) {
#pragma unroll
  for (int i = 0; i < kBatch; ++i) value[i] = 0.0f;
  if (type == DType::f32) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (from[i]) value[i] = *reinterpret_cast<const float*>(from[i]);
  } else if (type == DType::boolean) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (from[i]) value[i] = *from[i] ? 0.0f : -kInfinity;
  } else if (type == DType::f64) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (from[i]) value[i] = static_cast<float>(*reinterpret_cast<const double*>(from[i]));
  } else {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const uint32_t bits = from[i] ? *reinterpret_cast<const uint16_t*>(from[i]) : 0;
      value[i] = type == DType::bf16 ? Bf16::widen(bits) : Half::widen(bits);
    }
  }
}

// The row of the element that a lane stores as number `at`. Where two rows are stored at once, they are chosen such that
// they lie in different banks.
template <int COLS, int LD>
__device__ __forceinline__ int strip_row(int at) {
  constexpr int kApart = LD % 32 == 20 ? 4 : 2;  // kApart * LD is 16 modulo 32
  const int row = at / COLS;
  return COLS == 16 ? (row & -2 * kApart) | (row & 1) * kApart | (row >> 1 & (kApart - 1)) : row;
}

// A warp's strip of shared memory, [ROWS][LD]: numbers for rows of q (numbers in a RowMap) and keys.
template <int ROWS, int COLS, int LD>
__device__ __forceinline__ void fill_strip(float* strip, const Tensor& t, const Problem& x, const RowMap& map, int row,
                                           int key, int elements, bool join, int lane) {
  const int bytes = element_bytes(t.dtype);
  const char* base = static_cast<const char*>(t.data) + x.b * t.stride[0] * bytes;
#pragma unroll 1
  for (int first = lane; first < elements; first += 32 * kBatch) {
    const char* from[kBatch];
    float value[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = first + 32 * i, r = map.clamp(row + strip_row<COLS, LD>(at)), n = key + at % COLS;
      const int64_t offset = map.head_of(r) * t.stride[1] + map.query(r) * t.stride[2] + n * t.stride[3];
      from[i] = at < elements && n < x.seen ? base + offset * bytes : nullptr;
    }
    load_numbers(from, t.dtype, value);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = first + 32 * i;
      if (at >= elements) break;
      float& to = strip[strip_row<COLS, LD>(at) * LD + at % COLS];
      // -inf hides, even what is +inf.
      to = !join ? value[i] : to == -kInfinity || value[i] == -kInfinity ? -kInfinity : to + value[i];
    }
  }
}

__device__ __forceinline__ bool same_for_all_rows(const Tensor& t, const RowMap& map) {
  return !t.data || (t.stride[2] == 0 && (!map.packed || t.stride[1] == 0));
}

// Mask and bias together in the strip; returns the step from row to row, 0 where all rows share one.
template <int ROWS, int COLS, int LD>
__device__ __forceinline__ int fill_terms(float* strip, const AttentionParams& p, const Problem& x, const RowMap& map,
                                          int row, int key, int lane) {
  const bool shared = same_for_all_rows(p.mask, map) && same_for_all_rows(p.bias, map);
  const int elements = shared ? COLS : ROWS * COLS;
  __syncwarp();
#pragma unroll 1
  for (int which = p.mask.data ? 0 : 1; which < (p.bias.data ? 2 : 1); ++which)
    fill_strip<ROWS, COLS, LD>(strip, which ? p.bias : p.mask, x, map, row, key, elements, which && p.mask.data, lane);
  __syncwarp();
  return shared ? 0 : LD;
}

// The strip of a fragment [16 MT, 8 NT].
template <bool TRANSPOSED, int MT, int NT>
struct Strip {
  static constexpr int kRows = TRANSPOSED ? 8 * NT : 16 * MT;
  static constexpr int kKeys = strip_keys(TRANSPOSED ? 16 * MT : 8 * NT);
  static constexpr int kStep = strip_step(kKeys, TRANSPOSED);
  static constexpr int kFloats = strip_floats(kRows, kKeys, TRANSPOSED);
};

__device__ __forceinline__ void add_term(float& s, float term) { s = term == -kInfinity ? -kInfinity : s + term; }

template <bool TRANSPOSED, int MT, int NT>
__device__ __forceinline__ void add_terms(float (&s)[MT][NT][4], const AttentionParams& p, const Problem& x,
                                          const RowMap& map, int row, int key, float* strip, int lane) {
  using S = Strip<TRANSPOSED, MT, NT>;
  const int g = lane >> 2, t = lane & 3;
  if constexpr (TRANSPOSED) {
    const int step = fill_terms<S::kRows, S::kKeys, S::kStep>(strip, p, x, map, row, key, lane);
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          add_term(s[mt][nt][i], strip[(8 * nt + 2 * t + (i & 1)) * step + 16 * mt + 8 * (i >> 1) + g]);
  } else {
#pragma unroll
    for (int part = 0; part < 8 * NT / S::kKeys; ++part) {
      const int step = fill_terms<S::kRows, S::kKeys, S::kStep>(strip, p, x, map, row, key + part * S::kKeys, lane);
#pragma unroll
      for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int nt = 0; nt < S::kKeys / 8; ++nt) {
            const float2 two =
                *reinterpret_cast<const float2*>(strip + (16 * mt + 8 * half + g) * step + 8 * nt + 2 * t);
            float (&to)[4] = s[mt][part * S::kKeys / 8 + nt];
            add_term(to[2 * half], two.x);
            add_term(to[2 * half + 1], two.y);
          }
    }
  }
}

// --- all of it -----------------------------------------------------------------------------------------------------

// tanh(x) from y = -2 x log2 e.
__device__ __forceinline__ float tanh_from(float y) {
  const float e = exp2_fast(-fabsf(y));
  return copysignf((1.0f - e) * reciprocal_fast(1.0f + e), -y);
}
__device__ __forceinline__ float softcapped(float x, float cap) {
  return cap * tanh_from(x * (-2.0f * kLog2E) * reciprocal_fast(cap));
}

// s *= scale, then the softcap; slope, where given, becomes its derivative 1 - tanh^2.
template <bool SLOPE, int MT, int NT>
__device__ __forceinline__ void scale_and_cap(float (&s)[MT][NT][4], float (&slope)[MT][NT][4],
                                              const AttentionParams& p) {
  const float scale = static_cast<float>(p.scale);
  if (p.softcap == 0.0) {
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[mt][nt][i] *= scale;
    return;
  }
  const float cap = static_cast<float>(p.softcap), factor = scale * -2.0f * kLog2E * reciprocal_fast(cap);
#pragma unroll
  for (int mt = 0; mt < MT; ++mt)
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float tanh = tanh_from(s[mt][nt][i] * factor);
        s[mt][nt][i] = cap * tanh;
        if constexpr (SLOPE) slope[mt][nt][i] = 1.0f - tanh * tanh;
      }
}

template <bool TRANSPOSED, int MT, int NT>
__device__ __forceinline__ void add_alibi(float (&s)[MT][NT][4], const AttentionParams& p, const Problem& x,
                                          const RowMap& map, const Elements<TRANSPOSED, MT, NT>& w) {
  using W = Elements<TRANSPOSED, MT, NT>;
  const float* slopes = static_cast<const float*>(p.alibi.data) + x.b * p.alibi.stride[0];
  float slope[W::kSlots], away[W::kSlots];  // of the row, and of its diagonal from the first key
#pragma unroll
  for (int j = 0; j < W::kSlots; ++j) {
    const int r = map.clamp(w.row + W::slot_row(j));
    slope[j] = slopes[(TRANSPOSED ? map.head : map.head_of(r)) * p.alibi.stride[1]];
    away[j] = static_cast<float>(opaque(map.query(r) + x.diagonal - w.key));
  }
#pragma unroll
  for (int mt = 0; mt < MT; ++mt)
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = W::slot(mt, nt, i);
        s[mt][nt][i] -= slope[j] * fabsf(away[j] - static_cast<float>(W::key_step(mt, nt, i)));
      }
}

template <bool TRANSPOSED, int MT, int NT>
__device__ __forceinline__ void hide(float (&s)[MT][NT][4], const AttentionParams& p, const Problem& x,
                                     const RowMap& map, const Elements<TRANSPOSED, MT, NT>& w) {
  using W = Elements<TRANSPOSED, MT, NT>;
  int low[W::kSlots], high[W::kSlots];  // the keys that a row sees, counted from w.key
#pragma unroll
  for (int j = 0; j < W::kSlots; ++j) {
    const int center = map.query(w.row + W::slot_row(j)) + x.diagonal;
    low[j] = opaque(center - left_side(p) - w.key);
    high[j] = opaque(min(center + right_side(p), x.seen - 1) - w.key);
  }
#pragma unroll
  for (int mt = 0; mt < MT; ++mt)
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = W::slot(mt, nt, i), n = W::key_step(mt, nt, i);
        if (n < low[j] || n > high[j]) s[mt][nt][i] = -kInfinity;
      }
}

// All but what is hidden by position. row, key: of the fragment's first element. slope: see scale_and_cap.
template <bool SLOPE, bool TRANSPOSED, int MT, int NT>
__device__ __forceinline__ void finish_scores(float (&s)[MT][NT][4], float (&slope)[MT][NT][4],
                                              const AttentionParams& p, const Problem& x, const RowMap& map,
                                              const Elements<TRANSPOSED, MT, NT>& w, int row, int key, float* strip,
                                              int lane) {
  if (raw_scores(p)) return;
  scale_and_cap<SLOPE>(s, slope, p);
  if (p.alibi.data) add_alibi(s, p, x, map, w);
  if (p.mask.data || p.bias.data) add_terms<TRANSPOSED>(s, p, x, map, row, key, strip, lane);
}

}  // namespace fused_attention::cuda
