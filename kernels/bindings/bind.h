// What module.cpp puts together.
#pragma once

#include <pybind11/pybind11.h>

namespace kt {

void bind_weights(pybind11::module_& module);
void bind_layer(pybind11::module_& module);

}  // namespace kt
