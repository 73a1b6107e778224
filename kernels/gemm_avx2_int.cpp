// int8 and int4 weights with AVX2.
//
// int8: vpmaddwd on both sides widened to 16 bits, so that no sum saturates: the weights (value + 128) in
// registers, the rows once for many blocks. Sums are those of pairs of inputs, four registers for the 16
// columns of a row: 6 rows x half a block, or up to 3 rows x 1 block:  ymm0-11 sums | 2 weights | 1 broadcast
// activation | 1 product
//
// int4: vpmaddubsw on nibbles (0 to 15) and the rows' bytes. A group of 32 inputs adds up in 16 bits (at most
// 16 * 15 * 127 a lane); then its scale takes it into float.
// 6 rows x 1 block:  ymm0-11 sums of the group | 2 nibble rows | 1 broadcast activation | 1 product; float
// sums spilled
#include <immintrin.h>

#include <cstdint>

#include "gemm_avx2.h"

namespace kt {
namespace {

constexpr int64_t kPanelRows = 6;
constexpr int64_t kInt8Turn = 16;  // inputs between two turns of fetching ahead
// Rows that are widened at a time, and the blocks that they are widened for: 99 KiB and at most 128 KiB stay
// in the second-level cache.
constexpr int64_t kWideRows = 48;
constexpr int64_t kWideBlocks = 8;
constexpr int64_t kWideStride = kSegmentInputs + 32;  // an odd number of cache lines

struct alignas(64) WideRows {
  int16_t values[kWideRows][kWideStride];
};
thread_local WideRows wide_rows;

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

__m256i broadcast4(const uint8_t* values) { return _mm256_set1_epi32(read_int(values)); }

void store(float* c, __m256 value, bool first) {
  _mm256_storeu_ps(c, first ? value : _mm256_add_ps(_mm256_loadu_ps(c), value));
}

// The steps of a panel are inline assembly, volatile to keep their order: g++ 12 gathers the loads of all
// rows in front and spills the sums, which halves the speed.

__m256i widen_bytes(const uint8_t* place) {
  __m256i wide;
  asm volatile("vpmovzxbw %1, %0" : "=x"(wide) : "m"(*reinterpret_cast<const char(*)[16]>(place)));
  return wide;
}

// 32-bit sums += the products of the row's next four and the weights of four columns each
void add_products(__m256i& first_sum, __m256i& second_sum, __m256i first, __m256i second,
                  const int16_t* row) {
  __m256i products;
  __m256i x;
  asm volatile(
      "vpbroadcastq %6, %3\n\t"
      "vpmaddwd %3, %4, %2\n\t"
      "vpaddd %2, %0, %0\n\t"
      "vpmaddwd %3, %5, %3\n\t"
      "vpaddd %3, %1, %1"
      : "+x"(first_sum), "+x"(second_sum), "=&x"(products), "=&x"(x)
      : "x"(first), "x"(second), "m"(*reinterpret_cast<const char(*)[8]>(row)));
}

// 16-bit sums += the products of the row's next four and the nibbles of eight columns each
void add_nibble_products(__m256i& first_sum, __m256i& second_sum, __m256i first, __m256i second,
                         const uint8_t* row) {
  __m256i products;
  __m256i x;
  asm volatile(
      "vpbroadcastd %6, %3\n\t"
      "vpmaddubsw %3, %4, %2\n\t"
      "vpaddw %2, %0, %0\n\t"
      "vpmaddubsw %3, %5, %3\n\t"
      "vpaddw %3, %1, %1"
      : "+x"(first_sum), "+x"(second_sum), "=&x"(products), "=&x"(x)
      : "x"(first), "x"(second), "m"(*reinterpret_cast<const char(*)[4]>(row)));
}

// Up to kPanelRows rows against one segment of a block or of its half.
struct Panel {
  const uint8_t* a;
  int64_t a_stride;
  const int16_t* wide;    // int8: the rows' segment, widened
  const uint8_t* b;       // at the segment's first input and the panel's first column
  const uint8_t* scales;  // likewise
  float* c;
  int64_t c_stride;
  const RowSegment& segment;
  const uint8_t*
      ahead;  // weights that come next: fetched while this panel multiplies, `ahead_step` bytes per turn
  int64_t ahead_step;
};

template <int kLines>
void fetch(const uint8_t* place) {
#pragma GCC unroll 4
  for (int line = 0; line < kLines; ++line) _mm_prefetch(place + 64 * line, _MM_HINT_T0);
}

// One step of four inputs.
template <int kRows, int kHalves>
void add_int8(__m256i (&sums)[kRows][kHalves][2], const uint8_t* b, const int16_t* x) {
#pragma GCC unroll 2
  for (int j = 0; j < kHalves; ++j) {
    const __m256i first = widen_bytes(b + 32 * j);
    const __m256i second = widen_bytes(b + 32 * j + 16);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      add_products(sums[i][j][0], sums[i][j][1], first, second, x + i * kWideStride);
    }
  }
}

// c = row scale * column scale * (sum - 128 * sum of the row), eight columns from the sums of their pairs
void store_int8(const Panel& panel, int row, int half, __m256i first, __m256i second) {
  const uint8_t* a = panel.a + row * panel.a_stride;
  const __m256i correction = _mm256_set1_epi32(read_int(a + panel.segment.sum_offset) * -128);
  const __m256i sum = _mm256_permute4x64_epi64(_mm256_hadd_epi32(first, second), 0xd8);
  const __m256 column_scales = _mm256_loadu_ps(reinterpret_cast<const float*>(panel.scales) + 8 * half);
  const __m256 scale =
      _mm256_mul_ps(column_scales, _mm256_set1_ps(read_float(a + panel.segment.scale_offset)));
  store(panel.c + row * panel.c_stride + 8 * half,
        _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(sum, correction)), scale),
        panel.segment.begin == 0);
}

