// Thread start, wake-up, sleep and placement. What they run is given by the caller.
#include "threads.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

namespace kt {
namespace {

// About 20 us on a current core: layers that follow each other directly find their threads awake, and a
// thread with nothing to do is soon off the core.
constexpr int kSpinRounds = 400;
constexpr int kRoundsPerLook = 32;  // at the clock, where threads are to stay awake for longer
// How many sleepers a thread wakes, each of which wakes as many: the caller is soon at work itself.
constexpr int kWakes = 2;

void futex_wait(std::atomic<uint32_t>& word, uint32_t expected) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>& word, int threads) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, threads, nullptr, nullptr, 0);
}

// "0-3,8,10-11" as Linux writes CPU lists.
std::vector<int> read_cpu_list(const std::string& path) {
  std::vector<int> cpus;
  std::ifstream file(path);
  std::string range;
  while (std::getline(file, range, ',')) {
    int first = 0;
    int last = 0;
    const int fields = std::sscanf(range.c_str(), "%d-%d", &first, &last);
    if (fields < 1) continue;
    for (int cpu = first; cpu <= (fields == 2 ? last : first); ++cpu) cpus.push_back(cpu);
  }
  return cpus;
}

struct NodeCpus {
  int node;
  cpu_set_t cpus;
};

// The NUMA nodes on which this process may run, each with its allowed CPUs.
std::vector<NodeCpus> read_nodes() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  std::vector<NodeCpus> nodes;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return nodes;
  for (int node : read_cpu_list("/sys/devices/system/node/online")) {
    NodeCpus here{.node = node, .cpus = {}};
    CPU_ZERO(&here.cpus);
    for (int cpu : read_cpu_list("/sys/devices/system/node/node" + std::to_string(node) + "/cpulist")) {
      if (cpu < CPU_SETSIZE && CPU_ISSET(cpu, &allowed)) CPU_SET(cpu, &here.cpus);
    }
    if (CPU_COUNT(&here.cpus) > 0) nodes.push_back(here);
  }
  return nodes;
}

}  // namespace

void Backoff::wait() {
  if (++rounds_ < 1000) {
    pause_cpu();
  } else {
    sched_yield();
  }
}

std::mutex& fork_safe_mutex() {
  static std::mutex mutex;
  static const int registered =
      pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); }, [] { mutex.unlock(); });
  static_cast<void>(registered);  // it fails for want of memory only, and then forks are as they were
  return mutex;
}

// Everything that a fork leaves unusable: a child process abandons its parent's and starts its own.
struct ThreadPool::State {
  // Bit 31: a job is open to join. Low bits: how many workers are in it.
  static constexpr uint32_t kOpen = 1u << 31;

  explicit State(const std::atomic<int64_t>& awake_ns) : awake_ns(awake_ns) {}

  const std::atomic<int64_t>& awake_ns;
  const pid_t owner = getpid();
  std::mutex session;
  const WorkerFunction* function = nullptr;
  Memory scratch;
  std::vector<std::thread> workers;
  std::atomic<bool> stop{false};
  // What idle threads look at, apart from what busy ones write.
  alignas(kCacheLine) std::atomic<uint32_t> epoch{0};
  alignas(kCacheLine) std::atomic<uint32_t> sleepers{0};
  alignas(kCacheLine) std::atomic<uint32_t> job{0};

  bool join_job();
  void leave_job() { job.fetch_sub(1, std::memory_order_release); }
  void work(int worker);
  bool spin(uint32_t seen, int rounds) const;
  bool stay_awake(uint32_t seen) const;
  uint32_t wait_for_epoch(uint32_t seen);
  void start(const ThreadPool& pool);
  void finish();
};

// One step even where all threads come at once; who finds the job closed takes back what it counted.
bool ThreadPool::State::join_job() {
  if ((job.fetch_add(1, std::memory_order_acquire) & kOpen) != 0) return true;
  leave_job();
  return false;
}

// Whether the epoch has moved on meanwhile.
bool ThreadPool::State::spin(uint32_t seen, int rounds) const {
  for (int round = 0; round < rounds; ++round) {
    if (epoch.load(std::memory_order_acquire) != seen) return true;
    pause_cpu();
  }
  return false;
}

bool ThreadPool::State::stay_awake(uint32_t seen) const {
  const std::chrono::nanoseconds limit(awake_ns.load(std::memory_order_relaxed));
  if (limit.count() == 0) return false;
  const auto end = std::chrono::steady_clock::now() + limit;
  while (std::chrono::steady_clock::now() < end) {
    if (spin(seen, kRoundsPerLook)) return true;
    sched_yield();  // the core is wanted by whoever makes the next job, and by all who are served meanwhile
  }
  return false;
}

uint32_t ThreadPool::State::wait_for_epoch(uint32_t seen) {
  if (spin(seen, kSpinRounds) || stay_awake(seen)) return epoch.load(std::memory_order_acquire);
  sleepers.fetch_add(1, std::memory_order_seq_cst);
  while (epoch.load(std::memory_order_seq_cst) == seen) futex_wait(epoch, seen);
  if (sleepers.fetch_sub(1, std::memory_order_relaxed) > 1) futex_wake(epoch, kWakes);
  return epoch.load(std::memory_order_acquire);
}

