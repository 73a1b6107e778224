// AVX-512 (F, BW, VL, DQ, VNNI). bf16 weights are widened to float in registers and multiplied by FMA: a
// 64-byte row of a block is 16 columns x 2 inputs, its low halves shifted up are the even inputs, its high
// halves masked the odd ones.
//
// Registers of a panel (12 rows x 2 blocks):  zmm0-23 sums | 2 widened weights | 1 broadcast activation |
// mask Few rows (1 to 4): one block at a time as one memory stream, four sums a row so that no FMA waits for
// the one before. int8 and int4: vpdpbusd, unsigned activations or nibbles against signed bytes.
#include "gemm_avx512.h"

#include <immintrin.h>

#include <cstdint>

namespace kt {
namespace {

constexpr int64_t kFewRows = 4;
constexpr int64_t kPanelRows = 12;
constexpr int64_t kPanelBlocks = 2;
constexpr int64_t kPairsAStep = 8;
// Inputs at a time once there are several panels: two blocks' part (32 KiB) and a panel's rows stay in the
// first-level cache, the part of all rows in the second.
constexpr int64_t kChunkInputs = 512;
// How far ahead of the loads a stream is fetched: about the bytes that arrive in one memory latency.
constexpr int64_t kStreamAhead = 2048;

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

struct Panel {
  const float* a;
  int64_t a_stride;  // floats
  const uint8_t* b;
  int64_t b_stride;
  int64_t pairs;
  float* c;
  int64_t c_stride;
  int64_t c_block_stride;
  bool accumulate;
  const uint8_t* ahead;  // the next panel's weights: `ahead_lines` cache lines of them are fetched each
                         // kPairsAStep pairs
  int64_t ahead_lines;
};

void store_sum(float* c, __m512 sum, bool accumulate) {
  _mm512_storeu_ps(c, accumulate ? _mm512_add_ps(_mm512_loadu_ps(c), sum) : sum);
}

template <int kRows, int kBlocks>
void run_panel(const Panel& panel) {
  __m512 sums[kRows][kBlocks];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kBlocks; ++j) sums[i][j] = _mm512_setzero_ps();
  }
  const uint8_t* ahead = panel.ahead;
  const float* a = panel.a;
  const uint8_t* b = panel.b;
  for (int64_t step = 0; step < panel.pairs; step += kPairsAStep) {
    for (int64_t line = 0; line < panel.ahead_lines; ++line, ahead += 64) {
      for (int j = 0; j < kBlocks; ++j) _mm_prefetch(ahead + j * panel.b_stride, _MM_HINT_T1);
    }
    const int64_t left = panel.pairs - step;
    const int64_t pairs = left < kPairsAStep ? left : kPairsAStep;
    for (int64_t pair = 0; pair < pairs; ++pair, a += 2, b += 64) {
      __m512i rows[kBlocks];
      __m512 weights[kBlocks];
#pragma GCC unroll 2
      for (int j = 0; j < kBlocks; ++j) {
        rows[j] = _mm512_load_si512(b + j * panel.b_stride);
        weights[j] = even_inputs(rows[j]);
      }
#pragma GCC unroll 12
      for (int i = 0; i < kRows; ++i) {
        const __m512 x = _mm512_set1_ps(a[i * panel.a_stride]);
#pragma GCC unroll 2
        for (int j = 0; j < kBlocks; ++j) sums[i][j] = _mm512_fmadd_ps(x, weights[j], sums[i][j]);
      }
#pragma GCC unroll 2
      for (int j = 0; j < kBlocks; ++j) weights[j] = odd_inputs(rows[j]);
#pragma GCC unroll 12
      for (int i = 0; i < kRows; ++i) {
        const __m512 x = _mm512_set1_ps(a[i * panel.a_stride + 1]);
#pragma GCC unroll 2
        for (int j = 0; j < kBlocks; ++j) sums[i][j] = _mm512_fmadd_ps(x, weights[j], sums[i][j]);
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
void run_rows(const Panel& panel, int64_t rows) {
  switch (rows) {
    case 1:
      return run_panel<1, kBlocks>(panel);
    case 2:
      return run_panel<2, kBlocks>(panel);
    case 3:
      return run_panel<3, kBlocks>(panel);
    case 4:
      return run_panel<4, kBlocks>(panel);
    case 5:
      return run_panel<5, kBlocks>(panel);
    case 6:
      return run_panel<6, kBlocks>(panel);
    case 7:
      return run_panel<7, kBlocks>(panel);
    case 8:
      return run_panel<8, kBlocks>(panel);
    case 9:
      return run_panel<9, kBlocks>(panel);
    case 10:
      return run_panel<10, kBlocks>(panel);
    case 11:
      return run_panel<11, kBlocks>(panel);
    default:
      return run_panel<12, kBlocks>(panel);
  }
}

template <int kRows>
void stream_block(const float* a, int64_t a_stride, const uint8_t* b, int64_t pairs, float* c,
                  int64_t c_stride, bool accumulate) {
  __m512 sums[kRows][4];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[i][j] = _mm512_setzero_ps();
  }
  int64_t pair = 0;
  for (; pair + 4 <= pairs; pair += 4, b += 256, a += 8) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      _mm_prefetch(b + 64 * j + kStreamAhead, _MM_HINT_T0);
      const __m512i row = _mm512_load_si512(b + 64 * j);
      const __m512 even = even_inputs(row);
      const __m512 odd = odd_inputs(row);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        sums[i][j] = _mm512_fmadd_ps(_mm512_set1_ps(a[i * a_stride + 2 * j]), even, sums[i][j]);
        sums[i][j] = _mm512_fmadd_ps(_mm512_set1_ps(a[i * a_stride + 2 * j + 1]), odd, sums[i][j]);
      }
    }
  }
  for (; pair < pairs; ++pair, b += 64, a += 2) {
    const __m512i row = _mm512_load_si512(b);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      sums[i][0] = _mm512_fmadd_ps(_mm512_set1_ps(a[i * a_stride]), even_inputs(row), sums[i][0]);
      sums[i][1] = _mm512_fmadd_ps(_mm512_set1_ps(a[i * a_stride + 1]), odd_inputs(row), sums[i][1]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    const __m512 sum =
        _mm512_add_ps(_mm512_add_ps(sums[i][0], sums[i][1]), _mm512_add_ps(sums[i][2], sums[i][3]));
    store_sum(c + i * c_stride, sum, accumulate);
  }
}

template <int kRows>
void stream_blocks(const GemmArgs& args) {
  for (int64_t block = 0; block < args.blocks; ++block) {
    stream_block<kRows>(static_cast<const float*>(args.a), args.a_stride / 4,
                        static_cast<const uint8_t*>(args.b) + block * args.b_stride, args.k / 2,
                        args.c + block * args.c_block_stride, args.c_stride, args.accumulate);
  }
}

void gemm_few_rows(const GemmArgs& args) {
  switch (args.rows) {
    case 1:
      return stream_blocks<1>(args);
    case 2:
      return stream_blocks<2>(args);
    case 3:
      return stream_blocks<3>(args);
    default:
      return stream_blocks<4>(args);
  }
}

// All rows against one or two blocks, `inputs` inputs from `first_input` on; `ahead` is what the next call
// will read.
void run_panels(const GemmArgs& args, int64_t block, int64_t blocks, int64_t first_input, int64_t inputs,
                const uint8_t* ahead) {
  const int64_t panels = (args.rows + kPanelRows - 1) / kPanelRows;
  const int64_t lines = (kPairsAStep + panels - 1) / panels;
  for (int64_t index = 0; index < panels; ++index) {
    // Panels of nearly equal height: 13 rows are 7 + 6, not 12 + 1.
    const int64_t begin = args.rows * index / panels;
    const int64_t rows = args.rows * (index + 1) / panels - begin;
    const uint8_t* a = static_cast<const uint8_t*>(args.a) + begin * args.a_stride + first_input * 4;
    const uint8_t* b = static_cast<const uint8_t*>(args.b) + block * args.b_stride + first_input * 32;
    const Panel panel{reinterpret_cast<const float*>(a),
                      args.a_stride / 4,
                      b,
                      args.b_stride,
                      inputs / 2,
                      args.c + begin * args.c_stride + block * args.c_block_stride,
                      args.c_stride,
                      args.c_block_stride,
                      args.accumulate || first_input > 0,
                      ahead + index * lines * (inputs / 2 / kPairsAStep) * 64,
                      lines};
    if (blocks == kPanelBlocks) {
      run_rows<2>(panel, rows);
    } else {
      run_rows<1>(panel, rows);
    }
  }
}

void gemm_bf16_avx512(const GemmArgs& args) {
  if (args.rows <= kFewRows) return gemm_few_rows(args);
  const int64_t chunk = args.rows <= kPanelRows || args.k <= kChunkInputs ? args.k : kChunkInputs;
  for (int64_t first = 0; first < args.k; first += chunk) {
    const int64_t inputs = args.k - first < chunk ? args.k - first : chunk;
    for (int64_t block = 0; block < args.blocks; block += kPanelBlocks) {
      const int64_t blocks = args.blocks - block < kPanelBlocks ? args.blocks - block : kPanelBlocks;
      const uint8_t* b = static_cast<const uint8_t*>(args.b) + first * 32;
      const bool last = block + kPanelBlocks >= args.blocks;
      const uint8_t* ahead = b + (last ? inputs * 32 : (block + kPanelBlocks) * args.b_stride);
      run_panels(args, block, blocks, first, inputs, ahead);
    }
  }
}

}  // namespace

extern const Isa kAvx512Isa = {"avx512",
                               usable,
                               true,
                               RowFormat::f32,
                               gemm_bf16_avx512,
                               gemm_int8_avx512,
                               gemm_int4_avx512,
                               f32_row_from_bf16_avx512,
                               f32_row_from_f32_avx512,
                               f32_from_bf16_avx512,
                               bf16_from_f32_avx512,
                               quantize_row_avx512,
                               silu_mul_avx512,
                               add_scaled_avx512};

}  // namespace kt