template <int kRows, int kHalves>
void run_int8_panel(const Panel& panel) {
  __m256i sums[kRows][kHalves][2];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kHalves; ++j) sums[i][j][0] = sums[i][j][1] = _mm256_setzero_si256();
  }
  const int16_t* x = panel.wide;
  const uint8_t* b = panel.b;
  const uint8_t* ahead = panel.ahead;
  for (int64_t k = 0; k < panel.segment.count; k += kInt8Turn, x += kInt8Turn, b += 256) {
    fetch<2 * kHalves>(ahead);
    ahead += panel.ahead_step;
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) add_int8<kRows, kHalves>(sums, b + 64 * t, x + 4 * t);
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kHalves; ++j) store_int8(panel, i, j, sums[i][j][0], sums[i][j][1]);
  }
}

__m256 group_scale(const uint8_t* scales) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// The low (0) or high (4) nibbles of half a row of a block.
template <int kShift>
__m256i nibbles(const uint8_t* place) {
  const __m256i row = _mm256_load_si256(reinterpret_cast<const __m256i*>(place));
  return _mm256_and_si256(kShift == 0 ? row : _mm256_srli_epi16(row, kShift), _mm256_set1_epi8(15));
}

// One step of four inputs; the group's first one sets the sums.
template <int kRows, int kShift, bool kFirst>
void add_int4(__m256i (&sums)[kRows][2], const uint8_t* b, const uint8_t* a, int64_t a_stride) {
  const __m256i first = nibbles<kShift>(b);
  const __m256i second = nibbles<kShift>(b + 32);
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
    if (kFirst) {
      const __m256i x = broadcast4(a + i * a_stride);
      sums[i][0] = _mm256_maddubs_epi16(first, x);
      sums[i][1] = _mm256_maddubs_epi16(second, x);
    } else {
      add_nibble_products(sums[i][0], sums[i][1], first, second, a + i * a_stride);
    }
  }
}

// The sums of a group over all rows.
template <int kRows>
void add_int4_group(__m256i (&sums)[kRows][2], const uint8_t* b, const uint8_t* a, int64_t a_stride,
                    const uint8_t* ahead) {
  fetch<2>(ahead);
  add_int4<kRows, 0, true>(sums, b, a, a_stride);
  add_int4<kRows, 4, false>(sums, b, a + 16, a_stride);
  add_int4<kRows, 0, false>(sums, b + 64, a + 4, a_stride);
  add_int4<kRows, 4, false>(sums, b + 64, a + 20, a_stride);
  fetch<3>(ahead + 128);
  add_int4<kRows, 0, false>(sums, b + 128, a + 8, a_stride);
  add_int4<kRows, 4, false>(sums, b + 128, a + 24, a_stride);
  add_int4<kRows, 0, false>(sums, b + 192, a + 12, a_stride);
  add_int4<kRows, 4, false>(sums, b + 192, a + 28, a_stride);
}

// A group's sums, without the 8 that each nibble is too large.
__m256 int4_sum(__m256i sum, __m256i group_sum) {
  const __m256i correction = _mm256_slli_epi32(group_sum, 3);
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_madd_epi16(sum, _mm256_set1_epi16(1)), correction));
}

