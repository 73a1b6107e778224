// Portable matrix products, one loop a formula: what every other instruction set is compared with, and the
// fallback where none fits. Activations are float rows.
#include <cstdint>

#include "gemm.h"
#include "portable.h"

namespace kt {
namespace {

bool usable() { return true; }

template <typename T>
T read(const uint8_t* place) {
  T value;
  __builtin_memcpy(&value, place, sizeof(T));
  return value;
}

RowSegment segment_of(int64_t k, int64_t input) {
  int64_t index = 0;
  while (input >= row_segment(k, index).begin + row_segment(k, index).count) ++index;
  return row_segment(k, index);
}

// Calls sums(a, b, sums[16]) for each row and block and stores what it leaves.
template <typename Sums>
void for_each_tile(const GemmArgs& args, Sums sums_of) {
  for (int64_t row = 0; row < args.rows; ++row) {
    const uint8_t* a = static_cast<const uint8_t*>(args.a) + row * args.a_stride;
    for (int64_t block = 0; block < args.blocks; ++block) {
      float sums[kBlockColumns] = {};
      sums_of(a, static_cast<const uint8_t*>(args.b) + block * args.b_stride, sums);
      float* c = args.c + row * args.c_stride + block * args.c_block_stride;
      for (int64_t column = 0; column < kBlockColumns; ++column) {
        c[column] = args.accumulate ? c[column] + sums[column] : sums[column];
      }
    }
  }
}

void gemm_bf16_reference(const GemmArgs& args) {
  for_each_tile(args, [&](const uint8_t* a_row, const uint8_t* b_block, float* sums) {
    const auto* a = reinterpret_cast<const float*>(a_row);
    const auto* b = reinterpret_cast<const uint16_t*>(b_block);
    for (int64_t k = 0; k < args.k; k += 2) {
      for (int64_t column = 0; column < kBlockColumns; ++column) {
        sums[column] += a[k] * widen(b[k * 16 + column * 2]) + a[k + 1] * widen(b[k * 16 + column * 2 + 1]);
      }
    }
  });
}

void gemm_int8_reference(const GemmArgs& args) {
  for_each_tile(args, [&](const uint8_t* a, const uint8_t* b, float* sums) {
    for (int64_t i = 0; i < row_segments(args.k); ++i) {
      const RowSegment segment = row_segment(args.k, i);
      int32_t dots[kBlockColumns] = {};
      for (int64_t k = segment.begin; k < segment.begin + segment.count; ++k) {
        for (int64_t column = 0; column < kBlockColumns; ++column) {
          const int32_t weight = b[k / 4 * 64 + column * 4 + k % 4] - 128;
          dots[column] += static_cast<int8_t>(a[k]) * weight;
        }
      }
      const auto row_scale = read<float>(a + segment.scale_offset);
      for (int64_t column = 0; column < kBlockColumns; ++column) {
        const auto column_scale = read<float>(b + args.k * 16 + column * 4);
        sums[column] += static_cast<float>(dots[column]) * (column_scale * row_scale);
      }
    }
  });
}

void gemm_int4_reference(const GemmArgs& args) {
  for_each_tile(args, [&](const uint8_t* a, const uint8_t* b, float* sums) {
    for (int64_t group = 0; group < args.k / kInt4Group; ++group) {
      const auto row_scale = read<float>(a + segment_of(args.k, group * kInt4Group).scale_offset);
      int32_t dots[kBlockColumns] = {};
      for (int64_t i = 0; i < kInt4Group; ++i) {
        const uint8_t* row = b + group * 256 + i % 16 / 4 * 64;
        for (int64_t column = 0; column < kBlockColumns; ++column) {
          const uint8_t both = row[column * 4 + i % 4];
          const int32_t nibble = i < 16 ? both & 15 : both >> 4;
          dots[column] += static_cast<int8_t>(a[group * kInt4Group + i]) * (nibble - 8);
        }
      }
      for (int64_t column = 0; column < kBlockColumns; ++column) {
        const auto scale = read<uint16_t>(b + args.k * 8 + group * 32 + column * 2);
        sums[column] += static_cast<float>(dots[column]) * (widen(scale) * row_scale);
      }
    }
  });
}

}  // namespace

extern const Isa kReferenceIsa = {
    .name = "reference",
    .usable = usable,
    .automatic = true,
    .row_format = RowFormat::f32,
    .gemm_bf16 = gemm_bf16_reference,
    .gemm_int8 = gemm_int8_reference,
    .gemm_int4 = gemm_int4_reference,
    .row_from_bf16 = f32_row_from_bf16,
    .row_from_f32 = f32_row_from_f32,
    .f32_from_bf16 = f32_from_bf16,
    .bf16_from_f32 = bf16_from_f32,
    .quantize_row = quantize_row,
    .silu_mul = silu_mul,
    .add_scaled = add_scaled,
};

}  // namespace kt
