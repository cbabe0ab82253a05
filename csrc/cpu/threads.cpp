// Threads: PyTorch's (OpenMP), until they keep a call waiting; then for a while a pool that sleeps between calls.
//
// OpenMP's threads spin for milliseconds after a call, ready for the next, and a call waits until all of them have come.
// On a quiet machine nothing starts sooner, and threads of our own would share a core with those that spin. But where
// another process holds a core, a thread that has spun is put aside in its favour, in the middle of a call or before it
// has begun, and the call waits for that process's whole turn (4 to 16 ms). A thread that slept is let in at once, and a
// call of the pool waits for none that has not begun: its caller takes the tasks itself.
#include "threads.h"

#include <omp.h>
#include <pthread.h>
#include <signal.h>
#if defined(__linux__)
  #include <sched.h>
  #include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace fused_attention {

void* allocate(size_t bytes) { return ::operator new(std::max<size_t>(bytes, 1), std::align_val_t(64), std::nothrow); }
void release(void* memory) { ::operator delete(memory, std::align_val_t(64), std::nothrow); }

void prefer_large_pages(void* memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory), end = (begin + bytes) / kPage * kPage;
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  // Advice: where it is not taken, nothing is lost.
  if (end > first) (void)madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

namespace {

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// -1 where the system does not say.
int current_core() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// A thread is woken on the core of whoever wakes it where no other is free: to share that one core, while another is
// shared with a stranger, would be to halve our part. So the thread goes where else it may.
void leave_core(int core) {
#if defined(__linux__)
  cpu_set_t allowed;
  if (core < 0 || sched_getcpu() != core || sched_getaffinity(0, sizeof allowed, &allowed)) return;
  cpu_set_t others = allowed;
  CPU_CLR(static_cast<size_t>(core), &others);
  if (CPU_COUNT(&others) && !sched_setaffinity(0, sizeof others, &others))
    (void)sched_setaffinity(0, sizeof allowed, &allowed);
#else
  (void)core;
#endif
}

// The tasks of one call, on the stack of its caller.
struct Job {
  Task run;
  const void* plan;
  int64_t tasks;
  char* scratch;
  size_t each;  // bytes of scratch of a thread
  std::atomic<int64_t> next{0};
  int seats = 0;               // threads that may still join; by the pool's lock, as is `inside`
  std::atomic<int> inside{0};  // threads that joined and have not left
  std::condition_variable left;
  int core = -1;  // of the caller, when it began

  Job(Task task, const void* its_plan, int64_t count, char* memory, size_t bytes)
      : run(task), plan(its_plan), tasks(count), scratch(memory), each(bytes) {}
  int64_t work(int seat) {
    char* own = scratch + each * static_cast<size_t>(seat);
    int64_t done = 0;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks; ++done) run(plan, i, own);
    return done;
  }
};

class Pool {
 public:
  void run(Job& job, int helpers) {
    std::unique_lock<std::mutex> hold(lock_);
    grow(helpers);
    job.seats = helpers;
    job.core = current_core();
    open_.push_back(&job);
    const bool all = helpers >= threads_;
    hold.unlock();
    if (all) work_.notify_all();
    for (int i = 0; !all && i < helpers; ++i) work_.notify_one();
    job.work(0);
    hold.lock();
    open_.erase(std::find(open_.begin(), open_.end(), &job));
    if (!job.inside) return;
    hold.unlock();
    for (int i = 0; job.inside && i < kSpins; ++i) pause();
    hold.lock();  // the last to leave has let go of the lock then, and of the job
    job.left.wait(hold, [&job] { return job.inside == 0; });
  }

 private:
  static constexpr int kSpins = 1000;  // some 20 us: a thread's last task is often as near its end as the caller's

