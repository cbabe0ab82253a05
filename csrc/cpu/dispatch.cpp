// Which kernels run on this processor.
#include "dispatch.h"

#if defined(__x86_64__)
  #include <cpuid.h>
#endif
#if defined(__linux__)
  #include <sys/syscall.h>
  #include <unistd.h>
#endif

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace fused_attention {

extern const Kernels kernels_portable;
#if defined(FA_HAVE_AVX2)
extern const Kernels kernels_avx2;
#endif
#if defined(FA_HAVE_AVX512)
extern const Kernels kernels_avx512;
#endif
#if defined(FA_HAVE_AVX512_BF16)
extern const Kernels kernels_avx512_bf16;
#endif
#if defined(FA_HAVE_AMX)
extern const Kernels kernels_amx;
#endif
#if defined(FA_HAVE_AMX_EMULATED)
extern const Kernels kernels_amx_emulated;
#endif

using Lacking = std::vector<std::string>;

[[maybe_unused]] static std::string lacks(const Lacking& what) {
  std::string all;
  for (const std::string& name : what) all += (all.empty() ? "this processor lacks " : ", ") + name;
  return all;
}

#if defined(__x86_64__)
// f16c is not asked for: older compilers do not know its name, and every processor with AVX2 has it.
[[maybe_unused]] static Lacking lacking_avx2() {
  Lacking names;
  if (!__builtin_cpu_supports("avx2")) names.emplace_back("avx2");
  if (!__builtin_cpu_supports("fma")) names.emplace_back("fma");
  return names;
}
[[maybe_unused]] static Lacking lacking_avx512() {
  Lacking names = lacking_avx2();
  if (!__builtin_cpu_supports("avx512f")) names.emplace_back("avx512f");
  if (!__builtin_cpu_supports("avx512bw")) names.emplace_back("avx512bw");
  if (!__builtin_cpu_supports("avx512vl")) names.emplace_back("avx512vl");
  if (!__builtin_cpu_supports("avx512dq")) names.emplace_back("avx512dq");
  return names;
}

// What follows by cpuid (leaf 7), since compilers differ in whether they know the names.
[[maybe_unused]] static Lacking lacking_avx512_bf16() {
  Lacking names = lacking_avx512();
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool leaf = __get_cpuid_count(7, 0, &a, &b, &c, &d);
  if (!leaf || !(c >> 11 & 1)) names.emplace_back("avx512_vnni");
  const bool has_one = leaf && a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d);
  if (!has_one || !(a >> 5 & 1)) names.emplace_back("avx512_bf16");
  return names;
}
[[maybe_unused]] static Lacking lacking_amx() {
  Lacking names = lacking_avx512_bf16();
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool leaf = __get_cpuid_count(7, 0, &a, &b, &c, &d);
  if (!leaf || !(d >> 24 & 1)) names.emplace_back("amx_tile");
  if (!leaf || !(d >> 22 & 1)) names.emplace_back("amx_bf16");
  if (!leaf || !(d >> 25 & 1)) names.emplace_back("amx_int8");
  return names;
}

// The registers of the tiles are 8 KB that a process must ask for (Linux 5.16). Its threads and children have them too.
[[maybe_unused]] static std::string refused_tiles() {
  #if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return "";
  return "the kernel does not grant its tile registers (arch_prctl: " + std::string(std::strerror(errno)) + ")";
  #else
  return "only Linux is known to grant its tile registers";
  #endif
}
#endif

[[maybe_unused]] static const char* const kNotBuilt = "not built: the compiler does not accept its flags";

std::vector<Variant> variants() {
  std::vector<Variant> all{{"portable", &kernels_portable, "", true}};
  const auto add = [&all](const char* name, const Kernels* kernels, const std::string& refusal, bool automatic) {
    all.push_back({name, kernels, refusal, automatic});
  };
#if defined(FA_HAVE_AVX2)
  add("avx2", &kernels_avx2, lacks(lacking_avx2()), true);
#else
  add("avx2", nullptr, kNotBuilt, true);
#endif
#if defined(FA_HAVE_AVX512)
  add("avx512", &kernels_avx512, lacks(lacking_avx512()), true);
#else
  add("avx512", nullptr, kNotBuilt, true);
#endif
#if defined(FA_HAVE_AVX512_BF16)
  add("avx512_bf16", &kernels_avx512_bf16, lacks(lacking_avx512_bf16()), true);
#else
  add("avx512_bf16", nullptr, kNotBuilt, true);
#endif
#if defined(FA_HAVE_AMX)
  const std::string lacking = lacks(lacking_amx());
  add("amx", &kernels_amx, lacking.empty() ? refused_tiles() : lacking, true);
#else
  add("amx", nullptr, kNotBuilt, true);
#endif
#if defined(FA_HAVE_AMX_EMULATED)
  add("amx_emulated", &kernels_amx_emulated, "", false);
#else
  add("amx_emulated", nullptr, kNotBuilt, false);
#endif
  return all;
}

static const Kernels* choose() {
  const char* asked = std::getenv("FUSED_ATTENTION_CPU_ISA");
  const Kernels* best = nullptr;
  std::string names, refused;
  for (const Variant& v : variants()) {
    const bool named = asked && asked == std::string(v.name);
    if (named && v.refusal.empty()) return v.kernels;
    if (named) refused = v.refusal;
    if (!v.refusal.empty()) continue;
    names += (names.empty() ? "" : ", ") + std::string(v.name);
    if (v.automatic) best = v.kernels;
  }
  if (!asked || !*asked) return best;
  throw std::invalid_argument("FUSED_ATTENTION_CPU_ISA=" + std::string(asked) +
                              (refused.empty() ? "" : ": " + refused) + ", expected one of: " + names);
}

const Kernels& kernels() {
  static const Kernels* const chosen = choose();
  return *chosen;
}

}  // namespace fused_attention
