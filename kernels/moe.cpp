// Owns a layer's weights and adapters; cuts a batch into chunks and runs a ForwardPass over each.
#include "moe.h"

#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "dispatch.h"
#include "format.h"
#include "forward.h"
#include "pack.h"

namespace kt {
namespace {

constexpr int64_t kMostSlots = 4096;

constexpr int64_t kMostSize = int64_t{1} << 30;  // products of two still fit 64 bits, in any unit

int64_t validated_size(const char* name, int64_t value) {
  if (value >= 1 && value <= kMostSize) return value;
  throw std::invalid_argument(std::string(name) + ": expected " +
                              (value < 1 ? "at least 1" : "at most " + std::to_string(kMostSize)) + ", got " +
                              std::to_string(value));
}

void validate_rank(int64_t rank) {
  if (rank >= 0 && rank <= kMostSize) return;
  throw std::invalid_argument("ranks: expected 0 to " + std::to_string(kMostSize) + ", got " +
                              std::to_string(rank));
}

// Sizes whose bytes could not be counted are refused before anything is computed from them.
int64_t validated_intermediate(int64_t experts, int64_t hidden, int64_t intermediate) {
  constexpr double kAddressable = 0x1p47;  // bytes of a process
  validated_size("intermediate_size", intermediate);
  const double weights =
      3.0 * static_cast<double>(experts) * static_cast<double>(hidden) * static_cast<double>(intermediate);
  if (weights < kAddressable) return intermediate;
  throw std::invalid_argument("intermediate_size: " + std::to_string(experts) + " experts of hidden " +
                              std::to_string(hidden) + " and intermediate " + std::to_string(intermediate) +
                              " have more weights than a process can address, expected less");
}

const Isa& isa_for(const std::string& name, Format format, const std::string& method) {
  const Isa& isa = find_isa(name);
  const bool built =
      format == Format::bf16 || (format == Format::int8 ? isa.gemm_int8 : isa.gemm_int4) != nullptr;
  if (!built) throw std::invalid_argument("method: " + method + " is not built for isa " + isa.name);
  return isa;
}

}  // namespace

Moe::Moe(int64_t num_experts, int64_t hidden_size, int64_t intermediate_size, const std::string& method,
         const std::string& isa, std::shared_ptr<ThreadPool> pool, PackedWeights packed)
    : num_experts_(validated_size("num_experts", num_experts)),
      hidden_(validated_size("hidden_size", hidden_size)),
      intermediate_(validated_intermediate(num_experts, hidden_size, intermediate_size)),
      method_(method),
      format_(format_of(method)),
      isa_(isa_for(isa, format_, method)),
      pool_(std::move(pool)),
      scratch_(scratch_shape(format_, isa_.row_format, hidden_,
                             shard_layouts(format_, hidden_, intermediate_, pool_->nodes()),
                             pool_->threads())),
      packed_owner_(std::move(packed.owner)),
      weights_(format_, num_experts, hidden_size, intermediate_size, find_packer(isa_), *pool_,
               packed.shards),
      loaded_(static_cast<size_t>(num_experts), packed.shards.empty() ? 0 : 1),
      adapters_(std::make_shared<const AdapterTable>()) {}

std::string packed_layout(Format format, int shards) {
  const FormatRow& row = row_of(format);
  const std::string group = row.scale_inputs > 0 ? "/group=" + std::to_string(row.scale_inputs) : "";
  return "version=" + std::to_string(row.layout_version) + "/" + row.name + group +
         "/columns=" + std::to_string(kBlockColumns) + "/step=" + std::to_string(kStep) +
         "/shards=" + std::to_string(shards);
}

std::vector<int64_t> packed_bytes(Format format, const LayerSizes& sizes, int groups) {
  validated_size("num_experts", sizes.num_experts);
  validated_size("hidden_size", sizes.hidden);
  validated_intermediate(sizes.num_experts, sizes.hidden, sizes.intermediate);
  validated_size("nodes", groups);
  std::vector<int64_t> bytes;
  for (const ShardLayout& shard : shard_layouts(format, sizes.hidden, sizes.intermediate, groups)) {
    bytes.push_back(shard.expert_bytes * sizes.num_experts);
  }
  return bytes;
}

int64_t scratch_bytes(Format format, const LayerSizes& sizes, int groups, int threads, int64_t tokens,
                      int64_t top_k, const Ranks& ranks) {
  int64_t weight_bytes = 0;
  for (int64_t bytes : packed_bytes(format, sizes, groups)) weight_bytes += bytes;
  validated_size("threads", threads);
  for (int64_t rank : {ranks.gate, ranks.up, ranks.down}) validate_rank(rank);
  const auto shards = shard_layouts(format, sizes.hidden, sizes.intermediate, groups);
  const ScratchShape shape = scratch_shape(format, RowFormat::f32, sizes.hidden, shards, threads);
  const bool adapters = ranks.gate > 0 || ranks.up > 0 || ranks.down > 0;
  return most_scratch_bytes(shape, validated_size("tokens", tokens), validated_size("top_k", top_k), ranks,
                            adapters, weight_bytes);
}

std::vector<PackedShard> Moe::packed_shards() const {
  const auto missing = std::find(loaded_.begin(), loaded_.end(), 0);
  if (missing != loaded_.end()) {
    throw std::invalid_argument("packed_shards: expert " + std::to_string(missing - loaded_.begin()) +
                                " is not loaded, expected all " + std::to_string(num_experts_) +
                                "; load the others first");
  }
  std::vector<PackedShard> shards;
  for (int shard = 0; shard < weights_.shards(); ++shard) shards.push_back(weights_.packed(shard));
  return shards;
}

void Moe::load_expert(int64_t expert, const ExpertSource& source) { load(expert, source); }

void Moe::load_expert(int64_t expert, const QuantizedExpert& source) { load(expert, source); }

template <typename Source>
void Moe::load(int64_t expert, const Source& source) {
  if (expert < 0 || expert >= num_experts_) {
    throw std::invalid_argument("expert: expected 0 to " + std::to_string(num_experts_ - 1) + ", got " +
                                std::to_string(expert));
  }
  if (weights_.borrowed()) {
    throw std::invalid_argument(
        "load_expert: this layer reads packed weights, which are never written; build it without packed= to "
        "load "
        "experts");
  }
  ThreadPool::Session session(*pool_);
  loaded_[static_cast<size_t>(expert)] = 0;  // until it is whole again
  weights_.load(expert, source, session);
  loaded_[static_cast<size_t>(expert)] = 1;
}

void Moe::set_adapter(int64_t slot, std::shared_ptr<const Adapter> adapter) {
  if (slot < 0 || slot >= kMostSlots) {
    throw std::invalid_argument("slot: expected 0 to " + std::to_string(kMostSlots - 1) + ", got " +
                                std::to_string(slot));
  }
  const bool fits =
      adapter == nullptr || (adapter->experts() == num_experts_ && adapter->hidden() == hidden_ &&
                             adapter->intermediate() == intermediate_);
  if (!fits) {
    const auto dims = [](int64_t e, int64_t h, int64_t i) {
      return std::to_string(e) + " experts, hidden " + std::to_string(h) + ", intermediate " +
             std::to_string(i);
    };
    throw std::invalid_argument("adapter: made for " +
                                dims(adapter->experts(), adapter->hidden(), adapter->intermediate()) +
                                ", expected " + dims(num_experts_, hidden_, intermediate_));
  }
  std::shared_ptr<const AdapterTable>
      replaced;  // freed after the lock is released, unless a forward still uses it
  const std::lock_guard lock(fork_safe_mutex());
  auto table = std::make_shared<AdapterTable>(*adapters_);
  if (table->size() <= static_cast<size_t>(slot)) table->resize(static_cast<size_t>(slot) + 1);
  (*table)[static_cast<size_t>(slot)] = std::move(adapter);
  replaced = std::exchange(adapters_, std::move(table));
}

std::shared_ptr<const AdapterTable> Moe::adapters() const {
  const std::lock_guard lock(fork_safe_mutex());
  return adapters_;
}

void Moe::set_profiling(bool on) {
  const std::lock_guard lock(fork_safe_mutex());
  profile_ = on ? std::make_shared<Profile>() : nullptr;
}

std::shared_ptr<Profile> Moe::profile() const {
  const std::lock_guard lock(fork_safe_mutex());
  return profile_;
}

int64_t Moe::tokens_per_chunk(const ForwardArgs& args, const AdapterTable& table) const {
  if (args.tokens <= kLeastChunk) return kLeastChunk;
  Ranks ranks;
  bool adapters = false;
  for (const auto& adapter : table) {
    if (adapter == nullptr) continue;
    ranks.include(*adapter);
    adapters = true;
  }
  return chunk_tokens(scratch_, args.top_k, ranks, adapters, weights_.bytes());
}

int64_t Moe::forward(const ForwardArgs& args) {
  const std::shared_ptr<const AdapterTable> table = adapters();
  ThreadPool::Session session(*pool_);
  RouteArgs route{.tokens = args.tokens,
                  .top_k = args.top_k,
                  .topk_ids = args.topk_ids,
                  .adapter_slots = args.adapter_slots,
                  .first_token = 0};
  validate_routing(route, loaded_, *table);
  const std::shared_ptr<Profile> counts = profile();
  const Layer layer{
      .isa = isa_, .shape = scratch_, .weights = weights_, .pool = *pool_, .profile = counts.get()};
  const int64_t chunk = tokens_per_chunk(args, *table);
  Routing routing;
  int64_t experts_read = 0;
  for (int64_t first = 0; first < args.tokens; first += chunk) {
    route.first_token = first;
    route.tokens = std::min(chunk, args.tokens - first);
    {
      const Span span(counts.get(), Phase::route);
      routing.build(route, num_experts_, *table);
    }
    ForwardPass(layer, args, first, routing).run(session);
    experts_read += static_cast<int64_t>(routing.experts.size());
  }
  return experts_read;
}

}  // namespace kt
