// What a kernel may ask of a tensor, and the words of each refusal.
#include "tensor.h"

#include <algorithm>
#include <utility>

namespace kt {
namespace {

struct DtypeRow {
  Dtype dtype;
  DLDataTypeCode code;
  uint8_t bits;
  const char* name;
};

constexpr DtypeRow kDtypes[] = {
    {Dtype::bf16, kDLBfloat, 16, "bfloat16"}, {Dtype::f32, kDLFloat, 32, "float32"},
    {Dtype::i32, kDLInt, 32, "int32"},        {Dtype::i64, kDLInt, 64, "int64"},
    {Dtype::i8, kDLInt, 8, "int8"},           {Dtype::u8, kDLUInt, 8, "uint8"},
    {Dtype::u16, kDLUInt, 16, "uint16"},
};
constexpr uint8_t kVectorType = 255;  // stands for a code whose values have several lanes: no dtype of ours

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

}  // namespace

void validate_device(const char* name, DLDevice device) {
  if (device.device_type == kDLCPU || device.device_type == kDLCUDAHost)
    return;  // the second is pinned memory
  throw std::invalid_argument(std::string(name) + ": is on a device (DLPack type " +
                              std::to_string(static_cast<int>(device.device_type)) +
                              "), expected CPU memory; copy it to the CPU first");
}

TensorView::TensorView(const char* name, const DLTensor& tensor, bool read_only, std::shared_ptr<void> owner)
    : name_(name),
      data_(static_cast<uint8_t*>(tensor.data) + tensor.byte_offset),
      code_(tensor.dtype.lanes == 1 ? tensor.dtype.code : kVectorType),
      bits_(tensor.dtype.bits),
      read_only_(read_only),
      shape_(tensor.shape, tensor.shape + tensor.ndim),
      strides_(shape_.size()),
      owner_(std::move(owner)) {
  validate_device(name, tensor.device);
  int64_t stride = 1;
  for (size_t i = shape_.size(); i-- > 0;) {
    strides_[i] = tensor.strides != nullptr ? tensor.strides[i] : stride;
    stride *= shape_[i];
  }
  if (data_ != nullptr || empty()) return;
  throw std::invalid_argument(std::string(name_) + ": has no memory behind its shape " + shape_name() +
                              ", expected values; was its storage freed?");
}

bool TensorView::empty() const { return std::find(shape_.begin(), shape_.end(), 0) != shape_.end(); }

bool TensorView::is(Dtype dtype) const { return row_of(dtype).code == code_ && row_of(dtype).bits == bits_; }

// From the first byte to behind the last value's.
int64_t TensorView::extent_bytes() const {
  if (empty()) return 0;
  int64_t last = 0;
  for (size_t i = 0; i < shape_.size(); ++i) last += (shape_[i] - 1) * strides_[i];
  return (last + 1) * bits_ / 8;
}

bool TensorView::shares_memory_with(const TensorView& other) const {
  const int64_t bytes = extent_bytes();
  const int64_t other_bytes = other.extent_bytes();
  const auto* first = data<uint8_t>();
  const auto* other_first = other.data<uint8_t>();
  return bytes > 0 && other_bytes > 0 && first < other_first + other_bytes && other_first < first + bytes;
}

std::string TensorView::dtype_name() const {
  for (const DtypeRow& row : kDtypes) {
    if (is(row.dtype)) return row.name;
  }
  if (code_ == kDLBool) return "bool";
  const char* kinds[] = {"int", "uint", "float", "opaque", "bfloat", "complex"};
  const std::string kind =
      code_ < kDLBool ? kinds[code_] : "DLPack type " + std::to_string(code_) + " of bits ";
  return kind + std::to_string(bits_);
}

std::string TensorView::shape_name() const { return joined_sizes(shape_); }

const TensorView& TensorView::require(std::initializer_list<Dtype> dtypes) const {
  std::string expected;
  for (Dtype dtype : dtypes) {
    if (is(dtype)) return *this;
    expected += (expected.empty() ? "" : " or ") + std::string(row_of(dtype).name);
  }
  throw WrongType(std::string(name_) + ": expected dtype " + expected + ", got " + dtype_name());
}

const TensorView& TensorView::require_shape(std::initializer_list<int64_t> shape) const {
  const std::vector<int64_t> expected(shape);
  bool same = expected.size() == shape_.size();
  for (size_t i = 0; same && i < expected.size(); ++i) same = expected[i] < 0 || expected[i] == shape_[i];
  if (same) return *this;
  throw std::invalid_argument(std::string(name_) + ": expected shape " + joined_sizes(expected) + ", got " +
                              shape_name());
}

const TensorView& TensorView::require_contiguous() const {
  if (empty()) return *this;  // no values, no order
  int64_t stride = 1;
  for (size_t i = shape_.size(); i-- > 0;) {
    if (shape_[i] != 1 && strides_[i] != stride) {
      throw std::invalid_argument(std::string(name_) + ": expected contiguous values, got strides " +
                                  joined(strides_) + " for shape " + shape_name() +
                                  "; call .contiguous() first");
    }
    stride *= shape_[i];
  }
  return *this;
}

int64_t TensorView::require_rows() const {
  const int64_t columns = shape_.back();
  const int64_t stride = shape_[0] == 1 ? columns : strides_[0];
  if ((columns != 1 && strides_.back() != 1) || stride < columns) {
    throw std::invalid_argument(std::string(name_) + ": expected rows of contiguous values, got strides " +
                                joined(strides_) + " for shape " + shape_name() +
                                "; call .contiguous() first");
  }
  return stride;
}

const TensorView& TensorView::require_writable() const {
  if (!read_only_) return *this;
  throw std::invalid_argument(std::string(name_) + ": is read-only, expected an array that can be written");
}

}  // namespace kt
