// Elementwise AVX-512 work: conversions between the formats of activations, SiLU, the weighted sum. No matrix
// products.

#include <immintrin.h>

#include <cstdint>

#include "gemm_avx512.h"

namespace kt {
namespace {

__mmask16 first_lanes(int64_t count) {
  return count >= 16 ? 0xffff : static_cast<__mmask16>((1u << count) - 1u);
}

__m512 widen_bf16x16(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// Round to nearest even; NaN stays NaN. In integers, because plain AVX-512F has no bf16 conversion.
__m256i narrow_bf16x16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}

// e^x by 2^n * p(r), r = x - n ln 2 in two parts, Horner from the highest coefficient; within 2 ulp between
// -87 and 88.
__m512 exp_f32x16(__m512 x) {
  x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.0f)), _mm512_set1_ps(88.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, n);
}

// values[0, count) to the segment, zeros behind; count may be negative.
void quantize_segment(const float* source, int64_t count, const RowSegment& segment, uint8_t* row) {
  __m512 most = _mm512_setzero_ps();
  __mmask16 bad = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 size = _mm512_abs_ps(_mm512_maskz_loadu_ps(first_lanes(count - i), source + i));
    bad |= _mm512_cmp_ps_mask(size, _mm512_set1_ps(__builtin_inff()), _CMP_NLT_UQ);
    most = _mm512_max_ps(most, size);
  }
  const float largest = _mm512_reduce_max_ps(most);
  const __m512 inverse = _mm512_set1_ps(largest > 0.0f ? 127.0f / largest : 0.0f);
  int32_t total = 0;
  for (int64_t group = 0; group < segment.count; group += kInt4Group) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = group; i < group + kInt4Group; i += 16) {
      const __mmask16 lanes = i < count ? first_lanes(count - i) : static_cast<__mmask16>(0);
      const __m512 value = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, source + i), inverse);
      const __m512i rounded = _mm512_cvtps_epi32(value);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(row + segment.begin + i), _mm512_cvtsepi32_epi8(rounded));
      sum = _mm512_add_epi32(sum, rounded);
    }
    const int32_t group_sum = _mm512_reduce_add_epi32(sum);
    __builtin_memcpy(row + segment.group_offset + group / kInt4Group * 4, &group_sum, 4);
    total += group_sum;
  }
  const float scale = bad != 0 ? __builtin_nanf("") : largest / 127.0f;
  __builtin_memcpy(row + segment.scale_offset, &scale, 4);
  __builtin_memcpy(row + segment.sum_offset, &total, 4);
}

}  // namespace

void f32_from_bf16_avx512(const uint16_t* source, int64_t count, float* target) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 lanes = first_lanes(count - i);
    _mm512_mask_storeu_ps(target + i, lanes, widen_bf16x16(_mm256_maskz_loadu_epi16(lanes, source + i)));
  }
}

void bf16_from_f32_avx512(const float* source, int64_t count, uint16_t* target) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 lanes = first_lanes(count - i);
    _mm256_mask_storeu_epi16(target + i, lanes, narrow_bf16x16(_mm512_maskz_loadu_ps(lanes, source + i)));
  }
}

void f32_row_from_bf16_avx512(const uint16_t* source, int64_t count, void* row) {
  f32_from_bf16_avx512(source, count, static_cast<float*>(row));
}

void f32_row_from_f32_avx512(const float* source, int64_t count, float scale, void* row) {
  const __m512 scale_f32x16 = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 lanes = first_lanes(count - i);
    const __m512 value = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, source + i), scale_f32x16);
    _mm512_mask_storeu_ps(static_cast<float*>(row) + i, lanes, value);
  }
}

void bf16_row_from_bf16_avx512(const uint16_t* source, int64_t count, void* row) {
  __builtin_memcpy(row, source, static_cast<unsigned long>(count) * 2);
}

void bf16_row_from_f32_avx512(const float* source, int64_t count, float scale, void* row) {
  const __m512 scale_f32x16 = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 lanes = first_lanes(count - i);
    const __m512 value = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, source + i), scale_f32x16);
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(row) + i, lanes, narrow_bf16x16(value));
  }
}

void silu_mul_avx512(const float* gate_up, int64_t pairs, float* h) {
  const __m512 one = _mm512_set1_ps(1.0f);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const __m512 gate = _mm512_loadu_ps(gate_up + pair * 32);
    const __m512 up = _mm512_loadu_ps(gate_up + pair * 32 + 16);
    const __m512 exp_minus = exp_f32x16(_mm512_sub_ps(_mm512_setzero_ps(), gate));
    _mm512_storeu_ps(h + pair * 16, _mm512_mul_ps(_mm512_div_ps(gate, _mm512_add_ps(one, exp_minus)), up));
  }
}

void add_scaled_avx512(const float* source, float weight, int64_t count, float* sum) {
  const __m512 weight_f32x16 = _mm512_set1_ps(weight);
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 lanes = first_lanes(count - i);
    const __m512 value = _mm512_maskz_loadu_ps(lanes, source + i);
    _mm512_mask_storeu_ps(sum + i, lanes,
                          _mm512_fmadd_ps(value, weight_f32x16, _mm512_maskz_loadu_ps(lanes, sum + i)));
  }
}

void quantize_row_avx512(const float* source, int64_t count, int64_t k, void* row) {
  for (int64_t i = 0; i < row_segments(k); ++i) {
    const RowSegment segment = row_segment(k, i);
    const int64_t left = count - segment.begin;
    quantize_segment(source + segment.begin, left < segment.count ? left : segment.count, segment,
                     static_cast<uint8_t*>(row));
  }
}

}  // namespace kt
