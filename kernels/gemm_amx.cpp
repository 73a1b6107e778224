// AMX: tiles of 16 rows x 64 bytes. Built twice: for the hardware, and as "amx_model" on the software tiles
// of amx_tiles.h.
//
//               block 0   block 1
//   rows  0-15   TMM0      TMM1     sums       TMM4 activations, 64 bytes of inputs
//   rows 16-31   TMM2      TMM3                TMM5
//                TMM6      TMM7     weights: 16 packed rows = 1 KiB
//
// Four products for four loads per step of 64 bytes of inputs: 32 bf16 (tdpbf16ps), or 64 int8 (tdpbsud:
// signed activations, weights + 128). int4 weights are widened to int8 first, for all rows of the expert at
// once. An operand tile is zeroed as soon as it is through: every load takes a physical tile register, a
// zeroed tile holds none, and where two hardware threads share a core there are too few for eight tiles in
// use (measured on Emerald Rapids: 33 ns a product with all eight held, 20 with the operands given back;
// alone on a core it makes no difference). The core is free while tiles multiply: it fetches the weights that
// come next and scales the sums of the group before. Experts with few rows read their weights with AVX-512
// instead, where a tile would be mostly empty.
#include <cstdint>

#include "amx_tiles.h"
#include "gemm.h"

#ifdef KT_AMX_MODEL
#include "portable.h"
#else
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "gemm_avx512.h"
#endif

namespace kt {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kGroupRows = 32;
constexpr int64_t kTileBytes = 1024;

// Rows 0-15 and 16-31 of a group; fewer at the end of an expert's rows.
void configure(int64_t rows) {
  TileConfig config{};
  config.palette = 1;
  const auto upper = static_cast<uint8_t>(rows < kTileRows ? rows : kTileRows);
  const auto lower = static_cast<uint8_t>(rows > kTileRows ? rows - kTileRows : 1);
  const uint8_t heights[8] = {upper, upper, lower, lower, upper, lower, kTileRows, kTileRows};
  for (int tile = 0; tile < 8; ++tile) {
    config.rows[tile] = heights[tile];
    config.row_bytes[tile] = 64;
  }
  tiles_configure(config);
}

// Reconfigures only when a group's height differs from the one before: that takes as long as a dozen
// products.
class Tiles {
 public:
  Tiles() = default;
  ~Tiles() { tiles_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  void set_rows(int64_t rows) {
    if (rows == rows_) return;
    configure(rows);
    rows_ = rows;
  }

 private:
  int64_t rows_ = -1;
};

enum class Product : uint8_t { bf16, bytes };

template <Product kProduct, int kC, int kA, int kB>
void dot() {
  if constexpr (kProduct == Product::bf16) {
    tile_dot_bf16<kC, kA, kB>();
  } else {
    tile_dot_bytes<kC, kA, kB>();
  }
}

// One group of up to 32 rows against one or two blocks.
struct TileWork {
  const uint8_t* a;
  int64_t a_stride;
  int64_t rows;
  const uint8_t* b;
  int64_t b_stride;
  bool pair;  // two blocks
  int64_t steps;

  bool lower() const { return rows > kTileRows; }
};

// The rows of a panel in groups of 32 and one with what is left, with which every second pass over the rows
// begins: it follows itself then, in tiles that have its height already.
struct RowGroups {
  int64_t rows;
  int64_t count;

  explicit RowGroups(int64_t all) : rows(all), count((all + kGroupRows - 1) / kGroupRows) {}
  int64_t at(int64_t turn, int64_t pass) const { return pass % 2 == 0 ? turn : count - 1 - turn; }
  int64_t begin(int64_t group) const { return group * kGroupRows < rows ? group * kGroupRows : rows; }
};

// Fetches the weights that come next into the second-level cache, a few lines per step: memory then streams
// for as long as tiles multiply, not in the first row group only.
class Ahead {
 public:
  Ahead(const GemmArgs& args, int64_t block, int64_t steps) {
    const int64_t following = block + 2;
    const int64_t blocks = args.blocks - following < 2 ? args.blocks - following : 2;
    const bool last = blocks <= 0;
    next_ = last ? args.next : static_cast<const uint8_t*>(args.b) + following * args.b_stride;
    left_ = (last ? args.next_bytes : blocks * args.b_stride) / 64;
    lines_ = (left_ + steps - 1) / steps;
  }
  void step() {
    const int64_t lines = lines_ < left_ ? lines_ : left_;
    for (int64_t line = 0; line < lines; ++line, next_ += 64) __builtin_prefetch(next_, 0, 2);
    left_ -= lines;
  }

