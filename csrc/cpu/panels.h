// Panels of 32 rows of q, k, v and dout in the layouts that products of tiles read.
//
// A panel is brought into a strip [parts, 32, width] of bf16 first, zeros beyond its rows and columns: one part for
// bfloat16, two for float16, three for float32 (product.h: Operand). From a strip X of one part come:
//
//   as_rows          A = X     [2][width / 32] tiles of 16 rows by 32 columns
//   as_columns       A = X^T   [width / 16] tiles of 16 columns by all 32 rows
//   pairs_of_columns B = X^T   [width / 2, 32]: pairs of columns, one row of X after the other
//   pairs_of_rows    B = X     [width / 16] tiles of 16 pairs of rows by 16 columns
#pragma once
#include "products.h"
#include "pack.h"
#include "threads.h"

FA_BEGIN

constexpr int kPanel = 32;             // rows of a panel
constexpr int kTile = kTileBytes * 8;  // elements of a bf16 tile
constexpr int64_t kMaxHeadDim = 512;

FA_INLINE int parts_of(DType type) { return type == DType::f32 ? 3 : type == DType::f16 ? 2 : 1; }

// run(n) with n.value a constant: the number of parts.
template <int N>
struct Parts {
  static constexpr int value = N;
};
template <class Run>
FA_INLINE void with_parts(int parts, Run run) {
  if (parts == 1)
    run(Parts<1>{});
  else if (parts == 2)
    run(Parts<2>{});
  else
    run(Parts<3>{});
}

FA_INLINE int64_t panel_width(int64_t columns) { return round_up(columns, 32); }

// The bits of x rounded to bf16 (nearest even; subnormal results may stay), in the upper half of each lane.
FA_INLINE IVec<float> rounded_bits(Vec<float> x) {
  const IVec<float> u = bits<float>(x), odd = (u >> 16) & 1;
  const IVec<float> nan = bits<float>(splat<float>(__builtin_nanf("")));
  return (x == x ? u + 0x7fff + odd : nan) & static_cast<int32_t>(0xffff0000u);
}

// Lane by lane the pair (bf16(a), bf16(b)), a first in memory.
FA_INLINE IVec<float> pair_of(Vec<float> a, Vec<float> b) {
#if defined(__AVX512BF16__)
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);  // all of a, then all of b
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (IVec<float>)_mm512_permutexvar_epi16(order, both);
#else
  return ((rounded_bits(a) >> 16) & 0xffff) | rounded_bits(b);
#endif
}
// PARTS pairs whose sum is (a, b), as far as they go, `part` elements apart.
template <int PARTS>
FA_INLINE void store_pairs(uint16_t* to, int64_t part, Vec<float> a, Vec<float> b) {
#pragma GCC unroll 3
  for (int i = 0; i < PARTS; ++i) {
    const IVec<float> pair = pair_of(a, b);
    __builtin_memcpy(to + i * part, &pair, sizeof pair);
    if (i + 1 == PARTS) return;
    a -= from_bits<float>(pair << 16);
    b -= from_bits<float>(pair & static_cast<int32_t>(0xffff0000u));
  }
}

// 2 VL values in a row as bf16.
FA_INLINE void store_bf16(uint16_t* to, Vec<float> a, Vec<float> b) {
#if defined(__AVX512BF16__)
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  __builtin_memcpy(to, &both, sizeof both);
#else
  const HalfVec x = __builtin_convertvector(rounded_bits(a) >> 16, HalfVec);
  const HalfVec y = __builtin_convertvector(rounded_bits(b) >> 16, HalfVec);
  __builtin_memcpy(to, &x, sizeof x);
  __builtin_memcpy(to + VL<float>, &y, sizeof y);
#endif
}
FA_INLINE Vec<float> bf16_rounded(Vec<float> x) { return from_bits<float>(rounded_bits(x)); }

// A float32 whose parts are all normal numbers; or 0.
FA_INLINE bool has_parts(float x) {
  const float size = __builtin_fabsf(x);
  return x == 0.0f || (size >= 0x1p-100f && size < 0x1p127f);
}

