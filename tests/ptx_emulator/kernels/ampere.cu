// Small kernels for sm_80 that the emulator is tested on; ampere.ptx is what nvcc made of them:
//   nvcc -ptx -arch=sm_80 -o ampere.ptx ampere.cu
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

using bf16 = __nv_bfloat16;

__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// C [M, N] = A [M, K] B [K, N] with row-major bf16 operands, K a multiple of 32, N of 64; a block takes 64 x 64 of C,
// a warp 16 x 64. Three stages of A [64, 32] and B [32, 64] by cp.async; chunks of 16 bytes are exchanged so that the
// rows of a matrix that ldmatrix reads lie in different banks.
constexpr int STAGES = 3;

__device__ __forceinline__ int a_offset(int row, int chunk) { return row * 32 + (chunk ^ (row >> 1 & 3)) * 8; }
__device__ __forceinline__ int b_offset(int row, int chunk) { return row * 64 + (chunk ^ (row & 7)) * 8; }

__device__ __forceinline__ void copy16(bf16* to, const bf16* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(inside ? 16 : 0));
}

extern "C" __global__ void __launch_bounds__(128)
    product(const bf16* __restrict__ a, const bf16* __restrict__ b, float* __restrict__ c, int m, int n, int k) {
  extern __shared__ __align__(128) bf16 tiles[];
  bf16 *as = tiles, *bs = tiles + STAGES * 64 * 32;
  const int t = threadIdx.x, lane = t % 32, warp = t / 32, row0 = blockIdx.y * 64, col0 = blockIdx.x * 64;

  auto load = [&](int stage, int k0) {
    for (int i = t; i < 256; i += 128) {
      int ra = i / 4, rb = i / 8;
      bool inside = row0 + ra < m && k0 < k;
      copy16(as + stage * 2048 + a_offset(ra, i % 4), a + (inside ? (size_t)(row0 + ra) * k + k0 + i % 4 * 8 : 0),
             inside);
      copy16(bs + stage * 2048 + b_offset(rb, i % 8), b + (k0 < k ? (size_t)(k0 + rb) * n + col0 + i % 8 * 8 : 0),
             k0 < k);
    }
    asm volatile("cp.async.commit_group;");
  };

  float acc[8][4] = {};
  load(0, 0);
  load(1, 32);
  for (int k0 = 0, stage = 0; k0 < k; k0 += 32, stage = (stage + 1) % STAGES) {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    __syncthreads();
    load((stage + 2) % STAGES, k0 + 64);
    for (int step = 0; step < 2; step++) {
      uint32_t x[4];
      const bf16* p = as + stage * 2048 + a_offset(warp * 16 + lane % 16, step * 2 + lane / 16);
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                   : "r"(shared_address(p))
                   : "memory");
      for (int j = 0; j < 8; j++) {
        uint32_t y[2];
        const bf16* q = bs + stage * 2048 + b_offset(step * 16 + lane % 16, j);
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                     : "=r"(y[0]), "=r"(y[1])
                     : "r"(shared_address(q))
                     : "memory");
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(acc[j][0]), "+f"(acc[j][1]), "+f"(acc[j][2]), "+f"(acc[j][3])
            : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
      }
    }
  }
  for (int j = 0; j < 8; j++)
    for (int half = 0; half < 2; half++) {
      int row = row0 + warp * 16 + lane / 4 + half * 8;
      if (row < m)
        *(float2*)(c + (size_t)row * n + col0 + j * 8 + lane % 4 * 2) =
            make_float2(acc[j][2 * half], acc[j][2 * half + 1]);
    }
}

// out [32 warps' lanes] = in of the lane to the right, through shared memory.
extern "C" __global__ void exchange(const float* in, float* out) {
  __shared__ float row[4][32];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  row[warp][lane] = in[threadIdx.x];
  __syncwarp();
  out[threadIdx.x] = row[warp][(lane + 1) % 32];
}

// Transposes [32, 32] through shared memory, with rows of 32 (every column in one bank) or 33 words.
extern "C" __global__ void transpose(const float* in, float* out, int padded) {
  extern __shared__ float cells[];
  int width = padded ? 33 : 32, x = threadIdx.x, y = threadIdx.y;
  for (int i = y; i < 32; i += 8) cells[i * width + x] = in[i * 32 + x];
  __syncthreads();
  for (int i = y; i < 32; i += 8) out[i * 32 + x] = cells[x * width + i];
}

// Warps 0 to 3 hand tiles of 128 floats to warps 4 to 7 through two buffers: named barriers 1, 2 (full), 3, 4 (empty).
extern "C" __global__ void handover(const float* in, float* out, int tiles) {
  __shared__ float buffer[2][128];
  int t = threadIdx.x % 128;
  for (int i = 0; i < tiles; i++) {
    int full = 1 + i % 2, empty = 3 + i % 2;
    if (threadIdx.x < 128) {
      if (i >= 2) asm volatile("barrier.sync %0, 256;" ::"r"(empty) : "memory");
      buffer[i % 2][t] = 2 * in[i * 128 + t];
      asm volatile("barrier.arrive %0, 256;" ::"r"(full) : "memory");
    } else {
      asm volatile("barrier.sync %0, 256;" ::"r"(full) : "memory");
      out[i * 128 + t] = buffer[i % 2][127 - t];
      if (i + 2 < tiles) asm volatile("barrier.arrive %0, 256;" ::"r"(empty) : "memory");
    }
  }
}

__device__ __noinline__ float scaled(float x, float by) { return x * by + 1; }
__constant__ float weights[4] = {1, 2, 4, 8};

// What nvcc makes of ordinary code: math functions, 64-bit arithmetic, a local array, a table, a call, atomics.
extern "C" __global__ void ordinary(const float* in, float* out, int* histogram, long long* total, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  float found[8], x = i < n ? in[i] : 0;
  found[0] = expf(x) + log1pf(fabsf(x)), found[1] = tanhf(x), found[2] = sinf(x * 100), found[3] = erff(x);
  found[4] = sqrtf(fabsf(x)) / (1 + x * x), found[5] = scaled(x, weights[i & 3]), found[6] = powf(fabsf(x), 1.5f);
  found[7] = (float)((double)x * 3.25 - floor((double)x));
  long long fixed = llrintf(x * 65536.0f), part = fixed / (i + 7) * (i + 7) + fixed % (i + 7);
  for (int step = 16; step; step /= 2) part += __shfl_xor_sync(0xFFFFFFFF, part, step);
  if (threadIdx.x == 0) atomicAdd((unsigned long long*)total, (unsigned long long)part);
  if (i < n) {
    out[i] = found[i & 7];
    atomicAdd(&histogram[__float2int_rd(x) & 3], 1);
  }
}

// Half-precision arithmetic as cuda_fp16.h and cuda_bf16.h write it.
extern "C" __global__ void halves(const __half2* x, const __half2* y, __half2* out, const __nv_bfloat162* u,
                                  const __nv_bfloat162* v, __nv_bfloat162* found) {
  int i = threadIdx.x;
  out[i] = __hfma2(x[i], y[i], __hmax2(x[i], __hneg2(y[i]))) + h2sqrt(__habs2(x[i])) - __hmul2(x[i], y[i]);
  found[i] = __hfma2(u[i], v[i], __hmin2(u[i], __hneg2(v[i]))) + __habs2(u[i]) - __hmul2(u[i], v[i]);
}
