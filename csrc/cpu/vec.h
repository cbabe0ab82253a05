// Vectors of one machine width by the compiler's vector extension, and the functions the softmax needs.
//
//   exp(x)  = 2^n (1 + p(r)),   n = round(x / ln 2), r = x - n ln 2, p(r) = exp(r) - 1 as a polynomial
//   tanh(x) = e / (e + 2),      e = exp(2x) - 1 = 2^n p(r) + (2^n - 1), which keeps the relative accuracy near 0
//   exp2(x) = 2^floor(x) q(f),  f = x - floor(x), q(f) = 2^f as a polynomial with q(0) = 1
//
// This header is compiled once per instruction set. All of it has internal linkage, so that the linker can
// never put a function compiled for a newer processor into the path of an older one.
#pragma once
#include <cstddef>
#include <cstdint>
#if defined(__AVX512DQ__)
  #include <immintrin.h>
#endif

#if defined(__AVX2__) || defined(__F16C__)
  #include <immintrin.h>
#endif

#ifndef FA_ISA
  #error "define FA_ISA as portable, avx2, avx512, avx512_bf16, amx or amx_emulated"
#endif

#define FA_INLINE [[maybe_unused]] static inline __attribute__((always_inline))
#define FA_OUTLINE [[maybe_unused]] static __attribute__((noinline))  // a loop of its own: its registers are its own
#define FA_BEGIN              \
  namespace fused_attention { \
  namespace FA_ISA {          \
  namespace {
#define FA_END \
  }            \
  }            \
  }

FA_BEGIN

// MR rows of C are held in registers, each two vectors wide: 2 MR accumulators, two vectors of B and one
// broadcast of A fill the 16 (AVX2), 32 (AVX-512, NEON) or 16 (SSE2: fewer, its multiply needs a copy) registers.
// The emulation of the matrix unit has the vectors of the processors that have one, in as many pieces as it takes.
#if defined(__AVX512F__) || defined(FA_PRODUCTS)
constexpr int kVectorBytes = 64, MR = 12;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, MR = 6;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, MR = 8;
#else
constexpr int kVectorBytes = 16, MR = 4;
#endif

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float vec __attribute__((vector_size(kVectorBytes)));
  typedef int32_t ivec __attribute__((vector_size(kVectorBytes)));
  using Int = int32_t;
};
template <>
struct Lanes<double> {
  typedef double vec __attribute__((vector_size(kVectorBytes)));
  typedef int64_t ivec __attribute__((vector_size(kVectorBytes)));
  using Int = int64_t;
};
template <class T>
using Vec = typename Lanes<T>::vec;
template <class T>
using IVec = typename Lanes<T>::ivec;
template <class T>
constexpr int VL = kVectorBytes / static_cast<int>(sizeof(T));
template <class T>
constexpr int NR = 2 * VL<T>;

typedef uint16_t HalfVec __attribute__((vector_size(kVectorBytes / 2)));  // VL<float> numbers of two bytes

template <class T>
constexpr T kInf = static_cast<T>(__builtin_inf());

template <class T>
FA_INLINE T min_of(T a, T b) {
  return b < a ? b : a;
}
template <class T>
FA_INLINE T max_of(T a, T b) {
  return a < b ? b : a;
}
FA_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
FA_INLINE int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

template <class T>
FA_INLINE Vec<T> load(const T* p) {
  Vec<T> r;
  __builtin_memcpy(&r, p, sizeof r);
  return r;
}
template <class T>
FA_INLINE void store(T* p, Vec<T> x) {
  __builtin_memcpy(p, &x, sizeof x);
}
template <class T>
FA_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // x - 0 is x for every x, and compiles to one broadcast
}
template <class T>
FA_INLINE IVec<T> bits(Vec<T> x) {
  return (IVec<T>)x;
}
template <class T>
FA_INLINE Vec<T> from_bits(IVec<T> x) {
  return (Vec<T>)x;
}

// VL numbers of 16 bits (filled up with zeros) or of 8 (with their sign), 32 bits each. By intrinsics, because GCC 12
// makes four instructions of the one that this is. The masks keep everything; the plain forms warn of an operand that
// GCC's own header leaves undefined.
FA_INLINE IVec<float> widen_16(const char* p) {
#if defined(__AVX512F__)
  return (IVec<float>)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (IVec<float>)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  typedef uint16_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
  Narrow x;
  __builtin_memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, IVec<float>);
