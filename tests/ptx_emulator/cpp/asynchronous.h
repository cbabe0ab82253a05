// Copies that complete later (9.7.9.25) and mbarriers (9.7.13.15).
//
// A copy into shared memory overwrites its destination with poison when it is issued, and with data when it completes:
// cp.async at its wait, bulk copies at a time of the seed's choosing before what waits for them goes on.
#pragma once
#include "matrix.h"

namespace ptx {

// --- 9.7.9.25.3 cp.async -------------------------------------------------------------------------------------------
void cp_async(Thread* t, u32 to, u64 from, u32 bytes, u32 source_bytes, u32 site, u32 line) {
  Lane* self = burn(t);
  Machine& m = *self->machine;
  const Place p = place(self, to, bytes, bytes, line);
  source_bytes = std::min(source_bytes, bytes);
  if (from % bytes) fail(self, line, format("cp.async: the source is not aligned to %u bytes", bytes));
  if (source_bytes) check_global(self, from, source_bytes, line, "cp.async from");
  const u32 when = m.open_group(self->copy_groups);
  const Epoch now = epoch(when, self->copy_groups.slot, line);
  if (m.check_races) touch(*p.cta, {&m, self->clock, now, true, nullptr}, p.offset, bytes);
  note_banks(self, site, p.offset, bytes, line);
  memset(p.data, 0xFF, bytes);
  self->copies.push_back({p.offset, from, bytes, source_bytes, self->copy_groups.open});
}

void cp_async_commit(Thread* t) { lane_of(t)->copy_groups.open++; }

static void finish_copies(Lane* self, u32 done) {
  size_t i = 0;
  for (; i < self->copies.size() && self->copies[i].group < done; i++) {
    const Copy& c = self->copies[i];
    u8* data = &self->cta->shared[c.to];
    memcpy(data, (const void*)c.from, c.source_bytes);
    memset(data + c.source_bytes, 0, c.bytes - c.source_bytes);
  }
  self->copies.erase(self->copies.begin(), self->copies.begin() + long(i));
}

void cp_async_wait(Thread* t, u32 pending, u32) {
  Lane* self = burn(t);
  const u32 done = complete_groups(self->copy_groups, pending);
  finish_copies(self, done);
  acquire_groups(self, self->copy_groups, done);
}

// --- 9.7.13.15 mbarrier --------------------------------------------------------------------------------------------
static Mbarrier* mbarrier_at(Cta& cta, u32 offset) {
  auto it = cta.mbarriers.find(offset);
  return it == cta.mbarriers.end() || !it->second.live ? nullptr : &it->second;
}

// The barrier at an address, which the race detector sees read, or written where it begins or ends.
static Mbarrier& use(Lane* self, u64 address, const char* what, Place& p, u32 line, bool write = false) {
  p = place(self, u32(address), 8, 8, line);
  Mbarrier* b = mbarrier_at(*p.cta, p.offset);
  if (!b) fail(self, line, format("%s: there is no mbarrier at shared 0x%x", what, p.offset));
  touch(self, *p.cta, p.offset, 8, write, line);
  return *b;
}

// A phase is complete when no arrivals and no bytes are pending.
static void flip_if_complete(Machine& m, Mbarrier& b) {
  m.progress++;
  if (b.pending || b.bytes) return;
  b.phase++, b.pending = b.expected;
  if (m.check_races) {
    join(b.released, b.current.data(), b.current.size());
    if (b.released.size() <= b.slot) b.released.resize(m.slots, 0);
    b.released[b.slot] = b.when;
    b.current.clear();
    m.stamp(++b.when);
  }
  for (Lane* lane : b.waiting) m.wake(lane);
  b.waiting.clear();
}

void mbarrier_init(Thread* t, u64 address, u32 count, u32 line) {
  Lane* self = burn(t);
  Machine& m = *self->machine;
  const Place p = place(self, u32(address), 8, 8, line);
  if (!count) fail(self, line, "mbarrier.init: an expected count of 0");
  if (mbarrier_at(*p.cta, p.offset)) fail(self, line, format("mbarrier.init: 0x%x is an mbarrier already", p.offset));
  touch(self, *p.cta, p.offset, 8, true, line);
  memset(p.data, 0xFF, 8);
  auto before = p.cta->mbarriers.find(p.offset);  // one that was there keeps its slot and its times
  const bool again = before != p.cta->mbarriers.end();
  const u32 slot = again ? before->second.slot : m.check_races ? m.new_slot() : 0;
  const u32 when = again ? before->second.when : m.stamp(m.base + 1);
  p.cta->mbarriers[p.offset] = {true, count, count, 0, 0, slot, when, {}, {}, {}};
}

void mbarrier_inval(Thread* t, u64 address, u32 line) {
  Lane* self = burn(t);
  Place p;
  Mbarrier& b = use(self, address, "mbarrier.inval", p, line, true);
  if (!b.waiting.empty() || b.bytes) fail(self, line, format("mbarrier.inval: 0x%x is in use", p.offset));
  b.live = false;
}

static void arrive(Lane* self, Mbarrier& b, u32 offset, u32 count, u32 line) {
  if (b.pending < count)
    fail(self, line,
         format("mbarrier at 0x%x: %u arrivals where %u are pending of %u", offset, count, b.pending, b.expected));
  b.pending -= count;
  flip_if_complete(*self->machine, b);
}

u64 mbarrier_arrive(Thread* t, u64 address, u32 count, u32 bytes, bool releases, bool drop, u32 line) {
  Lane* self = burn(t);
  Place p;
  Mbarrier& b = use(self, address, "mbarrier.arrive", p, line);
  const u64 phase = b.phase;
  b.bytes += bytes;
  if (drop) b.expected -= count;
  if (releases) release(self, b.current);
  arrive(self, b, p.offset, count, line);
  return phase;
}

void mbarrier_expect(Thread* t, u64 address, u32 bytes, bool complete, u32 line) {
  Lane* self = burn(t);
  Place p;
  Mbarrier& b = use(self, address, "mbarrier.expect_tx", p, line);
  b.bytes += complete ? -s64(bytes) : s64(bytes);
  flip_if_complete(*self->machine, b);
}

// Phase p has parity p & 1 and is complete once the barrier is in phase p + 1. A try may give up: the seed lets some,
// and whoever nobody can wake must. A test does not wait in hardware; here, too, the others go on first, so that a loop
// of tests does not spin for ever.
bool mbarrier_wait(Thread* t, u64 address, u64 state, bool parity, bool acquires, u32 line) {
  Lane* self = burn(t);
  Machine& m = *self->machine;
  Place p;
  Mbarrier* b = &use(self, address, "mbarrier.try_wait", p, line);
  auto complete = [&] { return parity ? (b->phase & 1) != (state & 1) : b->phase > state; };
  if (!complete() && m.random(8) == 0) {
    m.switch_to_next(self);
    return false;
  }
  if (!complete()) {
    b->waiting.push_back(self);
    self->polls = true, self->woken = false;
    block(self, {Wait::MBARRIER, parity ? "parity" : "phase", u64(p.cta->rank) << 32 | p.offset, state, line});
    self->polls = false;
    b = &use(self, address, "mbarrier.try_wait", p, line);
    if (self->woken) b->waiting.erase(std::remove(b->waiting.begin(), b->waiting.end(), self), b->waiting.end());
    if (!complete()) return false;
  }
  if (acquires) acquire(self, b->released);
  return true;
}

u32 mapa(Thread* t, u32 address, u32 rank, u32 line) {
  if (rank >= t->cluster_size) fail(lane_of(t), line, format("mapa: CTA %u of a cluster of %u", rank, t->cluster_size));
  return (rank + 1) << 24 | (address & 0xFFFFFF);
}

// 9.7.13.15.15 cp.async.mbarrier.arrive: once the cp.async before it are complete.
void cp_async_arrive(Thread* t, u64 address, bool counted, u32 line) {
  Lane* self = burn(t);
  Machine& m = *self->machine;
  Place p;
  Mbarrier& b = use(self, address, "cp.async.mbarrier.arrive", p, line);
  if (counted) b.pending++;
  const u32 when = m.open_group(self->copy_groups), done = ++self->copy_groups.open;
  release(self, b.current);
  m.pending.push_back({self, false, 0, [=, &m] {
                         finish_copies(self, done);
                         Mbarrier* target = mbarrier_at(*p.cta, p.offset);
                         if (!target) fail(self, line, "cp.async.mbarrier.arrive: the mbarrier is gone");
                         if (m.check_races) {
                           target->current.resize(m.slots, 0);
                           target->current[self->copy_groups.slot] =
                               std::max(target->current[self->copy_groups.slot], when);
                         }
                         arrive(self, *target, p.offset, 1, line);
                       }});
}

// --- 9.7.9.27 tensor maps and cp.async.bulk.tensor -----------------------------------------------------------------
// What stands in the 128 bytes of a tensor map here; tensor_map.py writes it. Dimension 0 is the innermost.
struct TensorMap {
  u64 magic, base, strides[5];
  u32 dims[5], box[5], steps[5];
  u8 rank, element, type, width, nan_fill;
};
const u64 TENSOR_MAP = 0x70616D726F736E65ull;

struct Tile {  // a box of a tensor
  TensorMap map;
  s64 at[5];

