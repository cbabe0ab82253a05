// The CPU kernels for one instruction set. Compiled once for each, with
//   -DFA_ISA=portable
//   -DFA_ISA=avx2    -mavx2 -mfma -mf16c
//   -DFA_ISA=avx512  -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512
//   -DFA_ISA=avx512_bf16  the same and -mavx512bf16 -mavx512vnni -DFA_PRODUCTS=3
//   -DFA_ISA=amx     the same as avx512 and -mavx512bf16 -mamx-tile -mamx-bf16 -mamx-int8 -DFA_PRODUCTS=1
//   -DFA_ISA=amx_emulated  -DFA_PRODUCTS=2 -Wno-psabi: the kernels of amx with the tiles in plain C++ (amx.h), for tests
// and dispatch.cpp with -DFA_HAVE_PORTABLE, -DFA_HAVE_AVX2 ... for those that were.
//
// Nothing here may include a C++ standard header: an inline function of one, compiled for AVX-512, could be the copy
// that the linker keeps for the whole library.
#include "kernels.h"

#if defined(FA_PRODUCTS)
  #include "panel_backward.h"
  #include "panel_weights.h"
#endif
#include "backward.h"
#include "bias_grad.h"
#include "few_rows.h"
#include "linear.h"
#include "weights.h"

FA_BEGIN

template <class T>
static bool query_key_value_gradients(Plan<T>& f, double work) {
  if (!f.p.dq.data && !f.p.dk.data && !f.p.dv.data) return true;
#if defined(FA_PRODUCTS)
  if constexpr (sizeof(T) == sizeof(float)) {
    const bool same = !f.p.dout.data || f.p.dout.dtype == f.p.q.dtype;
    const Packed done = same && panels_wanted(f.p) ? panel_backward(f, work) : Packed::unfit;
    if (done != Packed::unfit) return done == Packed::done;
  }
#endif
  return backward_qkv<T>(f, work);
}

template <class T>
static bool backward(const AttentionParams& params) {
  Plan<T> f = make_plan<T>(params);
  const AttentionParams& p = f.p;
  const double work = static_cast<double>(p.B * p.H) * static_cast<double>(p.M) * static_cast<double>(p.N + 1) *
                      static_cast<double>(p.D + p.DV) * 2.5;
  const int64_t heads = p.B * p.H;
  // delta where the caller brings none, and what the gradients of lse and of the weights add to it
  const int64_t packed = p.cu_seqlens_q ? p.cu_seqlens_q[p.B] : 0, own_rows = p.delta.data ? 0 : max_of(packed, p.M);
  const int64_t rest_size = p.dlse.data || p.dweights.data ? heads * p.M : 0;
  T* memory = static_cast<T*>(allocate(sizeof(T) * static_cast<size_t>(heads * own_rows + rest_size)));
  if (!memory) return false;
  f.rest = rest_size ? memory : nullptr;
  if (own_rows) {
    f.p.delta.data = memory + rest_size;
    f.p.delta.stride[0] = p.H * own_rows, f.p.delta.stride[1] = own_rows, f.p.delta.stride[2] = 1;
  }
  Arena count{0};
  DeltaScratch<T> layout(f, count);
  const double light = p.dweights.data ? work : static_cast<double>(heads * p.M * p.DV);
  bool ok = run_tasks(heads * f.blocks, p.threads, light, count.used, delta_task<T>, &f);
  ok = ok && query_key_value_gradients<T>(f, work);
  if (p.dsinks.data) ok = ok && run_tasks(p.H, p.threads, static_cast<double>(heads * p.M) * 16, 0, sinks_task<T>, &f);
  if (p.dmask.data) ok = ok && bias_grad<T>(f, p.dmask, work);
  if (p.dbias.data) ok = ok && bias_grad<T>(f, p.dbias, work);
  release(memory);
  return ok;
}

static bool run_forward(const AttentionParams& p) {
  if (p.q.dtype == DType::f64) return p.weights.data ? weights<double>(p) : forward<double>(p);
#if defined(FA_PRODUCTS)
  if (p.weights.data && panel_weights_wanted(p)) return panel_weights(p);
#endif
  if (p.weights.data) return weights<float>(p);
  const bool few = few_rows_wanted(p);
  if (few && p.lengths) return few_rows_of_cache(p);
#if defined(FA_PRODUCTS)
  if (p.int8 || panels_wanted(p)) return panel_forward(p);
#endif
  return few ? few_rows(p) : forward<float>(p);
}
static bool run_backward(const AttentionParams& p) {
  return p.q.dtype == DType::f64 ? backward<double>(p) : backward<float>(p);
}

FA_END

#define FA_NAME2(isa) kernels_##isa
#define FA_NAME(isa) FA_NAME2(isa)
#define FA_STRING2(isa) #isa
#define FA_STRING(isa) FA_STRING2(isa)

namespace fused_attention {
extern const Kernels FA_NAME(FA_ISA);
const Kernels FA_NAME(FA_ISA) = {FA_STRING(FA_ISA), FA_ISA::run_forward, FA_ISA::run_backward, FA_ISA::linear};
}  // namespace fused_attention