#endif
}
FA_INLINE IVec<float> widen_8(const char* p) {
#if defined(__AVX512F__)
  return (IVec<float>)_mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (IVec<float>)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  typedef int8_t Narrow __attribute__((vector_size(kVectorBytes / 4)));
  Narrow x;
  __builtin_memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, IVec<float>);
#endif
}
typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes)));

// The larger; a NaN in `x` is passed over (it comes back through exp and the row sum).
template <class T>
FA_INLINE Vec<T> max_skip_nan(Vec<T> x, Vec<T> m) {
  return x > m ? x : m;
}
template <class T>
FA_INLINE T reduce_max(Vec<T> x) {
  T m = x[0];
  for (int i = 1; i < VL<T>; ++i) m = x[i] > m ? x[i] : m;
  return m;
}
template <class T>
FA_INLINE T reduce_add(Vec<T> x) {
  T lane[VL<T>];
  store<T>(lane, x);
  for (int half = VL<T> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

// The lower halves of a and b interleaved: a0 b0 a1 b1 ...
template <class T>
FA_INLINE Vec<T> interleave_low(Vec<T> a, Vec<T> b) {
  if constexpr (VL<T> == 2)
    return __builtin_shufflevector(a, b, 0, 2);
  else if constexpr (VL<T> == 4)
    return __builtin_shufflevector(a, b, 0, 4, 1, 5);
  else if constexpr (VL<T> == 8)
    return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  else
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
// The upper halves.
template <class T>
FA_INLINE Vec<T> interleave_high(Vec<T> a, Vec<T> b) {
  if constexpr (VL<T> == 2)
    return __builtin_shufflevector(a, b, 1, 3);
  else if constexpr (VL<T> == 4)
    return __builtin_shufflevector(a, b, 2, 6, 3, 7);
  else if constexpr (VL<T> == 8)
    return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  else
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
// One round: of 2 N vectors the first N hold the sums of two halves of each.
template <class T, int N>
FA_INLINE void sum_halves(Vec<T>* a) {
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) a[i] = interleave_low<T>(a[i], a[i + N]) + interleave_high<T>(a[i], a[i + N]);
  if constexpr (N > 1) sum_halves<T, N / 2>(a);
}
// Lane i: the sum of the lanes of a[i], for VL vectors, which are overwritten. The lanes of a vector are added by halves:
// i and i + VL / 2, of these sums i and i + VL / 4, and so on.
template <class T>
FA_INLINE Vec<T> sum_each(Vec<T>* a) {
  if constexpr (VL<T> == 8) {  // shuffles within halves of a register, where AVX2 has them: 21 instructions, not 35
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      a[i] = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11) +
             __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
#pragma GCC unroll 2
    for (int i = 0; i < 4; i += 2)
      a[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
             __builtin_shufflevector(a[i], a[i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    return __builtin_shufflevector(a[0], a[2], 0, 2, 8, 10, 4, 6, 12, 14) +
           __builtin_shufflevector(a[0], a[2], 1, 3, 9, 11, 5, 7, 13, 15);
  } else {
    sum_halves<T, VL<T> / 2>(a);
    return a[0];
  }
}

template <class T>
struct Exp;
template <>
struct Exp<float> {
  static constexpr float log2e = 1.44269504f, ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f;
  static constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  static constexpr float lowest = -87.33f;     // below it the result would be subnormal: 0
  static constexpr float tanh_cap = 20.0f;     // tanh(10) is 1 in float
  static constexpr int mantissa = 23, bias = 127;
  // exp(r) - 1 - r over r^2: Chebyshev fit on |r| <= ln 2 / 2, error 2.2e-8 relative to exp(r) - 1
  static constexpr float c[5] = {0x1.0000000b9945ap-1f, 0x1.5554dcbf73d5bp-3f, 0x1.5554e8d5a86f6p-5f,
                                 0x1.120ba6fc82ec2p-7f, 0x1.6d436652ca281p-10f};
};
template <>
struct Exp<double> {
  static constexpr double log2e = 1.44269504088896340736, ln2_hi = 6.93147180369123816490e-01,
                          ln2_lo = 1.90821492927058770002e-10;
  static constexpr double magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double lowest = -708.39;
  static constexpr double tanh_cap = 44.0;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double c[12] = {1. / 2,       1. / 6,        1. / 24,        1. / 120,
                                   1. / 720,     1. / 5040,     1. / 40320,     1. / 362880,
                                   1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800.};
};

template <class T>
struct Reduced {
  Vec<T> p, scale;  // exp(x) = scale * (1 + p)
};
template <class T>
FA_INLINE Reduced<T> reduce_exp(Vec<T> x) {
  using E = Exp<T>;
  const Vec<T> t = x * E::log2e + E::magic;
  const Vec<T> n = t - E::magic;
  const Vec<T> r = (x - n * E::ln2_hi) - n * E::ln2_lo;
  constexpr int terms = sizeof(E::c) / sizeof(T);
  Vec<T> y = splat<T>(E::c[terms - 1]);
#pragma GCC unroll 16
  for (int i = terms - 2; i >= 0; --i) y = y * r + E::c[i];
  const IVec<T> e = bits<T>(t) - bits<T>(splat<T>(E::magic)) + static_cast<typename Lanes<T>::Int>(E::bias);
  return {r + r * r * y, from_bits<T>(e << E::mantissa)};
}

// x <= 88 (float), 709 (double); exp(-inf) = 0; NaN stays NaN.
template <class T>
FA_INLINE Vec<T> vexp(Vec<T> x) {
  const Reduced<T> e = reduce_exp<T>(x);
  const Vec<T> y = e.scale + e.scale * e.p;
  return x < Exp<T>::lowest ? Vec<T>{} : y;
}
// 2^x for x <= 127, within 1.5e-7 of it (8.3e-8 by the polynomial, a minimax fit of the relative error on [0, 1], the
// rest by rounding); exp2(-inf) = 0; NaN stays NaN. In AVX-512 it is seven instructions, and a result may be subnormal;
// elsewhere it is 0 then.
FA_INLINE Vec<float> vexp2(Vec<float> x) {
#if defined(__AVX512DQ__)
  constexpr int kFloor = 1 | 8;  // the rounding, and no exception for it
  const Vec<float> f = (Vec<float>)_mm512_reduce_ps((__m512)x, kFloor);
#else
  const Vec<float> clamped = x < -127.0f ? splat<float>(-127.0f) : x;
  const Vec<float> nearest = (clamped + Exp<float>::magic) - Exp<float>::magic;
  const Vec<float> n = nearest > clamped ? nearest - 1.0f : nearest, f = clamped - n;
#endif
  Vec<float> q = f * 0x1.e974fep-10f + 0x1.277854p-7f;
  q = q * f + 0x1.c91ce6p-5f;
  q = q * f + 0x1.ebdb56p-3f;
  q = q * f + 0x1.62e4bap-1f;
  q = q * f + 1.0f;
#if defined(__AVX512DQ__)
  return (Vec<float>)_mm512_maskz_scalef_ps(0xffff, (__m512)q, (__m512)x);  // as widen_16
#else
  const IVec<float> exponent = bits<float>(n + (Exp<float>::magic + 127.0f)) << 23;
  return q * from_bits<float>(exponent & 0x7f800000);
#endif
}

template <class T>
FA_INLINE Vec<T> vtanh(Vec<T> x) {
  const IVec<T> sign = bits<T>(x) & bits<T>(splat<T>(static_cast<T>(-0.0)));
  const Vec<T> twice = 2 * from_bits<T>(bits<T>(x) ^ sign);
  const Vec<T> cap = splat<T>(Exp<T>::tanh_cap);
  const Reduced<T> e = reduce_exp<T>(twice > cap ? cap : twice);
  const Vec<T> m = e.scale * e.p + (e.scale - 1);
  return from_bits<T>(bits<T>(m / (m + 2)) | sign);
}
template <class T>
FA_INLINE T exp1(T x) {  // one value, by the same routine
  return vexp<T>(splat<T>(x))[0];
}

FA_END
