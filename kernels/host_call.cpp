// Runs a forward on buffers that stay where they are; counts it, and turns an exception into NaN and a
// record.
#include "host_call.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <limits>
#include <stdexcept>

namespace kt {
namespace {

constexpr uint16_t kNanBf16 = 0x7FC0;

// The clock that profilers of GPUs write their times by.
int64_t now_ns() {
  return std::chrono::nanoseconds(std::chrono::system_clock::now().time_since_epoch()).count();
}

}  // namespace

void HostRecord::count(const HostInterval& interval, int64_t adapter_tokens, int64_t experts_read) {
  const std::lock_guard lock(mutex_);
  ring_[static_cast<size_t>(calls_) % kRecent] = interval;
  ++calls_;
  tokens_ += interval.tokens;
  adapter_tokens_ += adapter_tokens;
  experts_read_ += experts_read;
  busy_ns_ += interval.end_ns - interval.start_ns;
}

std::vector<HostInterval> HostRecord::recent() const {
  const std::lock_guard lock(mutex_);
  const size_t calls = static_cast<size_t>(calls_);
  std::vector<HostInterval> found;
  for (size_t call = calls - std::min(calls, kRecent); call < calls; ++call) {
    found.push_back(ring_[call % kRecent]);
  }
  return found;
}

void HostRecord::count_experts(size_t experts) {
  const std::lock_guard lock(mutex_);
  expert_counts_.assign(experts, 0);
}

std::vector<int64_t> HostRecord::expert_counts() const {
  const std::lock_guard lock(mutex_);
  return expert_counts_;
}

void HostRecord::count_choices(const IdView& ids, int64_t choices) {
  const std::lock_guard lock(mutex_);
  const int64_t experts = static_cast<int64_t>(expert_counts_.size());
  if (experts == 0) return;
  for (int64_t choice = 0; choice < choices; ++choice) {
    const int64_t id = ids[choice];
    if (id >= 0 && id < experts) ++expert_counts_[static_cast<size_t>(id)];
  }
}

void HostRecord::fail(const char* what) noexcept {
  try {
    const std::lock_guard lock(mutex_);
    if (failure_.empty()) failure_ = *what == '\0' ? "unknown" : what;
  } catch (const std::exception&) {
    // No memory for the words: the rows of NaN have to tell.
  }
}

std::string HostRecord::failure() const {
  const std::lock_guard lock(mutex_);
  return failure_;
}

void HostCall::run(void* call) noexcept {
  HostCall& self = *static_cast<HostCall*>(call);
  try {
    self.forward(self.real_rows());
    return;
  } catch (const std::exception& failure) {
    self.record_.fail(failure.what());
  } catch (...) {
    self.record_.fail("unknown");
  }
  self.fill(0, self.args_.tokens, true);
}

void HostCall::forward(int64_t tokens) {
  ForwardArgs args = args_;
  args.tokens = tokens;
  const int64_t start_ns = now_ns();
  if (!numbers_.empty()) args.topk_ids = renumbered(tokens);
  const int64_t experts_read = moe_.forward(args);
  fill(tokens, args_.tokens, false);
  record_.count_choices(args_.topk_ids, tokens * args_.top_k);
  record_.count({start_ns, now_ns(), tokens}, adapter_tokens(tokens), experts_read);
}

IdView HostCall::renumbered(int64_t tokens) {
  const int64_t experts = static_cast<int64_t>(numbers_.size());
  ids_.resize(static_cast<size_t>(tokens * args_.top_k));
  for (size_t at = 0; at < ids_.size(); ++at) {
    const int64_t id = args_.topk_ids[static_cast<int64_t>(at)];
    if (id >= experts) {
      throw std::invalid_argument("topk_ids: expected less than " + std::to_string(experts) + ", got " +
                                  std::to_string(id));
    }
    ids_[at] = id < 0 ? -1 : numbers_[static_cast<size_t>(id)];
  }
  return {ids_.data(), false};
}

int64_t HostCall::real_rows() const {
  if (rows_ == nullptr) return args_.tokens;
  return std::clamp<int64_t>(*rows_, 0, args_.tokens);
}

int64_t HostCall::adapter_tokens(int64_t tokens) const {
  if (args_.adapter_slots.data == nullptr) return 0;
  int64_t count = 0;
  for (int64_t token = 0; token < tokens; ++token) count += args_.adapter_slots[token] >= 0 ? 1 : 0;
  return count;
}

void HostCall::fill(int64_t first, int64_t last, bool not_a_number) const {
  const int64_t hidden = moe_.hidden_size();
  for (int64_t row = first; row < last; ++row) {
    const int64_t start = row * args_.out_stride;
    if (args_.out_is_f32) {
      const float value = not_a_number ? std::numeric_limits<float>::quiet_NaN() : 0.0F;
      std::fill_n(static_cast<float*>(args_.out) + start, hidden, value);
    } else {
      std::fill_n(static_cast<uint16_t*>(args_.out) + start, hidden, not_a_number ? kNanBf16 : uint16_t{0});
    }
  }
}

}  // namespace kt
