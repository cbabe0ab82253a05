// From a dict of numbers and pointers to one of the structs that kernels take.
//
// A tensor is a tuple (address, dtype code, stride 0, ... stride 3), strides in elements, trailing ones optional.
// The keys are the fields of the struct; an absent key keeps its default.
#pragma once
#include <pybind11/pybind11.h>

#include <cstddef>
#include <string>

#include "params.h"
#ifdef FA_HAVE_CUDA
  #include "cuda/launch.h"
  #include "cuda/plan.h"
#endif

namespace py = pybind11;

namespace fused_attention {

enum class Kind { int64, int32, uint64, real, flag, code, address, tensor };

struct Field {
  const char* name;
  Kind kind;
  size_t offset;
};

#define FIELD(name, kind) {#name, Kind::kind, offsetof(AttentionParams, name)}
static const Field kFields[] = {
    FIELD(B, int64),
    FIELD(H, int64),
    FIELD(HK, int64),
    FIELD(M, int64),
    FIELD(N, int64),
    FIELD(D, int64),
    FIELD(DV, int64),
    FIELD(q, tensor),
    FIELD(k, tensor),
    FIELD(v, tensor),
    FIELD(mask, tensor),
    FIELD(bias, tensor),
    FIELD(alibi, tensor),
    FIELD(sinks, tensor),
    FIELD(block_map, tensor),
    FIELD(block_m, int64),
    FIELD(block_n, int64),
    FIELD(key_lengths, address),
    FIELD(cu_seqlens_q, address),
    FIELD(cu_seqlens_k, address),
    FIELD(causal, code),
    FIELD(window_left, int64),
    FIELD(window_right, int64),
    FIELD(scale, real),
    FIELD(softcap, real),
    FIELD(dropout_p, real),
    FIELD(seed, uint64),
    FIELD(weights_mode, code),
    FIELD(batch_invariant, flag),
    FIELD(int8, flag),
    FIELD(part_of_keys, flag),
    FIELD(threads, int32),
    FIELD(out, tensor),
    FIELD(lse, tensor),
    FIELD(weights, tensor),
    FIELD(dout, tensor),
    FIELD(dlse, tensor),
    FIELD(dweights, tensor),
    FIELD(dq, tensor),
    FIELD(dk, tensor),
    FIELD(dv, tensor),
    FIELD(dmask, tensor),
    FIELD(dbias, tensor),
    FIELD(dsinks, tensor),
    FIELD(delta, tensor),
    FIELD(seed_at, address),
    FIELD(order, address),
    FIELD(row_ends, address),
    FIELD(key_ends, address),
    FIELD(total_rows, int64),
    FIELD(total_keys, int64),
    FIELD(arch, int32),
    FIELD(processors, int32),
    FIELD(mask_shares, int64),
    FIELD(bias_shares, int64),
    FIELD(tree, tensor),
    FIELD(new_k, tensor),
    FIELD(new_v, tensor),
    FIELD(lengths, address),
    FIELD(long_lengths, flag),
    FIELD(k_scale, tensor),
    FIELD(v_scale, tensor),
    FIELD(table, address),
    FIELD(table_step, int64),
    FIELD(pages, int64),
    FIELD(page_size, int64),
};
#undef FIELD

#define FIELD(name, kind) {#name, Kind::kind, offsetof(LinearParams, name)}
static const Field kLinearFields[] = {
    FIELD(rows, int64), FIELD(in, int64), FIELD(out, int64), FIELD(x, tensor),
    FIELD(w, tensor),   FIELD(b, tensor), FIELD(y, tensor),  FIELD(threads, int32),
};
#undef FIELD

#ifdef FA_HAVE_CUDA
  // Offsets into a structure that stands within another.
  #define FIELD(name, kind) {#name, Kind::kind, offsetof(cuda::DecodeParams, name)}
  #define CACHE_FIELD(name, kind) {#name, Kind::kind, offsetof(Params, cache) + offsetof(cuda::CacheParams, name)}
template <class Params>
struct CacheFields {
  static constexpr Field list[] = {
      CACHE_FIELD(k, tensor),        CACHE_FIELD(v, tensor),          CACHE_FIELD(k_scale, tensor),
      CACHE_FIELD(v_scale, tensor),  CACHE_FIELD(table, address),     CACHE_FIELD(table_step, int64),
      CACHE_FIELD(pages, int64),     CACHE_FIELD(page_size, int64),   CACHE_FIELD(capacity, int64),
      CACHE_FIELD(lengths, address), CACHE_FIELD(long_lengths, flag),
  };
};
static const Field kDecodeFields[] = {
    FIELD(B, int64),        FIELD(H, int64),           FIELD(HK, int64),     FIELD(M, int64),      FIELD(D, int64),
    FIELD(DV, int64),       FIELD(q, tensor),          FIELD(alibi, tensor), FIELD(sinks, tensor), FIELD(scale, real),
    FIELD(softcap, real),   FIELD(window_left, int64), FIELD(splits, int64), FIELD(out, tensor),   FIELD(lse, tensor),
    FIELD(partial, tensor), FIELD(stats, tensor),
};
  #undef FIELD
  #define FIELD(name, kind) {#name, Kind::kind, offsetof(cuda::AppendParams, name)}
static const Field kAppendFields[] = {
    FIELD(B, int64),         FIELD(H, int64),          FIELD(HK, int64),         FIELD(M, int64),
    FIELD(D, int64),         FIELD(DV, int64),         FIELD(query, tensor),     FIELD(turned, tensor),
    FIELD(key, tensor),      FIELD(value, tensor),     FIELD(cos, tensor),       FIELD(sin, tensor),
    FIELD(positions, int64), FIELD(rotary_dim, int64), FIELD(interleaved, flag),
};
  #undef FIELD
  #undef CACHE_FIELD
  #define FIELD(name, kind) {#name, Kind::kind, offsetof(cuda::Fp8Params, name)}
static const Field kFp8Fields[] = {
    FIELD(q_codes, tensor),  FIELD(k_codes, tensor),  FIELD(v_codes, tensor),
    FIELD(q_scales, tensor), FIELD(k_scales, tensor), FIELD(v_scales, tensor),
};
  #undef FIELD
static_assert(offsetof(cuda::Fp8Params, hopper) == 0 && offsetof(cuda::HopperParams, p) == 0);
#endif

// name -> Field*, as a Python dict of capsule-free integers: one hash lookup per argument.
template <size_t... COUNT>
static PyObject* make_table(const Field (&... fields)[COUNT]) {
  PyObject* d = PyDict_New();
  const auto add = [d](const auto& list) {
    for (const Field& f : list) PyDict_SetItemString(d, f.name, PyLong_FromVoidPtr(const_cast<Field*>(&f)));
  };
  (add(fields), ...);
  return d;
}
template <class Params>
static PyObject* field_table();
template <>
PyObject* field_table<AttentionParams>() {
  static PyObject* const table = make_table(kFields);
  return table;
}

template <>
PyObject* field_table<LinearParams>() {
  static PyObject* const table = make_table(kLinearFields);
  return table;
}

#ifdef FA_HAVE_CUDA
template <>
PyObject* field_table<cuda::Fp8Params>() {  // the call stands at its beginning
  static PyObject* const table = make_table(kFields, kFp8Fields);
  return table;
}
template <>
PyObject* field_table<cuda::DecodeParams>() {
  static PyObject* const table = make_table(kDecodeFields, CacheFields<cuda::DecodeParams>::list);
  return table;
}
template <>
PyObject* field_table<cuda::AppendParams>() {
  static PyObject* const table = make_table(kAppendFields, CacheFields<cuda::AppendParams>::list);
  return table;
}
#endif

[[noreturn]] static void bad_value(const Field& f, const char* expected) {
  throw py::type_error("argument '" + std::string(f.name) + "': expected " + expected);
}

static int64_t integer(const Field& f, PyObject* value) {
  const long long x = PyLong_AsLongLong(value);
  if (x == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    bad_value(f, "an integer of 64 bits");
  }
  return x;
}

static uint64_t unsigned_integer(const Field& f, PyObject* value) {  // modulo 2^64: a negative seed is as good as any
  const unsigned long long x = PyLong_AsUnsignedLongLongMask(value);
  if (x == static_cast<unsigned long long>(-1) && PyErr_Occurred()) {
    PyErr_Clear();
    bad_value(f, "an integer");
  }
  return x;
}

static Tensor tensor(const Field& f, PyObject* value) {
  const char* expected = "(address, dtype code 0..6, up to 4 strides)";
  if (!PyTuple_Check(value)) bad_value(f, expected);
  const Py_ssize_t size = PyTuple_GET_SIZE(value);
  if (size < 2 || size > 6) bad_value(f, expected);
  Tensor t;
  t.data = reinterpret_cast<void*>(static_cast<uintptr_t>(unsigned_integer(f, PyTuple_GET_ITEM(value, 0))));
  const int64_t code = integer(f, PyTuple_GET_ITEM(value, 1));
  if (code < 0 || code > static_cast<int64_t>(DType::e4m3)) bad_value(f, expected);
  t.dtype = static_cast<DType>(code);
  for (Py_ssize_t i = 2; i < size; ++i) t.stride[i - 2] = integer(f, PyTuple_GET_ITEM(value, i));
  return t;
}

static void set_field(void* params, const Field& f, PyObject* value) {
  void* at = static_cast<char*>(params) + f.offset;
  switch (f.kind) {
    case Kind::int64:
      *static_cast<int64_t*>(at) = integer(f, value);
      break;
    case Kind::int32:
      *static_cast<int32_t*>(at) = static_cast<int32_t>(integer(f, value));
      break;
    case Kind::uint64:
      *static_cast<uint64_t*>(at) = unsigned_integer(f, value);
      break;
    case Kind::flag:
      *static_cast<bool*>(at) = integer(f, value) != 0;
      break;
    case Kind::tensor:
      *static_cast<Tensor*>(at) = tensor(f, value);
      break;
    case Kind::address:
      *static_cast<const int64_t**>(at) =
          reinterpret_cast<const int64_t*>(static_cast<uintptr_t>(unsigned_integer(f, value)));
      break;
    case Kind::code: {
      const int64_t code = integer(f, value);
      if (code < 0 || code > 2) bad_value(f, "a code 0, 1 or 2");
      *static_cast<int32_t*>(at) = static_cast<int32_t>(code);
      break;
    }
    case Kind::real: {
      const double x = PyFloat_AsDouble(value);
      if (x == -1.0 && PyErr_Occurred()) {
        PyErr_Clear();
        bad_value(f, "a number");
      }
      *static_cast<double*>(at) = x;
      break;
    }
  }
}

template <class Params>
static Params parse(const py::dict& args) {
  Params p;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(args.ptr(), &position, &key, &value)) {
    PyObject* found = PyDict_GetItemWithError(field_table<Params>(), key);
    if (!found) {
      PyErr_Clear();
      throw py::type_error("unknown argument " + std::string(py::repr(key)));
    }
    set_field(&p, *static_cast<const Field*>(PyLong_AsVoidPtr(found)), value);
  }
  return p;
}

}  // namespace fused_attention
