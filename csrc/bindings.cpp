// The module pelt_fast._C: importing it registers the CPU ops; its functions are facts of the build.

#define PELT_FAST_STRING_(x) #x
#define PELT_FAST_STRING(x) PELT_FAST_STRING_(x)

namespace {
constexpr char torch_target[] = PELT_FAST_STRING(TORCH_TARGET_VERSION);
}

#undef TORCH_TARGET_VERSION  // the pybind11 inside torch 2.10 and 2.11 stops where it is defined
#include <pybind11/pybind11.h>

#include "cpu/instruction_set.h"

namespace {

const char* compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU ops of pelt_fast, and how they were built.";
  m.def("compiler", &compiler, "Name and version of the compiler.");
  m.def("instruction_set", &pelt_fast::instruction_set_name,
        "The instruction set the ops use here.");
  m.def(
      "torch_target", [] { return torch_target; }, "The oldest LibTorch the ops run with.");
}
