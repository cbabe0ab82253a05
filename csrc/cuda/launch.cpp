#include "launch.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstring>
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
    const Kernel* const lists[] = {kForwardSm80,      kKeyGradientSm80, kQueryGradientSm80, kDecodeSm80,
#ifdef FA_HAVE_SM90
                                   kForwardSm90,      kForwardFp8Sm90,  kQuantiseSm90,      kKeyGradientSm90,
                                   kQueryGradientSm90
#endif
    };
    for (const Kernel* list : lists)
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

#ifdef FA_HAVE_SM90
using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function, which the runtime finds: nothing is linked to libcuda. Null where the driver has none.
EncodeTiled encode_tiled() {
  static const EncodeTiled found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult status = cudaDriverEntryPointSymbolNotFound;
  #if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &status);
  #else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &status);
  #endif
    const bool there = error == cudaSuccess && status == cudaDriverEntryPointSuccess;
    return there ? reinterpret_cast<EncodeTiled>(function) : nullptr;
  }();
  return found;
}

std::string write_map(const MapPlan& m, unsigned char* argument) {
  const EncodeTiled encode = encode_tiled();
  if (!encode) return "the driver has no cuTensorMapEncodeTiled";
  const CUtensorMapDataType type = m.dtype == DType::e4m3   ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                   : m.dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                            : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const int width = m.box[0] * (m.dtype == DType::e4m3 ? 1 : 2);
  const CUtensorMapSwizzle swizzle = width == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : width == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                   : CU_TENSOR_MAP_SWIZZLE_32B;
  cuuint64_t dims[4], strides[3];
  cuuint32_t box[4], steps[4] = {1, 1, 1, 1};
  for (int i = 0; i < 4; ++i) dims[i] = static_cast<cuuint64_t>(m.dims[i]), box[i] = static_cast<cuuint32_t>(m.box[i]);
  for (int i = 0; i < 3; ++i) strides[i] = static_cast<cuuint64_t>(m.strides[i]);
  alignas(64) CUtensorMap map;
  const CUresult result =
      encode(&map, type, 4, const_cast<void*>(m.address), dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) return "cuTensorMapEncodeTiled: CUresult " + std::to_string(static_cast<int>(result));
  std::memcpy(argument + m.offset, &map, sizeof(map));
  return "";
}

std::string write_maps(Launch& launch) {
  for (const MapPlan& m : launch.maps)
    if (std::string error = write_map(m, launch.params.data()); !error.empty()) return error;
  return "";
}
#else
std::string write_maps(Launch&) { return ""; }
#endif

cudaError_t start(Entry& entry, const Launch& launch, cudaStream_t stream) {
  if (const cudaError_t error = allow_shared_memory(entry, launch.shared_bytes)) return error;
  void* arguments[] = {const_cast<unsigned char*>(launch.params.data())};
  return cudaLaunchKernel(entry.function, dim3(static_cast<unsigned>(launch.grid)),
                          dim3(static_cast<unsigned>(launch.threads)), arguments,
                          static_cast<size_t>(launch.shared_bytes), stream);
}

}  // namespace

std::string run(std::vector<Launch> launches, void* stream) {
  for (Launch& launch : launches) {
    const auto found = entries().find(launch.kernel);
    if (found == entries().end()) return "there is no kernel " + launch.kernel;
    if (launch.grid > 2147483647) return launch.kernel + ": more than 2^31 - 1 blocks";
    if (const std::string error = write_maps(launch); !error.empty()) return launch.kernel + ": " + error;
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
