// AVX-512 with BF16: activations stay bf16, and vdpbf16ps multiplies 16 columns x 2 inputs a step with float
// sums.
//
// Registers of a panel (6 rows x 4 blocks):  zmm0-23 sums | 4 weights | 1 broadcast pair of activations
// Few rows (1 to 4): one block after the other as one memory stream, four sums a row.
#include <immintrin.h>

#include <cstdint>

#include "gemm_avx512.h"

namespace kt {
namespace {

constexpr int64_t kFewRows = 4;
constexpr int64_t kPanelRows = 6;
constexpr int64_t kPanelBlocks = 4;
constexpr int64_t kStreamAhead = 2048;  // bytes that a stream is fetched ahead of its loads

void store_sum(float* c, __m512 sum, bool accumulate) {
  _mm512_storeu_ps(c, accumulate ? _mm512_add_ps(_mm512_loadu_ps(c), sum) : sum);
}

__m512 dot(__m512 sum, int32_t pair, __m512i weights) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)),
                          reinterpret_cast<__m512bh>(weights));
}

// Pointers of one tile of work: rows from `a`, blocks from `b`.
struct DotPanel {
  const uint8_t* a;
  const uint8_t* b;
  float* c;
};

template <int kRows, int kBlocks>
void run_dot_panel(const GemmArgs& args, const DotPanel& panel) {
  __m512 sums[kRows][kBlocks];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kBlocks; ++j) sums[i][j] = _mm512_setzero_ps();
  }
  const uint8_t* b = panel.b;
  for (int64_t pair = 0; pair < args.k / 2; ++pair, b += 64) {
    __m512i weights[kBlocks];
#pragma GCC unroll 4
    for (int j = 0; j < kBlocks; ++j) weights[j] = _mm512_load_si512(b + j * args.b_stride);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const int32_t x = reinterpret_cast<const int32_t*>(panel.a + i * args.a_stride)[pair];
#pragma GCC unroll 4
      for (int j = 0; j < kBlocks; ++j) sums[i][j] = dot(sums[i][j], x, weights[j]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kBlocks; ++j) {
      store_sum(panel.c + i * args.c_stride + j * args.c_block_stride, sums[i][j], args.accumulate);
    }
  }
}

template <int kBlocks>
void run_dot_rows(const GemmArgs& args, const DotPanel& panel, int64_t rows) {
  switch (rows) {
    case 1:
      return run_dot_panel<1, kBlocks>(args, panel);
    case 2:
      return run_dot_panel<2, kBlocks>(args, panel);
    case 3:
      return run_dot_panel<3, kBlocks>(args, panel);
    case 4:
      return run_dot_panel<4, kBlocks>(args, panel);
    case 5:
      return run_dot_panel<5, kBlocks>(args, panel);
    default:
      return run_dot_panel<6, kBlocks>(args, panel);
  }
}

// Up to four rows: one block after the other as one memory stream, four sums a row.
template <int kRows>
void stream_dot_block(const GemmArgs& args, const uint8_t* b, float* c) {
  __m512 sums[kRows][4];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[i][j] = _mm512_setzero_ps();
  }
  const auto* a = static_cast<const uint8_t*>(args.a);
  const int64_t pairs = args.k / 2;
  int64_t pair = 0;
  for (; pair + 4 <= pairs; pair += 4, b += 256) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      _mm_prefetch(b + 64 * j + kStreamAhead, _MM_HINT_T0);
      const __m512i weights = _mm512_load_si512(b + 64 * j);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        sums[i][j] =
            dot(sums[i][j], reinterpret_cast<const int32_t*>(a + i * args.a_stride)[pair + j], weights);
      }
    }
  }
  for (; pair < pairs; ++pair, b += 64) {
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const int32_t x = reinterpret_cast<const int32_t*>(a + i * args.a_stride)[pair];
      sums[i][0] = dot(sums[i][0], x, _mm512_load_si512(b));
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    const __m512 sum =
        _mm512_add_ps(_mm512_add_ps(sums[i][0], sums[i][1]), _mm512_add_ps(sums[i][2], sums[i][3]));
    store_sum(c + i * args.c_stride, sum, args.accumulate);
  }
}

void gemm_bf16_few_rows(const GemmArgs& args) {
  for (int64_t block = 0; block < args.blocks; ++block) {
    const uint8_t* b = static_cast<const uint8_t*>(args.b) + block * args.b_stride;
    float* c = args.c + block * args.c_block_stride;
    switch (args.rows) {
      case 1:
        stream_dot_block<1>(args, b, c);
        break;
      case 2:
        stream_dot_block<2>(args, b, c);
        break;
      case 3:
        stream_dot_block<3>(args, b, c);
        break;
      default:
        stream_dot_block<4>(args, b, c);
    }
  }
}

bool usable() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}

void run_blocks(const GemmArgs& args, const DotPanel& panel, int64_t rows, int64_t blocks) {
  switch (blocks) {
    case 1:
      return run_dot_rows<1>(args, panel, rows);
    case 2:
      return run_dot_rows<2>(args, panel, rows);
    case 3:
      return run_dot_rows<3>(args, panel, rows);
    default:
      return run_dot_rows<4>(args, panel, rows);
  }
}

}  // namespace

void gemm_bf16_avx512_bf16(const GemmArgs& args) {
  if (args.rows <= kFewRows) return gemm_bf16_few_rows(args);
  const int64_t panels = (args.rows + kPanelRows - 1) / kPanelRows;
  for (int64_t block = 0; block < args.blocks; block += kPanelBlocks) {
    const int64_t blocks = args.blocks - block < kPanelBlocks ? args.blocks - block : kPanelBlocks;
    for (int64_t index = 0; index < panels; ++index) {
      const int64_t row = args.rows * index / panels;
      const DotPanel panel{static_cast<const uint8_t*>(args.a) + row * args.a_stride,
                           static_cast<const uint8_t*>(args.b) + block * args.b_stride,
                           args.c + row * args.c_stride + block * args.c_block_stride};
      run_blocks(args, panel, args.rows * (index + 1) / panels - row, blocks);
    }
  }
}

extern const Isa kAvx512Bf16Isa = {"avx512_bf16",
                                   usable,
                                   true,
                                   RowFormat::bf16,
                                   gemm_bf16_avx512_bf16,
                                   gemm_int8_avx512,
                                   gemm_int4_avx512,
                                   bf16_row_from_bf16_avx512,
                                   bf16_row_from_f32_avx512,
                                   f32_from_bf16_avx512,
                                   bf16_from_f32_avx512,
                                   quantize_row_avx512,
                                   silu_mul_avx512,
                                   add_scaled_avx512};

}  // namespace kt
