// AVX2 with FMA: bf16 weights, widened to float in registers as in gemm_avx512.cpp. A 64-byte row of a block
// is two registers of 8 columns x 2 inputs.
//
// Registers of a panel (6 rows x 1 block):  ymm0-11 sums | 2 widened weights | 1 broadcast activation | mask
// Up to 3 rows have sums of their own for even and for odd inputs: no FMA waits for the one before.
#include "gemm_avx2.h"

#include <immintrin.h>

#include <cstdint>

namespace kt {
namespace {

constexpr int64_t kPanelRows = 6;
constexpr int64_t kPairsPerTurn = 4;  // between two turns of fetching ahead
// Inputs at a time once there are several panels: a block's part (16 KiB) and a panel's rows (12 KiB) stay in
// the first-level cache.
constexpr int64_t kChunkInputs = 512;
// Blocks at a time, so that their sums are still in the second-level cache when the next inputs are added.
constexpr int64_t kNearBlocks = 8;

bool usable() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

__m256i load(const uint8_t* place) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(place)); }

// Two inputs of eight columns, widened.
__m256 even_inputs(const uint8_t* place) { return _mm256_castsi256_ps(_mm256_slli_epi32(load(place), 16)); }
__m256 odd_inputs(const uint8_t* place) {
  return _mm256_castsi256_ps(_mm256_and_si256(load(place), _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

void store_sum(float* c, __m256 sum, bool accumulate) {
  _mm256_storeu_ps(c, accumulate ? _mm256_add_ps(_mm256_loadu_ps(c), sum) : sum);
}

// sums += weights * one activation. Inline assembly, volatile to keep the order: g++ 12 gathers the loads of
// all rows in front and spills the sums.
void multiply_add(__m256 (&sums)[2], __m256 low, __m256 high, const float* activation) {
  __m256 x;
  asm volatile(
      "vbroadcastss %5, %2\n\t"
      "vfmadd231ps %2, %3, %0\n\t"
      "vfmadd231ps %2, %4, %1"
      : "+x"(sums[0]), "+x"(sums[1]), "=&x"(x)
      : "x"(low), "x"(high), "m"(*activation));
}

struct Panel {
  const float* a;
  int64_t a_stride;  // floats
  const uint8_t* b;
  int64_t pairs;
  float* c;
  int64_t c_stride;
  bool accumulate;
  const uint8_t*
      ahead;  // weights that come next: fetched while this panel multiplies, `ahead_step` bytes per turn
  int64_t ahead_step;
};

template <int kRows, int kParts>
void add_pair(__m256 (&sums)[kRows][kParts][2], const uint8_t* b, const float* a, int64_t a_stride) {
  const __m256 even_low = even_inputs(b);
  const __m256 even_high = even_inputs(b + 32);
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) multiply_add(sums[i][0], even_low, even_high, a + i * a_stride);
  const __m256 odd_low = odd_inputs(b);
  const __m256 odd_high = odd_inputs(b + 32);
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) multiply_add(sums[i][kParts - 1], odd_low, odd_high, a + i * a_stride + 1);
}

template <int kRows>
void run_panel(const Panel& panel) {
  constexpr int kParts = kRows <= kStreamRows ? 2 : 1;
  __m256 sums[kRows][kParts][2];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) sums[i][part][0] = sums[i][part][1] = _mm256_setzero_ps();
  }
  const float* a = panel.a;
  const uint8_t* b = panel.b;
  const uint8_t* ahead = panel.ahead;
  int64_t pair = 0;
  for (; pair + kPairsPerTurn <= panel.pairs;
       pair += kPairsPerTurn, a += 2 * kPairsPerTurn, b += 64 * kPairsPerTurn) {
#pragma GCC unroll 4
    for (int t = 0; t < kPairsPerTurn; ++t) {
      _mm_prefetch(ahead + 64 * t, _MM_HINT_T0);
      add_pair<kRows, kParts>(sums, b + 64 * t, a + 2 * t, panel.a_stride);
    }
    ahead += panel.ahead_step;
  }
  for (; pair < panel.pairs; ++pair, a += 2, b += 64) add_pair<kRows, kParts>(sums, b, a, panel.a_stride);
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256 sum =
          kParts == 1 ? sums[i][0][half] : _mm256_add_ps(sums[i][0][half], sums[i][kParts - 1][half]);
      store_sum(panel.c + i * panel.c_stride + 8 * half, sum, panel.accumulate);
    }
  }
}

