// Reads like the equation: prepare x, z = x A^T, gate and up, SiLU, h, z = h A^T, down, weighted sum.
#include "forward.h"

#include <algorithm>
#include <cstring>

#include "pack.h"

namespace kt {
namespace {

constexpr int64_t kRowStep = 32;    // tiles end at multiples of it, where panels of any kernel do
constexpr int64_t kTaskRows = 768;  // more rows than this are split over tasks
constexpr int64_t kTaskBytes = 512 << 10;
// From this many rows on, an expert's rows are worth gathering and fetching into a core's cache less often:
// tasks of several tiles.
constexpr int64_t kManyRows = 32;
constexpr int64_t kManyTiles = 8;
constexpr int64_t kTasksPerThread = 8;  // enough for an even finish
constexpr int64_t kQuantizeRows = 16;   // rows per task
constexpr int64_t kPrepareTokens = 8;   // tokens per task
constexpr int64_t kCallerTokens = 2;    // this few are prepared faster than a thread is woken
constexpr int64_t kSplitRows = 4;       // up to this many rows of an adapter, each block of A is a task

// So few tokens that some threads would have none are summed in pieces: their rows lie in other cores'
// caches.
constexpr int64_t kLeastSumColumns = 256;
int64_t sums_per_token(const Layer& layer, int64_t tokens) {
  const int64_t idle = layer.pool.threads() / std::max<int64_t>(tokens, 1);
  return std::clamp<int64_t>(layer.hidden() / kLeastSumColumns, 1, std::max<int64_t>(idle, 1));
}

// Most rows that a task gathers at once.
int64_t panel_rows(const Routing& routing) {
  int64_t rows = 0;
  for (const ExpertRows& expert : routing.experts) rows = std::max(rows, expert.rows);
  return std::min(rows, kCachedRows);
}

int64_t shrink_step(const Segment& segment) { return segment.rows > kSplitRows ? kShrinkBlocks : 1; }

template <typename Value>
void wait_until_done(const std::atomic<Value>& to_do, Profile* profile) {
  if (to_do.load(std::memory_order_acquire) == 0) return;
  const Span span(profile, Phase::wait);
  Backoff backoff;
  while (to_do.load(std::memory_order_acquire) != 0) backoff.wait();
}

}  // namespace

ForwardPass::ForwardPass(const Layer& layer, const ForwardArgs& args, int64_t first_token,
                         const Routing& routing)
    : layer_(layer),
      args_(args),
      first_token_(first_token),
      routing_(routing),
      tokens_(routing.tokens),
      sums_per_token_(sums_per_token(layer, routing.tokens)),
      queues_(static_cast<size_t>(layer.weights.shards())),
      progress_(queues_.size() * routing.experts.size()),
      shrinks_to_do_(routing.experts.size()) {
  plan_preparation();
  for (int shard = 0; shard < layer_.weights.shards(); ++shard) plan_shard(shard);
}

// ---- the plan ----

// Large enough to stream well and to stay in the second-level cache while rows pass over it, small enough for
// an even finish.
int64_t ForwardPass::blocks_per_task(int64_t rows, const WeightBlocks& weights, int64_t multiple) const {
  const int64_t tiles = rows >= kManyRows ? kManyTiles : 1;
  const int64_t all_blocks = weights.blocks * static_cast<int64_t>(routing_.experts.size());
  const int64_t by_bytes = tiles * kTaskBytes / weights.stride;
  const int64_t by_balance = all_blocks / (kTasksPerThread * layer_.pool.threads());
  const int64_t blocks = std::clamp(std::min(by_bytes, by_balance), multiple, tiles * kCachedBlocks);
  return blocks / multiple * multiple;
}

void ForwardPass::push_blocks(Queue& queue, Kind kind, int32_t index, int64_t blocks, int64_t step,
                              int64_t row, int64_t rows, std::atomic<int32_t>* progress) {
  for (int64_t first = row; first < row + rows; first += kTaskRows) {
    const int64_t here = std::min(kTaskRows, row + rows - first);
    for (int64_t block = 0; block < blocks; block += step) {
      queue.tasks.push_back({.kind = kind,
                             .index = index,
                             .begin = block,
                             .end = std::min(block + step, blocks),
                             .row = first,
                             .rows = here});
      progress->fetch_add(1, std::memory_order_relaxed);
    }
  }
}

void ForwardPass::plan_preparation() {
  if (layer_.quantized() && tokens_ > kCallerTokens) {
    tokens_to_prepare_.store(tokens_, std::memory_order_relaxed);
    for (int64_t token = 0; token < tokens_; token += kPrepareTokens) {
      preparation_.tasks.push_back({.kind = Kind::prepare,
                                    .index = 0,
                                    .begin = token,
                                    .end = std::min(token + kPrepareTokens, tokens_),
                                    .row = 0,
                                    .rows = 0});
    }
  }
  for (size_t i = 0; i < routing_.segments.size(); ++i) {
    const Segment& segment = routing_.segments[i];
    const PackedMatrix a = segment.adapter->gate_up_a(segment.expert);
    push_blocks(preparation_, Kind::shrink_gate_up, static_cast<int32_t>(i), a.blocks, shrink_step(segment),
                segment.row, segment.rows, &shrinks_to_do_[static_cast<size_t>(segment.expert_index)]);
  }
}

void ForwardPass::plan_shard(int shard) {
  Queue& queue = queues_[static_cast<size_t>(shard)];
  const auto experts = static_cast<int64_t>(routing_.experts.size());
  if (layer_.weights.shard_width(shard) == 0 || experts == 0) return;
  const WeightBlocks gate_up_blocks = layer_.weights.gate_up(shard, 0);
  for (int64_t i = 0; i < experts; ++i) {
    const ExpertRows& expert = routing_.experts[static_cast<size_t>(i)];
    const int64_t step = blocks_per_task(expert.rows, gate_up_blocks, 2);
    push_blocks(queue, Kind::gate_up, static_cast<int32_t>(i), gate_up_blocks.blocks, step, expert.row,
                expert.rows, &progress(shard, i).gate_up);
  }
  for (int64_t i = 0; i < experts; ++i) {
    const ExpertRows& expert = routing_.experts[static_cast<size_t>(i)];
    std::atomic<int32_t>* ready = &progress(shard, i).ready;
    for (int64_t row = expert.row; layer_.quantized() && row < expert.row + expert.rows;
         row += kQuantizeRows) {
      queue.tasks.push_back({.kind = Kind::quantize,
                             .index = static_cast<int32_t>(i),
                             .begin = row,
                             .end = std::min(row + kQuantizeRows, expert.row + expert.rows),
                             .row = 0,
                             .rows = 0});
      ready->fetch_add(1, std::memory_order_relaxed);
    }
    for (int64_t s = expert.first_segment; s < expert.last_segment; ++s) {
      const Segment& segment = routing_.segments[static_cast<size_t>(s)];
      const PackedMatrix a = segment.adapter->down_a(segment.expert);
      push_blocks(queue, Kind::shrink_down, static_cast<int32_t>(s), a.blocks, shrink_step(segment),
                  segment.row, segment.rows, ready);
    }
  }
  const WeightBlocks down_blocks = layer_.weights.down(shard, 0);
  std::atomic<int32_t> uncounted{0};  // nothing waits for down but the final sum, which waits for every task
  for (int64_t i = 0; i < experts; ++i) {
    const ExpertRows& expert = routing_.experts[static_cast<size_t>(i)];
    const int64_t step = blocks_per_task(expert.rows, down_blocks, 1);
    push_blocks(queue, Kind::down, static_cast<int32_t>(i), down_blocks.blocks, step, expert.row, expert.rows,
                &uncounted);
  }
}

// ---- the work ----

void ForwardPass::run(ThreadPool::Session& session) {
  const bool adapters = !routing_.segments.empty();
  const Extent extent{.tokens = tokens_,
                      .rows = routing_.rows(),
                      .panel_rows = panel_rows(routing_),
                      .ranks = routing_.ranks,
                      .adapters = adapters};
  const int64_t bytes = lay_out(layer_.shape, extent, nullptr).bytes;
  scratch_ = lay_out(layer_.shape, extent, session.scratch(static_cast<size_t>(bytes)));
  const bool prepared = tokens_to_prepare_.load(std::memory_order_relaxed) > 0;
  if (layer_.quantized() && !prepared) prepare(0, tokens_, scratch_.tile(0));
  int64_t tasks = 0;
  for (const Queue& queue : queues_) tasks += static_cast<int64_t>(queue.tasks.size());
  tasks_to_do_.store(tasks, std::memory_order_relaxed);
  session.run([this](int worker) { work(worker); });
}

void ForwardPass::work(int worker) {
  const int shards = layer_.weights.shards();
  const int own = std::min(layer_.pool.node_of(worker), shards - 1);
  work_on(preparation_, 0, worker);
  for (int i = 0; i < shards; ++i) {
    const int shard = (own + i) % shards;
    work_on(queues_[static_cast<size_t>(shard)], shard, worker);
  }
  // A few sums per turn: the last ones finish together.
  const int64_t sums = tokens_ * sums_per_token_;
  const int64_t turn = std::max<int64_t>(1, sums / (layer_.pool.threads() * 4));
  if (next_sum_.load(std::memory_order_relaxed) >= sums) return;
  wait_until_done(tasks_to_do_, layer_.profile);
  for (int64_t first = next_sum_.fetch_add(turn); first < sums; first = next_sum_.fetch_add(turn)) {
    const Span span(layer_.profile, Phase::combine);
    for (int64_t sum = first; sum < std::min(first + turn, sums); ++sum) combine(sum, scratch_.tile(worker));
  }
}

void ForwardPass::work_on(Queue& queue, int shard, int worker) {
  const auto count = static_cast<int64_t>(queue.tasks.size());
  // A task is taken while the one before it runs, so that its weights can be on their way; not the last ones,
  // which go to the first thread that is free.
  const int64_t ahead = count - 2 * layer_.pool.threads();
  const auto take = [&] { return queue.next.fetch_add(1, std::memory_order_relaxed); };
  const Task* tasks = queue.tasks.data();
  for (int64_t index = take(); index < count;) {
    const bool early = queue.next.load(std::memory_order_relaxed) < ahead;
    const int64_t following = early ? take() : count;
    run_task(tasks[index], following < count ? tasks + following : nullptr, shard, worker);
    index = early ? following : take();
  }
}

void ForwardPass::run_task(const Task& task, const Task* next, int shard, int worker) {
  float* tile = scratch_.tile(worker);
  switch (task.kind) {
    case Kind::prepare:
      prepare(task.begin, task.end, tile);
      tokens_to_prepare_.fetch_sub(task.end - task.begin, std::memory_order_acq_rel);
      return;
    case Kind::shrink_gate_up: {
      shrink_gate_up(task, worker);
      const Segment& segment = routing_.segments[static_cast<size_t>(task.index)];
      shrinks_to_do_[static_cast<size_t>(segment.expert_index)].fetch_sub(1, std::memory_order_acq_rel);
      return;
    }
    case Kind::gate_up:
      wait_until_done(tokens_to_prepare_, layer_.profile);
      gate_up(task, next, shard, worker);
      progress(shard, task.index).gate_up.fetch_sub(1, std::memory_order_acq_rel);
      break;
    case Kind::quantize:
      wait_until_done(progress(shard, task.index).gate_up, layer_.profile);
      quantize(task, shard, tile);
      progress(shard, task.index).ready.fetch_sub(1, std::memory_order_acq_rel);
      break;
    case Kind::shrink_down: {
      const int64_t expert = routing_.segments[static_cast<size_t>(task.index)].expert_index;
      wait_until_done(progress(shard, expert).gate_up, layer_.profile);
      shrink_down(task, shard, tile);
      progress(shard, expert).ready.fetch_sub(1, std::memory_order_acq_rel);
      break;
    }
    case Kind::down:
      wait_until_done(progress(shard, task.index).gate_up, layer_.profile);
      wait_until_done(progress(shard, task.index).ready, layer_.profile);
      down(task, next, shard);
      break;
  }
  tasks_to_do_.fetch_sub(1, std::memory_order_acq_rel);
}

void ForwardPass::gemm(Phase phase, int64_t bytes, const GemmArgs& args) const {
  const Span span(layer_.profile, phase, bytes);
  switch (layer_.shape.format) {
    case Format::bf16:
      return layer_.isa.gemm_bf16(args);
    case Format::int8:
      return layer_.isa.gemm_int8(args);
    case Format::int4:
      return layer_.isa.gemm_int4(args);
  }
}

void ForwardPass::prepare(int64_t begin, int64_t end, float* floats) const {
  const Span span(layer_.profile, Phase::prepare);
  const int64_t padded = round_up(layer_.hidden(), kStep);
  for (int64_t token = begin; token < end; ++token) {
    layer_.isa.f32_from_bf16(args_.x + (first_token_ + token) * args_.x_stride, layer_.hidden(), floats);
    layer_.isa.quantize_row(floats, layer_.hidden(), padded, scratch_.x.row(token));
  }
}

// Rows' tokens side by side in the worker's panel: what many tasks read is written once and only read from
// then on, and each core's copy stays its own.
Rows ForwardPass::gather_prepared(int64_t row, int64_t rows, int worker) const {
  const auto x = [&](int64_t r) { return scratch_.x.row(routing_.row_token[static_cast<size_t>(row + r)]); };
  if (rows == 1) return {x(0), scratch_.x.stride};
  const Span span(layer_.profile, Phase::prepare);
  const Rows panel = scratch_.panel(worker);
  const auto bytes = static_cast<size_t>(quantized_row_bytes(round_up(layer_.hidden(), kStep)));
  for (int64_t r = 0; r < rows; ++r) std::memcpy(panel.row(r), x(r), bytes);
  return panel;
}

// The same in the format of rows, as bf16 weights and adapters read them.
Rows ForwardPass::gather_plain(int64_t row, int64_t rows, int worker) const {
  const Span span(layer_.profile, Phase::prepare);
  const Rows panel = scratch_.panel(worker);
  const int64_t value = value_bytes(layer_.isa.row_format);
  const int64_t tail = round_up(layer_.hidden(), kStep) - layer_.hidden();
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t token = first_token_ + routing_.row_token[static_cast<size_t>(row + r)];
    layer_.isa.row_from_bf16(args_.x + token * args_.x_stride, layer_.hidden(), panel.row(r));
    std::memset(panel.row(r) + layer_.hidden() * value, 0, static_cast<size_t>(tail * value));
  }
  return panel;
}

