// What is prepared for a layer: adapters, and the quantized arrays of a file.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "../dispatch.h"
#include "../format.h"
#include "../lora.h"
#include "../quantize.h"
#include "arrays.h"
#include "bind.h"

namespace py = pybind11;

namespace kt {
namespace {

// One projection's A and B: both or neither, shapes (experts, rank, inputs) and (experts, outputs, rank).
class Projection {
 public:
  Projection(py::handle a, const char* a_name, py::handle b, const char* b_name) {
    if (a.is_none() != b.is_none()) {
      throw py::value_error(std::string(a.is_none() ? a_name : b_name) + ": is None but " +
                            (a.is_none() ? b_name : a_name) + " is not, expected both or neither");
    }
    if (a.is_none()) return;
    a_ = view_of(a, a_name);
    b_ = view_of(b, b_name);
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
    return {.a = a_->data<void>(),
            .b = b_->data<void>(),
            .a_is_f32 = a_->is(Dtype::f32),
            .b_is_f32 = b_->is(Dtype::f32),
            .rank = a_->size(1)};
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

void bind_adapter(py::module_& module) {
  py::class_<Adapter, std::shared_ptr<Adapter>>(module, "Adapter")
      .def(py::init(&make_adapter), py::arg("gate_a").none(true), py::arg("gate_b").none(true),
           py::arg("up_a").none(true), py::arg("up_b").none(true), py::arg("down_a").none(true),
           py::arg("down_b").none(true), py::kw_only(), py::arg("scale") = 1.0)
      .def_property_readonly("ranks",
                             [](const Adapter& adapter) {
                               const AdapterRanks& ranks = adapter.ranks();
                               return py::make_tuple(ranks.gate, ranks.up, ranks.down);
                             })
      .def_property_readonly("scale", &Adapter::scale)
      .def_property_readonly("num_experts", &Adapter::experts)
      .def_property_readonly("hidden_size", &Adapter::hidden)
      .def_property_readonly("intermediate_size", &Adapter::intermediate)
      .def_property_readonly("packed_bytes", &Adapter::packed_bytes);
}

py::array quantized_values(Format format, const MatrixShape& shape) {
  if (format == Format::int8) return py::array_t<int8_t>({shape.rows, shape.inputs});
  return py::array_t<uint8_t>({shape.rows, int4_row_bytes(shape.inputs)});
}

py::array quantized_scales(Format format, const MatrixShape& shape) {
  if (format == Format::int8) return py::array_t<float>({shape.rows});
  return py::array_t<uint16_t>({shape.rows, int4_row_groups(shape.inputs)});
}

// {"gate": values, "gate_scale": scales, "up": …}; see quantize.h for the format.
py::dict quantize_expert(py::handle gate, py::handle up, py::handle down, const std::string& method,
                         const std::string& isa) {
  const Packer& packer = find_packer(find_isa(isa));
  const Format format = format_of(method);
  if (format == Format::bf16) {
    throw py::value_error("method: " + method + " keeps bf16, expected " + quantized_methods());
  }
  const Bf16Arrays given(gate, up, down);
  given[0].require({Dtype::bf16}).require_shape({-1, -1});
  const int64_t intermediate = given[0].size(0);
  const int64_t hidden = given[0].size(1);
  if (intermediate == 0 || hidden == 0) {
    throw py::value_error("gate: expected at least one row and one input, got (" +
                          std::to_string(intermediate) + ", " + std::to_string(hidden) + ")");
  }
  given.require(hidden, intermediate);
  const auto shapes = matrix_shapes(hidden, intermediate);
  py::dict arrays;
  for (int i = 0; i < 3; ++i) {
    const MatrixShape& shape = shapes[static_cast<size_t>(i)];
    py::array values = quantized_values(format, shape);
    py::array scales = quantized_scales(format, shape);
    auto* to_values = static_cast<uint8_t*>(values.mutable_data());
    void* to_scales = scales.mutable_data();
    {
      const py::gil_scoped_release unlocked;
      quantize_matrix(packer, format, {given[i].data<uint16_t>(), shape.rows, shape.inputs}, to_values,
                      to_scales);
    }
    arrays[shape.name] = values;
    arrays[py::str(std::string(shape.name) + "_scale")] = scales;
  }
  return arrays;
}

}  // namespace

void bind_weights(py::module_& module) {
  bind_adapter(module);
  module.def("quantize_expert", &quantize_expert, py::arg("gate"), py::arg("up"), py::arg("down"),
             py::arg("method"), py::kw_only(), py::arg("isa") = "auto");
}

}  // namespace kt