typedef uint16_t WideHalfVec __attribute__((vector_size(64)));  // 32 numbers of two bytes

// dst = src ^ sign, both of bf16; bad collects the exponents that are all ones: numbers that are not finite.
FA_INLINE void copy_bf16(uint16_t* dst, const uint16_t* src, int64_t n, uint16_t sign, WideHalfVec& bad) {
  constexpr uint16_t special = 0x7f80;
  int64_t j = 0;
  for (; j + 32 <= n; j += 32) {
    WideHalfVec x;
    __builtin_memcpy(&x, src + j, sizeof x);
    bad |= (WideHalfVec)((x & special) == special);
    x ^= sign;
    __builtin_memcpy(dst + j, &x, sizeof x);
  }
  for (; j < n; ++j) {
    bad[0] |= (src[j] & special) == special;
    dst[j] = src[j] ^ sign;
  }
}
FA_INLINE bool any_set(WideHalfVec x) {
  uint64_t words[8], all = 0;
  __builtin_memcpy(words, &x, sizeof x);
  for (const uint64_t word : words) all |= word;
  return all != 0;
}

// Rows of a tensor into a strip; false if any of their numbers is not finite, or has no parts.
[[maybe_unused]] static bool load_strip(uint16_t* strip, int64_t width, const char* src, DType type, int64_t stride,
                                        int rows, int64_t columns, bool negate) {
  const int parts = parts_of(type);
  int bad = 0;
  // Rows of one head in a projection of all heads lie far apart: the processor does not guess the next one.
  for (int i = 0; i < rows; ++i)
    for (int64_t at = 0; at < columns * size_of(type); at += 64)
      __builtin_prefetch(src + i * stride * size_of(type) + at);
  if (columns < width || rows < kPanel)
    __builtin_memset(strip, 0, sizeof(uint16_t) * static_cast<size_t>(parts * kPanel * width));
  if (parts == 1) {
    WideHalfVec special{};
    for (int i = 0; i < rows; ++i)
      copy_bf16(strip + i * width, reinterpret_cast<const uint16_t*>(src) + i * stride, columns, negate ? 0x8000 : 0,
                special);
    return !any_set(special);
  }
  for (int i = 0; i < rows; ++i) {
    const char* at = src + i * stride * size_of(type);
    const uint16_t* half = reinterpret_cast<const uint16_t*>(at);
    if (parts == 2)
      for (int64_t j = 0; j < columns; ++j) bad |= (half[j] & 0x7c00) == 0x7c00;
    float line[kMaxHeadDim];
    load_row(line, at, type, columns);
    if (parts == 3)
      for (int64_t j = 0; j < columns; ++j) bad |= !has_parts(line[j]);
    uint16_t* row = strip + i * width;
    for (int part = 0; part < parts; ++part, row += kPanel * width)
      for (int64_t j = 0; j < columns; ++j) {
        const uint16_t high = to_bf16(line[j]);
        row[j] = negate ? high ^ 0x8000 : high;
        line[j] -= from_bf16(high);
      }
  }
  return !bad;
}

// Two rows as VL pairs.
FA_INLINE Vec<float> zip_rows(const uint16_t* a, const uint16_t* b) {
  HalfVec x, y;
  __builtin_memcpy(&x, a, sizeof x);
  __builtin_memcpy(&y, b, sizeof y);
  return from_bits<float>(__builtin_convertvector(x, IVec<float>) | __builtin_convertvector(y, IVec<float>) << 16);
}
// dst [columns, ldd] = the transpose of src [rows, lds], 32-bit elements, both sizes multiples of 16.
FA_INLINE void transpose_words(const void* src, int64_t lds, void* dst, int64_t ldd, int rows, int64_t columns) {
  const float* from = static_cast<const float*>(src);
  float* to = static_cast<float*>(dst);
  for (int64_t j = 0; j < columns; j += VL<float>)
    for (int i = 0; i < rows; i += VL<float>) transpose_square<float>(from + i * lds + j, lds, to + j * ldd + i, ldd);
}

