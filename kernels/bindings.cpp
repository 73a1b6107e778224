// The Python face: arguments become checked views here, then the GIL is released. No arithmetic.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <memory>
#include <new>
#include <optional>
#include <string>

#include "dispatch.h"
#include "host_call.h"
#include "lora.h"
#include "moe.h"
#include "pack.h"
#include "quantize.h"
#include "tensor.h"
#include "threads.h"

namespace py = pybind11;

namespace kt {
namespace {

IdView ids_of(const TensorView& view) { return {view.data<void>(), view.is(Dtype::i64)}; }

void load_expert(Moe& moe, int64_t expert, py::handle gate, py::handle up, py::handle down) {
  const TensorView gate_view(gate, "gate");
  const TensorView up_view(up, "up");
  const TensorView down_view(down, "down");
  const int64_t hidden = moe.hidden_size();
  const int64_t intermediate = moe.intermediate_size();
  gate_view.require({Dtype::bf16}).require_shape({intermediate, hidden}).require_contiguous();
  up_view.require({Dtype::bf16}).require_shape({intermediate, hidden}).require_contiguous();
  down_view.require({Dtype::bf16}).require_shape({hidden, intermediate}).require_contiguous();
  const ExpertSource source{gate_view.data<uint16_t>(), up_view.data<uint16_t>(), down_view.data<uint16_t>()};
  const py::gil_scoped_release unlocked;
  moe.load_expert(expert, source);
}

// Buffers of another's memory, held until the layer that reads them is gone.
PackedWeights borrow_packed(const py::object& packed) {
  if (packed.is_none()) return {};
  if (!py::isinstance<py::sequence>(packed)) {
    throw py::type_error("packed: expected a sequence of arrays, got " +
                         std::string(py::str(py::type::handle_of(packed).attr("__name__"))));
  }
  auto buffers = std::shared_ptr<std::vector<py::buffer_info>>(new std::vector<py::buffer_info>,
                                                               [](std::vector<py::buffer_info>* held) {
                                                                 const py::gil_scoped_acquire locked;
                                                                 delete held;
                                                               });
  PackedWeights weights;
  for (py::handle part : packed) {
    const std::string name = "packed[" + std::to_string(buffers->size()) + "]: ";
    if (PyObject_CheckBuffer(part.ptr()) == 0) {
      throw py::type_error(name + "expected an array of uint8, got " +
                           std::string(py::str(py::type::handle_of(part).attr("__name__"))));
    }
    buffers->push_back(py::reinterpret_borrow<py::buffer>(part).request());
    const py::buffer_info& info = buffers->back();
    if (info.format != "B") throw py::type_error(name + "expected dtype uint8, got format " + info.format);
    if (info.ndim != 1 || (info.size > 1 && info.strides[0] != 1)) {
      throw py::value_error(name + "expected one dimension of contiguous bytes, got " +
                            std::to_string(info.ndim) + " dimensions");
    }
    weights.shards.push_back({static_cast<const uint8_t*>(info.ptr), info.size});
  }
  if (weights.shards.empty()) throw py::value_error("packed: expected one array a pool group, got none");
  weights.owner = std::move(buffers);
  return weights;
}

std::unique_ptr<Moe> make_moe(int64_t num_experts, int64_t hidden_size, int64_t intermediate_size,
                              const std::string& method, const std::string& isa,
                              std::shared_ptr<ThreadPool> pool, const py::object& packed) {
  try {
    return std::make_unique<Moe>(num_experts, hidden_size, intermediate_size, method, isa, std::move(pool),
                                 borrow_packed(packed));
  } catch (const std::bad_alloc&) {
    const std::string message = "MoE: no memory for the weights of " + std::to_string(num_experts) +
                                " experts, hidden " + std::to_string(hidden_size) + ", intermediate " +
                                std::to_string(intermediate_size);
    PyErr_SetString(PyExc_MemoryError, message.c_str());
    throw py::error_already_set();
  }
}

// Read-only views that keep the layer alive.
py::list packed_shards(const py::object& self) {
  py::list arrays;
  for (const PackedShard& shard : self.cast<Moe&>().packed_shards()) {
    py::array_t<uint8_t> array(static_cast<py::ssize_t>(shard.bytes), shard.data, self);
    array.attr("setflags")(py::arg("write") = false);
    arrays.append(std::move(array));
  }
  return arrays;
}

struct MatrixShape {
  const char* name;
  int64_t rows;
  int64_t inputs;
};

py::array quantized_values(Format format, const MatrixShape& shape) {
  if (format == Format::int8) return py::array_t<int8_t>({shape.rows, shape.inputs});
  return py::array_t<uint8_t>({shape.rows, int4_row_bytes(shape.inputs)});
}

py::array quantized_scales(Format format, const MatrixShape& shape) {
  if (format == Format::int8) return py::array_t<float>({shape.rows});
  return py::array_t<uint16_t>({shape.rows, int4_row_groups(shape.inputs)});
}

void quantize_matrix(const Packer& packer, Format format, const MatrixShape& shape, const uint16_t* source,
                     void* values, void* scales) {
  for (int64_t row = 0; row < shape.rows; ++row) {
    const uint16_t* from = source + row * shape.inputs;
    if (format == Format::int8) {
      static_cast<float*>(scales)[row] = quantize_int8_row(packer, from, shape.inputs, 0, shape.inputs,
                                                           static_cast<int8_t*>(values) + row * shape.inputs);
    } else {
      quantize_int4_row(packer, from, shape.inputs,
                        static_cast<uint8_t*>(values) + row * int4_row_bytes(shape.inputs),
                        static_cast<uint16_t*>(scales) + row * int4_row_groups(shape.inputs));
    }
  }
}

// {"gate": values, "gate_scale": scales, "up": …}; see quantize.h for the format.
py::dict quantize_expert(py::handle gate, py::handle up, py::handle down, const std::string& method,
                         const std::string& isa) {
  const Packer& packer = find_packer(find_isa(isa));
  const Format format = format_of(method);
  if (format == Format::bf16)
    throw py::value_error("method: AMXBF16_SFT keeps bf16, expected AMXINT8_SFT or AMXINT4_SFT");
  const TensorView gate_view(gate, "gate");
  gate_view.require({Dtype::bf16}).require_shape({-1, -1}).require_contiguous();
  const int64_t intermediate = gate_view.size(0);
  const int64_t hidden = gate_view.size(1);
  if (intermediate == 0 || hidden == 0) {
    throw py::value_error("gate: expected at least one row and one input, got (" +
                          std::to_string(intermediate) + ", " + std::to_string(hidden) + ")");
  }
  const TensorView up_view(up, "up");
  const TensorView down_view(down, "down");
  up_view.require({Dtype::bf16}).require_shape({intermediate, hidden}).require_contiguous();
  down_view.require({Dtype::bf16}).require_shape({hidden, intermediate}).require_contiguous();
  const MatrixShape shapes[] = {
      {"gate", intermediate, hidden}, {"up", intermediate, hidden}, {"down", hidden, intermediate}};
  const TensorView* views[] = {&gate_view, &up_view, &down_view};
  py::dict arrays;
  for (int i = 0; i < 3; ++i) {
    py::array values = quantized_values(format, shapes[i]);
    py::array scales = quantized_scales(format, shapes[i]);
    void* to_values = values.mutable_data();
    void* to_scales = scales.mutable_data();
    {
      const py::gil_scoped_release unlocked;
      quantize_matrix(packer, format, shapes[i], views[i]->data<uint16_t>(), to_values, to_scales);
    }
    arrays[shapes[i].name] = values;
    arrays[py::str(std::string(shapes[i].name) + "_scale")] = scales;
  }
  return arrays;
}

constexpr const char* kArrayNames[] = {"gate", "gate_scale", "up", "up_scale", "down", "down_scale"};
constexpr const char* kExpectedArrays = "expected gate, gate_scale, up, up_scale, down and down_scale";

py::object array_of(const py::dict& arrays, const std::string& key) {
  if (arrays.contains(key)) return arrays[py::str(key)];
  throw py::value_error("arrays: '" + key + "' is missing, " + kExpectedArrays);
}

// An array that nobody reads (a zero point, say) would mean other weights than those that are packed.
void refuse_unknown_arrays(const py::dict& arrays) {
  for (const auto& item : arrays) {
    const std::string key = py::str(item.first);
    const auto is_key = [&](const char* name) { return key == name; };
    if (std::any_of(std::begin(kArrayNames), std::end(kArrayNames), is_key)) continue;
    throw py::value_error("arrays: '" + key + "' is not known, " + kExpectedArrays);
  }
}

// One matrix with its scales, checked; the views live as long as this.
class QuantizedInput {
 public:
  QuantizedInput(const py::dict& arrays, Format format, const MatrixShape& shape)
      : scale_name_(std::string(shape.name) + "_scale"),
        values_(array_of(arrays, shape.name), shape.name),
        scales_(array_of(arrays, scale_name_), scale_name_.c_str()),
        inputs_(shape.inputs) {
    if (format == Format::int8) {
      values_.require({Dtype::i8}).require_shape({shape.rows, shape.inputs});
      scales_.require({Dtype::f32}).require_shape({shape.rows});
    } else {
      values_.require({Dtype::u8}).require_shape({shape.rows, int4_row_bytes(shape.inputs)});
      scales_.require({Dtype::u16, Dtype::bf16}).require_shape({shape.rows, int4_row_groups(shape.inputs)});
    }
    values_.require_contiguous();
    scales_.require_contiguous();
    require_finite(format, shape);
  }
  QuantizedMatrix matrix() const { return {values_.data<uint8_t>(), scales_.data<void>(), inputs_}; }

