#include "instruction_set.h"

#include <cstdlib>
#include <cstring>

#include "../check.h"

namespace pelt_fast {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512"};

InstructionSet best() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool fma = __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx2");
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (fma && wide) return InstructionSet::avx512;
  if (fma) return InstructionSet::avx2;
#endif
  return InstructionSet::portable;
}

InstructionSet chosen() {
  const char* wanted = std::getenv("PELT_FAST_ISA");
  if (wanted == nullptr || *wanted == '\0') return best();
  for (int i = 0; i <= static_cast<int>(best()); ++i) {
    if (std::strcmp(wanted, kNames[i]) == 0) return static_cast<InstructionSet>(i);
  }
  PELT_FAST_CHECK(false,
                  "PELT_FAST_ISA must be portable, avx2 or avx512, no more than this machine's ",
                  kNames[static_cast<int>(best())], ", got ", wanted);
}

}  // namespace

InstructionSet instruction_set() {
  static const InstructionSet kept = chosen();
  return kept;
}

const char* instruction_set_name() { return kNames[static_cast<int>(instruction_set())]; }

}  // namespace pelt_fast
