// q, k and v as float8 e4m3: code = round(x / s), s = the smallest power of two with |x| <= 448 s for all finite x of a
// block of kScaleBlock rows of one head, clipped to 2^-60 .. 2^120.
//
// A power of two changes no bit of a number that stays normal: what else is in a block matters only to numbers that are
// 2^14 times smaller than its largest. Rows past the end of a sequence, and keys past key_lengths, count for nothing.
// NaN and infinities become NaN.
//
// One CTA takes one block: it brings the rows [kScaleBlock, D] into shared memory on its way to their maximum. Codes of q
// and k lie as q and k do; those of v are transposed and permuted (fp8_operands.cuh), with zeros past the last key.
// Shared memory: rows of D 16-bit numbers, chunk c of 16 bytes of row r at place c ^ ((r ^ r / 16 ^ c / 8) mod 8), so that
// neither every other chunk of a row nor columns of 16 keys meet in a bank; a maximum per warp.
#pragma once
#include "fp8_operands.cuh"

namespace fused_attention::cuda {

template <class E, int D>
struct Quantise {
  static constexpr int kThreads = 32 * kQuantiseWarps, kRowBytes = 2 * D;

  const Fp8Params& all;
  const AttentionParams& p;
  char* shared;
  int thread;

  // The block of this CTA.
  enum Kind { kQueries, kKeys, kValues } kind;
  Problem x;
  int head, block;

  __device__ __forceinline__ Quantise(const Fp8Params& all, char* shared)
      : all(all), p(all.hopper.p), shared(shared), thread(static_cast<int>(threadIdx.x)) {}

