// Counting sort of (token, k) pairs by expert, stable over tokens that were put in adapter order before.
#include "route.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace kt {
namespace {

std::string element(const char* name, int64_t token, int64_t k) {
  return std::string(name) + "[" + std::to_string(token) + (k < 0 ? "]" : ", " + std::to_string(k) + "]") +
         ": ";
}

void validate_slot(const RouteArgs& args, int64_t token, const AdapterTable& adapters) {
  const int64_t slot = args.adapter_slots[token];
  if (slot == -1) return;
  const auto slots = static_cast<int64_t>(adapters.size());
  const bool known = slot >= 0 && slot < slots && adapters[static_cast<size_t>(slot)] != nullptr;
  if (known) return;
  throw std::invalid_argument(element("adapter_slots", token, -1) + "no adapter in slot " +
                              std::to_string(slot) + ", expected -1 (none) or a slot filled by set_adapter");
}

}  // namespace

void Ranks::include(const Adapter& adapter) {
  gate = std::max(gate, adapter.ranks().gate);
  up = std::max(up, adapter.ranks().up);
  down = std::max(down, adapter.ranks().down);
}

void validate_routing(const RouteArgs& args, const std::vector<uint8_t>& loaded,
                      const AdapterTable& adapters) {
  const auto experts = static_cast<int64_t>(loaded.size());
  for (int64_t token = 0; token < args.tokens; ++token) {
    for (int64_t k = 0; k < args.top_k; ++k) {
      const int64_t id = args.topk_ids[token * args.top_k + k];
      if (id < 0) continue;
      if (id >= experts) {
        throw std::invalid_argument(element("topk_ids", token, k) + "expert " + std::to_string(id) +
                                    " does not exist, expected less than " + std::to_string(experts));
      }
      if (loaded[static_cast<size_t>(id)] == 0) {
        throw std::invalid_argument(element("topk_ids", token, k) + "expert " + std::to_string(id) +
                                    " has no weights; call load_expert for it first");
      }
    }
    if (args.adapter_slots.data != nullptr) validate_slot(args, token, adapters);
  }
}

void Routing::build(const RouteArgs& args, int64_t num_experts, const AdapterTable& adapters) {
  tokens = args.tokens;
  order_tokens(args);
  sort_rows(args, num_experts);
  find_segments(args, adapters);
}

void Routing::order_tokens(const RouteArgs& args) {
  token_order_.resize(static_cast<size_t>(args.tokens));
  std::iota(token_order_.begin(), token_order_.end(), 0);
  if (args.adapter_slots.data == nullptr) return;
  const auto slot = [&](int32_t token) { return args.adapter_slots[args.first_token + token]; };
  const auto before = [&](int32_t left, int32_t right) { return slot(left) < slot(right); };
  if (!std::is_sorted(token_order_.begin(), token_order_.end(), before)) {
    std::stable_sort(token_order_.begin(), token_order_.end(), before);
  }
}

void Routing::sort_rows(const RouteArgs& args, int64_t num_experts) {
  const auto id_of = [&](int64_t token, int64_t k) {
    return args.topk_ids[(args.first_token + token) * args.top_k + k];
  };
  counts_.assign(static_cast<size_t>(num_experts), 0);
  for (int64_t token = 0; token < args.tokens; ++token) {
    for (int64_t k = 0; k < args.top_k; ++k) {
      const int64_t id = id_of(token, k);
      if (id >= 0) ++counts_[static_cast<size_t>(id)];
    }
  }
  experts.clear();
  int64_t row = 0;
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    int64_t& count = counts_[static_cast<size_t>(expert)];
    if (count > 0) {
      experts.push_back({.expert = static_cast<int32_t>(expert),
                         .row = row,
                         .rows = count,
                         .first_segment = 0,
                         .last_segment = 0});
    }
    const int64_t rows_here = count;
    count = row;  // from here on the expert's next free row
    row += rows_here;
  }
  row_token.resize(static_cast<size_t>(row));
  pair_row.assign(static_cast<size_t>(args.tokens * args.top_k), -1);
  for (int32_t token : token_order_) {
    for (int64_t k = 0; k < args.top_k; ++k) {
      const int64_t id = id_of(token, k);
      if (id < 0) continue;
      const int64_t free_row = counts_[static_cast<size_t>(id)]++;
      row_token[static_cast<size_t>(free_row)] = token;
      pair_row[static_cast<size_t>(token * args.top_k + k)] = free_row;
    }
  }
}

void Routing::find_segments(const RouteArgs& args, const AdapterTable& adapters) {
  segments.clear();
  ranks = {};
  if (args.adapter_slots.data == nullptr) return;
  for (ExpertRows& expert : experts) {
    expert.first_segment = static_cast<int64_t>(segments.size());
    int64_t last_slot = -1;
    for (int64_t row = expert.row; row < expert.row + expert.rows; ++row) {
      const int64_t slot = args.adapter_slots[args.first_token + row_token[static_cast<size_t>(row)]];
      if (slot < 0) continue;
      if (slot != last_slot) {
        const Adapter* adapter = adapters[static_cast<size_t>(slot)].get();
        segments.push_back({.adapter = adapter,
                            .expert = expert.expert,
                            .expert_index = static_cast<int32_t>(&expert - experts.data()),
                            .row = row,
                            .rows = 0});
        ranks.include(*adapter);
        last_slot = slot;
      }
      ++segments.back().rows;
    }
    expert.last_segment = static_cast<int64_t>(segments.size());
  }
}

}  // namespace kt
