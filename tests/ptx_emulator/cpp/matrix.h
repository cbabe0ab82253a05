// Matrix products of a warp (9.7.14.5 mma.sync) and of a warpgroup (9.7.15 wgmma).
//
// Products are exact. They are added in float32, one after the other in rising k, to the accumulator; the hardware adds
// several at once with its own rounding. An accumulator of f16 is rounded once, at the end of the instruction, and
// integers are added as such.
//
// Of a fragment, thread l holds rows l / 4 and l / 4 + 8; `per` elements share a 32-bit register.
#pragma once
#include "warp.h"

namespace ptx {

static inline int per_register(Format f) {
  return f == T_F16 || f == T_BF16 ? 2 : f == T_E4M3 || f == T_E5M2 || f == T_S8 || f == T_U8 ? 4 : 1;
}

static inline void unpack(u32 r, Format f, float* out, int stride) {
  for (int i = 0, per = per_register(f); i < per; i++) {
    const u32 part = r >> (32 / per * i);
    float& x = out[i * stride];
    switch (f) {
      case T_F16:
        x = f16(part);
        break;
      case T_BF16:
        x = bf16(part);
        break;
      case T_TF32:
        x = f32(part & 0xFFFFE000);
        break;
      case T_F32:
        x = f32(part);
        break;
      case T_E4M3:
        x = decode<E4M3>(part & 255);
        break;
      case T_E5M2:
        x = decode<E5M2>(part & 255);
        break;
      case T_S8:
        x = float(s8(part));
        break;
      case T_U8:
        x = float(u8(part));
        break;
      case T_S32:
        x = 0;
        break;
    }
  }
}

// A sum of float32 into the bits of an accumulator that held `before`.
static inline u32 accumulated(Format f, float x, u32 before, bool saturate) {
  if (f != T_S32) return f == T_F16 ? to_f16(x) : ptx::b(x);
  const s64 sum = s64(s32(before)) + s64(x);
  return u32(saturate ? clamp<s32>(sum) : s32(sum));
}

// acc [16, N] += A [16, K] B [K, N], k by k.
static void multiply(float* acc, const float* a, const float* b, int n, int k) {
  typedef float V __attribute__((vector_size(32), aligned(4)));
  for (int row = 0; row < 16; row++)
    for (int first = 0; first < n; first += 8) {
      V sum = *(V*)(acc + row * n + first);
      for (int i = 0; i < k; i++) sum += a[row * k + i] * *(const V*)(b + i * n + first);
      *(V*)(acc + row * n + first) = sum;
    }
}

// Element e of the accumulators of a thread lies in this row and column of D [16, N] (9.7.14.5.8, 9.7.15.5.1.1).
static inline int place_of(int e, int lane, int n) {
  return (lane / 4 + e / 2 % 2 * 8) * n + e / 4 * 8 + lane % 4 * 2 + e % 2;
}
// Where register r of A [16, K] begins.
static inline int a_place(int r, int lane, int k, int per) {
  return (lane / 4 + r % 2 * 8) * k + (r / 2 * 4 + lane % 4) * per;
}

// --- 9.7.14.5 mma.sync.m16n8k* -------------------------------------------------------------------------------------
struct MmaSlot {
  int k;
  Format at, bt, ct, dt;
  bool saturate;
  u32* d;
  const u32 *a, *b, *c;
};

static void run_mma(Warp&, Meeting& m) {
  float a[16 * 32], b[32 * 8], acc[16 * 8] = {};
  auto slot = [&](int lane) -> const MmaSlot& { return *(MmaSlot*)m.slots[lane]; };
  const MmaSlot& s = slot(0);
  const int pa = per_register(s.at), pb = per_register(s.bt), pc = per_register(s.ct), pd = per_register(s.dt);
  for (int lane = 0; lane < 32; lane++) {
    for (int r = 0; r < s.k / (2 * pa); r++) unpack(slot(lane).a[r], s.at, a + a_place(r, lane, s.k, pa), 1);
    for (int r = 0; r < s.k / (4 * pb); r++)
      unpack(slot(lane).b[r], s.bt, b + (r * 4 + lane % 4) * pb * 8 + lane / 4, 8);
    for (int r = 0; r < 4 / pc; r++) unpack(slot(lane).c[r], s.ct, acc + place_of(r * pc, lane, 8), 1);
  }
  multiply(acc, a, b, 8, s.k);
  for (int lane = 0; lane < 32; lane++) {
    u32 out[4];
    for (int e = 0; e < 4; e++)
      out[e] = accumulated(s.dt, acc[place_of(e, lane, 8)], pc == 1 ? slot(lane).c[e] : 0, s.saturate);
    for (int r = 0; r < 4 / pd; r++) slot(lane).d[r] = pd == 2 ? join32(out[2 * r], out[2 * r + 1]) : out[r];
  }
}

void mma(Thread* t, int k, Format at, Format bt, Format ct, Format dt, bool saturate, u32* d, const u32* a,
         const u32* b, const u32* c, u32 line) {
  MmaSlot slot = {k, at, bt, ct, dt, saturate, d, a, b, c};
  meet_all(lane_of(t), run_mma, line, &slot, "mma.sync", line);
}

// --- 9.7.15.5.1.2 matrices in shared memory ------------------------------------------------------------------------
// Descriptor: start >> 4 in bits 0-13, leading byte offset >> 4 in 16-29, stride byte offset >> 4 in 32-45, base offset
// in 49-51, swizzle in 62-63 (0: none, 1: 128 bytes, 2: 64, 3: 32).
struct Descriptor {
  u32 start, leading, stride, width;
  explicit Descriptor(u64 d)
      : start(u32(d & 0x3FFF) << 4),
        leading(u32(d >> 16 & 0x3FFF) << 4),
        stride(u32(d >> 32 & 0x3FFF) << 4),
        width(d >> 62 ? 256u >> (d >> 62) : 16) {}