  // The sequence that has block `i`, of packed ones.
  static __device__ __forceinline__ int sequence(const int64_t* starts, int count, int i) {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first_block(starts, middle) <= i)
        low = middle;
      else
        high = middle - 1;
    }
    return low;
  }

  // False if this block is past the end of its sequence.
  __device__ __forceinline__ bool place() {
    const int queries = static_cast<int>(p.H) * all.row_blocks, keys = static_cast<int>(p.HK) * all.key_blocks;
    int i = static_cast<int>(blockIdx.x);
    kind = i < queries ? kQueries : i < queries + keys ? kKeys : kValues;
    i -= kind == kQueries ? 0 : kind == kKeys ? queries : queries + keys;
    const int blocks = kind == kQueries ? all.row_blocks : all.key_blocks;
    const int64_t* starts = kind == kQueries ? p.cu_seqlens_q : p.cu_seqlens_k;
    head = i / blocks, i %= blocks;
    const int each = blocks / static_cast<int>(p.B);  // of a dense batch
    const int b = starts ? sequence(starts, static_cast<int>(p.B), i) : i / each;
    x = make_problem(p, b);
    block = starts ? i - first_block(starts, b) : i % each;
    return rows() > 0;
  }
  // Of this block; there may be more than kScaleBlock left.
  __device__ __forceinline__ int rows() const { return (kind == kQueries ? x.rows : x.seen) - block * kScaleBlock; }
  __device__ __forceinline__ int dims() const { return static_cast<int>(kind == kValues ? p.DV : p.D); }
  // In the tensor.
  __device__ __forceinline__ int64_t first() const {
    return (kind == kQueries ? first_row(p, x.b) : first_key(p, x.b)) + block * kScaleBlock;
  }
  __device__ __forceinline__ char* at(int row, int chunk) const {
    return shared + row * kRowBytes + ((chunk ^ ((row ^ row >> 4 ^ chunk >> 3) & 7)) << 4);
  }

  static __device__ __forceinline__ float largest(const uint4& eight) {
    const uint32_t word[4] = {eight.x, eight.y, eight.z, eight.w};
    float top = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float size = fabsf(E::widen(word[i / 2] >> 16 * (i % 2) & 0xffffu));
      if (size < kInfinity) top = fmaxf(top, size);
    }
    return top;
  }
  // Brings the rows; returns the largest finite number.
  __device__ __forceinline__ float load() {
    const Tensor& t = kind == kQueries ? p.q : kind == kKeys ? p.k : p.v;
    const Rows source{row_address(t, slot(p, x.b), head, first()), 2 * t.stride[2], rows(), dims()};
    const bool vectors = source.vectors();
    float top = 0.0f;
#pragma unroll 4
    for (int i = thread; i < kScaleBlock * D / 8; i += kThreads) {
      const int row = i / (D / 8), chunk = i % (D / 8);
      const char* from = 8 * chunk < source.dims ? source(row) : nullptr;
      uint4 eight = make_uint4(0, 0, 0, 0);
      if (from)
        eight =
            vectors ? *reinterpret_cast<const uint4*>(from + 16 * chunk) : gather_chunk(from, 8 * chunk, source.dims);
      top = fmaxf(top, largest(eight));
      *reinterpret_cast<uint4*>(at(row, chunk)) = eight;
    }
    return top;
  }
  // Of all threads; what they wrote before is there for all.
  __device__ __forceinline__ float maximum(float top) {
    float* tops = reinterpret_cast<float*>(shared + kScaleBlock * kRowBytes);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
    if ((thread & 31) == 0) tops[thread / 32] = top;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < kQuantiseWarps; ++warp) top = fmaxf(top, tops[warp]);
    return top;
  }
  static __device__ __forceinline__ int exponent_of(float top) {
    if (top == 0.0f) return 0;
    const uint32_t bits = __float_as_uint(top);
    const int exponent = static_cast<int>(bits >> 23) - 127 - 8;  // 448 is 1.75 * 2^8
    return min(max(exponent + ((bits & 0x7FFFFFu) > 0x600000u), -60), 120);
  }

  // NaN where x is not finite.
  static __device__ __forceinline__ float scaled(uint32_t bits, float inverse) {
    const float x = E::widen(bits & 0xffffu);
    return fmaf(x, 0.0f, x * inverse);
  }
  static __device__ __forceinline__ uint32_t four(uint32_t low, uint32_t high, float inverse) {
    return E4m3::pack(scaled(low, inverse), scaled(low >> 16, inverse), scaled(high, inverse),
                      scaled(high >> 16, inverse));
  }

  __device__ __forceinline__ void store_rows(const Tensor& codes, float inverse) const {
    char* to = static_cast<char*>(codes.data) + slot(p, x.b) * codes.stride[0] + head * codes.stride[1] +
               first() * codes.stride[2];
#pragma unroll 2
    for (int i = thread; i < kScaleBlock * D / 16; i += kThreads) {
      const int row = i / (D / 16), chunk = i % (D / 16);
      if (row >= rows() || 16 * chunk >= dims()) continue;
      const uint4 a = *reinterpret_cast<const uint4*>(at(row, 2 * chunk));
      const uint4 b = *reinterpret_cast<const uint4*>(at(row, 2 * chunk + 1));
      *reinterpret_cast<uint4*>(to + row * codes.stride[2] + 16 * chunk) = make_uint4(
          four(a.x, a.y, inverse), four(a.z, a.w, inverse), four(b.x, b.y, inverse), four(b.z, b.w, inverse));
    }
  }
  // 16 keys of a head dim at a time, in the order in which they are multiplied.
  __device__ __forceinline__ void store_columns(const Tensor& codes, float inverse) const {
    const int column = (first_block(p.cu_seqlens_k, x.b) + block) * kScaleBlock;
    char* to = static_cast<char*>(codes.data) + slot(p, x.b) * codes.stride[0] + head * codes.stride[1] + column;
#pragma unroll 1
    for (int i = thread; i < dims() * (kScaleBlock / 16); i += kThreads) {
      const int keys = i % (kScaleBlock / 16), d = i / (kScaleBlock / 16);
      uint32_t word[4];
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        uint32_t two[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int key = 16 * keys + 2 * t + 8 * half;
          const uint32_t low = number(key, d), high = number(key + 1, d);
          two[half] = low | high << 16;
        }
        word[t] = four(two[0], two[1], inverse);
      }
      *reinterpret_cast<uint4*>(to + d * codes.stride[2] + 16 * keys) = make_uint4(word[0], word[1], word[2], word[3]);
    }
  }
  __device__ __forceinline__ uint32_t number(int row, int d) const {
    return *reinterpret_cast<const uint16_t*>(at(row, d / 8) + 2 * (d % 8));
  }

  __device__ __forceinline__ void run() {
    if (!place()) return;
    const int exponent = exponent_of(maximum(load()));
    const float inverse = __uint_as_float(static_cast<uint32_t>(127 - exponent) << 23);
    const Tensor& scale = kind == kQueries ? all.q_scales : kind == kKeys ? all.k_scales : all.v_scales;
    const int64_t* starts = kind == kQueries ? p.cu_seqlens_q : p.cu_seqlens_k;
    if (thread == 0)
      block_scales(scale, slot(p, x.b), head, first_block(starts, x.b))[block] =
          __uint_as_float(static_cast<uint32_t>(127 + exponent) << 23);
    if (kind == kValues)
      store_columns(all.v_codes, inverse);
    else
      store_rows(kind == kQueries ? all.q_codes : all.k_codes, inverse);
  }
};

}  // namespace fused_attention::cuda
