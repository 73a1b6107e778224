// Arrays of other libraries as checked views, by the DLPack protocol: no torch, no copy. Shapes and types
// only, no arithmetic.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

namespace kt {

enum class Dtype : uint8_t { bf16, f32, i32, i64, i8, u8, u16 };

// A CPU tensor that stays alive as long as the view. All errors name the argument, what was expected and what
// came.
class TensorView {
 public:
  TensorView(pybind11::handle object, const char* name);
  ~TensorView();
  TensorView(const TensorView&) = delete;
  TensorView& operator=(const TensorView&) = delete;

  // TypeError unless the dtype is one of these.
  const TensorView& require(std::initializer_list<Dtype> dtypes) const;
  // ValueError unless the shape is this; -1 takes any size.
  const TensorView& require_shape(std::initializer_list<int64_t> shape) const;
  // ValueError unless the values lie one behind the other.
  const TensorView& require_contiguous() const;
  // ValueError unless rows are whole; the distance between them is free. Returns that distance in values.
  int64_t require_rows() const;
  const TensorView& require_writable() const;

  bool is(Dtype dtype) const;
  const char* name() const { return name_; }
  int64_t size(int dimension) const { return shape_[static_cast<size_t>(dimension)]; }
  template <typename T>
  T* data() const {
    return static_cast<T*>(data_);
  }

 private:
  void read_capsule(pybind11::handle object);
  bool read_api_of_type(pybind11::handle object);
  void read_tensor(const void* dl_tensor);
  void validate_memory() const;
  std::string dtype_name() const;
  std::string shape_name() const;

  const char* name_;
  void* data_ = nullptr;
  uint8_t code_ = 0;
  uint8_t bits_ = 0;
  bool read_only_ = false;
  std::vector<int64_t> shape_;
  std::vector<int64_t> strides_;
  pybind11::object capsule_;
};

}  // namespace kt
