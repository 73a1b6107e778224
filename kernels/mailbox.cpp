// The thread of a mailbox: how it waits, and that the device is told when it ends.
#include "mailbox.h"

#include <pthread.h>
#include <sched.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "threads.h"

namespace kt {
namespace {

using Clock = std::chrono::steady_clock;

// Three ways to wait, one after the other: awake between two layers, in naps between two steps (a share of
// what has been waited already, so that no step comes much later), and asleep where nobody is served. An
// announcement ends the sleep; should a step come later than its announcement lets expect, it waits for one
// look.
constexpr auto kAwake = std::chrono::microseconds(500);
constexpr int kNapShare = 16;
constexpr auto kLongestNap = std::chrono::microseconds(200);
constexpr auto kNapping = std::chrono::seconds(2);
constexpr auto kLook = std::chrono::milliseconds(10);
constexpr unsigned long kTimerSlackNs = 1000;  // a nap of 30 us takes 80 otherwise
constexpr int kRoundsPerLook = 32;             // at the clock

}  // namespace

struct Mailbox::State {
  explicit State(int32_t* words) : words(words) {
    for (size_t word : {kRequest, kAnswer, kClosed}) at(word).store(0, std::memory_order_relaxed);
    try {
      thread = std::thread([this] { run(); });
    } catch (const std::system_error& error) {
      throw std::runtime_error(std::string("mailbox: the system could start no thread (") + error.what() +
                               ")");
    }
  }

  std::atomic_ref<int32_t> at(size_t word) const { return std::atomic_ref<int32_t>(words[word]); }

  void run() noexcept;
  void serve();
  bool is_requested() const { return at(kRequest).load(std::memory_order_acquire) != 0; }
  bool spin() const;
  void wait(Clock::time_point since);
  void sleep();
  HostCall& find(int32_t number);

  int32_t* const words;
  const pid_t owner = getpid();
  std::atomic<bool> stop{false};
  std::mutex mutex;  // of all below
  std::condition_variable changed;
  uint64_t announced = 0;
  std::vector<HostCall*> calls;
  std::thread thread;
};

// Whatever ends the thread, the device goes on.
void Mailbox::State::run() noexcept {
  struct Closing {
    State& state;
    ~Closing() { state.at(kClosed).store(1, std::memory_order_release); }
  } const closing{*this};
  pthread_setname_np(pthread_self(), "kt-mailbox");
  prctl(PR_SET_TIMERSLACK, kTimerSlackNs, 0, 0, 0);
  try {
    serve();
  } catch (const std::exception& error) {
    const std::lock_guard lock(mutex);
    for (HostCall* call : calls) call->fail(error.what());
  }
}

void Mailbox::State::serve() {
  auto since = Clock::now();
  uint64_t seen = 0;
  while (!stop.load(std::memory_order_acquire)) {
    const int32_t number = at(kRequest).load(std::memory_order_acquire);
    if (number == 0) {
      wait(since);
      const std::lock_guard lock(mutex);
      if (announced != seen) since = Clock::now();
      seen = announced;
      continue;
    }
    at(kRequest).store(0, std::memory_order_relaxed);
    HostCall::run(&find(number));
    at(kAnswer).store(number, std::memory_order_release);
    since = Clock::now();
  }
}

bool Mailbox::State::spin() const {
  for (int round = 0; round < kRoundsPerLook; ++round) {
    if (is_requested()) return true;
    pause_cpu();
  }
  return false;
}

// `since`: when there was last something to do.
void Mailbox::State::wait(Clock::time_point since) {
  if (spin()) return;
  const auto idle = Clock::now() - since;
  if (idle < kAwake) {
    sched_yield();  // as the pool's threads do: the core is wanted by all who are served meanwhile
  } else if (idle < kNapping) {
    std::this_thread::sleep_for(std::min<Clock::duration>(idle / kNapShare, kLongestNap));
  } else {
    sleep();
  }
}

void Mailbox::State::sleep() {
  std::unique_lock lock(mutex);
  const uint64_t before = announced;
  changed.wait_for(lock, kLook, [&] { return announced != before || stop.load(std::memory_order_relaxed); });
}

HostCall& Mailbox::State::find(int32_t number) {
  const std::lock_guard lock(mutex);
  if (number < 1 || static_cast<size_t>(number) > calls.size()) {
    throw std::out_of_range("mailbox: call " + std::to_string(number) + " was asked for, expected 1 to " +
                            std::to_string(calls.size()));
  }
  return *calls[static_cast<size_t>(number) - 1];
}

Mailbox::Mailbox(int32_t* words) : state_(std::make_unique<State>(words)) {}

Mailbox::~Mailbox() {
  if (state_->owner != getpid()) {  // after a fork the thread is the parent's
    static_cast<void>(state_.release());
    return;
  }
  state_->stop.store(true, std::memory_order_release);
  announce();
  state_->thread.join();
}

int32_t Mailbox::add(HostCall& call) {
  const std::lock_guard lock(state_->mutex);
  state_->calls.push_back(&call);
  return static_cast<int32_t>(state_->calls.size());
}

void Mailbox::announce() {
  const std::lock_guard lock(state_->mutex);
  ++state_->announced;
  state_->changed.notify_one();
}

}  // namespace kt
