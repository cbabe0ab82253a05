// Python's view of the kernels: dicts of numbers and pointers in (arguments.h), the call without the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <new>
#include <string>

#include "arguments.h"
#include "cpu/dispatch.h"
#include "cpu/projected.h"
#include "cpu/threads.h"

namespace fused_attention {

template <class Params, bool (*Kernels::*FUNCTION)(const Params&)>
static void call(const py::dict& args) {
  const Params p = parse<Params>(args);
  const Kernels& k = kernels();
  bool ok;
  {
    py::gil_scoped_release nogil;
    ok = (k.*FUNCTION)(p);
  }
  if (!ok) throw std::bad_alloc();
}

// run_projected with all that stays the same from call to call, and then the addresses; 0: absent, or not wanted.
struct ProjectedCall {
  Projected steps;

  ProjectedCall(const py::dict& first, const py::dict& args, const py::dict& last)
      : steps{parse<LinearParams>(first), parse<AttentionParams>(args), parse<LinearParams>(last)} {}

  void run(uintptr_t x, uintptr_t w1, uintptr_t b1, uintptr_t w2, uintptr_t b2, uintptr_t joint, uintptr_t attended,
           uintptr_t y, uintptr_t lse, uintptr_t weights, int32_t threads) const {
    bool ok;
    {
      py::gil_scoped_release nogil;
      ok = run_projected(steps, {x, w1, b1, w2, b2, joint, attended, y, lse, weights}, threads);
    }
    if (!ok) throw std::bad_alloc();
  }
};

#ifdef FA_HAVE_CUDA
// What would be launched: [(kernel, blocks, threads, bytes of shared memory, the kernel's argument, tensor maps), ...].
// A tensor map: (its offset in the argument, address, dtype code, dims, strides in bytes, box), the innermost dim first.
template <class Params, std::vector<cuda::Launch> (*PLAN)(const Params&)>
static py::list cuda_plan(const py::dict& args) {
  py::list found;
  for (const cuda::Launch& l : PLAN(parse<Params>(args))) {
    const py::bytes params(reinterpret_cast<const char*>(l.params.data()), l.params.size());
    py::list maps;
    for (const cuda::MapPlan& m : l.maps)
      maps.append(py::make_tuple(m.offset, reinterpret_cast<uintptr_t>(m.address), static_cast<int>(m.dtype), m.dims,
                                 m.strides, m.box));
    found.append(py::make_tuple(l.kernel, l.grid, l.threads, l.shared_bytes, params, maps));
  }
  return found;
}

template <class Params, std::vector<cuda::Launch> (*PLAN)(const Params&)>
static void cuda_call(const py::dict& args, uintptr_t stream) {
  const Params p = parse<Params>(args);
  std::string error = cuda::refusal(p);
  if (error.empty()) {
    py::gil_scoped_release nogil;
    error = cuda::run(PLAN(p), reinterpret_cast<void*>(stream));
  }
  if (!error.empty()) throw std::runtime_error("CUDA kernels: " + error);
}

template <class Params, std::vector<cuda::Launch> (*PLAN)(const Params&)>
static void define_cuda(py::module_& m, const std::string& name) {
  m.def(("cuda_" + name).c_str(), &cuda_call<Params, PLAN>, py::arg("args"), py::arg("stream"));
  m.def(("cuda_plan_" + name).c_str(), &cuda_plan<Params, PLAN>, py::arg("args"));
}

static py::tuple cuda_blocks(const py::dict& args) {
  const cuda::Blocks b = cuda::block_sizes(parse<AttentionParams>(args));
  return py::make_tuple(b.forward_rows, b.forward_group, b.backward_rows, b.backward_keys);
}

static py::tuple cuda_fp8_blocks(const py::dict& args) {
  const cuda::Fp8Blocks b = cuda::fp8_blocks(parse<AttentionParams>(args));
  return py::make_tuple(b.rows, b.group, b.scale);
}

static py::tuple cuda_shares(const py::dict& args) {
  const cuda::Shares shares = cuda::additive_shares(parse<AttentionParams>(args));
  return py::make_tuple(shares.mask, shares.bias);
}
#endif

static py::dict info() {
  py::dict d;
  std::vector<std::string> isas, by_name;
  py::dict refused;
  for (const Variant& v : variants()) {
    if (!v.refusal.empty())
      refused[v.name] = v.refusal;
    else
      (v.automatic ? isas : by_name).emplace_back(v.name);
  }
  d["isa"] = kernels().isa;
  d["isas"] = isas;
  d["isas_for_tests"] = by_name;
  d["isas_refused"] = refused;
#if defined(__clang__)
  d["compiler"] = __VERSION__;
#else
  d["compiler"] = "gcc " __VERSION__;
#endif
  d["openmp"] = _OPENMP;
#ifdef FA_HAVE_CUDA
  d["cuda_archs"] = cuda::built_architectures();
  d["cuda_compiler"] = cuda::built_by();
#endif
  return d;
}

}  // namespace fused_attention

PYBIND11_MODULE(_C, m) {
  using namespace fused_attention;
  watch_forks();
  m.doc() = "Attention on a CPU. Each function takes dicts with the fields of the structs in csrc/params.h.";
  m.def("attention_forward", &call<AttentionParams, &Kernels::forward>, py::arg("args"));
  m.def("attention_backward", &call<AttentionParams, &Kernels::backward>, py::arg("args"));
  m.def("linear", &call<LinearParams, &Kernels::linear>, py::arg("args"));
  py::class_<ProjectedCall>(m, "Projected", "attention between two projections")
      .def(py::init<const py::dict&, const py::dict&, const py::dict&>(), py::arg("first"), py::arg("args"),
           py::arg("last"))
      .def("run", &ProjectedCall::run);
#ifdef FA_HAVE_CUDA
  define_cuda<AttentionParams, cuda::plan_forward>(m, "forward");
  define_cuda<cuda::Fp8Params, cuda::plan_forward_fp8>(m, "forward_fp8");
  define_cuda<AttentionParams, cuda::plan_backward>(m, "backward");
  define_cuda<cuda::DecodeParams, cuda::plan_decode>(m, "decode");
  define_cuda<cuda::AppendParams, cuda::plan_append>(m, "append");
  m.def("cuda_shares", &cuda_shares, "in how many shares the gradients of (mask, bias) are summed", py::arg("args"));
  m.def("cuda_fp8_blocks", &cuda_fp8_blocks,
        "with products of float8: (rows of a block, heads taken together there, rows or keys that share a scale)",
        py::arg("args"));
  m.def("cuda_blocks", &cuda_blocks,
        "what packed sequences are counted in: (forward rows, heads taken together there, backward rows, keys)",
        py::arg("args"));
#endif
  m.def(
      "info", &info,
      "isa: the instruction set in use; isas: those to choose from, the best last; isas_for_tests: those taken by name "
      "only; isas_refused: {name: why not}; compiler; openmp");
}
