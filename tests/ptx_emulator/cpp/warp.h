// What the threads of a warp do together, and barriers.
//
// A collective instruction is a meeting: a thread waits until every thread of the member mask that has not exited has
// come to an instruction with the same qualifiers; the last to come does the work for all.
#pragma once
#include "memory.h"

namespace ptx {

static inline bool complete(const Warp& w, const Meeting& m) {
  const u32 expected = m.mask & w.existing & ~w.exited;
  return (m.arrived & expected) == expected;
}

template <class F>
static inline void each_lane(const Meeting& m, F f) {
  for (u32 lanes = m.arrived; lanes; lanes &= lanes - 1) f(u32(__builtin_ctz(lanes)));
}

static inline void hold(Warp& w, size_t i, Lane* self) {
  Meeting m = w.meetings[i];
  w.meetings[i] = w.meetings.back(), w.meetings.pop_back();
  m.run(w, m);
  each_lane(m, [&](u32 lane) {
    if (w.lanes + lane != self) w.machine->wake(w.lanes + lane);
  });
}

static inline void meet(Lane* self, Meeting::Run run, u32 qualifiers, u32 mask, void* slot, const char* what,
                        u32 line) {
  Warp& w = *self->home;
  if (!(mask >> self->lane & 1)) fail(self, line, format("%s: the thread is not in its member mask 0x%x", what, mask));
  auto like = [&](const Meeting& m) { return m.run == run && m.qualifiers == qualifiers && m.mask == mask; };
  auto it = std::find_if(w.meetings.begin(), w.meetings.end(), like);
  if (it == w.meetings.end()) it = w.meetings.insert(it, {run, qualifiers, mask, line, 0, {}});
  it->arrived |= 1u << self->lane;
  it->slots[self->lane] = slot;
  if (complete(w, *it))
    hold(w, size_t(it - w.meetings.begin()), self);
  else
    block(self, {Wait::COLLECTIVE, what, mask, 0, line});
}

// Of matrices: all threads, at the same instruction.
static inline void meet_all(Lane* self, Meeting::Run run, u32 qualifiers, void* slot, const char* what, u32 line) {
  if (self->home->existing != FULL || self->home->exited)
    fail(self, line, format("%s: not all 32 threads are there", what));
  meet(self, run, qualifiers, FULL, slot, what, line);
}

// --- 9.7.9.6 shfl.sync, 9.7.13.9 to 9.7.13.12 vote, match, redux, 9.7.13.14 elect.sync -----------------------------
struct Contribution {
  u64 a;
  u32 b, c, result;
  bool flag;
};
static inline Contribution& given(const Meeting& m, u32 lane) { return *(Contribution*)m.slots[lane]; }

static void shuffle(const Meeting& m, u32 lane) {
  Contribution& s = given(m, lane);
  const u32 by = s.b & 31, segment = s.c >> 8 & 31, clamp = s.c & 31;
  const u32 least = lane & segment, most = least | (clamp & ~segment);
  const Collective mode = Collective(m.qualifiers);
  const s32 from = mode == UP     ? s32(lane) - s32(by)
                   : mode == DOWN ? s32(lane + by)
                   : mode == BFLY ? s32(lane ^ by)
                                  : s32(least | (by & ~segment));
  s.flag = mode == UP ? from >= s32(most) : from <= s32(most);
  const u32 source = s.flag ? u32(from) : lane;
  s.result = m.arrived >> source & 1 ? u32(given(m, source).a) : ~0u;  // an inactive thread has no value
}

static u32 reduce(Collective op, u32 x, u32 y) {
  switch (op) {
    case REDUX_ADD:
      return x + y;
    case REDUX_MIN:
      return smaller(x, y);
    case REDUX_MAX:
      return larger(x, y);
    case REDUX_SMIN:
      return u32(smaller(s32(x), s32(y)));
    case REDUX_SMAX:
      return u32(larger(s32(x), s32(y)));
    case REDUX_AND:
      return x & y;
    case REDUX_OR:
      return x | y;
    default:
      return x ^ y;
  }
}

// elect.sync elects the lowest thread. The PTX ISA leaves it open which one it is, but Triton's code relies on it.
static void run_collective(Warp&, Meeting& m) {
  const Collective kind = Collective(m.qualifiers);
  const u32 first = u32(__builtin_ctz(m.arrived));
  u32 ballot = 0, total = u32(given(m, first).a);
  each_lane(m, [&](u32 lane) {
    ballot |= u32(given(m, lane).a != 0) << lane;
    if (lane != first) total = reduce(kind, total, u32(given(m, lane).a));
  });
  each_lane(m, [&](u32 lane) {
    Contribution& s = given(m, lane);
    u32 alike = 0;
    each_lane(m, [&](u32 other) { alike |= u32(given(m, other).a == s.a) << other; });
    switch (kind) {
      case UP:
      case DOWN:
      case BFLY:
      case IDX:
        shuffle(m, lane);
        break;
      case VOTE_ALL:
        s.result = ballot == m.arrived;
        break;
      case VOTE_ANY:
        s.result = ballot != 0;
        break;
      case VOTE_UNI:
        s.result = ballot == m.arrived || ballot == 0;
        break;
      case VOTE_BALLOT:
        s.result = ballot;
        break;
      case MATCH_ANY:
        s.result = alike;
        break;
      case MATCH_ALL:
        s.flag = alike == m.arrived, s.result = s.flag ? m.arrived : 0;
        break;
      case ELECT:
        s.flag = lane == first, s.result = first;
        break;
      default:
        s.result = total;
    }
  });
}

u32 collect(Thread* t, Collective kind, u64 a, u32 b, u32 c, u32 mask, bool* flag, u32 line) {
  Contribution s = {a, b, c, 0, false};
  const char* what = kind <= IDX     ? "shfl.sync"
                     : kind == ELECT ? "elect.sync"
                     : kind > ELECT  ? "redux.sync"
                                     : "vote.sync";
  meet(lane_of(t), run_collective, kind, mask, &s, what, line);
  *flag = s.flag;
  return s.result;
}

// --- 9.7.13.2 bar.warp.sync: the one collective that orders memory -------------------------------------------------
static void run_warp_barrier(Warp& w, Meeting& m) {
  Clock all;
  each_lane(m, [&](u32 lane) { release(w.lanes + lane, all); });
  each_lane(m, [&](u32 lane) { acquire(w.lanes + lane, all); });
}
void warp_barrier(Thread* t, u32 mask, u32 line) {
  meet(burn(t), run_warp_barrier, 0, mask, nullptr, "bar.warp.sync", line);
}

// --- 9.7.14.5.15 ldmatrix, 9.7.14.5.16 stmatrix, 9.7.14.5.17 movmatrix ---------------------------------------------
// Eight threads name the rows of a matrix of 8 x 8 elements of 16 bits; thread l holds elements 2 (l % 4) and
// 2 (l % 4) + 1 of row l / 4, transposed: of column l / 4.
struct MatrixSlot {
  Place row;  // of the threads that name one
  u32* registers;
};

static void run_matrix(Warp& w, Meeting& m) {
  const u32 count = m.qualifiers & 7, rows_named = 8 * count;
  const bool transposed = m.qualifiers & 8, store = m.qualifiers & 16;
  auto slot = [&](u32 lane) -> MatrixSlot& { return *(MatrixSlot*)m.slots[lane]; };
  u32 addresses[32];
  u16 rows[32][8];
  for (u32 lane = 0; lane < rows_named; lane++) {
    addresses[lane] = slot(lane).row.offset;
    if (!store) memcpy(rows[lane], slot(lane).row.data, 16);
  }
  for (u32 i = 0; i < 64 * count; i++) {  // matrix i / 64, thread i / 2 % 32, half i % 2
    const u32 lane = i / 2 % 32, row = lane / 4, column = lane % 4 * 2 + i % 2, first = i / 64 * 8;
    u16* element = transposed ? &rows[first + column][row] : &rows[first + row][column];
    u16* half = (u16*)&slot(lane).registers[i / 64] + i % 2;
    store ? * element = *half : * half = *element;
  }
  for (u32 lane = 0; lane < rows_named; lane++) {
    const Place& p = slot(lane).row;
    if (lane % 8 == 0) count_wavefronts(*w.machine, addresses, 0xFFu << lane, 16, m.line);
    touch(w.lanes + lane, *p.cta, p.offset, 16, store, m.line, store ? rows[lane] : nullptr);
    if (store) memcpy(p.data, rows[lane], 16);
  }
}

static inline void matrix_rows(Thread* t, u32 address, u32 qualifiers, u32* registers, const char* what, u32 line) {
  Lane* self = burn(t);
  MatrixSlot s = {{nullptr, 0, nullptr}, registers};
  if (self->lane < 8 * (qualifiers & 7)) s.row = place(self, address, 16, 16, line);
  meet_all(self, run_matrix, qualifiers, &s, what, line);
}
void ldmatrix(Thread* t, u32 address, int count, bool transposed, u32* d, u32 line) {
  matrix_rows(t, address, u32(count) | (transposed ? 8 : 0), d, "ldmatrix", line);
}
void stmatrix(Thread* t, u32 address, int count, bool transposed, const u32* a, u32 line) {
  matrix_rows(t, address, u32(count) | (transposed ? 24 : 16), const_cast<u32*>(a), "stmatrix", line);
}

static void run_movmatrix(Warp&, Meeting& m) {
  u32 old[32];
  each_lane(m, [&](u32 lane) { old[lane] = *(u32*)m.slots[lane]; });
  each_lane(m, [&](u32 lane) {
    const u32 row = lane / 4, column = lane % 4 * 2, shift = row % 2 * 16;
    *(u32*)m.slots[lane] = join32(old[column * 4 + row / 2] >> shift, old[column * 4 + 4 + row / 2] >> shift);
  });
}
u32 movmatrix(Thread* t, u32 a, u32 line) {
  meet_all(lane_of(t), run_movmatrix, 0, &a, "movmatrix", line);
  return a;
}

// --- 9.7.13.1 bar, barrier -----------------------------------------------------------------------------------------
static inline void open_if_complete(Cta& cta, NamedBarrier& b, Lane* self) {
  if (b.arrived < (b.expected ? b.expected : cta.live)) return;
  self->machine->progress++;
  for (auto& w : b.waiting) {
    acquire(w.first, b.clock);
    *w.second = b.votes == b.arrived ? 1 | 2 | b.votes << 2 : b.votes ? 2 | b.votes << 2 : 0;
    if (w.first != self) self->machine->wake(w.first);
  }
  b = NamedBarrier();
}

u32 barrier(Thread* t, u32 id, u32 count, bool wait, Reduction reduction, bool predicate, u32 line) {
  Lane* self = burn(t);
  if (id > 15) fail(self, line, format("barrier %u: there are 16", id));
  if (count % 32) fail(self, line, format("barrier %u: %u threads are no multiple of a warp", id, count));
  NamedBarrier& b = self->cta->barriers[id];
  if (b.arrived && b.expected != count)
    fail(self, line, format("barrier %u: %u threads are expected, those before expected %u", id, count, b.expected));
  u32 votes = 0;
  b.expected = count, b.arrived++, b.votes += predicate;
  release(self, b.clock);
  if (wait) b.waiting.push_back({self, &votes});
  if (wait && b.arrived < (count ? count : self->cta->live))
    block(self, {Wait::BARRIER, "barrier", id, 0, line});
  else
    open_if_complete(*self->cta, b, self);
  return reduction == AND ? votes & 1 : reduction == OR ? votes >> 1 & 1 : votes >> 2;
}

// --- 9.7.13.3 barrier.cluster --------------------------------------------------------------------------------------
static inline void open_cluster_if_complete(Machine& m) {
  if (!m.cluster_arrived || m.cluster_arrived < m.live) return;
  m.cluster_arrived = 0, m.cluster_phase++, m.progress++;
  for (Lane& l : m.lanes)
    if (l.wait.kind == Wait::CLUSTER) m.wake(&l);
}
void cluster_arrive(Thread* t, bool releases, u32) {
  Lane* self = burn(t);
  Machine& m = *self->machine;
  if (releases) release(self, m.cluster_clock);
  self->cluster_phase = m.cluster_phase, m.cluster_arrived++;
  open_cluster_if_complete(m);
}
void cluster_wait(Thread* t, bool acquires, u32 line) {
  Lane* self = lane_of(t);
  Machine& m = *self->machine;
  if (m.cluster_phase == self->cluster_phase) block(self, {Wait::CLUSTER, "barrier.cluster", 0, 0, line});
  if (acquires) acquire(self, m.cluster_clock);
}

}  // namespace ptx
