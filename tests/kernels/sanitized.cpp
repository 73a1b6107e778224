// The kernels under a sanitizer, without Python: layers of awkward shapes on every instruction set, adapters
// swapped while forwards run, two layers in one pool, a mailbox and its device. `make sanitize` builds it
// with -fsanitize=thread, then with address and undefined. Results are held against the reference, so that
// what is watched is what computes. --plant race|overflow|shift makes the mistake that the sanitizer must
// find.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "dispatch.h"
#include "host_call.h"
#include "mailbox.h"
#include "moe.h"
#include "pack.h"

namespace {

using Bf16s = std::vector<uint16_t>;

struct Shape {
  int64_t experts, hidden, intermediate, tokens, top_k;
};

Bf16s random_values(std::mt19937& random, int64_t count, float size) {
  std::normal_distribution<float> normal(0.0f, size);
  Bf16s values(static_cast<size_t>(count));
  for (uint16_t& value : values) value = kt::bf16_from_float(normal(random));
  return values;
}

// Exactly as large as they must be, so that a read behind an end is seen.
struct Problem {
  explicit Problem(const Shape& of, uint32_t seed) : shape(of), random(seed) {
    const int64_t matrix = of.experts * of.intermediate * of.hidden;
    const float size = 1.0f / std::sqrt(static_cast<float>(of.hidden));
    gate = random_values(random, matrix, size);
    up = random_values(random, matrix, size);
    down = random_values(random, matrix, size);
    x = random_values(random, of.tokens * of.hidden, 1.0f);
    for (int64_t token = 0; token < of.tokens; ++token) {
      for (int64_t k = 0; k < of.top_k; ++k) {
        ids.push_back(static_cast<int32_t>((token * 3 + k) % of.experts));
        shares.push_back(0.25f + 0.5f * static_cast<float>(k));
      }
      slots.push_back(static_cast<int32_t>(token % 3) - 1);
    }
  }

  std::shared_ptr<const kt::Adapter> adapter(int64_t rank) {
    const Bf16s wide = random_values(random, shape.experts * rank * shape.hidden, 0.02f);
    const Bf16s narrow = random_values(random, shape.experts * rank * shape.intermediate, 0.02f);
    const kt::LowRankSource gate_or_up{wide.data(), narrow.data(), false, false, rank};
    const kt::LowRankSource to_hidden{narrow.data(), wide.data(), false, false, rank};
    return std::make_shared<const kt::Adapter>(shape.experts, shape.hidden, shape.intermediate, gate_or_up,
                                               gate_or_up, to_hidden, 0.5f);
  }

  std::unique_ptr<kt::Moe> layer(const std::string& method, const std::string& isa,
                                 const std::shared_ptr<kt::ThreadPool>& pool) const {
    auto moe = std::make_unique<kt::Moe>(shape.experts, shape.hidden, shape.intermediate, method, isa, pool);
    const int64_t matrix = shape.intermediate * shape.hidden;
    for (int64_t e = 0; e < shape.experts; ++e) {
      moe->load_expert(
          e, kt::ExpertSource{gate.data() + e * matrix, up.data() + e * matrix, down.data() + e * matrix});
    }
    return moe;
  }

  std::vector<float> forward(kt::Moe& moe, bool with_adapters) const {
    std::vector<float> out(static_cast<size_t>(shape.tokens * shape.hidden));
    moe.forward(arguments(out, with_adapters));
    return out;
  }

  kt::ForwardArgs arguments(std::vector<float>& out, bool with_adapters) const {
    kt::ForwardArgs args{};
    args.x = x.data();
    args.x_stride = shape.hidden;
    args.tokens = shape.tokens;
    args.top_k = shape.top_k;
    args.topk_ids = {ids.data(), false};
    args.topk_weights = shares.data();
    if (with_adapters) args.adapter_slots = {slots.data(), false};
    args.out = out.data();
    args.out_stride = shape.hidden;
    args.out_is_f32 = true;
    return args;
  }

