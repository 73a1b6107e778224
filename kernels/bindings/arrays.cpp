// Both ways that DLPack 1.x knows: the C functions of a tensor type, which spare a Python call and a capsule
// for each argument, and __dlpack__ with its capsule.
#include "arrays.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <iterator>
#include <memory>
#include <optional>
#include <string>

namespace py = pybind11;

namespace kt {
namespace {

std::string type_name(py::handle object) { return py::str(py::type::handle_of(object).attr("__name__")); }

// Whatever goes wrong inside another library, in one line that names the argument.
[[noreturn]] void refuse_to_share(const char* name, const py::error_already_set& error) {
  const std::string reason = py::str(error.value());
  throw py::value_error(std::string(name) + ": cannot be shared by DLPack (" +
                        reason.substr(0, reason.find('\n')) +
                        "), expected a plain, dense CPU tensor without gradient");
}

bool is_true(py::handle object, const char* attribute) {
  return py::hasattr(object, attribute) && py::bool_(object.attr(attribute));
}

// Of a call of Python; throws its error.
py::object result_of(PyObject* object) {
  if (object == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

py::object call(const py::object& function) { return result_of(PyObject_CallNoArgs(function.ptr())); }

template <typename T>
const T& content_of(const py::object& capsule, const char* name) {
  const auto* content = static_cast<const T*>(PyCapsule_GetPointer(capsule.ptr(), name));
  if (content == nullptr) throw py::error_already_set();
  return *content;
}

// Nothing where the type has no such functions, or the object needs the capsule's longer checks.
std::optional<TensorView> view_by_functions(py::handle object, const char* name) {
  const py::handle type = py::type::handle_of(object);
  if (!py::hasattr(type, "__dlpack_c_exchange_api__")) return {};
  const py::object capsule = type.attr("__dlpack_c_exchange_api__");
  const auto& functions = content_of<DLPackExchangeAPI>(capsule, "dlpack_exchange_api");
  if (functions.header.version.major != DLPACK_MAJOR_VERSION ||
      functions.dltensor_from_py_object_no_sync == nullptr) {
    return {};
  }
  if (is_true(object, "requires_grad")) return {};  // the capsule's error says why
  // Nothing in a DLPack tensor says that its values are meant with the other sign.
  if (py::hasattr(object, "is_neg") && py::bool_(call(object.attr("is_neg")))) {
    throw py::value_error(std::string(name) +
                          ": is a negated view, expected plain values; call .resolve_neg() first");
  }
  DLTensor tensor{};
  if (functions.dltensor_from_py_object_no_sync(object.ptr(), &tensor) != 0) throw py::error_already_set();
  return TensorView(name, tensor, false, nullptr);
}

py::object capsule_of(py::handle object) {
  const py::object function = object.attr("__dlpack__");
  py::dict options;
  options["max_version"] = result_of(Py_BuildValue("(ii)", DLPACK_MAJOR_VERSION, 0));
  try {
    return result_of(PyObject_Call(function.ptr(), py::tuple().ptr(), options.ptr()));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
    return call(function);  // a library older than versioned capsules
  }
}

TensorView view_by_capsule(py::handle object, const char* name) {
  const py::tuple device = call(object.attr("__dlpack_device__"));
  if (device.size() != 2) throw py::value_error(std::string(name) + ": __dlpack_device__ is no pair");
  validate_device(name, {static_cast<DLDeviceType>(static_cast<int>(py::int_(device[0]))), 0});
  // The capsule keeps its own deleter: it is left unconsumed and freed with the view.
  const auto capsule = std::make_shared<py::object>(capsule_of(object));
  if (PyCapsule_IsValid(capsule->ptr(), "dltensor_versioned") == 0) {
    return {name, content_of<DLManagedTensor>(*capsule, "dltensor").dl_tensor, false, capsule};
  }
  const auto& managed = content_of<DLManagedTensorVersioned>(*capsule, "dltensor_versioned");
  if (managed.version.major != DLPACK_MAJOR_VERSION) {
    throw py::value_error(std::string(name) + ": DLPack major version " +
                          std::to_string(managed.version.major) + ", expected " +
                          std::to_string(DLPACK_MAJOR_VERSION));
  }
  return {name, managed.dl_tensor, (managed.flags & DLPACK_FLAG_BITMASK_READ_ONLY) != 0, capsule};
}

}  // namespace

TensorView view_of(py::handle object, const char* name) {
  if (!py::hasattr(object, "__dlpack__")) {
    throw py::type_error(std::string(name) + ": expected a tensor or array with __dlpack__, got " +
                         type_name(object));
  }
  try {
    if (std::optional<TensorView> view = view_by_functions(object, name)) return *std::move(view);
    return view_by_capsule(object, name);
  } catch (const py::error_already_set& error) {
    refuse_to_share(name, error);
  }
}

namespace {

constexpr const char* kArrayNames[] = {"gate", "gate_scale", "up", "up_scale", "down", "down_scale"};
constexpr const char* kExpectedArrays = "expected gate, gate_scale, up, up_scale, down and down_scale";

py::object array_of(const py::dict& arrays, const std::string& key) {
  const py::str name(key);
  if (arrays.contains(name)) return arrays[name];
  throw py::value_error("arrays: '" + key + "' is missing, " + kExpectedArrays);
}

}  // namespace

void refuse_unknown_arrays(const py::dict& arrays) {
  for (const auto& item : arrays) {
    const std::string key = py::str(item.first);
    const auto is_key = [&](const char* name) { return key == name; };
    if (std::any_of(std::begin(kArrayNames), std::end(kArrayNames), is_key)) continue;
    throw py::value_error("arrays: '" + key + "' is not known, " + kExpectedArrays);
  }
}

Bf16Arrays::Bf16Arrays(py::handle gate, py::handle up, py::handle down)
    : views_{view_of(gate, "gate"), view_of(up, "up"), view_of(down, "down")} {}

void Bf16Arrays::require(int64_t hidden, int64_t intermediate) const {
  const auto shapes = matrix_shapes(hidden, intermediate);
  for (size_t i = 0; i < shapes.size(); ++i) {
    views_[i].require({Dtype::bf16}).require_shape({shapes[i].rows, shapes[i].inputs}).require_contiguous();
  }
}

ExpertSource Bf16Arrays::source() const {
  return {.gate = views_[0].data<uint16_t>(),
          .up = views_[1].data<uint16_t>(),
          .down = views_[2].data<uint16_t>()};
}

QuantizedArrays::QuantizedArrays(const py::dict& arrays, Format format, const MatrixShape& shape)
    : scale_name_(std::string(shape.name) + "_scale"),
      values_(view_of(array_of(arrays, shape.name), shape.name)),
      scales_(view_of(array_of(arrays, scale_name_), scale_name_.c_str())),
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
  const int64_t place = first_scale_not_finite(format, matrix(), shape.rows);
  if (place < 0) return;
  throw py::value_error(scale_name_ + ": value " + std::to_string(place) +
                        " is NaN or infinite, expected finite scales; quantize the weights again");
}

}  // namespace kt
