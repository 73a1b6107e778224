// Arrays of Python as views, by the DLPack protocol: no torch, no copy. One array, and those of one expert.
#pragma once

#include <pybind11/pytypes.h>

#include <array>
#include <cstdint>
#include <string>

#include "../quantize.h"
#include "../tensor.h"
#include "../weights.h"

namespace kt {

// Of a tensor or array in CPU memory, which `object` and the view keep; `name` is the argument's.
// py::type_error for an object without DLPack, py::value_error for one whose library does not share it.
TensorView view_of(pybind11::handle object, const char* name);

// ---- the matrices of one expert; the views live as long as these objects ----

struct MatrixShape {
  const char* name;
  int64_t rows;
  int64_t inputs;
};

constexpr std::array<MatrixShape, 3> matrix_shapes(int64_t hidden, int64_t intermediate) {
  return {{{"gate", intermediate, hidden}, {"up", intermediate, hidden}, {"down", hidden, intermediate}}};
}

class Bf16Arrays {
 public:
  Bf16Arrays(pybind11::handle gate, pybind11::handle up, pybind11::handle down);
  const TensorView& operator[](int matrix) const { return views_[static_cast<size_t>(matrix)]; }
  void require(int64_t hidden, int64_t intermediate) const;
  ExpertSource source() const;

 private:
  std::array<TensorView, 3> views_;
};

// One matrix with its scales.
class QuantizedArrays {
 public:
  QuantizedArrays(const pybind11::dict& arrays, Format format, const MatrixShape& shape);
  QuantizedArrays(const QuantizedArrays&) = delete;  // a view points to the name
  QuantizedArrays& operator=(const QuantizedArrays&) = delete;
  QuantizedMatrix matrix() const { return {values_.data<uint8_t>(), scales_.data<void>(), inputs_}; }

 private:
  std::string scale_name_;
  TensorView values_;
  TensorView scales_;
  int64_t inputs_;
};

// An array that nobody reads (a zero point, say) would mean other weights than those that are packed.
void refuse_unknown_arrays(const pybind11::dict& arrays);

}  // namespace kt
