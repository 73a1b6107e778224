// One pass over a chunk of tokens: the tasks, their order and what each waits for. Private to moe.cpp.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "moe.h"
#include "scratch.h"

namespace kt {

// The tasks of a shard are taken in order from one counter, and every task depends only on tasks before it in
// its own queue or in the preparation queue, which is emptied first. So a thread that waits, waits for a task
// that some thread is already running, or has taken as its next one: of the unfinished tasks, the first is
// always running.
class ForwardPass {
 public:
  ForwardPass(const Layer& layer, const ForwardArgs& args, int64_t first_token, const Routing& routing);
  void run(ThreadPool::Session& session);

 private:
  enum class Kind : uint8_t { prepare, shrink_gate_up, gate_up, quantize, shrink_down, down };
  struct Task {
    Kind kind;
    int32_t index;  // expert or segment
    int64_t begin;  // tokens (prepare), rows (quantize) or blocks
    int64_t end;
    int64_t row;  // first row and number of rows, where the task works on blocks
    int64_t rows;
  };
  struct Queue {
    std::vector<Task> tasks;
    alignas(kCacheLine) std::atomic<int64_t> next{0};
  };
  // The first weights of the task after this one.
  struct Upcoming {
    const uint8_t* first = nullptr;
    int64_t bytes = 0;
  };
  // How many tasks are still to finish before an expert's next stage may start. A cache line each: one
  // thread's countdown must not take from others what they read.
  struct alignas(kCacheLine) Progress {
    std::atomic<int32_t> gate_up{0};
    std::atomic<int32_t> ready{0};
  };

  void plan_preparation();
  void plan_shard(int shard);
  int64_t blocks_per_task(int64_t rows, const WeightBlocks& weights, int64_t multiple) const;
  void push_blocks(Queue& queue, Kind kind, int32_t index, int64_t blocks, int64_t step, int64_t row,
                   int64_t rows, std::atomic<int32_t>* progress);

  void work(int worker);
  void work_on(Queue& queue, int shard, int worker);
  void run_task(const Task& task, const Task* next, int shard, int worker);
  void prepare(int64_t begin, int64_t end, float* floats) const;
  Rows gather_prepared(int64_t row, int64_t rows, int worker) const;
  Rows gather_plain(int64_t row, int64_t rows, int worker) const;
  void shrink_gate_up(const Task& task, int worker);
  void gate_up(const Task& task, const Task* next, int shard, int worker);
  // `fresh`: no panel of this task has read these weights yet.
  void gate_up_tile(const Task& part, bool fresh, Rows x, const Upcoming& ahead, int shard, float* tile);
  void expand_gate_up(const ExpertRows& expert, int shard, int64_t block, int64_t blocks, int64_t row,
                      int64_t rows, float* tile, int64_t tile_stride) const;
  void activate(int shard, int64_t row, int64_t first_pair, int64_t pairs, const float* gate_up_row) const;
  void quantize(const Task& task, int shard, float* floats) const;
  void shrink_down(const Task& task, int shard, float* tile);
  void down(const Task& task, const Task* next, int shard);
  Upcoming upcoming(const Task* next, int shard) const;
  void combine(int64_t piece, float* sums) const;
  void prefetch_adapters(const ExpertRows& expert, bool is_down, int64_t begin, int64_t end) const;

  Progress& progress(int shard, int64_t expert) {
    return progress_[static_cast<size_t>(shard) * routing_.experts.size() + static_cast<size_t>(expert)];
  }
  void gemm(Phase phase, int64_t bytes, const GemmArgs& args) const;

  const Layer& layer_;
  const ForwardArgs& args_;
  const int64_t first_token_;
  const Routing& routing_;
  const int64_t tokens_;
  const int64_t sums_per_token_;

  Queue preparation_;
  std::vector<Queue> queues_;
  std::vector<Progress> progress_;
  std::vector<std::atomic<int32_t>> shrinks_to_do_;  // per expert, gate and up
  Scratch scratch_{};

  alignas(kCacheLine) std::atomic<int64_t> tokens_to_prepare_{0};
  alignas(kCacheLine) std::atomic<int64_t> tasks_to_do_{0};
  alignas(kCacheLine) std::atomic<int64_t> next_sum_{0};
};

}  // namespace kt
