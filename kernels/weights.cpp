// Cuts an expert's matrices into shards and blocks and packs them in parallel, straight from the caller's
// memory.
#include "weights.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "pack.h"

namespace kt {
namespace {

constexpr int64_t kAlignment = 64;  // one AVX-512 register, one cache line

}  // namespace

std::vector<ShardLayout> shard_layouts(Format format, int64_t hidden, int64_t intermediate, int64_t groups) {
  const int64_t steps = round_up(intermediate, kStep) / kStep;
  std::vector<ShardLayout> shards;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t begin = steps * group / groups * kStep;
    const int64_t width = steps * (group + 1) / groups * kStep - begin;
    const int64_t gate_up_bytes = width / kBlockColumns * 2 * block_bytes(format, round_up(hidden, kStep));
    const int64_t down_bytes = width == 0 ? 0 : blocks_of(hidden) * block_bytes(format, width);
    shards.push_back(
        {.begin = begin, .width = width, .expert_bytes = round_up(gate_up_bytes + down_bytes, kAlignment)});
  }
  return shards;
}

ExpertWeights::ExpertWeights(Format format, int64_t experts, int64_t hidden, int64_t intermediate,
                             const Packer& packer, const ThreadPool& pool,
                             const std::vector<PackedShard>& packed)
    : format_(format),
      hidden_(hidden),
      intermediate_(intermediate),
      packer_(packer),
      borrowed_(!packed.empty()) {
  for (const ShardLayout& layout : shard_layouts(format, hidden, intermediate, pool.nodes())) {
    shards_.push_back(
        {.layout = layout, .bytes = layout.expert_bytes * experts, .data = nullptr, .memory = Memory()});
  }
  if (borrowed_) {
    borrow(packed, pool);
    return;
  }
  for (int shard = 0; shard < shards(); ++shard) {
    Shard& here = shards_[static_cast<size_t>(shard)];
    here.memory = Memory(static_cast<size_t>(here.bytes), pool.memory_node(shard));
    here.data = here.memory.data();
  }
}

void ExpertWeights::borrow(const std::vector<PackedShard>& packed, const ThreadPool& pool) {
  if (packed.size() != shards_.size()) {
    throw std::invalid_argument("packed: expected one array for each of the pool's " +
                                std::to_string(shards_.size()) + " groups, got " +
                                std::to_string(packed.size()));
  }
  for (int shard = 0; shard < shards(); ++shard) {
    Shard& here = shards_[static_cast<size_t>(shard)];
    const PackedShard& from = packed[static_cast<size_t>(shard)];
    const std::string name = "packed[" + std::to_string(shard) + "]: ";
    if (from.bytes != here.bytes) {
      throw std::invalid_argument(name + "expected " + std::to_string(here.bytes) + " bytes, got " +
                                  std::to_string(from.bytes) + "; pack these weights again");
    }
    if (here.bytes > 0 && reinterpret_cast<uintptr_t>(from.data) % kAlignment != 0) {
      throw std::invalid_argument(name + "expected an address that is a multiple of " +
                                  std::to_string(kAlignment) + ", got one that is not");
    }
    advise_borrowed(from.data, static_cast<size_t>(from.bytes), pool.memory_node(shard));
    here.data = const_cast<uint8_t*>(from.data);
  }
}

PackedShard ExpertWeights::packed(int shard) const {
  const Shard& here = shards_[static_cast<size_t>(shard)];
  return {here.data, here.bytes};
}

WeightBlocks ExpertWeights::gate_up(int shard, int64_t expert) const {
  const Shard& here = shards_[static_cast<size_t>(shard)];
  const int64_t k = round_up(hidden_, kStep);
  return {.first = here.data + expert * here.layout.expert_bytes,
          .stride = block_bytes(format_, k),
          .blocks = here.layout.width / kBlockColumns * 2,
          .k = k};
}

WeightBlocks ExpertWeights::down(int shard, int64_t expert) const {
  const int64_t width = shard_width(shard);
  const WeightBlocks before = gate_up(shard, expert);
  if (width == 0) return {.first = before.first, .stride = 0, .blocks = 0, .k = 0};
  return {.first = before.first + before.blocks * before.stride,
          .stride = block_bytes(format_, width),
          .blocks = blocks_of(hidden_),
          .k = width};
}

int64_t ExpertWeights::bytes() const {
  int64_t sum = 0;
  for (const Shard& shard : shards_) sum += shard.bytes;
  return sum;
}

void ExpertWeights::load(int64_t expert, const ExpertSource& source, ThreadPool::Session& session) {
  load_blocks(expert, source, session);
}

void ExpertWeights::load(int64_t expert, const QuantizedExpert& source, ThreadPool::Session& session) {
  load_blocks(expert, source, session);
}

// All memory of the layer, before the first expert: left to the packing threads, several of them would meet
// in one huge page, and each would have it zeroed, although once is enough.
void ExpertWeights::populate(ThreadPool::Session& session) {
  if (populated_) return;
  std::atomic<int64_t> next{0};
  session.run([&](int) {
    int64_t first = 0;
    int64_t task = next.fetch_add(1);
    for (const Shard& shard : shards_) {
      const int64_t count = shard.memory.huge_pages();
      for (; task < first + count; task = next.fetch_add(1)) shard.memory.populate(task - first);
      first += count;
    }
  });
  populated_ = true;
}

