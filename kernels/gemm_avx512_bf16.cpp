// AVX-512 with BF16: activations stay bf16, and vdpbf16ps multiplies 16 columns x 2 inputs a step with float
// sums.
//
// Registers of a panel (12 rows x 2 blocks):  zmm0-23 sums | 2 weights | 1 broadcast pair of activations
// Few rows (1 to 4): one block after the other as one memory stream, four sums a row.
// Many rows: two blocks' part of some inputs stays in the first-level cache while all rows pass over it, and
// the next part is fetched meanwhile.
#include <immintrin.h>

#include <cstdint>

#include "gemm_avx512.h"

namespace kt {
namespace {

constexpr int64_t kFewRows = 4;
constexpr int64_t kPanelRows = 12;
constexpr int64_t kPanelBlocks = 2;
constexpr int64_t kPairsAStep = 8;
constexpr int64_t kChunkInputs = 512;   // two blocks: 32 KiB
constexpr int64_t kStreamAhead = 2048;  // bytes that a stream is fetched ahead of its loads

void store_sum(float* c, __m512 sum, bool accumulate) {
  _mm512_storeu_ps(c, accumulate ? _mm512_add_ps(_mm512_loadu_ps(c), sum) : sum);
}

__m512 dot(__m512 sum, int32_t pair, __m512i weights) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)),
                          reinterpret_cast<__m512bh>(weights));
}

// Some rows, one or two blocks, some inputs. `ahead` is what the next call reads: `ahead_lines` cache lines
// of each block are fetched every kPairsAStep pairs.
struct DotPanel {
  const uint8_t* a;
  int64_t a_stride;
  const uint8_t* b;
  int64_t b_stride;
  int64_t pairs;
  float* c;
  int64_t c_stride;
  int64_t c_block_stride;
  bool accumulate;
  const uint8_t* ahead;
  int64_t ahead_lines;
};

template <int kRows, int kBlocks>
void run_dot_panel(const DotPanel& panel) {
  __m512 sums[kRows][kBlocks];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kBlocks; ++j) sums[i][j] = _mm512_setzero_ps();
  }
  const uint8_t* ahead = panel.ahead;
  const uint8_t* a = panel.a;
  const uint8_t* b = panel.b;
  for (int64_t step = 0; step < panel.pairs; step += kPairsAStep) {
    for (int64_t line = 0; line < panel.ahead_lines; ++line, ahead += 64) {
#pragma GCC unroll 2
      for (int j = 0; j < kBlocks; ++j) _mm_prefetch(ahead + j * panel.b_stride, _MM_HINT_T1);
    }
    const int64_t left = panel.pairs - step;
    const int64_t pairs = left < kPairsAStep ? left : kPairsAStep;
    for (int64_t pair = 0; pair < pairs; ++pair, a += 4, b += 64) {
      __m512i weights[kBlocks];
#pragma GCC unroll 2
      for (int j = 0; j < kBlocks; ++j) weights[j] = _mm512_load_si512(b + j * panel.b_stride);
#pragma GCC unroll 12
      for (int i = 0; i < kRows; ++i) {
        const int32_t x = *reinterpret_cast<const int32_t*>(a + i * panel.a_stride);
#pragma GCC unroll 2
        for (int j = 0; j < kBlocks; ++j) sums[i][j] = dot(sums[i][j], x, weights[j]);
      }
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kBlocks; ++j) {
      store_sum(panel.c + i * panel.c_stride + j * panel.c_block_stride, sums[i][j], panel.accumulate);
    }
  }
}

template <int kBlocks>
void run_dot_rows(const DotPanel& panel, int64_t rows) {
  switch (rows) {
    case 1:
      return run_dot_panel<1, kBlocks>(panel);
    case 2:
      return run_dot_panel<2, kBlocks>(panel);
    case 3:
      return run_dot_panel<3, kBlocks>(panel);
    case 4:
      return run_dot_panel<4, kBlocks>(panel);
    case 5:
      return run_dot_panel<5, kBlocks>(panel);
    case 6:
      return run_dot_panel<6, kBlocks>(panel);
    case 7:
      return run_dot_panel<7, kBlocks>(panel);
    case 8:
      return run_dot_panel<8, kBlocks>(panel);
    case 9:
      return run_dot_panel<9, kBlocks>(panel);
    case 10:
      return run_dot_panel<10, kBlocks>(panel);
    case 11:
      return run_dot_panel<11, kBlocks>(panel);
    default:
      return run_dot_panel<12, kBlocks>(panel);
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

// All rows against one or two blocks, `inputs` inputs from `first_input` on; `ahead` is what the next call
// will read.
void run_dot_panels(const GemmArgs& args, int64_t block, int64_t blocks, int64_t first_input, int64_t inputs,
                    const uint8_t* ahead) {
  const int64_t panels = (args.rows + kPanelRows - 1) / kPanelRows;
  const int64_t lines = (kPairsAStep + panels - 1) / panels;
  for (int64_t index = 0; index < panels; ++index) {
    // Panels of nearly equal height: 13 rows are 7 + 6, not 12 + 1.
    const int64_t begin = args.rows * index / panels;
    const int64_t rows = args.rows * (index + 1) / panels - begin;
    const DotPanel panel{static_cast<const uint8_t*>(args.a) + begin * args.a_stride + first_input * 2,
                         args.a_stride,
                         static_cast<const uint8_t*>(args.b) + block * args.b_stride + first_input * 32,
                         args.b_stride,
                         inputs / 2,
                         args.c + begin * args.c_stride + block * args.c_block_stride,
                         args.c_stride,
                         args.c_block_stride,
                         args.accumulate || first_input > 0,
                         ahead + index * lines * (inputs / 2 / kPairsAStep) * 64,
                         lines};
    if (blocks == kPanelBlocks) {
      run_dot_rows<2>(panel, rows);
    } else {
      run_dot_rows<1>(panel, rows);
    }
  }
}

}  // namespace

void gemm_bf16_avx512_bf16(const GemmArgs& args) {
  if (args.rows <= kFewRows) return gemm_bf16_few_rows(args);
  const int64_t chunk = args.rows <= kPanelRows || args.k <= kChunkInputs ? args.k : kChunkInputs;
  for (int64_t block = 0; block < args.blocks; block += kPanelBlocks) {
    const int64_t blocks = args.blocks - block < kPanelBlocks ? args.blocks - block : kPanelBlocks;
    for (int64_t first = 0; first < args.k; first += chunk) {
      const int64_t inputs = args.k - first < chunk ? args.k - first : chunk;
      const uint8_t* b = static_cast<const uint8_t*>(args.b) + block * args.b_stride;
      const uint8_t* ahead = first + inputs < args.k ? b + (first + inputs) * 32 : b + blocks * args.b_stride;
      run_dot_panels(args, block, blocks, first, inputs, ahead);
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
