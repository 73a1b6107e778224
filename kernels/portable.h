// The arithmetic that every CPU can do, for the reference and for the software model of AMX. In an anonymous
// namespace, so that each file that includes this keeps its own copy. Plain loops; nothing is blocked or
// unrolled by hand.
#pragma once

#include <cstdint>

#include "gemm.h"

namespace kt {
namespace {

inline float widen(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  __builtin_memcpy(&value, &word, 4);
  return value;
}

// Round to nearest even; NaN stays NaN.
inline uint16_t narrow(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline void f32_from_bf16(const uint16_t* source, int64_t count, float* target) {
  for (int64_t i = 0; i < count; ++i) target[i] = widen(source[i]);
}

inline void bf16_from_f32(const float* source, int64_t count, uint16_t* target) {
  for (int64_t i = 0; i < count; ++i) target[i] = narrow(source[i]);
}

inline void f32_row_from_bf16(const uint16_t* source, int64_t count, void* row) {
  f32_from_bf16(source, count, static_cast<float*>(row));
}

inline void f32_row_from_f32(const float* source, int64_t count, float scale, void* row) {
  for (int64_t i = 0; i < count; ++i) static_cast<float*>(row)[i] = source[i] * scale;
}

inline void bf16_row_from_bf16(const uint16_t* source, int64_t count, void* row) {
  __builtin_memcpy(row, source, static_cast<unsigned long>(count) * 2);
}

inline void bf16_row_from_f32(const float* source, int64_t count, float scale, void* row) {
  for (int64_t i = 0; i < count; ++i) static_cast<uint16_t*>(row)[i] = narrow(source[i] * scale);
}

inline void silu_mul(const float* gate_up, int64_t pairs, float* h) {
  for (int64_t pair = 0; pair < pairs; ++pair) {
    for (int64_t i = 0; i < kBlockColumns; ++i) {
      const float gate = gate_up[pair * 32 + i];
      h[pair * kBlockColumns + i] =
          gate / (1.0f + __builtin_expf(-gate)) * gate_up[pair * 32 + kBlockColumns + i];
    }
  }
}

inline void add_scaled(const float* source, float weight, int64_t count, float* sum) {
  for (int64_t i = 0; i < count; ++i) sum[i] += weight * source[i];
}

// values[0, count) to the segment, zeros behind; count may be negative.
inline void quantize_segment(const float* source, int64_t count, const RowSegment& segment, uint8_t* row) {
  float largest = 0.0f;
  bool bad = false;
  for (int64_t i = 0; i < (count < segment.count ? count : segment.count); ++i) {
    const float size = __builtin_fabsf(source[i]);
    bad |= !(size < __builtin_inff());
    largest = size > largest ? size : largest;
  }
  const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
  int32_t total = 0;
  for (int64_t group = 0; group < segment.count; group += kInt4Group) {
    int32_t sum = 0;
    for (int64_t i = group; i < group + kInt4Group; ++i) {
      const float value = i < count && !bad ? source[i] * inverse : 0.0f;
      const auto rounded = static_cast<int8_t>(__builtin_nearbyintf(value));
      row[segment.begin + i] = static_cast<uint8_t>(rounded);
      sum += rounded;
    }
    __builtin_memcpy(row + segment.group_offset + group / kInt4Group * 4, &sum, 4);
    total += sum;
  }
  const float scale = bad ? __builtin_nanf("") : largest / 127.0f;
  __builtin_memcpy(row + segment.scale_offset, &scale, 4);
  __builtin_memcpy(row + segment.sum_offset, &total, 4);
}

inline void quantize_row(const float* source, int64_t count, int64_t k, void* row) {
  for (int64_t i = 0; i < row_segments(k); ++i) {
    const RowSegment segment = row_segment(k, i);
    quantize_segment(source + segment.begin, count - segment.begin, segment, static_cast<uint8_t*>(row));
  }
}

}  // namespace
}  // namespace kt
