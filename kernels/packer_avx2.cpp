// Quantizing and interleaving with AVX2, without fused multiply-add: each lane does what packer_reference.cpp
// does.
//
// The search for int4 scales takes eight groups at once, one a lane. A register holds two of the 32 integers
// of each group (16 bits each), 16 registers hold them all; vpmulhrsw scales and rounds, vpmaddwd sums both
// products in 32 bits.
#include <immintrin.h>

#include <cstdint>

#include "packer.h"

namespace kt {
namespace {

constexpr int64_t kLanes = 8;
constexpr int64_t kChunk = kLanes * kInt4Group;

bool usable() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2");
}

__m256i load(const void* place) { return _mm256_loadu_si256(static_cast<const __m256i*>(place)); }
__m128i load_half(const void* place) { return _mm_loadu_si128(static_cast<const __m128i*>(place)); }
void store(void* place, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(place), value); }

// out[i] = word i of eight rows.
void transpose(const uint8_t* first, int64_t stride, __m256i* out) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const uint8_t* from = first + 16 * half;
    __m256i rows[4];  // row i, row i + 4
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      rows[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(load_half(from + i * stride)),
                                        load_half(from + (i + 4) * stride), 1);
    }
    const __m256i low01 = _mm256_unpacklo_epi32(rows[0], rows[1]);
    const __m256i high01 = _mm256_unpackhi_epi32(rows[0], rows[1]);
    const __m256i low23 = _mm256_unpacklo_epi32(rows[2], rows[3]);
    const __m256i high23 = _mm256_unpackhi_epi32(rows[2], rows[3]);
    out[4 * half + 0] = _mm256_unpacklo_epi64(low01, low23);
    out[4 * half + 1] = _mm256_unpackhi_epi64(low01, low23);
    out[4 * half + 2] = _mm256_unpacklo_epi64(high01, high23);
    out[4 * half + 3] = _mm256_unpackhi_epi64(high01, high23);
  }
}

// Packed weights are far larger than any cache and not read soon: whole lines go past the caches, which saves
// fetching what is overwritten. The fence makes them seen before anything that tells of them.
void interleave(const uint8_t* first, int64_t stride, int64_t words, uint32_t flip, uint8_t* block) {
  const __m256i flips = _mm256_set1_epi32(static_cast<int>(flip));
  int64_t word = 0;
  for (; word + 8 <= words; word += 8) {
    __m256i low[8];
    __m256i high[8];
    transpose(first + word * 4, stride, low);
    transpose(first + 8 * stride + word * 4, stride, high);
    auto* lines = reinterpret_cast<__m256i*>(block + word * 64);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      _mm256_stream_si256(lines + 2 * i, _mm256_xor_si256(low[i], flips));
      _mm256_stream_si256(lines + 2 * i + 1, _mm256_xor_si256(high[i], flips));
    }
  }
  _mm_sfence();
  for (; word < words; ++word) {
    for (int64_t column = 0; column < kBlockColumns; ++column) {
      uint32_t value;
      __builtin_memcpy(&value, first + column * stride + word * 4, 4);
      value ^= flip;
      __builtin_memcpy(block + word * 64 + column * 4, &value, 4);
    }
  }
}

__m256i magnitudes(const uint16_t* source) {
  return _mm256_and_si256(load(source), _mm256_set1_epi16(0x7fff));
}

uint16_t largest_of(__m256i values) {
  const __m128i most = _mm_max_epu16(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
  const __m128i least = _mm_minpos_epu16(_mm_xor_si128(most, _mm_set1_epi16(-1)));
  return static_cast<uint16_t>(~_mm_cvtsi128_si32(least));
}

uint16_t largest(const uint16_t* source, int64_t count) {
  __m256i most = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) most = _mm256_max_epu16(most, magnitudes(source + i));
  uint16_t found = largest_of(most);
  for (; i < count; ++i) {
    const auto magnitude = static_cast<uint16_t>(source[i] & 0x7fff);
    found = magnitude > found ? magnitude : found;
  }
  return found;
}

float widen_one(uint16_t bits) {
  return _mm_cvtss_f32(
      _mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(static_cast<uint32_t>(bits) << 16))));
}

__m256 widen(__m128i bits) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)); }

// round(source * factor), eight values.
__m256i scaled(const uint16_t* source, __m256 factor) {
  return _mm256_cvtps_epi32(_mm256_mul_ps(widen(load_half(source)), factor));
}

// 32 of them, as bytes in order, saturated.
__m256i scaled_bytes(const uint16_t* source, __m256 factor) {
  const __m256i low = _mm256_packs_epi32(scaled(source, factor), scaled(source + 8, factor));
  const __m256i high = _mm256_packs_epi32(scaled(source + 16, factor), scaled(source + 24, factor));
  return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high),
                                     _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

