// The structs that cross from Python into a kernel: plain numbers and pointers, no PyTorch type.
#pragma once
#include <cstdint>

namespace fused_attention {

// Codes shared with backends/params.py (DTYPE_CODES). The last two are those of quantised caches.
enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, f64 = 3, boolean = 4, i8 = 5, e4m3 = 6 };

// Causal alignment when M != N. The diagonal of row i is the key i + diagonal, where diagonal is 0 for
// `none` and `top_left`, and N - M for `bottom_right` (N the length of this batch element's keys).
enum class Causal : int32_t { none = 0, top_left = 1, bottom_right = 2 };

enum class Weights : int32_t { none = 0, mean = 1, heads = 2 };

// A tensor of up to four dimensions. Strides are in elements; a broadcast dimension has stride 0.
// data == nullptr: the tensor is absent.
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride[4] = {0, 0, 0, 0};
  explicit operator bool() const { return data != nullptr; }
};

struct AttentionParams {
  // Dims. Packed sequences (cu_seqlens_q set): B sequences, M and N the longest of them.
  int64_t B = 0, H = 0, HK = 0, M = 0, N = 0, D = 0, DV = 0;

  // Inputs. The last dimension of q, k, v, out, dout, dq, dk, dv has stride 1.
  Tensor q;                               // [B, H, M, D]    packed: [1, H, T, D], the batch stride is 0
  Tensor k;                               // [B, HK, N, D]
  Tensor v;                               // [B, HK, N, DV]
  Tensor mask;                            // [B, H, M, N]    boolean (false hides) or floating (added; -inf hides)
  Tensor bias;                            // [B, H, M, N]    floating (added; -inf hides)
  Tensor alibi;                           // [B, H]          f32 slopes: -slope * |row + diagonal - column| is added
  Tensor sinks;                           // [H]             f32 (f64 where q is f64): exp(sink) joins the denominator
  Tensor block_map;                       // [B, H, ceil(M / block_m), ceil(N / block_n)]  boolean: false hides a block
  const int64_t* key_lengths = nullptr;   // [B]      keys at and past it are hidden
  const int64_t* cu_seqlens_q = nullptr;  // [B + 1]  packed: first row of each sequence
  const int64_t* cu_seqlens_k = nullptr;  // [B + 1]

  // Options.
  Causal causal = Causal::none;
  int64_t window_left = -1, window_right = -1;  // keys diagonal - left .. diagonal + right; -1 is open
  double scale = 1.0;
  double softcap = 0.0;              // 0: none
  double dropout_p = 0.0;            // in [0, 1)
  uint64_t seed = 0;                 // Philox key; counter (column / 4, row, head, batch), word column % 4
  int64_t block_m = 0, block_n = 0;  // rows and keys of a block of block_map; block_n is a multiple of 16
  Weights weights_mode = Weights::none;
  bool batch_invariant = false;
  bool int8 = false;          // on a CPU, forward: q and k are rounded to 8 bits, row by row
  bool part_of_keys = false;  // backward: out and lse are of rows that see more keys than these
  int32_t threads = 1;

  // Outputs of the forward pass, inputs of the backward pass.
  Tensor out;      // [B, H, M, DV]
  Tensor lse;      // [B, H, M]     f32 (f64 where q is f64); natural log; -inf where no key is seen
  Tensor weights;  // heads: [B, H, M, N]; mean: [B, (stride 0), M, N]; dtype of q, dense; may be absent

  // Backward pass: gradients that come in ...
  Tensor dout;      // [B, H, M, DV]
  Tensor dlse;      // [B, H, M]     dtype of lse; may be absent
  Tensor dweights;  // as weights, any strides; may be absent
  // ... and those that go out; an absent one is not computed.
  Tensor dq;      // [B, H, M, D]
  Tensor dk;      // [B, HK, N, D]
  Tensor dv;      // [B, HK, N, DV]
  Tensor dmask;   // [B, H, M, N]  dtype of lse, zero-stride dimensions are summed over in a fixed order
  Tensor dbias;   // [B, H, M, N]  likewise
  Tensor dsinks;  // [H]           dtype of lse
  Tensor delta;   // [B, H, M]     dtype of lse: workspace, rowsum(dout * out); may be absent

  // On a GPU: what lies in its memory, so that nothing waits for it.
  const int64_t* seed_at = nullptr;          // [1]  the Philox key, in place of `seed`
  const int64_t* order = nullptr;            // [B]  packed: sequences by falling work
  const int64_t* row_ends = nullptr;         // [B]  packed: blocks of rows of order[0] .. order[i] together
  const int64_t* key_ends = nullptr;         // [B]  packed: blocks of keys, likewise
  int64_t total_rows = 0, total_keys = 0;    // packed: rows of q and of k over all sequences
  int32_t arch = 80;                         // of the kernels: 80 or 90
  int32_t processors = 1;                    // multiprocessors, for kernels whose CTAs stay
  int64_t mask_shares = 0, bias_shares = 0;  // dmask, dbias are [shares, ...], dense: parts that are added afterwards

  // On a CPU, forward only: where `lengths` is given, k and v are those of a cache, of any dtype but f64 and boolean. At
  // most 16 rows. With new_k the lengths count what was there before, and are raised by M.
  void* lengths = nullptr;    // [B]  in place of key_lengths
  bool long_lengths = false;  // int64, not int32
  Tensor new_k, new_v;        // [B, HK, M, D], [B, HK, M, DV], of k's dtype: become the last M keys before any is read
  Tensor tree;                // [B, M, M]    boolean: which of the last M keys, its own among them, a row sees
  Tensor k_scale, v_scale;    // [B, HK, N]   f32: k is the scale times the code; absent where k has no codes
  // With pages k, v, k_scale and v_scale are [pages, HK, page_size, ...]: key n of sequence b is row n % page_size of
  // page table[b, n / page_size].
  const int32_t* table = nullptr;    // [B, ceil(N / page_size)]
  int64_t table_step = 0;            // from sequence to sequence
  int64_t pages = 0, page_size = 0;  // 0: no pages
};

// A projection on a CPU: y = x w^T + b. All of one floating dtype; the last dimension of each has stride 1.
struct LinearParams {
  int64_t rows = 0, in = 0, out = 0;
  Tensor x;  // [rows, in]
  Tensor w;  // [out, in]
  Tensor b;  // [out]        may be absent
  Tensor y;  // [rows, out]
  int32_t threads = 1;
};

}  // namespace fused_attention
