// Rows to the format of files, and the packing of such rows. Rounding and scales are in packer_<isa>.cpp.
#include "quantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace kt {
namespace {

constexpr uint16_t kInfinity = 0x7f80;

[[noreturn]] void refuse_value() {
  throw std::invalid_argument("weights: hold NaN or infinity, expected finite values; check the checkpoint");
}

}  // namespace

float quantize_int8_row(const Packer& packer, const uint16_t* row, int64_t inputs, int64_t begin,
                        int64_t count, int8_t* values) {
  const uint16_t most = packer.largest(row, inputs);
  if (most >= kInfinity) refuse_value();
  const float largest = float_from_bf16(most);
  const float inverse = 127.0f / largest;  // infinite for zeros, and for what is as good as zero
  packer.quantize_int8(row + begin, count, std::isfinite(inverse) ? inverse : 0.0f, values);
  return largest / 127.0f;
}

void quantize_int4_row(const Packer& packer, const uint16_t* source, int64_t count, uint8_t* values,
                       uint16_t* scales) {
  if (!packer.quantize_int4(source, count, values, scales)) refuse_value();
}

int64_t first_scale_not_finite(Format format, const QuantizedMatrix& matrix, int64_t rows) {
  const bool is_int8 = format == Format::int8;
  const int64_t count = is_int8 ? rows : rows * int4_row_groups(matrix.inputs);
  for (int64_t i = 0; i < count; ++i) {
    const float scale = is_int8 ? static_cast<const float*>(matrix.scales)[i]
                                : float_from_bf16(static_cast<const uint16_t*>(matrix.scales)[i]);
    if (!std::isfinite(scale)) return i;
  }
  return -1;
}

void quantize_matrix(const Packer& packer, Format format, const Bf16Matrix& matrix, uint8_t* values,
                     void* scales) {
  const int64_t inputs = matrix.inputs;
  for (int64_t row = 0; row < matrix.rows; ++row) {
    const uint16_t* source = matrix.values + row * inputs;
    if (format == Format::int8) {
      static_cast<float*>(scales)[row] = quantize_int8_row(packer, source, inputs, 0, inputs,
                                                           reinterpret_cast<int8_t*>(values + row * inputs));
    } else {
      quantize_int4_row(packer, source, inputs, values + row * int4_row_bytes(inputs),
                        static_cast<uint16_t*>(scales) + row * int4_row_groups(inputs));
    }
  }
}

void pack_int8_block(const Packer& packer, const QuantizedMatrix& matrix, const QuantizedPart& part,
                     int64_t k, uint8_t* block) {
  constexpr uint8_t kFlip = 0x80;  // value + 128
  const uint8_t* first = matrix.values + part.row * matrix.inputs + part.begin;
  const int64_t words = part.count / 4;
  interleave_rows(packer, first, matrix.inputs, part.rows, words, 0x01010101u * kFlip, block);
  std::memset(block + words * 64, kFlip, static_cast<size_t>(k / 4 - words) * 64);
  for (int64_t column = 0; column < part.rows; ++column) {
    for (int64_t i = words * 4; i < part.count; ++i) {
      block[words * 64 + column * 4 + i % 4] = first[column * matrix.inputs + i] ^ kFlip;
    }
  }
  float scales[kBlockColumns] = {};
  const auto* row_scales = static_cast<const float*>(matrix.scales);
  for (int64_t column = 0; column < part.rows; ++column) scales[column] = row_scales[part.row + column];
  std::memcpy(block + k * kBlockColumns, scales, sizeof(scales));
}

// A run of groups at a time goes through rows on the stack, whose missing nibbles are 8: zero.
void pack_int4_block(const Packer& packer, const QuantizedMatrix& matrix, const QuantizedPart& part,
                     int64_t k, uint8_t* block) {
  constexpr int64_t kRun = 16;  // groups
  constexpr int64_t kGroupBytes = kInt4Group / 2;
  const uint8_t* first = matrix.values + part.row * int4_row_bytes(matrix.inputs) + part.begin / 2;
  for (int64_t group = 0; group < k / kInt4Group; group += kRun) {
    const int64_t groups = std::min(kRun, k / kInt4Group - group);
    const int64_t begin = group * kGroupBytes;
    const int64_t bytes = std::clamp<int64_t>(int4_row_bytes(part.count) - begin, 0, groups * kGroupBytes);
    const bool ends_in_half = bytes > 0 && (begin + bytes) * 2 > part.count;
    uint8_t row[kRun * kGroupBytes];
    uint8_t rows[kBlockColumns][kRun * kGroupBytes];
    std::memset(rows, 0x88, sizeof(rows));
    std::memset(row, 0x88, sizeof(row));
    for (int64_t column = 0; column < part.rows; ++column) {
      std::memcpy(row, first + column * int4_row_bytes(matrix.inputs) + begin, static_cast<size_t>(bytes));
      if (ends_in_half) row[bytes - 1] = static_cast<uint8_t>((row[bytes - 1] & 0x0f) | 0x80);
      packer.split_int4(row, groups, rows[column]);
    }
    packer.interleave(rows[0], sizeof(rows[0]), groups * 4, 0, block + group * 256);
  }
  uint8_t* scales = block + k * 8;
  std::memset(scales, 0, static_cast<size_t>(k / kInt4Group * 32));
  const int64_t row_groups = int4_row_groups(matrix.inputs);
  const auto* from =
      static_cast<const uint16_t*>(matrix.scales) + part.row * row_groups + part.begin / kInt4Group;
  for (int64_t column = 0; column < part.rows; ++column) {
    for (int64_t group = 0; group < int4_row_groups(part.count); ++group) {
      std::memcpy(scales + group * 32 + column * 2, from + column * row_groups + group, 2);
    }
  }
}

}  // namespace kt
