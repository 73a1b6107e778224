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

// values[0, count) to the segment, zeros behind; count may be negative.
void quantize_segment(const float* source, int64_t count, const RowSegment& segment, uint8_t* row) {
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
      const auto rounded = static_cast<int8_t>(_mm_cvtss_si32(_mm_set_ss(value)));
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