template <int kRows>
void run_int4_panel(const Panel& panel) {
  __m256 totals[kRows][2];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) totals[i][0] = totals[i][1] = _mm256_setzero_ps();
  const uint8_t* a = panel.a + panel.segment.begin;
  const uint8_t* b = panel.b;
  const uint8_t* scales = panel.scales;
  const uint8_t* group_sums = panel.a + panel.segment.group_offset;
  const uint8_t* ahead = panel.ahead;
  for (int64_t k = 0; k < panel.segment.count; k += kInt4Group) {
    __m256i sums[kRows][2];
    add_int4_group(sums, b, a, panel.a_stride, ahead);
    const __m256 scale[] = {group_scale(scales), group_scale(scales + 16)};
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const __m256i group_sum = broadcast4(group_sums + i * panel.a_stride);
      totals[i][0] = _mm256_fmadd_ps(int4_sum(sums[i][0], group_sum), scale[0], totals[i][0]);
      totals[i][1] = _mm256_fmadd_ps(int4_sum(sums[i][1], group_sum), scale[1], totals[i][1]);
    }
    a += kInt4Group;
    b += 256;
    scales += 32;
    group_sums += 4;
    ahead += panel.ahead_step;
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
    const uint8_t* row = panel.a + i * panel.a_stride;
    const __m256 row_scale = _mm256_set1_ps(read_float(row + panel.segment.scale_offset));
    float* c = panel.c + i * panel.c_stride;
    store(c, _mm256_mul_ps(totals[i][0], row_scale), panel.segment.begin == 0);
    store(c + 8, _mm256_mul_ps(totals[i][1], row_scale), panel.segment.begin == 0);
  }
}

using RunPanel = void (*)(const Panel& panel);
constexpr RunPanel kInt8Whole[] = {run_int8_panel<1, 2>, run_int8_panel<2, 2>, run_int8_panel<3, 2>};
constexpr RunPanel kInt8Half[] = {run_int8_panel<1, 1>, run_int8_panel<2, 1>, run_int8_panel<3, 1>,
                                  run_int8_panel<4, 1>, run_int8_panel<5, 1>, run_int8_panel<6, 1>};
constexpr RunPanel kInt4Whole[] = {run_int4_panel<1>, run_int4_panel<2>, run_int4_panel<3>,
                                   run_int4_panel<4>, run_int4_panel<5>, run_int4_panel<6>};

int64_t parts_of(int64_t count, int64_t most) { return (count + most - 1) / most; }

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// A segment of a block, for rows [row, row + rows) that begin at `wide`; `ahead` is what comes next, or null.
struct Part {
  const RowSegment& segment;
  int64_t row;
  int64_t rows;
  const int16_t* wide;
  const uint8_t* b;
  const uint8_t* scales;
  float* c;
  const uint8_t* ahead;
};

// How the panels of a format walk over a part, and what they fetch ahead when there is one of them.
struct Walk {
  const RunPanel* run;
  int64_t halves;       // of a block, one after the other
  int64_t half_scales;  // bytes from the scales of one half to those of the other
  int64_t turn_inputs;
  int64_t turn_bytes;
};
constexpr Walk kInt8FewRows = {.run = kInt8Whole,
                               .halves = 1,
                               .half_scales = 0,
                               .turn_inputs = kInt8Turn,
                               .turn_bytes = kInt8Turn * kBlockColumns};
constexpr Walk kInt8ManyRows = {.run = kInt8Half,
                                .halves = 2,
                                .half_scales = 32,
                                .turn_inputs = kInt8Turn,
                                .turn_bytes = kInt8Turn * kBlockColumns};
constexpr Walk kInt4Rows = {.run = kInt4Whole,
                            .halves = 1,
                            .half_scales = 0,
                            .turn_inputs = kInt4Group,
                            .turn_bytes = kInt4Group * 9};  // nibbles and scales

// Panels of nearly equal height: 13 rows are 5 + 4 + 4, not 6 + 6 + 1. Each fetches its share of what comes
// next.
void run_panels(const GemmArgs& args, const Part& part, const Walk& walk) {
  const int64_t panels = parts_of(part.rows, kPanelRows);
  const int64_t ahead_step = part.ahead == nullptr ? 0 : walk.turn_bytes / (panels * walk.halves);
  const int64_t ahead_bytes = ahead_step * (part.segment.count / walk.turn_inputs);
  const uint8_t* ahead = part.ahead == nullptr ? part.b : part.ahead;
  for (int64_t index = 0; index < panels; ++index) {
    const int64_t first = part.rows * index / panels;
    const int64_t row = part.row + first;
    const int64_t rows = part.rows * (index + 1) / panels - first;
    for (int64_t j = 0; j < walk.halves; ++j, ahead += ahead_bytes) {
      walk.run[rows - 1]({.a = static_cast<const uint8_t*>(args.a) + row * args.a_stride,
                          .a_stride = args.a_stride,
                          .wide = part.wide == nullptr ? nullptr : part.wide + first * kWideStride,
                          .b = part.b + 32 * j,
                          .scales = part.scales + walk.half_scales * j,
                          .c = part.c + row * args.c_stride + 8 * j,
                          .c_stride = args.c_stride,
                          .segment = part.segment,
                          .ahead = ahead,
                          .ahead_step = ahead_step});
    }
  }
}

