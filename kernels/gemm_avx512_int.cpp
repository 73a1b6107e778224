// int8 and int4 weights with AVX-512 VNNI: vpdpbusd multiplies unsigned weight bytes (int8 + 128, or nibbles
// 0 to 15) by signed activations, four inputs per step, into int32.
//
// Registers of a panel:  int8  12 rows x 2 blocks: zmm0-23 sums | 2 weights | 1 broadcast activation
//                        int4  4 rows x 2 blocks: 8 int32 sums of the group | 8 float sums | 4 nibble rows |
//                        1 mask | 1 broadcast
// The products are inline assembly: g++ 12 spills around _mm512_dpbusd_epi32 with 24 sums, which halves the
// speed.
#include <immintrin.h>

#include <cstdint>

#include "gemm_avx512.h"

namespace kt {
namespace {

constexpr int64_t kPanelRows = 12;
constexpr int64_t kInt4PanelRows = 4;
constexpr int64_t kPanelBlocks = 2;
constexpr int64_t kWidenRows = 32;  // from here on widening int4 to int8 first is the faster way
constexpr int64_t kAheadStep = 64;  // inputs between two turns of fetching ahead

void multiply_add(__m512i& sum, __m512i weights, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(x));
}

// The same with four activations from memory for all columns: where they are used once, a broadcast into a
// register would be an instruction more.
void multiply_add_four(__m512i& sum, __m512i weights, const uint8_t* values) {
  struct __attribute__((may_alias)) Four {
    uint8_t bytes[4];
  };
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(weights), "m"(*reinterpret_cast<const Four*>(values)));
}

__m512i broadcast4(const uint8_t* values) {
  int32_t word;
  __builtin_memcpy(&word, values, 4);
  return _mm512_set1_epi32(word);
}

int32_t read_int(const uint8_t* place) {
  int32_t value;
  __builtin_memcpy(&value, place, 4);
  return value;
}

float read_float(const uint8_t* place) {
  float value;
  __builtin_memcpy(&value, place, 4);
  return value;
}

void store(float* c, __m512 value, bool first) {
  _mm512_storeu_ps(c, first ? value : _mm512_add_ps(_mm512_loadu_ps(c), value));
}

// Rows and blocks of one panel, and the segment of the rows that it multiplies; later segments add to the
// first.
struct IntPanel {
  const uint8_t* a;
  const uint8_t* b;  // at the segment's first input
  int64_t b_stride;
  const float* column_scales;
  int64_t scales_stride;  // floats from block to block
  float* c;
  const RowSegment& segment;
  const uint8_t* ahead;  // the weights that come next: `ahead_lines` cache lines of each block are fetched
                         // per kAheadStep inputs
  int64_t ahead_lines;
};

// c = row scale * column scale * (sum - 128 * sum of the row)
void store_int8(const RowSegment& segment, const uint8_t* a_row, const float* column_scales, __m512i sum,
                float* c) {
  const __m512i correction = _mm512_set1_epi32(read_int(a_row + segment.sum_offset) * -128);
  const __m512 scale =
      _mm512_mul_ps(_mm512_loadu_ps(column_scales), _mm512_set1_ps(read_float(a_row + segment.scale_offset)));
  store(c, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(sum, correction)), scale), segment.begin == 0);
}

template <int kRows, int kBlocks>
void run_int8_panel(const GemmArgs& args, const IntPanel& panel) {
  __m512i sums[kRows][kBlocks];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kBlocks; ++j) sums[i][j] = _mm512_setzero_si512();
  }
  const uint8_t* a = panel.a + panel.segment.begin;
  const uint8_t* b = panel.b;
  const uint8_t* ahead = panel.ahead;
  for (int64_t step = 0; step < panel.segment.count; step += kAheadStep) {
    for (int64_t line = 0; line < panel.ahead_lines; ++line, ahead += 64) {
      for (int j = 0; j < kBlocks; ++j) _mm_prefetch(ahead + j * args.b_stride, _MM_HINT_T1);
    }
    for (int64_t k = 0; k < kAheadStep; k += 4, a += 4, b += 64) {
      __m512i weights[kBlocks];
#pragma GCC unroll 2
      for (int j = 0; j < kBlocks; ++j) weights[j] = _mm512_load_si512(b + j * panel.b_stride);
#pragma GCC unroll 12
      for (int i = 0; i < kRows; ++i) {
        const __m512i x = broadcast4(a + i * args.a_stride);
#pragma GCC unroll 2
        for (int j = 0; j < kBlocks; ++j) multiply_add(sums[i][j], weights[j], x);
      }
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kBlocks; ++j) {
      store_int8(panel.segment, panel.a + i * args.a_stride, panel.column_scales + j * panel.scales_stride,
                 sums[i][j], panel.c + i * args.c_stride + j * args.c_block_stride);
    }
  }
}

