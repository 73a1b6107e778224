// What every instruction set implements, and the packed layouts that they share. The arithmetic is in
// gemm_<isa>.cpp, packing in pack.cpp, the choice in dispatch.cpp. Plain structs only: files compiled for
// different CPUs include this header, and an inline function or template here could be emitted with AVX-512
// code and then be picked by the linker for every CPU.
#pragma once

#include <cstdint>

namespace kt {

// A weight matrix W (N outputs x K inputs) is packed as blocks of 16 outputs, each block one contiguous run
// of bytes with K padded to a multiple of the format's step. One step of four bytes per column feeds one
// dot-product instruction (VNNI order), so a block's row of 64 bytes is one AVX-512 register, two AVX2
// registers, or one row of an AMX B tile (16 rows = one 1 KiB tile):
//
//   bf16   row p:  | k=2p, 2p+1 of column 0 | ... of column 1 | ... | ... of column 15 |        K/2 rows
//   int8   row p:  | k=4p .. 4p+3 of column 0 | ...                  | ... of column 15 |        K/4 rows
//                  each byte is value + 128 (vpdpbusd wants one side unsigned)
//          then    | float scale x 16 |                                                          1 row
//   int4   group g (32 inputs), row t=0..3: byte (column c, i) = nibble of k=32g+4t+i  (low)
//                                                              | nibble of k=32g+16+4t+i (high)  K/8 rows
//          then    for each group | bf16 scale x 16 |                                            32 bytes a
//          group
//                  value = scale x (nibble - 8)
//
// Gate and up are interleaved by block (gate 0, up 0, gate 1, up 1, ...), so a task reads one contiguous run
// and ends in SiLU.
constexpr int64_t kBlockColumns = 16;
constexpr int64_t kInt4Group = 32;
constexpr int64_t kSegmentInputs = 1024;  // the most inputs of an activation row that share a scale
enum class Format : uint8_t { bf16, int8, int4 };

// How a kernel wants its activations for bf16 weights: f32 where the CPU multiplies floats, bf16 where it has
// a bf16 dot product.
enum class RowFormat : uint8_t { f32, bf16 };

// A quantized activation row (int8 and int4 weights), k being the padded number of inputs, in n nearly equal
// segments of at most kSegmentInputs inputs, each with its own scale (one scale for all of h, whose values
// are far from evenly sized, costs half as much again in error):
//   k int8 values within +-127 | n float scales | n int32 sums of a segment | k/32 int32 sums of 32 values
//   each
// The sums take back what +128 and -8 add. A segment with a NaN or infinity has the scale NaN.
struct RowSegment {
  int64_t begin;
  int64_t count;         // a multiple of 64
  int64_t scale_offset;  // bytes from the row's start
  int64_t sum_offset;
  int64_t group_offset;  // of the segment's first sum of 32
};

int64_t row_segments(int64_t k);
RowSegment row_segment(int64_t k, int64_t index);
int64_t quantized_row_bytes(int64_t k);

// c(row, column) = or += sum_k a(row, k) * w(column, k); columns of block b are at c + row * c_stride + b *
// c_block_stride. Rows of `a` are zero-filled up to k rounded up to 32 (bf16) or 64 (quantized), and up to 15
// rows behind the last are readable.
struct GemmArgs {
  const void* a;
  int64_t a_stride;  // bytes from row to row
  int64_t rows;
  const void* b;
  int64_t b_stride;  // bytes from block to block
  int64_t blocks;
  int64_t k;
  float* c;
  int64_t c_stride;        // floats from row to row
  int64_t c_block_stride;  // floats from block to block
  bool accumulate;         // bf16 only
  // Weights that this thread reads after these, or null: fetched into the cache while the last blocks
  // multiply.
  const uint8_t* next = nullptr;
  int64_t next_bytes = 0;
};

// One instruction set's row of the table in dispatch.cpp.
struct Isa {
  const char* name;
  bool (*usable)();
  bool automatic;  // false: only when asked for by name
  RowFormat row_format;

  void (*gemm_bf16)(const GemmArgs& args);
  void (*gemm_int8)(const GemmArgs& args);
  void (*gemm_int4)(const GemmArgs& args);

  void (*row_from_bf16)(const uint16_t* source, int64_t count, void* row);
  void (*row_from_f32)(const float* source, int64_t count, float scale, void* row);
  void (*f32_from_bf16)(const uint16_t* source, int64_t count, float* target);
  void (*bf16_from_f32)(const float* source, int64_t count, uint16_t* target);
  // Writes a quantized row of k values; those from count on are zero.
  void (*quantize_row)(const float* source, int64_t count, int64_t k, void* row);
  // gate_up holds `pairs` times 16 gate columns and 16 up columns; h gets silu(gate) * up, 16 a pair.
  void (*silu_mul)(const float* gate_up, int64_t pairs, float* h);
  void (*add_scaled)(const float* source, float weight, int64_t count, float* sum);
};

extern const Isa kReferenceIsa;
extern const Isa kAvx2Isa;
extern const Isa kAvx512Isa;
extern const Isa kAvx512Bf16Isa;
extern const Isa kAmxIsa;
extern const Isa kAmxModelIsa;

}  // namespace kt
