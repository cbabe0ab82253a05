#include "launch.h"

#include <cuda_runtime_api.h>

#include <atomic>
#include <string>
#include <unordered_map>

#include "kernels.h"

#define FA_STRING2(x) #x
#define FA_STRING(x) FA_STRING2(x)

namespace fused_attention::cuda {

namespace {

struct Entry {
  const void* function;
  // Devices, by number modulo 64, on which the kernel may use more than the 48 KiB that every kernel may.
  std::atomic<uint64_t> large{0};
  explicit Entry(const void* function) : function(function) {}
};

const std::unordered_map<std::string, Entry>& entries() {
  static const std::unordered_map<std::string, Entry> all = [] {
    std::unordered_map<std::string, Entry> found;
    for (const Kernel* list : {kForwardSm80, kKeyGradientSm80, kQueryGradientSm80, kDecodeSm80})
      for (; list->name; ++list) found.try_emplace(list->name, list->function);
    return found;
  }();
  return all;
}

cudaError_t allow_shared_memory(Entry& entry, int bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const uint64_t bit = uint64_t{1} << (device % 64);
  if (device < 64 && entry.large.load(std::memory_order_relaxed) & bit) return cudaSuccess;
  // As much as any launch of this kernel may want: the limit is not raised again.
  int limit = 0;
  if (const cudaError_t error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device))
    return error;
  const cudaError_t error = cudaFuncSetAttribute(entry.function, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
  if (error == cudaSuccess) entry.large.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

cudaError_t start(Entry& entry, const Launch& launch, cudaStream_t stream) {
  if (const cudaError_t error = allow_shared_memory(entry, launch.shared_bytes)) return error;
  void* arguments[] = {const_cast<unsigned char*>(launch.params.data())};
  return cudaLaunchKernel(entry.function, dim3(static_cast<unsigned>(launch.grid)),
                          dim3(static_cast<unsigned>(launch.threads)), arguments,
                          static_cast<size_t>(launch.shared_bytes), stream);
}

}  // namespace

std::string run(const std::vector<Launch>& launches, void* stream) {
  for (const Launch& launch : launches) {
    const auto found = entries().find(launch.kernel);
    if (found == entries().end()) return "there is no kernel " + launch.kernel;
    if (launch.grid > 2147483647) return launch.kernel + ": more than 2^31 - 1 blocks";
    const cudaError_t error = start(const_cast<Entry&>(found->second), launch, static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) {
      cudaGetLastError();  // it is reported here, and to nobody else
      return launch.kernel + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error);
    }
  }
  return "";
}

const char* built_architectures() { return FA_STRING(FA_CUDA_ARCHS); }
const char* built_by() { return FA_STRING(FA_CUDA_COMPILER); }

}  // namespace fused_attention::cuda
