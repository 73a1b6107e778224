// Portable quantizing and interleaving, one loop a formula: what every other instruction set must equal to
// the bit, and the fallback where none fits.
#include <cstdint>

#include "packer.h"
#include "portable.h"

namespace kt {
namespace {

constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to nearest even

bool usable() { return true; }

void interleave(const uint8_t* first, int64_t stride, int64_t words, uint32_t flip, uint8_t* block) {
  constexpr int64_t kRun = 16;  // a cache line of each source row: all 16 stay in the first-level cache
  for (int64_t begin = 0; begin < words; begin += kRun) {
    const int64_t end = begin + kRun < words ? begin + kRun : words;
    for (int64_t column = 0; column < kBlockColumns; ++column) {
      for (int64_t i = begin; i < end; ++i) {
        uint32_t word;
        __builtin_memcpy(&word, first + column * stride + i * 4, 4);
        word ^= flip;
        __builtin_memcpy(block + i * 64 + column * 4, &word, 4);
      }
    }
  }
}

uint16_t largest(const uint16_t* source, int64_t count) {
  uint16_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto magnitude = static_cast<uint16_t>(source[i] & 0x7fff);
    most = magnitude > most ? magnitude : most;
  }
  return most;
}

int round_to_int(float value) { return static_cast<int>(value + kRoundMagic - kRoundMagic); }

void quantize_int8(const uint16_t* source, int64_t count, float inverse, int8_t* values) {
  for (int64_t i = 0; i < count; ++i) {
    values[i] = static_cast<int8_t>(round_to_int(widen(source[i]) * inverse));
  }
}

// The best so far: its size in eighths, its sums, and what they explain.
struct Best {
  int size = 0;
  float dot_wq = 0.0f;
  float dot_qq = 1.0f;
  float explained = 0.0f;
};

void try_size(const int16_t* w, int size, Best* best) {
  int dot_wq = 0;
  int dot_qq = 0;
  for (int i = 0; i < kInt4Group; ++i) {
    int q = (w[i] * size + (1 << 14)) >> 15;
    q = q < -8 ? -8 : q;
    q = q > 7 ? 7 : q;
    dot_wq += w[i] * q;
    dot_qq += q * q;
  }
  const auto wq = static_cast<float>(dot_wq);
  const auto qq = static_cast<float>(dot_qq);
  const float explained = wq * wq / qq;
  if (explained > best->explained) *best = {size, wq, qq, explained};
}

// `extreme` is the largest value, with its sign.
float best_scale(const float* w, float extreme) {
  int16_t integers[kInt4Group];
  const float unit = -kInt4Unit / extreme;
  for (int i = 0; i < kInt4Group; ++i) integers[i] = static_cast<int16_t>(round_to_int(w[i] * unit));
  Best best;
  for (int size = kInt4FirstSize; size <= kInt4LastSize; size += kInt4SizeStep) {
    try_size(integers, size, &best);
  }
  const int middle = best.size;
  try_size(integers, middle - 1, &best);
  try_size(integers, middle + 1, &best);
  return best.dot_wq / best.dot_qq * (extreme * (-1.0f / kInt4Unit));
}

uint8_t nibble(float value, float inverse) {
  const int q = round_to_int(value * inverse);
  return static_cast<uint8_t>((q < -8 ? -8 : q > 7 ? 7 : q) + 8);
}

// 16 bytes of nibbles; returns the scale.
uint16_t quantize_group(const uint16_t* source, uint16_t most, uint8_t* values) {
  float w[kInt4Group];
  float extreme = widen(most);
  for (int i = 0; i < kInt4Group; ++i) {
    w[i] = widen(source[i]);
    if (w[i] == -widen(most)) extreme = w[i];
  }
  const bool is_zero = widen(most) < kInt4Least;
  const uint16_t scale = is_zero ? uint16_t{0} : narrow(best_scale(w, extreme));
  const float inverse = is_zero ? 0.0f : 1.0f / widen(scale);  // the rounded scale decides the nibbles
  for (int i = 0; i < kInt4Group; i += 2) {
    values[i / 2] = static_cast<uint8_t>(nibble(w[i], inverse) | nibble(w[i + 1], inverse) << 4);
  }
  return scale;
}

bool quantize_int4(const uint16_t* source, int64_t count, uint8_t* values, uint16_t* scales) {
  for (int64_t first = 0; first < count; first += kInt4Group) {
    const int64_t here = count - first < kInt4Group ? count - first : kInt4Group;
    uint16_t group[kInt4Group] = {};
    uint8_t nibbles[kInt4Group / 2];
    __builtin_memcpy(group, source + first, static_cast<unsigned long>(here) * 2);
    const uint16_t most = largest(group, kInt4Group);
    if (most >= 0x7f80) return false;
    scales[first / kInt4Group] = quantize_group(group, most, nibbles);
    __builtin_memcpy(values + first / 2, nibbles, static_cast<unsigned long>(here + 1) / 2);
  }
  return true;
}

void split_int4(const uint8_t* values, int64_t groups, uint8_t* split) {
  for (int64_t group = 0; group < groups; ++group, values += 16, split += 16) {
    for (int i = 0; i < 16; ++i) {
      const int shift = i % 2 * 4;
      const int low = values[i / 2] >> shift & 15;
      const int high = values[8 + i / 2] >> shift & 15;
      split[i] = static_cast<uint8_t>(low | high << 4);
    }
  }
}

}  // namespace

extern const Packer kReferencePacker = {
    .name = "reference",
    .usable = usable,
    .interleave = interleave,
    .largest = largest,
    .quantize_int8 = quantize_int8,
    .quantize_int4 = quantize_int4,
    .split_int4 = split_int4,
};

}  // namespace kt
