// A forward that something without Python calls through a plain pointer: a CUDA host function, on a thread of
// the driver, again at each replay of a graph. Nothing here knows of CUDA, and nothing is thrown.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "moe.h"

namespace kt {

// When a call ran, in nanoseconds of the system's clock, and how many rows it had.
struct HostInterval {
  int64_t start_ns = 0;
  int64_t end_ns = 0;
  int64_t tokens = 0;
};

// What the calls of one layer leave behind, for any thread to read.
class HostRecord {
 public:
  static constexpr size_t kRecent = 64;

  void count(const HostInterval& interval, int64_t adapter_tokens, int64_t experts_read);
  // The last kRecent calls, the oldest first.
  std::vector<HostInterval> recent() const;
  // From now on `expert_counts` has how often each of so many experts is chosen, by its number in the ids.
  void count_experts(size_t experts);
  std::vector<int64_t> expert_counts() const;
  void count_choices(const IdView& ids, int64_t choices);
  // Keeps the first.
  void fail(const char* what) noexcept;
  std::string failure() const;  // empty: none
  int64_t calls() const { return calls_; }
  int64_t tokens() const { return tokens_; }
  int64_t adapter_tokens() const { return adapter_tokens_; }
  // The experts that each call read, added up.
  int64_t experts_read() const { return experts_read_; }
  int64_t busy_ns() const { return busy_ns_; }

 private:
  std::atomic<int64_t> calls_{0};
  std::atomic<int64_t> tokens_{0};
  std::atomic<int64_t> adapter_tokens_{0};
  std::atomic<int64_t> experts_read_{0};
  std::atomic<int64_t> busy_ns_{0};
  mutable std::mutex mutex_;
  std::array<HostInterval, kRecent> ring_;
  std::vector<int64_t> expert_counts_;
  std::string failure_;
};

// All that it points to must outlive it, and it must outlive its calls.
class HostCall {
 public:
  // `rows`, read at each call: how many of the rows are real; null: all. Padding comes out as zeros.
  // `numbers`: the layer's number of each expert that ids name, -1 where it is none of its; empty: as they
  // are.
  HostCall(Moe& moe, const ForwardArgs& args, const int32_t* rows, std::vector<int32_t> numbers,
           HostRecord& record)
      : moe_(moe), args_(args), rows_(rows), numbers_(std::move(numbers)), record_(record) {}
  // `call` is a HostCall. A failure goes to the record, and every row of the result is NaN then.
  static void run(void* call) noexcept;
  // It will never run again.
  void fail(const char* what) noexcept { record_.fail(what); }

 private:
  void forward(int64_t tokens);
  IdView renumbered(int64_t tokens);
  int64_t real_rows() const;
  int64_t adapter_tokens(int64_t tokens) const;
  void fill(int64_t first, int64_t last, bool not_a_number) const;

  Moe& moe_;
  const ForwardArgs args_;
  const int32_t* const rows_;
  const std::vector<int32_t> numbers_;
  std::vector<int32_t> ids_;
  HostRecord& record_;
};

}  // namespace kt
