// Shapes that go together, and out in memory of its own.
#include "batch.h"

#include <string>

#include "arrays.h"

namespace py = pybind11;

namespace kt {
namespace {

IdView ids_of(const TensorView& view) { return {view.data<void>(), view.is(Dtype::i64)}; }

}  // namespace

Batch::Batch(const Moe& moe, py::handle x, py::handle topk_ids, py::handle topk_weights,
             py::handle adapter_slots, py::handle out)
    : x_(view_of(x, "x")),
      ids_(view_of(topk_ids, "topk_ids")),
      weights_(view_of(topk_weights, "topk_weights")),
      out_(view_of(out, "out")) {
  if (!adapter_slots.is_none()) slots_ = view_of(adapter_slots, "adapter_slots");
  require_shapes(moe.hidden_size());
  fill_args();
  refuse_overlaps();
}

void Batch::require_shapes(int64_t hidden) const {
  x_.require({Dtype::bf16}).require_shape({-1, hidden});
  const int64_t tokens = x_.size(0);
  ids_.require({Dtype::i32, Dtype::i64}).require_shape({tokens, -1}).require_contiguous();
  weights_.require({Dtype::f32}).require_shape({tokens, ids_.size(1)}).require_contiguous();
  out_.require({Dtype::bf16, Dtype::f32}).require_shape({tokens, hidden}).require_writable();
  if (slots_) slots_->require({Dtype::i32, Dtype::i64}).require_shape({tokens}).require_contiguous();
}

void Batch::fill_args() {
  args_.tokens = x_.size(0);
  args_.x = x_.data<uint16_t>();
  args_.x_stride = args_.tokens == 0 ? 0 : x_.require_rows();
  args_.top_k = ids_.size(1);
  args_.topk_ids = ids_of(ids_);
  args_.topk_weights = weights_.data<float>();
  args_.out = out_.data<void>();
  args_.out_stride = args_.tokens == 0 ? 0 : out_.require_rows();
  args_.out_is_f32 = out_.is(Dtype::f32);
  if (slots_) args_.adapter_slots = ids_of(*slots_);
}

void Batch::refuse_overlaps() const {
  for (const TensorView* input : {&x_, &weights_, &ids_, slots_ ? &*slots_ : nullptr}) {
    if (input == nullptr || !out_.shares_memory_with(*input)) continue;
    throw py::value_error("out: shares memory with " + std::string(input->name()) +
                          ", expected memory of its own (inputs are never changed)");
  }
}

}  // namespace kt
