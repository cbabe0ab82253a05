// Which kernels run on this processor, and the threads that run them.
#include "dispatch.h"

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <stdexcept>

#include "threads.h"

namespace fused_attention {

extern const Kernels kernels_portable;
#if defined(FA_HAVE_AVX2)
extern const Kernels kernels_avx2;
#endif
#if defined(FA_HAVE_AVX512)
extern const Kernels kernels_avx512;
#endif

std::vector<const Kernels*> supported_kernels() {
  std::vector<const Kernels*> all{&kernels_portable};
  // f16c is not asked for: older compilers do not know its name, and every processor with AVX2 has it.
#if defined(FA_HAVE_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) all.push_back(&kernels_avx2);
#endif
#if defined(FA_HAVE_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma"))
    all.push_back(&kernels_avx512);
#endif
  return all;
}

static const Kernels* choose() {
  const std::vector<const Kernels*> all = supported_kernels();
  const char* asked = std::getenv("FUSED_ATTENTION_CPU_ISA");
  if (!asked || !*asked) return all.back();
  std::string names;
  for (const Kernels* k : all) {
    if (asked == std::string(k->isa)) return k;
    names += (names.empty() ? "" : ", ") + std::string(k->isa);
  }
  throw std::invalid_argument("FUSED_ATTENTION_CPU_ISA=" + std::string(asked) + ", expected one of: " + names);
}

const Kernels& kernels() {
  static const Kernels* const chosen = choose();
  return *chosen;
}

static std::atomic<bool> forked{false};

void watch_forks() {
  static const int installed = pthread_atfork(nullptr, nullptr, [] { forked = true; });
  (void)installed;
}

void* allocate(size_t bytes) { return ::operator new(std::max<size_t>(bytes, 1), std::align_val_t(64), std::nothrow); }
void release(void* memory) { ::operator delete(memory, std::align_val_t(64), std::nothrow); }

bool run_tasks(int64_t tasks, int threads, double work, size_t scratch_bytes, Task run, const void* plan) {
  if (tasks <= 0) return true;
  // Waking the pool takes some 5 us, as long as half a million multiply-adds.
  constexpr double kWorthAThread = 5e5;
  const bool serial = threads <= 1 || tasks == 1 || work < kWorthAThread || forked || omp_in_parallel();
  const int team = serial ? 1 : static_cast<int>(std::min<int64_t>(threads, tasks));
  const size_t each = (scratch_bytes + 4095) / 4096 * 4096;  // no page of scratch is shared
  char* scratch = static_cast<char*>(allocate(each * static_cast<size_t>(team)));
  if (!scratch) return false;
  if (team == 1) {
    for (int64_t i = 0; i < tasks; ++i) run(plan, i, scratch);
  } else {
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
    for (int64_t i = 0; i < tasks; ++i) run(plan, i, scratch + each * static_cast<size_t>(omp_get_thread_num()));
  }
  release(scratch);
  return true;
}

}  // namespace fused_attention
