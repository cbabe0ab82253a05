// Rows of K and V where they lie: dense or in pages, numbers or codes.
//
//   key n of sequence b is   row n of [B, HK, N, .]
//   or, with pages,          row n % page_size of page table[b, n / page_size] of [pages, HK, page_size, .]
//   a code (int8, e4m3) is the number divided by the scale of its token and head
//
// Codes are exact in float, so they enter the products as they are; the scale of a key multiplies its column of scores,
// the scale of a value its column of weights.
#pragma once
#include "pack.h"

FA_BEGIN

constexpr int kFewKeys = 128;  // keys of a tile

// The rows of a tile of K or of V.
struct StoredRows {
  const char* row[kFewKeys];
  DType type;
  int keys;
  int64_t bytes;  // of a row
};

// What the share from .. to of all work on a tile asks for ahead of its use: that share of each row. In pages, and from K
// to V and back, the processor does not guess the next row. Into L2: the few lines that L1 can wait for at a time kept a
// core of Zen 4 at 11 GB/s. Evenly: where the first quarter of the work asked for all, the core waited for memory there,
// and memory for the core in the rest.
struct Ahead {
  const StoredRows& rows;
  int64_t begin, end;  // bytes
  int keys;
  Ahead(const StoredRows& next, int64_t from, int64_t to, int64_t all) : rows(next) {
    const int64_t lines = ceil_div(next.bytes, 64);
    begin = from * lines / all * 64, end = to * lines / all * 64;
    keys = begin < end ? next.keys : 0;
  }
  void fetch(int j) const {
    for (int64_t at = begin; at < end; at += 64) __builtin_prefetch(rows.row[j] + at, 0, 2);
  }
};

constexpr int64_t stored_size(DType type) {
  return type == DType::f32 ? 4 : type == DType::i8 || type == DType::e4m3 ? 1 : 2;
}

// VL elements of a type in the compute type. Whoever reads a type that is not `direct` makes a copy first.
template <DType S>
FA_INLINE Vec<float> load_as(const char* p) {
  if constexpr (S == DType::bf16) {
    return from_bits<float>(widen_16(p) << 16);
  } else if constexpr (S == DType::i8) {
    return __builtin_convertvector(widen_8(p), Vec<float>);
  } else if constexpr (S == DType::e4m3) {
    // seeeemmm, spread by its sign, moved to where float has sign, exponent and mantissa; 120 is the difference of the
    // biases, and the product is exact for subnormals too. NaN (s1111111) would come out as 480: see nan_codes.
    return from_bits<float>((widen_8(p) << 20) & static_cast<int32_t>(0x87F00000u)) * 0x1p120f;
#if defined(__AVX512F__)
  } else if constexpr (S == DType::f16) {
    return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  } else if constexpr (S == DType::f16) {
    return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
  } else {
    return load<float>(reinterpret_cast<const float*>(p));
  }
}
FA_INLINE bool direct(DType type) {
#if defined(__F16C__)
  if (type == DType::f16) return true;
#endif
  return type != DType::f16;
}

// Whether a tile of e4m3 holds NaN, which no quantised number is, but somebody's own storage may be.
[[maybe_unused]] static bool nan_codes(const StoredRows& t, int keys, int64_t columns) {
  Bytes found{};
  bool tail = false;
  for (int i = 0; i < keys; ++i) {
    int64_t j = 0;
    for (; j + kVectorBytes <= columns; j += kVectorBytes) {
      Bytes codes;
      __builtin_memcpy(&codes, t.row[i] + j, sizeof codes);
      found |= (Bytes)((codes & 0x7f) == 0x7f);
    }
    for (; j < columns; ++j) tail |= (t.row[i][j] & 0x7f) == 0x7f;
  }
  uint64_t words[kVectorBytes / 8], any = 0;
  __builtin_memcpy(words, &found, sizeof words);
  for (uint64_t word : words) any |= word;
  return tail || any;
}

FA_INLINE bool in_pages(const AttentionParams& p) { return p.page_size > 0; }

