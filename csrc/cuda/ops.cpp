// The kernels as ops of torch, on the stable ABI: pelt_fast/_C_cuda, loaded beside a torch with
// CUDA.

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "../tensors.h"
#include "rank_backward.h"
#include "tail_gemm.h"

namespace pelt_fast {
namespace {

// A CUDA matrix (or vector, for a negative `columns`) on the device of `like`, contiguous but for
// the distance between the rows of a `strided` one.
void check(const char* name, const Tensor& t, int64_t rows, int64_t columns, ScalarType dtype,
           const Tensor& like, bool strided = false) {
  const bool vector = columns < 0;
  const bool fits = vector ? t.dim() == 1 && t.size(0) == rows
                           : t.dim() == 2 && t.size(0) == rows && t.size(1) == columns;
  const std::string wanted =
      "(" + std::to_string(rows) + (vector ? ")" : ", " + std::to_string(columns) + ")");
  PELT_FAST_CHECK(fits, name, " must have shape ", wanted, ", got ", shape_of(t));
  PELT_FAST_CHECK(t.is_cuda() && t.get_device_index() == like.get_device_index(), name,
                  " must be on the device of the first tensor");
  PELT_FAST_CHECK(t.scalar_type() == dtype, name, " must have dtype number ",
                  static_cast<int>(dtype), ", got ", static_cast<int>(t.scalar_type()));
  const bool lies = strided ? t.dim() == 2 && t.stride(1) == 1 : t.is_contiguous();
  PELT_FAST_CHECK(lies, name, strided ? " must have contiguous rows" : " must be contiguous");
}

// bfloat16 or float16, and of two dimensions.
ScalarType check_low(const char* name, const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  PELT_FAST_CHECK(t.dim() == 2, name, " must have two dimensions, got shape ", shape_of(t));
  PELT_FAST_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, name,
                  " must be bfloat16 or float16, got dtype number ", static_cast<int>(dtype));
  return dtype;
}

cudaStream_t stream_of(const Tensor& t) {
  void* stream = nullptr;
  PELT_FAST_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream) == 0,
                  "torch gives no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

void check_launch(const char* name, cudaError_t error) {
  PELT_FAST_CHECK(error == cudaSuccess, name, ": ", cudaGetErrorString(error),
                  "; sizes and strides must be multiples of 8, data aligned to 16 bytes");
}

// Strides of matrices of one row are free: what the kernels are told is what they may step by.
int64_t stride_of(const Tensor& t) { return t.size(0) == 1 ? t.size(1) : t.stride(0); }

Tensor tail_gemm_(Tensor out, Tensor a, Tensor w, Tensor s, Tensor u, std::optional<Tensor> bias,
                  std::optional<Tensor> bits, double keep_scale, bool transposed,
                  int64_t processors) {
  const ScalarType dtype = check_low("a", a);
  check_low("s", s), check_low("out", out);
  const int64_t rows = a.size(0), depth = a.size(1), rank = s.size(1), width = out.size(1);
  check("a", a, rows, depth, dtype, a, true);
  check("out", out, rows, width, dtype, a, true);
  check("s", s, rows, rank, dtype, a);
  check("w", w, transposed ? depth : width, transposed ? width : depth, dtype, a);
  check("u", u, transposed ? rank : width, transposed ? width : rank, dtype, a);
  if (bias.has_value()) check("bias", *bias, width, -1, dtype, a);
  if (bits.has_value()) check("bits", *bits, rows, width / 8, ScalarType::Byte, a);
  TailGemm g{};
  g.a = a.const_data_ptr(), g.w = w.const_data_ptr();
  g.s = s.const_data_ptr(), g.u = u.const_data_ptr();
  g.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
  g.bits = bits.has_value() ? static_cast<const uint8_t*>(bits->const_data_ptr()) : nullptr;
  g.out = out.mutable_data_ptr();
  g.rows = rows, g.width = width, g.depth = depth, g.rank = rank;
  g.a_stride = stride_of(a), g.out_stride = stride_of(out);
  g.keep_scale = static_cast<float>(keep_scale);
  g.transposed = transposed, g.is_bf16 = dtype == ScalarType::BFloat16;
  check_launch("tail_gemm_", tail_gemm(g, static_cast<int>(processors), stream_of(a)));
  return out;
}

void rank_backward_(Tensor dy, Tensor h, Tensor b, double scale, Tensor dh, Tensor db,
                    std::optional<Tensor> d_bias, int64_t processors) {
  const ScalarType dtype = check_low("dy", dy);
  check_low("h", h);
  const int64_t rows = dy.size(0), width = dy.size(1), rank = h.size(1);
  check("dy", dy, rows, width, dtype, dy, true);
  check("h", h, rows, rank, dtype, dy);
  check("b", b, width, rank, dtype, dy);
  check("dh", dh, rows, rank, dtype, dy);
  check("db", db, width, rank, ScalarType::Float, dy);
  if (d_bias.has_value()) check("d_bias", *d_bias, width, -1, ScalarType::Float, dy);
  const RankBackward g{
      dy.const_data_ptr(),
      h.const_data_ptr(),
      b.const_data_ptr(),
      dh.mutable_data_ptr(),
      static_cast<float*>(db.mutable_data_ptr()),
      d_bias.has_value() ? static_cast<float*>(d_bias->mutable_data_ptr()) : nullptr,
      rows,
      width,
      rank,
      stride_of(dy),
      static_cast<float>(scale),
      dtype == ScalarType::BFloat16};
  const auto count = static_cast<int>(processors);
  const int64_t bytes = rank_backward_workspace(g, count);
  Tensor workspace = torch::stable::new_empty(dy, {bytes}, ScalarType::Byte);
  check_launch("rank_backward_",
               rank_backward(g, workspace.mutable_data_ptr(), count, stream_of(dy)));
}

}  // namespace
}  // namespace pelt_fast

STABLE_TORCH_LIBRARY_FRAGMENT(pelt_fast_cuda, m) {
  m.def(
      "tail_gemm_(Tensor(a!) out, Tensor a, Tensor w, Tensor s, Tensor u, Tensor? bias,"
      " Tensor? bits, float keep_scale, bool transposed, int processors) -> Tensor(a!)");
  m.def(
      "rank_backward_(Tensor dy, Tensor h, Tensor b, float scale, Tensor(a!) dh, Tensor(b!) db,"
      " Tensor(c!)? d_bias, int processors) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pelt_fast_cuda, CUDA, m) {
  m.impl("tail_gemm_", TORCH_BOX(&pelt_fast::tail_gemm_));
  m.impl("rank_backward_", TORCH_BOX(&pelt_fast::rank_backward_));
}