void ThreadPool::State::work(int worker) {
  uint32_t seen = 0;
  while (true) {
    seen = wait_for_epoch(seen);
    if (stop.load(std::memory_order_acquire)) return;
    if (!join_job()) continue;
    (*function)(worker);
    leave_job();
  }
}

void ThreadPool::State::start(const ThreadPool& pool) {
  const std::vector<NodeCpus> nodes = pool.nodes_ > 1 ? read_nodes() : std::vector<NodeCpus>{};
  for (int worker = 1; worker < pool.threads_; ++worker) {
    try {
      workers.emplace_back([this, worker] { work(worker); });
    } catch (const std::system_error& error) {
      finish();  // all or none: the next forward must not silently run with fewer
      workers.clear();
      stop.store(false, std::memory_order_release);
      throw std::runtime_error("threads: the system could start only " + std::to_string(worker) + " of " +
                               std::to_string(pool.threads_) + " (" + error.what() +
                               "); ask for fewer, or raise the limit of processes");
    }
    if (nodes.size() < 2) continue;
    const NodeCpus& node = nodes[static_cast<size_t>(pool.node_of(worker)) % nodes.size()];
    pthread_setaffinity_np(workers.back().native_handle(), sizeof(node.cpus), &node.cpus);
  }
}

void ThreadPool::State::finish() {
  stop.store(true, std::memory_order_release);
  epoch.fetch_add(1, std::memory_order_seq_cst);
  futex_wake(epoch, INT32_MAX);
  for (std::thread& worker : workers) worker.join();
}

ThreadPool::ThreadPool(int threads, int nodes) : threads_(threads), nodes_(nodes) {
  constexpr int kMost = 4096;  // of either; a slip of the keyboard is not worth a million stacks
  const auto validate = [](const char* name, int value) {
    if (value >= 1 && value <= kMost) return;
    throw std::invalid_argument(std::string(name) + ": expected " +
                                (value < 1 ? "at least 1" : "at most " + std::to_string(kMost)) + ", got " +
                                std::to_string(value));
  };
  validate("threads", threads);
  validate("nodes", nodes);
}

ThreadPool::~ThreadPool() {
  State* state = state_.load();
  if (state == nullptr || state->owner != getpid()) return;  // after a fork the threads are the parent's
  state->finish();
  delete state;
}

void ThreadPool::stay_awake(int64_t microseconds) {
  constexpr int64_t kMost = 1000000;
  if (microseconds < 0 || microseconds > kMost) {
    throw std::invalid_argument("us: expected 0 to " + std::to_string(kMost) + ", got " +
                                std::to_string(microseconds));
  }
  awake_ns_.store(microseconds * 1000, std::memory_order_relaxed);
}

int ThreadPool::memory_node(int node) const {
  if (nodes_ < 2) return -1;
  static const std::vector<NodeCpus> nodes = read_nodes();
  return nodes.size() < 2 ? -1 : nodes[static_cast<size_t>(node) % nodes.size()].node;
}

ThreadPool::State& ThreadPool::state() {
  State* current = state_.load(std::memory_order_acquire);
  if (current != nullptr && current->owner == getpid()) return *current;
  auto fresh = std::make_unique<State>(awake_ns_);
  if (state_.compare_exchange_strong(current, fresh.get())) {
    return *fresh.release();
  }
  return *current;  // another thread was first
}

ThreadPool::Session::Session(ThreadPool& pool) : pool_(pool) {
  State& state = pool.state();
  std::unique_lock lock(state.session);
  if (state.workers.empty() && pool.threads_ > 1) state.start(pool);
  state_ = &state;
  lock.release();  // the destructor unlocks: this session is whole
}

ThreadPool::Session::~Session() { static_cast<State*>(state_)->session.unlock(); }

uint8_t* ThreadPool::Session::scratch(size_t bytes) {
  State& state = *static_cast<State*>(state_);
  if (state.scratch.bytes() < bytes) {
    state.scratch = Memory();  // the old one goes first: the two never add up
    state.scratch = Memory(scratch_capacity(bytes));
  }
  return state.scratch.data();
}

void ThreadPool::Session::run_function(WorkerFunction function) {
  State& state = *static_cast<State*>(state_);
  if (pool_.threads_ == 1) return function(0);
  state.function = &function;
  state.job.fetch_or(State::kOpen, std::memory_order_release);
  state.epoch.fetch_add(1, std::memory_order_seq_cst);
  if (state.sleepers.load(std::memory_order_seq_cst) > 0) futex_wake(state.epoch, kWakes);
  function(0);
  state.job.fetch_and(~State::kOpen, std::memory_order_acq_rel);
  Backoff backoff;
  while (state.job.load(std::memory_order_acquire) != 0) backoff.wait();
}

}  // namespace kt
