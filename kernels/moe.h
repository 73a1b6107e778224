// One MoE layer: routed experts with their adapters, from checked views to the weighted sum. Weights are in
// weights.h, low-rank adds in lora.h, arithmetic behind gemm.h, threads in threads.h.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "gemm.h"
#include "lora.h"
#include "profile.h"
#include "route.h"
#include "scratch.h"
#include "threads.h"
#include "weights.h"

namespace kt {

struct ForwardArgs {
  const uint16_t* x;  // (tokens, hidden) bf16
  int64_t x_stride;   // values from token to token
  int64_t tokens;
  int64_t top_k;
  IdView topk_ids;
  const float* topk_weights;
  IdView adapter_slots;
  void* out;  // (tokens, hidden)
  int64_t out_stride;
  bool out_is_f32;
};

// What the bytes of packed shards depend on besides the weights and their shape: version, format, shards.
std::string packed_layout(Format format, int shards);

// The sizes of one layer.
struct LayerSizes {
  int64_t num_experts;
  int64_t hidden;
  int64_t intermediate;
};

// Bytes of each pool group's packed weights. Throws std::invalid_argument for sizes that no layer has.
std::vector<int64_t> packed_bytes(Format format, const LayerSizes& sizes, int groups);

// The most scratch memory that a pool of `threads` threads keeps for forwards of up to `tokens` tokens, each
// with top_k experts and adapters up to these ranks, on any instruction set: with float rows, which are the
// widest.
int64_t scratch_bytes(Format format, const LayerSizes& sizes, int groups, int threads, int64_t tokens,
                      int64_t top_k, const Ranks& ranks);

// Packed weights that another Moe wrote, in memory that `owner` keeps.
struct PackedWeights {
  std::vector<PackedShard> shards;  // empty: the weights will be loaded
  std::shared_ptr<const void> owner;
};

class Moe {
 public:
  Moe(int64_t num_experts, int64_t hidden_size, int64_t intermediate_size, const std::string& method,
      const std::string& isa, std::shared_ptr<ThreadPool> pool, PackedWeights packed = {});

  void load_expert(int64_t expert, const ExpertSource& source);
  void load_expert(int64_t expert, const QuantizedExpert& source);
  void set_adapter(int64_t slot, std::shared_ptr<const Adapter> adapter);
  // How many experts' weights it read.
  int64_t forward(const ForwardArgs& args);
  // Counting starts from zero with each switch to on.
  void set_profiling(bool on);
  std::shared_ptr<Profile> profile() const;

  const char* isa() const { return isa_.name; }
  Format format() const { return format_; }
  const std::string& method() const { return method_; }
  int64_t num_experts() const { return num_experts_; }
  int64_t hidden_size() const { return hidden_; }
  int64_t intermediate_size() const { return intermediate_; }
  int64_t packed_bytes() const { return weights_.bytes(); }
  // One per pool group; throws std::invalid_argument while an expert is not loaded.
  std::vector<PackedShard> packed_shards() const;
  std::string packed_layout() const { return kt::packed_layout(format_, weights_.shards()); }

 private:
  std::shared_ptr<const AdapterTable> adapters() const;
  int64_t tokens_per_chunk(const ForwardArgs& args, const AdapterTable& table) const;
  template <typename Source>
  void load(int64_t expert, const Source& source);

  const int64_t num_experts_;
  const int64_t hidden_;
  const int64_t intermediate_;
  const std::string method_;
  const Format format_;
  const Isa& isa_;
  const std::shared_ptr<ThreadPool> pool_;
  const ScratchShape scratch_;
  const std::shared_ptr<const void> packed_owner_;
  ExpertWeights weights_;
  std::vector<uint8_t> loaded_;

  // Both are read and replaced under fork_safe_mutex().
  std::shared_ptr<Profile> profile_;
  std::shared_ptr<const AdapterTable>
      adapters_;  // replaced as a whole: a forward keeps the table that it started with
};

}  // namespace kt