[[maybe_unused]] static void as_rows(uint16_t* dst, const uint16_t* strip, int64_t width) {
  for (int half = 0; half < kPanel; half += kTileRows)
    for (int64_t j = 0; j < width; j += 32, dst += kTile)
      for (int i = 0; i < kTileRows; ++i) __builtin_memcpy(dst + i * 32, strip + (half + i) * width + j, kTileBytes);
}
[[maybe_unused]] static void as_columns(uint16_t* dst, const uint16_t* strip, int64_t width) {
  float pairs[16 * 16];  // pair of rows, column
  for (int64_t j = 0; j < width; j += 16, dst += kTile) {
    for (int i = 0; i < 16; ++i)
      for (int l = 0; l < 16; l += VL<float>) {
        const uint16_t* row = strip + 2 * i * width + j + l;
        store<float>(pairs + i * 16 + l, zip_rows(row, row + width));
      }
    transpose_words(pairs, 16, dst, 16, 16, 16);
  }
}
[[maybe_unused]] static void pairs_of_columns(uint16_t* dst, const uint16_t* strip, int64_t width) {
  transpose_words(strip, width / 2, dst, kPanel, kPanel, width / 2);
}
[[maybe_unused]] static void pairs_of_rows(uint16_t* dst, const uint16_t* strip, int64_t width) {
  for (int64_t j = 0; j < width; j += 16, dst += kTile)
    for (int i = 0; i < 16; ++i)
      for (int l = 0; l < 16; l += VL<float>) {
        const uint16_t* row = strip + 2 * i * width + j + l;
        const Vec<float> pairs = zip_rows(row, row + width);
        __builtin_memcpy(dst + i * 32 + 2 * l, &pairs, sizeof pairs);
      }
}

// Operands within a packed panel whose strip was `width` wide.
FA_INLINE Operand rows_operand(const uint16_t* panel, int64_t width) {  // steps along the columns
  return {panel, kTileBytes, width / 32 * kTile, kTile, kPanel * width};
}
FA_INLINE Operand columns_operand(const uint16_t* panel, int64_t width, int64_t next_panel) {  // steps along the rows
  return {panel, kTileBytes, kTile, next_panel, kPanel * width};
}
FA_INLINE Operand column_pairs_operand(const uint16_t* panel, int64_t width) {  // steps along the columns
  return {panel, kPanel * 4, 32, 2 * kTile, kPanel * width};
}
FA_INLINE Operand row_pairs_operand(const uint16_t* panel, int64_t width, int64_t next_panel) {  // along the rows
  return {panel, kTileBytes, kTile, next_panel, kPanel * width};
}

// The panels of all sequences of q or of k, one head after the other: a sequence begins with a panel of its own.
struct Panels {
  int64_t per_head;
  const int64_t* starts;  // cu_seqlens, or null: every sequence has `each` panels
  int64_t each;
  int64_t of(int64_t b, int64_t head) const { return head * per_head + (starts ? starts[b] / kPanel + b : b * each); }
};
FA_INLINE Panels make_panels(const int64_t* starts, int64_t B, int64_t longest) {
  const int64_t each = ceil_div(longest, kPanel);
  return {starts ? starts[B] / kPanel + B : B * each, starts, each};
}

// A tensor to be packed, in up to two layouts.
struct Packing {
  const Tensor* tensor;
  bool of_keys, negate;
  int64_t heads, columns, width;
  Panels panels;
  using Layout = void (*)(uint16_t* dst, const uint16_t* strip, int64_t width);
  Layout layout[2];
  uint16_t* packed[2];  // [heads, panels, parts, 32 * width]
};

struct PackPlan {
  static constexpr int kChunk = 8;  // panels of a task
  AttentionParams p;
  int parts = 1, count = 0;
  Packing all[4];
  uint16_t* memory = nullptr;
  char* finite = nullptr;  // [tasks]

