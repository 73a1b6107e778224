// Where a forward's time goes: nanoseconds of all threads and bytes of weights, a phase each. Costs one
// branch when off.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>

namespace kt {

enum class Phase : uint8_t { route, prepare, gate_up, lora, activate, quantize, down, combine, wait };
constexpr std::array<const char*, 9> kPhaseNames = {"route",    "prepare", "gate_up", "lora", "activate",
                                                    "quantize", "down",    "combine", "wait"};

class Profile {
 public:
  struct Count {
    std::atomic<int64_t> ns{0};
    std::atomic<int64_t> bytes{0};
  };
  void add(Phase phase, int64_t ns, int64_t bytes) {
    Count& count = counts_[static_cast<size_t>(phase)];
    count.ns.fetch_add(ns, std::memory_order_relaxed);
    count.bytes.fetch_add(bytes, std::memory_order_relaxed);
  }
  Count& operator[](size_t phase) { return counts_[phase]; }

 private:
  std::array<Count, kPhaseNames.size()> counts_;
};

// Adds its own lifetime to a phase; without a profile it does nothing.
class Span {
 public:
  Span(Profile* profile, Phase phase, int64_t bytes = 0) : profile_(profile), phase_(phase), bytes_(bytes) {
    if (profile_ != nullptr) start_ = Clock::now();
  }
  ~Span() {
    if (profile_ == nullptr) return;
    profile_->add(phase_, std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start_).count(),
                  bytes_);
  }
  Span(const Span&) = delete;
  Span& operator=(const Span&) = delete;

 private:
  using Clock = std::chrono::steady_clock;
  Profile* profile_;
  Phase phase_;
  int64_t bytes_;
  Clock::time_point start_;
};

}  // namespace kt