 private:
  void require_finite(Format format, const MatrixShape& shape) const {
    const int64_t count = format == Format::int8 ? shape.rows : shape.rows * int4_row_groups(shape.inputs);
    for (int64_t i = 0; i < count; ++i) {
      const float scale =
          format == Format::int8 ? scales_.data<float>()[i] : float_from_bf16(scales_.data<uint16_t>()[i]);
      if (std::isfinite(scale)) continue;
      throw py::value_error(scale_name_ + ": value " + std::to_string(i) +
                            " is NaN or infinite, expected finite scales; " + "quantize the weights again");
    }
  }

  std::string scale_name_;
  TensorView values_;
  TensorView scales_;
  int64_t inputs_;
};

void load_quantized_expert(Moe& moe, int64_t expert, const py::dict& arrays) {
  if (moe.format() == Format::bf16) {
    throw py::value_error("arrays: " + moe.method() +
                          " takes bf16 weights by load_expert, expected method AMXINT8_SFT or AMXINT4_SFT");
  }
  const int64_t hidden = moe.hidden_size();
  const int64_t intermediate = moe.intermediate_size();
  refuse_unknown_arrays(arrays);
  const QuantizedInput gate(arrays, moe.format(), {"gate", intermediate, hidden});
  const QuantizedInput up(arrays, moe.format(), {"up", intermediate, hidden});
  const QuantizedInput down(arrays, moe.format(), {"down", hidden, intermediate});
  const QuantizedExpert source{gate.matrix(), up.matrix(), down.matrix()};
  const py::gil_scoped_release unlocked;
  moe.load_expert(expert, source);
}

// The byte ranges that a view covers, for the check that out shares no memory with an input.
bool overlap(const TensorView& left, int64_t left_bytes, const TensorView& right, int64_t right_bytes) {
  const auto* l = left.data<uint8_t>();
  const auto* r = right.data<uint8_t>();
  return left_bytes > 0 && right_bytes > 0 && l < r + right_bytes && r < l + left_bytes;
}

// What a forward reads and writes, checked; the views live as long as this.
class Batch {
 public:
  Batch(const Moe& moe, py::handle x, py::handle topk_ids, py::handle topk_weights, py::handle adapter_slots,
        py::handle out)
      : x_(x, "x"), ids_(topk_ids, "topk_ids"), weights_(topk_weights, "topk_weights"), out_(out, "out") {
    if (!adapter_slots.is_none()) slots_.emplace(adapter_slots, "adapter_slots");
    require_shapes(moe.hidden_size());
    fill_args();
    refuse_overlaps(moe.hidden_size());
  }
  const ForwardArgs& args() const { return args_; }

