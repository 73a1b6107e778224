// What the AVX2 row of the table is put together from, as plain functions (see gemm.h for why there is
// nothing inline).
#pragma once

#include <cstdint>

#include "gemm.h"

namespace kt {

// Up to this many rows have registers for sums of their own, and read a block of weights as one memory
// stream, which is fetched kStreamAhead bytes ahead (measured: further is slower).
constexpr int64_t kStreamRows = 3;
constexpr int64_t kStreamAhead = 1024;

// vector_avx2.cpp
void f32_from_bf16_avx2(const uint16_t* source, int64_t count, float* target);
void bf16_from_f32_avx2(const float* source, int64_t count, uint16_t* target);
void f32_row_from_bf16_avx2(const uint16_t* source, int64_t count, void* row);
void f32_row_from_f32_avx2(const float* source, int64_t count, float scale, void* row);
void quantize_row_avx2(const float* source, int64_t count, int64_t k, void* row);
void silu_mul_avx2(const float* gate_up, int64_t pairs, float* h);
void add_scaled_avx2(const float* source, float weight, int64_t count, float* sum);

// gemm_avx2_int.cpp
void gemm_int8_avx2(const GemmArgs& args);
void gemm_int4_avx2(const GemmArgs& args);

}  // namespace kt
