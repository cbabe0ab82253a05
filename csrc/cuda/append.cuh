// New tokens into a cache, in place, and the query turned to its positions:
//
//   position of row i = length - M + i, the new tokens counted
//   (a, b) = a pair of the first R dims;  (a, b) -> (a cos - b sin, b cos + a sin)       (Su et al., "RoFormer", 2021)
//   scale = max|x| / limit;  stored = round(x / scale)                        limit: 127 for int8, 448 for float8 e4m3
//
// A warp per token and head: of keys, then of values, then of queries. Arithmetic is float32, rounded once, to what is
// stored. A position outside the tables gives NaN. What has no place in the cache is not written.
#pragma once
#include "cache.cuh"

namespace fused_attention::cuda {

constexpr int kLaneDims = 8;  // head dims up to 256

// The bits of float8 e4m3, |x| <= 448, to nearest even.
__device__ __forceinline__ uint32_t to_e4m3(float x) {
  const uint32_t bits = __float_as_uint(x), size = bits & 0x7fffffffu;
  // Where e4m3 is normal, three bits of mantissa stay, and 120 is the difference of the biases; below 2^-6 the unit is 2^-9.
  const uint32_t normal = ((size + 0x7ffffu + (size >> 20 & 1)) >> 20) - (120u << 3);
  const uint32_t small = static_cast<uint32_t>(rintf(fabsf(x) * 512.0f));
  return (size < 121u << 23 ? small : normal) | (bits >> 24 & 0x80u);
}

template <class E>
struct Append {
  const AppendParams& p;
  int lane, b, head, row;
  int64_t position;
  float x[kLaneDims];  // dims lane, lane + 32, ...

  __device__ __forceinline__ const char* address(const Tensor& t) const {
    return static_cast<const char*>(t.data) + 2 * (b * t.stride[0] + head * t.stride[1] + row * t.stride[2]);
  }
  __device__ __forceinline__ float number(const char* from, int d) const {
    return E::widen(*reinterpret_cast<const uint16_t*>(from + 2 * d));
  }

  __device__ __forceinline__ void load(const Tensor& t, int dims, int rotary) {
    const char* from = address(t);
    const int half = rotary / 2;
#pragma unroll
    for (int j = 0; j < kLaneDims; ++j) {
      const int d = lane + 32 * j;
      x[j] = d < dims ? number(from, d) : 0.0f;
      if (d >= rotary) continue;
      const int other = p.interleaved ? d ^ 1 : d < half ? d + half : d - half;
      const int pair = p.interleaved ? d / 2 : d % half;
      const bool first = p.interleaved ? d % 2 == 0 : d < half, known = position >= 0 && position < p.positions;
      const float nan = __int_as_float(0x7fffffff);
      const float cos = known ? static_cast<const float*>(p.cos.data)[position * p.cos.stride[0] + pair] : nan;
      const float sin = known ? static_cast<const float*>(p.sin.data)[position * p.sin.stride[0] + pair] : nan;
      x[j] = x[j] * cos + number(from, other) * (first ? -sin : sin);
    }
  }

  // Into the cache: numbers as they are, or codes and their scale.
  __device__ __forceinline__ void write(const Tensor& to, const Tensor& scales, int dims) const {
    const CachedToken at =
        find_token(p.cache, b, static_cast<int>(position), position >= 0 && position < p.cache.capacity);
    if (at.block < 0) return;
    const int64_t offset = at.block * to.stride[0] + head * to.stride[1] + at.row * to.stride[2];
    if (!scales.data) {
#pragma unroll
      for (int j = 0; j < kLaneDims; ++j)
        if (lane + 32 * j < dims)
          static_cast<uint16_t*>(to.data)[offset + lane + 32 * j] = static_cast<uint16_t>(E::pack(x[j], 0.0f));
      return;
    }
    float largest = 0.0f;
    bool broken = false;
#pragma unroll
    for (int j = 0; j < kLaneDims; ++j) largest = fmaxf(largest, fabsf(x[j])), broken |= !(fabsf(x[j]) < kInfinity);
#pragma unroll
    for (int step = 16; step; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    broken = __any_sync(0xffffffffu, broken);
    const float limit = to.dtype == DType::i8 ? 127.0f : 448.0f,
                scale = largest == 0.0f ? 1.0f : __fdiv_rn(largest, limit);
#pragma unroll
    for (int j = 0; j < kLaneDims; ++j) {
      const float y = broken ? 0.0f : fminf(fmaxf(__fdiv_rn(x[j], scale), -limit), limit);
      const uint32_t code = to.dtype == DType::i8 ? static_cast<uint32_t>(static_cast<int>(rintf(y))) : to_e4m3(y);
      if (lane + 32 * j < dims) static_cast<uint8_t*>(to.data)[offset + lane + 32 * j] = static_cast<uint8_t>(code);
    }
    if (lane == 0) *token_scale(scales, at, head) = broken ? __int_as_float(0x7fffffff) : scale;
  }

  __device__ __forceinline__ void run() {
    lane = static_cast<int>(threadIdx.x) & 31;
    const int64_t each = p.key.data ? p.HK : 0, heads = 2 * each + (p.turned.data ? p.H : 0);
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kAppendWarps + threadIdx.x / 32;
    if (at >= p.B * p.M * heads) return;
    const int64_t slot = at % heads;
    row = static_cast<int>(at / heads % p.M), b = static_cast<int>(at / heads / p.M);
    const int64_t length = p.cache.long_lengths ? static_cast<const int64_t*>(p.cache.lengths)[b]
                                                : static_cast<int64_t>(static_cast<const int32_t*>(p.cache.lengths)[b]);
    position = length - p.M + row;
    const int dims = static_cast<int>(p.D), rotary = static_cast<int>(p.rotary_dim);
    if (slot < each) {
      head = static_cast<int>(slot);
      load(p.key, dims, rotary);
      write(p.cache.k, p.cache.k_scale, dims);
    } else if (slot < 2 * each) {
      head = static_cast<int>(slot - each);
      load(p.value, static_cast<int>(p.DV), 0);
      write(p.cache.v, p.cache.v_scale, static_cast<int>(p.DV));
    } else {
      head = static_cast<int>(slot - 2 * each);
      load(p.query, dims, rotary);
      uint16_t* to = reinterpret_cast<uint16_t*>(const_cast<char*>(address(p.turned)));
#pragma unroll
      for (int j = 0; j < kLaneDims; ++j)
        if (lane + 32 * j < dims) to[lane + 32 * j] = static_cast<uint16_t>(E::pack(x[j], 0.0f));
    }
  }
};

}  // namespace fused_attention::cuda