  u32 count(int d) const { return (map.box[d] + map.steps[d] - 1) / map.steps[d]; }
  u32 bytes() const {
    u32 n = map.element;
    for (int d = 0; d < map.rank; d++) n *= count(d);
    return n;
  }
  // f(swizzled address in shared memory, address in global memory or nullptr outside of the tensor) for each element.
  template <class F>
  void each(u32 shared, F f) const {
    u32 index[5] = {};
    for (u32 o = 0, end = bytes(); o < end; o += map.element) {
      u64 address = map.base;
      bool inside = true;
      for (int d = 0; d < map.rank; d++) {
        const s64 x = at[d] + s64(index[d]) * map.steps[d];
        inside = inside && x >= 0 && x < s64(map.dims[d]);
        address += u64(x) * map.strides[d];
      }
      f(swizzled(shared + o, map.width), inside ? (u8*)address : nullptr);
      for (int d = 0; d < map.rank && ++index[d] == count(d); d++) index[d] = 0;
    }
  }
};

static Tile tile_of(Lane* self, u64 map, int rank, const s32* at, u32 line) {
  check_global(self, map, 128, line, "tensor map in");
  Tile t = {*(const TensorMap*)map, {}};
  if (t.map.magic != TENSOR_MAP) fail(self, line, "cp.async.bulk.tensor: these 128 bytes are no tensor map");
  if (t.map.rank != rank) fail(self, line, format("a tensor map of %d dimensions in a copy of %d", t.map.rank, rank));
  std::copy(at, at + rank, t.at);
  return t;
}

// One copy into shared memory: poison now; later `write`, and its bytes to the mbarrier of the same CTA.
static void issue_load(Lane* self, Cta& cta, u32 offset, u32 bytes, u32 barrier, std::function<void()> write,
                       u32 line) {
  Machine& m = *self->machine;
  const Mbarrier* b = mbarrier_at(cta, barrier);
  if (!b) fail(self, line, format("bulk copy: there is no mbarrier at shared 0x%x", barrier));
  if (m.check_races) touch(cta, {&m, self->clock, epoch(b->when, b->slot, line), true, nullptr}, offset, bytes);
  memset(&cta.shared[offset], 0xFF, bytes);
  m.progress++;
  m.pending.push_back(
      {self, false, 0, [=, &m, &cta] {
         write();
         Mbarrier* done = mbarrier_at(cta, barrier);
         if (!done)
           m.fail(format("a copy completes on shared 0x%x, which is no mbarrier any more [line %u]", barrier, line));
         done->bytes -= bytes;
         flip_if_complete(m, *done);
       }});
}

// ... into the CTA of its address, or with .multicast into those of a mask.
template <class F>
static void issue_loads(Lane* self, Place p, u32 bytes, u64 barrier, u32 multicast, u32 line, F write) {
  const Place on = place(self, u32(barrier), 8, 8, line);
  for (Cta& cta : self->machine->ctas)
    if (multicast ? multicast >> cta.rank & 1 : &cta == p.cta) {
      Cta* to = &cta;
      issue_load(self, cta, p.offset, bytes, on.offset, [=] { write(to->shared.data()); }, line);
    }
}

void tma_load(Thread* t, u64 to, u64 map, int rank, const s32* at, u64 barrier, u32 multicast, u32 line) {
  Lane* self = burn(t);
  const Tile tile = tile_of(self, map, rank, at, line);
  const Place p = place(self, u32(to), tile.bytes(), 128, line);
  issue_loads(self, p, tile.bytes(), barrier, multicast, line, [=](u8* shared) {
    tile.each(p.offset, [&](u32 o, const u8* from) {
      if (from)
        memcpy(shared + o, from, tile.map.element);
      else
        memset(shared + o, tile.map.nan_fill ? 0xFF : 0, tile.map.element);
    });
  });
}

// --- 9.7.9.25.4 stores and reductions in bulk ----------------------------------------------------------------------
template <class T>
static T reduced(T a, T b, Reduce how) {
  return how == ADD ? T(a + b) : how == MIN ? std::min(a, b) : std::max(a, b);
}
template <class T>
static void reduce_in(u8* to, const u8* from, Reduce how) {
  T a, b;
  memcpy(&a, to, sizeof a), memcpy(&b, from, sizeof b);
  a = reduced(a, b, how);
  memcpy(to, &a, sizeof a);
}
static void store_element(u8* to, const u8* from, Reduce how, Format type, u32 size) {
  u16 a, b;
  memcpy(&a, to, 2), memcpy(&b, from, 2);
  if (how == COPY) {
    memcpy(to, from, size);
  } else if (type == T_F32) {
    reduce_in<float>(to, from, how);
  } else if (type == T_S32) {
    reduce_in<s32>(to, from, how);
  } else {
    a = type == T_BF16 ? to_bf16(reduced(bf16(a), bf16(b), how)) : to_f16(reduced(f16(a), f16(b), how));
    memcpy(to, &a, 2);
  }
}

static void issue_store(Lane* self, u32 offset, u32 bytes, std::function<void()> write, u32 line) {
  Machine& m = *self->machine;
  const u32 when = m.open_group(self->bulk_groups);
  const Epoch now = epoch(when, self->bulk_groups.slot, line);
  if (m.check_races) touch(*self->cta, {&m, self->clock, now, false, nullptr}, offset, bytes);
  m.pending.push_back({self, true, self->bulk_groups.open, write});
}

void tma_store(Thread* t, u32 from, u64 map, int rank, const s32* at, Reduce how, u32 line) {
  Lane* self = burn(t);
  const Tile tile = tile_of(self, map, rank, at, line);
  const Place p = place(self, from, tile.bytes(), 128, line);
  if (how != COPY && tile.map.type == 255) fail(self, line, "cp.reduce.async.bulk.tensor: this type is not modelled");
  auto write = [=] {
    tile.each(p.offset, [&](u32 o, u8* to) {
      if (to) store_element(to, &p.cta->shared[o], how, Format(tile.map.type), tile.map.element);
    });
  };
  issue_store(self, p.offset, tile.bytes(), write, line);
}

void bulk_copy(Thread* t, Bulk kind, u64 to, u64 from, u32 bytes, u64 barrier, u32 multicast, Reduce how, Format type,
               u32 line) {
  Lane* self = burn(t);
  if (bytes % 16 || to % 16 || from % 16) fail(self, line, "cp.async.bulk: addresses and size must be multiples of 16");
  if (kind == GLOBAL_FROM_SHARED) {
    const Place p = place(self, u32(from), bytes, 16, line);
    check_global(self, to, bytes, line, "bulk copy to");
    const u32 size = how == COPY ? bytes : type == T_F32 || type == T_S32 ? 4 : 2;
    auto write = [=] {
      for (u32 i = 0; i < bytes; i += size) store_element((u8*)to + i, p.data + i, how, type, size);
    };
    return issue_store(self, p.offset, bytes, write, line);
  }
  const Place p = place(self, u32(to), bytes, 16, line);
  if (kind == SHARED_FROM_GLOBAL) check_global(self, from, bytes, line, "bulk copy from");
  const u8* source = kind == SHARED_FROM_GLOBAL ? (const u8*)from : place(self, u32(from), bytes, 16, line).data;
  issue_loads(self, p, bytes, barrier, multicast, line, [=](u8* shared) { memcpy(shared + p.offset, source, bytes); });
}

void bulk_commit(Thread* t) { lane_of(t)->bulk_groups.open++; }

void bulk_wait(Thread* t, u32 pending) {
  Lane* self = burn(t);
  Machine& m = *self->machine;
  const u32 done = complete_groups(self->bulk_groups, pending);
  for (size_t i = 0; i < m.pending.size();) {
    const Asynchronous& a = m.pending[i];
    a.owner == self&& a.bulk&& a.group < done ? m.run_pending(i) : void(i++);
  }
  acquire_groups(self, self->bulk_groups, done);
}

}  // namespace ptx
