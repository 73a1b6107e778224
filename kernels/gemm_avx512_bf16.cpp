// AVX-512 with BF16: activations stay bf16, and vdpbf16ps multiplies 16 columns x 2 inputs per step with
// float sums.
//
// Registers of a panel (12 rows x 2 blocks):  zmm0-23 sums | 2 weights | 1 broadcast pair of activations
#include "gemm_avx512_panels.h"

namespace kt {
namespace {

bool usable() { return kAvx512Isa.usable() && __builtin_cpu_supports("avx512bf16"); }

// Activations are bf16.
struct Bf16Pairs {
  static constexpr int64_t kInputBytes = 2;
  static constexpr bool kInputsOutside = false;

  static __m512 dot(__m512 sum, const uint8_t* a, __m512i weights) {
    return _mm512_dpbf16_ps(
        sum, reinterpret_cast<__m512bh>(_mm512_set1_epi32(*reinterpret_cast<const int32_t*>(a))),
        reinterpret_cast<__m512bh>(weights));
  }

  template <int kRows, int kBlocks>
  static void add_to_panel(__m512 (&sums)[kRows][kBlocks], const uint8_t* a, int64_t a_stride,
                           const uint8_t* b, int64_t b_stride) {
    __m512i weights[kBlocks];
#pragma GCC unroll 2
    for (int j = 0; j < kBlocks; ++j) weights[j] = _mm512_load_si512(b + j * b_stride);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kBlocks; ++j) sums[i][j] = dot(sums[i][j], a + i * a_stride, weights[j]);
    }
  }

  template <int kRows>
  static void add_to_stream(__m512 (&sums)[kRows][kStreamSums], int j, const uint8_t* a, int64_t a_stride,
                            __m512i weights) {
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) sums[i][j] = dot(sums[i][j], a + i * a_stride, weights);
  }

  template <int kRows>
  static void add_last(__m512 (&sums)[kRows][kStreamSums], const uint8_t* a, int64_t a_stride,
                       __m512i weights) {
    add_to_stream(sums, 0, a, a_stride, weights);
  }
};

}  // namespace

void gemm_bf16_avx512_bf16(const GemmArgs& args) { gemm_bf16<Bf16Pairs>(args); }

extern const Isa kAvx512Bf16Isa = {
    .name = "avx512_bf16",
    .usable = usable,
    .automatic = true,
    .row_format = RowFormat::bf16,
    .gemm_bf16 = gemm_bf16_avx512_bf16,
    .gemm_int8 = gemm_int8_avx512,
    .gemm_int4 = gemm_int4_avx512,
    .row_from_bf16 = bf16_row_from_bf16_avx512,
    .row_from_f32 = bf16_row_from_f32_avx512,
    .f32_from_bf16 = f32_from_bf16_avx512,
    .bf16_from_f32 = bf16_from_f32_avx512,
    .quantize_row = quantize_row_avx512,
    .silu_mul = silu_mul_avx512,
    .add_scaled = add_scaled_avx512,
};

}  // namespace kt
