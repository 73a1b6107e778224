// The Python module, kt_kernels._core: its table of contents, and the facts that need no layer. In this
// folder arguments become checked views, then the GIL is released; the arithmetic is in the folder above.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <exception>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../dispatch.h"
#include "../format.h"
#include "../moe.h"
#include "../tensor.h"
#include "bind.h"

namespace py = pybind11;

namespace kt {
namespace {

using RankTuple = std::tuple<int64_t, int64_t, int64_t>;

// {"AMXBF16_SFT": {"format": "bf16", "bits": 16, "scale_bytes": 0, "group": None}, …}
py::dict methods() {
  py::dict rows;
  for (const FormatRow& row : format_rows()) {
    py::dict facts;
    facts["format"] = row.name;
    facts["bits"] = row.bits;
    facts["scale_bytes"] = row.scale_bytes;
    facts["group"] = row.scale_inputs > 0 ? py::object(py::int_(row.scale_inputs)) : py::object(py::none());
    rows[row.method] = facts;
  }
  return rows;
}

std::vector<int64_t> packed_bytes_of(const std::string& method, int64_t num_experts, int64_t hidden_size,
                                     int64_t intermediate_size, int nodes) {
  return packed_bytes(format_of(method),
                      {.num_experts = num_experts, .hidden = hidden_size, .intermediate = intermediate_size},
                      nodes);
}

int64_t packed_adapter_bytes_of(int64_t num_experts, int64_t hidden_size, int64_t intermediate_size,
                                const RankTuple& ranks) {
  const auto [gate, up, down] = ranks;
  return packed_adapter_bytes(num_experts, hidden_size, intermediate_size,
                              {.gate = gate, .up = up, .down = down});
}

int64_t scratch_bytes_of(const std::string& method, int64_t num_experts, int64_t hidden_size,
                         int64_t intermediate_size, int64_t tokens, int64_t top_k, int threads, int nodes,
                         const RankTuple& ranks) {
  const auto [gate, up, down] = ranks;
  return scratch_bytes(format_of(method),
                       {.num_experts = num_experts, .hidden = hidden_size, .intermediate = intermediate_size},
                       nodes, threads, tokens, top_k, {.gate = gate, .up = up, .down = down});
}

void bind_facts(py::module_& module) {
  module.def("isas", &usable_isas);
  module.def("compiled_isas", &compiled_isas);
  module.def("methods", &methods);
  module.def(
      "packed_layout",
      [](const std::string& method, const ThreadPool& pool) {
        return packed_layout(format_of(method), pool.nodes());
      },
      py::kw_only(), py::arg("method"), py::arg("pool"));
  module.def("packed_bytes", &packed_bytes_of, py::kw_only(), py::arg("method"), py::arg("num_experts"),
             py::arg("hidden_size"), py::arg("intermediate_size"), py::arg("nodes") = 1);
  module.def("packed_adapter_bytes", &packed_adapter_bytes_of, py::kw_only(), py::arg("num_experts"),
             py::arg("hidden_size"), py::arg("intermediate_size"), py::arg("ranks"));
  module.def("scratch_bytes", &scratch_bytes_of, py::kw_only(), py::arg("method"), py::arg("num_experts"),
             py::arg("hidden_size"), py::arg("intermediate_size"), py::arg("tokens"), py::arg("top_k"),
             py::arg("threads"), py::arg("nodes") = 1, py::arg("ranks") = RankTuple{0, 0, 0});
}

// Of a wrong dtype; pybind11 knows the other exceptions.
void translate_wrong_type(std::exception_ptr pending) {
  try {
    if (pending) std::rethrow_exception(pending);
  } catch (const WrongType& error) {
    PyErr_SetString(PyExc_TypeError, error.what());
  }
}

}  // namespace
}  // namespace kt

PYBIND11_MODULE(_core, module) {
  module.doc() = "Compiled kernels of kt-launch: routed experts with LoRA on the CPU.";
  py::register_local_exception_translator(&kt::translate_wrong_type);
  kt::bind_facts(module);
  kt::bind_weights(module);
  kt::bind_layer(module);
}
