// Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
// Element (batch, head, row, column) is word column % 4 of counter (column / 4, row, head, batch).
#pragma once
#include "vec.h"
#if defined(__AVX2__)
  #include <immintrin.h>
#endif

FA_BEGIN

struct Philox {
  uint32_t key[2], row, head, batch;
  uint64_t threshold;  // keep where word >= threshold
};

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u, kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

#if defined(__AVX2__)
// Four counters at a time: one 32-bit word in each 64-bit lane, as the widening multiply wants it.
struct Words {
  __m256i w[4];
};
FA_INLINE Words philox4(const Philox& g, uint32_t block) {
  const __m256i low = _mm256_set1_epi64x(0xffffffffll);
  const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
  __m256i c0 = _mm256_and_si256(low, _mm256_add_epi64(_mm256_set1_epi64x(block), _mm256_setr_epi64x(0, 1, 2, 3)));
  __m256i c1 = _mm256_set1_epi64x(g.row), c2 = _mm256_set1_epi64x(g.head), c3 = _mm256_set1_epi64x(g.batch);
  uint32_t k0 = g.key[0], k1 = g.key[1];
  for (int round = 0; round < 10; ++round) {
    const __m256i p0 = _mm256_mul_epu32(c0, m0), p1 = _mm256_mul_epu32(c2, m1);
    const __m256i n0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1), _mm256_set1_epi64x(k0));
    const __m256i n2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3), _mm256_set1_epi64x(k1));
    c1 = _mm256_and_si256(p1, low);
    c3 = _mm256_and_si256(p0, low);
    c0 = n0;
    c2 = n2;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}
FA_INLINE void philox_words(const Philox& g, uint32_t block, uint32_t* out) {  // 16 words
  const Words r = philox4(g, block);
  const __m256i a = _mm256_or_si256(r.w[0], _mm256_slli_epi64(r.w[1], 32));  // words 0 1 of counters 0..3
  const __m256i b = _mm256_or_si256(r.w[2], _mm256_slli_epi64(r.w[3], 32));  // words 2 3
  const __m256i lo = _mm256_unpacklo_epi64(a, b), hi = _mm256_unpackhi_epi64(a, b);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute2x128_si256(lo, hi, 0x20));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8), _mm256_permute2x128_si256(lo, hi, 0x31));
}
#else
FA_INLINE void philox_words(const Philox& g, uint32_t block, uint32_t* out) {
  for (uint32_t i = 0; i < 4; ++i) {
    uint32_t c0 = block + i, c1 = g.row, c2 = g.head, c3 = g.batch, k0 = g.key[0], k1 = g.key[1];
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = static_cast<uint64_t>(c0) * kPhiloxM0, p1 = static_cast<uint64_t>(c2) * kPhiloxM1;
      c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(p1);
      c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(p0);
      k0 += kPhiloxW0;
      k1 += kPhiloxW1;
    }
    out[4 * i] = c0, out[4 * i + 1] = c1, out[4 * i + 2] = c2, out[4 * i + 3] = c3;
  }
}
#endif

// factor[j] = keep for the columns column + j, j < n (n rounded up to 16), 0 where dropped. column % 4 == 0.
template <class T>
[[maybe_unused]] static void dropout_row(const Philox& g, int64_t column, int n, T keep, T* factor) {
  uint32_t word[16];
  for (int j = 0; j < n; j += 16) {
    philox_words(g, static_cast<uint32_t>((column + j) / 4), word);
    const uint32_t threshold = static_cast<uint32_t>(g.threshold);
    for (int l = 0; l < 16; ++l) factor[j + l] = word[l] >= threshold ? keep : T(0);
  }
}

FA_END
