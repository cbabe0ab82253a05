// Memory: bounds and alignment, the race detector of shared memory, the counter of bank conflicts.
#pragma once
#include <algorithm>
#include "machine.h"

namespace ptx {

// --- races in shared memory ----------------------------------------------------------------------------------------
// An access is stamped with a slot (the thread, or its asynchronous copies) and that slot's time. It is ordered before
// what a thread does now if the thread's clock knows that time. After Flanagan and Freund, "FastTrack", 2009.
typedef u64 Epoch;  // time (28 bits), slot (14), PTX line (22); 0: none
static inline Epoch epoch(u32 time, u32 slot, u32 line) {
  return u64(time) << 36 | u64(slot) << 22 | (line & 0x3FFFFF);
}
static inline u32 time_of(Epoch e) { return u32(e >> 36); }
static inline u32 slot_of(Epoch e) { return u32(e >> 22) & 0x3FFF; }
static inline u32 line_of(Epoch e) { return u32(e) & 0x3FFFFF; }

// Of 16, 4 or 1 bytes: the last write, and the reads since. Few reads stand in a list, many in an array by slot.
struct Record {
  Epoch write = 0;
  std::unique_ptr<std::vector<Epoch>> many;
  u32 count = 0;
  Epoch few[5];

  void copy_from(const Record& r) {
    write = r.write, count = r.count;
    memcpy(few, r.few, sizeof few);
    many.reset(r.many ? new std::vector<Epoch>(*r.many) : nullptr);
  }
  template <class F>
  void each_read(F f) const {
    for (u32 i = 0; i < count; i++) f(few[i]);
    if (many) std::for_each(many->begin(), many->end(), f);
  }
};

struct Access {
  Machine* machine;
  const u32* clock;  // what is known to have happened before
  Epoch epoch;
  bool write;
  const void* data;  // what a store will write, or nullptr

