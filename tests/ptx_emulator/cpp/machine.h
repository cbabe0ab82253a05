// One launch: its threads as fibers, grouped in warps and CTAs, and the schedule that a seed chooses.
//
// One cluster runs at a time (a CTA where there are no clusters), to its end. A fiber runs until it waits for others or
// until its fuel, drawn anew each time, is used up by memory operations; then another one is chosen at random.
#pragma once
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>
#include "fibers.h"
#include "ptx.h"

namespace ptx {

struct Machine;
struct Warp;
struct Cta;
struct Record;
struct BankSite;

const u32 SHARED_START = 1024;  // the first bytes of the window belong to the system, as on sm_90
const u32 FULL = 0xFFFFFFFF;

// Vector clock: how much is known of every slot, which is a thread, or a kind of asynchronous copy.
typedef std::vector<u32> Clock;

struct Wait {  // why a thread does not run
  enum Kind { NOTHING, COLLECTIVE, BARRIER, MBARRIER, CLUSTER } kind = NOTHING;
  const char* what = "";
  u64 a = 0, b = 0;
  u32 line = 0;
};

struct Copy {  // cp.async
  u32 to;
  u64 from;
  u32 bytes, source_bytes, group;
};

// Groups of asynchronous operations that complete in order; for the race detector, group g is time base + g of a slot.
struct Groups {
  u32 open = 0, slot = 0, base = 0;
};

struct Lane : Thread, Fiber {
  Machine* machine;
  Warp* home;
  Cta* cta;
  u32 slot;  // of its clock; its number in the cluster
  u32* clock;
  u8 *stack_low, *stack_top;
  bool done, polls, woken;  // polls: it waits for an mbarrier, but may also give up; woken: it must
  int fuel;
  u64 cluster_phase;  // of the cluster barrier, at its arrival
  Wait wait;
  std::vector<Copy> copies;
  Groups copy_groups, bulk_groups;
};

struct Meeting {  // threads of a warp that came to the same collective instruction
  typedef void (*Run)(Warp&, Meeting&);
  Run run;
  u32 qualifiers, mask, line, arrived;
  void* slots[32];
};

struct Product {  // a wgmma that has been issued
  Wgmma of[32];
  u32 group;
  bool ran;
};

struct Warp {
  Machine* machine;
  Cta* cta;
  u32 index;     // in the cluster
  u32 existing;  // lanes that the block has
  u32 ready, exited = 0;
  Lane* lanes;
  std::vector<Meeting> meetings;
  std::vector<Product> products;  // in order
  std::map<u32, u32> in_flight;   // register that products write -> group of the last
  std::vector<u32> values;        // of those registers: [register][lane]
  Groups groups;
};

struct NamedBarrier {
  u32 expected = 0, arrived = 0, votes = 0;
  std::vector<std::pair<Lane*, u32*>> waiting;  // and where they want the votes
  Clock clock;
};

struct Mbarrier {
  bool live;
  u32 expected, pending;
  s64 bytes;
  u64 phase;
  u32 slot, when;  // of copies that complete here in this phase, for the race detector
  std::vector<Lane*> waiting;
  Clock released, current;  // by complete phases, in this one
};

struct Asynchronous {
  Lane* owner;
  bool bulk;  // belongs to a bulk group of its owner
  u32 group;
  std::function<void()> run;
};

struct Cta {
  u32 rank, threads, live;
  std::vector<u8> shared;
  std::unique_ptr<Record[]> records;
  std::vector<u8> levels;
  NamedBarrier barriers[16];
  std::map<u32, Mbarrier> mbarriers;
};

struct Range {
  u64 low, high;
};

struct Machine {
  // of the launch
  Entry entry;
  u32 grid[3], block[3], cluster[3], shared_bytes, dynamic_bytes;
  const u8* params;
  u64 *counts, random_state;
  std::vector<Range> ranges;
  bool check_races, check_bounds;
  int fuel_limit, stay;
  // of the cluster that runs
  std::vector<Lane> lanes;
  std::vector<Warp> warps;
  std::vector<Cta> ctas;
  std::vector<u64> ready;  // a bit for each warp
  std::vector<u32> clocks;
  u32 capacity, slots, base, latest = 1;  // of clocks; times up to base are before this cluster
  u32 live, current_warp, cluster_arrived;
  u64 cluster_phase, progress = 0, progress_at_poll = ~0ull, watched = ~0ull, switches = 0, ticks = 0;
  std::chrono::steady_clock::time_point watched_since;
  std::vector<Asynchronous> pending;
  std::map<u64, Clock> locations;  // that atomics acquire and release
  Clock cluster_clock;
  Fiber main;
  Lane* current = nullptr;
  // results
  std::string error;
  std::vector<std::string> races;
  std::set<std::string> race_keys;
  std::map<u32, std::vector<std::unique_ptr<BankSite>>> banks;  // site -> of each warp
  u64 wavefronts = 0, ideal_wavefronts = 0;
  std::map<u32, std::pair<u64, u64>> wavefronts_of_line;

