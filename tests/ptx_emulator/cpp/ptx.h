// What translated PTX is written in: calls into the runtime, and scalar operations.
//
// Registers are unsigned integers that hold bits; an operation reads them as the type that its PTX suffix names.
// Section numbers are those of the PTX ISA 9.0.
#pragma once
#include "numbers.h"

namespace ptx {

struct Thread {
  const u8* params;
  u64* counts;  // how often each basic block was entered
  u32 tid[3], ntid[3], ctaid[3], nctaid[3], cluster_ctaid[3], cluster_nctaid[3], clusterid[3], nclusterid[3];
  u32 lane, warp, warps, cluster_rank, cluster_size;
  u32 dynamic_start, dynamic_shared, total_shared;  // bytes of shared memory
};
typedef void (*Entry)(Thread*);

// --- memory --------------------------------------------------------------------------------------------------------
// Checked host addresses. data: what will be stored there, or nullptr. A generic address with SHARED_WINDOW in its top
// byte lies in shared memory; a shared address has 1 + the CTA's rank in its top byte, or 0 for the own CTA.
const u64 SHARED_WINDOW = 0xFF00000000000000ull;
enum How { READ = 0, WRITE = 1, ATOMIC = 2 };
u8* reach(Thread*, u64 address, u32 bytes, int how, const void* data, u32 site, u32 line);
u8* reach_shared(Thread*, u32 address, u32 bytes, int how, const void* data, u32 site, u32 line);
void synchronize_location(Thread*, u64 address, bool acquires, bool releases);
u32 mapa(Thread*, u32 address, u32 rank, u32 line);

// --- warps and barriers --------------------------------------------------------------------------------------------
enum Collective {
  // clang-format off
  UP, DOWN, BFLY, IDX, VOTE_ALL, VOTE_ANY, VOTE_UNI, VOTE_BALLOT, MATCH_ANY, MATCH_ALL, ELECT,
  REDUX_ADD, REDUX_MIN, REDUX_MAX, REDUX_SMIN, REDUX_SMAX, REDUX_AND, REDUX_OR, REDUX_XOR, REDUX_SADD = REDUX_ADD
  // clang-format on
};
enum Reduction { NONE, POPC, AND, OR };
u32 collect(Thread*, Collective, u64 a, u32 b, u32 c, u32 mask, bool* flag, u32 line);
void warp_barrier(Thread*, u32 mask, u32 line);
u32 barrier(Thread*, u32 id, u32 count, bool wait, Reduction, bool predicate, u32 line);
void cluster_arrive(Thread*, bool releases, u32 line);
void cluster_wait(Thread*, bool acquires, u32 line);

// --- matrices ------------------------------------------------------------------------------------------------------
enum Format { T_F16, T_BF16, T_TF32, T_E4M3, T_E5M2, T_S8, T_U8, T_F32, T_S32 };
struct Wgmma {
  int n;
  Format a_type, b_type, d_type;
  u32* registers;  // of this thread: all that a wgmma of the kernel names
  const u16* d;    // which of them
  const u16* a;    // which of them; nullptr: A lies in shared memory
  u64 a_descriptor, b_descriptor;
  bool scale_d, a_transposed, b_transposed;
  int scale_a, scale_b;  // 1 or -1
  u32 line;
};
void ldmatrix(Thread*, u32 address, int count, bool transposed, u32* d, u32 line);
void stmatrix(Thread*, u32 address, int count, bool transposed, const u32* a, u32 line);
u32 movmatrix(Thread*, u32 a, u32 line);
void mma(Thread*, int k, Format a_type, Format b_type, Format c_type, Format d_type, bool saturate, u32* d,
         const u32* a, const u32* b, const u32* c, u32 line);
void wgmma(Thread*, const Wgmma&);
void wgmma_commit(Thread*, u32 line);
void wgmma_wait(Thread*, u32 pending, u32 line);

// --- asynchronous copies -------------------------------------------------------------------------------------------
enum Reduce { COPY, ADD, MIN, MAX };
enum Bulk { SHARED_FROM_GLOBAL, GLOBAL_FROM_SHARED, SHARED_FROM_SHARED };
void cp_async(Thread*, u32 to, u64 from, u32 bytes, u32 source_bytes, u32 site, u32 line);
void cp_async_commit(Thread*);
void cp_async_wait(Thread*, u32 pending, u32 line);
void cp_async_arrive(Thread*, u64 barrier, bool counted, u32 line);
void mbarrier_init(Thread*, u64 address, u32 count, u32 line);
void mbarrier_inval(Thread*, u64 address, u32 line);
void mbarrier_expect(Thread*, u64 address, u32 bytes, bool complete, u32 line);
u64 mbarrier_arrive(Thread*, u64 address, u32 count, u32 bytes, bool releases, bool drop, u32 line);
bool mbarrier_wait(Thread*, u64 address, u64 state, bool parity, bool acquires, u32 line);
void tma_load(Thread*, u64 to, u64 map, int rank, const s32* at, u64 barrier, u32 multicast, u32 line);
void tma_store(Thread*, u32 from, u64 map, int rank, const s32* at, Reduce, u32 line);
void bulk_copy(Thread*, Bulk, u64 to, u64 from, u32 bytes, u64 barrier, u32 multicast, Reduce, Format, u32 line);
void bulk_commit(Thread*);
void bulk_wait(Thread*, u32 pending);

[[noreturn]] void trap(Thread*, const char* why, u32 line);
void nap(Thread*);
u64 clock_ticks(Thread*);
// An operation in another direction than to nearest: + - * / f(ma) r(eciprocal) s(quare root).
template <class F>
F rounded(char op, F a, F b, F c, Rounding);

// --- bits ----------------------------------------------------------------------------------------------------------
static inline float f32(u32 r) { return bits<float>(r); }
static inline double f64(u64 r) { return bits<double>(r); }
static inline u32 b(float x) { return bits<u32>(x); }
static inline u64 b(double x) { return bits<u64>(x); }
static inline u64 join64(u32 low, u32 high) { return low | u64(high) << 32; }
static inline u32 join32(u32 low, u32 high) { return (low & 0xFFFF) | high << 16; }

// --- 9.7.1, 9.7.8 integers -----------------------------------------------------------------------------------------
template <class T>
static inline bool negative_one(T y) {
  return T(-1) < T(0) && y == T(-1);
}
template <class T>
static inline T divide(T x, T y) {  // by zero: all bits set, as the hardware has it
  return y == 0 ? T(-1) : negative_one(y) ? T(-x) : T(x / y);
}
template <class T>
static inline T remainder(T x, T y) {
  return y == 0 ? x : negative_one(y) ? T(0) : T(x % y);
}
template <class T>
static inline T smaller(T x, T y) {
  return x < y ? x : y;
}
template <class T>
static inline T larger(T x, T y) {
  return x > y ? x : y;
}
template <class T>
static inline T shift_left(T x, u32 n) {  // 9.7.8.8: n may be the width or more
  return n >= sizeof(T) * 8 ? T(0) : T(x << n);
}
template <class T>
static inline T shift_right(T x, u32 n) {
  const u32 width = sizeof(T) * 8;
  return n < width ? T(x >> n) : T(-1) < T(0) ? T(x >> (width - 1)) : T(0);
}
static inline u32 funnel_left(u32 low, u32 high, u32 n) { return u32(join64(low, high) << n >> 32); }
static inline u32 funnel_right(u32 low, u32 high, u32 n) { return u32(join64(low, high) >> n); }
static inline s64 short24(s32 x) { return s64(x) << 40 >> 40; }
static inline u64 short24(u32 x) { return x & 0xFFFFFF; }
template <class T>
static inline T extract(T x, u32 position, u32 length) {  // 9.7.1.19 bfe
  const u32 width = sizeof(T) * 8;
  position &= 255, length &= 255;
  if (length == 0) return 0;
  const u32 top = smaller(position + length - 1, width - 1);
  const u128 field = position < width ? u128(u64(x) & (~u64(0) >> (64 - width))) >> position : 0;
  const bool negative = T(-1) < T(0) && (x >> top & 1);
  const u128 mask = (u128(1) << smaller(length, u32(64))) - 1;
  const u32 kept = top < position ? 0 : top - position;  // the sign goes on from here
  return T(negative ? (field & mask) | ~((u128(1) << kept) - 1) : field & mask);
}
template <class T>
static inline T insert(T a, T into, u32 position, u32 length) {  // 9.7.1.20 bfi
  position &= 255, length &= 255;
  if (position >= sizeof(T) * 8) return into;
  const u128 mask = ((u128(1) << smaller(length, u32(64))) - 1) << position;
  return T((into & ~mask) | (u128(a) << position & mask));
}
static inline u32 permute(u32 a, u32 b, u32 selector) {  // 9.7.9.7 prmt
  u32 d = 0;
  for (int i = 0; i < 4; i++) {
    const u32 s = selector >> (4 * i), byte = u32(join64(a, b) >> (8 * (s & 7))) & 255;
    d |= (s & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);
  }
  return d;
}
static inline u32 permute_as(u32 a, u32 b, u32 c, const char* mode) {  // f4e b4e rc8 ecl ecr rc16
  static const u32 forward[4] = {0x3210, 0x4321, 0x5432, 0x6543}, back[4] = {0x5670, 0x6701, 0x7012, 0x0123},
                   left[4] = {0x3210, 0x3211, 0x3222, 0x3333}, right[4] = {0x0000, 0x1110, 0x2210, 0x3210};
  const u32 i = c & 3, replicated = mode[2] == '8' ? 0x1111 * i : i & 1 ? 0x3232 : 0x1010;
  const u32 edge = mode[2] == 'l' ? left[i] : right[i];
  return permute(a, b, mode[0] == 'f' ? forward[i] : mode[0] == 'b' ? back[i] : mode[0] == 'e' ? edge : replicated);
}
static inline u32 logic3(u32 a, u32 b, u32 c, u32 table) {  // 9.7.8.6 lop3
  u32 d = 0;
  for (int i = 0; i < 8; i++)
    if (table >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return d;
}
template <class T>
static inline T reverse(T x) {
  T d = 0;
  for (u32 i = 0; i < sizeof(T) * 8; i++) d |= (x >> i & 1) << (sizeof(T) * 8 - 1 - i);
  return d;
}
template <class T>
static inline u32 leading_zeros(T x) {
  return x ? u32(__builtin_clzll(u64(x))) - (64 - sizeof(T) * 8) : sizeof(T) * 8;
}
template <class T>
static inline u32 highest_bit(T x, bool as_shift) {  // 9.7.1.16 bfind: of a negative number, the highest zero
  const u64 found = T(-1) < T(0) && x < 0 ? u64(T(~x)) : u64(x);
  const u32 position = 63 - u32(found ? __builtin_clzll(found) : 0);
  return !found ? ~0u : as_shift ? sizeof(T) * 8 - 1 - position : position;
}
template <class A, class B>
static inline s32 dot(u32 a, u32 b, s32 c) {
  for (u32 i = 0; i < 4 / sizeof(A); i++) c += s32(A(a >> (8 * sizeof(A) * i))) * s32(B(b >> (8 * i)));
  return c;
}
template <class T>
static inline T clamp(s128 x) {
  const s128 low = T(-1) < T(0) ? -(s128(1) << (sizeof(T) * 8 - 1)) : 0;
  const s128 high = low + (s128(1) << (sizeof(T) * 8)) - 1;
  return T(x < low ? low : x > high ? high : x);
}

// --- 9.7.3, 9.7.4 floating point -----------------------------------------------------------------------------------
static inline float flush(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0, x) : x; }
static inline double saturate(double x) { return x > 0 ? (x < 1 ? x : 1) : 0; }  // NaN becomes 0
static inline double relu(double x) { return x != x || x > 0 ? x : 0.0; }
template <class T>
static inline T least(T x, T y, bool nan) {  // NaN loses unless .NaN; -0 is less than +0
  if (x != x || y != y) return nan || (x != x && y != y) ? T(__builtin_nan("")) : x != x ? y : x;
  return x == y ? (__builtin_signbit(x) ? x : y) : x < y ? x : y;
}
template <class T>
static inline T greatest(T x, T y, bool nan) {
  return -least(-x, -y, nan);
}
static inline float fma_of(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
static inline double fma_of(double x, double y, double z) { return __builtin_fma(x, y, z); }
static inline float root(float x) { return __builtin_sqrtf(x); }
static inline double root(double x) { return __builtin_sqrt(x); }
// Accurate where the hardware approximates: its last bits are not modelled.
static inline float exp2_approx(float x) { return __builtin_exp2f(x); }
static inline float log2_approx(float x) { return __builtin_log2f(x); }
static inline float tanh_approx(float x) { return __builtin_tanhf(x); }
static inline float sin_approx(float x) { return __builtin_sinf(x); }
static inline float cos_approx(float x) { return __builtin_cosf(x); }
static inline double rint_of(double x) { return __builtin_rint(x); }
static inline double trunc_of(double x) { return __builtin_trunc(x); }
static inline double floor_of(double x) { return __builtin_floor(x); }
static inline double ceil_of(double x) { return __builtin_ceil(x); }

// 9.7.9.21 cvt: clamps; NaN becomes 0, or the top bit alone where either type has 64 bits.
template <class T>
static inline T to_integer(double x, Rounding mode, bool wide) {
  x = mode == RN ? rint_of(x) : mode == RZ ? trunc_of(x) : mode == RM ? floor_of(x) : ceil_of(x);
  if (x != x) return wide ? T(u64(1) << (sizeof(T) * 8 - 1)) : T(0);
  return clamp<T>(x > 1e30 ? s128(1) << 100 : x < -1e30 ? -(s128(1) << 100) : s128(x));
}

}  // namespace ptx
