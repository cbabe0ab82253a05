// Tiles of rows in shared memory and their way through the tensor cores.
//
// A tile is [rows, D] of 16-bit numbers, D a multiple of 32. Eight rows of one 16-byte chunk, which ldmatrix reads at
// once, must lie in eight different groups of banks: chunk c of row r stands at place c ^ (r mod 8) of its row where
// rows are whole multiples of 128 bytes, at c ^ (r / 2 mod 4) where they are odd multiples of 64.
#pragma once
#include "ptx.cuh"

namespace fused_attention::cuda {

template <int D>
struct Swizzle {
  static_assert(D % 32 == 0);
  static constexpr int kRowBytes = D * 2, kChunks = D / 8;
  static __device__ __forceinline__ int key(int row) { return D % 64 == 0 ? row & 7 : (row >> 1) & 3; }
  static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
    return static_cast<uint32_t>(row * kRowBytes + ((chunk ^ key(row)) << 4));
  }
};

// Whether rows of 16-bit numbers can be moved 16 bytes at a time.
__device__ __forceinline__ bool in_vectors(const char* base, int64_t step, int64_t dims) {
  return ((reinterpret_cast<uintptr_t>(base) | static_cast<uintptr_t>(step) | static_cast<uintptr_t>(2 * dims)) & 15) ==
         0;
}

// Rows of a tensor in global memory: where row 0 is, the step to the next one in bytes, how many rows and dims there are.
struct Rows {
  static constexpr int kUnroll = 32;
  const char* base;
  int64_t step;
  int count, dims;
  __device__ __forceinline__ const char* operator()(int row) const {
    return row < count ? base + static_cast<int64_t>(row) * step : nullptr;
  }
  __device__ __forceinline__ bool vectors() const { return in_vectors(base, step, dims); }
};

// Eight numbers one by one: of a tensor whose rows are no multiples of 16 bytes.
__device__ __forceinline__ uint4 gather_chunk(const char* row, int first, int dims) {
  uint32_t word[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (first + i < dims) {
      const uint32_t bits = *reinterpret_cast<const uint16_t*>(row + 2 * (first + i));
      word[i / 2] |= bits << (16 * (i % 2));
    }
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

__device__ __forceinline__ void store_shared(uint32_t to, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t to, float4 x) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t to, float2 x) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(x.x), "f"(x.y) : "memory");
}
__device__ __forceinline__ uint4 load_shared(uint32_t from) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(from)
               : "memory");
  return x;
}

// Start copying rows first .. first + ROWS into a tile; zeros where there are none (from(row) is null) and past the last
// dim. Rows that are not read may hold anything. What thread `thread` of THREADS copies, only it can wait for.
template <int ROWS, int D, int THREADS, class From>
__device__ __forceinline__ void load_tile(uint32_t tile, const From& from, int first, int thread) {
  constexpr int kChunks = D / 8, kAll = ROWS * kChunks, kRounds = (kAll + THREADS - 1) / THREADS;
  thread = opaque(thread);
  if (from.vectors()) {
#pragma unroll From::kUnroll
    for (int i = 0; i < kRounds; ++i) {
      const int at = i * THREADS + thread, row = at / kChunks, chunk = at % kChunks;
      if (kAll % THREADS != 0 && at >= kAll) break;
      const char* source = from(first + row);
      const bool there = source && chunk * 8 < from.dims;
      copy_async(tile + Swizzle<D>::offset(row, chunk), there ? source + chunk * 16 : from.base, there ? 16 : 0);
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < kRounds; ++i) {
      const int at = i * THREADS + thread, row = at / kChunks, chunk = at % kChunks;
      if (kAll % THREADS != 0 && at >= kAll) break;
      const char* source = from(first + row);
      const uint4 value = source ? gather_chunk(source, chunk * 8, from.dims) : make_uint4(0, 0, 0, 0);
      store_shared(tile + Swizzle<D>::offset(row, chunk), value);
    }
  }
}

// Eight numbers of which those that are not finite become 0; whether there were any.
template <class E>
__device__ __forceinline__ bool clean(uint4& x) {
  uint32_t* word[4] = {&x.x, &x.y, &x.z, &x.w};
  bool bad = false;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool low = (*word[i] & E::kExponent) == E::kExponent;
    const bool high = (*word[i] >> 16 & E::kExponent) == E::kExponent;
    *word[i] &= (low ? 0u : 0xffffu) | (high ? 0u : 0xffff0000u);
    bad = bad || low || high;
  }
  return bad;
}

// --- fragments of a tile -----------------------------------------------------------------------------------------