  u32 random(u32 n) {
    random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
    return u32((random_state >> 32) * n >> 32);
  }
  [[noreturn]] void fail(const std::string& why) {
    if (error.empty()) error = why;
    switch_fiber(*current, main);
    __builtin_unreachable();
  }
  void wake(Lane* lane) {
    lane->wait.kind = Wait::NOTHING;
    lane->home->ready |= 1u << lane->lane;
    ready[lane->home->index / 64] |= 1ull << lane->home->index % 64;
  }
  void sleep(Lane* lane) {
    Warp& w = *lane->home;
    w.ready &= ~(1u << lane->lane);
    if (!w.ready) ready[w.index / 64] &= ~(1ull << w.index % 64);
  }
  u32 new_slot() {
    if (slots == capacity) fail("more asynchronous operations than the race detector has slots for");
    return slots++;
  }
  u32 stamp(u32 time) {
    if (time > latest) latest = time;
    return time;
  }
  // The slot and time of the group that is open.
  u32 open_group(Groups& g) {
    if (!g.slot && check_races) g.slot = new_slot(), g.base = base + 1;
    return stamp(g.base + g.open);
  }

  Lane* pick();
  void watch();
  void switch_to_next(Lane* self);
  void run_pending(size_t i);
  void prepare(const u32* origin, const Stacks& stacks);
  void run_cluster(const u32* origin, const Stacks& stacks);
  std::string state();
};

static inline std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));
static inline std::string format(const char* text, ...) {
  char buffer[1024];
  va_list arguments;
  va_start(arguments, text);
  vsnprintf(buffer, sizeof buffer, text, arguments);
  va_end(arguments);
  return buffer;
}

static inline Lane* lane_of(Thread* t) { return static_cast<Lane*>(t); }
static inline std::string name_of(const Lane* l) {
  return format("CTA (%u,%u,%u) thread (%u,%u,%u)", l->ctaid[0], l->ctaid[1], l->ctaid[2], l->tid[0], l->tid[1],
                l->tid[2]);
}
[[noreturn]] static inline void fail(Lane* self, u32 line, const std::string& why) {
  self->machine->fail(name_of(self) + ": " + why + format(" [line %u]", line));
}

// --- waiting -------------------------------------------------------------------------------------------------------
static inline void block(Lane* self, Wait wait) {
  self->wait = wait;
  self->machine->sleep(self);
  self->machine->switch_to_next(self);
}

// Each memory operation takes fuel; at its end another fiber may run first.
static inline Lane* burn(Thread* t) {
  Lane* self = lane_of(t);
  if (--self->fuel < 0) {
    self->fuel = int(self->machine->random(u32(self->machine->fuel_limit)));
    self->machine->switch_to_next(self);
  }
  return self;
}

// --- vector clocks -------------------------------------------------------------------------------------------------
static inline void join(Clock& into, const u32* from, size_t n) {
  if (into.size() < n) into.resize(n, 0);
  u32* to = into.data();
  for (size_t i = 0; i < n; i++) to[i] = to[i] > from[i] ? to[i] : from[i];
}
// What a thread did so far becomes visible to whoever acquires `into`.
static inline void release(Lane* self, Clock& into) {
  Machine& m = *self->machine;
  if (!m.check_races) return;
  join(into, self->clock, m.slots);
  m.stamp(++self->clock[self->slot]);
}
static inline void acquire(Lane* self, const Clock& from) {
  if (!self->machine->check_races) return;
  for (size_t i = 0; i < from.size(); i++)
    if (self->clock[i] < from[i]) self->clock[i] = from[i];
}
// Groups before `done` are complete, as far as this thread goes.
static inline void acquire_groups(Lane* self, const Groups& g, u32 done) {
  u32& known = self->clock[g.slot];
  if (g.slot && done && known < g.base + done - 1) known = g.base + done - 1;
}
static inline u32 complete_groups(const Groups& g, u32 pending) { return g.open > pending ? g.open - pending : 0; }

}  // namespace ptx
