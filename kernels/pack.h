// From rows of a weight matrix to the packed blocks of gemm.h. Written once for all instruction sets.
#pragma once

#include <cstdint>

#include "gemm.h"
#include "packer.h"

namespace kt {

// Inputs and outputs of the base weights are padded to this, the largest step of any kernel (one AMX int8
// tile row, two int4 groups).
constexpr int64_t kStep = 64;

constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
constexpr int64_t blocks_of(int64_t columns) { return (columns + kBlockColumns - 1) / kBlockColumns; }

// Bytes of one block with k (padded) inputs.
int64_t block_bytes(Format format, int64_t k);

// Up to 16 rows of bf16 weights, `count` values in each, `stride` values apart; missing rows and values are
// zero.
struct WeightRows {
  const uint16_t* first;
  int64_t stride;
  int64_t rows;
  int64_t count;
};

void pack_bf16_block(const Packer& packer, const WeightRows& source, int64_t k, uint8_t* block);

// The first `words` words (four bytes) of `rows` rows, up to 16, to rows of 64 bytes; missing rows become
// zeros changed by `flip`.
void interleave_rows(const Packer& packer, const uint8_t* first, int64_t stride, int64_t rows, int64_t words,
                     uint32_t flip, uint8_t* block);

uint16_t bf16_from_float(float value);
float float_from_bf16(uint16_t value);

}  // namespace kt