 private:
  void require_shapes(int64_t hidden) const {
    x_.require({Dtype::bf16}).require_shape({-1, hidden});
    const int64_t tokens = x_.size(0);
    ids_.require({Dtype::i32, Dtype::i64}).require_shape({tokens, -1}).require_contiguous();
    weights_.require({Dtype::f32}).require_shape({tokens, ids_.size(1)}).require_contiguous();
    out_.require({Dtype::bf16, Dtype::f32}).require_shape({tokens, hidden}).require_writable();
    if (slots_) slots_->require({Dtype::i32, Dtype::i64}).require_shape({tokens}).require_contiguous();
  }

  void fill_args() {
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

  void refuse_overlaps(int64_t hidden) const {
    const int64_t tokens = args_.tokens;
    const auto extent = [&](int64_t stride) { return tokens == 0 ? 0 : (tokens - 1) * stride + hidden; };
    const int64_t out_bytes = extent(args_.out_stride) * (args_.out_is_f32 ? 4 : 2);
    const auto refuse_overlap = [&](const TensorView& input, int64_t bytes) {
      if (!overlap(out_, out_bytes, input, bytes)) return;
      throw py::value_error("out: shares memory with " + std::string(input.name()) +
                            ", expected memory of its own (inputs are never changed)");
    };
    refuse_overlap(x_, extent(args_.x_stride) * 2);
    refuse_overlap(weights_, tokens * args_.top_k * 4);
    refuse_overlap(ids_, tokens * args_.top_k * (args_.topk_ids.is_int64 ? 8 : 4));
    if (slots_) refuse_overlap(*slots_, tokens * (args_.adapter_slots.is_int64 ? 8 : 4));
  }

  TensorView x_, ids_, weights_, out_;
  std::optional<TensorView> slots_;
  ForwardArgs args_{};
};

void forward(Moe& moe, py::handle x, py::handle topk_ids, py::handle topk_weights, py::handle adapter_slots,
             py::handle out) {
  const Batch batch(moe, x, topk_ids, topk_weights, adapter_slots, out);
  const py::gil_scoped_release unlocked;
  moe.forward(batch.args());
}

// A HostCall with all that it points to.
class HeldHostCall {
 public:
  HeldHostCall(const py::object& moe, py::handle x, py::handle topk_ids, py::handle topk_weights,
               py::handle adapter_slots, py::handle out, py::handle rows, const py::object& record)
      : held_(py::make_tuple(moe, x, topk_ids, topk_weights, adapter_slots, out, rows, record)),
        batch_(moe.cast<Moe&>(), x, topk_ids, topk_weights, adapter_slots, out) {
    if (!rows.is_none()) {
      rows_.emplace(rows, "rows");
      rows_->require({Dtype::i32}).require_shape({1});
    }
    const int32_t* real_rows = rows_ ? rows_->data<int32_t>() : nullptr;
    call_.emplace(moe.cast<Moe&>(), batch_.args(), real_rows, record.cast<HostRecord&>());
  }
  static uintptr_t function() { return reinterpret_cast<uintptr_t>(&HostCall::run); }
  uintptr_t argument() { return reinterpret_cast<uintptr_t>(&*call_); }