void ForwardPass::shrink_gate_up(const Task& task, int worker) {
  const Segment& segment = routing_.segments[static_cast<size_t>(task.index)];
  const Adapter& adapter = *segment.adapter;
  const PackedMatrix a = adapter.gate_up_a(segment.expert);
  for (int64_t first = 0; first < task.rows; first += kCachedRows) {
    const int64_t row = task.row + first;
    const int64_t rows = std::min(kCachedRows, task.rows - first);
    const Rows x = gather_plain(row, rows, worker);
    const Span span(layer_.profile, Phase::lora, first == 0 ? (task.end - task.begin) * a.stride : 0);
    const AdapterRanks& ranks = adapter.ranks();
    const ShrinkTarget targets[] = {
        {.z = scratch_.z_gate.from(row), .column = 0, .rank = ranks.gate},
        {.z = scratch_.z_up.from(row), .column = ranks.gate, .rank = ranks.up},
    };
    lora_shrink(layer_.isa, a, task.begin, task.end, x, rows, adapter.scale(), targets, 2,
                scratch_.tile(worker));
  }
}

void ForwardPass::prefetch_adapters(const ExpertRows& expert, bool is_down, int64_t begin,
                                    int64_t end) const {
  for (int64_t s = expert.first_segment; s < expert.last_segment; ++s) {
    const Segment& segment = routing_.segments[static_cast<size_t>(s)];
    if (is_down) {
      lora_prefetch(segment.adapter->down_b(segment.expert), begin, end);
    } else {
      lora_prefetch(segment.adapter->gate_b(segment.expert), begin, end);
      lora_prefetch(segment.adapter->up_b(segment.expert), begin, end);
    }
  }
}

