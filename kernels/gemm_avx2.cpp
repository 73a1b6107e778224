// AVX2 with FMA. A 64-byte row of a block is two registers of 8 columns x 2 inputs; bf16 is widened to float
// as in gemm_avx512.cpp.
//
// Registers of a panel (up to 4 rows x 1 block):  ymm0-7 sums | 2 widened weights | 2 raw rows | 1 broadcast
// activation | mask int8: vpmaddubsw on |w| and a with w's sign. Weights and activations stay within +-127,
// so a pair sum is at most 2 * 127 * 127 and never saturates.
#include <immintrin.h>

#include <cstdint>

#include "gemm.h"

namespace kt {
namespace {

constexpr int64_t kPanelRows = 4;
constexpr int64_t kStreamAhead = 2048;

bool usable() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

__m256 even_inputs(__m256i row) { return _mm256_castsi256_ps(_mm256_slli_epi32(row, 16)); }
__m256 odd_inputs(__m256i row) {
  return _mm256_castsi256_ps(_mm256_and_si256(row, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

void store_sum(float* c, __m256 sum, bool accumulate) {
  _mm256_storeu_ps(c, accumulate ? _mm256_add_ps(_mm256_loadu_ps(c), sum) : sum);
}

template <int kRows>
void run_panel(const GemmArgs& args, int64_t row, int64_t block) {
  const int64_t a_stride = args.a_stride / 4;
  const float* a = static_cast<const float*>(args.a) + row * a_stride;
  const uint8_t* b = static_cast<const uint8_t*>(args.b) + block * args.b_stride;
  __m256 sums[kRows][2];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) sums[i][0] = sums[i][1] = _mm256_setzero_ps();
  for (int64_t pair = 0; pair < args.k / 2; ++pair, a += 2, b += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(b) + kStreamAhead, _MM_HINT_T0);
    const __m256i low = _mm256_load_si256(reinterpret_cast<const __m256i*>(b));
    const __m256i high = _mm256_load_si256(reinterpret_cast<const __m256i*>(b + 32));
    const __m256 even_low = even_inputs(low);
    const __m256 even_high = even_inputs(high);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const __m256 x = _mm256_broadcast_ss(a + i * a_stride);
      sums[i][0] = _mm256_fmadd_ps(x, even_low, sums[i][0]);
      sums[i][1] = _mm256_fmadd_ps(x, even_high, sums[i][1]);
    }
    const __m256 odd_low = odd_inputs(low);
    const __m256 odd_high = odd_inputs(high);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const __m256 x = _mm256_broadcast_ss(a + i * a_stride + 1);
      sums[i][0] = _mm256_fmadd_ps(x, odd_low, sums[i][0]);
      sums[i][1] = _mm256_fmadd_ps(x, odd_high, sums[i][1]);
    }
  }
  float* c = args.c + row * args.c_stride + block * args.c_block_stride;
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    store_sum(c + i * args.c_stride, sums[i][0], args.accumulate);
    store_sum(c + i * args.c_stride + 8, sums[i][1], args.accumulate);
  }
}

void gemm_bf16_avx2(const GemmArgs& args) {
  for (int64_t block = 0; block < args.blocks; ++block) {
    for (int64_t row = 0; row < args.rows; row += kPanelRows) {
      switch (args.rows - row) {
        case 1:
          run_panel<1>(args, row, block);
          break;
        case 2:
          run_panel<2>(args, row, block);
          break;
        case 3:
          run_panel<3>(args, row, block);
          break;
        default:
          run_panel<4>(args, row, block);
      }
    }
  }
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

__m256 widen(__m128i bits) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)); }

// sum of four products a lane, weights and x signed bytes within +-127
__m256i dot_signed(__m256i weights, __m256i x) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights));
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

template <int kRows>
void run_int8_panel(const GemmArgs& args, const RowSegment& segment, const uint8_t* a, const uint8_t* block,
                    float* c) {
  __m256i sums[kRows][2];
#pragma GCC unroll 2
  for (int i = 0; i < kRows; ++i) sums[i][0] = sums[i][1] = _mm256_setzero_si256();
  const __m256i offset = _mm256_set1_epi8(-128);
  const uint8_t* b = block + segment.begin * kBlockColumns;
  for (int64_t k = segment.begin; k < segment.begin + segment.count; k += 4, b += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(b) + kStreamAhead, _MM_HINT_T0);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256i row = _mm256_load_si256(reinterpret_cast<const __m256i*>(b + 32 * half));
      const __m256i weights = _mm256_xor_si256(row, offset);
#pragma GCC unroll 2
      for (int i = 0; i < kRows; ++i) {
        const __m256i x = _mm256_set1_epi32(read_int(a + i * args.a_stride + k));
        sums[i][half] = _mm256_add_epi32(sums[i][half], dot_signed(weights, x));
      }
    }
  }
  const auto* scales = reinterpret_cast<const float*>(block + args.k * 16);
