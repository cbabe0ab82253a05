// One warp's steps of decoding: where its keys are, their way into shared memory, a tile of scores, its softmax, its values.
// The whole, and what it computes, is in decode.cuh.
#pragma once
#include "cache.cuh"
#include "codes.cuh"
#include "softmax.cuh"

namespace fused_attention::cuda {

template <class E, int D, bool CODES>
struct DecodeStep {
  static constexpr DecodeTile kTile = decode_tile(D, CODES);
  static constexpr int kWarps = kTile.warps, kStages = kTile.stages, kThreads = 32 * kWarps, NT = 2, DT = D / 8;
  static constexpr int kRowBytes = CODES ? D : 2 * D, kChunks = kRowBytes / 16;
  static constexpr bool kQueryShared = decode_query_shared(D);
  using Place16 = Swizzle<kRowBytes / 2>;
  static constexpr uint32_t kTileBytes = 16 * kRowBytes, kStageBytes = 2 * kTileBytes + 128;  // k, v, factors
  static constexpr int kSumStep = decode_sum_step(D, CODES);

  const DecodeParams& p;
  int b, kv_head, row0, split, length, low, high, lane, warp;
  bool lost;
  uint32_t* query;  // shared memory
  char* stages;     // of this warp
  uint32_t first;   // their address in shared memory

  __device__ __forceinline__ DecodeStep(const DecodeParams& p, char* shared) : p(p) {
    lane = static_cast<int>(threadIdx.x) & 31, warp = static_cast<int>(threadIdx.x) >> 5;
    query = reinterpret_cast<uint32_t*>(shared);
    stages = shared + (kQueryShared ? 32 * D : 0) + warp * kStages * kStageBytes, first = shared_address(stages);
  }

  __device__ __forceinline__ int group() const { return static_cast<int>(p.H / p.HK); }
  __device__ __forceinline__ int rows() const { return static_cast<int>(p.M) * group(); }
  __device__ __forceinline__ RowMap map() const { return {rows(), kv_head * group(), static_cast<int>(p.M)}; }
  __device__ __forceinline__ bool e4m3() const { return p.cache.k.dtype == DType::e4m3; }
  __device__ __forceinline__ int left() const { return static_cast<int>(p.window_left); }

  // The CTA's place, and the keys low .. high of its split: tiles are dealt out evenly over what this sequence's rows see.
  __device__ __forceinline__ void place() {
    const int tiles = (rows() + 15) / 16, batch = static_cast<int>(p.B);
    int i = static_cast<int>(blockIdx.x);
    b = i % batch, i /= batch;
    row0 = i % tiles * 16, i /= tiles;
    kv_head = i % static_cast<int>(p.HK), split = i / static_cast<int>(p.HK);
    length = cached_length(p.cache, b, lost);
    constexpr int kBlock = 16 * kWarps;
    const int begin = round_down(max(length - static_cast<int>(p.M) - left(), 0), kBlock);
    const int splits = static_cast<int>(p.splits), blocks = (length - begin + kBlock - 1) / kBlock;
    const int each = (blocks + splits - 1) / splits * kBlock;
    low = min(begin + split * each, length), high = min(low + each, length);
  }

  // --- loading ---------------------------------------------------------------------------------------------------

  // Where key `key` of the sequence lies; nothing where no row of any tile sees it.
  __device__ __forceinline__ CachedToken token(int key) const {
    // What a window has left behind may be gone.
    const bool wanted = key < high && key >= length - static_cast<int>(p.M) - left();
    return find_token(p.cache, b, key, wanted);
  }

  // Sixteen rows of the cache, whose places lanes 0 .. 15 know.
  __device__ __forceinline__ void load_rows(uint32_t tile, const Tensor& t, const CachedToken& own,
                                            int64_t dims) const {
    constexpr int kBytes = CODES ? 1 : 2;
    const char* base = static_cast<const char*>(t.data) + kv_head * t.stride[1] * kBytes;
    const int bytes = static_cast<int>(dims) * kBytes;
    const bool vectors =
        ((reinterpret_cast<uintptr_t>(base) | static_cast<uintptr_t>((t.stride[0] | t.stride[2] | dims) * kBytes)) &
         15) == 0;
#pragma unroll 8
    for (int i = 0; i < (16 * kChunks + 31) / 32; ++i) {
      const int at = i * 32 + lane, row = at / kChunks, chunk = at % kChunks;
      const int block = __shfl_sync(0xffffffffu, own.block, row), in_block = __shfl_sync(0xffffffffu, own.row, row);
      const char* from = base + (block * t.stride[0] + in_block * t.stride[2]) * kBytes + chunk * 16;
      const bool there = block >= 0 && chunk * 16 < bytes;
      const uint32_t to = tile + Place16::offset(row, chunk);
      if (vectors) {
        copy_async(to, there ? from : base, there ? 16 : 0);
      } else {
        uint32_t word[4] = {0, 0, 0, 0};
#pragma unroll 1
        for (int j = 0; j < 16 && there && chunk * 16 + j < bytes; ++j) {
          const uint32_t byte = static_cast<uint8_t>(from[j]);
#pragma unroll
          for (int w = 0; w < 4; ++w) word[w] |= w == j / 4 ? byte << (8 * (j % 4)) : 0;
        }
        store_shared(to, make_uint4(word[0], word[1], word[2], word[3]));
      }
    }
  }

