// A tensor in words: what every file's checks share.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>

#include "check.h"

namespace pelt_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& t) {
  std::string text = "(";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + ")";
}

}  // namespace pelt_fast
