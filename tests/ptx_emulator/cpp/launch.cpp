// The schedule, the report of a deadlock, and the C function that Python calls.
#include <fenv.h>
#include <cmath>
#include <exception>
#include "asynchronous.h"

namespace ptx {

// --- small things --------------------------------------------------------------------------------------------------
template <class F>
F rounded(char op, F a, F b, F c, Rounding mode) {
  const volatile F x = a, y = b, z = c;  // read once the mode is set
  const int before = fegetround();
  fesetround(mode == RZ ? FE_TOWARDZERO : mode == RM ? FE_DOWNWARD : mode == RP ? FE_UPWARD : FE_TONEAREST);
  const volatile F r = op == '+'   ? x + y
                       : op == '-' ? x - y
                       : op == '*' ? x * y
                       : op == '/' ? x / y
                       : op == 'r' ? F(1) / x
                       : op == 'f' ? std::fma(F(x), F(y), F(z))
                                   : std::sqrt(F(x));
  fesetround(before);
  return r;
}
template float rounded(char, float, float, float, Rounding);
template double rounded(char, double, double, double, Rounding);

void trap(Thread* t, const char* why, u32 line) { fail(lane_of(t), line, why); }
void nap(Thread* t) { lane_of(t)->machine->switch_to_next(lane_of(t)); }
u64 clock_ticks(Thread* t) { return lane_of(t)->machine->ticks += 10; }

void synchronize_location(Thread* t, u64 address, bool acquires, bool releases) {
  Clock& clock = lane_of(t)->machine->locations[address];
  if (acquires) acquire(lane_of(t), clock);
  if (releases) release(lane_of(t), clock);
}

// --- the schedule --------------------------------------------------------------------------------------------------
void Machine::run_pending(size_t i) {
  const Asynchronous a = std::move(pending[i]);
  pending.erase(pending.begin() + long(i));
  progress++;
  a.run();
}

// Seconds without an arrival, a copy or an exit mean that threads spin on memory that nobody will write.
void Machine::watch() {
  const auto now = std::chrono::steady_clock::now();
  if (progress != watched) watched = progress, watched_since = now;
  if (now - watched_since > std::chrono::seconds(10)) fail("no progress: threads spin\n" + state());
}

// The next fiber to run, nullptr when all have ended.
Lane* Machine::pick() {
  if (++switches % 4096 == 0) watch();
  if (!pending.empty() && random(32) == 0) run_pending(random(u32(pending.size())));
  for (;;) {
    if (!warps[current_warp].ready || random(u32(stay)) == 0) {  // a warp from a random place on
      const u32 first = random(u32(warps.size())), words = u32(ready.size());
      u64 later = ready[first / 64] & ~0ull << first % 64;
      u32 word = first / 64;
      for (u32 i = 0; !later && i < words; i++) word = (word + 1) % words, later = ready[word];
      if (later) current_warp = word * 64 + u32(__builtin_ctzll(later));
    }
    const Warp& w = warps[current_warp];
    if (w.ready) {
      const u32 turn = random(32), turned = u32(join64(w.ready, w.ready) >> turn);
      return w.lanes + (u32(__builtin_ctz(turned)) + turn) % 32;
    }
    if (!live) return nullptr;
    if (!pending.empty()) {
      run_pending(random(u32(pending.size())));
      continue;
    }
    bool woken = false;  // whoever may give up does, once: if nothing comes of it, nothing will
    if (progress != progress_at_poll)
      for (Lane& l : lanes)
        if (!l.done && l.polls && l.wait.kind == Wait::MBARRIER) woken = l.woken = true, wake(&l);
    progress_at_poll = progress;
    if (!woken) fail("deadlock: no thread can go on\n" + state());
  }
}

void Machine::switch_to_next(Lane* self) {
  Lane* next = pick();
  if (next == self) return;
  current = next;
  switch_fiber(*self, next ? static_cast<Fiber&>(*next) : main);
}

static thread_local Machine* starting;

static void run_fiber() {
  Machine& m = *starting;
  Lane* self = m.current;
  try {
    m.entry(self);
  } catch (const std::exception& e) {
    m.fail(e.what());
  }
  Warp& w = *self->home;
  self->done = true;
  m.live--, self->cta->live--, m.progress++;
  m.sleep(self);
  w.exited |= 1u << self->lane;
  for (size_t i = 0; i < w.meetings.size();)  // others may have waited for this thread alone
    complete(w, w.meetings[i]) ? hold(w, i, nullptr) : void(i++);
  for (NamedBarrier& b : self->cta->barriers)
    if (b.arrived && !b.expected) open_if_complete(*self->cta, b, self);
  open_cluster_if_complete(m);
  m.switch_to_next(self);
}

// --- the state, for a report ---------------------------------------------------------------------------------------
static std::string wait_text(Machine& m, const Lane& l) {
  typedef unsigned long long ull;
  const Wait& w = l.wait;
  std::string text = l.done ? "has ended" : "runs";
  if (w.kind == Wait::COLLECTIVE)
    text = format("waits in %s for threads of mask 0x%llx", w.what, ull(w.a));
  else if (w.kind == Wait::BARRIER)
    text = format("waits at barrier %llu: %u of %u threads arrived", ull(w.a), l.cta->barriers[w.a].arrived,
                  l.cta->barriers[w.a].expected ? l.cta->barriers[w.a].expected : l.cta->live);
  else if (w.kind == Wait::CLUSTER)
    text = format("waits at the cluster's barrier: %u of %u threads arrived", m.cluster_arrived, m.live);
  else if (w.kind == Wait::MBARRIER) {
    const Mbarrier& b = m.ctas[w.a >> 32].mbarriers[u32(w.a)];
    text = format(
        "waits on the mbarrier at 0x%x of CTA %u for %s %llu: it is in phase %llu (parity %llu), "
        "%u of %u arrivals and %lld bytes are pending",
        u32(w.a), u32(w.a >> 32), w.what, ull(w.b), ull(b.phase), ull(b.phase & 1), b.pending, b.expected,
        (long long)b.bytes);
  }
  return w.kind == Wait::NOTHING ? text : text + format(" [line %u]", w.line);
}

std::string Machine::state() {
  std::string all;
  for (Warp& w : warps) {
    std::map<std::string, u32> groups;
    for (u32 i = 0; i < 32; i++)
      if (w.existing >> i & 1) groups[wait_text(*this, w.lanes[i])] |= 1u << i;
    for (auto& g : groups)
      all += format("  CTA %u warp %u threads 0x%08x: ", w.cta->rank, w.lanes->warp, g.second) + g.first + "\n";
  }
  return all;
}

// --- a launch ------------------------------------------------------------------------------------------------------
static void unflatten(u32 i, const u32* size, u32* out) {
  out[0] = i % size[0], out[1] = i / size[0] % size[1], out[2] = i / size[0] / size[1];
}

static Lane make_lane(Machine& m, Cta& cta, u32 number, const u32* origin, const Stacks& stacks) {
  Lane l = Lane();
  const u32 index = number % cta.threads;
  l.params = m.params, l.counts = m.counts;
  unflatten(index, m.block, l.tid);
  unflatten(cta.rank, m.cluster, l.cluster_ctaid);
  for (int d = 0; d < 3; d++) {
    l.ntid[d] = m.block[d], l.nctaid[d] = m.grid[d], l.cluster_nctaid[d] = m.cluster[d];
    l.clusterid[d] = origin[d] / m.cluster[d], l.nclusterid[d] = m.grid[d] / m.cluster[d];
    l.ctaid[d] = origin[d] + l.cluster_ctaid[d];
  }
  l.lane = index % 32, l.warp = index / 32, l.warps = (cta.threads + 31) / 32;
  l.cluster_rank = cta.rank, l.cluster_size = u32(m.ctas.size());
  l.dynamic_start = m.shared_bytes - m.dynamic_bytes;
  l.dynamic_shared = m.dynamic_bytes, l.total_shared = m.shared_bytes - SHARED_START;
  l.machine = &m, l.cta = &cta, l.slot = number, l.clock = &m.clocks[size_t(number) * m.capacity];
  l.home = &m.warps[cta.rank * l.warps + l.warp];
  l.stack_low = stacks.low(number), l.stack_top = stacks.top(number);
  l.fuel = int(m.random(u32(m.fuel_limit)));
  return l;
}

void Machine::prepare(const u32* origin, const Stacks& stacks) {
  const u32 threads = block[0] * block[1] * block[2], each = (threads + 31) / 32;
  live = u32(lanes.size()), current_warp = cluster_arrived = 0, cluster_phase = 0;
  base = latest + 1, slots = live;
  stamp(base + 1);
  std::fill(clocks.begin(), clocks.end(), base);
  cluster_clock.clear(), locations.clear();
  warps = std::vector<Warp>(ctas.size() * each);
  ready.assign(warps.size() / 64 + 1, 0);
  for (u32 i = 0; i < warps.size(); i++) {
    Warp& w = warps[i];
    const u32 left = threads - i % each * 32;
    w.machine = this, w.cta = &ctas[i / each], w.index = i, w.lanes = &lanes[i / each * threads + i % each * 32];
    w.existing = w.ready = left < 32 ? (1u << left) - 1 : FULL;
    ready[i / 64] |= 1ull << i % 64;
  }
  for (u32 i = 0; i < ctas.size(); i++) {
    Cta& cta = ctas[i];
    cta.rank = i, cta.threads = cta.live = threads;
    std::fill(cta.shared.begin(), cta.shared.end(), 0xFF);
    cta.mbarriers.clear();
    std::fill(cta.barriers, cta.barriers + 16, NamedBarrier());
  }
  for (u32 i = 0; i < lanes.size(); i++) {
    lanes[i] = make_lane(*this, ctas[i / threads], i, origin, stacks);
    start_fiber(lanes[i], lanes[i].stack_low, lanes[i].stack_top, run_fiber);
    if (check_races) lanes[i].clock[i]++;
  }
}

void Machine::run_cluster(const u32* origin, const Stacks& stacks) {
  prepare(origin, stacks);
  starting = this;
  current = pick();
  switch_fiber(main, *current);
  if (!error.empty()) return;
  for (const Asynchronous& a : pending)
    if (a.bulk && races.size() < 64)
      races.push_back("the CTA ended before " + name_of(a.owner) + " waited for its bulk copy from shared memory");
  while (!pending.empty()) run_pending(0);
  flush_banks(*this);
}

}  // namespace ptx