ForwardPass::Upcoming ForwardPass::upcoming(const Task* next, int shard) const {
  constexpr int64_t kFirstBlocks = 2;
  if (next == nullptr || (next->kind != Kind::gate_up && next->kind != Kind::down)) return {};
  const int64_t expert = routing_.experts[static_cast<size_t>(next->index)].expert;
  const WeightBlocks weights =
      next->kind == Kind::down ? layer_.weights.down(shard, expert) : layer_.weights.gate_up(shard, expert);
  return {weights.first + next->begin * weights.stride,
          std::min(next->end - next->begin, kFirstBlocks) * weights.stride};
}

// Panel by panel of rows, each in tiles; the weights after a tile are the next one's, or the next task's.
void ForwardPass::gate_up(const Task& task, const Task* next, int shard, int worker) {
  const int64_t panels = (task.rows + kCachedRows - 1) / kCachedRows;
  const int64_t step = round_up((task.rows + panels - 1) / panels, panels > 1 ? kRowStep : 1);
  for (int64_t first = 0; first < task.rows; first += step) {
    Task part = task;
    part.row = task.row + first;
    part.rows = std::min(step, task.rows - first);
    const Rows x = layer_.quantized() ? gather_prepared(part.row, part.rows, worker)
                                      : gather_plain(part.row, part.rows, worker);
    const bool last_panel = first + step >= task.rows;
    for (int64_t block = task.begin; block < task.end; block += kCachedBlocks) {
      part.begin = block;
      part.end = std::min(block + kCachedBlocks, task.end);
      Task rest = task;
      if (part.end < task.end) rest.begin = part.end;
      const bool last = last_panel && part.end == task.end;
      gate_up_tile(part, first == 0, x, upcoming(last ? next : &rest, shard), shard, scratch_.tile(worker));
    }
  }
}