  // Address of 16 bytes before swizzling. MN-major: `line` counts along k, `chunk` along m or n; K-major: the reverse.
  u32 address(u32 line, u32 chunk, bool mn_major) const {
    const u32 in = width / 16;
    const bool exchanged = mn_major && width == 16;  // without swizzle the two offsets change places
    return start + line / 8 * (exchanged ? leading : stride) + line % 8 * width +
           chunk / in * (exchanged ? stride : leading) + chunk % in * 16;
  }
};

// 9.7.15.5.1.2: on the address itself, chunks of 16 bytes are exchanged within 8 rows of `width` bytes.
static inline u32 swizzled(u32 address, u32 width) { return address ^ (address >> 7 & (width / 16 - 1)) << 4; }

// f(address, row, k) for each 16 bytes of rows first .. first + rows of an operand [rows, k].
template <class F>
static void each_chunk(Warp& w, u64 descriptor, bool mn_major, int per, int first, int rows, u32 line, F f) {
  const Descriptor d(descriptor);
  const int in_chunk = per * 4, k = per * 8;
  if (descriptor >> 49 & 7) w.machine->fail(format("wgmma: a base offset is not modelled [line %u]", line));
  for (int i = 0; i < (mn_major ? k : rows); i++)
    for (int c = 0; c < (mn_major ? rows : k) / in_chunk; c++) {
      const u32 at =
          mn_major ? d.address(u32(i), u32(first / in_chunk + c), true) : d.address(u32(first + i), u32(c), false);
      const u32 address = swizzled(at & 0x3FFFF, d.width);
      if (address < SHARED_START || address + 16 > w.cta->shared.size())
        w.machine->fail(format("wgmma reads shared memory at 0x%x, out of range [line %u]", address, line));
      f(address, mn_major ? c * in_chunk : i, mn_major ? i : c * in_chunk);
    }
}

static void load(Warp& w, u64 descriptor, bool mn_major, Format f, int first, int rows, u32 line, float* out,
                 int row_stride, int k_stride) {
  const int per = per_register(f), step = mn_major ? row_stride : k_stride;
  each_chunk(w, descriptor, mn_major, per, first, rows, line, [&](u32 address, int row, int k) {
    for (int i = 0; i < 4; i++) {
      u32 word;
      memcpy(&word, &w.cta->shared[address + 4 * u32(i)], 4);
      unpack(word, f, out + row * row_stride + k * k_stride + i * per * step, step);
    }
  });
}

// --- 9.7.15 wgmma --------------------------------------------------------------------------------------------------
// The race detector sees the reads as those of a slot of the warp's own, known after wgmma.wait_group. They come after
// what every thread of the warp knows.
static void note_reads(Warp& w, const Wgmma& g) {
  Machine& m = *w.machine;
  if (!m.check_races) return;
  const u32 when = m.open_group(w.groups);
  Clock known(w.lanes->clock, w.lanes->clock + m.slots);
  for (u32 lane = 1; lane < 32; lane++)
    for (u32 i = 0; i < m.slots; i++) known[i] = std::min(known[i], w.lanes[lane].clock[i]);
  const Access access = {&m, known.data(), epoch(when, w.groups.slot, g.line), false, nullptr};
  auto read = [&](u32 address, int, int) { touch(*w.cta, access, address, 16); };
  if (!g.a)
    each_chunk(w, g.a_descriptor, g.a_transposed, per_register(g.a_type), w.lanes->warp % 4 * 16, 16, g.line, read);
  each_chunk(w, g.b_descriptor, g.b_transposed, per_register(g.b_type), 0, g.n, g.line, read);
}

// Warp i of the warpgroup computes rows 16 i .. 16 i + 15 of D [64, N].
static void run_product(Warp& w, Product& p) {
  p.ran = true;
  const Wgmma& g = p.of[0];
  const int n = g.n, pa = per_register(g.a_type), k = pa * 8, pd = per_register(g.d_type);
  std::vector<float> a(size_t(16 * k)), b(size_t(n * k)), acc(size_t(16 * n));
  if (!g.a) load(w, g.a_descriptor, g.a_transposed, g.a_type, int(w.lanes->warp % 4) * 16, 16, g.line, a.data(), k, 1);
  load(w, g.b_descriptor, g.b_transposed, g.b_type, 0, n, g.line, b.data(), 1, n);
  auto value = [&](int r, int lane) -> u32& { return w.values[size_t(g.d[r]) * 32 + size_t(lane)]; };
  for (int lane = 0; lane < 32; lane++) {
    for (int r = 0; r < 4 && g.a; r++)
      unpack(p.of[lane].registers[g.a[r]], g.a_type, &a[size_t(a_place(r, lane, k, pa))], 1);
    for (int r = 0; r < n / 2 / pd && g.scale_d; r++)
      unpack(value(r, lane), g.d_type, &acc[size_t(place_of(r * pd, lane, n))], 1);
  }
  if (g.scale_a * g.scale_b < 0)
    for (float& x : a) x = -x;
  multiply(acc.data(), a.data(), b.data(), n, k);
  for (int lane = 0; lane < 32; lane++)
    for (int r = 0; r < n / 2 / pd; r++) {
      const float* x = &acc[size_t(place_of(r * pd, lane, n))];
      u32& v = value(r, lane);
      v = pd == 2 ? join32(to_f16(x[0]), to_f16(x[1])) : accumulated(g.d_type, x[0], g.scale_d ? v : 0, false);
    }
}

// Until wgmma.wait_group the registers of D hold poison, their values wait in the warp. The product itself is taken at
// once or as late as the wait, as the seed has it: operands that arrive too late or leave too early show either way.
static void run_wgmma(Warp& w, Meeting& m) {
  const bool behind = !w.products.empty() && !w.products.back().ran;
  w.products.push_back({{}, w.groups.open, false});
  Product& p = w.products.back();
  each_lane(m, [&](u32 lane) { p.of[lane] = *(const Wgmma*)m.slots[lane]; });
  const Wgmma& g = p.of[0];
  for (const Wgmma& o : p.of)
    if (o.b_descriptor != g.b_descriptor || o.a_descriptor != g.a_descriptor || o.scale_d != g.scale_d)
      w.machine->fail(format("wgmma: descriptors differ between the threads of a warp [line %u]", g.line));
  for (int i = 0; i < g.n / 2 / per_register(g.d_type); i++) {
    const u32 r = g.d[i];
    if (w.values.size() < (r + 1) * 32) w.values.resize((r + 1) * 32);
    for (u32 lane = 0; lane < 32 && !w.in_flight.count(r); lane++) {
      w.values[r * 32 + lane] = p.of[lane].registers[r];
      p.of[lane].registers[r] = ~0u;
    }
    w.in_flight[r] = p.group;
  }
  note_reads(w, g);
  if (!behind && w.machine->random(2)) run_product(w, p);
}

void wgmma(Thread* t, const Wgmma& g) {
  meet_all(burn(t), run_wgmma, g.line, const_cast<Wgmma*>(&g), "wgmma.mma_async", g.line);
}

static void run_commit(Warp& w, Meeting&) { w.groups.open++; }
void wgmma_commit(Thread* t, u32 line) { meet_all(lane_of(t), run_commit, line, nullptr, "wgmma.commit_group", line); }

static void run_wait(Warp& w, Meeting& m) {
  const u32 done = complete_groups(w.groups, *(u32*)m.slots[0]);
  size_t finished = 0;
  for (; finished < w.products.size() && w.products[finished].group < done; finished++)
    if (!w.products[finished].ran) run_product(w, w.products[finished]);
  for (auto it = w.in_flight.begin(); it != w.in_flight.end();) {
    const bool complete = it->second < done;
    for (u32 lane = 0; lane < 32 && complete; lane++)
      w.products[0].of[lane].registers[it->first] = w.values[it->first * 32 + lane];
    it = complete ? w.in_flight.erase(it) : std::next(it);
  }
  w.products.erase(w.products.begin(), w.products.begin() + long(finished));
  each_lane(m, [&](u32 lane) { acquire_groups(w.lanes + lane, w.groups, done); });
}
void wgmma_wait(Thread* t, u32 pending, u32 line) {
  meet_all(lane_of(t), run_wait, line, &pending, "wgmma.wait_group", line);
}

}  // namespace ptx