template <int kBlocks>
void run_int8_rows(const GemmArgs& args, const IntPanel& panel, int64_t rows) {
  constexpr void (*kRun[kPanelRows])(const GemmArgs&, const IntPanel&) = {
      run_int8_panel<1, kBlocks>,  run_int8_panel<2, kBlocks>,  run_int8_panel<3, kBlocks>,
      run_int8_panel<4, kBlocks>,  run_int8_panel<5, kBlocks>,  run_int8_panel<6, kBlocks>,
      run_int8_panel<7, kBlocks>,  run_int8_panel<8, kBlocks>,  run_int8_panel<9, kBlocks>,
      run_int8_panel<10, kBlocks>, run_int8_panel<11, kBlocks>, run_int8_panel<12, kBlocks>};
  kRun[rows - 1](args, panel);
}

// One block as one memory stream; k is a multiple of 64, so 16 steps of four inputs always fit.
template <int kRows>
void stream_int8_block(const GemmArgs& args, const RowSegment& segment, const uint8_t* b, float* c) {
  __m512i sums[kRows][4];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[i][j] = _mm512_setzero_si512();
  }
  const auto* a = static_cast<const uint8_t*>(args.a);
  for (int64_t k = segment.begin; k < segment.begin + segment.count; k += 16) {
    const uint8_t* row = b + k * 16;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      _mm_prefetch(row + 64 * j + kStreamAhead, _MM_HINT_T0);
      const __m512i weights = _mm512_load_si512(row + 64 * j);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i)
        multiply_add_four(sums[i][j], weights, a + i * args.a_stride + k + 4 * j);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    const __m512i sum =
        _mm512_add_epi32(_mm512_add_epi32(sums[i][0], sums[i][1]), _mm512_add_epi32(sums[i][2], sums[i][3]));
    const auto* scales = reinterpret_cast<const float*>(b + args.k * kBlockColumns);
    store_int8(segment, a + i * args.a_stride, scales, sum, c + i * args.c_stride);
  }
}

__m512 group_scale(const uint8_t* scales) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

struct Int4Panel {
  const uint8_t* a;
  const uint8_t* b;
  float* c;
  const RowSegment& segment;
};

// Each group of 32 inputs ends in int32 sums, started at -8 * sum of the row's group, that its scale takes
// into float.
template <int kRows, int kBlocks>
void run_int4_panel(const GemmArgs& args, const Int4Panel& panel) {
  const __m512i low = _mm512_set1_epi8(15);
  __m512 totals[kRows][kBlocks];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kBlocks; ++j) totals[i][j] = _mm512_setzero_ps();
  }
  const RowSegment& segment = panel.segment;
  const uint8_t* a = panel.a + segment.begin;
  const uint8_t* b = panel.b + segment.begin * 8;
  const uint8_t* scales = panel.b + args.k * 8 + segment.begin / kInt4Group * 32;
  const uint8_t* group_sums = panel.a + segment.group_offset;
  const uint8_t* ahead_of_scales = panel.b + args.k * 8 - kStreamAhead;
  for (int64_t k = 0; k < segment.count; k += kInt4Group) {
    // Behind a block's nibbles lie its scales, which are read already; then comes the next block.
    const uint8_t* ahead = b + kStreamAhead + (b < ahead_of_scales ? 0 : args.k);
    __m512i sums[kRows][kBlocks];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const __m512i start = _mm512_set1_epi32(read_int(group_sums + i * args.a_stride) * -8);
#pragma GCC unroll 2
      for (int j = 0; j < kBlocks; ++j) sums[i][j] = start;
    }
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) {
      __m512i first[kBlocks];
      __m512i second[kBlocks];
#pragma GCC unroll 2
      for (int j = 0; j < kBlocks; ++j) {
        _mm_prefetch(ahead + j * args.b_stride + 64 * t, _MM_HINT_T0);
        const __m512i nibbles = _mm512_load_si512(b + j * args.b_stride + 64 * t);
        first[j] = _mm512_and_si512(nibbles, low);
        second[j] = _mm512_and_si512(_mm512_srli_epi16(nibbles, 4), low);
      }
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const uint8_t* x = a + i * args.a_stride + 4 * t;
        if constexpr (kBlocks == 1) {
          multiply_add_four(sums[i][0], first[0], x);
          multiply_add_four(sums[i][0], second[0], x + 16);
        } else {
          const __m512i x_first = broadcast4(x);
          const __m512i x_second = broadcast4(x + 16);
#pragma GCC unroll 2
          for (int j = 0; j < kBlocks; ++j) {
            multiply_add(sums[i][j], first[j], x_first);
            multiply_add(sums[i][j], second[j], x_second);
          }
        }
      }
    }