void ForwardPass::gate_up_tile(const Task& part, bool fresh, Rows x, const Upcoming& ahead, int shard,
                               float* tile) {
  const ExpertRows& expert = routing_.experts[static_cast<size_t>(part.index)];
  const WeightBlocks weights = layer_.weights.gate_up(shard, expert.expert);
  const int64_t blocks = part.end - part.begin;
  const int64_t stride = blocks * kBlockColumns;
  const int64_t shard_pair = layer_.weights.shard_begin(shard) / kBlockColumns;
  prefetch_adapters(expert, false, shard_pair + part.begin / 2, shard_pair + part.end / 2);
  gemm(Phase::gate_up, fresh ? blocks * weights.stride : 0,
       {.a = x.first,
        .a_stride = x.stride,
        .rows = part.rows,
        .b = weights.first + part.begin * weights.stride,
        .b_stride = weights.stride,
        .blocks = blocks,
        .k = weights.k,
        .c = tile,
        .c_stride = stride,
        .c_block_stride = kBlockColumns,
        .accumulate = false,
        .next = ahead.first,
        .next_bytes = ahead.bytes});
  expand_gate_up(expert, shard, part.begin, blocks, part.row, part.rows, tile, stride);
  const Span span(layer_.profile, Phase::activate);
  for (int64_t r = 0; r < part.rows; ++r)
    activate(shard, part.row + r, part.begin / 2, blocks / 2, tile + r * stride);
}