  bool after(Epoch e) const { return clock[slot_of(e)] >= time_of(e); }
};

static inline std::string slot_name(Machine& m, u32 slot) {
  if (slot < m.lanes.size()) return name_of(&m.lanes[slot]);
  for (Lane& l : m.lanes) {
    if (l.copy_groups.slot == slot) return "cp.async of " + name_of(&l);
    if (l.bulk_groups.slot == slot) return "bulk copy of " + name_of(&l);
  }
  for (Warp& w : m.warps)
    if (w.groups.slot == slot) return format("wgmma of warp %u", w.lanes->warp);
  for (Cta& c : m.ctas)
    for (auto& b : c.mbarriers)
      if (b.second.slot == slot) return format("copy that completes on the mbarrier at 0x%x", b.first);
  return "an asynchronous copy";
}

static inline void report_race(const Access& a, Epoch earlier, bool earlier_writes, u32 address) {
  Machine& m = *a.machine;
  std::string key = format("%u %u %d %d", line_of(earlier), line_of(a.epoch), earlier_writes, a.write);
  if (m.races.size() >= 64 || !m.race_keys.insert(key).second) return;
  auto text = [&](bool write, Epoch e) {
    return (write ? "write by " : "read by ") + slot_name(m, slot_of(e)) + format(" [line %u]", line_of(e));
  };
  m.races.push_back(format("shared memory 0x%x: ", address) + text(a.write, a.epoch) + " is not ordered after the " +
                    text(earlier_writes, earlier));
}

// same: the bytes written are there already. Two stores of one value need no order among themselves; Triton lets all
// threads that hold a replicated value store it.
static inline void check(const Access& a, const Record& r, u32 address, bool same) {
  if (!a.after(r.write) && !same) report_race(a, r.write, true, address);
  if (a.write)
    r.each_read([&](Epoch e) {
      if (!a.after(e)) report_race(a, e, false, address);
    });
}

static inline void enter(const Access& a, Record& r) {
  if (a.write) {
    r.write = a.epoch, r.count = 0;
    r.many.reset();
    return;
  }
  if (!r.many) {  // reads that happened before this one need not be remembered
    r.count = u32(std::remove_if(r.few, r.few + r.count, [&](Epoch e) { return a.after(e); }) - r.few);
    if (r.count < 5) {
      r.few[r.count++] = a.epoch;
      return;
    }
    r.many.reset(new std::vector<Epoch>(a.machine->slots));
    for (Epoch e : r.few) (*r.many)[slot_of(e)] = e;
    r.count = 0;
  }
  if (r.many->size() <= slot_of(a.epoch)) r.many->resize(a.machine->slots);
  (*r.many)[slot_of(a.epoch)] = a.epoch;
}

static const u32 STEP[3] = {16, 4, 1};  // bytes that share a record, by the level of a unit of 16 bytes

static inline void split(Cta& cta, u32 unit, u8 level) {
  for (u8& have = cta.levels[unit]; have < level; have++)
    for (u32 i = 0; i < 16; i += STEP[have])
      for (u32 j = i + STEP[have + 1]; j < i + STEP[have]; j += STEP[have + 1])
        cta.records[unit * 16 + j].copy_from(cta.records[unit * 16 + i]);
}

static inline void touch(Cta& cta, const Access& a, u32 start, u32 bytes) {
  for (u32 offset = start, end = start + bytes; offset < end;) {
    const u32 unit = offset / 16, low = offset % 16, high = std::min(16u, low + end - offset);
    const bool whole = low == 0 && high == 16;
    if (!whole) split(cta, unit, (low | high) % 4 ? 2 : 1);
    u32 step = STEP[cta.levels[unit]];
    Record* records = &cta.records[unit * 16];
    for (u32 i = low; i < high; i += step) {
      const u32 at = offset - low + i;
      const bool same = a.data && !memcmp((const u8*)a.data + (at - start), &cta.shared[at], std::min(step, high - i));
      check(a, records[i], at, same);
    }
    if (whole && a.write) cta.levels[unit] = 0, step = 16;
    for (u32 i = low; i < high; i += step) enter(a, records[i]);
    offset += high - low;
  }
}

static inline void touch(Lane* self, Cta& cta, u32 offset, u32 bytes, bool write, u32 line,
                         const void* data = nullptr) {
  if (!self->machine->check_races) return;
  Epoch now = epoch(self->clock[self->slot], self->slot, line);
  touch(cta, {self->machine, self->clock, now, write, data}, offset, bytes);
}

// --- bank conflicts ------------------------------------------------------------------------------------------------
// 32 banks of 4 bytes. A warp's access takes one wavefront per quarter (16 bytes a thread), half (8) or whole warp, and
// one more for each further word that a bank must give in it. Threads run apart: their visits of an instruction are
// counted, and visits of one number belong together.
struct BankSite {
  u32 bytes, line, visits[32] = {};
  struct {
    u32 visit, mask = 0, addresses[32];
  } ring[8];
};

static inline void count_wavefronts(Machine& m, const u32* addresses, u32 mask, u32 bytes, u32 line) {
  const u32 lanes = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8, words = std::max(1u, bytes / 4);
  u64 actual = 0, ideal = 0;
  for (u32 first = 0; first < 32; first += lanes) {
    u32 seen[32][32], count[32] = {}, most = 0;
    for (u32 i = 0; i < lanes * words; i++) {
      if (!(mask >> (first + i / words) & 1)) continue;
      const u32 word = addresses[first + i / words] / 4 + i % words, bank = word % 32;
      if (std::find(seen[bank], seen[bank] + count[bank], word) == seen[bank] + count[bank])
        seen[bank][count[bank]++] = word;
      most = std::max(most, count[bank]);
    }
    actual += most, ideal += most > 0;
  }
  m.wavefronts += actual, m.ideal_wavefronts += ideal;
  m.wavefronts_of_line[line].first += actual - ideal, m.wavefronts_of_line[line].second += actual;
}

static inline void note_banks(Lane* self, u32 site, u32 address, u32 bytes, u32 line) {
  Machine& m = *self->machine;
  auto& sites = m.banks[site];
  sites.resize(m.warps.size());
  auto& mine = sites[self->home->index];
  if (!mine) mine.reset(new BankSite);
  mine->bytes = bytes, mine->line = line;
  const u32 visit = mine->visits[self->lane]++;
  auto& group = mine->ring[visit % 8];
  if (group.mask && group.visit != visit) {
    count_wavefronts(m, group.addresses, group.mask, bytes, line);
    group.mask = 0;
  }
  group.visit = visit, group.addresses[self->lane] = address, group.mask |= 1u << self->lane;
}

static inline void flush_banks(Machine& m) {
  for (auto& sites : m.banks)
    for (auto& s : sites.second)
      for (u32 i = 0; s && i < 8; i++)
        if (s->ring[i].mask) count_wavefronts(m, s->ring[i].addresses, s->ring[i].mask, s->bytes, s->line);
  m.banks.clear();
}

// --- addresses -----------------------------------------------------------------------------------------------------
struct Place {
  Cta* cta;
  u32 offset;
  u8* data;
};

static inline Place place(Lane* self, u32 address, u32 bytes, u32 alignment, u32 line) {
  Machine& m = *self->machine;
  const u32 rank = address >> 24, offset = address & 0xFFFFFF;
  if (rank > m.ctas.size()) fail(self, line, format("shared address 0x%x is in no CTA of the cluster", address));
  Cta* cta = rank ? &m.ctas[rank - 1] : self->cta;
  if (offset % alignment)
    fail(self, line, format("shared address 0x%x is not aligned to %u bytes", address, alignment));
  if (offset < SHARED_START || offset + bytes > cta->shared.size())
    fail(self, line,
         format("shared address 0x%x + %u is out of range: the CTA has 0x%x to 0x%zx", address, bytes, SHARED_START,
                cta->shared.size()));
  return {cta, offset, cta->shared.data() + offset};
}

static inline void check_global(Lane* self, u64 address, u64 bytes, u32 line, const char* what) {
  Machine& m = *self->machine;
  if (!m.check_bounds) return;
  auto above = [](u64 a, const Range& r) { return a < r.low; };
  auto after = std::upper_bound(m.ranges.begin(), m.ranges.end(), address, above);
  const bool first = after == m.ranges.begin();
  if (!first && address + bytes <= after[-1].high) return;
  const long long distance = !first                    ? (long long)(address + bytes - after[-1].high)
                             : after != m.ranges.end() ? (long long)(after->low - address)
                                                       : 0;
  fail(self, line,
       format("out of bounds: %s global memory 0x%llx, %llu bytes; %lld bytes %s", what, (unsigned long long)address,
              (unsigned long long)bytes, distance,
              first ? "before the first range" : "past the end of the nearest range"));
}

u8* reach_shared(Thread* t, u32 address, u32 bytes, int how, const void* data, u32 site, u32 line) {
  Lane* self = burn(t);
  Place p = place(self, address, bytes, bytes, line);
  if (how & ATOMIC) return p.data;
  touch(self, *p.cta, p.offset, bytes, how & WRITE, line, data);
  if (p.cta == self->cta) note_banks(self, site, p.offset, bytes, line);
  return p.data;
}

u8* reach(Thread* t, u64 address, u32 bytes, int how, const void* data, u32 site, u32 line) {
  if (address >> 56 == SHARED_WINDOW >> 56) return reach_shared(t, u32(address), bytes, how, data, site, line);
  Lane* self = burn(t);
  if (address % bytes)
    fail(self, line, format("address 0x%llx is not aligned to %u bytes", (unsigned long long)address, bytes));
  const bool local = address >= u64(self->stack_low) && address + bytes <= u64(self->stack_top);
  if (!local) check_global(self, address, bytes, line, how & WRITE ? "write to" : "read of");
  return (u8*)address;
}

}  // namespace ptx