 private:
  const uint8_t* next_;
  int64_t left_;
  int64_t lines_;
};

void zero_sums() {
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
}

// `meanwhile` is what the core does beside the tiles, once per step: the tile unit works on its own, and a
// step takes it 64 cycles.
template <Product kProduct, typename Meanwhile>
void multiply(const TileWork& work, Meanwhile meanwhile) {
  const uint8_t* a = work.a;
  const uint8_t* b = work.b;
  for (int64_t step = 0; step < work.steps; ++step, a += 64, b += kTileBytes) {
    tile_load<6>(b, 64);
    tile_load<4>(a, work.a_stride);
    dot<kProduct, 0, 4, 6>();
    if (work.pair) {
      tile_load<7>(b + work.b_stride, 64);
      dot<kProduct, 1, 4, 7>();
    }
    tile_zero<4>();
    if (work.lower()) {
      tile_load<5>(a + kTileRows * work.a_stride, work.a_stride);
      dot<kProduct, 2, 5, 6>();
      if (work.pair) dot<kProduct, 3, 5, 7>();
      tile_zero<5>();
    }
    tile_zero<6>();
    tile_zero<7>();
    meanwhile();
  }
}

// Moves the sums in use between tiles and memory; `columns` is the distance of the two blocks, strides are in
// 4-byte values.
template <typename Move>
void for_each_sum(const TileWork& work, void* base, int64_t stride, int64_t columns, Move move) {
  auto* c = static_cast<float*>(base);
  move.template operator()<0>(c, stride * 4);
  if (work.pair) move.template operator()<1>(c + columns, stride * 4);
  if (!work.lower()) return;
  move.template operator()<2>(c + kTileRows * stride, stride * 4);
  if (work.pair) move.template operator()<3>(c + kTileRows * stride + columns, stride * 4);
}

struct LoadSum {
  template <int kTile>
  void operator()(float* c, int64_t stride) const {
    tile_load<kTile>(c, stride);
  }
};

struct StoreSum {
  template <int kTile>
  void operator()(float* c, int64_t stride) const {
    tile_store<kTile>(c, stride);
  }
};

TileWork work_of(const GemmArgs& args, const RowGroups& groups, int64_t group, int64_t block, int64_t steps) {
  const int64_t row = groups.begin(group);
  return {.a = static_cast<const uint8_t*>(args.a) + row * args.a_stride,
          .a_stride = args.a_stride,
          .rows = groups.begin(group + 1) - row,
          .b = static_cast<const uint8_t*>(args.b) + block * args.b_stride,
          .b_stride = args.b_stride,
          .pair = args.blocks - block > 1,
          .steps = steps};
}

void gemm_bf16_tiles(const GemmArgs& args) {
  Tiles tiles;
  const RowGroups groups(args.rows);
  const int64_t steps = (args.k + 31) / 32;  // a short last step meets zeros in the activations
  for (int64_t block = 0; block < args.blocks; block += 2) {
    Ahead ahead(args, block, groups.count * steps);
    for (int64_t turn = 0; turn < groups.count; ++turn) {
      const int64_t group = groups.at(turn, block / 2);
      const TileWork work = work_of(args, groups, group, block, steps);
      tiles.set_rows(work.rows);
      float* c = args.c + groups.begin(group) * args.c_stride + block * args.c_block_stride;
      if (args.accumulate) {
        for_each_sum(work, c, args.c_stride, args.c_block_stride, LoadSum{});
      } else {
        zero_sums();
      }
      multiply<Product::bf16>(work, [&] { ahead.step(); });
      for_each_sum(work, c, args.c_stride, args.c_block_stride, StoreSum{});
    }
  }
}

float read_float(const uint8_t* place) {
  float value;
  __builtin_memcpy(&value, place, 4);
  return value;
}

int32_t read_int(const uint8_t* place) {
  int32_t value;
  __builtin_memcpy(&value, place, 4);
  return value;
}

// Sixteen columns at once, in a form that every compiler flag takes: left to itself, g++ computes them one by
// one, because c could be where the scales are.
using Floats = float __attribute__((vector_size(64), aligned(4), may_alias));
using Ints = int32_t __attribute__((vector_size(64), aligned(4), may_alias));

// c = or += row scale * column scale * (sum - 128 * sum of the row)
struct Scaling {
  const float* column_scales[2];
  RowSegment segment;
};

// The int32 sums of a group, and what is left to do before they are floats in c. The next group multiplies
// meanwhile.
class ScaledSums {
 public:
  explicit ScaledSums(const GemmArgs& args) : args_(args) {}

