// Packs adapters and calls the bf16 kernel twice: x A^T into z (shrink), z B^T onto the base result (expand).
#include "lora.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "pack.h"

namespace kt {
namespace {

constexpr int64_t kRankStep = 2;  // one bf16 pair
constexpr int64_t kZStep = 32;    // one AMX tile row of bf16
// An AMX tile of B always reads 16 pair rows; behind the last block of a small rank they must be readable and
// finite.
constexpr int64_t kTileSlack = 1024;

// bf16 copies of `rows` rows; the packer reads bf16 only.
void read_rows(const void* source, bool is_f32, int64_t first_value, int64_t count, uint16_t* target) {
  if (!is_f32) {
    std::memcpy(target, static_cast<const uint16_t*>(source) + first_value, static_cast<size_t>(count) * 2);
    return;
  }
  const float* values = static_cast<const float*>(source) + first_value;
  for (int64_t i = 0; i < count; ++i) target[i] = bf16_from_float(values[i]);
}

void validate_finite(const std::vector<uint16_t>& values, const char* name) {
  for (uint16_t value : values) {
    if ((value & 0x7f80u) == 0x7f80u) {
      throw std::invalid_argument(std::string(name) +
                                  ": holds NaN or infinity, expected finite values; check the adapter file");
    }
  }
}

struct Stack {
  const void* source;
  bool is_f32;
  int64_t rows;
  const char* name;
};

// Rows of one expert from one or two matrices with the same number of inputs, stacked.
std::vector<uint16_t> read_expert(const Stack* parts, int part_count, int64_t expert, int64_t inputs) {
  std::vector<uint16_t> all;
  for (int i = 0; i < part_count; ++i) {
    const int64_t count = parts[i].rows * inputs;
    if (count == 0) continue;
    std::vector<uint16_t> values(static_cast<size_t>(count));
    read_rows(parts[i].source, parts[i].is_f32, expert * count, count, values.data());
    validate_finite(values, parts[i].name);
    all.insert(all.end(), values.begin(), values.end());
  }
  return all;
}

void pack_matrix(const std::vector<uint16_t>& values, int64_t inputs, const PackedMatrix& target) {
  const int64_t rows = inputs == 0 ? 0 : static_cast<int64_t>(values.size()) / inputs;
  for (int64_t block = 0; block < target.blocks; ++block) {
    const int64_t first = block * kBlockColumns;
    const int64_t here = std::clamp<int64_t>(rows - first, 0, kBlockColumns);
    const WeightRows source{.first = values.data() + (here > 0 ? first * inputs : 0),
                            .stride = inputs,
                            .rows = here,
                            .count = inputs};
    pack_bf16_block(kReferencePacker, source, target.k,
                    const_cast<uint8_t*>(target.first) + block * target.stride);
  }
}

}  // namespace

AdapterLayout::AdapterLayout(int64_t experts, int64_t hidden, int64_t intermediate,
                             const AdapterRanks& ranks) {
  const int64_t intermediate_padded = round_up(intermediate, kStep);
  const auto b_of = [&](int64_t outputs, int64_t rank) {
    return reserve(experts, rank > 0 ? outputs : 0, round_up(rank, kRankStep));
  };
  gate_up_a = reserve(experts, ranks.gate + ranks.up, round_up(hidden, kStep));
  gate_b = b_of(intermediate_padded, ranks.gate);
  up_b = b_of(intermediate_padded, ranks.up);
  down_a = reserve(experts, ranks.down, intermediate_padded);
  down_b = b_of(hidden, ranks.down);
  bytes += kTileSlack;
}

AdapterLayout::Area AdapterLayout::reserve(int64_t experts, int64_t columns, int64_t k) {
  const Area area{.offset = bytes, .k = k, .blocks = blocks_of(columns)};
  bytes += experts * area.blocks * block_bytes(Format::bf16, k);
  return area;
}

int64_t packed_adapter_bytes(int64_t experts, int64_t hidden, int64_t intermediate,
                             const AdapterRanks& ranks) {
  const AdapterLayout layout(experts, hidden, intermediate, ranks);
  return static_cast<int64_t>(Memory::mapped_bytes(static_cast<size_t>(layout.bytes)));
}

Adapter::Adapter(int64_t experts, int64_t hidden, int64_t intermediate, const LowRankSource& gate,
                 const LowRankSource& up, const LowRankSource& down, float scale)
    : experts_(experts),
      hidden_(hidden),
      intermediate_(intermediate),
      ranks_{.gate = gate.rank, .up = up.rank, .down = down.rank},
      scale_(scale),
      layout_(experts, hidden, intermediate, ranks_) {
  if (!std::isfinite(scale))
    throw std::invalid_argument("scale: expected a finite number, got " + std::to_string(scale));
  memory_ = Memory(static_cast<size_t>(layout_.bytes));
  for (int64_t expert = 0; expert < experts; ++expert) {
    const Stack gate_up[] = {{gate.a, gate.a_is_f32, gate.rank, "gate_a"},
                             {up.a, up.a_is_f32, up.rank, "up_a"}};
    pack_matrix(read_expert(gate_up, 2, expert, hidden), hidden, gate_up_a(expert));
    const Stack gate_rows{gate.b, gate.b_is_f32, intermediate, "gate_b"};
    pack_matrix(read_expert(&gate_rows, 1, expert, gate.rank), gate.rank, gate_b(expert));
    const Stack up_rows{up.b, up.b_is_f32, intermediate, "up_b"};
    pack_matrix(read_expert(&up_rows, 1, expert, up.rank), up.rank, up_b(expert));
    const Stack down_columns{down.a, down.a_is_f32, down.rank, "down_a"};
    pack_matrix(read_expert(&down_columns, 1, expert, intermediate), intermediate, down_a(expert));
    const Stack down_rows{down.b, down.b_is_f32, hidden, "down_b"};
    pack_matrix(read_expert(&down_rows, 1, expert, down.rank), down.rank, down_b(expert));
  }
}

PackedMatrix Adapter::at(const AdapterLayout::Area& area, int64_t expert) const {
  const int64_t stride = block_bytes(Format::bf16, area.k);
  return {.first = memory_.data() + area.offset + expert * area.blocks * stride,
          .stride = stride,
          .blocks = area.blocks,
          .k = area.k};
}

int64_t z_width(int64_t rank) { return round_up(rank, kZStep); }

namespace {

int64_t row_bytes(const Isa& isa, int64_t count) {
  return count * (isa.row_format == RowFormat::f32 ? 4 : 2);
}

// The part of `columns` (A's columns [first, first + count)) that belongs to this target, converted into z.
void store_z(const Isa& isa, const ShrinkTarget& target, int64_t row, const float* columns, int64_t first,
             int64_t count, float scale) {
  const int64_t from = std::max(first, target.column);
  const int64_t to = std::min(first + count, target.column + target.rank);
  if (from >= to) return;
  uint8_t* z = target.z.row(row) + row_bytes(isa, from - target.column);
  isa.row_from_f32(columns + (from - first), to - from, scale, z);
}

void clear_tails(const Isa& isa, const ShrinkTarget& target, int64_t rows) {
  const int64_t tail = z_width(target.rank) - target.rank;
  for (int64_t row = 0; row < rows && tail > 0; ++row) {
    std::memset(target.z.row(row) + row_bytes(isa, target.rank), 0,
                static_cast<size_t>(row_bytes(isa, tail)));
  }
}

}  // namespace

void lora_shrink(const Isa& isa, const PackedMatrix& a, int64_t begin, int64_t end, Rows x, int64_t rows,
                 float scale, const ShrinkTarget* targets, int target_count, float* sums) {
  for (int i = 0; begin == 0 && i < target_count; ++i) clear_tails(isa, targets[i], rows);
  for (int64_t block = begin; block < end; block += kShrinkBlocks) {
    const int64_t blocks = std::min(kShrinkBlocks, end - block);
    const int64_t width = blocks * kBlockColumns;
    for (int64_t row = 0; row < rows; row += kShrinkRows) {
      const int64_t here = std::min(kShrinkRows, rows - row);
      isa.gemm_bf16({.a = x.row(row),
                     .a_stride = x.stride,
                     .rows = here,
                     .b = a.first + block * a.stride,
                     .b_stride = a.stride,
                     .blocks = blocks,
                     .k = a.k,
                     .c = sums,
                     .c_stride = width,
                     .c_block_stride = kBlockColumns,
                     .accumulate = false});
      for (int64_t r = 0; r < here; ++r) {
        for (int i = 0; i < target_count; ++i) {
          store_z(isa, targets[i], row + r, sums + r * width, block * kBlockColumns, width, scale);
        }
      }
    }
  }
}

void lora_prefetch(const PackedMatrix& b, int64_t begin, int64_t end) {
  constexpr int64_t kMostBytes =
      8192;  // more would push out what the base kernel keeps in the first-level cache
  const uint8_t* first = b.first + begin * b.stride;
  const int64_t bytes = std::min((end - begin) * b.stride, kMostBytes);
  for (int64_t offset = 0; offset < bytes; offset += 64) __builtin_prefetch(first + offset);
}

void lora_expand(const Isa& isa, const PackedMatrix& b, int64_t begin, int64_t end, Rows z, int64_t rows,
                 float* c, int64_t c_stride, int64_t c_block_stride) {
  if (b.blocks == 0) return;
  isa.gemm_bf16({.a = z.first,
                 .a_stride = z.stride,
                 .rows = rows,
                 .b = b.first + begin * b.stride,
                 .b_stride = b.stride,
                 .blocks = end - begin,
                 .k = b.k,
                 .c = c,
                 .c_stride = c_stride,
                 .c_block_stride = c_block_stride,
                 .accumulate = true});
}

}  // namespace kt