#pragma GCC unroll 2
    for (int j = 0; j < kBlocks; ++j) {
      const __m512 scale = group_scale(scales + j * args.b_stride);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        totals[i][j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[i][j]), scale, totals[i][j]);
      }
    }
    a += kInt4Group;
    b += 256;
    scales += 32;
    group_sums += 4;
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    const __m512 row_scale = _mm512_set1_ps(read_float(panel.a + i * args.a_stride + segment.scale_offset));
#pragma GCC unroll 2
    for (int j = 0; j < kBlocks; ++j) {
      store(panel.c + i * args.c_stride + j * args.c_block_stride, _mm512_mul_ps(totals[i][j], row_scale),
            segment.begin == 0);
    }
  }
}

template <int kBlocks>
void run_int4_rows(const GemmArgs& args, const Int4Panel& panel, int64_t rows) {
  switch (rows) {
    case 1:
      return run_int4_panel<1, kBlocks>(args, panel);
    case 2:
      return run_int4_panel<2, kBlocks>(args, panel);
    case 3:
      return run_int4_panel<3, kBlocks>(args, panel);
    default:
      return run_int4_panel<4, kBlocks>(args, panel);
  }
}

// Panels of nearly equal height: 13 rows are 7 + 6, not 12 + 1.
int64_t panels_of(int64_t rows, int64_t most) { return (rows + most - 1) / most; }

// One or two blocks' weights for one segment, as they lie in memory or widened from int4.
struct IntWeights {
  const uint8_t* first;
  int64_t stride;
  const float* scales;
  int64_t scales_stride;
  int64_t blocks;
  const uint8_t* ahead;
};

void run_int8_panels(const GemmArgs& args, const RowSegment& segment, const IntWeights& weights,
                     int64_t block) {
  const int64_t panels = panels_of(args.rows, kPanelRows);
  const int64_t lines = (kAheadStep / 4 + panels - 1) / panels;
  for (int64_t index = 0; index < panels; ++index) {
    const int64_t row = args.rows * index / panels;
    const int64_t rows = args.rows * (index + 1) / panels - row;
    const IntPanel panel{.a = static_cast<const uint8_t*>(args.a) + row * args.a_stride,
                         .b = weights.first,
                         .b_stride = weights.stride,
                         .column_scales = weights.scales,
                         .scales_stride = weights.scales_stride,
                         .c = args.c + row * args.c_stride + block * args.c_block_stride,
                         .segment = segment,
                         .ahead = weights.ahead + index * lines * (segment.count / kAheadStep) * 64,
                         .ahead_lines = weights.ahead == nullptr ? 0 : lines};
    if (weights.blocks == 1) {
      run_int8_rows<1>(args, panel, rows);
    } else {
      run_int8_rows<2>(args, panel, rows);
    }
  }
}

