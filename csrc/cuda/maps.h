// Which tensors the copy engine of sm_90 can read, and the description of their tensor maps (plan.h).
#pragma once
#include "plan.h"

namespace fused_attention::cuda {

// Rows [batch, head, row, column] of 16-bit numbers, or of codes of 8 bits. Packed sequences: all rows follow each other in one batch element.
struct RowsOf {
  const Tensor& tensor;
  int64_t batch, heads, rows, columns;
};

// A dimension of stride 0, or of one element, has one element in the map: kernels use coordinate 0 where the stride is 0.
inline int64_t map_dim(int64_t size, int64_t stride) { return stride ? size : 1; }
// Of one element: any stride will do.
inline int64_t map_stride(int64_t size, int64_t stride, int bytes = 2) {
  return size > 1 && stride ? bytes * stride : 16;
}
inline int bytes_of(DType t) { return t == DType::e4m3 ? 1 : 2; }

inline bool can_map(const RowsOf& r) {
  if (reinterpret_cast<uintptr_t>(r.tensor.data) % 16 || r.rows < 1) return false;
  if (r.rows > 1 && r.tensor.stride[2] == 0) return false;  // rows that share memory
  const int64_t sizes[3] = {r.batch, r.heads, r.rows};
  for (int i = 0; i < 3; ++i) {
    const int64_t bytes = map_stride(sizes[i], r.tensor.stride[i]);
    if (bytes % 16 || bytes < 0 || bytes >= int64_t{1} << 40) return false;
  }
  return true;
}

// Boxes of `box_columns` columns and `box_rows` rows.
inline MapPlan make_map(const RowsOf& r, size_t offset, int box_rows, int box_columns = 64) {
  const int64_t* stride = r.tensor.stride;
  const int bytes = bytes_of(r.tensor.dtype);
  return {static_cast<int>(offset),
          r.tensor.data,
          r.tensor.dtype,
          {r.columns, r.rows, map_dim(r.heads, stride[1]), map_dim(r.batch, stride[0])},
          {map_stride(r.rows, stride[2], bytes), map_stride(r.heads, stride[1], bytes),
           map_stride(r.batch, stride[0], bytes)},
          {box_columns, box_rows, 1, 1}};
}

}  // namespace fused_attention::cuda
