// What the AVX-512 and AMX rows of the table share, as plain functions (see gemm.h for why there is nothing
// inline).
#pragma once

#include <cstdint>

#include "gemm.h"

namespace kt {

// Up to this many rows read a block of weights as one memory stream, which is fetched kStreamAhead bytes
// ahead of its loads: about what arrives in one memory latency. With more rows, panels of them pass over
// weights in the cache.
constexpr int64_t kStreamRows = 4;
constexpr int64_t kStreamAhead = 2048;

// vector_avx512.cpp
void f32_from_bf16_avx512(const uint16_t* source, int64_t count, float* target);
void bf16_from_f32_avx512(const float* source, int64_t count, uint16_t* target);
void f32_row_from_bf16_avx512(const uint16_t* source, int64_t count, void* row);
void f32_row_from_f32_avx512(const float* source, int64_t count, float scale, void* row);
void bf16_row_from_bf16_avx512(const uint16_t* source, int64_t count, void* row);
void bf16_row_from_f32_avx512(const float* source, int64_t count, float scale, void* row);
void quantize_row_avx512(const float* source, int64_t count, int64_t k, void* row);
void silu_mul_avx512(const float* gate_up, int64_t pairs, float* h);
void add_scaled_avx512(const float* source, float weight, int64_t count, float* sum);

// gemm_avx512_int.cpp
void gemm_int8_avx512(const GemmArgs& args);
void gemm_int4_avx512(const GemmArgs& args);
// A segment of one int4 block as int8 + 128, in the order of int8 blocks, with one scale per column: for
// products over many rows. Half a step of int8 is a sixteenth of what int4 itself loses.
void widen_int4_avx512(const uint8_t* block, int64_t k, const RowSegment& segment, uint8_t* values,
                       float* column_scales);

// gemm_avx512_bf16.cpp
void gemm_bf16_avx512_bf16(const GemmArgs& args);

}  // namespace kt