// Where a lane reads its part of a row: offset(row, first) for its first chunk; `step` pairs of chunks further on the
// address is the same up to the bits that the swizzle touches. One register for all steps of a product.
template <int D>
struct LaneAddress {
  uint32_t at;
  // A operands: lanes name rows 0 .. 16, two chunks each. B operands of a product with the tile itself likewise.
  static __device__ __forceinline__ LaneAddress rows(uint32_t tile, int row, int lane) {
    return {tile + Swizzle<D>::offset(row + (lane & 15), lane >> 4)};
  }
  // B operands of a product with the tile's transpose.
  static __device__ __forceinline__ LaneAddress columns(uint32_t tile, int row, int lane) {
    return {tile + Swizzle<D>::offset(row + (lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1)};
  }
  // further: a multiple of 16 rows.
  __device__ __forceinline__ uint32_t operator()(int step, int further) const {
    constexpr int kPairs = D % 64 == 0 ? 4 : 2;  // of chunks, within which the swizzle permutes
    return (at ^ static_cast<uint32_t>(step % kPairs << 5)) + step / kPairs * (32 * kPairs) +
           further * Swizzle<D>::kRowBytes;
  }
};

// c [16 MT, 8 NT] = rows of tile a times the transpose of rows of tile b, over all D dims.
template <class E, int D, int MT, int NT>
__device__ __forceinline__ void multiply_transposed(float (&c)[MT][NT][4], uint32_t a_tile, int a_row, uint32_t b_tile,
                                                    int b_row, int lane) {
#pragma unroll
  for (int mt = 0; mt < MT; ++mt)
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[mt][nt][i] = 0.0f;
  const LaneAddress<D> a_at = LaneAddress<D>::rows(a_tile, a_row, opaque(lane));
  const LaneAddress<D> b_at = LaneAddress<D>::columns(b_tile, b_row, opaque(lane));
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    uint32_t a[MT][4];
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) load_matrices(a[mt], a_at(step, 16 * mt));
#pragma unroll
    for (int pair = 0; pair < NT / 2; ++pair) {
      uint32_t b[4];
      load_matrices(b, b_at(step, 16 * pair));
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) {
        E::mma(c[mt][2 * pair], a[mt], b[0], b[1]);
        E::mma(c[mt][2 * pair + 1], a[mt], b[2], b[3]);
      }
    }
  }
}

// acc [16 MT, D] += w [16 MT, 8 NT] times rows 0 .. 8 NT of a tile; w is rounded to 16 bits. A C fragment of w, rounded
// and packed in pairs, is an A fragment of the same numbers.
template <class E, int D, int MT, int NT>
__device__ __forceinline__ void multiply_add(float (&acc)[MT][D / 8][4], const float (&w)[MT][NT][4], uint32_t tile,
                                             int lane) {
  const LaneAddress<D> at = LaneAddress<D>::rows(tile, 0, opaque(lane));
#pragma unroll
  for (int step = 0; step < NT / 2; ++step) {
    uint32_t a[MT][4];
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&from)[4] = w[mt][2 * step + i / 2];
        a[mt][i] = E::pack(from[2 * (i & 1)], from[2 * (i & 1) + 1]);
      }
#pragma unroll
    for (int pair = 0; pair < D / 16; ++pair) {
      uint32_t b[4];
      load_matrices_transposed(b, at(pair, 16 * step));
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) {
        E::mma(acc[mt][2 * pair], a[mt], b[0], b[1]);
        E::mma(acc[mt][2 * pair + 1], a[mt], b[2], b[3]);
      }
    }
  }
}

template <int MT, int NT>
__device__ __forceinline__ void clear(float (&acc)[MT][NT][4]) {
#pragma unroll
  for (int mt = 0; mt < MT; ++mt)
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[mt][nt][i] = 0.0f;
}

// Whether a fragment holds NaN or infinities.
template <int MT, int NT>
__device__ __forceinline__ bool spoiled(const float (&acc)[MT][NT][4]) {
  float zero = 0.0f;
#pragma unroll
  for (int mt = 0; mt < MT; ++mt)
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int i = 0; i < 4; ++i) zero = fmaf(acc[mt][nt][i], 0.0f, zero);
  return !(zero == 0.0f);
}

// --- back to global memory -----------------------------------------------------------------------------------------

// A warp's rows of a C fragment [16 MT, D], times factor[2 mt + half], into rows row .. of a tile that is its own by now.
template <class E, int D, int MT>
__device__ __forceinline__ void stage_rows(uint32_t tile, int row, const float (&acc)[MT][D / 8][4],
                                           const float (&factor)[2 * MT], int lane) {
#pragma unroll
  for (int mt = 0; mt < MT; ++mt)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = row + 16 * mt + 8 * half + (lane >> 2);
#pragma unroll
      for (int nt = 0; nt < D / 8; ++nt) {
        const float f = factor[2 * mt + half];
        const uint32_t two = E::pack(acc[mt][nt][2 * half] * f, acc[mt][nt][2 * half + 1] * f);
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(tile + Swizzle<D>::offset(at, nt) + 4 * (lane & 3)), "r"(two)
                     : "memory");
      }
    }
}

// One staged row to global memory by LANES neighbouring lanes, of which this is `part`.
template <int D, int LANES>
__device__ __forceinline__ void store_row(char* to, uint32_t tile, int row, int dims, bool vectors, int part) {
#pragma unroll
  for (int i = 0; i < (D / 8 + LANES - 1) / LANES; ++i) {
    const int chunk = i * LANES + part;
    if (chunk * 8 >= dims) break;
    const uint4 x = load_shared(tile + Swizzle<D>::offset(row, chunk));
    if (vectors) {
      *reinterpret_cast<uint4*>(to + chunk * 16) = x;
    } else {
      const uint32_t word[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (chunk * 8 + j < dims)
          *reinterpret_cast<uint16_t*>(to + 2 * (chunk * 8 + j)) = static_cast<uint16_t>(word[j / 2] >> (16 * (j % 2)));
    }
  }
}

}  // namespace fused_attention::cuda
