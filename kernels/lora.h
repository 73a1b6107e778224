// Expert LoRA: packed adapters, and the low-rank add over rows that share an expert and an adapter.
// Knows no GEMM: it calls the bf16 kernel of the chosen instruction set.
#pragma once

#include <cstdint>
#include <optional>

#include "gemm.h"
#include "memory.h"

namespace kt {

// One projection's matrices for all experts as the caller holds them: A (E, rank, inputs), B (E, outputs,
// rank), contiguous.
struct LowRankSource {
  const void* a = nullptr;
  const void* b = nullptr;
  bool a_is_f32 = false;
  bool b_is_f32 = false;
  int64_t rank = 0;
};

// Blocks of one expert's matrix inside an adapter.
struct PackedMatrix {
  const uint8_t* first;
  int64_t stride;  // bytes from block to block
  int64_t blocks;
  int64_t k;
};

struct AdapterRanks {
  int64_t gate;
  int64_t up;
  int64_t down;
};

// Bytes that a packed adapter takes, whole pages.
int64_t packed_adapter_bytes(int64_t experts, int64_t hidden, int64_t intermediate,
                             const AdapterRanks& ranks);

// Where each matrix of all experts lies in an adapter's memory.
struct AdapterLayout {
  struct Area {
    int64_t offset = 0;
    int64_t k = 0;
    int64_t blocks = 0;
  };
  AdapterLayout(int64_t experts, int64_t hidden, int64_t intermediate, const AdapterRanks& ranks);

  int64_t bytes = 0;
  Area gate_up_a, gate_b, up_b, down_a, down_b;

 private:
  Area reserve(int64_t experts, int64_t columns, int64_t k);
};

class Adapter {
 public:
  Adapter(int64_t experts, int64_t hidden, int64_t intermediate, const LowRankSource& gate,
          const LowRankSource& up, const LowRankSource& down, float scale);

  int64_t experts() const { return experts_; }
  int64_t hidden() const { return hidden_; }
  int64_t intermediate() const { return intermediate_; }
  const AdapterRanks& ranks() const { return ranks_; }
  float scale() const { return scale_; }
  int64_t packed_bytes() const { return static_cast<int64_t>(memory_.bytes()); }

  // A of gate and up stacked: columns 0..gate_rank-1 are gate's, then up's. They read the same x, so one pass
  // serves both.
  PackedMatrix gate_up_a(int64_t expert) const { return at(layout_.gate_up_a, expert); }
  PackedMatrix gate_b(int64_t expert) const { return at(layout_.gate_b, expert); }
  PackedMatrix up_b(int64_t expert) const { return at(layout_.up_b, expert); }
  PackedMatrix down_a(int64_t expert) const { return at(layout_.down_a, expert); }
  PackedMatrix down_b(int64_t expert) const { return at(layout_.down_b, expert); }

 private:
  PackedMatrix at(const AdapterLayout::Area& area, int64_t expert) const;

  int64_t experts_;
  int64_t hidden_;
  int64_t intermediate_;
  AdapterRanks ranks_;
  float scale_;
  AdapterLayout layout_;
  Memory memory_;
};

// Activation rows as a kernel reads them.
struct Rows {
  uint8_t* first;
  int64_t stride;  // bytes
  uint8_t* row(int64_t index) const { return first + index * stride; }
  Rows from(int64_t index) const { return {.first = row(index), .stride = stride}; }
};

// Where A's products go: `rank` columns of z, from A's column `column` on.
struct ShrinkTarget {
  Rows z;
  int64_t column;
  int64_t rank;
};

constexpr int64_t kShrinkRows = 32;   // rows per pass
constexpr int64_t kShrinkBlocks = 4;  // blocks per pass
constexpr int64_t kShrinkFloats = kShrinkRows * kShrinkBlocks * kBlockColumns;

// z = scale * (x A^T) for blocks [begin, end) of A, in the kernel's row format, zero-filled behind the rank.
// `sums` is scratch of kShrinkFloats.
void lora_shrink(const Isa& isa, const PackedMatrix& a, int64_t begin, int64_t end, Rows x, int64_t rows,
                 float scale, const ShrinkTarget* targets, int target_count, float* sums);

// Elements of a z row of this rank, padding included.
int64_t z_width(int64_t rank);

// The bytes of B that a task is about to need: fetched ahead, so that they arrive while the base weights
// stream.
void lora_prefetch(const PackedMatrix& b, int64_t begin, int64_t end);

// c += z B^T for blocks [begin, end) of B.
void lora_expand(const Isa& isa, const PackedMatrix& b, int64_t begin, int64_t end, Rows z, int64_t rows,
                 float* c, int64_t c_stride, int64_t c_block_stride);

}  // namespace kt
