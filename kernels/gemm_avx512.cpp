// AVX-512 (F, BW, VL, DQ, VNNI). bf16 weights are widened to float in registers and multiplied by FMA: a
// 64-byte row of a block is 16 columns x 2 inputs, its low halves shifted up are the even inputs, its high
// halves masked the odd ones.
//
// Registers of a panel (12 rows x 2 blocks):  zmm0-23 sums | 2 widened weights | 1 broadcast activation |
// mask
#include "gemm_avx512_panels.h"

namespace kt {
namespace {

bool usable() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

__m512 even_inputs(__m512i row) { return _mm512_castsi512_ps(_mm512_slli_epi32(row, 16)); }
__m512 odd_inputs(__m512i row) {
  return _mm512_castsi512_ps(_mm512_and_si512(row, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// Activations are floats.
struct FloatPairs {
  static constexpr int64_t kInputBytes = 4;
  static constexpr bool kInputsOutside = true;

  static __m512 input(const uint8_t* a, int64_t index) {
    return _mm512_set1_ps(reinterpret_cast<const float*>(a)[index]);
  }

  // Even inputs of all rows, then odd ones: no FMA waits for the one before.
  template <int kRows, int kBlocks>
  static void add_to_panel(__m512 (&sums)[kRows][kBlocks], const uint8_t* a, int64_t a_stride,
                           const uint8_t* b, int64_t b_stride) {
    __m512i rows[kBlocks];
    __m512 weights[kBlocks];
#pragma GCC unroll 2
    for (int j = 0; j < kBlocks; ++j) {
      rows[j] = _mm512_load_si512(b + j * b_stride);
      weights[j] = even_inputs(rows[j]);
    }
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const __m512 x = input(a + i * a_stride, 0);
#pragma GCC unroll 2
      for (int j = 0; j < kBlocks; ++j) sums[i][j] = _mm512_fmadd_ps(x, weights[j], sums[i][j]);
    }
#pragma GCC unroll 2
    for (int j = 0; j < kBlocks; ++j) weights[j] = odd_inputs(rows[j]);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const __m512 x = input(a + i * a_stride, 1);
#pragma GCC unroll 2
      for (int j = 0; j < kBlocks; ++j) sums[i][j] = _mm512_fmadd_ps(x, weights[j], sums[i][j]);
    }
  }

  template <int kRows>
  static void add_to_stream(__m512 (&sums)[kRows][kStreamSums], int j, const uint8_t* a, int64_t a_stride,
                            __m512i weights) {
    const __m512 even = even_inputs(weights);
    const __m512 odd = odd_inputs(weights);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      sums[i][j] = _mm512_fmadd_ps(input(a + i * a_stride, 0), even, sums[i][j]);
      sums[i][j] = _mm512_fmadd_ps(input(a + i * a_stride, 1), odd, sums[i][j]);
    }
  }

  template <int kRows>
  static void add_last(__m512 (&sums)[kRows][kStreamSums], const uint8_t* a, int64_t a_stride,
                       __m512i weights) {
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      sums[i][0] = _mm512_fmadd_ps(input(a + i * a_stride, 0), even_inputs(weights), sums[i][0]);
      sums[i][1] = _mm512_fmadd_ps(input(a + i * a_stride, 1), odd_inputs(weights), sums[i][1]);
    }
  }
};

}  // namespace

extern const Isa kAvx512Isa = {
    .name = "avx512",
    .usable = usable,
    .automatic = true,
    .row_format = RowFormat::f32,
    .gemm_bf16 = gemm_bf16<FloatPairs>,
    .gemm_int8 = gemm_int8_avx512,
    .gemm_int4 = gemm_int4_avx512,
    .row_from_bf16 = f32_row_from_bf16_avx512,
    .row_from_f32 = f32_row_from_f32_avx512,
    .f32_from_bf16 = f32_from_bf16_avx512,
    .bf16_from_f32 = bf16_from_f32_avx512,
    .quantize_row = quantize_row_avx512,
    .silu_mul = silu_mul_avx512,
    .add_scaled = add_scaled_avx512,
};

}  // namespace kt
