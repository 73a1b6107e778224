// Owns a layer's weights and adapters; cuts a batch into chunks and runs a ForwardPass over each.
#include "moe.h"

#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "dispatch.h"
#include "forward.h"
#include "pack.h"

namespace kt {
namespace {

constexpr int64_t kLeastChunk = 64;  // tokens
constexpr int64_t kLeastScratchBytes = int64_t{512} << 20;
constexpr int64_t kMostSlots = 4096;

constexpr int64_t kMostSize = int64_t{1} << 30;  // products of two still fit 64 bits, in any unit

int64_t validated_size(const char* name, int64_t value) {
  if (value >= 1 && value <= kMostSize) return value;
  throw std::invalid_argument(std::string(name) + ": expected " +
                              (value < 1 ? "at least 1" : "at most " + std::to_string(kMostSize)) + ", got " +
                              std::to_string(value));
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

Format format_of(const std::string& method) {
  if (method == "AMXBF16_SFT") return Format::bf16;
  if (method == "AMXINT8_SFT") return Format::int8;
  if (method == "AMXINT4_SFT") return Format::int4;
  throw std::invalid_argument("method: '" + method +
                              "' is not known, expected AMXBF16_SFT, AMXINT8_SFT or AMXINT4_SFT");
}

Moe::Moe(int64_t num_experts, int64_t hidden_size, int64_t intermediate_size, const std::string& method,
         const std::string& isa, std::shared_ptr<ThreadPool> pool, PackedWeights packed)
    : num_experts_(validated_size("num_experts", num_experts)),
      hidden_(validated_size("hidden_size", hidden_size)),
      intermediate_(validated_intermediate(num_experts, hidden_size, intermediate_size)),
      method_(method),
      format_(format_of(method)),
      isa_(isa_for(isa, format_, method)),
      pool_(std::move(pool)),
      packed_owner_(std::move(packed.owner)),
      weights_(format_, num_experts, hidden_size, intermediate_size, find_packer(isa_), *pool_,
               packed.shards),
      loaded_(static_cast<size_t>(num_experts), packed.shards.empty() ? 0 : 1),
      adapters_(std::make_shared<const AdapterTable>()) {}

std::string packed_layout(Format format, int shards) {
  const char* name = format == Format::bf16 ? "bf16" : format == Format::int8 ? "int8" : "int4";
  const std::string group = format == Format::int4 ? "/group=" + std::to_string(kInt4Group) : "";
  return "version=" + std::to_string(kLayoutVersion[static_cast<size_t>(format)]) + "/" + name + group +
         "/columns=" + std::to_string(kBlockColumns) + "/step=" + std::to_string(kStep) +
         "/shards=" + std::to_string(shards);
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
  std::shared_ptr<const AdapterTable> replaced;  // freed, where nobody uses it, when the lock is open again
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

// Long prefills go in chunks, so that scratch stays small beside a model's weights; each chunk reads a
// layer's weights again, so it must be long enough to be worth that.
int64_t Moe::chunk_tokens(const Layer& layer, const ForwardArgs& args, const AdapterTable& table) const {
  if (args.tokens <= kLeastChunk) return kLeastChunk;
  Ranks ranks;
  bool adapters = false;
  for (const auto& adapter : table) {
    if (adapter == nullptr) continue;
    ranks.include(*adapter);
    adapters = true;
  }
  const int64_t budget = std::max(kLeastScratchBytes, weights_.bytes() / 8);
  const int64_t top_k = std::max<int64_t>(args.top_k, 1);
  return std::max(kLeastChunk, budget / scratch_bytes_a_token(layer, top_k, ranks, adapters));
}

void Moe::forward(const ForwardArgs& args) {
  const std::shared_ptr<const AdapterTable> table = adapters();
  ThreadPool::Session session(*pool_);
  validate_routing({args.tokens, args.top_k, args.topk_ids, args.adapter_slots, 0}, loaded_, *table);
  const std::shared_ptr<Profile> counts = profile();
  const Layer layer{isa_, format_, hidden_, weights_, *pool_, counts.get()};
  const int64_t chunk = chunk_tokens(layer, args, *table);
  Routing routing;
  for (int64_t first = 0; first < args.tokens; first += chunk) {
    const int64_t tokens = std::min(chunk, args.tokens - first);
    {
      const Span span(counts.get(), Phase::route);
      routing.build({tokens, args.top_k, args.topk_ids, args.adapter_slots, first}, num_experts_, *table);
    }
    ForwardPass(layer, args, first, routing).run(session);
  }
}

}  // namespace kt