  void grow(int threads) {
    sigset_t all, before;  // signals are for the threads of the program
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (; threads_ < threads; ++threads_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {  // no more of them: the caller takes what they would have
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  Job* find_open() {
    for (Job* job : open_)
      if (job->seats && job->next.load(std::memory_order_relaxed) < job->tasks) return job;
    return nullptr;
  }

  [[noreturn]] void serve() {
    std::unique_lock<std::mutex> hold(lock_);
    for (;;) {
      Job* job = find_open();
      if (!job) {
        work_.wait(hold);
        continue;
      }
      const int seat = job->seats--;
      ++job->inside;
      hold.unlock();
      leave_core(job->core);
      job->work(seat);
      hold.lock();
      if (--job->inside == 0) job->left.notify_one();
    }
  }

  std::mutex lock_;
  std::condition_variable work_;
  std::vector<Job*> open_;
  int threads_ = 0;
};

// Never destroyed: its threads are there until the process ends. A forked child has none of them and makes its own.
std::atomic<Pool*> shared{nullptr};
std::atomic<bool> forked{false};

Pool& pool() {
  Pool* found = shared.load();
  if (!found) {
    Pool* made = new Pool;
    if (shared.compare_exchange_strong(found, made)) return *made;
    delete made;
  }
  return *found;
}

// Threads take the cores of whoever makes them. Where OpenMP's are bound to cores each (OMP_PROC_BIND, OMP_PLACES), that
// is a single one, and OpenMP's are used.
bool bound_to_cores() { return omp_get_proc_bind() != omp_proc_bind_false; }

using Clock = std::chrono::steady_clock;
using Ticks = Clock::rep;
constexpr Clock::duration kLongWait = std::chrono::microseconds(500);
constexpr Ticks kLeast = Clock::duration(std::chrono::seconds(1)).count(), kMost = 4 * kLeast;

Ticks now() { return Clock::now().time_since_epoch().count(); }

std::atomic<Ticks> pool_until{0}, pool_time{kLeast};

// A call waited: the pool's turn, twice as long as the last one if OpenMP did not do well for as long as that.
void prefer_pool(Ticks at) {
  const Ticks last = pool_time;
  pool_time = at - pool_until > last ? kLeast : std::min(2 * last, kMost);
  pool_until = at + pool_time;
}

// By OpenMP's threads. Who waits for longer than two tasks, of the length of its own, waits for a thread put aside.
void run_by_openmp(Job& job, int team) {
  const Ticks start = now();
  Ticks found_none = start;
  int64_t done = 0;
#pragma omp parallel num_threads(team)
  {
    const int seat = omp_get_thread_num();
    const int64_t mine = job.work(seat);
    if (seat == 0) done = mine, found_none = now();
  }
  const Ticks end = now(), task = (found_none - start) / std::max<int64_t>(done, 1);
  if (end - found_none > 2 * task + kLongWait.count()) prefer_pool(end);
}

}  // namespace

void watch_forks() {
  static const int installed = pthread_atfork(nullptr, nullptr, [] { shared = nullptr, forked = true; });
  (void)installed;
}

bool run_tasks(int64_t tasks, int threads, double work, size_t scratch_bytes, Task run, const void* plan) {
  if (tasks <= 0) return true;
  // Waking a thread takes some 5 us, as long as half a million multiply-adds.
  constexpr double kWorthAThread = 5e5;
  const bool bound = bound_to_cores(), lost = forked;  // a child has no OpenMP threads
  const bool serial = threads <= 1 || tasks == 1 || work < kWorthAThread || omp_in_parallel() || (bound && lost);
  const int team = serial ? 1 : static_cast<int>(std::min<int64_t>(threads, tasks));
  const size_t each = (scratch_bytes + 4095) / 4096 * 4096;  // no page of scratch is shared
  char* scratch = static_cast<char*>(allocate(each * static_cast<size_t>(team)));
  if (!scratch) return false;
  Job job(run, plan, tasks, scratch, each);
  if (team == 1)
    job.work(0);
  else if (!bound && (lost || now() < pool_until))
    pool().run(job, team - 1);
  else
    run_by_openmp(job, team);
  release(scratch);
  return true;
}

}  // namespace fused_attention