void quantize_int8(const uint16_t* source, int64_t count, float inverse, int8_t* values) {
  const __m256 factor = _mm256_set1_ps(inverse);
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) store(values + i, scaled_bytes(source + i, factor));
  for (; i < count; ++i) {
    values[i] = static_cast<int8_t>(_mm_cvtss_si32(_mm_set_ss(widen_one(source[i]) * inverse)));
  }
}

// The integers of eight groups, w[i] holding values of one group a lane. Which two of them does not matter.
void read_integers(const uint16_t* source, const float* units, __m256i* w) {
  alignas(32) uint8_t rows[kChunk * 2];
  const __m256i odd = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  for (int64_t group = 0; group < kLanes; ++group) {
    const __m256 unit = _mm256_set1_ps(units[group]);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256i pairs = load(source + group * kInt4Group + half * 16);
      const __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
      const __m256 second = _mm256_castsi256_ps(_mm256_and_si256(pairs, odd));
      store(rows + group * 64 + half * 32,
            _mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(first, unit)),
                               _mm256_cvtps_epi32(_mm256_mul_ps(second, unit))));
    }
  }
  transpose(rows, 64, w);
  transpose(rows + 32, 64, w + 8);
}

// The best so far of each group: its sums, what they explain, and the size in both halves of a lane.
struct Best {
  __m256 explained = _mm256_setzero_ps();
  __m256 dot_wq = _mm256_setzero_ps();
  __m256 dot_qq = _mm256_set1_ps(1.0f);
  __m256i size = _mm256_setzero_si256();
};

// Below kInt4FirstClipped there is nothing to clamp.
template <bool kClamps>
void try_size(const __m256i* w, __m256i size, Best* best) {
  __m256i dot_wq = _mm256_setzero_si256();
  __m256i dot_qq = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int i = 0; i < 16; ++i) {
    __m256i q = _mm256_mulhrs_epi16(w[i], size);
    if (kClamps) q = _mm256_max_epi16(_mm256_min_epi16(q, _mm256_set1_epi16(7)), _mm256_set1_epi16(-8));
    dot_wq = _mm256_add_epi32(dot_wq, _mm256_madd_epi16(w[i], q));
    dot_qq = _mm256_add_epi32(dot_qq, _mm256_madd_epi16(q, q));
  }
  const __m256 wq = _mm256_cvtepi32_ps(dot_wq);
  const __m256 qq = _mm256_cvtepi32_ps(dot_qq);
  const __m256 explained = _mm256_div_ps(_mm256_mul_ps(wq, wq), qq);
  const __m256 better = _mm256_cmp_ps(explained, best->explained, _CMP_GT_OQ);
  best->explained = _mm256_blendv_ps(best->explained, explained, better);
  best->dot_wq = _mm256_blendv_ps(best->dot_wq, wq, better);
  best->dot_qq = _mm256_blendv_ps(best->dot_qq, qq, better);
  best->size = _mm256_blendv_epi8(best->size, size, _mm256_castps_si256(better));
}

// Of eight groups, whose largest values are `extremes`, with their signs.
__m256 best_scales(const __m256i* w, __m256 extremes) {
  Best best;
  int size = kInt4FirstSize;
  for (; size < kInt4FirstClipped; size += kInt4SizeStep) {
    try_size<false>(w, _mm256_set1_epi16(static_cast<int16_t>(size)), &best);
  }
  for (; size <= kInt4LastSize; size += kInt4SizeStep) {
    try_size<true>(w, _mm256_set1_epi16(static_cast<int16_t>(size)), &best);
  }
  const __m256i middle = best.size;
  try_size<true>(w, _mm256_sub_epi16(middle, _mm256_set1_epi16(1)), &best);
  try_size<true>(w, _mm256_add_epi16(middle, _mm256_set1_epi16(1)), &best);
  return _mm256_mul_ps(_mm256_div_ps(best.dot_wq, best.dot_qq),
                       _mm256_mul_ps(extremes, _mm256_set1_ps(-1.0f / kInt4Unit)));
}

// Round to nearest even; for finite values.
__m256i narrow(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
}

__m128i nibbles(const uint16_t* source, __m256 inverse) {
  const __m256i q = _mm256_min_epi8(_mm256_max_epi8(scaled_bytes(source, inverse), _mm256_set1_epi8(-8)),
                                    _mm256_set1_epi8(7));
  const __m256i unsigned_q = _mm256_add_epi8(q, _mm256_set1_epi8(8));
  const __m256i pairs = _mm256_maddubs_epi16(unsigned_q, _mm256_set1_epi16(0x1001));  // low + 16 * high
  return _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
}

