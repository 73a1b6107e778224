// Arrays of other libraries as checked views: dtype, shape, strides, lifetime. How an object of Python
// becomes one is in bindings/arrays.h; nothing here knows Python.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "vendor/dlpack/dlpack.h"

namespace kt {

enum class Dtype : uint8_t { bf16, f32, i32, i64, i8, u8, u16 };

// Python's TypeError; every other refusal is std::invalid_argument, its ValueError.
class WrongType : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Throws std::invalid_argument unless a CPU can read the memory of such a device.
void validate_device(const char* name, DLDevice device);

// A tensor in CPU memory. All errors name the argument, what was expected and what came.
class TensorView {
 public:
  // `owner` keeps the memory; null: the caller does. `name` must outlive the view.
  TensorView(const char* name, const DLTensor& tensor, bool read_only, std::shared_ptr<void> owner);

  // WrongType unless the dtype is one of these.
  const TensorView& require(std::initializer_list<Dtype> dtypes) const;
  // The rest throw std::invalid_argument. -1 takes any size.
  const TensorView& require_shape(std::initializer_list<int64_t> shape) const;
  // Values lie one behind the other.
  const TensorView& require_contiguous() const;
  // Rows are whole; the distance between them is free. Returns that distance in values.
  int64_t require_rows() const;
  const TensorView& require_writable() const;

  bool is(Dtype dtype) const;
  const char* name() const { return name_; }
  int64_t size(int dimension) const { return shape_[static_cast<size_t>(dimension)]; }
  // Whether a byte belongs to values of both. Strides must not be negative.
  bool shares_memory_with(const TensorView& other) const;
  template <typename T>
  T* data() const {
    return static_cast<T*>(data_);
  }

 private:
  bool empty() const;
  int64_t extent_bytes() const;
  std::string dtype_name() const;
  std::string shape_name() const;

  const char* name_;
  void* data_;
  uint8_t code_;
  uint8_t bits_;
  bool read_only_;
  std::vector<int64_t> shape_;
  std::vector<int64_t> strides_;
  std::shared_ptr<void> owner_;
};

}  // namespace kt