// Two blocks' segment (at most 32 KiB) stays in the first-level cache while all rows pass over it.
void gemm_int8_many_rows(const GemmArgs& args) {
  const int64_t segments = row_segments(args.k);
  for (int64_t block = 0; block < args.blocks; block += kPanelBlocks) {
    const int64_t blocks = args.blocks - block < kPanelBlocks ? args.blocks - block : kPanelBlocks;
    const uint8_t* b = static_cast<const uint8_t*>(args.b) + block * args.b_stride;
    for (int64_t i = 0; i < segments; ++i) {
      const RowSegment segment = row_segment(args.k, i);
      const uint8_t* first = b + segment.begin * kBlockColumns;
      const uint8_t* ahead =
          i + 1 < segments ? first + segment.count * kBlockColumns : b + blocks * args.b_stride;
      const auto* scales = reinterpret_cast<const float*>(b + args.k * kBlockColumns);
      const IntWeights weights{.first = first,
                               .stride = args.b_stride,
                               .scales = scales,
                               .scales_stride = args.b_stride / 4,
                               .blocks = blocks,
                               .ahead = ahead};
      run_int8_panels(args, segment, weights, block);
    }
  }
}

void run_int4_panels(const GemmArgs& args, const RowSegment& segment, int64_t block, int64_t blocks) {
  const int64_t panels = panels_of(args.rows, kInt4PanelRows);
  for (int64_t index = 0; index < panels; ++index) {
    const int64_t row = args.rows * index / panels;
    const int64_t rows = args.rows * (index + 1) / panels - row;
    const Int4Panel panel{.a = static_cast<const uint8_t*>(args.a) + row * args.a_stride,
                          .b = static_cast<const uint8_t*>(args.b) + block * args.b_stride,
                          .c = args.c + row * args.c_stride + block * args.c_block_stride,
                          .segment = segment};
    if (blocks == 1) {
      run_int4_rows<1>(args, panel, rows);
    } else {
      run_int4_rows<2>(args, panel, rows);
    }
  }
}

void stream_int8_rows(const GemmArgs& args, const RowSegment& segment, const uint8_t* b, float* c) {
  switch (args.rows) {
    case 1:
      return stream_int8_block<1>(args, segment, b, c);
    case 2:
      return stream_int8_block<2>(args, segment, b, c);
    case 3:
      return stream_int8_block<3>(args, segment, b, c);
    default:
      return stream_int8_block<4>(args, segment, b, c);
  }
}

void gemm_int8_few_rows(const GemmArgs& args) {
  for (int64_t block = 0; block < args.blocks; ++block) {
    const uint8_t* b = static_cast<const uint8_t*>(args.b) + block * args.b_stride;
    float* c = args.c + block * args.c_block_stride;
    for (int64_t i = 0; i < row_segments(args.k); ++i) stream_int8_rows(args, row_segment(args.k, i), b, c);
  }
}

// One segment of two int4 blocks widened to int8 with one scale per column, as gemm_int8 reads them: 33 KiB.
struct alignas(64) Widened {
  uint8_t values[kPanelBlocks][kSegmentInputs * kBlockColumns];
  float scales[kPanelBlocks][kBlockColumns];
};
thread_local Widened widened;

// A group's factors (at most 127 / 8) in 11 binary places, repeated for the bytes of their columns in the
// order that unpacking to 16 bits leaves them in: in each lane of 16 bytes the first two columns, then the
// other two.
struct Factors {
  __m512i low;
  __m512i high;
};

