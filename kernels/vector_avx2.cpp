// Rows of activations with AVX2: conversion, quantization, SiLU, weighted sums.
#include <immintrin.h>

#include <cstdint>

#include "gemm_avx2.h"

namespace kt {
namespace {

__m256 widen(__m128i bits) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)); }

float widen_one(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  __builtin_memcpy(&value, &word, 4);
  return value;
}

// Round to nearest even; NaN stays NaN.
__m128i narrow(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i result = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(result, result), 0xd8);
  return _mm256_castsi256_si128(packed);
}

// As in vector_avx512.cpp, with 2^n put together from its exponent bits.
__m256 exp_f32x8(__m256 x) {
  x = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(-87.0f)), _mm256_set1_ps(88.0f));
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504088896341f)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 p = _mm256_set1_ps(1.9875691500e-4f);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
  p = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), _mm256_add_ps(r, _mm256_set1_ps(1.0f)));
  const __m256i exponent =
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(p, _mm256_castsi256_ps(exponent));
}

// The first `count` of eight floats, zeros behind.
__m256 load_first(const float* source, int64_t count) {
  if (count >= 8) return _mm256_loadu_ps(source);
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_maskload_ps(source, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lanes));
}

float largest_of(__m256 values) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

int32_t sum_of(__m256i values) {
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
  const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1)));
}

// The largest magnitude of `count` values (0 if there are none), NaN if one is NaN or infinite.
float largest_magnitude(const float* source, int64_t count) {
  const __m256 infinity = _mm256_set1_ps(__builtin_inff());
  __m256 most = _mm256_setzero_ps();
  __m256 finite = _mm256_cmp_ps(most, infinity, _CMP_LT_OQ);
  for (int64_t i = 0; i < count; i += 8) {
    const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), load_first(source + i, count - i));
    finite = _mm256_and_ps(finite, _mm256_cmp_ps(size, infinity, _CMP_LT_OQ));
    most = _mm256_max_ps(most, size);
  }
  return _mm256_movemask_ps(finite) == 0xff ? largest_of(most) : __builtin_nanf("");
}

// 32 values, of which `count` are there, to bytes; returns their sum.
int32_t quantize_group(const float* source, int64_t count, __m256 inverse, uint8_t* bytes) {
  __m256i values[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256 value = _mm256_mul_ps(load_first(source + 8 * i, count - 8 * i), inverse);
    // The lowest byte, as a conversion would take it: what is out of range becomes 0.
    values[i] = _mm256_srai_epi32(_mm256_slli_epi32(_mm256_cvtps_epi32(value), 24), 24);
  }
  // Packing leaves the values in fours, first those of the lower lanes.
  const __m256i packed =
      _mm256_packs_epi16(_mm256_packs_epi32(values[0], values[1]), _mm256_packs_epi32(values[2], values[3]));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes), _mm256_permutevar8x32_epi32(packed, order));
  return sum_of(
      _mm256_add_epi32(_mm256_add_epi32(values[0], values[1]), _mm256_add_epi32(values[2], values[3])));
}

// values[0, count) to the segment, zeros behind; count may be negative.
void quantize_segment(const float* source, int64_t count, const RowSegment& segment, uint8_t* row) {
  const float largest = largest_magnitude(source, count < segment.count ? count : segment.count);
  const bool bad = largest != largest;
  if (bad) count = 0;
  const __m256 inverse = _mm256_set1_ps(largest > 0.0f ? 127.0f / largest : 0.0f);
  int32_t total = 0;
  for (int64_t group = 0; group < segment.count; group += kInt4Group) {
    const int32_t sum = quantize_group(source + group, count - group, inverse, row + segment.begin + group);
    __builtin_memcpy(row + segment.group_offset + group / kInt4Group * 4, &sum, 4);
    total += sum;
  }
  const float scale = bad ? __builtin_nanf("") : largest / 127.0f;
  __builtin_memcpy(row + segment.scale_offset, &scale, 4);
  __builtin_memcpy(row + segment.sum_offset, &total, 4);
}

}  // namespace

void f32_from_bf16_avx2(const uint16_t* source, int64_t count, float* target) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(target + i, widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
  }
  for (; i < count; ++i) target[i] = widen_one(source[i]);
}

void bf16_from_f32_avx2(const float* source, int64_t count, uint16_t* target) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i), narrow(_mm256_loadu_ps(source + i)));
  }
  for (; i < count; ++i) {
    const __m128i one = narrow(_mm256_set1_ps(source[i]));
    target[i] = static_cast<uint16_t>(_mm_extract_epi16(one, 0));
  }
}

void f32_row_from_bf16_avx2(const uint16_t* source, int64_t count, void* row) {
  f32_from_bf16_avx2(source, count, static_cast<float*>(row));
}

void f32_row_from_f32_avx2(const float* source, int64_t count, float scale, void* row) {
  float* target = static_cast<float*>(row);
  for (int64_t i = 0; i < count; ++i) target[i] = source[i] * scale;
}

void silu_mul_avx2(const float* gate_up, int64_t pairs, float* h) {
  const __m256 one = _mm256_set1_ps(1.0f);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    for (int half = 0; half < 16; half += 8) {
      const __m256 gate = _mm256_loadu_ps(gate_up + pair * 32 + half);
      const __m256 up = _mm256_loadu_ps(gate_up + pair * 32 + 16 + half);
      const __m256 exp_minus = exp_f32x8(_mm256_sub_ps(_mm256_setzero_ps(), gate));
      const __m256 silu = _mm256_div_ps(gate, _mm256_add_ps(one, exp_minus));
      _mm256_storeu_ps(h + pair * 16 + half, _mm256_mul_ps(silu, up));
    }
  }
}

void add_scaled_avx2(const float* source, float weight, int64_t count, float* sum) {
  const __m256 weight_f32x8 = _mm256_set1_ps(weight);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256 added = _mm256_fmadd_ps(_mm256_loadu_ps(source + i), weight_f32x8, _mm256_loadu_ps(sum + i));
    _mm256_storeu_ps(sum + i, added);
  }
  for (; i < count; ++i) sum[i] += weight * source[i];
}

void quantize_row_avx2(const float* source, int64_t count, int64_t k, void* row) {
  for (int64_t i = 0; i < row_segments(k); ++i) {
    const RowSegment segment = row_segment(k, i);
    quantize_segment(source + segment.begin, count - segment.begin, segment, static_cast<uint8_t*>(row));
  }
}

}  // namespace kt
