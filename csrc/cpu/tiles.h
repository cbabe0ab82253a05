// Block sizes: pure functions of the head dims and the element size, so that results depend on nothing else.
#pragma once
#include "vec.h"

FA_BEGIN

struct Blocks {
  int m, n;  // rows and keys of a score tile
};

constexpr int kMaxRows = 96, kMaxKeys = 128;

// Rows of a forward block whose scores are taken at once. D 64: 24 by 128 in fp32 are 14 KB, which stay in L1 between the
// two products, and 24 are whole panels for MR 4, 6, 8, 12. Wider heads: all, because K and V, which come from L2 once for
// every such share of the rows, are then the larger part.
template <class T>
FA_INLINE int score_rows(int64_t d, int64_t dv) {
  return max_of(d, dv) * static_cast<int64_t>(sizeof(T)) <= 256 ? 24 : kMaxRows;
}

// Forward: the rows of a block share the packed K and V. A thread holds Q, K^T, V, O and a few rows of S; the aim is
// 512 KB of L2 with room to spare. In fp32:
//   D  64: 192 rows and 128 keys take 0.2 MB; packing is 2% of the work
//   D 128: 96 x 128 take 0.3 MB; 192 rows were not faster
//   D 256: 48 x 64 take 0.3 MB
//   D 512: 48 x 32 take 0.35 MB; 32 keys are one vector pair of AVX-512
template <class T>
FA_INLINE Blocks forward_blocks(int64_t d, int64_t dv) {
  const int64_t bytes = max_of(d, dv) * static_cast<int64_t>(sizeof(T));
  if (bytes <= 256) return {192, 128};
  if (bytes <= 512) return {96, 128};
  if (bytes <= 1024) return {48, 64};
  return {48, 32};
}

// Blocks that share less where there would be fewer than 32 tasks, which keep any desktop busy.
FA_INLINE int shared_rows(int64_t rows, int64_t heads, int most) {
  return most > 96 && heads * ceil_div(rows, most) < 32 ? 96 : most;
}

// Rows of a forward block that keeps `held` numbers per score (weights.h): those of any forward block. The numbers then go
// through L3 where there are many keys, which costs less than packing K and V for blocks of fewer rows. The limit is for
// memory: 8 MB a thread up to 43000 keys, and 24 rows beyond.
template <class T>
FA_INLINE int weights_rows(int64_t keys, int held, int most) {
  int rows = most;
  while (rows > 24 && rows * keys * held * static_cast<int64_t>(sizeof(T)) > 8 << 20) rows /= 2;
  return rows;
}

// Backward: K, K^T, V^T, dK, dV of a key block, Q and dO of a row block, and two score tiles. Keys are rows of
// dV = P^T dO, so both sides want whole panels of MR and of NR; 96 and 48 are, for every MR and (but 48 by 32) NR.
//   D  64: 96 x 96 take 0.3 MB;  D 128: 48 x 96, 0.4 MB;  D 256: 48 x 48, 0.45 MB;  D 512: 24 x 48, 0.65 MB
template <class T>
FA_INLINE Blocks backward_blocks(int64_t d, int64_t dv) {
  const int64_t bytes = max_of(d, dv) * static_cast<int64_t>(sizeof(T));
  if (bytes <= 256) return {96, 96};
  if (bytes <= 512) return {48, 96};
  if (bytes <= 1024) return {48, 48};
  return {24, 48};
}

// Rows per block with the rows spread evenly over the blocks: 197 rows are 3 x 66, not 96 + 96 + 5.
FA_INLINE int even_rows(int64_t rows, int most) {
  const int64_t blocks = max_of<int64_t>(ceil_div(rows, most), 1);
  return static_cast<int>(max_of<int64_t>(round_up(ceil_div(rows, blocks), MR), MR));
}

// Elements from one row of a packed block to the next: whole vectors pairs, and an odd number of 64-byte lines,
// because a power of two would map a column of the block to a few sets of the L1 cache.
template <class T>
FA_INLINE int64_t padded(int64_t n) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  const int64_t lines = round_up(round_up(n, NR<T>), line) / line;
  return (lines | 1) * line;
}

// Terms of a dot product that are added in one chain, which rounds like the square root of its length. Few rows or few
// keys have time for short chains; a library's dot product, which they are compared with, has them in its lanes.
FA_INLINE int dot_piece(int64_t rows, int64_t keys) { return min_of(rows, keys) <= 16 ? 8 : 64; }

// Up to this many rows of queries, few_rows.h sums q.k in the lanes of a vector, and so does whoever computes the same
// scores: P = exp(S - lse) adds up to 1 only where both have the same rounding errors.
constexpr int64_t kLaneRows = 8;
template <class T>
FA_INLINE bool in_lanes(int64_t rows) {
  return sizeof(T) == sizeof(float) && rows <= kLaneRows;
}

// Key chunks per (batch, key head) in the backward pass. Each chunk is a task and has its own partial sum of dQ, so
// more chunks mean more parallelism and more memory. 32 tasks keep any desktop busy; a chunk has at least two key
// blocks; the partial sums of one head group stay within 24 MB. Batch-invariant: as if the batch had one element.
template <class T>
FA_INLINE int64_t backward_chunks(int64_t batch, int64_t kv_heads, int64_t group, int64_t rows, int64_t keys, int64_t d,
                                  int block) {
  const int64_t wanted = ceil_div(32, max_of<int64_t>(batch * kv_heads, 1));
  const int64_t useful = keys / (2 * block);
  const int64_t bytes = max_of<int64_t>(group * rows * padded<T>(d) * static_cast<int64_t>(sizeof(T)), 1);
  const int64_t affordable = (24 << 20) / bytes;
  return max_of<int64_t>(min_of(min_of(wanted, useful), affordable), 1);
}

FA_END
