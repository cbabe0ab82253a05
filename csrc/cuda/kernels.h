// The kernels of a source file by name, and what such a file instantiates: FA_HEAD_DIMS(X) is X(head dim) for all head
// dims, FA_DTYPES(X, ...) is X(name, type, ...) for all dtypes. A compilation may ask for one of them:
// -DFA_HEAD_DIM=64 -DFA_DTYPE=bf16.
#pragma once

#ifdef FA_HEAD_DIM
  #define FA_HEAD_DIMS(X) X(FA_HEAD_DIM)
  #define FA_BACKWARD_DIMS(X) X(FA_HEAD_DIM)
  #define FA_ADDITIVE_DIMS(X) X(FA_HEAD_DIM)
  #define FA_DECODE_DIMS(X) X(FA_HEAD_DIM)
  #define FA_HOPPER_DIMS(X) X(FA_HEAD_DIM)
  #if FA_HEAD_DIM <= 128
    #define FA_TOGETHER_DIMS(X) X(FA_HEAD_DIM)
    #define FA_APART_DIMS(X)
    #define FA_HOPPER_TOGETHER_DIMS(X) X(FA_HEAD_DIM)
    #define FA_HOPPER_APART_DIMS(X)
  #else
    #define FA_TOGETHER_DIMS(X)
    #define FA_APART_DIMS(X) X(FA_HEAD_DIM)
    #define FA_HOPPER_TOGETHER_DIMS(X)
    #define FA_HOPPER_APART_DIMS(X) X(FA_HEAD_DIM)
  #endif
#else  // those of tiles.h
  #define FA_HEAD_DIMS(X) X(32) X(64) X(96) X(128) X(160) X(192) X(224) X(256)
  #define FA_BACKWARD_DIMS(X) X(32) X(64) X(96) X(128) X(192) X(256)
  #define FA_TOGETHER_DIMS(X) X(32) X(64) X(96) X(128)
  #define FA_APART_DIMS(X) X(192) X(256)
  #define FA_ADDITIVE_DIMS(X) X(64) X(128) X(256)
  #define FA_DECODE_DIMS(X) X(64) X(128) X(256)
  #define FA_HOPPER_DIMS(X) X(64) X(128) X(256)
  #define FA_HOPPER_TOGETHER_DIMS(X) X(64) X(128)
  #define FA_HOPPER_APART_DIMS(X) X(256)
#endif

#define FA_TYPE_bf16 Bf16
#define FA_TYPE_f16 Half
#define FA_TYPE2(dtype) FA_TYPE_##dtype
#define FA_TYPE(dtype) FA_TYPE2(dtype)
#ifdef FA_DTYPE
  #define FA_DTYPES(X, ...) X(FA_DTYPE, FA_TYPE(FA_DTYPE), __VA_ARGS__)
#else
  #define FA_DTYPES(X, ...) X(bf16, Bf16, __VA_ARGS__) X(f16, Half, __VA_ARGS__)
#endif

// Threads of a CTA, and of how many CTAs a multiprocessor must hold the registers: 255 a thread, as many as there can be.
// Without the second number ptxas aims at more CTAs, and spills a register or two to reach them.
#define FA_BOUNDS(warps) __launch_bounds__(32 * (warps), 65536 / (255 * 32 * (warps)))

// A kernel whose code is `run` on its argument `p` and `shared` memory, and its line in a list.
#define FA_KERNEL(name, Params, warps, ...)                                            \
  extern "C" __global__ void FA_BOUNDS(warps) name(const __grid_constant__ Params p) { \
    extern __shared__ __align__(128) char shared[];                                    \
    __VA_ARGS__;                                                                       \
  }

// One for sm_90, whose warpgroups share out the registers among themselves; tiles of tensor maps lie at multiples of 1024.
#define FA_HOPPER_KERNEL(name, Params, ...)                                                                   \
  extern "C" __global__ void __launch_bounds__(32 * kHopperWarps, 1) name(const __grid_constant__ Params p) { \
    extern __shared__ __align__(1024) char shared[];                                                          \
    __VA_ARGS__;                                                                                              \
  }
#define FA_LIST(name) {#name, reinterpret_cast<const void*>(name)},

namespace fused_attention::cuda {

struct Kernel {
  const char* name;
  const void* function;  // null ends a list
};

extern const Kernel kForwardSm80[];
extern const Kernel kKeyGradientSm80[];
extern const Kernel kQueryGradientSm80[];
extern const Kernel kDecodeSm80[];
extern const Kernel kForwardSm90[];
extern const Kernel kForwardFp8Sm90[];
extern const Kernel kQuantiseSm90[];
extern const Kernel kKeyGradientSm90[];
extern const Kernel kQueryGradientSm90[];

}  // namespace fused_attention::cuda
