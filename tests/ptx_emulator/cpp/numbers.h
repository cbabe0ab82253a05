// Floating-point formats below 32 bits, and rounding in every direction.
#pragma once
#include <stdint.h>

namespace ptx {

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;
typedef __int128 s128;
typedef unsigned __int128 u128;

template <class To, class From>
static inline To bits(From x) {
  return __builtin_bit_cast(To, x);
}
static inline double power_of_two(int e) { return bits<double>(u64(e + 1023) << 52); }

enum Rounding { RN, RZ, RM, RP, RNA };  // nearest even, toward zero, down, up, nearest with ties away from zero

// Exponent bits, mantissa bits, bits in all. e4m3 has no infinity, and NaN only where all bits but the sign are set
// (PTX ISA 5.2.3 "Alternate Floating-Point Data Formats").
template <int EXPONENT, int MANTISSA, int BITS, bool INFINITE = true>
struct Float {
  static const int E = EXPONENT, M = MANTISSA, SIGN = BITS - 1, BIAS = (1 << (EXPONENT - 1)) - 1;
  static const bool HAS_INFINITY = INFINITE;
  static const u32 TOP = ((1u << E) - 1) << M;  // infinity, where there is one
  static const u32 LARGEST = INFINITE ? TOP - 1 : TOP + (1u << M) - 2;
  static const u32 NOT_A_NUMBER = TOP + (1u << M) - 1;
};
typedef Float<5, 10, 16> F16;
typedef Float<8, 7, 16> BF16;
typedef Float<4, 3, 8, false> E4M3;
typedef Float<5, 2, 8> E5M2;
typedef Float<8, 10, 19> TF32;
typedef Float<8, 23, 32> F32;

// A double as a number of format F; saturate: what is too large becomes the largest finite number.
template <class F>
u32 encode(double x, Rounding mode = RN, bool saturate = false) {
  if (x != x) return F::NOT_A_NUMBER;
  const u32 sign = u32(bits<u64>(x) >> 63);
  const double size = __builtin_fabs(x);
  int exponent = int(bits<u64>(size) >> 52) - 1023;
  exponent = exponent < 1 - F::BIAS ? 1 - F::BIAS : exponent > F::BIAS + 1 ? F::BIAS + 1 : exponent;
  const double scaled = size * power_of_two(F::M - exponent), down = __builtin_trunc(scaled), rest = scaled - down;
  const bool up = mode == RN    ? rest > 0.5 || (rest == 0.5 && __builtin_fmod(down, 2) != 0)
                  : mode == RNA ? rest >= 0.5
                                : mode != RZ && rest > 0 && (mode == RP) == (sign == 0);
  // Mantissa in units of the last place; where it overflows, the exponent counts up.
  const double steps = down + up, most = power_of_two(F::M + 1);
  u32 code = (u32(exponent + F::BIAS - 1) << F::M) + u32(steps < most ? steps : most);
  if (code > F::LARGEST) {
    const bool cut = (mode == RZ || mode == (sign ? RP : RM)) && size - size == 0;
    code = saturate || cut ? F::LARGEST : F::HAS_INFINITY ? F::TOP : F::NOT_A_NUMBER;
  }
  return sign << F::SIGN | code;
}

template <class F>
float decode(u32 code) {
  const u32 exponent = code >> F::M & ((1u << F::E) - 1), mantissa = code & ((1u << F::M) - 1);
  const u32 magnitude = code & ((1u << F::SIGN) - 1);
  double value = exponent ? (mantissa + power_of_two(F::M)) * power_of_two(int(exponent) - F::BIAS - F::M)
                          : mantissa * power_of_two(1 - F::BIAS - F::M);
  if (F::HAS_INFINITY ? magnitude > F::TOP : magnitude == F::NOT_A_NUMBER) value = __builtin_nan("");
  if (F::HAS_INFINITY && magnitude == F::TOP) value = __builtin_inf();
  return float(code >> F::SIGN & 1 ? -value : value);
}

static inline float bf16(u32 code) { return bits<float>(code << 16); }
static inline u16 to_bf16(float x) {
  const u32 b = bits<u32>(x);
  return x != x ? 0x7FFF : u16((b + 0x7FFF + (b >> 16 & 1)) >> 16);
}
#ifdef __F16C__
static inline float f16(u32 code) { return float(bits<_Float16>(u16(code))); }
static inline u16 to_f16(float x) { return x != x ? 0x7FFF : bits<u16>(_Float16(x)); }
#else
static inline float f16(u32 code) { return decode<F16>(code & 0xFFFF); }
static inline u16 to_f16(float x) { return u16(encode<F16>(x)); }
#endif
static inline u16 to_f16(double x) { return u16(encode<F16>(x)); }
static inline u16 to_bf16(double x) { return u16(encode<BF16>(x)); }

// a b + c rounded to odd, so that to round it once more, to a format of at most half its mantissa, is exact.
static inline double fused(double a, double b, double c) {
  const double product = a * b, sum = product + c;  // the product of two short mantissas is exact
  const double back = sum - product, error = (product - (sum - back)) + (c - back);
  u64 s = bits<u64>(sum);
  if (error != 0 && sum - sum == 0 && !(s & 1)) s += (error > 0) == (sum > 0) ? 1 : -1;
  return bits<double>(s);
}

}  // namespace ptx