void ForwardPass::expand_gate_up(const ExpertRows& expert, int shard, int64_t block, int64_t blocks,
                                 int64_t row, int64_t rows, float* tile, int64_t tile_stride) const {
  if (expert.first_segment == expert.last_segment) return;
  const Span span(layer_.profile, Phase::lora);
  wait_until_done(shrinks_to_do_[static_cast<size_t>(&expert - routing_.experts.data())], layer_.profile);
  const int64_t first = layer_.weights.shard_begin(shard) / kBlockColumns + block / 2;
  const int64_t last = first + blocks / 2;
  for (int64_t s = expert.first_segment; s < expert.last_segment; ++s) {
    const Segment& segment = routing_.segments[static_cast<size_t>(s)];
    const int64_t begin = std::max(row, segment.row);
    const int64_t end = std::min(row + rows, segment.row + segment.rows);
    if (begin >= end) continue;
    float* c = tile + (begin - row) * tile_stride;
    lora_expand(layer_.isa, segment.adapter->gate_b(segment.expert), first, last, scratch_.z_gate.from(begin),
                end - begin, c, tile_stride, 2 * kBlockColumns);
    lora_expand(layer_.isa, segment.adapter->up_b(segment.expert), first, last, scratch_.z_up.from(begin),
                end - begin, c + kBlockColumns, tile_stride, 2 * kBlockColumns);
  }
}

void ForwardPass::activate(int shard, int64_t row, int64_t first_pair, int64_t pairs,
                           const float* gate_up_row) const {
  const int64_t value = value_bytes(layer_.isa.row_format);
  uint8_t* h = scratch_.shards[static_cast<size_t>(shard)].h.row(row) + first_pair * kBlockColumns * value;
  if (layer_.isa.row_format == RowFormat::f32)
    return layer_.isa.silu_mul(gate_up_row, pairs, reinterpret_cast<float*>(h));
  float local[kCachedBlocks * kBlockColumns];
  layer_.isa.silu_mul(gate_up_row, pairs, local);
  layer_.isa.row_from_f32(local, pairs * kBlockColumns, 1.0f, h);
}

void ForwardPass::quantize(const Task& task, int shard, float* floats) const {
  const Span span(layer_.profile, Phase::quantize);
  const ShardScratch& here = scratch_.shards[static_cast<size_t>(shard)];
  const int64_t width = layer_.weights.shard_width(shard);
  const bool widen = layer_.isa.row_format == RowFormat::bf16;
  for (int64_t row = task.begin; row < task.end; ++row) {
    const uint8_t* h = here.h.row(row);
    if (widen) layer_.isa.f32_from_bf16(reinterpret_cast<const uint16_t*>(h), width, floats);
    layer_.isa.quantize_row(widen ? floats : reinterpret_cast<const float*>(h), width, width,
                            here.h_quantized.row(row));
  }
}

