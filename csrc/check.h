// What every op shares: argument checks, and code for the machine's own vectors.
#pragma once

#include <torch/headeronly/util/Exception.h>

// A message that names the argument, what came and what was wanted.
#define PELT_FAST_CHECK(condition, ...) STD_TORCH_CHECK(condition, "pelt_fast: ", __VA_ARGS__)

// One copy of a function for each level, chosen when the module is loaded.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#define PELT_FAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PELT_FAST_CLONES
#endif
#define PELT_FAST_INLINE inline __attribute__((always_inline))
