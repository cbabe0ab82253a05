// The decoding kernels for mma.sync: per dtype and head dim one for caches in that dtype and one for codes (decode.cuh),
// what combines their splits (combine.cuh), and what appends to a cache (append.cuh).
#include "append.cuh"
#include "decode.cuh"
#include "kernels.h"

using namespace fused_attention;
using namespace fused_attention::cuda;

#define DECODE(dtype, E, D) DECODE2(dtype, E, D)
#define DECODE2(dtype, E, D)                                                            \
  FA_KERNEL(decode_sm80_##dtype##_d##D, DecodeParams, decode_tile(D, false).warps,      \
            Decode<E, D, false>(p, shared).run(shared))                                 \
  FA_KERNEL(decode_codes_sm80_##dtype##_d##D, DecodeParams, decode_tile(D, true).warps, \
            Decode<E, D, true>(p, shared).run(shared))
#define DECODES(D) FA_DTYPES(DECODE, D)
FA_DECODE_DIMS(DECODES)

#define ONCE(dtype, E, _) ONCE2(dtype, E)
#define ONCE2(dtype, E)                                                                \
  FA_KERNEL(decode_combine_##dtype, DecodeParams, kCombineWarps, combine_splits<E>(p)) \
  FA_KERNEL(decode_append_##dtype, AppendParams, kAppendWarps, (Append<E>{p, 0, 0, 0, 0, 0, {}}.run()))
FA_DTYPES(ONCE, )

#define NAMES(dtype, E, D) NAMES2(dtype, D)
#define NAMES2(dtype, D) FA_LIST(decode_sm80_##dtype##_d##D) FA_LIST(decode_codes_sm80_##dtype##_d##D)
#define LISTS(D) FA_DTYPES(NAMES, D)
#define ONCE_NAMES(dtype, E, _) ONCE_NAMES2(dtype)
#define ONCE_NAMES2(dtype) FA_LIST(decode_combine_##dtype) FA_LIST(decode_append_##dtype)
const Kernel cuda::kDecodeSm80[] = {FA_DECODE_DIMS(LISTS) FA_DTYPES(ONCE_NAMES, ){nullptr, nullptr}};