 private:
  const py::tuple held_;  // a view does not hold the array of every library
  const Batch batch_;
  std::optional<TensorView> rows_;
  std::optional<HostCall> call_;
};

// One projection's A and B: both or neither, shapes (experts, rank, inputs) and (experts, outputs, rank).
class Projection {
 public:
  Projection(py::handle a, const char* a_name, py::handle b, const char* b_name) {
    if (a.is_none() != b.is_none()) {
      throw py::value_error(std::string(a.is_none() ? a_name : b_name) + ": is None but " +
                            (a.is_none() ? b_name : a_name) + " is not, expected both or neither");
    }
    if (a.is_none()) return;
    a_.emplace(a, a_name);
    b_.emplace(b, b_name);
    for (const TensorView* view : {&*a_, &*b_}) {
      view->require({Dtype::bf16, Dtype::f32}).require_shape({-1, -1, -1}).require_contiguous();
    }
    b_->require_shape({a_->size(0), -1, a_->size(1)});
  }

  bool present() const { return a_.has_value(); }
  int64_t experts() const { return a_->size(0); }
  int64_t inputs() const { return a_->size(2); }
  int64_t outputs() const { return b_->size(1); }
  void require(int64_t experts, int64_t outputs, int64_t inputs) const {
    if (!present()) return;
    a_->require_shape({experts, -1, inputs});
    b_->require_shape({experts, outputs, -1});
  }
  LowRankSource source() const {
    if (!present()) return {};
    return {a_->data<void>(), b_->data<void>(), a_->is(Dtype::f32), b_->is(Dtype::f32), a_->size(1)};
  }

