// The one table of number formats.
#include "format.h"

#include <stdexcept>
#include <vector>

namespace kt {
namespace {

// In the order of Format.
constexpr FormatRow kFormats[] = {
    {.format = Format::bf16,
     .name = "bf16",
     .method = "AMXBF16_SFT",
     .bits = 16,
     .scale_bytes = 0,
     .scale_inputs = 0,
     .layout_version = 1},
    {.format = Format::int8,
     .name = "int8",
     .method = "AMXINT8_SFT",
     .bits = 8,
     .scale_bytes = 4,
     .scale_inputs = 0,
     .layout_version = 1},
    {.format = Format::int4,
     .name = "int4",
     .method = "AMXINT4_SFT",
     .bits = 4,
     .scale_bytes = 2,
     .scale_inputs = kInt4Group,
     .layout_version = 2},
};

// "A", "A or B", "A, B or C".
std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (size_t i = 0; i < names.size(); ++i) {
    if (i > 0) text += i + 1 == names.size() ? " or " : ", ";
    text += names[i];
  }
  return text;
}

std::string methods(bool quantized_only) {
  std::vector<std::string> names;
  for (const FormatRow& row : format_rows()) {
    if (!quantized_only || row.scale_bytes > 0) names.emplace_back(row.method);
  }
  return joined(names);
}

}  // namespace

std::span<const FormatRow> format_rows() { return kFormats; }

const FormatRow& row_of(Format format) { return kFormats[static_cast<size_t>(format)]; }

Format format_of(const std::string& method) {
  for (const FormatRow& row : format_rows()) {
    if (method == row.method) return row.format;
  }
  throw std::invalid_argument("method: '" + method + "' is not known, expected " + methods(false));
}

std::string quantized_methods() { return methods(true); }

}  // namespace kt
