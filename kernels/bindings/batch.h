// The tensors of a forward, from Python's arguments to checked ForwardArgs.
#pragma once

#include <pybind11/pytypes.h>

#include <optional>

#include "../moe.h"
#include "../tensor.h"

namespace kt {

// What a forward reads and writes, checked; the views live as long as this.
class Batch {
 public:
  Batch(const Moe& moe, pybind11::handle x, pybind11::handle topk_ids, pybind11::handle topk_weights,
        pybind11::handle adapter_slots, pybind11::handle out);
  const ForwardArgs& args() const { return args_; }

 private:
  void require_shapes(int64_t hidden) const;
  void fill_args();
  void refuse_overlaps() const;

  TensorView x_, ids_, weights_, out_;
  std::optional<TensorView> slots_;
  ForwardArgs args_{};
};

}  // namespace kt