// Calls f(index of the first key, keys, sequence or page (-1: a page that does not exist), row of the first in it) for
// each run of keys key .. key + keys that lie behind one another.
template <class F>
FA_INLINE void for_runs(const Problem& x, int64_t key, int keys, F f) {
  const AttentionParams& p = *x.p;
  if (!in_pages(p)) return f(0, keys, x.batch, x.key0 + key);
  for (int j = 0; j < keys;) {
    const int64_t at = key + j, row = at % p.page_size;
    const int run = static_cast<int>(min_of<int64_t>(p.page_size - row, keys - j));
    const int32_t page = p.table[x.b * p.table_step + at / p.page_size];
    f(j, run, page >= 0 && page < p.pages ? page : -1, row);
    j += run;
  }
}

// Where the keys key .. key + keys lie; those of a page that does not exist anywhere in the storage.
[[maybe_unused]] static void find_rows(const Tensor& t, const Problem& x, int64_t key, int keys, int64_t columns,
                                       StoredRows& found) {
  const int64_t step = t.stride[2] * size_of(t.dtype);
  found.type = t.dtype, found.keys = keys, found.bytes = columns * size_of(t.dtype);
  for_runs(x, key, keys, [&](int first, int run, int64_t block, int64_t row) {
    const char* at = address(t, max_of<int64_t>(block, 0), x.hk, row);
    for (int j = 0; j < run; ++j) found.row[first + j] = at + j * step;
  });
}

// The length of a sequence of a cache, raised by the tokens that are new.
FA_INLINE int64_t count_tokens(const AttentionParams& p, int64_t b) {
  const int64_t more = p.new_k ? p.M : 0;
  if (p.long_lengths) return static_cast<int64_t*>(p.lengths)[b] += more;
  return static_cast<int32_t*>(p.lengths)[b] += static_cast<int32_t>(more);
}

// Writes the last M tokens of every sequence to where they lie. A token without a place there is not written.
[[maybe_unused]] static void append_tokens(const AttentionParams& p, const Tensor& from, const Tensor& to,
                                           int64_t columns) {
  const size_t bytes = static_cast<size_t>(columns * size_of(to.dtype));
  for (int64_t b = 0; b < p.B; ++b)
    for (int64_t hk = 0; hk < p.HK; ++hk) {
      const Problem x = make_problem(p, b, hk * (p.H / p.HK));
      const int64_t first = p.key_lengths[b] - p.M;
      for (int64_t i = max_of<int64_t>(-first, 0); i < min_of(p.M, p.N - first); ++i)
        for_runs(x, first + i, 1, [&](int, int, int64_t block, int64_t row) {
          if (block >= 0) __builtin_memcpy(address(to, block, hk, row), address(from, b, hk, i), bytes);
        });
    }
}

// Copies rows into dst [keys, width] in the compute type, with zeros behind, and points to them.
[[maybe_unused]] static void copy_rows(StoredRows& t, int keys, int64_t columns, int64_t width, float* dst) {
  for (int i = 0; i < keys; ++i) {
    float* row = dst + i * width;
    load_row(row, t.row[i], t.type, columns);
    for (int64_t j = columns; j < width; ++j) row[j] = 0;
    t.row[i] = reinterpret_cast<const char*>(row);
  }
  t.type = DType::f32;
}

// The scales of a tile's tokens, NaN where a page does not exist. False, and nothing written, where all are 1.
[[maybe_unused]] static bool find_scales(const Tensor& t, const Problem& x, int64_t key, int keys, float* found) {
  bool any = t.data != nullptr;
  if (!any && !in_pages(*x.p)) return false;
  for_runs(x, key, keys, [&](int first, int run, int64_t block, int64_t row) {
    any = any || block < 0;
    for (int j = 0; j < run; ++j)
      found[first + j] = block < 0 ? __builtin_nanf("") : t.data ? *element<float>(t, block, x.hk, row + j) : 1.0f;
  });
  for (int64_t j = keys; j < round_up(keys, VL<float>); ++j) found[j] = 0;
  return any;
}

FA_END