  Shape shape;
  std::mt19937 random;
  Bf16s gate, up, down, x;
  std::vector<int32_t> ids, slots;
  std::vector<float> shares;
};

double relative_error(const std::vector<float>& found, const std::vector<float>& expected) {
  double difference = 0.0;
  double size = 0.0;
  for (size_t i = 0; i < found.size(); ++i) {
    difference += std::pow(static_cast<double>(found[i]) - expected[i], 2);
    size += std::pow(static_cast<double>(expected[i]), 2);
  }
  return std::sqrt(difference / size);
}

// Roundings of bf16 and of int8 activations lie between two instruction sets, and int4 may be widened to
// int8.
void require_equal(const std::vector<float>& found, const std::vector<float>& expected,
                   const std::string& what) {
  const double error = relative_error(found, expected);
  if (error < 0.03) return;
  std::fprintf(stderr, "%s: relative error %g\n", what.c_str(), error);
  std::exit(1);
}

const char* const kMethods[] = {"AMXBF16_SFT", "AMXINT8_SFT", "AMXINT4_SFT"};

int check_shapes() {
  const Shape shapes[] = {{3, 64, 64, 1, 2}, {3, 45, 77, 5, 2}, {4, 100, 130, 37, 3}};
  std::vector<std::string> isas = kt::usable_isas();
  isas.emplace_back("amx_model");
  int cases = 0;
  for (const Shape& shape : shapes) {
    Problem problem(shape, 7);
    const auto small = problem.adapter(1);
    const auto large = problem.adapter(17);
    for (const char* method : kMethods) {
      std::vector<float> expected;
      for (int nodes : {1, 2, 3}) {
        const auto pool = std::make_shared<kt::ThreadPool>(3, nodes);
        for (const char* isa : {"reference"}) {
          const auto moe = problem.layer(method, isa, pool);
          moe->set_adapter(0, small);
          moe->set_adapter(1, large);
          if (expected.empty()) expected = problem.forward(*moe, true);
        }
        for (const std::string& isa : isas) {
          const auto moe = problem.layer(method, isa, pool);
          moe->set_adapter(0, small);
          moe->set_adapter(1, large);
          require_equal(problem.forward(*moe, true), expected,
                        std::string(method) + " on " + isa + ", " + std::to_string(nodes) + " nodes");
          ++cases;
        }
      }
    }
  }
  return cases;
}

// Slots change while forwards run, from a thread of its own; two layers share the pool's threads.
int check_swaps() {
  Problem problem({4, 96, 80, 24, 2}, 11);
  const auto pool = std::make_shared<kt::ThreadPool>(3, 1);
  const auto first = problem.layer("AMXBF16_SFT", "auto", pool);
  const auto second = problem.layer("AMXINT8_SFT", "auto", pool);
  const std::shared_ptr<const kt::Adapter> adapters[] = {problem.adapter(4), problem.adapter(16),
                                                         problem.adapter(33)};
  for (int64_t slot : {0, 1}) {
    first->set_adapter(slot, adapters[0]);
    second->set_adapter(slot, adapters[1]);
  }
  std::atomic<bool> over{false};
  std::atomic<int> swaps{0};
  std::thread swapper([&] {
    for (int i = 0; !over.load(); ++i, ++swaps) {
      first->set_adapter(i % 2, adapters[i % 3]);
      second->set_adapter((i + 1) % 2, adapters[(i + 1) % 3]);
      first->set_profiling(i % 4 == 0);
      std::this_thread::yield();
    }
  });
  std::thread other([&] {
    for (int i = 0; i < 60; ++i) problem.forward(*second, true);
  });
  for (int i = 0; i < 60; ++i) problem.forward(*first, i % 5 != 0);
  other.join();
  over.store(true);
  swapper.join();
  return swaps.load();
}

// A thread stands for a device: it writes a batch, asks for a call, waits for the answer and reads the
// result. Announcements and further calls come from others meanwhile.
int check_mailbox() {
  Problem problem({3, 45, 77, 5, 2}, 5);
  const auto moe = problem.layer("AMXBF16_SFT", "auto", std::make_shared<kt::ThreadPool>(3, 1));
  std::vector<float> out(static_cast<size_t>(problem.shape.tokens * problem.shape.hidden));
  kt::HostRecord record;
  kt::HostCall call(*moe, problem.arguments(out, false), nullptr, {}, record);
  std::vector<int32_t> words(kt::Mailbox::kWords);
  const auto at = [&](size_t word) { return std::atomic_ref<int32_t>(words[word]); };
  int answered = 0;
  {
    kt::Mailbox mailbox(words.data());
    const int32_t number = mailbox.add(call);
    std::thread device([&] {
      for (int step = 0; step < 60; ++step) {
        for (uint16_t& value : problem.x) value = kt::bf16_from_float(static_cast<float>(1 + step % 7));
        at(kt::Mailbox::kRequest).store(number, std::memory_order_release);
        while (at(kt::Mailbox::kAnswer).load(std::memory_order_acquire) != number) std::this_thread::yield();
        at(kt::Mailbox::kAnswer).store(0, std::memory_order_relaxed);
        require_equal(out, problem.forward(*moe, false), "a call of the mailbox");
        ++answered;
      }
    });
    for (int i = 0; i < 200; ++i) {
      mailbox.announce();
      mailbox.add(call);
      std::this_thread::yield();
    }
    device.join();
  }
  if (at(kt::Mailbox::kClosed).load() == 0) std::exit(1);
  return answered;
}

int plant(const std::string& mistake) {
  if (mistake == "race") {
    int64_t counter = 0;
    std::thread other([&] {
      for (int i = 0; i < 100000; ++i) ++counter;
    });
    for (int i = 0; i < 100000; ++i) ++counter;
    other.join();
    std::printf("%lld\n", static_cast<long long>(counter));
  } else if (mistake == "overflow") {
    Problem problem({3, 64, 64, 4, 2}, 3);
    const auto moe = problem.layer("AMXBF16_SFT", "auto", std::make_shared<kt::ThreadPool>(1, 1));
    problem.shares.resize(problem.shares.size() - 1);
    problem.shares.shrink_to_fit();
    problem.forward(*moe, false);
  } else {
    const volatile int bits = static_cast<int>(mistake.size()) + 40;
    std::printf("%d\n", 1 << bits);
  }
  return 0;
}

}  // namespace

int main(int count, char** words) {
  if (count == 3 && std::strcmp(words[1], "--plant") == 0) return plant(words[2]);
  const int cases = check_shapes();
  const int swaps = check_swaps();
  const int answered = check_mailbox();
  std::printf("%d layers equal to the reference, %d swaps while forwards ran, %d answers of a mailbox\n",
              cases, swaps, answered);
  return 0;
}
