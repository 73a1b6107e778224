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

struct Layer {
  const Isa& isa;
  Format format;
  int64_t hidden;
  const ExpertWeights& weights;
  const ThreadPool& pool;
  Profile* profile;  // nullptr: off

  bool quantized() const { return format != Format::bf16; }
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
  Rows panels;  // panel_rows a thread
  int64_t panel_rows;
  float* tiles;  // tile_floats a thread
  int64_t tile_floats;
  int64_t bytes;

  Rows panel(int worker) const { return {panels.row(worker * panel_rows), panels.stride}; }
  float* tile(int worker) const { return tiles + worker * tile_floats; }
};

// A tile: the rows and blocks whose gate and up results stay in the second-level cache until SiLU.
constexpr int64_t kTileRows = 128;
constexpr int64_t kTileBlocks = 8;
constexpr int64_t kSlackRows = 16;  // kernels may read whole tiles of 16 rows

// With a null base it only counts.
Scratch lay_out(const Layer& layer, const Extent& extent, uint8_t* base);

// Bytes that each token of a batch adds, with adapters up to these ranks in use; chunks are cut by it.
int64_t scratch_bytes_a_token(const Layer& layer, int64_t top_k, const Ranks& ranks, bool adapters);

int64_t value_bytes(RowFormat format);

// Floats from row to row of down's results.
int64_t y_stride(int64_t hidden);

}  // namespace kt