// Tasks are gate/up pairs and down blocks of one shard after the other. The first exception of any thread is
// thrown here.
template <typename Source>
void ExpertWeights::load_blocks(int64_t expert, const Source& source, ThreadPool::Session& session) {
  populate(session);
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr failure;
  session.run([&](int) {
    int64_t first = 0;
    int64_t task = next.fetch_add(1);
    for (int shard = 0; shard < shards(); ++shard) {
      const int64_t count = gate_up(shard, expert).blocks / 2 + down(shard, expert).blocks;
      for (; task < first + count && !failed.load(); task = next.fetch_add(1)) {
        try {
          load_task(shard, expert, task - first, source);
        } catch (...) {
          if (!failed.exchange(true)) failure = std::current_exception();
        }
      }
      first += count;
    }
  });
  if (failed.load()) std::rethrow_exception(failure);
}

template <typename Source>
void ExpertWeights::load_task(int shard, int64_t expert, int64_t task, const Source& source) const {
  const WeightBlocks gate_up_blocks = gate_up(shard, expert);
  const int64_t begin = shard_begin(shard);
  if (task < gate_up_blocks.blocks / 2) {
    const int64_t row = begin + task * kBlockColumns;
    const PackPart part{.row = std::min(row, intermediate_),
                        .rows = std::clamp<int64_t>(intermediate_ - row, 0, kBlockColumns),
                        .begin = 0,
                        .count = hidden_};
    uint8_t* gate_block = gate_up_blocks.first + 2 * task * gate_up_blocks.stride;
    pack(source, Matrix::gate, part, gate_up_blocks.k, gate_block);
    pack(source, Matrix::up, part, gate_up_blocks.k, gate_block + gate_up_blocks.stride);
    return;
  }
  const WeightBlocks down_blocks = down(shard, expert);
  const int64_t block = task - gate_up_blocks.blocks / 2;
  const int64_t row = block * kBlockColumns;
  const PackPart part{.row = row,
                      .rows = std::min(hidden_ - row, kBlockColumns),
                      .begin = begin,
                      .count = std::min(intermediate_ - begin, down_blocks.k)};
  pack(source, Matrix::down, part, down_blocks.k, down_blocks.first + block * down_blocks.stride);
}

void ExpertWeights::pack(const ExpertSource& source, Matrix matrix, const PackPart& part, int64_t k,
                         uint8_t* block) const {
  const uint16_t* first = matrix == Matrix::gate ? source.gate
                          : matrix == Matrix::up ? source.up
                                                 : source.down;
  const int64_t inputs = matrix == Matrix::down ? intermediate_ : hidden_;
  const uint16_t* row = first + (part.rows > 0 ? part.row * inputs : 0);
  if (format_ != Format::bf16) return quantize_and_pack(row, inputs, part, k, block);
  const WeightRows rows{.first = row + part.begin, .stride = inputs, .rows = part.rows, .count = part.count};
  pack_bf16_block(packer_, rows, k, block);
}

void ExpertWeights::pack(const QuantizedExpert& source, Matrix matrix, const PackPart& part, int64_t k,
                         uint8_t* block) const {
  pack_quantized(matrix == Matrix::gate ? source.gate
                 : matrix == Matrix::up ? source.up
                                        : source.down,
                 part, k, block);
}

// Only the part is quantized; the scale of an int8 row is that of the whole row all the same.
void ExpertWeights::quantize_and_pack(const uint16_t* first, int64_t inputs, const PackPart& part, int64_t k,
                                      uint8_t* block) const {
  const bool is_int8 = format_ == Format::int8;
  const int64_t value_bytes = is_int8 ? part.count : int4_row_bytes(part.count);
  const int64_t row_scales = is_int8 ? 2 : int4_row_groups(part.count);  // in units of two bytes
  std::vector<uint8_t> values(static_cast<size_t>(part.rows * value_bytes));
  std::vector<uint16_t> scales(static_cast<size_t>(part.rows * row_scales));
  for (int64_t row = 0; row < part.rows; ++row) {
    const uint16_t* source = first + row * inputs;
    uint8_t* target = values.data() + row * value_bytes;
    uint16_t* scale = scales.data() + row * row_scales;
    if (is_int8) {
      const float row_scale = quantize_int8_row(packer_, source, inputs, part.begin, part.count,
                                                reinterpret_cast<int8_t*>(target));
      std::memcpy(scale, &row_scale, 4);
    } else {
      quantize_int4_row(packer_, source + part.begin, part.count, target, scale);
    }
  }
  pack_quantized({.values = values.data(), .scales = scales.data(), .inputs = part.count},
                 {.row = 0, .rows = part.rows, .begin = 0, .count = part.count}, k, block);
}

void ExpertWeights::pack_quantized(const QuantizedMatrix& matrix, const PackPart& part, int64_t k,
                                   uint8_t* block) const {
  if (format_ == Format::int8) {
    pack_int8_block(packer_, matrix, part, k, block);
  } else {
    pack_int4_block(packer_, matrix, part, k, block);
  }
}

}  // namespace kt
