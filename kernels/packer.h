// What every instruction set does to weights before they are of use: quantizes rows and puts them into the
// order of gemm.h. All rows of this table give the same bytes. The arithmetic is in packer_<isa>.cpp, blocks
// are cut in pack.cpp and quantize.cpp, the choice is in dispatch.cpp. Plain structs only, as in gemm.h.
#pragma once

#include <cstdint>

#include "gemm.h"

namespace kt {

// A group of 32 bf16 weights w becomes 32 nibbles q in [-8, 7] and one scale s, so that s * q is close to w.
// For given q the best s is dot(w, q) / dot(q, q), and what it explains of the group is dot(w, q)^2 / dot(q,
// q). So q = clamp(round(size * w / largest)) is tried for sizes from "clipped by a fifth" to "some
// headroom", then for those beside the best. The largest value counts as negative, since -8 reaches one
// further than 7; the scale takes that sign back. w enters as an integer, round(kInt4Unit * w / largest), so
// that both sums are exact in whatever order they are added: the same result on every CPU.
constexpr int kInt4Unit = 4096;
// Sizes are eighths: round(size * w / largest) is (integer w * eighths + 2^14) >> 15.
constexpr int kInt4FirstSize = 46;
constexpr int kInt4LastSize = 74;
constexpr int kInt4SizeStep = 2;
constexpr int kInt4FirstClipped = 60;  // below, nothing is rounded to 8
// A group with less than this at most is zero: the reciprocals of its scales would not be finite.
constexpr float kInt4Least = 0x1p-110f;

struct Packer {
  const char* name;
  bool (*usable)();

  // Word p (four bytes) of row c to block + 64 p + 4 c, its bits changed by `flip`, for the 16 rows `stride`
  // bytes apart. `block` is a multiple of 64.
  void (*interleave)(const uint8_t* first, int64_t stride, int64_t words, uint32_t flip, uint8_t* block);
  // The largest magnitude as bf16 bits; from 0x7f80 on where a value is NaN or infinite.
  uint16_t (*largest)(const uint16_t* source, int64_t count);
  // round(source * inverse), which must stay within +-127.
  void (*quantize_int8)(const uint16_t* source, int64_t count, float inverse, int8_t* values);
  // Nibbles and scales as in quantize.h. Returns false where a value is NaN or infinite.
  bool (*quantize_int4)(const uint16_t* source, int64_t count, uint8_t* values, uint16_t* scales);
  // 16 bytes per group, from two neighbours in a byte (input 2i low, 2i + 1 high) to inputs 16 apart (i low,
  // 16 + i high).
  void (*split_int4)(const uint8_t* values, int64_t groups, uint8_t* split);
};

extern const Packer kReferencePacker;
extern const Packer kAvx2Packer;

}  // namespace kt