// Each shard adds the part of its own inputs: the low-rank product is linear in h.
void ForwardPass::shrink_down(const Task& task, int shard, float* tile) {
  const ShardScratch& here = scratch_.shards[static_cast<size_t>(shard)];
  const Segment& segment = routing_.segments[static_cast<size_t>(task.index)];
  PackedMatrix a = segment.adapter->down_a(segment.expert);
  a.first += layer_.weights.shard_begin(shard) / 2 * 64;
  a.k = layer_.weights.shard_width(shard);
  const Span span(layer_.profile, Phase::lora, (task.end - task.begin) * a.stride);
  const ShrinkTarget target{
      .z = here.z_down.from(task.row), .column = 0, .rank = segment.adapter->ranks().down};
  lora_shrink(layer_.isa, a, task.begin, task.end, here.h.from(task.row), task.rows, segment.adapter->scale(),
              &target, 1, tile);
}

void ForwardPass::down(const Task& task, const Task* next, int shard) {
  const ShardScratch& here = scratch_.shards[static_cast<size_t>(shard)];
  const ExpertRows& expert = routing_.experts[static_cast<size_t>(task.index)];
  const WeightBlocks weights = layer_.weights.down(shard, expert.expert);
  const int64_t stride = y_stride(layer_.hidden());
  const int64_t blocks = task.end - task.begin;
  prefetch_adapters(expert, true, task.begin, task.end);
  float* y = here.y + task.begin * kBlockColumns;
  const Upcoming ahead = upcoming(next, shard);
  gemm(Phase::down, blocks * weights.stride,
       {.a = here.h_quantized.row(task.row),
        .a_stride = here.h_quantized.stride,
        .rows = task.rows,
        .b = weights.first + task.begin * weights.stride,
        .b_stride = weights.stride,
        .blocks = blocks,
        .k = weights.k,
        .c = y + task.row * stride,
        .c_stride = stride,
        .c_block_stride = kBlockColumns,
        .accumulate = false,
        .next = ahead.first,
        .next_bytes = ahead.bytes});
  if (expert.first_segment == expert.last_segment) return;
  const Span span(layer_.profile, Phase::lora);
  for (int64_t s = expert.first_segment; s < expert.last_segment; ++s) {
    const Segment& segment = routing_.segments[static_cast<size_t>(s)];
    const int64_t begin = std::max(task.row, segment.row);
    const int64_t end = std::min(task.row + task.rows, segment.row + segment.rows);
    if (begin >= end) continue;
    lora_expand(layer_.isa, segment.adapter->down_b(segment.expert), task.begin, task.end,
                here.z_down.from(begin), end - begin, y + begin * stride, stride, kBlockColumns);
  }
}

// Part of a token's weighted sum over its experts.
void ForwardPass::combine(int64_t piece, float* tile) const {
  const int64_t stride = y_stride(layer_.hidden());
  const int64_t token = piece / sums_per_token_;
  const int64_t to = first_token_ + token;
  const int64_t width = round_up((layer_.hidden() + sums_per_token_ - 1) / sums_per_token_, kBlockColumns);
  const int64_t column = std::min(piece % sums_per_token_ * width, layer_.hidden());
  const int64_t columns = std::min(width, layer_.hidden() - column);
  const int64_t place = to * args_.out_stride + column;
  float* sum = args_.out_is_f32 ? static_cast<float*>(args_.out) + place : tile;
  std::fill(sum, sum + columns, 0.0f);
  for (int64_t k = 0; k < args_.top_k; ++k) {
    const int64_t row = routing_.pair_row[static_cast<size_t>(token * args_.top_k + k)];
    if (row < 0) continue;
    const float weight = args_.topk_weights[to * args_.top_k + k];
    for (int shard = 0; shard < layer_.weights.shards(); ++shard) {
      if (layer_.weights.shard_width(shard) == 0) continue;
      const float* y = scratch_.shards[static_cast<size_t>(shard)].y + row * stride;
      layer_.isa.add_scaled(y + column, weight, columns, sum);
    }
  }
  if (!args_.out_is_f32) layer_.isa.bf16_from_f32(sum, columns, static_cast<uint16_t*>(args_.out) + place);
}

}  // namespace kt
