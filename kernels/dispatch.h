// Which instruction sets this build holds and which of them this CPU can run.
#pragma once

#include <string>
#include <vector>

#include "gemm.h"
#include "packer.h"

namespace kt {

std::vector<std::string> compiled_isas();
// Usable ones, best first; those meant for tests only are left out.
std::vector<std::string> usable_isas();
// "auto" is the best usable one. Throws std::invalid_argument with the usable names for anything that cannot
// run.
const Isa& find_isa(const std::string& name);
// That of the instruction set's own name where there is one, else the best that this CPU can run.
const Packer& find_packer(const Isa& isa);

}  // namespace kt
