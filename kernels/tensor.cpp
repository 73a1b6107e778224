// The few structs of DLPack 1.x that reading a tensor takes, written from its specification, and the checks
// on top.
#include "tensor.h"

#include <algorithm>
#include <utility>

namespace py = pybind11;

namespace kt {
namespace {

constexpr int32_t kCpu = 1;
constexpr int32_t kCudaHost = 3;  // pinned memory, readable by the CPU
constexpr uint64_t kReadOnlyFlag = 1;
constexpr uint32_t kKnownMajor = 1;

struct DlTensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DlManaged {
  DlTensor tensor;
  void* context;
  void (*deleter)(DlManaged*);
};

struct DlVersioned {
  uint32_t major;
  uint32_t minor;
  void* context;
  void (*deleter)(DlVersioned*);
  uint64_t flags;
  DlTensor tensor;
};

// The C functions that a tensor type may offer, which spare a Python call and a capsule for each argument.
struct DlExchangeApi {
  uint32_t major;
  uint32_t minor;
  void* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, DlTensor* tensor);
  void* current_stream;
};

struct DtypeRow {
  Dtype dtype;
  uint8_t code;
  uint8_t bits;
  const char* name;
};

constexpr DtypeRow kDtypes[] = {
    {Dtype::bf16, 4, 16, "bfloat16"}, {Dtype::f32, 2, 32, "float32"}, {Dtype::i32, 0, 32, "int32"},
    {Dtype::i64, 0, 64, "int64"},     {Dtype::i8, 0, 8, "int8"},      {Dtype::u8, 1, 8, "uint8"},
    {Dtype::u16, 1, 16, "uint16"},
};

const DtypeRow& row_of(Dtype dtype) { return kDtypes[static_cast<size_t>(dtype)]; }

std::string joined(const std::vector<int64_t>& numbers) {
  std::string text = "(";
  for (size_t i = 0; i < numbers.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(numbers[i]);
  return text + ")";
}

// A shape as errors name it: -1 takes any size.
std::string joined_sizes(const std::vector<int64_t>& sizes) {
  std::string text = "(";
  for (size_t i = 0; i < sizes.size(); ++i) {
    text += (i > 0 ? ", " : "") + (sizes[i] < 0 ? std::string("any") : std::to_string(sizes[i]));
  }
  return text + ")";
}

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

void validate_device(const char* name, int32_t device_type) {
  if (device_type == kCpu || device_type == kCudaHost) return;
  throw py::value_error(std::string(name) + ": lives on a device (DLPack type " +
                        std::to_string(device_type) + "), expected CPU memory; copy it to the CPU first");
}

}  // namespace

TensorView::TensorView(py::handle object, const char* name) : name_(name) {
  if (!py::hasattr(object, "__dlpack__")) {
    throw py::type_error(std::string(name) + ": expected a tensor or array with __dlpack__, got " +
                         type_name(object));
  }
  try {
    if (!read_api_of_type(object)) read_capsule(object);
  } catch (const py::error_already_set& error) {
    refuse_to_share(name, error);
  }
  validate_memory();
}

TensorView::~TensorView() = default;

bool TensorView::read_api_of_type(py::handle object) {
  const py::handle type = py::type::handle_of(object);
  if (!py::hasattr(type, "__dlpack_c_exchange_api__")) return false;
  const py::object capsule = type.attr("__dlpack_c_exchange_api__");
  const auto* api =
      static_cast<const DlExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw py::error_already_set();
  if (api->major != kKnownMajor || api->tensor_from_object == nullptr) return false;
  if (is_true(object, "requires_grad")) return false;  // the slow way says why
  // Nothing in a DLPack tensor says that its values are meant with the other sign.
  if (py::hasattr(object, "is_neg") && py::bool_(object.attr("is_neg")())) {
    throw py::value_error(std::string(name_) +
                          ": is a negated view, expected plain values; call .resolve_neg() first");
  }
  DlTensor tensor{};
  if (api->tensor_from_object(object.ptr(), &tensor) != 0) throw py::error_already_set();
  read_tensor(&tensor);
  return true;
}

void TensorView::read_capsule(py::handle object) {
  const py::tuple device = object.attr("__dlpack_device__")();
  if (device.size() != 2) throw py::value_error(std::string(name_) + ": __dlpack_device__ is no pair");
  validate_device(name_, static_cast<int32_t>(py::int_(device[0])));
  try {
    capsule_ = object.attr("__dlpack__")(py::arg("max_version") = py::make_tuple(kKnownMajor, 0));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
    capsule_ = object.attr("__dlpack__")();  // a library older than versioned capsules
  }
  // The capsule keeps its own deleter: it is left unconsumed and freed with this view.
  if (PyCapsule_IsValid(capsule_.ptr(), "dltensor_versioned") != 0) {
    const auto* managed =
        static_cast<const DlVersioned*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor_versioned"));
    if (managed->major != kKnownMajor) {
      throw py::value_error(std::string(name_) + ": DLPack major version " + std::to_string(managed->major) +
                            ", expected 1");
    }
    read_only_ = (managed->flags & kReadOnlyFlag) != 0;
    return read_tensor(&managed->tensor);
  }
  const auto* managed = static_cast<const DlManaged*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor"));
  if (managed == nullptr) throw py::error_already_set();
  read_tensor(&managed->tensor);
}

void TensorView::read_tensor(const void* dl_tensor) {
  const DlTensor& tensor = *static_cast<const DlTensor*>(dl_tensor);
  validate_device(name_, tensor.device_type);
  data_ = static_cast<uint8_t*>(tensor.data) + tensor.byte_offset;
  code_ = tensor.lanes == 1 ? tensor.code : 255;
  bits_ = tensor.bits;
  shape_.assign(tensor.shape, tensor.shape + tensor.ndim);
  strides_.resize(shape_.size());
  int64_t stride = 1;
  for (size_t i = shape_.size(); i-- > 0;) {
    strides_[i] = tensor.strides != nullptr ? tensor.strides[i] : stride;
    stride *= shape_[i];
  }
}

void TensorView::validate_memory() const {
  const bool empty = std::find(shape_.begin(), shape_.end(), 0) != shape_.end();
  if (data_ != nullptr || empty) return;
  throw py::value_error(std::string(name_) + ": has no memory behind its shape " + shape_name() +
                        ", expected values; was its storage freed?");
}

bool TensorView::is(Dtype dtype) const { return row_of(dtype).code == code_ && row_of(dtype).bits == bits_; }

std::string TensorView::dtype_name() const {
  for (const DtypeRow& row : kDtypes) {
    if (is(row.dtype)) return row.name;
  }
  constexpr uint8_t kBool = 6;
  if (code_ == kBool) return "bool";
  const char* kinds[] = {"int", "uint", "float", "opaque", "bfloat", "complex"};
  const std::string kind =
      code_ < kBool ? kinds[code_] : "DLPack type " + std::to_string(code_) + " of bits ";
  return kind + std::to_string(bits_);
}

std::string TensorView::shape_name() const { return joined_sizes(shape_); }

const TensorView& TensorView::require(std::initializer_list<Dtype> dtypes) const {
  std::string expected;
  for (Dtype dtype : dtypes) {
    if (is(dtype)) return *this;
    expected += (expected.empty() ? "" : " or ") + std::string(row_of(dtype).name);
  }
  throw py::type_error(std::string(name_) + ": expected dtype " + expected + ", got " + dtype_name());
}

const TensorView& TensorView::require_shape(std::initializer_list<int64_t> shape) const {
  const std::vector<int64_t> expected(shape);
  bool same = expected.size() == shape_.size();
  for (size_t i = 0; same && i < expected.size(); ++i) same = expected[i] < 0 || expected[i] == shape_[i];
  if (same) return *this;
  throw py::value_error(std::string(name_) + ": expected shape " + joined_sizes(expected) + ", got " +
                        shape_name());
}

const TensorView& TensorView::require_contiguous() const {
  if (std::find(shape_.begin(), shape_.end(), 0) != shape_.end()) return *this;  // no values, no order
  int64_t stride = 1;
  for (size_t i = shape_.size(); i-- > 0;) {
    if (shape_[i] != 1 && strides_[i] != stride) {
      throw py::value_error(std::string(name_) + ": expected contiguous values, got strides " +
                            joined(strides_) + " for shape " + shape_name() + "; call .contiguous() first");
    }
    stride *= shape_[i];
  }
  return *this;
}

int64_t TensorView::require_rows() const {
  const int64_t columns = shape_.back();
  const int64_t stride = shape_[0] == 1 ? columns : strides_[0];
  if ((columns != 1 && strides_.back() != 1) || stride < columns) {
    throw py::value_error(std::string(name_) + ": expected rows of contiguous values, got strides " +
                          joined(strides_) + " for shape " + shape_name() + "; call .contiguous() first");
  }
  return stride;
}

const TensorView& TensorView::require_writable() const {
  if (read_only_)
    throw py::value_error(std::string(name_) + ": is read-only, expected an array that can be written");
  return *this;
}

}  // namespace kt