#pragma GCC unroll 2
  for (int i = 0; i < kRows; ++i) {
    const __m256 row_scale = _mm256_set1_ps(read_float(a + i * args.a_stride + segment.scale_offset));
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256 scale = _mm256_mul_ps(_mm256_loadu_ps(scales + 8 * half), row_scale);
      const __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[i][half]), scale);
      store_sum(c + i * args.c_stride + 8 * half, value, segment.begin > 0);
    }
  }
}

// Nibbles are at most 15, so the eight steps of a group (8 * 2 * 15 * 127) add up in 16 bits without
// saturation.
template <int kRows>
void run_int4_panel(const GemmArgs& args, const RowSegment& segment, const uint8_t* a, const uint8_t* block,
                    float* c) {
  const __m256i low = _mm256_set1_epi8(15);
  __m256 totals[kRows][2];
#pragma GCC unroll 2
  for (int i = 0; i < kRows; ++i) totals[i][0] = totals[i][1] = _mm256_setzero_ps();
  for (int64_t k = segment.begin; k < segment.begin + segment.count; k += kInt4Group) {
    const uint8_t* b = block + k * 8;
    const uint8_t* scales = block + args.k * 8 + k / kInt4Group * 32;
    const int64_t group_sum = segment.group_offset + (k - segment.begin) / kInt4Group * 4;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m256i sums[kRows];
#pragma GCC unroll 2
      for (int i = 0; i < kRows; ++i) sums[i] = _mm256_setzero_si256();
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) {
        _mm_prefetch(reinterpret_cast<const char*>(b) + 64 * t + kStreamAhead, _MM_HINT_T0);
        const __m256i row = _mm256_load_si256(reinterpret_cast<const __m256i*>(b + 64 * t + 32 * half));
        const __m256i first = _mm256_and_si256(row, low);
        const __m256i second = _mm256_and_si256(_mm256_srli_epi16(row, 4), low);
#pragma GCC unroll 2
        for (int i = 0; i < kRows; ++i) {
          const uint8_t* x = a + i * args.a_stride + k + 4 * t;
          const __m256i products =
              _mm256_add_epi16(_mm256_maddubs_epi16(first, _mm256_set1_epi32(read_int(x))),
                               _mm256_maddubs_epi16(second, _mm256_set1_epi32(read_int(x + 16))));
          sums[i] = _mm256_add_epi16(sums[i], products);
        }
      }
      const __m256 scale = widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + 16 * half)));
#pragma GCC unroll 2
      for (int i = 0; i < kRows; ++i) {
        const int32_t correction = read_int(a + i * args.a_stride + group_sum) * -8;
        const __m256i sum =
            _mm256_add_epi32(_mm256_madd_epi16(sums[i], _mm256_set1_epi16(1)), _mm256_set1_epi32(correction));
        totals[i][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, totals[i][half]);
      }
    }
  }
#pragma GCC unroll 2
  for (int i = 0; i < kRows; ++i) {
    const __m256 row_scale = _mm256_set1_ps(read_float(a + i * args.a_stride + segment.scale_offset));
    store_sum(c + i * args.c_stride, _mm256_mul_ps(totals[i][0], row_scale), segment.begin > 0);
    store_sum(c + i * args.c_stride + 8, _mm256_mul_ps(totals[i][1], row_scale), segment.begin > 0);
  }
}

using RunPanel = void (*)(const GemmArgs& args, const RowSegment& segment, const uint8_t* a,
                          const uint8_t* block, float* c);

void run_pairs(const GemmArgs& args, RunPanel one_row, RunPanel two_rows) {
  for (int64_t block = 0; block < args.blocks; ++block) {
    const uint8_t* b = static_cast<const uint8_t*>(args.b) + block * args.b_stride;
    for (int64_t row = 0; row < args.rows; row += 2) {
      const uint8_t* a = static_cast<const uint8_t*>(args.a) + row * args.a_stride;
      const RunPanel run = args.rows - row == 1 ? one_row : two_rows;
      float* c = args.c + row * args.c_stride + block * args.c_block_stride;
      for (int64_t i = 0; i < row_segments(args.k); ++i) run(args, row_segment(args.k, i), a, b, c);
    }
  }
}

void gemm_int8_avx2(const GemmArgs& args) { run_pairs(args, run_int8_panel<1>, run_int8_panel<2>); }

void gemm_int4_avx2(const GemmArgs& args) { run_pairs(args, run_int4_panel<1>, run_int4_panel<2>); }

