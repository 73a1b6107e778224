// What computes: ThreadPool, MoE, HostCall with its record, and the Mailbox that runs such calls.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../format.h"
#include "../host_call.h"
#include "../mailbox.h"
#include "../moe.h"
#include "../threads.h"
#include "arrays.h"
#include "batch.h"
#include "bind.h"

namespace py = pybind11;

namespace kt {
namespace {

using Buffers = std::vector<py::buffer_info>;

std::string type_name(py::handle object) { return py::str(py::type::handle_of(object).attr("__name__")); }

py::buffer_info bytes_of(py::handle array, const std::string& name) {
  if (PyObject_CheckBuffer(array.ptr()) == 0) {
    throw py::type_error(name + "expected an array of uint8, got " + type_name(array));
  }
  py::buffer_info info = py::reinterpret_borrow<py::buffer>(array).request();
  if (info.format != "B") throw py::type_error(name + "expected dtype uint8, got format " + info.format);
  if (info.ndim != 1 || (info.size > 1 && info.strides[0] != 1)) {
    throw py::value_error(name + "expected one dimension of contiguous bytes, got " +
                          std::to_string(info.ndim) + " dimensions");
  }
  return info;
}

// Memory of `packed`, held until the layer that reads it is gone; none for None.
PackedWeights borrow_packed(const py::object& packed) {
  if (packed.is_none()) return {};
  if (!py::isinstance<py::sequence>(packed)) {
    throw py::type_error("packed: expected a sequence of arrays, got " + type_name(packed));
  }
  const auto buffers = std::shared_ptr<Buffers>(new Buffers, [](Buffers* held) {
    const py::gil_scoped_acquire locked;
    delete held;
  });
  PackedWeights weights;
  for (py::handle part : packed) {
    const std::string name = "packed[" + std::to_string(buffers->size()) + "]: ";
    buffers->push_back(bytes_of(part, name));
    weights.shards.push_back({static_cast<const uint8_t*>(buffers->back().ptr), buffers->back().size});
  }
  if (weights.shards.empty()) throw py::value_error("packed: expected one array per pool group, got none");
  weights.owner = buffers;
  return weights;
}

// Read-only views that keep the layer alive.
py::list packed_shards(const py::object& layer) {
  py::list arrays;
  for (const PackedShard& shard : layer.cast<Moe&>().packed_shards()) {
    py::array_t<uint8_t> array(static_cast<py::ssize_t>(shard.bytes), shard.data, layer);
    array.attr("setflags")(py::arg("write") = false);
    arrays.append(std::move(array));
  }
  return arrays;
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

void load_expert(Moe& moe, int64_t expert, py::handle gate, py::handle up, py::handle down) {
  const Bf16Arrays arrays(gate, up, down);
  arrays.require(moe.hidden_size(), moe.intermediate_size());
  const py::gil_scoped_release unlocked;
  moe.load_expert(expert, arrays.source());
}

void load_quantized_expert(Moe& moe, int64_t expert, const py::dict& arrays) {
  if (moe.format() == Format::bf16) {
    throw py::value_error("arrays: " + moe.method() + " takes bf16 weights by load_expert, expected method " +
                          quantized_methods());
  }
  refuse_unknown_arrays(arrays);
  const auto shapes = matrix_shapes(moe.hidden_size(), moe.intermediate_size());
  const QuantizedArrays gate(arrays, moe.format(), shapes[0]);
  const QuantizedArrays up(arrays, moe.format(), shapes[1]);
  const QuantizedArrays down(arrays, moe.format(), shapes[2]);
  const py::gil_scoped_release unlocked;
  moe.load_expert(expert, QuantizedExpert{.gate = gate.matrix(), .up = up.matrix(), .down = down.matrix()});
}

void forward(Moe& moe, py::handle x, py::handle topk_ids, py::handle topk_weights, py::handle adapter_slots,
             py::handle out) {
  const Batch batch(moe, x, topk_ids, topk_weights, adapter_slots, out);
  const py::gil_scoped_release unlocked;
  moe.forward(batch.args());
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

// A HostCall with all that it points to.
class HeldHostCall {
 public:
  HeldHostCall(const py::object& moe, py::handle x, py::handle topk_ids, py::handle topk_weights,
               py::handle adapter_slots, py::handle out, py::handle rows, std::vector<int32_t> numbers,
               const py::object& record)
      : held_(py::make_tuple(moe, x, topk_ids, topk_weights, adapter_slots, out, rows, record)),
        batch_(moe.cast<Moe&>(), x, topk_ids, topk_weights, adapter_slots, out) {
    if (!rows.is_none()) {
      rows_ = view_of(rows, "rows");
      rows_->require({Dtype::i32}).require_shape({1});
    }
    const int32_t* real_rows = rows_ ? rows_->data<int32_t>() : nullptr;
    call_.emplace(moe.cast<Moe&>(), batch_.args(), real_rows, std::move(numbers), record.cast<HostRecord&>());
  }
  static uintptr_t function() { return reinterpret_cast<uintptr_t>(&HostCall::run); }
  uintptr_t argument() { return reinterpret_cast<uintptr_t>(&*call_); }
  HostCall& call() { return *call_; }

 private:
  const py::tuple held_;  // a view does not hold the array of every library
  const Batch batch_;
  std::optional<TensorView> rows_;
  std::optional<HostCall> call_;
};

// A Mailbox with the memory of its words and the calls that it may run.
class HeldMailbox {
 public:
  explicit HeldMailbox(const py::object& words) : held_words_(words), words_(view_of(words, "words")) {
    words_.require({Dtype::i32}).require_shape({static_cast<int64_t>(Mailbox::kWords)});
    mailbox_.emplace(words_.data<int32_t>());
  }
  ~HeldMailbox() {
    const py::gil_scoped_release unlocked;
    mailbox_.reset();
  }
  HeldMailbox(const HeldMailbox&) = delete;
  HeldMailbox& operator=(const HeldMailbox&) = delete;
  int32_t add(const py::object& call) {
    const int32_t number = mailbox_->add(call.cast<HeldHostCall&>().call());
    calls_.append(call);
    return number;
  }
  void announce() { mailbox_->announce(); }

 private:
  const py::object held_words_;
  const TensorView words_;
  py::list calls_;
  std::optional<Mailbox> mailbox_;
};

py::list recent_calls(const HostRecord& record) {
  py::list found;
  for (const HostInterval& each : record.recent()) {
    found.append(py::make_tuple(each.start_ns, each.end_ns, each.tokens));
  }
  return found;
}

void bind_pool(py::module_& module) {
  py::class_<ThreadPool, std::shared_ptr<ThreadPool>>(module, "ThreadPool")
      .def(py::init<int, int>(), py::arg("threads"), py::kw_only(), py::arg("nodes") = 1)
      .def("stay_awake", &ThreadPool::stay_awake, py::arg("us"))
      .def_property_readonly("threads", &ThreadPool::threads)
      .def_property_readonly("nodes", &ThreadPool::nodes);
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

void bind_host_call(py::module_& module) {
  py::class_<HostRecord>(module, "HostRecord")
      .def(py::init<>())
      .def_property_readonly("calls", &HostRecord::calls)
      .def_property_readonly("tokens", &HostRecord::tokens)
      .def_property_readonly("adapter_tokens", &HostRecord::adapter_tokens)
      .def_property_readonly("experts_read", &HostRecord::experts_read)
      .def_property_readonly("busy_ns", &HostRecord::busy_ns)
      .def("recent", &recent_calls)
      .def("count_experts", &HostRecord::count_experts, py::arg("experts"))
      .def("expert_counts", &HostRecord::expert_counts)
      .def_property_readonly("failure", [](const HostRecord& record) {
        const std::string failure = record.failure();
        return failure.empty() ? py::object(py::none()) : py::object(py::str(failure));
      });
  py::class_<HeldHostCall>(module, "HostCall")
      .def(py::init<const py::object&, py::handle, py::handle, py::handle, py::handle, py::handle, py::handle,
                    std::vector<int32_t>, const py::object&>(),
           py::arg("moe"), py::arg("x"), py::arg("topk_ids"), py::arg("topk_weights"),
           py::arg("adapter_slots").none(true), py::arg("out"), py::kw_only(), py::arg("rows") = py::none(),
           py::arg("numbers") = std::vector<int32_t>{}, py::arg("record"))
      .def_property_readonly("function", [](const HeldHostCall&) { return HeldHostCall::function(); })
      .def_property_readonly("argument", &HeldHostCall::argument);
}

void bind_mailbox(py::module_& module) {
  py::class_<HeldMailbox> mailbox(module, "Mailbox");
  mailbox.def(py::init<const py::object&>(), py::arg("words"))
      .def("add", &HeldMailbox::add, py::arg("call"))
      .def("announce", &HeldMailbox::announce);
  mailbox.attr("REQUEST") = Mailbox::kRequest;
  mailbox.attr("ANSWER") = Mailbox::kAnswer;
  mailbox.attr("CLOSED") = Mailbox::kClosed;
  mailbox.attr("WORDS") = Mailbox::kWords;
}

}  // namespace

void bind_layer(py::module_& module) {
  bind_pool(module);
  bind_moe(module);
  bind_host_call(module);
  bind_mailbox(module);
}

}  // namespace kt