// Bits of the largest value of a group, with its sign; of the two signs the negative one where both are
// there. From 0x7f80 on, without the sign, where a value is NaN or infinite.
uint16_t extreme_of(const uint16_t* source) {
  const uint16_t most = largest_of(_mm256_max_epu16(magnitudes(source), magnitudes(source + 16)));
  const auto negative = static_cast<uint16_t>(most | 0x8000);
  const __m256i wanted = _mm256_set1_epi16(static_cast<int16_t>(negative));
  const __m256i equal = _mm256_or_si256(_mm256_cmpeq_epi16(load(source), wanted),
                                        _mm256_cmpeq_epi16(load(source + 16), wanted));
  return _mm256_testz_si256(equal, equal) ? most : negative;
}

bool quantize_chunk(const uint16_t* source, uint8_t* values, uint16_t* scales) {
  alignas(32) uint32_t bits[kLanes];
  for (int64_t group = 0; group < kLanes; ++group) {
    const uint16_t found = extreme_of(source + group * kInt4Group);
    if ((found & 0x7fff) >= 0x7f80) return false;
    bits[group] = static_cast<uint32_t>(found) << 16;
  }
  const __m256 extremes = _mm256_castsi256_ps(load(bits));
  const __m256 sizes = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), extremes);
  const __m256 nonzero = _mm256_cmp_ps(sizes, _mm256_set1_ps(kInt4Least), _CMP_GE_OQ);
  alignas(32) float factors[kLanes];
  _mm256_store_ps(factors, _mm256_and_ps(_mm256_div_ps(_mm256_set1_ps(-kInt4Unit), extremes), nonzero));
  __m256i w[16];
  read_integers(source, factors, w);
  const __m256i scale = _mm256_and_si256(narrow(best_scales(w, extremes)), _mm256_castps_si256(nonzero));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(scales),
                   _mm_packus_epi32(_mm256_castsi256_si128(scale), _mm256_extracti128_si256(scale, 1)));
  const __m256 used = _mm256_castsi256_ps(_mm256_slli_epi32(scale, 16));
  _mm256_store_ps(factors, _mm256_and_ps(_mm256_div_ps(_mm256_set1_ps(1.0f), used), nonzero));
  for (int64_t group = 0; group < kLanes; ++group) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(values + group * kInt4Group / 2),
                     nibbles(source + group * kInt4Group, _mm256_set1_ps(factors[group])));
  }
  return true;
}

// The row's end goes through a chunk that is filled up with zeros.
bool quantize_int4(const uint16_t* source, int64_t count, uint8_t* values, uint16_t* scales) {
  int64_t first = 0;
  for (; first + kChunk <= count; first += kChunk) {
    if (!quantize_chunk(source + first, values + first / 2, scales + first / kInt4Group)) return false;
  }
  if (first == count) return true;
  uint16_t padded[kChunk] = {};
  uint8_t padded_values[kChunk / 2];
  uint16_t padded_scales[kLanes];
  const int64_t left = count - first;
  __builtin_memcpy(padded, source + first, static_cast<unsigned long>(left) * 2);
  if (!quantize_chunk(padded, padded_values, padded_scales)) return false;
  __builtin_memcpy(values + first / 2, padded_values, static_cast<unsigned long>(left + 1) / 2);
  const int64_t groups = (left + kInt4Group - 1) / kInt4Group;
  __builtin_memcpy(scales + first / kInt4Group, padded_scales, static_cast<unsigned long>(groups) * 2);
  return true;
}

__m256i split(__m256i values) {
  const __m256i mask = _mm256_set1_epi8(15);
  const __m256i even = _mm256_and_si256(values, mask);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi16(values, 4), mask);
  return _mm256_or_si256(_mm256_unpacklo_epi8(even, odd),
                         _mm256_slli_epi16(_mm256_unpackhi_epi8(even, odd), 4));
}

void split_int4(const uint8_t* values, int64_t groups, uint8_t* to) {
  int64_t group = 0;
  for (; group + 2 <= groups; group += 2) store(to + group * 16, split(load(values + group * 16)));
  if (group == groups) return;
  const __m128i last = load_half(values + group * 16);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to + group * 16),
                   _mm256_castsi256_si128(split(_mm256_castsi128_si256(last))));
}

}  // namespace

extern const Packer kAvx2Packer = {
    .name = "avx2",
    .usable = usable,
    .interleave = interleave,
    .largest = largest,
    .quantize_int8 = quantize_int8,
    .quantize_int4 = quantize_int4,
    .split_int4 = split_int4,
};

}  // namespace kt
