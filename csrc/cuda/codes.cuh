// What a quantised cache holds, widened: int8, and float8 e4m3 (s eeee mmm, bias 7, no infinities). Both are exact in
// bfloat16 and float16.
#pragma once
#include "ptx.cuh"

namespace fused_attention::cuda {

__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {  // "prmt"
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}
__device__ __forceinline__ uint32_t multiply_halves(uint32_t a, uint32_t b) {  // "mul" (half precision)
  uint32_t r;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
__device__ __forceinline__ uint32_t subtract_halves(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

// Bytes FIRST and SECOND of a word as two numbers of 16 bits.
template <int FIRST, int SECOND>
__device__ __forceinline__ uint32_t widen_int8(uint32_t word, Half) {
  // The bits of 1024 + (code + 128): there a float16 has a unit of 1.
  const uint32_t bits = permute_bytes(word ^ 0x80808080u, 0x64646464u, 0x4040 | FIRST | SECOND << 8);
  return subtract_halves(bits, 0x64806480u);  // 1152
}
template <int FIRST, int SECOND>
__device__ __forceinline__ uint32_t widen_int8(uint32_t word, Bf16) {
  // The same with 2^23 in float32: bfloat16 has too few bits.
  const uint32_t code = word ^ 0x80808080u;
  const float low = __uint_as_float(permute_bytes(code, 0x4B000000u, 0x7440 | FIRST));
  const float high = __uint_as_float(permute_bytes(code, 0x4B000000u, 0x7440 | SECOND));
  return Bf16::pack(low - 8388736.0f, high - 8388736.0f);
}
template <int FIRST, int SECOND>
__device__ __forceinline__ uint32_t widen_e4m3(uint32_t word, Half) {
  const uint32_t two = permute_bytes(word, 0, 0x0404 | FIRST << 4 | SECOND << 12);  // each in the upper half of 16 bits
  const uint32_t nan = ((two & 0x7F007F00u) + 0x01000100u) >> 15 & 0x00010001u;     // s 1111 111
  const uint32_t bits = (two & 0x80008000u) | (two & 0x7F007F00u) >> 1;
  // 2^8 is the difference of the biases; subnormals come out right.
  return multiply_halves(bits, 0x5C005C00u) | nan * 0x7FFFu;
}
template <int FIRST, int SECOND>
__device__ __forceinline__ uint32_t widen_e4m3(uint32_t word, Bf16) {
  const uint32_t halves = widen_e4m3<FIRST, SECOND>(word, Half());
  return Bf16::pack(Half::widen(halves & 0xffffu), Half::widen(halves >> 16));
}
template <class E, int FIRST, int SECOND>
__device__ __forceinline__ uint32_t widen_codes(uint32_t word, bool e4m3) {
  return e4m3 ? widen_e4m3<FIRST, SECOND>(word, E()) : widen_int8<FIRST, SECOND>(word, E());
}

// Of sixteen e4m3 codes those that are NaN become 0; whether there were any.
__device__ __forceinline__ bool clean_codes(uint4& x) {
  uint32_t* word[4] = {&x.x, &x.y, &x.z, &x.w};
  bool bad = false;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t nan = (((*word[i] & 0x7F7F7F7Fu) + 0x01010101u) & 0x80808080u) >> 7;
    *word[i] &= ~(nan * 0xFFu);
    bad = bad || nan;
  }
  return bad;
}

}  // namespace fused_attention::cuda
