// Packing of one block at a time, so that callers can spread blocks over threads and never hold a second copy
// of a matrix.
#include "pack.h"

#include <bit>
#include <cstring>

#include "format.h"

namespace kt {

int64_t block_bytes(Format format, int64_t k) {
  const FormatRow& row = row_of(format);
  const int64_t scales = row.scale_inputs > 0 ? k / row.scale_inputs : 1;
  return kBlockColumns * (k * row.bits / 8 + scales * row.scale_bytes);
}

int64_t row_segments(int64_t k) { return (k + kSegmentInputs - 1) / kSegmentInputs; }

RowSegment row_segment(int64_t k, int64_t index) {
  const int64_t segments = row_segments(k);
  const int64_t steps = k / kStep;
  const int64_t begin = steps * index / segments * kStep;
  const int64_t end = steps * (index + 1) / segments * kStep;
  return {.begin = begin,
          .count = end - begin,
          .scale_offset = k + index * 4,
          .sum_offset = k + segments * 4 + index * 4,
          .group_offset = k + segments * 8 + begin / kInt4Group * 4};
}

int64_t quantized_row_bytes(int64_t k) { return k + row_segments(k) * 8 + k / kInt4Group * 4; }

float float_from_bf16(uint16_t value) { return std::bit_cast<float>(static_cast<uint32_t>(value) << 16); }

uint16_t bf16_from_float(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

void interleave_rows(const Packer& packer, const uint8_t* first, int64_t stride, int64_t rows, int64_t words,
                     uint32_t flip, uint8_t* block) {
  if (rows == kBlockColumns) return packer.interleave(first, stride, words, flip, block);
  for (int64_t word = 0; word < words; ++word) {
    for (int64_t column = 0; column < kBlockColumns; ++column) {
      uint32_t value = 0;
      if (column < rows) std::memcpy(&value, first + column * stride + word * 4, 4);
      value ^= flip;
      std::memcpy(block + word * 64 + column * 4, &value, 4);
    }
  }
}

void pack_bf16_block(const Packer& packer, const WeightRows& source, int64_t k, uint8_t* block) {
  const int64_t pairs = source.count / 2;
  interleave_rows(packer, reinterpret_cast<const uint8_t*>(source.first), source.stride * 2, source.rows,
                  pairs, 0, block);
  std::memset(block + pairs * 64, 0, static_cast<size_t>((k / 2 - pairs) * 64));
  if (source.count % 2 == 0) return;
  for (int64_t column = 0; column < source.rows; ++column) {
    std::memcpy(block + pairs * 64 + column * 4, source.first + column * source.stride + source.count - 1, 2);
  }
}

}  // namespace kt