float widen_one(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  __builtin_memcpy(&value, &word, 4);
  return value;
}

// Round to nearest even; NaN stays NaN.
__m128i narrow(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i result = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(result, result), 0xd8);
  return _mm256_castsi256_si128(packed);
}

void f32_from_bf16(const uint16_t* source, int64_t count, float* target) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(target + i, widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
  }
  for (; i < count; ++i) target[i] = widen_one(source[i]);
}

void bf16_from_f32(const float* source, int64_t count, uint16_t* target) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i), narrow(_mm256_loadu_ps(source + i)));
  }
  for (; i < count; ++i) {
    const __m128i one = narrow(_mm256_set1_ps(source[i]));
    target[i] = static_cast<uint16_t>(_mm_extract_epi16(one, 0));
  }
}

void row_from_bf16(const uint16_t* source, int64_t count, void* row) {
  f32_from_bf16(source, count, static_cast<float*>(row));
}

void row_from_f32(const float* source, int64_t count, float scale, void* row) {
  float* target = static_cast<float*>(row);
  for (int64_t i = 0; i < count; ++i) target[i] = source[i] * scale;
}

// As in vector_avx512.h, with 2^n put together from its exponent bits.
__m256 exp_f32x8(__m256 x) {
  x = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(-87.0f)), _mm256_set1_ps(88.0f));
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504088896341f)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 p = _mm256_set1_ps(1.9875691500e-4f);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
  p = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), _mm256_add_ps(r, _mm256_set1_ps(1.0f)));
  const __m256i exponent =
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(p, _mm256_castsi256_ps(exponent));
}

void silu_mul(const float* gate_up, int64_t pairs, float* h) {
  const __m256 one = _mm256_set1_ps(1.0f);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    for (int half = 0; half < 16; half += 8) {
      const __m256 gate = _mm256_loadu_ps(gate_up + pair * 32 + half);
      const __m256 up = _mm256_loadu_ps(gate_up + pair * 32 + 16 + half);
      const __m256 exp_minus = exp_f32x8(_mm256_sub_ps(_mm256_setzero_ps(), gate));
      const __m256 silu = _mm256_div_ps(gate, _mm256_add_ps(one, exp_minus));
      _mm256_storeu_ps(h + pair * 16 + half, _mm256_mul_ps(silu, up));
    }
  }
}

void add_scaled(const float* source, float weight, int64_t count, float* sum) {
  const __m256 weight_f32x8 = _mm256_set1_ps(weight);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256 added = _mm256_fmadd_ps(_mm256_loadu_ps(source + i), weight_f32x8, _mm256_loadu_ps(sum + i));
    _mm256_storeu_ps(sum + i, added);
  }
  for (; i < count; ++i) sum[i] += weight * source[i];
}

// values[0, count) to the segment, zeros behind; count may be negative.
void quantize_segment(const float* source, int64_t count, const RowSegment& segment, uint8_t* row) {
  float largest = 0.0f;
  bool bad = false;
  for (int64_t i = 0; i < (count < segment.count ? count : segment.count); ++i) {
    const float size = __builtin_fabsf(source[i]);
    bad |= !(size < __builtin_inff());
    largest = size > largest ? size : largest;
  }
  const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
  int32_t total = 0;
  for (int64_t group = 0; group < segment.count; group += kInt4Group) {
    int32_t sum = 0;
    for (int64_t i = group; i < group + kInt4Group; ++i) {
      const float value = i < count && !bad ? source[i] * inverse : 0.0f;
      const auto rounded = static_cast<int8_t>(_mm_cvtss_si32(_mm_set_ss(value)));
      row[segment.begin + i] = static_cast<uint8_t>(rounded);
      sum += rounded;
    }
    __builtin_memcpy(row + segment.group_offset + group / kInt4Group * 4, &sum, 4);
    total += sum;
  }
  const float scale = bad ? __builtin_nanf("") : largest / 127.0f;
  __builtin_memcpy(row + segment.scale_offset, &scale, 4);
  __builtin_memcpy(row + segment.sum_offset, &total, 4);
}

void quantize_row(const float* source, int64_t count, int64_t k, void* row) {
  for (int64_t i = 0; i < row_segments(k); ++i) {
    const RowSegment segment = row_segment(k, i);
    quantize_segment(source + segment.begin, count - segment.begin, segment, static_cast<uint8_t*>(row));
  }
}

}  // namespace

extern const Isa kAvx2Isa = {"avx2",         usable,         true,          RowFormat::f32, gemm_bf16_avx2,
                             gemm_int8_avx2, gemm_int4_avx2, row_from_bf16, row_from_f32,   f32_from_bf16,
                             bf16_from_f32,  quantize_row,   silu_mul,      add_scaled};

}  // namespace kt
