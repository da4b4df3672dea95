#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

#ifdef __linux__
#include <sched.h>
#endif
#ifndef _WIN32
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#else
#include <cfenv>
#endif

namespace jaxopt {
namespace {

// A worker stays awake so long after its last job: the products of a decode step follow each other faster than that,
// and waking a thread costs more than such a product.
constexpr auto kAwake = std::chrono::microseconds(100);
constexpr int kSlots = 32;  // jobs at once; a caller that finds no slot works alone
constexpr int kSpinsBetweenClockReads = 16;

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// How a thread rounds and whether it flushes subnormal numbers: XLA sets that for its own threads. A worker computes
// as its caller does, else results would depend on who took a chunk.
class FloatMode {
 public:
  FloatMode() {
#if defined(__x86_64__)
    mode_ = _mm_getcsr();
#else
    std::fegetenv(&mode_);
#endif
  }
  void apply() const {
#if defined(__x86_64__)
    _mm_setcsr(mode_);
#else
    std::fesetenv(&mode_);
#endif
  }

 private:
#if defined(__x86_64__)
  unsigned mode_;
#else
  std::fenv_t mode_;
#endif
};

struct Job {
  void (*run)(const void*, size_t);
  const void* context;
  size_t count;
  FloatMode mode;
  std::atomic<size_t> next{0};

  void work() {
    for (size_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < count;) run(context, chunk);
  }
};

// Where a job is found. Jobs live on their callers' stacks; slots live for ever, so a worker first counts itself as a
// visitor of the slot and only then reads which job is there. A caller that has taken its job away waits until no
// visitor is left.
struct alignas(64) Slot {
  std::atomic<bool> taken{false};
  std::atomic<Job*> job{nullptr};
  std::atomic<int> visitors{0};

  void visit() {
    if (job.load(std::memory_order_relaxed) == nullptr) return;
    visitors.fetch_add(1);
    if (Job* found = job.load()) {
      found->mode.apply();
      found->work();
    }
    visitors.fetch_sub(1, std::memory_order_release);
  }

  void withdraw() {
    job.store(nullptr);
    for (int spins = 0; visitors.load() != 0; ++spins) {
      // Its last visitor may have lost the processor.
      if (spins < 10000) relax();
      else std::this_thread::yield();
    }
    taken.store(false, std::memory_order_release);
  }
};

class Pool {
 public:
  void run(Job& job, int threads) {
    start_workers(threads - 1);
    Slot* slot = workers_.load(std::memory_order_relaxed) > 0 ? take_slot() : nullptr;
    if (slot == nullptr) return job.work();
    slot->job.store(&job);
    announced_.fetch_add(1);
    if (sleepers_.load() > 0) wake();
    job.work();
    slot->withdraw();
  }

 private:
  void start_workers(int wanted) {
    limit_.store(wanted, std::memory_order_relaxed);
    if (workers_.load(std::memory_order_relaxed) >= wanted) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    for (int index = workers_.load(); index < wanted; ++index) {
      try {
        std::thread([this, index] { serve(index); }).detach();
      } catch (const std::system_error&) {
        return;  // no more threads to be had: those there are do the work
      }
      workers_.store(index + 1);
    }
  }

  Slot* take_slot() {
    for (Slot& slot : slots_) {
      if (!slot.taken.load(std::memory_order_relaxed) && !slot.taken.exchange(true, std::memory_order_acquire)) {
        return &slot;
      }
    }
    return nullptr;
  }

  void wake() {
    { const std::lock_guard<std::mutex> lock(mutex_); }  // a worker between its last look and its sleep
    wake_.notify_all();
  }

  // What a worker does all its life. It begins its search at another slot than its neighbours.
  void serve(int index) {
    for (;;) {
      const uint64_t seen = announced_.load();
      if (index < limit_.load(std::memory_order_relaxed)) {
        for (int i = 0; i < kSlots; ++i) slots_[(index + i) % kSlots].visit();
      }
      if (!spin(seen)) sleep(seen);
    }
  }

  // Whether a job was announced after `seen` while the worker was awake.
  bool spin(uint64_t seen) {
    const auto end = std::chrono::steady_clock::now() + kAwake;
    do {
      for (int i = 0; i < kSpinsBetweenClockReads; ++i) {
        if (announced_.load(std::memory_order_relaxed) != seen) return true;
        relax();
      }
    } while (std::chrono::steady_clock::now() < end);
    return false;
  }

  void sleep(uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, [&] { return announced_.load() != seen; });
    sleepers_.fetch_sub(1);
  }

  Slot slots_[kSlots];
  alignas(64) std::atomic<uint64_t> announced_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<int> workers_{0};
  std::atomic<int> limit_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

int available_cores() {
#ifdef __linux__
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return CPU_COUNT(&allowed);
#endif
  const unsigned cores = std::thread::hardware_concurrency();
  return cores > 0 ? static_cast<int>(cores) : 1;
}

std::atomic<int> thread_count{0};
std::atomic<Pool*> shared_pool{nullptr};

// Never freed: workers outlive everything. The child of a fork has none of its parent's threads, and makes its own.
Pool& pool() {
  Pool* current = shared_pool.load(std::memory_order_acquire);
  if (current != nullptr) return *current;
  static std::once_flag once;
  std::call_once(once, [] {
#ifndef _WIN32
    pthread_atfork(nullptr, nullptr, [] { shared_pool.store(nullptr); });
#endif
  });
  Pool* fresh = new Pool;
  if (shared_pool.compare_exchange_strong(current, fresh)) return *fresh;
  delete fresh;  // another thread was faster
  return *current;
}

}  // namespace

int num_threads() {
  int count = thread_count.load(std::memory_order_relaxed);
  if (count == 0) {
    count = available_cores();
    thread_count.store(count, std::memory_order_relaxed);
  }
  return count;
}

void set_num_threads(int count) { thread_count.store(count, std::memory_order_relaxed); }

void parallel(size_t count, void (*run)(const void*, size_t), const void* context) {
  Job job{run, context, count, FloatMode(), {}};
  const int threads = num_threads();
  if (threads == 1 || count <= 1) return job.work();
  pool().run(job, threads);
}

}  // namespace jaxopt