// Blocks and segments that rows are widened for.
struct Range {
  int64_t block;
  int64_t blocks;
  int64_t segment;
  int64_t segments;
  const uint8_t* next;  // the weights after these, or null
};

void widen_rows(const uint8_t* a, int64_t a_stride, int64_t rows, int64_t count,
                int16_t (*wide)[kWideStride]) {
  for (int64_t row = 0; row < rows; ++row, a += a_stride) {
    for (int64_t i = 0; i < count; i += 16) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a + i));
      _mm256_store_si256(reinterpret_cast<__m256i*>(wide[row] + i), _mm256_cvtepi8_epi16(bytes));
    }
  }
}

const uint8_t* int8_weights(const GemmArgs& args, int64_t block, int64_t segment) {
  return static_cast<const uint8_t*>(args.b) + block * args.b_stride +
         row_segment(args.k, segment).begin * kBlockColumns;
}

// What follows segment `i` of the range in a block.
const uint8_t* next_int8_weights(const GemmArgs& args, const Range& range, int64_t block, int64_t i) {
  if (i + 1 < range.segments) return int8_weights(args, block, range.segment + i + 1);
  if (block + 1 < range.block + range.blocks) return int8_weights(args, block + 1, range.segment);
  return range.next;
}

void run_int8_rows(const GemmArgs& args, const Range& range, int64_t row, int64_t rows) {
  const uint8_t* a = static_cast<const uint8_t*>(args.a) + row * args.a_stride;
  for (int64_t i = 0; i < range.segments; ++i) {
    const RowSegment segment = row_segment(args.k, range.segment + i);
    widen_rows(a + segment.begin, args.a_stride, rows, segment.count, wide_rows.values + i * rows);
  }
  for (int64_t block = range.block; block < range.block + range.blocks; ++block) {
    const uint8_t* scales = int8_weights(args, block, 0) + args.k * kBlockColumns;
    for (int64_t i = 0; i < range.segments; ++i) {
      const uint8_t* b = int8_weights(args, block, range.segment + i);
      const uint8_t* ahead =
          rows <= kStreamRows ? b + kStreamAhead : next_int8_weights(args, range, block, i);
      const RowSegment segment = row_segment(args.k, range.segment + i);
      const Part part{.segment = segment,
                      .row = row,
                      .rows = rows,
                      .wide = wide_rows.values[i * rows],
                      .b = b,
                      .scales = scales,
                      .c = args.c + block * args.c_block_stride,
                      .ahead = ahead};
      run_panels(args, part, rows <= kStreamRows ? kInt8FewRows : kInt8ManyRows);
    }
  }
}

}  // namespace

void gemm_int8_avx2(const GemmArgs& args) {
  const int64_t segments = row_segments(args.k);
  // All segments of one panel's rows: blocks are then read from begin to end.
  const int64_t most = args.rows <= kPanelRows ? kWideRows / kPanelRows : 1;
  const int64_t chunks = parts_of(args.rows, kWideRows);
  for (int64_t block = 0; block < args.blocks; block += kWideBlocks) {
    const int64_t blocks = smaller(args.blocks - block, kWideBlocks);
    for (int64_t segment = 0; segment < segments; segment += most) {
      const int64_t here = smaller(segments - segment, most);
      const uint8_t* next = args.next;
      if (segment + here < segments) {
        next = int8_weights(args, block, segment + here);
      } else if (block + blocks < args.blocks) {
        next = int8_weights(args, block + blocks, 0);
      }
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t row = args.rows * chunk / chunks;
        const Range range{.block = block,
                          .blocks = blocks,
                          .segment = segment,
                          .segments = here,
                          .next = chunk + 1 < chunks ? nullptr : next};
        run_int8_rows(args, range, row, args.rows * (chunk + 1) / chunks - row);
      }
    }
  }
}

void gemm_int4_avx2(const GemmArgs& args) {
  const int64_t segments = row_segments(args.k);
  for (int64_t block = 0; block < args.blocks; ++block) {
    const uint8_t* b = static_cast<const uint8_t*>(args.b) + block * args.b_stride;
    const uint8_t* next = block + 1 < args.blocks ? b + args.b_stride : args.next;
    for (int64_t i = 0; i < segments; ++i) {
      const RowSegment segment = row_segment(args.k, i);
      // Values and scales of the next block as one run of bytes, the segments' parts one after the other.
      const uint8_t* ahead = next == nullptr ? nullptr : next + segment.begin * 9;
      const Part part{.segment = segment,
                      .row = 0,
                      .rows = args.rows,
                      .wide = nullptr,
                      .b = b + segment.begin * 8,
                      .scales = b + args.k * 8 + segment.begin,
                      .c = args.c + block * args.c_block_stride,
                      .ahead = ahead};
      run_panels(args, part, kInt4Rows);
    }
  }
}

}  // namespace kt
