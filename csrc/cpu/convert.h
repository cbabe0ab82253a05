// Rows of any dtype in and out of the compute type T (float, or double for f64).
#pragma once
#include "../params.h"
#include "vec.h"

FA_BEGIN

FA_INLINE int64_t size_of(DType t) {
  if (t == DType::f64) return 8;
  if (t == DType::f32) return 4;
  return t == DType::bf16 || t == DType::f16 ? 2 : 1;
}

FA_INLINE float float_of_bits(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
FA_INLINE uint32_t bits_of_float(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}
FA_INLINE float from_bf16(uint16_t h) { return float_of_bits(static_cast<uint32_t>(h) << 16); }
FA_INLINE uint16_t to_bf16(float f) {  // nearest even; a NaN stays a NaN
  const uint32_t u = bits_of_float(f);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(f != f ? 0x7fc0u : rounded);
}
FA_INLINE float from_f16(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, rest = h & 0x7fffu;
  if (rest >= 0x7c00u) return float_of_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest < 0x400u) {  // subnormal: the value is rest * 2^-24
    const float f = static_cast<float>(static_cast<int32_t>(rest)) * 0x1p-24f;
    return float_of_bits(sign | bits_of_float(f));
  }
  return float_of_bits(sign | ((rest << 13) + (112u << 23)));
#endif
}
FA_INLINE uint16_t to_f16(float f) {
#if defined(__F16C__)
  return static_cast<uint16_t>(_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t u = bits_of_float(f), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (a >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (a < 0x38800000u) {  // subnormal result: adding 0.5 leaves it, rounded, in the low bits
    const uint32_t r = bits_of_float(float_of_bits(a) + 0.5f) - bits_of_float(0.5f);
    return static_cast<uint16_t>(sign | r);
  }
  return static_cast<uint16_t>(sign | ((a + 0xfffu + ((a >> 13) & 1u) - (112u << 23)) >> 13));
#endif
}

// float8 e4m3: s eeee mmm, bias 7, no infinities, NaN where all of eeee mmm is set.
FA_INLINE float from_e4m3(uint8_t code) {
  const uint32_t sign = static_cast<uint32_t>(code & 0x80u) << 24, rest = code & 0x7fu;
  if (rest == 0x7fu) return float_of_bits(sign | 0x7fc00000u);
  return float_of_bits(sign | rest << 20) * 0x1p120f;  // 120: the difference of the biases
}

// A boolean becomes what is added to a score: 0 where true, -inf where false.
template <class T>
FA_INLINE T load_one(const char* p, DType type) {
  switch (type) {
    case DType::f32: {
      float x;
      __builtin_memcpy(&x, p, 4);
      return static_cast<T>(x);
    }
    case DType::f64: {
      double x;
      __builtin_memcpy(&x, p, 8);
      return static_cast<T>(x);
    }
    case DType::bf16: {
      uint16_t x;
      __builtin_memcpy(&x, p, 2);
      return static_cast<T>(from_bf16(x));
    }
    case DType::f16: {
      uint16_t x;
      __builtin_memcpy(&x, p, 2);
      return static_cast<T>(from_f16(x));
    }
    case DType::i8:
      return static_cast<T>(static_cast<int8_t>(*p));
    case DType::e4m3:
      return static_cast<T>(from_e4m3(static_cast<uint8_t>(*p)));
    default:
      return *p ? T(0) : -kInf<T>;
  }
}

// n elements with unit stride.
template <class T>
[[maybe_unused]] static void load_row(T* __restrict dst, const char* __restrict p, DType type, int64_t n) {
  int64_t i = 0;
  switch (type) {
    case DType::f32: {
      const float* src = reinterpret_cast<const float*>(p);
      if (sizeof(T) == sizeof(float)) {
        __builtin_memcpy(dst, src, static_cast<size_t>(n) * sizeof(float));
      } else {
        for (; i < n; ++i) dst[i] = static_cast<T>(src[i]);
      }
      break;
    }
    case DType::f64: {
      const double* src = reinterpret_cast<const double*>(p);
      for (; i < n; ++i) dst[i] = static_cast<T>(src[i]);
      break;
    }
    case DType::bf16: {
      const uint16_t* src = reinterpret_cast<const uint16_t*>(p);
      for (; i < n; ++i) dst[i] = static_cast<T>(from_bf16(src[i]));
      break;
    }
    case DType::f16: {
      const uint16_t* src = reinterpret_cast<const uint16_t*>(p);
#if defined(__F16C__)
      if (sizeof(T) == sizeof(float)) {
        float* out = reinterpret_cast<float*>(dst);
        for (; i + 8 <= n; i += 8)
          _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i))));
      }
#endif
      for (; i < n; ++i) dst[i] = static_cast<T>(from_f16(src[i]));
      break;
    }
    case DType::boolean: {
      const uint8_t* src = reinterpret_cast<const uint8_t*>(p);
      for (; i < n; ++i) dst[i] = src[i] ? T(0) : -kInf<T>;
      break;
    }
    case DType::i8: {
      const int8_t* src = reinterpret_cast<const int8_t*>(p);
      for (; i < n; ++i) dst[i] = static_cast<T>(src[i]);
      break;
    }
    case DType::e4m3: {
      const uint8_t* src = reinterpret_cast<const uint8_t*>(p);
      for (; i < n; ++i) dst[i] = static_cast<T>(from_e4m3(src[i]));
      break;
    }
  }
}
template <class T>
[[maybe_unused]] static void load_strided(T* dst, const char* p, DType type, int64_t stride, int64_t n) {
  if (stride == 1) return load_row(dst, p, type, n);
  const int64_t step = stride * size_of(type);
  if (stride == 0) {
    const T x = n > 0 ? load_one<T>(p, type) : T(0);
    for (int64_t i = 0; i < n; ++i) dst[i] = x;
    return;
  }
  for (int64_t i = 0; i < n; ++i) dst[i] = load_one<T>(p + i * step, type);
}