  int64_t panel_size(int i) const { return parts * kPanel * all[i].width; }
  const uint16_t* panel(int i, int layout, int64_t b, int64_t head, int64_t at) const {
    return all[i].packed[layout] + (all[i].panels.of(b, head) + at) * panel_size(i);
  }
  int64_t chunks(int i) const { return ceil_div(all[i].panels.each, kChunk); }
  int64_t tasks(int i) const { return p.B * all[i].heads * chunks(i); }
  void add(const Tensor& t, bool of_keys, int64_t columns, bool negate, Packing::Layout one, Packing::Layout two) {
    const Panels panels = of_keys ? make_panels(p.cu_seqlens_k, p.B, p.N) : make_panels(p.cu_seqlens_q, p.B, p.M);
    all[count++] = {&t,         of_keys,           negate, of_keys ? p.HK : p.H, columns, panel_width(columns), panels,
                    {one, two}, {nullptr, nullptr}};
  }
};

[[maybe_unused]] static void pack_task(const void* plan, int64_t task, char* scratch) {
  const PackPlan& f = *static_cast<const PackPlan*>(plan);
  int i = 0;
  int64_t at = task;
  while (at >= f.tasks(i)) at -= f.tasks(i++);
  const Packing& to = f.all[i];
  const int64_t chunk = at % f.chunks(i), head = at / f.chunks(i) % to.heads, b = at / f.chunks(i) / to.heads;
  const Problem x = make_problem(f.p, b, to.of_keys ? head * (f.p.H / f.p.HK) : head);
  const int64_t length = to.of_keys ? x.seen : x.rows, begin = to.of_keys ? x.key0 : x.row0;
  uint16_t* strip = reinterpret_cast<uint16_t*>(scratch);
  bool finite = true;
  for (int64_t panel = chunk * PackPlan::kChunk; panel < (chunk + 1) * PackPlan::kChunk; ++panel) {
    const int64_t row = panel * kPanel;
    if (row >= length) break;
    const int rows = to.tensor->data ? static_cast<int>(min_of<int64_t>(kPanel, length - row)) : 0;
    const char* from = rows ? row_address(*to.tensor, x, head, begin + row) : nullptr;
    const bool good = load_strip(strip, to.width, from, f.p.q.dtype, to.tensor->stride[2], rows, to.columns, to.negate);
    finite = finite && good;
    for (int layout = 0; layout < 2; ++layout) {
      if (!to.layout[layout]) continue;
      uint16_t* dst = to.packed[layout] + (to.panels.of(b, head) + panel) * f.panel_size(i);
      for (int part = 0; part < f.parts; ++part, dst += kPanel * to.width)
        to.layout[layout](dst, strip + part * kPanel * to.width, to.width);
    }
  }
  f.finite[task] = finite;
}

enum class Packed { done, unfit, no_memory };  // unfit: numbers that are not finite

// Packs all that was added. Where a number is not finite nothing may be made of it: hidden NaNs must not be met by a
// weight of 0. The caller releases f.memory.
[[maybe_unused]] static Packed pack_all(PackPlan& f) {
  int64_t elements = 0, tasks = 0, widest = 0;
  for (int i = 0; i < f.count; ++i) {
    tasks += f.tasks(i), widest = max_of(widest, f.all[i].width);
    for (int layout = 0; layout < 2; ++layout)
      if (f.all[i].layout[layout]) elements += f.all[i].heads * f.all[i].panels.per_head * f.panel_size(i);
  }
  f.memory = static_cast<uint16_t*>(allocate(static_cast<size_t>(2 * elements + tasks)));
  if (!f.memory) return Packed::no_memory;
  uint16_t* at = f.memory;
  for (int i = 0; i < f.count; ++i)
    for (int layout = 0; layout < 2; ++layout) {
      if (!f.all[i].layout[layout]) continue;
      f.all[i].packed[layout] = at;
      at += f.all[i].heads * f.all[i].panels.per_head * f.panel_size(i);
    }
  f.finite = reinterpret_cast<char*>(at);
  const size_t strip = sizeof(uint16_t) * static_cast<size_t>(f.parts * kPanel * widest);
  if (!run_tasks(tasks, f.p.threads, static_cast<double>(elements), strip, pack_task, &f)) return Packed::no_memory;
  for (int64_t i = 0; i < tasks; ++i)
    if (!f.finite[i]) return Packed::unfit;
  return Packed::done;
}

FA_END
