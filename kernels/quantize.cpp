// Rounding and scale search, and the packing of quantized rows.
#include "quantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

// The search below is the slow part of quantizing a model: built for three CPUs, chosen at load. Sanitizers
// cannot run the choice.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__) && \
    !defined(__SANITIZE_ADDRESS__)
#define KT_FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define KT_FOR_EACH_CPU
#endif

namespace kt {
namespace {

constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to nearest even

// Sizes that the group's largest value may be given, from "clipped by a fifth" to "a little room": each is
// tried on both sides of zero, since -8 reaches one further than 7.
constexpr int kCandidates = 24;
constexpr float kFirstSize = 5.8f;
constexpr float kSizeStep = 0.15f;

// With q = clamp(round(factor * w)), the best scale is dot(w, q) / dot(q, q), and what it explains of the
// group is dot(w, q)^2 / dot(q, q). Sixteen partial sums in a fixed order: the same result on every CPU.
struct Fit {
  float dot_wq;
  float dot_qq;
};

__attribute__((always_inline)) inline Fit fit(const float* w, float factor) {
  float wq[16] = {};
  float qq[16] = {};
  for (int half = 0; half < 32; half += 16) {
    for (int i = 0; i < 16; ++i) {
      const float value = w[half + i];
      float q = (value * factor + kRoundMagic) - kRoundMagic;
      q = q < -8.0f ? -8.0f : q;
      q = q > 7.0f ? 7.0f : q;
      wq[i] += value * q;
      qq[i] += q * q;
    }
  }
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) {
      wq[i] += wq[i + width];
      qq[i] += qq[i + width];
    }
  }
  return {wq[0], qq[0]};
}

KT_FOR_EACH_CPU float best_scale(const float* w, float largest) {
  float best = 0.0f;
  float most_explained = 0.0f;
  for (int i = 0; i < 2 * kCandidates; ++i) {
    const float size = kFirstSize + kSizeStep * static_cast<float>(i / 2);
    const Fit found = fit(w, (i % 2 == 0 ? -size : size) / largest);
    if (found.dot_qq <= 0.0f || found.dot_wq * found.dot_wq <= most_explained * found.dot_qq) continue;
    most_explained = found.dot_wq * found.dot_wq / found.dot_qq;
    best = found.dot_wq / found.dot_qq;
  }
  return best;
}

[[noreturn]] void refuse_value() {
  throw std::invalid_argument("weights: hold NaN or infinity, expected finite values; check the checkpoint");
}

void read_group(const uint16_t* source, int64_t count, float* w, float* largest) {
  for (int64_t i = 0; i < kInt4Group; ++i) w[i] = i < count ? float_from_bf16(source[i]) : 0.0f;
  for (int64_t i = 0; i < kInt4Group; ++i) {
    if (!std::isfinite(w[i])) refuse_value();
    *largest = std::max(*largest, std::fabs(w[i]));
  }
}

uint8_t nibble(float value, float inverse) {
  const float q = std::clamp((value * inverse + kRoundMagic) - kRoundMagic, -8.0f, 7.0f);
  return static_cast<uint8_t>(static_cast<int>(q) + 8);
}

}  // namespace

void quantize_int8_row(const uint16_t* source, int64_t count, int8_t* values, float* scale) {
  float largest = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float value = float_from_bf16(source[i]);
    if (!std::isfinite(value)) refuse_value();
    largest = std::max(largest, std::fabs(value));
  }
  const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    values[i] = static_cast<int8_t>(
        static_cast<int>(float_from_bf16(source[i]) * inverse + kRoundMagic - kRoundMagic));
  }
  *scale = largest / 127.0f;
}

void quantize_int4_row(const uint16_t* source, int64_t count, uint8_t* values, uint16_t* scales) {
  for (int64_t first = 0; first < count; first += kInt4Group) {
    const int64_t here = std::min(kInt4Group, count - first);
    float w[kInt4Group];
    float largest = 0.0f;
    read_group(source + first, here, w, &largest);
    const uint16_t scale = bf16_from_float(largest > 0.0f ? best_scale(w, largest) : 0.0f);
    const float used = float_from_bf16(scale);  // the rounded scale decides the nibbles
    const float inverse = used != 0.0f ? 1.0f / used : 0.0f;
    scales[first / kInt4Group] = scale;
    for (int64_t i = 0; i < here; i += 2) {
      const uint8_t high = i + 1 < here ? nibble(w[i + 1], inverse) : 8;
      values[(first + i) / 2] = static_cast<uint8_t>(nibble(w[i], inverse) | high << 4);
    }
  }
}

void pack_int8_block(const QuantizedMatrix& matrix, const QuantizedPart& part, int64_t k, uint8_t* block) {
  constexpr int64_t kRun = 1024;  // as in pack_bf16_block
  std::memset(block, 128, static_cast<size_t>(k * kBlockColumns));
  for (int64_t first = 0; first < part.count; first += kRun) {
    const int64_t last = std::min(first + kRun, part.count);
    for (int64_t column = 0; column < part.rows; ++column) {
      const uint8_t* row = matrix.values + (part.row + column) * matrix.inputs + part.begin;
      int64_t i = first;
      for (; i + 4 <= last; i += 4) {
        uint32_t word;
        std::memcpy(&word, row + i, 4);
        word ^= 0x80808080u;
        std::memcpy(block + i * 16 + column * 4, &word, 4);
      }
      for (; i < last; ++i) block[i / 4 * 64 + column * 4 + i % 4] = row[i] ^ 0x80u;
    }
  }
  float scales[kBlockColumns] = {};
  const auto* row_scales = static_cast<const float*>(matrix.scales);
  for (int64_t column = 0; column < part.rows; ++column) scales[column] = row_scales[part.row + column];
  std::memcpy(block + k * kBlockColumns, scales, sizeof(scales));
}

void pack_int4_block(const QuantizedMatrix& matrix, const QuantizedPart& part, int64_t k, uint8_t* block) {
  std::memset(block, 0x88, static_cast<size_t>(k * 8));
  std::memset(block + k * 8, 0, static_cast<size_t>(k / kInt4Group * 32));
  const int64_t row_groups = int4_row_groups(matrix.inputs);
  for (int64_t column = 0; column < part.rows; ++column) {
    const int64_t row = part.row + column;
    const uint8_t* values = matrix.values + row * int4_row_bytes(matrix.inputs) + part.begin / 2;
    const auto* scales =
        static_cast<const uint16_t*>(matrix.scales) + row * row_groups + part.begin / kInt4Group;
    for (int64_t i = 0; i < part.count; ++i) {
      const int value = i % 2 == 0 ? values[i / 2] & 15 : values[i / 2] >> 4;
      const int64_t in_group = i % kInt4Group;
      uint8_t& both = block[i / kInt4Group * 256 + in_group % 16 / 4 * 64 + column * 4 + in_group % 4];
      both = static_cast<uint8_t>(in_group < 16 ? (both & 0xf0) | value : (both & 0x0f) | value << 4);
    }
    for (int64_t group = 0; group < int4_row_groups(part.count); ++group) {
      std::memcpy(block + k * 8 + group * 32 + column * 2, scales + group, 2);
    }
  }
}

}  // namespace kt