// dst[i] = src[i] * factor, rounded once to the dtype.
template <class T>
[[maybe_unused]] static void store_row(char* __restrict p, DType type, const T* __restrict src, T factor, int64_t n) {
  int64_t i = 0;
  switch (type) {
    case DType::f32: {
      float* dst = reinterpret_cast<float*>(p);
      for (; i < n; ++i) dst[i] = static_cast<float>(src[i] * factor);
      break;
    }
    case DType::f64: {
      double* dst = reinterpret_cast<double*>(p);
      for (; i < n; ++i) dst[i] = static_cast<double>(src[i] * factor);
      break;
    }
    case DType::bf16: {
      uint16_t* dst = reinterpret_cast<uint16_t*>(p);
      for (; i < n; ++i) dst[i] = to_bf16(static_cast<float>(src[i] * factor));
      break;
    }
    default: {
      uint16_t* dst = reinterpret_cast<uint16_t*>(p);
#if defined(__F16C__)
      if (sizeof(T) == sizeof(float)) {
        const float* in = reinterpret_cast<const float*>(src);
        const __m256 by = _mm256_set1_ps(static_cast<float>(factor));
        for (; i + 8 <= n; i += 8)
          _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i),
                           _mm256_cvtps_ph(_mm256_mul_ps(_mm256_loadu_ps(in + i), by), _MM_FROUND_TO_NEAREST_INT));
      }
#endif
      for (; i < n; ++i) dst[i] = to_f16(static_cast<float>(src[i] * factor));
      break;
    }
  }
}
// One value of the dtype of lse, which is the compute type.
template <class T>
FA_INLINE T* element(const Tensor& t, int64_t a, int64_t b, int64_t c) {
  return static_cast<T*>(t.data) + a * t.stride[0] + b * t.stride[1] + c * t.stride[2];
}
// Address of an element in a tensor of any dtype.
FA_INLINE char* address(const Tensor& t, int64_t a, int64_t b, int64_t c, int64_t d = 0) {
  return static_cast<char*>(t.data) +
         (a * t.stride[0] + b * t.stride[1] + c * t.stride[2] + d * t.stride[3]) * size_of(t.dtype);
}

FA_END
