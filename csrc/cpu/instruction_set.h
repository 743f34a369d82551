// One copy of a kernel for each instruction set, chosen by what the machine has.
#pragma once

#include <cstdint>

namespace pelt_fast {

enum class InstructionSet { portable, avx2, avx512 };

// The widest one this machine has; PELT_FAST_ISA=portable|avx2|avx512 asks for less.
InstructionSet instruction_set();
const char* instruction_set_name();

}  // namespace pelt_fast

// Defines `name##_for_this_machine(arguments, first, last)`, which runs
// `name<W>(arguments, first, last)` with W floats in a vector. `name` and all it calls are
// PELT_FAST_INLINE.
#if defined(__x86_64__) && defined(__GNUC__)
#define PELT_FAST_TARGET(isa) __attribute__((target(isa)))
#define PELT_FAST_FOR_EACH_INSTRUCTION_SET(name, Arguments)                               \
  PELT_FAST_TARGET("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512") \
  void name##_avx512(const Arguments& a, int64_t i, int64_t j) { name<16>(a, i, j); }     \
  PELT_FAST_TARGET("avx2,fma,f16c")                                                       \
  void name##_avx2(const Arguments& a, int64_t i, int64_t j) { name<8>(a, i, j); }        \
  void name##_portable(const Arguments& a, int64_t i, int64_t j) { name<4>(a, i, j); }    \
  void name##_for_this_machine(const Arguments& a, int64_t i, int64_t j) {                \
    switch (::pelt_fast::instruction_set()) {                                             \
      case ::pelt_fast::InstructionSet::avx512:                                           \
        return name##_avx512(a, i, j);                                                    \
      case ::pelt_fast::InstructionSet::avx2:                                             \
        return name##_avx2(a, i, j);                                                      \
      default:                                                                            \
        return name##_portable(a, i, j);                                                  \
    }                                                                                     \
  }
#else
#define PELT_FAST_FOR_EACH_INSTRUCTION_SET(name, Arguments) \
  void name##_for_this_machine(const Arguments& a, int64_t i, int64_t j) { name<4>(a, i, j); }
#endif
