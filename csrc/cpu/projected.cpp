// The three steps, each a kernel of the instruction set in use.
#include "projected.h"

#include <cstddef>
#include <initializer_list>

#include "kernels.h"
#include "threads.h"

namespace fused_attention {

static void put(Tensor& t, uintptr_t address) { t.data = reinterpret_cast<void*>(address); }

bool run_projected(const Projected& steps, const ProjectedAddresses& at, int32_t threads) {
  const Kernels& k = kernels();  // may throw: before anything is allocated
  LinearParams first = steps.first, last = steps.last;
  AttentionParams p = steps.attention;
  const size_t element = p.q.dtype == DType::f64 ? 8 : p.q.dtype == DType::f32 ? 4 : 2;
  const size_t joint_bytes = element * static_cast<size_t>(first.rows * first.out);
  uintptr_t joint = at.joint, attended = at.attended;
  void* memory = nullptr;
  if (!joint) {
    memory = allocate(joint_bytes + element * static_cast<size_t>(last.rows * last.in));
    if (!memory) return false;
    joint = reinterpret_cast<uintptr_t>(memory), attended = joint + joint_bytes;
  }
  put(first.x, at.x), put(first.w, at.w1), put(first.b, at.b1), put(first.y, joint);
  for (Tensor* t : {&p.q, &p.k, &p.v}) put(*t, joint + reinterpret_cast<uintptr_t>(t->data));
  put(p.out, attended), put(p.lse, at.lse), put(p.weights, at.weights);
  put(last.x, attended), put(last.w, at.w2), put(last.b, at.b2), put(last.y, at.y);
  first.threads = p.threads = last.threads = threads;
  const bool ok = k.linear(first) && k.forward(p) && k.linear(last);
  release(memory);
  return ok;
}

}  // namespace fused_attention