Factors factors_of(__m512 factor_f32x16) {
  const __m512i words = _mm512_cvtps_epi32(_mm512_mul_ps(factor_f32x16, _mm512_set1_ps(2048.0f)));
  const __m512i both =
      _mm512_or_si512(_mm512_and_si512(words, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(words, 16));
  const __m512i low = _mm512_setr_epi32(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13);
  const __m512i high = _mm512_setr_epi32(2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15);
  return {_mm512_permutexvar_epi32(low, both), _mm512_permutexvar_epi32(high, both)};
}

// sixteenfold holds 16 * nibble a byte: (16 * nibble - 128) * factor * 2^11 / 2^15, rounded, is (nibble - 8)
// * factor.
__m512i widen_nibbles(__m512i sixteenfold, const Factors& factors) {
  const __m512i zero = _mm512_setzero_si512();
  const __m512i eight = _mm512_set1_epi16(128);
  const __m512i low = _mm512_sub_epi16(_mm512_unpacklo_epi8(sixteenfold, zero), eight);
  const __m512i high = _mm512_sub_epi16(_mm512_unpackhi_epi8(sixteenfold, zero), eight);
  const __m512i values =
      _mm512_packs_epi16(_mm512_mulhrs_epi16(low, factors.low), _mm512_mulhrs_epi16(high, factors.high));
  return _mm512_xor_si512(values, _mm512_set1_epi8(-128));
}

// int4 to int8 once for all rows of the expert, then the faster product.
void gemm_int4_many_rows(const GemmArgs& args) {
  for (int64_t block = 0; block < args.blocks; block += kPanelBlocks) {
    const int64_t blocks = args.blocks - block < kPanelBlocks ? args.blocks - block : kPanelBlocks;
    for (int64_t i = 0; i < row_segments(args.k); ++i) {
      const RowSegment segment = row_segment(args.k, i);
      for (int64_t j = 0; j < blocks; ++j) {
        const uint8_t* b = static_cast<const uint8_t*>(args.b) + (block + j) * args.b_stride;
        widen_int4_avx512(b, args.k, segment, widened.values[j], widened.scales[j]);
      }
      const IntWeights weights{.first = widened.values[0],
                               .stride = sizeof(widened.values[0]),
                               .scales = widened.scales[0],
                               .scales_stride = kBlockColumns,
                               .blocks = blocks,
                               .ahead = nullptr};
      run_int8_panels(args, segment, weights, block);
    }
  }
}

}  // namespace

void widen_int4_avx512(const uint8_t* block, int64_t k, const RowSegment& segment, uint8_t* values,
                       float* column_scales) {
  const uint8_t* nibbles = block + segment.begin * 8;
  const uint8_t* scales = block + k * 8 + segment.begin;
  __m512 largest = _mm512_setzero_ps();
  for (int64_t i = 0; i < segment.count; i += kInt4Group) {
    largest = _mm512_max_ps(largest, _mm512_abs_ps(group_scale(scales + i)));
  }
  _mm512_storeu_ps(column_scales, _mm512_mul_ps(largest, _mm512_set1_ps(8.0f / 127.0f)));
  const __m512 factor =
      _mm512_div_ps(_mm512_set1_ps(127.0f / 8.0f), _mm512_max_ps(largest, _mm512_set1_ps(1e-30f)));
  const __m512i mask = _mm512_set1_epi8(static_cast<char>(0xf0));
  for (int64_t i = 0; i < segment.count; i += kInt4Group) {
    const Factors factors = factors_of(_mm512_mul_ps(group_scale(scales + i), factor));
#pragma GCC unroll 4
    for (int64_t t = 0; t < 4; ++t) {
      const uint8_t* row = nibbles + i * 8 + t * 64;
      _mm_prefetch(row + kStreamAhead, _MM_HINT_T0);
      const __m512i both = _mm512_load_si512(row);
      uint8_t* target = values + i * 16 + t * 64;
      _mm512_store_si512(target, widen_nibbles(_mm512_and_si512(_mm512_slli_epi16(both, 4), mask), factors));
      _mm512_store_si512(target + 256, widen_nibbles(_mm512_and_si512(both, mask), factors));
    }
  }
}

void gemm_int8_avx512(const GemmArgs& args) {
  if (args.rows <= kStreamRows) return gemm_int8_few_rows(args);
  gemm_int8_many_rows(args);
}

void gemm_int4_avx512(const GemmArgs& args) {
  if (args.rows >= kWidenRows) return gemm_int4_many_rows(args);
  // A single row reads one block after the other: one stream is what the memory likes best.
  const int64_t most = args.rows == 1 ? 1 : kPanelBlocks;
  for (int64_t block = 0; block < args.blocks; block += most) {
    const int64_t blocks = args.blocks - block < most ? args.blocks - block : most;
    for (int64_t i = 0; i < row_segments(args.k); ++i)
      run_int4_panels(args, row_segment(args.k, i), block, blocks);
  }
}

}  // namespace kt