  // Keys key .. key + 16; `own` is lane's token of them.
  __device__ __forceinline__ void load_stage(uint32_t stage, const CachedToken& own) const {
    load_rows(first + stage, p.cache.k, own, p.D);
    load_rows(first + stage + kTileBytes, p.cache.v, own, p.DV);
    if (lane >= 16) return;
    // The factors of score and weight; NaN where the page does not exist.
    float* factors = reinterpret_cast<float*>(stages + stage + 2 * kTileBytes);
    if (CODES && own.block >= 0) {
      copy_async_word(shared_address(factors + lane), token_scale(p.cache.k_scale, own, kv_head), 4);
      copy_async_word(shared_address(factors + 16 + lane), token_scale(p.cache.v_scale, own, kv_head), 4);
    } else {
      factors[lane] = factors[16 + lane] = own.missing ? __int_as_float(0x7fffffff) : 1.0f;
    }
  }

  // Two neighbouring dims of a row of q.
  __device__ __forceinline__ uint32_t query_pair(const char* row, int d, bool words) const {
    const int dims = static_cast<int>(p.D);
    if (!row || d >= dims) return 0;
    if (words) return *reinterpret_cast<const uint32_t*>(row + 2 * d);
    const uint32_t high_half = d + 1 < dims ? *reinterpret_cast<const uint16_t*>(row + 2 * d + 2) : 0;
    return *reinterpret_cast<const uint16_t*>(row + 2 * d) | high_half << 16;
  }
  // q as A fragments, of which all warps need the same: in registers or, where there are too many, in shared memory. For
  // codes, dims 4t .. 4t + 3 of sixteen take the places of 2t, 2t + 1, 2t + 8 and 2t + 9.
  struct Query {
    uint32_t a[kQueryShared ? 1 : D / 16][4];
  };
  __device__ __forceinline__ void load_query(Query& q) const {
    const char* base = static_cast<const char*>(p.q.data) + 2 * b * p.q.stride[0];
    const auto bits =
        reinterpret_cast<uintptr_t>(base) | static_cast<uintptr_t>(2 * (p.q.stride[1] | p.q.stride[2] | p.D));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row0 + (lane >> 2) + 8 * half;
      const char* row = base + 2 * (map().head_of(r) * p.q.stride[1] + map().query(r) * p.q.stride[2]);
      if (r >= rows()) row = nullptr;
#pragma unroll
      for (int step = 0; step < D / 16; ++step) {
        if (kQueryShared && step % kWarps != warp) continue;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int d = 16 * step + (CODES ? 4 * (lane & 3) + 2 * i : 2 * (lane & 3) + 8 * i);
          const uint32_t pair = query_pair(row, d, (bits & 3) == 0);
          if constexpr (kQueryShared)
            query[(step * 32 + lane) * 4 + half + 2 * i] = pair;
          else
            q.a[step][half + 2 * i] = pair;
        }
      }
    }
    if (kQueryShared) __syncthreads();
  }
  __device__ __forceinline__ void query_step(uint32_t (&a)[4], const Query& q, int step) const {
    if constexpr (kQueryShared) {
      const uint4 x = load_shared(shared_address(query + (step * 32 + lane) * 4));
      a[0] = x.x, a[1] = x.y, a[2] = x.z, a[3] = x.w;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = q.a[step][i];
    }
  }

  // --- one tile ----------------------------------------------------------------------------------------------------

  __device__ __forceinline__ void products(float (&s)[1][NT][4], const Query& q, uint32_t tile) const {
    clear(s);
    const LaneAddress<kRowBytes / 2> at = LaneAddress<kRowBytes / 2>::columns(tile, 0, lane);
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      uint32_t w[4];
      if constexpr (CODES) {
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
          uint32_t word;
          const uint32_t from = tile + Place16::offset(8 * nt + (lane >> 2), step) + 4 * (lane & 3);
          asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(from) : "memory");
          w[2 * nt] = widen_codes<E, 0, 1>(word, e4m3()), w[2 * nt + 1] = widen_codes<E, 2, 3>(word, e4m3());
        }
      } else {
        load_matrices(w, at(step, 0));
      }
      uint32_t a[4];
      query_step(a, q, step);
      E::mma(s[0][0], a, w[0], w[1]);
      E::mma(s[0][1], a, w[2], w[3]);
    }
  }

  // Scores of keys key .. key + 16 from their products; -inf where hidden.
  __device__ __forceinline__ void finish(float (&s)[1][NT][4], const float* factors, int key) const {
    const float scale = static_cast<float>(p.scale), cap = static_cast<float>(p.softcap);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = min(row0 + (lane >> 2) + 8 * half, rows() - 1);
      const int center = length - static_cast<int>(p.M) + map().query(r);
      float slope = 0.0f;
      if (p.alibi.data)
        slope = static_cast<const float*>(p.alibi.data)[b * p.alibi.stride[0] + map().head_of(r) * p.alibi.stride[1]];
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int column = 8 * nt + 2 * (lane & 3) + i, away = center - key - column;
          float& x = s[0][nt][2 * half + i];
          x *= scale * factors[column];
          if (p.softcap != 0.0) x = softcapped(x, cap);
          x -= slope * static_cast<float>(away);
          if (away < 0 || away > left() || key + column >= high) x = -kInfinity;
        }
    }
  }

  // s becomes the weights of what is stored, exp(s - t) times the values' scales. The maximum is that of the weights.
  __device__ __forceinline__ void softmax(float (&s)[1][NT][4], RowState<1>& state, float (&acc)[1][DT][4],
                                          const float* factors) const {
    float lift[NT][2];  // logarithms of the scales
#pragma unroll
    for (int e = 0; e < 2 * NT; ++e)
      lift[e / 2][e % 2] = CODES ? logf(fabsf(factors[16 + 8 * (e / 2) + 2 * (lane & 3) + e % 2])) : 0.0f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float here = state.top[half];
#pragma unroll
      for (int e = 0; e < 2 * NT; ++e)
        here = fmaxf(here, s[0][e / 2][2 * half + e % 2] + (CODES ? fmaxf(lift[e / 2][e % 2], -80.0f) : 0.0f));
      here = quad_max(here);
      const float shift = here == -kInfinity ? 0.0f : here;
      const float fade = exp2_fast((state.top[half] - shift) * kLog2E);
      state.top[half] = here;
      float sum = 0.0f;
#pragma unroll
      for (int e = 0; e < 2 * NT; ++e) {
        float& x = s[0][e / 2][2 * half + e % 2];
        const float weight = exp2_fast((x - shift) * kLog2E);
        sum += weight;
        if (CODES) {
          const float lifted = exp2_fast((x + lift[e / 2][e % 2] - shift) * kLog2E);
          x = x == -kInfinity ? 0.0f : copysignf(lifted, factors[16 + 8 * (e / 2) + 2 * (lane & 3) + e % 2]);
        } else {
          x = weight;
        }
      }
      state.total[half] = fmaf(state.total[half], fade, sum);
#pragma unroll
      for (int dt = 0; dt < DT; ++dt) acc[0][dt][2 * half] *= fade, acc[0][dt][2 * half + 1] *= fade;
    }
  }

  // acc += s v. Codes come in pairs of dims: fragment 2 c holds the even dims of chunk c, fragment 2 c + 1 the odd ones.
  __device__ __forceinline__ void add_values(float (&acc)[1][DT][4], const float (&s)[1][NT][4], uint32_t tile) const {
    if constexpr (!CODES) {
      multiply_add<E, D>(acc, s, tile, lane);
    } else {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = E::pack(s[0][i / 2][2 * (i & 1)], s[0][i / 2][2 * (i & 1) + 1]);
      const LaneAddress<kRowBytes / 2> at = LaneAddress<kRowBytes / 2>::rows(tile, 0, lane);
#pragma unroll
      for (int pair = 0; pair < D / 32; ++pair) {
        uint32_t w[4];
        load_matrices_transposed(w, at(pair, 0));
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const uint32_t low_keys = w[2 * c], high_keys = w[2 * c + 1];
          E::mma(acc[0][4 * pair + 2 * c], a, widen_codes<E, 0, 2>(low_keys, e4m3()),
                 widen_codes<E, 0, 2>(high_keys, e4m3()));
          E::mma(acc[0][4 * pair + 2 * c + 1], a, widen_codes<E, 1, 3>(low_keys, e4m3()),
                 widen_codes<E, 1, 3>(high_keys, e4m3()));
        }
      }
    }
  }
  // The dim of element e of a lane's row of acc.
  __device__ __forceinline__ int dim_of(int dt, int i) const {
    return CODES ? dt / 2 * 16 + 4 * (lane & 3) + 2 * i + dt % 2 : 8 * dt + 2 * (lane & 3) + i;
  }
};

}  // namespace fused_attention::cuda