using RunPanel = void (*)(const Panel& panel);
constexpr RunPanel kRunPanel[] = {run_panel<1>, run_panel<2>, run_panel<3>,
                                  run_panel<4>, run_panel<5>, run_panel<6>};

// All rows against one block, `inputs` inputs from `first_input` on, in panels of nearly equal height: 13
// rows are 5 + 4 + 4, not 6 + 6 + 1. Each fetches its share of what comes next.
void run_panels(const GemmArgs& args, int64_t block, int64_t first_input, int64_t inputs,
                const uint8_t* next) {
  const int64_t panels = (args.rows + kPanelRows - 1) / kPanelRows;
  const uint8_t* b = static_cast<const uint8_t*>(args.b) + block * args.b_stride + first_input * 32;
  const int64_t ahead_step = next == nullptr ? 0 : 64 * kPairsPerTurn / panels;
  const uint8_t* ahead = next == nullptr ? b : next;
  for (int64_t index = 0; index < panels; ++index) {
    const int64_t begin = args.rows * index / panels;
    const int64_t rows = args.rows * (index + 1) / panels - begin;
    const uint8_t* a = static_cast<const uint8_t*>(args.a) + begin * args.a_stride + first_input * 4;
    kRunPanel[rows - 1]({.a = reinterpret_cast<const float*>(a),
                         .a_stride = args.a_stride / 4,
                         .b = b,
                         .pairs = inputs / 2,
                         .c = args.c + begin * args.c_stride + block * args.c_block_stride,
                         .c_stride = args.c_stride,
                         .accumulate = args.accumulate || first_input > 0,
                         .ahead = ahead,
                         .ahead_step = ahead_step});
    ahead += inputs / 2 / kPairsPerTurn * ahead_step;
  }
}

// Blocks [begin, end); `next` is what follows them.
void run_blocks(const GemmArgs& args, int64_t begin, int64_t end, const uint8_t* next) {
  const int64_t chunk = args.rows <= kPanelRows || args.k <= kChunkInputs ? args.k : kChunkInputs;
  for (int64_t first = 0; first < args.k; first += chunk) {
    const int64_t inputs = args.k - first < chunk ? args.k - first : chunk;
    const uint8_t* b = static_cast<const uint8_t*>(args.b) + first * 32;
    for (int64_t block = begin; block < end; ++block) {
      const uint8_t* ahead = b + (block + 1) * args.b_stride;
      if (block + 1 == end) ahead = first + inputs < args.k ? b + begin * args.b_stride + inputs * 32 : next;
      if (args.rows <= kStreamRows) ahead = b + block * args.b_stride + kStreamAhead;
      run_panels(args, block, first, inputs, ahead);
    }
  }
}

void gemm_bf16_avx2(const GemmArgs& args) {
  for (int64_t block = 0; block < args.blocks; block += kNearBlocks) {
    const bool last = block + kNearBlocks >= args.blocks;
    const int64_t end = last ? args.blocks : block + kNearBlocks;
    const uint8_t* b = static_cast<const uint8_t*>(args.b);
    run_blocks(args, block, end, last ? args.next : b + end * args.b_stride);
  }
}

}  // namespace

extern const Isa kAvx2Isa = {
    .name = "avx2",
    .usable = usable,
    .automatic = true,
    .row_format = RowFormat::f32,
    .gemm_bf16 = gemm_bf16_avx2,
    .gemm_int8 = gemm_int8_avx2,
    .gemm_int4 = gemm_int4_avx2,
    .row_from_bf16 = f32_row_from_bf16_avx2,
    .row_from_f32 = f32_row_from_f32_avx2,
    .f32_from_bf16 = f32_from_bf16_avx2,
    .bf16_from_f32 = bf16_from_f32_avx2,
    .quantize_row = quantize_row_avx2,
    .silu_mul = silu_mul_avx2,
    .add_scaled = add_scaled_avx2,
};

}  // namespace kt