using namespace ptx;

struct PtxLaunch {  // as in module.py
  void* entry;
  u32 grid[3], block[3], cluster[3], shared_bytes, dynamic_bytes;
  const u8* params;
  u64* counts;
  const Range* ranges;  // sorted
  u64 range_count, seed;
  u32 check_races, check_bounds;
  char *error, *races, *lines;  // results, which ptx_free takes back
  u64 wavefronts, ideal_wavefronts;
};

static void run_launch(const PtxLaunch& l, Machine& m) {
  const u32 threads = l.block[0] * l.block[1] * l.block[2] * l.cluster[0] * l.cluster[1] * l.cluster[2];
  const Stacks stacks(threads);
  m.lanes.resize(threads);
  m.ctas = std::vector<Cta>(l.cluster[0] * l.cluster[1] * l.cluster[2]);
  for (Cta& c : m.ctas) {
    c.shared.resize(m.shared_bytes);
    if (!m.check_races) continue;
    c.levels.resize(m.shared_bytes / 16 + 1);
    c.records.reset(new Record[(m.shared_bytes / 16 + 1) * 16]);
  }
  m.capacity = m.check_races ? threads * 3 + 1024 : 1;
  m.clocks.resize(size_t(m.capacity) * threads);
  u32 origin[3];
  for (origin[2] = 0; origin[2] < l.grid[2]; origin[2] += l.cluster[2])
    for (origin[1] = 0; origin[1] < l.grid[1]; origin[1] += l.cluster[1])
      for (origin[0] = 0; origin[0] < l.grid[0] && m.error.empty(); origin[0] += l.cluster[0])
        m.run_cluster(origin, stacks);
}