  void store_row() {
    if (next_ >= rows_) return;
    const int64_t row = first_row_ + next_;
    const uint8_t* a = static_cast<const uint8_t*>(args_.a) + row * args_.a_stride;
    const float row_scale = read_float(a + scaling_.segment.scale_offset);
    const int32_t correction = 128 * read_int(a + scaling_.segment.sum_offset);
    for (int64_t j = 0; j < blocks_; ++j) {
      auto* c =
          reinterpret_cast<Floats*>(args_.c + row * args_.c_stride + (block_ + j) * args_.c_block_stride);
      const auto* sums = reinterpret_cast<const Ints*>(sums_[next_] + j * kBlockColumns);
      const auto* scales = reinterpret_cast<const Floats*>(scaling_.column_scales[j]);
      const Floats value = __builtin_convertvector(*sums - correction, Floats) * (*scales * row_scale);
      *c = scaling_.segment.begin > 0 ? *c + value : value;
    }
    ++next_;
  }

  void finish() {
    while (next_ < rows_) store_row();
  }

  // Takes over the tiles' sums; those before must be finished.
  void take(const TileWork& work, const Scaling& scaling, int64_t row, int64_t block) {
    for_each_sum(work, sums_, 2 * kBlockColumns, kBlockColumns, StoreSum{});
    scaling_ = scaling;
    first_row_ = row;
    rows_ = work.rows;
    block_ = block;
    blocks_ = work.pair ? 2 : 1;
    next_ = 0;
  }

