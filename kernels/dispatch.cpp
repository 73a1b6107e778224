// The tables of instruction sets, in order of preference, and the CPU probe behind them. No arithmetic.
#include "dispatch.h"

#include <algorithm>
#include <stdexcept>
#include <string_view>

namespace kt {
namespace {

// Intel's cores run vdpbf16ps at half the rate of two float FMAs on the widened inputs, AMD's at twice that
// rate: which of the two AVX-512 rows comes first is the vendor's doing (measured on Emerald Rapids and Zen
// 4).
bool amd() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

std::vector<const Isa*> table() {
  std::vector<const Isa*> rows;
#if defined(__x86_64__)
  rows.push_back(&kAmxIsa);
  if (amd()) {
    rows.insert(rows.end(), {&kAvx512Bf16Isa, &kAvx512Isa});
  } else {
    rows.insert(rows.end(), {&kAvx512Isa, &kAvx512Bf16Isa});
  }
  rows.push_back(&kAvx2Isa);
#endif
  rows.push_back(&kReferenceIsa);
  rows.push_back(&kAmxModelIsa);
  return rows;
}

// The reference, last, runs everywhere.
std::vector<const Packer*> packers() {
  std::vector<const Packer*> rows;
#if defined(__x86_64__)
  rows.push_back(&kAvx2Packer);
#endif
  rows.push_back(&kReferencePacker);
  return rows;
}

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Isa* isa : table()) names.emplace_back(isa->name);
  return names;
}

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const Isa* isa : table()) {
    if (isa->automatic && isa->usable()) names.emplace_back(isa->name);
  }
  return names;
}

const Isa& find_isa(const std::string& name) {
  for (const Isa* isa : table()) {
    const bool wanted = name == "auto" ? isa->automatic : name == isa->name;
    if (wanted && isa->usable()) return *isa;
  }
  std::string known;
  for (const std::string& usable : usable_isas()) known += (known.empty() ? "" : ", ") + usable;
  throw std::invalid_argument(
      "isa: '" + name + "' cannot run on this CPU or is not built in, expected auto or one of " + known);
}

const Packer& find_packer(const Isa& isa) {
  const std::vector<const Packer*> rows = packers();
  for (const Packer* packer : rows) {
    if (std::string_view(packer->name) == isa.name) return *packer;
  }
  return **std::find_if(rows.begin(), rows.end(), [](const Packer* packer) { return packer->usable(); });
}

}  // namespace kt
