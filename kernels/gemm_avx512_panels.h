// Products with bf16 weights on AVX-512, all but how a pair of inputs is multiplied: panels of rows, streams
// of few rows, and the order of blocks and inputs. gemm_avx512.cpp and gemm_avx512_bf16.cpp give the rest as
// `Pairs`:
//
//   kInputBytes, kInputsOutside   an activation's size; whether all blocks pass over some inputs before the
//   next add_to_panel                  sums[row][block] += one pair of inputs add_to_stream, add_last the
//   same for one block with four sums per row; at the end of a stream
//
// In an anonymous namespace: each file keeps its own copy, compiled with its own flags (see gemm.h).
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "gemm_avx512.h"

namespace kt {
namespace {

constexpr int64_t kPanelRows = 12;
constexpr int64_t kPanelBlocks = 2;
constexpr int64_t kStreamSums = 4;    // of a row, so that no product waits for the one before
constexpr int64_t kPairsPerTurn = 8;  // between two turns of fetching ahead
// Inputs at a time once there are several panels: two blocks' part (32 KiB) and a panel's rows stay in the
// first-level cache, the part of all rows in the second.
constexpr int64_t kChunkInputs = 512;

void store_sum(float* c, __m512 sum, bool accumulate) {
  _mm512_storeu_ps(c, accumulate ? _mm512_add_ps(_mm512_loadu_ps(c), sum) : sum);
}

// Some rows, one or two blocks, some inputs.
struct Panel {
  const uint8_t* a;
  int64_t a_stride;
  const uint8_t* b;
  int64_t b_stride;
  int64_t pairs;
  float* c;
  int64_t c_stride;
  int64_t c_block_stride;
  bool accumulate;
  const uint8_t*
      ahead;  // what the next call reads: `ahead_lines` cache lines of each block are fetched per turn
  int64_t ahead_lines;
};

template <typename Pairs, int kRows, int kBlocks>
void run_panel(const Panel& panel) {
  __m512 sums[kRows][kBlocks];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kBlocks; ++j) sums[i][j] = _mm512_setzero_ps();
  }
  const uint8_t* ahead = panel.ahead;
  const uint8_t* a = panel.a;
  const uint8_t* b = panel.b;
  for (int64_t turn = 0; turn < panel.pairs; turn += kPairsPerTurn) {
    for (int64_t line = 0; line < panel.ahead_lines; ++line, ahead += 64) {
#pragma GCC unroll 2
      for (int j = 0; j < kBlocks; ++j) _mm_prefetch(ahead + j * panel.b_stride, _MM_HINT_T1);
    }
    const int64_t left = panel.pairs - turn;
    const int64_t pairs = left < kPairsPerTurn ? left : kPairsPerTurn;
    for (int64_t pair = 0; pair < pairs; ++pair, a += 2 * Pairs::kInputBytes, b += 64) {
      Pairs::add_to_panel(sums, a, panel.a_stride, b, panel.b_stride);
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

template <typename Pairs, int kBlocks>
void run_rows(const Panel& panel, int64_t rows) {
  constexpr void (*kRun[])(const Panel&) = {
      run_panel<Pairs, 1, kBlocks>,  run_panel<Pairs, 2, kBlocks>,  run_panel<Pairs, 3, kBlocks>,
      run_panel<Pairs, 4, kBlocks>,  run_panel<Pairs, 5, kBlocks>,  run_panel<Pairs, 6, kBlocks>,
      run_panel<Pairs, 7, kBlocks>,  run_panel<Pairs, 8, kBlocks>,  run_panel<Pairs, 9, kBlocks>,
      run_panel<Pairs, 10, kBlocks>, run_panel<Pairs, 11, kBlocks>, run_panel<Pairs, 12, kBlocks>};
  kRun[rows - 1](panel);
}

// All rows against one or two blocks, `inputs` inputs from `first_input` on; `ahead` is what the next call
// will read.
template <typename Pairs>
void run_panels(const GemmArgs& args, int64_t block, int64_t blocks, int64_t first_input, int64_t inputs,
                const uint8_t* ahead) {
  const int64_t panels = (args.rows + kPanelRows - 1) / kPanelRows;
  const int64_t lines = (kPairsPerTurn + panels - 1) / panels;
  for (int64_t index = 0; index < panels; ++index) {
    // Panels of nearly equal height: 13 rows are 7 + 6, not 12 + 1.
    const int64_t begin = args.rows * index / panels;
    const int64_t rows = args.rows * (index + 1) / panels - begin;
    const Panel panel{
        .a = static_cast<const uint8_t*>(args.a) + begin * args.a_stride + first_input * Pairs::kInputBytes,
        .a_stride = args.a_stride,
        .b = static_cast<const uint8_t*>(args.b) + block * args.b_stride + first_input * 32,
        .b_stride = args.b_stride,
        .pairs = inputs / 2,
        .c = args.c + begin * args.c_stride + block * args.c_block_stride,
        .c_stride = args.c_stride,
        .c_block_stride = args.c_block_stride,
        .accumulate = args.accumulate || first_input > 0,
        .ahead = ahead + index * lines * (inputs / 2 / kPairsPerTurn) * 64,
        .ahead_lines = lines};
    if (blocks == kPanelBlocks) {
      run_rows<Pairs, 2>(panel, rows);
    } else {
      run_rows<Pairs, 1>(panel, rows);
    }
  }
}

// Two blocks' part of some inputs stays in the first-level cache while all rows pass over it, and the next
// part is fetched meanwhile.
template <typename Pairs>
void gemm_many_rows(const GemmArgs& args) {
  const int64_t chunk = args.rows <= kPanelRows || args.k <= kChunkInputs ? args.k : kChunkInputs;
  const auto inputs_from = [&](int64_t first) { return args.k - first < chunk ? args.k - first : chunk; };
  const auto blocks_from = [&](int64_t block) {
    return args.blocks - block < kPanelBlocks ? args.blocks - block : kPanelBlocks;
  };
  const auto* b = static_cast<const uint8_t*>(args.b);
  if constexpr (Pairs::kInputsOutside) {
    for (int64_t first = 0; first < args.k; first += chunk) {
      const int64_t inputs = inputs_from(first);
      for (int64_t block = 0; block < args.blocks; block += kPanelBlocks) {
        const bool last = block + kPanelBlocks >= args.blocks;
        const int64_t ahead = last ? inputs * 32 : (block + kPanelBlocks) * args.b_stride;
        run_panels<Pairs>(args, block, blocks_from(block), first, inputs, b + first * 32 + ahead);
      }
    }
  } else {
    for (int64_t block = 0; block < args.blocks; block += kPanelBlocks) {
      const int64_t blocks = blocks_from(block);
      for (int64_t first = 0; first < args.k; first += chunk) {
        const int64_t inputs = inputs_from(first);
        const bool last = first + inputs >= args.k;
        const int64_t ahead = last ? blocks * args.b_stride : (first + inputs) * 32;
        run_panels<Pairs>(args, block, blocks, first, inputs, b + block * args.b_stride + ahead);
      }
    }
  }
}

template <typename Pairs, int kRows>
void stream_block(const GemmArgs& args, const uint8_t* b, float* c) {
  __m512 sums[kRows][kStreamSums];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kStreamSums; ++j) sums[i][j] = _mm512_setzero_ps();
  }
  const auto* a = static_cast<const uint8_t*>(args.a);
  const int64_t pairs = args.k / 2;
  int64_t pair = 0;
  for (; pair + kStreamSums <= pairs; pair += kStreamSums, b += 256, a += 8 * Pairs::kInputBytes) {
#pragma GCC unroll 4
    for (int j = 0; j < kStreamSums; ++j) {
      _mm_prefetch(b + 64 * j + kStreamAhead, _MM_HINT_T0);
      Pairs::add_to_stream(sums, j, a + 2 * j * Pairs::kInputBytes, args.a_stride,
                           _mm512_load_si512(b + 64 * j));
    }
  }
  for (; pair < pairs; ++pair, b += 64, a += 2 * Pairs::kInputBytes) {
    Pairs::add_last(sums, a, args.a_stride, _mm512_load_si512(b));
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    const __m512 sum =
        _mm512_add_ps(_mm512_add_ps(sums[i][0], sums[i][1]), _mm512_add_ps(sums[i][2], sums[i][3]));
    store_sum(c + i * args.c_stride, sum, args.accumulate);
  }
}

// One block after the other as one memory stream.
template <typename Pairs, int kRows>
void stream_blocks(const GemmArgs& args) {
  for (int64_t block = 0; block < args.blocks; ++block) {
    stream_block<Pairs, kRows>(args, static_cast<const uint8_t*>(args.b) + block * args.b_stride,
                               args.c + block * args.c_block_stride);
  }
}

template <typename Pairs>
void gemm_bf16(const GemmArgs& args) {
  constexpr void (*kStream[kStreamRows])(const GemmArgs&) = {
      stream_blocks<Pairs, 1>, stream_blocks<Pairs, 2>, stream_blocks<Pairs, 3>, stream_blocks<Pairs, 4>};
  if (args.rows > kStreamRows) return gemm_many_rows<Pairs>(args);
  if (args.rows > 0) kStream[args.rows - 1](args);
}

}  // namespace
}  // namespace kt
