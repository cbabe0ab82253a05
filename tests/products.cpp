// Products of blocks (csrc/cpu/products.h) behind C functions, for test_panels.py.
#include "cpu/products.h"

using namespace fused_attention::checked;

#if FA_PRODUCTS == 3

// c [16] += the dot products of pairs a [16, 2] and b [16, 2].
extern "C" void dot(float* c, const uint16_t* a, const uint16_t* b) {
  store<float>(c, add_dots(load<float>(c), words(a), words(b)));
}

#else

// c [16, 16] += a [16, 32] b, b as [16, 16] pairs, with each of the four products of a 2 x 2 block in turn.
extern "C" void dot(int which, float* c, const uint16_t* a, const uint16_t* b) {
  tiles_begin();
  tile_load<kA0>(a, 64), tile_load<kA1>(a, 64), tile_load<kB0>(b, 64), tile_load<kB1>(b, 64);
  tile_load<kC00>(c, 64), tile_load<kC01>(c, 64), tile_load<kC10>(c, 64), tile_load<kC11>(c, 64);
  if (which == 0) tile_dot<kC00>(), tile_store<kC00>(c, 64);
  if (which == 1) tile_dot<kC01>(), tile_store<kC01>(c, 64);
  if (which == 2) tile_dot<kC10>(), tile_store<kC10>(c, 64);
  if (which == 3) tile_dot<kC11>(), tile_store<kC11>(c, 64);
  tiles_end();
}

extern "C" void store_without_configuration(float* c) { tile_store<kC00>(c, 64); }

#endif

// c [count, 32, 32] (+)= a [parts, 32, 32 steps] b [parts, 32 steps, 32] in tiles: a [2, steps], b [steps, 2]; through a
// queue, the share of `pieces` pieces first.
extern "C" void products(float* c, const uint16_t* a, const uint16_t* b, int steps, int terms, bool add, int count,
                         int pieces, bool int8) {
  tiles_begin();
  Product p{};
  p.a = {a, 64, steps * 512, 512, 2 * steps * 512};
  p.b = {b, 64, 512, 1024, 2 * steps * 512};
  p.c = c, p.c_row_bytes = 128, p.c_down = 512, p.c_right = 16;
  p.steps = steps, p.terms = terms, p.add = add, p.int8 = int8;
  Queue queue;
  queue.push({p, count, 0, 0, 1024});
  queue.run_share(pieces);
  queue.run_all();
  tiles_end();
}

extern "C" int code_zero() { return kCodeZero; }
