// From bf16 weight rows to int8 or int4 rows with scales: the format that files keep, the same for every CPU
// and pool count. Packing is in pack.cpp.
#pragma once

#include <cstdint>

#include "gemm.h"
#include "pack.h"
#include "packer.h"

namespace kt {

// int8: one byte per value within +-127, one float scale per row.
// int4: two values per byte, the even one in the low nibble, each value + 8; one bf16 scale per group of 32,
// rounded up. value = scale * stored value. Scales may be negative (int4), never NaN or infinite.
constexpr int64_t int4_row_bytes(int64_t count) { return (count + 1) / 2; }
constexpr int64_t int4_row_groups(int64_t count) { return (count + kInt4Group - 1) / kInt4Group; }

// Both throw std::invalid_argument for a value that is not finite. int8: the values [begin, begin + count) of
// a row with `inputs` values, whose scale, which is returned, is that of the whole row.
float quantize_int8_row(const Packer& packer, const uint16_t* row, int64_t inputs, int64_t begin,
                        int64_t count, int8_t* values);
void quantize_int4_row(const Packer& packer, const uint16_t* source, int64_t count, uint8_t* values,
                       uint16_t* scales);

// One matrix of quantized rows, as loaded from a file or made by the functions above.
struct QuantizedMatrix {
  const uint8_t* values;
  const void* scales;  // float (int8) or bf16 (int4)
  int64_t inputs;
};

// The place of the first of `rows` rows' scales that is NaN or infinite, or -1.
int64_t first_scale_not_finite(Format format, const QuantizedMatrix& matrix, int64_t rows);

// A bf16 matrix of contiguous rows.
struct Bf16Matrix {
  const uint16_t* values;
  int64_t rows;
  int64_t inputs;
};

// All rows of a matrix by the functions above; `values` and `scales` as QuantizedMatrix has them.
void quantize_matrix(const Packer& packer, Format format, const Bf16Matrix& matrix, uint8_t* values,
                     void* scales);

// `rows` rows from `row` on, inputs [begin, begin + count), to one block with k inputs. int4: begin is a
// multiple of 64.
struct QuantizedPart {
  int64_t row;
  int64_t rows;
  int64_t begin;
  int64_t count;
};

void pack_int8_block(const Packer& packer, const QuantizedMatrix& matrix, const QuantizedPart& part,
                     int64_t k, uint8_t* block);
void pack_int4_block(const Packer& packer, const QuantizedMatrix& matrix, const QuantizedPart& part,
                     int64_t k, uint8_t* block);

}  // namespace kt
