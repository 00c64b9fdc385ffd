// The choice of an instruction set, made once, at the first call.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "tile_kernels.h"

namespace replearn {

extern const InstructionSet kernels_baseline;
#if defined(__x86_64__)
extern const InstructionSet kernels_avx2, kernels_avx512;
#endif

namespace {

// Those that this processor runs, the widest first.
std::vector<const InstructionSet*> supported() {
  std::vector<const InstructionSet*> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    sets.push_back(&kernels_avx512);
  if (avx2) sets.push_back(&kernels_avx2);
#endif
  sets.push_back(&kernels_baseline);
  return sets;
}

const InstructionSet& choose() {
  const auto sets = supported();
  const char* wanted = std::getenv("REPLEARN_KERNELS_INSTRUCTION_SET");
  if (!wanted || !*wanted) return *sets.front();
  std::string names;
  for (const auto* set : sets) {
    if (std::strcmp(set->name, wanted) == 0) return *set;
    names += std::string(names.empty() ? "" : ", ") + set->name;
  }
  throw std::runtime_error(
      "REPLEARN_KERNELS_INSTRUCTION_SET must be one of " + names + " on this processor, got " + wanted);
}

}  // namespace

const InstructionSet& instruction_set() {
  static const InstructionSet& chosen = choose();
  return chosen;
}

}  // namespace replearn
