// Which rows of a batch go to which expert with which adapter. Pure index work on checked ids; no weights, no
// arithmetic.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "lora.h"

namespace kt {

// The largest rank of each matrix among some adapters.
struct Ranks {
  int64_t gate = 0;
  int64_t up = 0;
  int64_t down = 0;
  void include(const Adapter& adapter);
};

using AdapterTable = std::vector<std::shared_ptr<const Adapter>>;

// int32 or int64 values as the caller holds them.
struct IdView {
  const void* data = nullptr;
  bool is_int64 = false;
  int64_t operator[](int64_t index) const {
    return is_int64 ? static_cast<const int64_t*>(data)[index] : static_cast<const int32_t*>(data)[index];
  }
};

struct RouteArgs {
  int64_t tokens;
  int64_t top_k;
  IdView topk_ids;
  IdView adapter_slots;  // data == nullptr: no adapter anywhere
  int64_t first_token;   // the rows below count from here
};

// Rows of one expert that use the same adapter.
struct Segment {
  const Adapter* adapter;
  int32_t expert;
  int32_t expert_index;  // in Routing::experts
  int64_t row;
  int64_t rows;
};

struct ExpertRows {
  int32_t expert;
  int64_t row;
  int64_t rows;
  int64_t first_segment;
  int64_t last_segment;
};

// Rows are (token, k) pairs ordered by expert, then by adapter, then by token.
struct Routing {
  std::vector<int32_t> row_token;
  std::vector<int64_t> pair_row;  // per (token, k): its row, or -1 where the id was negative
  std::vector<ExpertRows> experts;
  std::vector<Segment> segments;
  Ranks ranks;  // of the adapters in use
  int64_t tokens = 0;

  int64_t rows() const { return static_cast<int64_t>(row_token.size()); }
  void build(const RouteArgs& args, int64_t num_experts, const AdapterTable& adapters);

 private:
  void sort_rows(const RouteArgs& args, int64_t num_experts);
  void find_segments(const RouteArgs& args, const AdapterTable& adapters);
  void order_tokens(const RouteArgs& args);

  std::vector<int64_t> counts_;
  std::vector<int32_t> token_order_;
};

// Throws std::invalid_argument for an id or slot that does not exist.
void validate_routing(const RouteArgs& args, const std::vector<uint8_t>& loaded,
                      const AdapterTable& adapters);

}  // namespace kt
