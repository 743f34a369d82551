// What every file shares: a check that speaks, and code that is inlined into each copy of a kernel.
#pragma once

#include <torch/headeronly/util/Exception.h>

// A message that names the argument, what came and what was wanted.
#define PELT_FAST_CHECK(condition, ...) STD_TORCH_CHECK(condition, "pelt_fast: ", __VA_ARGS__)

#define PELT_FAST_INLINE inline __attribute__((always_inline))