 private:
  std::optional<TensorView> a_;
  std::optional<TensorView> b_;
};

std::shared_ptr<Adapter> make_adapter(py::handle gate_a, py::handle gate_b, py::handle up_a, py::handle up_b,
                                      py::handle down_a, py::handle down_b, double scale) {
  const Projection gate(gate_a, "gate_a", gate_b, "gate_b");
  const Projection up(up_a, "up_a", up_b, "up_b");
  const Projection down(down_a, "down_a", down_b, "down_b");
  const Projection* first = gate.present() ? &gate : up.present() ? &up : &down;
  if (!first->present()) throw py::value_error("adapter: all projections are None, expected at least one");
  const int64_t experts = first->experts();
  const int64_t hidden = first == &down ? down.outputs() : first->inputs();
  const int64_t intermediate = first == &down ? down.inputs() : first->outputs();
  if (experts == 0 || hidden == 0 || intermediate == 0) {
    throw py::value_error("adapter: expected at least 1 expert, hidden 1 and intermediate 1, got " +
                          std::to_string(experts) + ", " + std::to_string(hidden) + " and " +
                          std::to_string(intermediate));
  }
  gate.require(experts, intermediate, hidden);
  up.require(experts, intermediate, hidden);
  down.require(experts, hidden, intermediate);
  const LowRankSource sources[] = {gate.source(), up.source(), down.source()};
  const py::gil_scoped_release unlocked;
  return std::make_shared<Adapter>(experts, hidden, intermediate, sources[0], sources[1], sources[2],
                                   static_cast<float>(scale));
}

// {"gate_up": {"ns": …, "bytes": …}, …}, or None when profiling is off.
py::object read_profile(const Moe& moe) {
  const std::shared_ptr<Profile> profile = moe.profile();
  if (profile == nullptr) return py::none();
  py::dict phases;
  for (size_t i = 0; i < kPhaseNames.size(); ++i) {
    py::dict counts;
    counts["ns"] = (*profile)[i].ns.load();
    counts["bytes"] = (*profile)[i].bytes.load();
    phases[kPhaseNames[i]] = counts;
  }
  return phases;
}

void bind_pool(py::module_& module) {
  py::class_<ThreadPool, std::shared_ptr<ThreadPool>>(module, "ThreadPool")
      .def(py::init<int, int>(), py::arg("threads"), py::kw_only(), py::arg("nodes") = 1)
      .def("stay_awake", &ThreadPool::stay_awake, py::arg("us"))
      .def_property_readonly("threads", &ThreadPool::threads)
      .def_property_readonly("nodes", &ThreadPool::nodes);
}

void bind_adapter(py::module_& module) {
  py::class_<Adapter, std::shared_ptr<Adapter>>(module, "Adapter")
      .def(py::init(&make_adapter), py::arg("gate_a").none(true), py::arg("gate_b").none(true),
           py::arg("up_a").none(true), py::arg("up_b").none(true), py::arg("down_a").none(true),
           py::arg("down_b").none(true), py::kw_only(), py::arg("scale") = 1.0)
      .def_property_readonly("ranks",
                             [](const Adapter& adapter) {
                               return py::make_tuple(adapter.gate_rank(), adapter.up_rank(),
                                                     adapter.down_rank());
                             })
      .def_property_readonly("scale", &Adapter::scale)
      .def_property_readonly("num_experts", &Adapter::experts)
      .def_property_readonly("hidden_size", &Adapter::hidden)
      .def_property_readonly("intermediate_size", &Adapter::intermediate)
      .def_property_readonly("packed_bytes", &Adapter::packed_bytes);
}

void bind_host_call(py::module_& module) {
  py::class_<HostRecord>(module, "HostRecord")
      .def(py::init<>())
      .def_property_readonly("calls", &HostRecord::calls)
      .def_property_readonly("tokens", &HostRecord::tokens)
      .def_property_readonly("adapter_tokens", &HostRecord::adapter_tokens)
      .def_property_readonly("busy_ns", &HostRecord::busy_ns)
      .def("recent",
           [](const HostRecord& record) {
             py::list found;
             for (const HostInterval& each : record.recent()) {
               found.append(py::make_tuple(each.start_ns, each.end_ns, each.tokens));
             }
             return found;
           })
      .def_property_readonly("failure", [](const HostRecord& record) {
        const std::string failure = record.failure();
        return failure.empty() ? py::object(py::none()) : py::object(py::str(failure));
      });
  py::class_<HeldHostCall>(module, "HostCall")
      .def(py::init<const py::object&, py::handle, py::handle, py::handle, py::handle, py::handle, py::handle,
                    const py::object&>(),
           py::arg("moe"), py::arg("x"), py::arg("topk_ids"), py::arg("topk_weights"),
           py::arg("adapter_slots").none(true), py::arg("out"), py::kw_only(), py::arg("rows") = py::none(),
           py::arg("record"))
      .def_property_readonly("function", [](const HeldHostCall&) { return HeldHostCall::function(); })
      .def_property_readonly("argument", &HeldHostCall::argument);
}

void bind_moe(py::module_& module) {
  py::class_<Moe>(module, "MoE")
      .def(py::init(&make_moe), py::kw_only(), py::arg("num_experts"), py::arg("hidden_size"),
           py::arg("intermediate_size"), py::arg("method") = "AMXBF16_SFT", py::arg("isa") = "auto",
           py::arg("pool").none(false), py::arg("packed") = py::none())
      .def("load_expert", &load_expert, py::arg("expert"), py::arg("gate"), py::arg("up"), py::arg("down"))
      .def("load_quantized_expert", &load_quantized_expert, py::arg("expert"), py::arg("arrays"))
      .def("forward", &forward, py::arg("x"), py::arg("topk_ids"), py::arg("topk_weights"),
           py::arg("adapter_slots").none(true), py::arg("out"))
      .def("set_adapter", &Moe::set_adapter, py::arg("slot"), py::arg("adapter").none(true),
           py::call_guard<py::gil_scoped_release>())
      .def("set_profiling", &Moe::set_profiling, py::arg("on"))
      .def("read_profile", &read_profile)
      .def_property_readonly("isa", &Moe::isa)
      .def_property_readonly("method", &Moe::method)
      .def("packed_shards", &packed_shards)
      .def_property_readonly("packed_layout", py::overload_cast<>(&Moe::packed_layout, py::const_))
      .def_property_readonly("packed_bytes", &Moe::packed_bytes)
      .def_property_readonly("num_experts", &Moe::num_experts)
      .def_property_readonly("hidden_size", &Moe::hidden_size)
      .def_property_readonly("intermediate_size", &Moe::intermediate_size);
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "Compiled kernels of kt-launch: routed experts with LoRA on the CPU.";
  module.def("isas", &usable_isas);
  module.def("compiled_isas", &compiled_isas);
  module.def("quantize_expert", &quantize_expert, py::arg("gate"), py::arg("up"), py::arg("down"),
             py::arg("method"), py::kw_only(), py::arg("isa") = "auto");
  module.def(
      "packed_layout",
      [](const std::string& method, const ThreadPool& pool) {
        return packed_layout(format_of(method), pool.nodes());
      },
      py::kw_only(), py::arg("method"), py::arg("pool"));
  bind_pool(module);
  bind_adapter(module);
  bind_moe(module);
  bind_host_call(module);
}

}  // namespace kt