extern "C" void ptx_launch(PtxLaunch* l) {
  Machine m;
  m.entry = (Entry)l->entry;
  memcpy(m.grid, l->grid, sizeof m.grid), memcpy(m.block, l->block, sizeof m.block);
  memcpy(m.cluster, l->cluster, sizeof m.cluster);
  m.shared_bytes = l->shared_bytes, m.dynamic_bytes = l->dynamic_bytes;
  m.params = l->params, m.counts = l->counts;
  m.ranges.assign(l->ranges, l->ranges + l->range_count);
  m.check_races = l->check_races, m.check_bounds = l->check_bounds;
  m.random_state = (l->seed + 1) * 0x9E3779B97F4A7C15ull;
  // Fine and coarse schedules: how many memory operations between switches, how often the warp changes.
  static const int fuels[] = {1000, 40, 300, 8}, stays[] = {64, 1024, 8, 256};
  m.fuel_limit = fuels[l->seed % 4], m.stay = stays[l->seed / 4 % 4];
  try {
    run_launch(*l, m);
  } catch (const std::exception& e) {
    m.error = e.what();
  }
  std::string races, lines;
  for (const std::string& r : m.races) races += r + "\n";
  for (auto& w : m.wavefronts_of_line)
    if (w.second.first)
      lines +=
          format("%u %llu %llu\n", w.first, (unsigned long long)w.second.first, (unsigned long long)w.second.second);
  l->error = m.error.empty() ? nullptr : strdup(m.error.c_str());
  l->races = strdup(races.c_str()), l->lines = strdup(lines.c_str());
  l->wavefronts = m.wavefronts, l->ideal_wavefronts = m.ideal_wavefronts;
}

extern "C" void ptx_free(char* text) { free(text); }