 private:
  const GemmArgs& args_;
  alignas(64) int32_t sums_[kGroupRows][2 * kBlockColumns];
  Scaling scaling_{};
  int64_t first_row_ = 0;
  int64_t rows_ = 0;
  int64_t block_ = 0;
  int64_t blocks_ = 0;
  int64_t next_ = 0;
};

// All groups over one segment of one or two blocks, at most 32 KiB, which stay in the first-level cache.
void multiply_segment(const GemmArgs& args, const RowGroups& groups, int64_t pass, int64_t block,
                      const TileWork& weights, const Scaling& scaling, Tiles& tiles, ScaledSums& sums,
                      Ahead& ahead) {
  for (int64_t turn = 0; turn < groups.count; ++turn) {
    const int64_t group = groups.at(turn, pass);
    TileWork work = work_of(args, groups, group, block, weights.steps);
    work.a += scaling.segment.begin;
    work.b = weights.b;
    work.b_stride = weights.b_stride;
    tiles.set_rows(work.rows);
    zero_sums();
    multiply<Product::bytes>(work, [&] {
      ahead.step();
      sums.store_row();
      sums.store_row();
    });
    sums.finish();
    sums.take(work, scaling, groups.begin(group), block);
  }
}

void gemm_int8_tiles(const GemmArgs& args) {
  Tiles tiles;
  ScaledSums sums(args);
  const RowGroups groups(args.rows);
  int64_t pass = 0;
  for (int64_t block = 0; block < args.blocks; block += 2) {
    Ahead ahead(args, block, groups.count * args.k / 64);
    TileWork weights = work_of(args, groups, 0, block, 0);
    const uint8_t* b = weights.b;
    const auto* scales = reinterpret_cast<const float*>(b + args.k * 16);
    const auto* next_scales = weights.pair ? scales + args.b_stride / 4 : scales;
    for (int64_t i = 0; i < row_segments(args.k); ++i) {
      const RowSegment segment = row_segment(args.k, i);
      weights.b = b + segment.begin * kBlockColumns;
      weights.steps = segment.count / 64;
      const Scaling scaling{{scales, next_scales}, segment};
      multiply_segment(args, groups, pass++, block, weights, scaling, tiles, sums, ahead);
    }
  }
  sums.finish();
}

#ifdef KT_AMX_MODEL

float widen_scale(const uint8_t* place) {
  uint16_t bits;
  __builtin_memcpy(&bits, place, 2);
  return widen(bits);
}

// Rounds to nearest for |value| < 2^22.
uint8_t round_to_byte(float value) {
  return static_cast<uint8_t>(static_cast<int32_t>(value + 12582912.0f - 12582912.0f) + 128);
}

// What widen_int4_avx512 does, in plain loops.
void widen_int4(const uint8_t* block, int64_t k, const RowSegment& segment, uint8_t* values,
                float* column_scales) {
  const uint8_t* scales = block + k * 8;
  const int64_t first = segment.begin / kInt4Group;
  const int64_t last = first + segment.count / kInt4Group;
  for (int64_t n = 0; n < kBlockColumns; ++n) {
    float largest = 0.0f;
    for (int64_t group = first; group < last; ++group) {
      const float size = __builtin_fabsf(widen_scale(scales + group * 32 + n * 2));
      largest = size > largest ? size : largest;
    }
    column_scales[n] = largest * (8.0f / 127.0f);
    for (int64_t group = first; group < last; ++group) {
      const float scale = widen_scale(scales + group * 32 + n * 2);
      const float factor = largest > 0.0f ? scale / column_scales[n] : 0.0f;
      uint8_t* target = values + (group - first) * kInt4Group * kBlockColumns;
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t place = i / 4 * 64 + n * 4 + i % 4;
        const uint8_t both = block[group * 256 + place];
        target[place] = round_to_byte(static_cast<float>((both & 15) - 8) * factor);
        target[256 + place] = round_to_byte(static_cast<float>((both >> 4) - 8) * factor);
      }
    }
  }
}

#else

constexpr auto widen_int4 = widen_int4_avx512;

#endif

// Two blocks of int4 weights widened to int8 + 128, a segment's inputs, with a scale per column: 32 KiB,
// which fit the first-level cache.
struct alignas(64) Widened {
  uint8_t values[2][kSegmentInputs * kBlockColumns];
  float scales[2][kBlockColumns];
};
thread_local Widened widened;

void gemm_int4_tiles(const GemmArgs& args) {
  Tiles tiles;
  ScaledSums sums(args);
  const RowGroups groups(args.rows);
  int64_t pass = 0;
  for (int64_t block = 0; block < args.blocks; block += 2) {
    Ahead ahead(args, block, groups.count * args.k / 64);
    TileWork weights = work_of(args, groups, 0, block, 0);
    for (int64_t i = 0; i < row_segments(args.k); ++i) {
      const RowSegment segment = row_segment(args.k, i);
      sums.finish();  // reads the column scales that are about to change
      for (int64_t j = 0; j < (weights.pair ? 2 : 1); ++j) {
        const uint8_t* b = static_cast<const uint8_t*>(args.b) + (block + j) * args.b_stride;
        widen_int4(b, args.k, segment, widened.values[j], widened.scales[j]);
      }
      weights.b = widened.values[0];
      weights.b_stride = kSegmentInputs * kBlockColumns;
      weights.steps = segment.count / 64;
      const Scaling scaling{{widened.scales[0], widened.scales[1]}, segment};
      multiply_segment(args, groups, pass++, block, weights, scaling, tiles, sums, ahead);
    }
  }
  sums.finish();
}

#ifdef KT_AMX_MODEL

bool usable() { return true; }

#else

constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
constexpr int kTileData = 18;               // XFEATURE_XTILEDATA

bool has_bit(unsigned word, int bit) { return (word >> bit & 1u) != 0; }

// Linux lets a process use tile registers only after it asked.
bool usable() {
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  if (!has_bit(d, 24) || !has_bit(d, 22) || !has_bit(d, 25) || !kAvx512Bf16Isa.usable()) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

void gemm_bf16_amx(const GemmArgs& args) {
  return args.rows <= kStreamRows ? gemm_bf16_avx512_bf16(args) : gemm_bf16_tiles(args);
}

void gemm_int8_amx(const GemmArgs& args) {
  return args.rows <= kStreamRows ? gemm_int8_avx512(args) : gemm_int8_tiles(args);
}

void gemm_int4_amx(const GemmArgs& args) {
  return args.rows <= kStreamRows ? gemm_int4_avx512(args) : gemm_int4_tiles(args);
}

#endif

}  // namespace

#ifdef KT_AMX_MODEL
extern const Isa kAmxModelIsa = {
    .name = "amx_model",
    .usable = usable,
    .automatic = false,
    .row_format = RowFormat::bf16,
    .gemm_bf16 = gemm_bf16_tiles,
    .gemm_int8 = gemm_int8_tiles,
    .gemm_int4 = gemm_int4_tiles,
    .row_from_bf16 = bf16_row_from_bf16,
    .row_from_f32 = bf16_row_from_f32,
    .f32_from_bf16 = f32_from_bf16,
    .bf16_from_f32 = bf16_from_f32,
    .quantize_row = quantize_row,
    .silu_mul = silu_mul,
    .add_scaled = add_scaled,
};
#else
extern const Isa kAmxIsa = {
    .name = "amx",
    .usable = usable,
    .automatic = true,
    .row_format = RowFormat::bf16,
    .gemm_bf16 = gemm_bf16_amx,
    .gemm_int8 = gemm_int8_amx,
    .gemm_int4 = gemm_int4_amx,
    .row_from_bf16 = bf16_row_from_bf16_avx512,
    .row_from_f32 = bf16_row_from_f32_avx512,
    .f32_from_bf16 = f32_from_bf16_avx512,
    .bf16_from_f32 = bf16_from_f32_avx512,
    .quantize_row = quantize_row_avx512,
    .silu_mul = silu_mul_avx512,
    .add_scaled = add_scaled_avx512,
};
#endif

}  // namespace kt
