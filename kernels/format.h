// The number formats that weights are packed in, one row each: what they are called and how large they are.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "gemm.h"

namespace kt {

struct FormatRow {
  Format format;
  const char* name;    // as a packed layout calls it
  const char* method;  // as SGLang's --kt-method calls it
  int64_t bits;        // of a weight, without its share of a scale
  int64_t scale_bytes;
  int64_t scale_inputs;  // that share a scale; 0: all of a row, or no scales
  // Packed weights are kept in files: one more whenever the bytes of an expert or their order change.
  int layout_version;
};

std::span<const FormatRow> format_rows();
const FormatRow& row_of(Format format);

// Throws std::invalid_argument with the known methods.
Format format_of(const std::string& method);
// Of the formats with scales, for messages: "A or B".
std::string quantized_methods();

}  // namespace kt
