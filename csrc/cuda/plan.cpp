#include "plan.h"

#include <cstddef>
#include <cstring>

#include "additive_params.h"
#include "gradient_params_sm90.h"
#include "hopper_params.h"
#include "maps.h"
#include "tiles.h"

namespace fused_attention::cuda {

namespace {

template <class Params>
Launch make_launch(std::string kernel, int64_t grid, int warps, int shared_bytes, const Params& p) {
  Launch launch{std::move(kernel), grid, 32 * warps, shared_bytes, std::vector<unsigned char>(sizeof(Params)), {}};
  std::memcpy(launch.params.data(), &p, sizeof(Params));
  return launch;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

const char* dtype_name(DType t) { return t == DType::bf16 ? "bf16" : "f16"; }

bool has_terms(const AttentionParams& p) { return p.mask.data || p.bias.data; }

// Whether the kernel with all options is needed.
bool has_options(const AttentionParams& p) {
  return has_terms(p) || p.alibi.data || p.softcap != 0.0 || p.dropout_p > 0.0 || !(p.scale > 0.0);
}

// Window sides as the kernels want them (problem.cuh).
AttentionParams normalised(AttentionParams p) {
  if (p.window_left < 0 || p.window_left > kFar) p.window_left = kFar;
  if (p.window_right < 0 || p.window_right > kFar) p.window_right = kFar;
  if (p.causal != Causal::none) p.window_right = 0;
  return p;
}

// Blocks of `size` over all elements of the batch. Of packed sequences a bound: each has at most one that is not full.
int64_t all_blocks(const AttentionParams& p, int64_t longest, int64_t total, int size) {
  const int64_t dense = ceil_div(longest, size) * p.B;
  return p.cu_seqlens_q ? min_of(dense, ceil_div(total, size) + p.B) : dense;
}

// Query heads whose rows share a block: where queries are few, all those that read the same keys.
int64_t heads_together(const AttentionParams& p, int rows) {
  const int64_t group = p.HK ? p.H / p.HK : 1;
  return p.M < rows ? group : 1;
}

std::string name_of(const char* kernel, DType dtype, int d, int arch = 80) {
  return std::string(kernel) + "_sm" + std::to_string(arch) + "_" + dtype_name(dtype) + "_d" + std::to_string(d);
}

RowsOf rows_of(const AttentionParams& p, const Tensor& t, bool keys) {
  const bool packed = p.cu_seqlens_q;
  return {t, packed ? 1 : p.B, keys ? p.HK : p.H,
          packed ? (keys ? p.total_keys : p.total_rows)
          : keys ? p.N
                 : p.M,
          &t == &p.v || &t == &p.dout ? p.DV : p.D};
}

bool nothing_to_multiply(const AttentionParams& p) { return p.M == 0 || p.N == 0 || p.HK == 0; }

// Whether the kernels for sm_90 take a call: those for sm_80, which run there too, take what the copy engine cannot read.
bool on_hopper(const AttentionParams& p) {
  if (p.arch != 90 || nothing_to_multiply(p)) return false;
  // Of packed sequences the totals come later than this question; as long as there are rows they do not matter to it.
  AttentionParams some = p;
  some.total_rows = some.total_keys = 2;
  return can_map(rows_of(some, some.q, false)) && can_map(rows_of(some, some.k, true)) &&
         can_map(rows_of(some, some.v, true));
}
bool gradients_on_hopper(const AttentionParams& p) {
  AttentionParams some = p;
  some.total_rows = 2;
  return on_hopper(p) && can_map(rows_of(some, some.dout, false));
}

// Heads whose blocks are sorted together: where later rows have more work, as many as have k and v, of so many bytes a
// number, in half of the L2 cache of 50 MiB; else one after the other.
int64_t heads_of_section(const AttentionParams& p, int64_t together, int number) {
  if (p.window_right >= kFar) return 1;
  const int64_t bytes = number * p.N * (p.D + p.DV), fit = (int64_t{24} << 20) / bytes;
  return (fit > 1 ? fit : 1) * (p.H / p.HK / together);
}

// The call, and how its blocks are shared out; false if there are none.
bool share_out(const AttentionParams& p, const HopperTile& tile, int number, HopperParams& argument) {
  const int64_t together = heads_together(p, tile.rows), heads = p.H / together;
  const int64_t blocks = heads * all_blocks(p, p.M * together, p.total_rows * together, tile.rows);
  argument.p = p;
  argument.blocks = static_cast<int32_t>(blocks);
  argument.section = static_cast<int32_t>(min_of(heads_of_section(p, together, number), p.B * heads));
  return blocks > 0;
}

std::vector<Launch> plan_forward_hopper(const AttentionParams& p) {
  const int d = hopper_dim(p.D, p.DV);
  const bool options = has_options(p);
  const HopperTile tile = hopper_tile(d, options);
  HopperParams argument{};
  if (!share_out(p, tile, 2, argument)) return {};
  const std::string name = name_of("forward", p.q.dtype, d, 90);
  Launch launch = make_launch(options ? name + "_options" : name, min_of(argument.blocks, p.processors), kHopperWarps,
                              hopper_shared(d, tile, 2, has_terms(p)), argument);
  launch.maps = {make_map(rows_of(p, p.q, false), offsetof(HopperParams, q), 64),
                 make_map(rows_of(p, p.k, true), offsetof(HopperParams, k), tile.keys),
                 make_map(rows_of(p, p.v, true), offsetof(HopperParams, v), tile.keys)};
  return {launch};
}

// Blocks that share a scale, of all sequences: each packed one begins with a block of its own (fp8_params.h).
int32_t scale_blocks(const AttentionParams& p, int64_t longest, int64_t total) {
  return static_cast<int32_t>(p.cu_seqlens_q ? total / kScaleBlock + p.B : p.B * ceil_div(longest, kScaleBlock));
}

Launch launch_fp8(const Fp8Params& argument) {
  const AttentionParams& p = argument.hopper.p;
  const int d = hopper_dim(p.D, p.DV), width = d < 128 ? d : 128;
  const bool options = has_options(p), packed = p.cu_seqlens_q;
  const HopperTile tile = fp8_tile(d, options);
  const std::string name = name_of("fp8_forward", p.q.dtype, d, 90);
  Launch launch = make_launch(options ? name + "_options" : name, min_of(argument.hopper.blocks, p.processors),
                              kHopperWarps, hopper_shared(d, tile, 1, has_terms(p)), argument);
  const int64_t batch = packed ? 1 : p.B;
  const RowsOf queries{argument.q_codes, batch, p.H, packed ? p.total_rows : p.M, p.D};
  const RowsOf keys{argument.k_codes, batch, p.HK, packed ? p.total_keys : p.N, p.D};
  const RowsOf values{argument.v_codes, batch, p.HK, p.DV, argument.key_blocks / batch * kScaleBlock};
  launch.maps = {make_map(queries, offsetof(HopperParams, q), 64, width),
                 make_map(keys, offsetof(HopperParams, k), tile.keys, width),
                 make_map(values, offsetof(HopperParams, v), d, tile.keys)};
  return launch;
}

// What one kernel call sums, and the tiles of its result.
AdditiveParams additive_params(const AttentionParams& p, const Tensor& grad) {
  const Tile tile = additive_gradient_tile(additive_gradient_dim(p.D, p.DV));
  AdditiveParams a{};
  a.p = p;
  a.grad = grad;
  const int64_t all[4] = {p.B, p.H, ceil_div(p.M, tile.rows), ceil_div(p.N, tile.keys)};
  for (int i = 0; i < 4; ++i) {
    a.kept[i] = grad.stride[i] ? all[i] : 1;
    a.summed[i] = grad.stride[i] ? 1 : all[i];
  }
  a.share_step =
      (grad.stride[0] ? p.B : 1) * (grad.stride[1] ? p.H : 1) * (grad.stride[2] ? p.M : 1) * (grad.stride[3] ? p.N : 1);
  return a;
}
int64_t product(const int64_t (&n)[4]) { return n[0] * n[1] * n[2] * n[3]; }

int64_t shares_of(const AttentionParams& p, const Tensor& grad) {
  if (!grad.data) return 0;
  const AdditiveParams a = additive_params(p, grad);
  const int64_t tiles = product(a.kept), steps = product(a.summed);
  return tiles && steps ? min_of(steps, tiles < 512 ? 512 / tiles : 1) : 1;
}

// Of few keys the softmax is taken anew (gradient.cuh), which the kernels with all options do.
bool has_gradient_options(const AttentionParams& p) {
  const bool few = p.window_right < kFar && p.causal != Causal::bottom_right && p.M + p.window_right <= kFewKeys;
  return has_options(p) || p.N <= kFewKeys || few;
}

void add_hopper_gradient(const AttentionParams& p, const char* kernel, int64_t grid, const Tile& tile, int shared,
                         std::vector<Launch>& launches) {
  HopperGradientParams argument{};
  argument.p = p;
  const std::string name = name_of(kernel, p.q.dtype, hopper_dim(p.D, p.DV), 90);
  Launch launch = make_launch(has_gradient_options(p) ? name + "_options" : name, grid, kHopperWarps, shared, argument);
  launch.maps = {make_map(rows_of(p, p.q, false), offsetof(HopperGradientParams, q), tile.rows),
                 make_map(rows_of(p, p.dout, false), offsetof(HopperGradientParams, dout), tile.rows),
                 make_map(rows_of(p, p.k, true), offsetof(HopperGradientParams, k), tile.keys),
                 make_map(rows_of(p, p.v, true), offsetof(HopperGradientParams, v), tile.keys)};
  launches.push_back(std::move(launch));
}

void plan_key_gradients_hopper(const AttentionParams& p, std::vector<Launch>& launches) {
  const int d = hopper_dim(p.D, p.DV);
  const bool options = has_gradient_options(p);
  const Tile tile = hopper_key_gradient_tile(d, options);
  const int64_t grid = p.HK * all_blocks(p, p.N, p.total_keys, tile.keys);
  if (!grid) return;
  const int shared = hopper_key_gradient_shared(d, options, has_terms(p));
  if (key_gradients_together(d)) {
    add_hopper_gradient(p, "key_gradients", grid, tile, shared, launches);
  } else {
    if (p.dk.data) add_hopper_gradient(p, "key_gradient", grid, tile, shared, launches);
    if (p.dv.data) add_hopper_gradient(p, "value_gradient", grid, tile, shared, launches);
  }
}

void plan_query_gradient_hopper(const AttentionParams& p, std::vector<Launch>& launches) {
  const int d = hopper_dim(p.D, p.DV);
  const bool options = has_gradient_options(p);
  const Tile tile = hopper_query_gradient_tile(d, options);
  const int64_t grid = p.H * all_blocks(p, p.M, p.total_rows, tile.rows);
  const int shared = hopper_query_gradient_shared(d, options, has_terms(p));
  if (grid) add_hopper_gradient(p, "query_gradient", grid, tile, shared, launches);
}

void plan_key_gradients(const AttentionParams& p, std::vector<Launch>& launches) {
  if (!p.dk.data && !p.dv.data) return;
  if (gradients_on_hopper(p)) return plan_key_gradients_hopper(p, launches);
  const int d = backward_dim(p.D, p.DV);
  const Tile tile = key_gradient_tile(d);
  const int64_t grid = p.HK * all_blocks(p, p.N, p.total_keys, tile.keys);
  if (!grid) return;
  const auto add = [&](const char* kernel) {
    const int shared = key_gradient_shared(d, has_terms(p));
    launches.push_back(make_launch(name_of(kernel, p.q.dtype, d), grid, tile.warps, shared, p));
  };
  if (key_gradients_together(d)) {
    add("key_gradients");
  } else {
    if (p.dk.data) add("key_gradient");
    if (p.dv.data) add("value_gradient");
  }
}

void plan_query_gradient(const AttentionParams& p, std::vector<Launch>& launches) {
  if (!p.dq.data) return;
  if (gradients_on_hopper(p)) return plan_query_gradient_hopper(p, launches);
  const int d = backward_dim(p.D, p.DV);
  const Tile tile = query_gradient_tile(d);
  const int64_t grid = p.H * all_blocks(p, p.M, p.total_rows, tile.rows);
  if (!grid) return;
  const int shared = query_gradient_shared(d, has_terms(p));
  launches.push_back(make_launch(name_of("query_gradient", p.q.dtype, d), grid, tile.warps, shared, p));
}

void plan_additive_gradient(const AttentionParams& p, const Tensor& grad, int64_t shares,
                            std::vector<Launch>& launches) {
  if (!grad.data || p.B * p.H * p.M * p.N == 0) return;
  const int d = additive_gradient_dim(p.D, p.DV);
  AdditiveParams a = additive_params(p, grad);
  a.chunk = ceil_div(product(a.summed), shares);
  const int shared = additive_gradient_shared(d, has_terms(p));
  launches.push_back(make_launch(name_of("additive_gradient", p.q.dtype, d), product(a.kept) * shares,
                                 additive_gradient_tile(d).warps, shared, a));
}

}  // namespace

std::string refusal(const AttentionParams& p) {
  if (p.q.dtype != DType::bf16 && p.q.dtype != DType::f16) return "bfloat16 and float16 only";
  if (!tile_dim(p.D, p.DV)) return "head dims up to " + std::to_string(kHeadDims[7]);
  if (p.M >= kFar || p.N >= kFar) return "lengths below 2^30";
  if (p.weights.data || p.dweights.data) return "no attention weights";
  return "";
}

std::string refusal(const Fp8Params& p) {
  if (p.hopper.p.arch != 90) return "products of float8 on sm_90a only";
  return refusal(p.hopper.p);
}

std::string refusal(const DecodeParams& p) {
  if (p.q.dtype != DType::bf16 && p.q.dtype != DType::f16) return "bfloat16 and float16 only";
  if (!decode_dim(p.D, p.DV)) return "head dims up to 256";
  if (p.cache.capacity >= kFar) return "lengths below 2^30";
  if (p.splits > 1 && (!p.partial.data || !p.stats.data)) return "no memory for the results of the splits";
  return "";
}

std::string refusal(const AppendParams& p) {
  if (p.D > 256 || p.DV > 256) return "head dims up to 256";
  if (!p.key.data != !p.value.data) return "keys without values, or values without keys";
  return "";
}

Blocks block_sizes(const AttentionParams& p) {
  const bool options = has_options(p);
  const int rows =
      on_hopper(p) ? hopper_tile(hopper_dim(p.D, p.DV), options).rows : forward_tile(tile_dim(p.D, p.DV), options).rows;
  const bool hopper = gradients_on_hopper(p);  // what blocks are of does not depend on the options
  const int d = hopper ? hopper_dim(p.D, p.DV) : backward_dim(p.D, p.DV);
  const Tile queries = hopper ? hopper_query_gradient_tile(d, options) : query_gradient_tile(d);
  const Tile keys = hopper ? hopper_key_gradient_tile(d, options) : key_gradient_tile(d);
  return {rows, queries.rows, keys.keys, heads_together(p, rows)};
}

Fp8Blocks fp8_blocks(const AttentionParams& p) {
  if (nothing_to_multiply(p)) {
    const Blocks b = block_sizes(p);
    return {b.forward_rows, b.forward_group, kScaleBlock};
  }
  const int rows = fp8_tile(hopper_dim(p.D, p.DV), has_options(p)).rows;
  return {rows, heads_together(p, rows), kScaleBlock};
}

Shares additive_shares(const AttentionParams& p) { return {shares_of(p, p.dmask), shares_of(p, p.dbias)}; }

std::vector<Launch> plan_forward(const AttentionParams& given) {
  const AttentionParams p = normalised(given);
  if (on_hopper(p)) return plan_forward_hopper(p);
  const int d = tile_dim(p.D, p.DV);
  const bool options = has_options(p);
  const Tile tile = forward_tile(d, options);
  const int64_t together = heads_together(p, tile.rows);
  const int64_t grid = p.H / together * all_blocks(p, p.M * together, p.total_rows * together, tile.rows);
  if (!grid) return {};
  const std::string name = name_of("forward", p.q.dtype, d);
  return {
      make_launch(options ? name + "_options" : name, grid, tile.warps, forward_shared(d, options, has_terms(p)), p)};
}

std::vector<Launch> plan_forward_fp8(const Fp8Params& given) {
  Fp8Params argument = given;
  const AttentionParams p = normalised(given.hopper.p);
  if (nothing_to_multiply(p)) return plan_forward(given.hopper.p);
  const int d = hopper_dim(p.D, p.DV);
  if (!share_out(p, fp8_tile(d, has_options(p)), 1, argument.hopper)) return {};
  argument.row_blocks = scale_blocks(p, p.M, p.total_rows);
  argument.key_blocks = scale_blocks(p, p.N, p.total_keys);
  const int64_t blocks = p.H * argument.row_blocks + 2 * p.HK * argument.key_blocks;
  return {make_launch(name_of("fp8_quantise", p.q.dtype, d, 90), blocks, kQuantiseWarps, quantise_shared(d), argument),
          launch_fp8(argument)};
}

std::vector<Launch> plan_backward(const AttentionParams& given) {
  const AttentionParams p = normalised(given);
  const int64_t rows = p.H * (p.cu_seqlens_q ? p.total_rows : p.B * p.M);
  std::vector<Launch> launches;
  if (rows) {
    const std::string name = std::string("row_deltas_") + dtype_name(p.q.dtype);
    launches.push_back(make_launch(name, ceil_div(rows, kDeltaWarps), kDeltaWarps, 0, p));
  }
  plan_key_gradients(p, launches);
  plan_query_gradient(p, launches);
  plan_additive_gradient(p, p.dmask, p.mask_shares, launches);
  plan_additive_gradient(p, p.dbias, p.bias_shares, launches);
  if (p.dsinks.data && p.H) launches.push_back(make_launch("sink_gradient", p.H, kSinkWarps, 32 * kSinkWarps * 8, p));
  return launches;
}

std::vector<Launch> plan_decode(const DecodeParams& given) {
  DecodeParams p = given;
  if (p.window_left < 0 || p.window_left > kFar) p.window_left = kFar;
  const int64_t outputs = p.B * p.H * p.M;
  if (!outputs) return {};
  const int d = decode_dim(p.D, p.DV);
  const bool codes = p.cache.k.dtype == DType::i8 || p.cache.k.dtype == DType::e4m3;
  const int64_t row_tiles = ceil_div(p.M * (p.H / p.HK), 16);
  std::vector<Launch> launches;
  launches.push_back(make_launch(name_of(codes ? "decode_codes" : "decode", p.q.dtype, d),
                                 p.B * row_tiles * p.HK * p.splits, decode_tile(d, codes).warps,
                                 decode_shared(d, codes), p));
  if (p.splits > 1)
    launches.push_back(
        make_launch(std::string("decode_combine_") + dtype_name(p.q.dtype), outputs, kCombineWarps, 0, p));
  return launches;
}

std::vector<Launch> plan_append(const AppendParams& p) {
  const int64_t heads = 2 * (p.key.data ? p.HK : 0) + (p.turned.data ? p.H : 0), warps = p.B * p.M * heads;
  if (!warps) return {};
  const DType dtype = p.key.data ? p.key.dtype : p.query.dtype;
  return {make_launch(std::string("decode_append_") + dtype_name(dtype), ceil_div(warps, kAppendWarps), kAppendWarps, 0,
                      p)};
}

}  // namespace fused_attention::cuda
