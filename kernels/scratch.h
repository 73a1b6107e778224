// What a pass keeps between its stages: rows of activations, and each thread's own panel and tile. Lays them
// out in one piece of memory; computes nothing.
#pragma once

#include <cstdint>
#include <vector>

#include "gemm.h"
#include "lora.h"
#include "profile.h"
#include "route.h"
#include "threads.h"
#include "weights.h"

namespace kt {

// What the layout of scratch depends on besides the batch.
struct ScratchShape {
  Format format;
  RowFormat row_format;
  int64_t hidden;
  std::vector<int64_t> shard_widths;
  int64_t threads;

  bool quantized() const { return format != Format::bf16; }
};

ScratchShape scratch_shape(Format format, RowFormat row_format, int64_t hidden,
                           const std::vector<ShardLayout>& shards, int64_t threads);

struct Layer {
  const Isa& isa;
  const ScratchShape& shape;
  const ExpertWeights& weights;
  const ThreadPool& pool;
  Profile* profile;  // nullptr: off

  int64_t hidden() const { return shape.hidden; }
  bool quantized() const { return shape.quantized(); }
};

// How much a pass has to keep.
struct Extent {
  int64_t tokens = 0;
  int64_t rows = 0;        // (token, k) pairs
  int64_t panel_rows = 0;  // most rows that a task gathers at once
  Ranks ranks;             // of the adapters in use
  bool adapters = false;
};

struct ShardScratch {
  Rows h;            // SiLU(gate) * up in the format of rows
  Rows h_quantized;  // the same as down's kernel reads it (h itself for bf16)
  Rows z_down;
  float* y;  // down's results
};

// Rows are (token, k) pairs, but those of x: each token has one there.
struct Scratch {
  Rows x;  // quantized methods: activations as their kernels read them
  Rows z_gate;
  Rows z_up;
  std::vector<ShardScratch> shards;
  Rows panels;  // panel_rows per thread
  int64_t panel_rows;
  float* tiles;  // tile_floats per thread
  int64_t tile_floats;
  int64_t bytes;

  Rows panel(int worker) const { return {panels.row(worker * panel_rows), panels.stride}; }
  float* tile(int worker) const { return tiles + worker * tile_floats; }
};

// The rows and blocks whose gate and up results stay in the second-level cache until SiLU.
constexpr int64_t kCachedRows = 128;
constexpr int64_t kCachedBlocks = 8;
constexpr int64_t kSlackRows = 16;  // kernels may read whole tiles of 16 rows

// With a null base it only counts.
Scratch lay_out(const ScratchShape& shape, const Extent& extent, uint8_t* base);

// A long batch runs in chunks of at most this many tokens, so that scratch stays small beside a model's
// weights. `ranks` and `adapters` are those of all filled slots, `weight_bytes` of the whole layer.
constexpr int64_t kLeastChunk = 64;  // tokens
int64_t chunk_tokens(const ScratchShape& shape, int64_t top_k, const Ranks& ranks, bool adapters,
                     int64_t weight_bytes);

// The most memory that a pool keeps for forwards of up to `tokens` tokens.
int64_t most_scratch_bytes(const ScratchShape& shape, int64_t tokens, int64_t top_k, const Ranks& ranks,
                           bool adapters, int64_t weight_bytes);

int64_t value_bytes(RowFormat format);

// Floats from row to row of down's results.
int64_t y_stride(int64_t hidden);

}  // namespace kt
