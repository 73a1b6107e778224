// The packed base weights of one layer's experts: one shard of the intermediate dimension per pool group,
// each in its own memory. Loads and locates; multiplies nothing.
#pragma once

#include <cstdint>
#include <vector>

#include "gemm.h"
#include "memory.h"
#include "packer.h"
#include "quantize.h"
#include "threads.h"

namespace kt {

// Blocks of one matrix of one expert in one shard.
struct WeightBlocks {
  uint8_t* first;
  int64_t stride;  // bytes from block to block
  int64_t blocks;
  int64_t k;
};

struct ExpertSource {
  const uint16_t* gate;  // (intermediate, hidden), bf16, contiguous
  const uint16_t* up;
  const uint16_t* down;  // (hidden, intermediate)
};

struct QuantizedExpert {
  QuantizedMatrix gate;
  QuantizedMatrix up;
  QuantizedMatrix down;
};

// The packed bytes of one shard, all experts.
struct PackedShard {
  const uint8_t* data;
  int64_t bytes;
};

// A pool group's part of each expert.
struct ShardLayout {
  int64_t begin;  // first value of the intermediate dimension
  int64_t width;  // a multiple of kStep; zero where there are more groups than steps
  int64_t expert_bytes;
};

std::vector<ShardLayout> shard_layouts(Format format, int64_t hidden, int64_t intermediate, int64_t groups);

class ExpertWeights {
 public:
  // With `packed` (one per shard, from `packed()` of the same layout) nothing is allocated: the weights stay
  // there, are only read, and must outlive this. Throws std::invalid_argument when their number, size or
  // alignment is not that of this layout.
  ExpertWeights(Format format, int64_t experts, int64_t hidden, int64_t intermediate, const Packer& packer,
                const ThreadPool& pool, const std::vector<PackedShard>& packed = {});

  // From bf16; quantized formats are quantized on the way, 16 rows at a time.
  void load(int64_t expert, const ExpertSource& source, ThreadPool::Session& session);
  void load(int64_t expert, const QuantizedExpert& source, ThreadPool::Session& session);

  int shards() const { return static_cast<int>(shards_.size()); }
  int64_t shard_begin(int shard) const { return shards_[static_cast<size_t>(shard)].layout.begin; }
  int64_t shard_width(int shard) const { return shards_[static_cast<size_t>(shard)].layout.width; }
  // Gate and up blocks in turns.
  WeightBlocks gate_up(int shard, int64_t expert) const;
  WeightBlocks down(int shard, int64_t expert) const;
  int64_t bytes() const;
  bool borrowed() const { return borrowed_; }
  PackedShard packed(int shard) const;

 private:
  struct Shard {
    ShardLayout layout;
    int64_t bytes;
    uint8_t* data;  // in `memory`, or the caller's, which load() never writes
    Memory memory;
  };
  void borrow(const std::vector<PackedShard>& packed, const ThreadPool& pool);
  // Rows [row, row + rows) of a matrix and the part of their inputs that a shard holds.
  using PackPart = QuantizedPart;
  enum class Matrix : uint8_t { gate, up, down };
  void populate(ThreadPool::Session& session);
  template <typename Source>
  void load_blocks(int64_t expert, const Source& source, ThreadPool::Session& session);
  template <typename Source>
  void load_task(int shard, int64_t expert, int64_t task, const Source& source) const;
  void pack(const ExpertSource& source, Matrix matrix, const PackPart& part, int64_t k, uint8_t* block) const;
  void pack(const QuantizedExpert& source, Matrix matrix, const PackPart& part, int64_t k,
            uint8_t* block) const;
  void quantize_and_pack(const uint16_t* first, int64_t inputs, const PackPart& part, int64_t k,
                         uint8_t* block) const;
  void pack_quantized(const QuantizedMatrix& matrix, const PackPart& part, int64_t k, uint8_t* block) const;

  Format format_;
  int64_t hidden_;
  int64_t intermediate_;
  const Packer& packer_;
  bool borrowed_;
  bool populated_ = false;
  std::vector<Shard> shards_;
};

}  // namespace kt
