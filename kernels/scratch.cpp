#include "scratch.h"

#include <algorithm>

#include "pack.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace kt {
namespace {

// Under AddressSanitizer there is a gap behind each piece of scratch, which must not be touched.
#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t kGap = 64;
void forbid(const uint8_t* place, int64_t bytes) { ASAN_POISON_MEMORY_REGION(place, bytes); }
void allow(const uint8_t* place, int64_t bytes) { ASAN_UNPOISON_MEMORY_REGION(place, bytes); }
#else
constexpr int64_t kGap = 0;
void forbid(const uint8_t*, int64_t) {}
void allow(const uint8_t*, int64_t) {}
#endif

// Hands out 64-byte aligned pieces; with a null base it only counts.
class Bump {
 public:
  explicit Bump(uint8_t* base) : base_(base) {}
  uint8_t* take(int64_t bytes) {
    uint8_t* piece = base_ == nullptr ? nullptr : base_ + used_;
    const int64_t whole = round_up(bytes, 64);
    used_ += whole + kGap;
    if (piece == nullptr) return nullptr;
    allow(piece, whole);
    forbid(piece + whole, kGap);
    return piece;
  }
  // An odd number of cache lines from row to row: with a power of two, the rows of a panel would share one
  // set of the first-level cache and evict each other (seen: 55 instead of 85 % of peak).
  Rows rows(int64_t count, int64_t row_bytes) {
    const int64_t stride = (round_up(row_bytes, 64) / 64 | 1) * 64;
    return {take((count + kSlackRows) * stride), stride};
  }
  float* floats(int64_t count) { return reinterpret_cast<float*>(take(count * 4)); }
  int64_t used() const { return used_; }

 private:
  uint8_t* base_;
  int64_t used_ = 0;
};

int64_t tile_floats(const ScratchShape& shape) {
  int64_t widest = round_up(shape.hidden, kStep);
  for (int64_t width : shape.shard_widths) widest = std::max(widest, width);
  return std::max({kCachedRows * kCachedBlocks * kBlockColumns, kShrinkFloats, widest});
}

// Bytes that each token of a batch adds.
int64_t bytes_per_token(const ScratchShape& shape, int64_t top_k, const Ranks& ranks, bool adapters) {
  const auto bytes = [&](int64_t tokens) {
    const Extent extent{
        .tokens = tokens, .rows = tokens * top_k, .panel_rows = 0, .ranks = ranks, .adapters = adapters};
    return lay_out(shape, extent, nullptr).bytes;
  };
  return bytes(1) - bytes(0);
}

}  // namespace

int64_t value_bytes(RowFormat format) { return format == RowFormat::f32 ? 4 : 2; }

// Again an odd number of cache lines.
int64_t y_stride(int64_t hidden) { return (blocks_of(hidden) | 1) * kBlockColumns; }

ScratchShape scratch_shape(Format format, RowFormat row_format, int64_t hidden,
                           const std::vector<ShardLayout>& shards, int64_t threads) {
  ScratchShape shape{
      .format = format, .row_format = row_format, .hidden = hidden, .shard_widths = {}, .threads = threads};
  for (const ShardLayout& shard : shards) shape.shard_widths.push_back(shard.width);
  return shape;
}

Scratch lay_out(const ScratchShape& shape, const Extent& extent, uint8_t* base) {
  Bump bump(base);
  Scratch scratch{};
  const bool quantized = shape.quantized();
  const int64_t value = value_bytes(shape.row_format);
  const int64_t hidden = round_up(shape.hidden, kStep);
  const int64_t adapted_rows = extent.adapters ? extent.rows : 0;
  const int64_t plain = quantized && !extent.adapters ? 0 : hidden * value;
  const int64_t packed = quantized ? quantized_row_bytes(hidden) : 0;
  scratch.x = bump.rows(quantized ? extent.tokens : 0, packed);
  scratch.z_gate = bump.rows(adapted_rows, z_width(extent.ranks.gate) * value);
  scratch.z_up = bump.rows(adapted_rows, z_width(extent.ranks.up) * value);
  for (int64_t width : shape.shard_widths) {
    ShardScratch here{};
    here.h = bump.rows(extent.rows, width * value);
    here.h_quantized = quantized ? bump.rows(extent.rows, quantized_row_bytes(width)) : here.h;
    here.z_down = bump.rows(adapted_rows, z_width(extent.ranks.down) * value);
    here.y = bump.floats(extent.rows * y_stride(shape.hidden));
    scratch.shards.push_back(here);
  }
  scratch.panel_rows = extent.panel_rows + kSlackRows;
  scratch.panels = bump.rows(shape.threads * scratch.panel_rows, std::max(plain, packed));
  scratch.tile_floats = tile_floats(shape);
  scratch.tiles = bump.floats(shape.threads * scratch.tile_floats);
  scratch.bytes = bump.used();
  return scratch;
}

// Each chunk reads a layer's weights again, so it must be long enough to be worth that.
int64_t chunk_tokens(const ScratchShape& shape, int64_t top_k, const Ranks& ranks, bool adapters,
                     int64_t weight_bytes) {
  constexpr int64_t kLeastBytes = int64_t{512} << 20;
  const int64_t budget = std::max(kLeastBytes, weight_bytes / 8);
  return std::max(kLeastChunk, budget / bytes_per_token(shape, std::max<int64_t>(top_k, 1), ranks, adapters));
}

int64_t most_scratch_bytes(const ScratchShape& shape, int64_t tokens, int64_t top_k, const Ranks& ranks,
                           bool adapters, int64_t weight_bytes) {
  const int64_t chunk = std::min(tokens, chunk_tokens(shape, top_k, ranks, adapters, weight_bytes));
  const Extent extent{.tokens = chunk,
                      .rows = chunk * top_k,
                      .panel_rows = std::min(chunk * top_k, kCachedRows),
                      .ranks = ranks,
                      .adapters = adapters};
  const auto bytes = static_cast<size_t>(lay_out(shape, extent, nullptr).bytes);
  return static_cast<int64_t>(Memory::mapped_bytes(ThreadPool::scratch_capacity(bytes)));
}

}  // namespace kt
