// The worker threads that all layers share: lazy start, one group a NUMA node, short spin then sleep, safe
// after fork. Knows nothing of what they compute.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <type_traits>
#include <utility>

#include "memory.h"

namespace kt {

constexpr std::size_t kCacheLine = 64;  // bytes that cores hand to each other at once

// What a loop does that waits for another core.
inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Waits for a condition that another thread is about to make true: pauses, then yields, so that a preempted
// peer can run.
class Backoff {
 public:
  void wait();

 private:
  int rounds_ = 0;
};

// One for the whole process, for moments only: no fork can copy it while it is locked, so a child never waits
// for a thread that it does not have.
std::mutex& fork_safe_mutex();

// A reference to a callable, for the length of one call.
class WorkerFunction {
 public:
  template <typename F>
  explicit WorkerFunction(const F& function)
      : object_(&function),
        call_([](const void* object, int worker) { (*static_cast<const F*>(object))(worker); }) {}
  void operator()(int worker) const { call_(object_, worker); }

 private:
  const void* object_;
  void (*call_)(const void*, int);
};

class ThreadPool {
 public:
  ThreadPool(int threads, int nodes);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return threads_; }
  int nodes() const { return nodes_; }
  int node_of(int worker) const { return static_cast<int>(static_cast<int64_t>(worker) * nodes_ / threads_); }
  // How long a thread waits for its next job before it sleeps, beyond the moment that it always does: as long
  // as whatever lies between two layers takes, when the cores have nothing better to do.
  void stay_awake(int64_t microseconds);
  // The NUMA node whose memory a group should use, or -1 where the machine has one only.
  int memory_node(int node) const;
  // What is allocated for a request of scratch: a quarter more, so that a slightly larger batch needs no new
  // memory.
  static constexpr size_t scratch_capacity(size_t bytes) { return bytes + bytes / 4; }

  // One user at a time; holds the pool's scratch memory as well.
  class Session {
   public:
    explicit Session(ThreadPool& pool);
    ~Session();
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
    // Calls function(worker), worker 0 on the calling thread, others where a thread is free to join before
    // the caller is through. So function must be a loop over shared work, not a share of its own. Returns
    // when all that joined have left.
    template <typename F>
    void run(const F& function) {
      run_function(WorkerFunction(function));
    }
    // At least `bytes` of memory, kept for the next session; earlier contents are lost when it grows.
    uint8_t* scratch(size_t bytes);

   private:
    void run_function(WorkerFunction function);
    ThreadPool& pool_;
    void* state_;
  };

 private:
  struct State;
  State& state();

  const int threads_;
  const int nodes_;
  std::atomic<int64_t> awake_ns_{0};
  std::atomic<State*> state_{nullptr};
};

}  // namespace kt
