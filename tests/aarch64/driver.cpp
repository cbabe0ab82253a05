// Runs one call of the CPU kernels from a file, so that a build for another processor can be tested in an emulator.
//
//   driver forward|backward request blob
//
// The request has a line per field of AttentionParams: "i name value", "f name value", "a name offset", and
// "t name dtype stride0 ... stride3 offset". Offsets, of what addresses point to, count bytes from the start of the blob,
// which the call changes in place.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <string>

#include "../../csrc/cpu/dispatch.h"

using namespace fused_attention;

namespace {

#define MEMBER(name) {#name, &AttentionParams::name}
const std::map<std::string, int64_t AttentionParams::*> kIntegers{
    MEMBER(B), MEMBER(H),  MEMBER(HK),          MEMBER(M),           MEMBER(N),
    MEMBER(D), MEMBER(DV), MEMBER(window_left), MEMBER(window_right)};
const std::map<std::string, double AttentionParams::*> kReals{MEMBER(scale), MEMBER(softcap), MEMBER(dropout_p)};
const std::map<std::string, const int64_t* AttentionParams::*> kAddresses{MEMBER(key_lengths), MEMBER(cu_seqlens_q),
                                                                          MEMBER(cu_seqlens_k)};
const std::map<std::string, Tensor AttentionParams::*> kTensors{
    MEMBER(q),   MEMBER(k),   MEMBER(v),     MEMBER(mask),  MEMBER(bias),     MEMBER(alibi),   MEMBER(sinks),
    MEMBER(out), MEMBER(lse), MEMBER(dout),  MEMBER(dlse),  MEMBER(dweights), MEMBER(weights), MEMBER(dq),
    MEMBER(dk),  MEMBER(dv),  MEMBER(dmask), MEMBER(dbias), MEMBER(dsinks),   MEMBER(delta)};
#undef MEMBER

[[noreturn]] void fail(const std::string& why) {
  std::fprintf(stderr, "%s\n", why.c_str());
  std::exit(1);
}

void set_integer(AttentionParams& p, const std::string& name, const std::string& value) {
  const long long n = static_cast<long long>(std::stoull(value));
  if (name == "seed")
    p.seed = static_cast<uint64_t>(n);
  else if (name == "threads")
    p.threads = static_cast<int32_t>(n);
  else if (name == "causal")
    p.causal = static_cast<Causal>(n);
  else if (name == "weights_mode")
    p.weights_mode = static_cast<Weights>(n);
  else if (name == "batch_invariant")
    p.batch_invariant = n != 0;
  else
    p.*kIntegers.at(name) = static_cast<int64_t>(n);
}

AttentionParams read_request(const char* path, char* blob) {
  AttentionParams p;
  std::ifstream file(path);
  std::string kind, name, value;
  while (file >> kind >> name) {
    if (kind == "t") {
      Tensor& t = p.*kTensors.at(name);
      int dtype;
      int64_t offset;
      file >> dtype >> t.stride[0] >> t.stride[1] >> t.stride[2] >> t.stride[3] >> offset;
      t.dtype = static_cast<DType>(dtype);
      t.data = blob + offset;
      continue;
    }
    file >> value;
    if (kind == "i")
      set_integer(p, name, value);
    else if (kind == "f")
      p.*kReals.at(name) = std::stod(value);
    else if (kind == "a")
      p.*kAddresses.at(name) = reinterpret_cast<const int64_t*>(blob + std::stoll(value));
    else
      fail("unknown line " + kind + " " + name);
  }
  return p;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2) return std::puts(kernels().isa) < 0;
  if (argc != 4) fail("driver forward|backward request blob");
  const int blob = open(argv[3], O_RDWR);
  struct stat about;
  if (blob < 0 || fstat(blob, &about)) fail("cannot open the blob");
  void* at = mmap(nullptr, static_cast<size_t>(about.st_size), PROT_READ | PROT_WRITE, MAP_SHARED, blob, 0);
  if (at == MAP_FAILED) fail("cannot map the blob");
  const AttentionParams p = read_request(argv[2], static_cast<char*>(at));
  const std::string which = argv[1];
  const Kernels& k = kernels();
  const auto function = which == "forward" ? k.forward : k.backward;
  if (!function(p)) fail("out of memory");
  return 0;
}
