// Small kernels for sm_90a that the emulator is tested on; hopper.ptx is what nvcc made of them:
//   nvcc -ptx -arch=sm_90a -o hopper.ptx hopper.cu
#include <cuda_bf16.h>
#include <stdint.h>

using bf16 = __nv_bfloat16;

struct alignas(64) TensorMap {
  char bytes[128];
};

// What tests change to plant a bug; right values: 1024, 0, 16384, 0, 0.
struct Knobs {
  int stride_offset;  // of the wgmma descriptors, bytes
  int parity;         // added to the parity that consumers wait for
  int bytes;          // that the full barrier expects
  int skip_full, skip_empty;
};

__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}
__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra finished;\nbra again;\nfinished:\n}" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void load_tile(uint32_t to, const TensorMap& map, int x, int y, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          to),
      "l"(&map), "r"(x), "r"(y), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ uint64_t descriptor(uint32_t address, int leading, int stride) {
  return (uint64_t)(address >> 4 & 0x3FFF) | (uint64_t)(leading >> 4) << 16 | (uint64_t)(stride >> 4) << 32 |
         1ull << 62;
}

// D [64, 64] += A [64, 16] B [16, 64], both in shared memory with 128-byte swizzle: A K-major, B MN-major.
__device__ __forceinline__ void wgmma_64x64(float (&d)[32], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%"
      "30,%31}, "
      "%32, %33, 1, 1, 1, 0, 1;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "l"(a), "l"(b));
}

// C [M, N] = A [M, K] B [K, N] in bf16: a block takes 64 x 64 of C. Warp 4 loads tiles of A [64, 64] and B [64, 64] by
// TMA through two stages, warps 0 to 3 multiply; what is outside of the tensors reads as 0 and is not stored.
extern "C" __global__ void __launch_bounds__(160)
    product(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
            const __grid_constant__ TensorMap c, int k, Knobs knobs) {
  extern __shared__ __align__(1024) uint8_t tiles[];  // two stages of A and B, then C, 8 KiB each
  __shared__ __align__(8) uint64_t barriers[4];       // full of stage 0, 1; empty of stage 0, 1
  const uint32_t base = shared_address(tiles), full = shared_address(barriers), empty = full + 16;
  const int t = threadIdx.x, warp = t / 32, row0 = blockIdx.y * 64, col0 = blockIdx.x * 64, steps = (k + 63) / 64;
  if (t == 0)
    for (int i = 0; i < 2; i++) init(full + 8 * i, 1), init(empty + 8 * i, 4);
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  __syncthreads();
  if (warp == 4) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (t % 32 == 0)
      for (int i = 0; i < steps; i++) {
        int stage = i % 2;
        if (i >= 2 && !knobs.skip_empty) wait(empty + 8 * stage, (i / 2 - 1) & 1);
        expect(full + 8 * stage, knobs.bytes);
        load_tile(base + stage * 16384, a, i * 64, row0, full + 8 * stage);
        load_tile(base + stage * 16384 + 8192, b, col0, i * 64, full + 8 * stage);
      }
    return;
  }
  float acc[32] = {};
  for (int i = 0; i < steps; i++) {
    int stage = i % 2;
    if (!knobs.skip_full) wait(full + 8 * stage, (i / 2 + knobs.parity) & 1);
    uint64_t da = descriptor(base + stage * 16384, 0, knobs.stride_offset);
    uint64_t db = descriptor(base + stage * 16384 + 8192, 8192, knobs.stride_offset);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    for (int step = 0; step < 4; step++) wgmma_64x64(acc, da + (step * 32 >> 4), db + (step * 2048 >> 4));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    if (t % 32 == 0) arrive(empty + 8 * stage);
  }
  for (int j = 0; j < 16; j++) {  // pairs of columns: C in shared memory, swizzled as its tensor map says
    int row = warp * 16 + t % 32 / 4 + j % 2 * 8, chunk = j / 2;
    uint32_t to = base + 32768 + row * 128 + (chunk ^ (row & 7)) * 16 + t % 4 * 4;
    __nv_bfloat162 two = __floats2bfloat162_rn(acc[j * 2], acc[j * 2 + 1]);
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(*(uint32_t*)&two) : "memory");
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  asm volatile("bar.sync 1, 128;" ::: "memory");
  if (t == 0) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&c), "r"(col0),
                 "r"(row0), "r"(base + 32768)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;");
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  }
}

// Two CTAs of a cluster: each loads half of a row of 256 floats into both (multicast), then writes the sum with the other
// CTA's neighbour into the other CTA, which tells by an mbarrier that it may be read.
extern "C" __global__ void __cluster_dims__(2, 1, 1) cluster_sum(const __grid_constant__ TensorMap in, float* out) {
  __shared__ __align__(128) float row[256];
  __shared__ __align__(16) float inbox[128];
  __shared__ __align__(8) uint64_t barriers[2];
  const int t = threadIdx.x;
  uint32_t rank, full = shared_address(barriers), told = full + 8;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  if (t == 0) {
    init(full, 1), init(told, 128);
    expect(full, 1024);
  }
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  if (t == 0)
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(row) + rank * 512),
        "l"(&in), "r"(rank * 128), "r"(blockIdx.x / 2), "r"(full), "h"((short)3)
        : "memory");
  wait(full, 0);
  uint32_t there, bell;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(inbox + t)), "r"(rank ^ 1));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(bell) : "r"(told), "r"(rank ^ 1));
  float sum = row[rank * 128 + t] + row[(rank ^ 1) * 128 + (t + 1) % 128];
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(sum) : "memory");
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(bell) : "memory");
  wait(told, 0);
  out[blockIdx.x * 128 + t] = inbox[t];
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// out [n] += in [n] by bulk copies of 256 floats: into shared memory, and back as a reduction.
extern "C" __global__ void bulk_add(const float* in, float* out) {
  __shared__ __align__(128) float tile[256];
  __shared__ __align__(8) uint64_t full;
  uint32_t barrier = shared_address(&full);
  if (threadIdx.x == 0) {
    init(barrier, 1);
    expect(barrier, 1024);
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 1024, [%2];" ::"r"(
                     shared_address(tile)),
                 "l"(in + blockIdx.x * 256), "r"(barrier)
                 : "memory");
  }
  __syncthreads();
  wait(barrier, 0);
  tile[threadIdx.x] *= 3;
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], 1024;" ::"l"(out + blockIdx.x * 256),
        "r"(shared_address(tile))
        : "memory");
    asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;" ::: "memory");
  }
}
