// The operator that draws an augmentation, on torch's stable ABI: schema, checks, and the loop of the CPU.
// Compiled once for each library, like that of the augmentation.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "../require.h"
#include "draw.h"

namespace {

using mim4dd::kDrawn;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr mim4dd::Require require{"mim4dd.augment.sample"};

const float* floats(const Tensor& given, int64_t rows, int64_t columns, const char* message) {
  require(given.dim() == 2 && given.size(0) == rows && given.size(1) == columns && given.is_contiguous() &&
              given.scalar_type() == ScalarType::Float,
          message);
  return static_cast<const float*>(given.const_data_ptr());
}

Tensor draw(const Tensor& uniform, const Tensor& table, int64_t parts, int64_t together) {
  constexpr int64_t kWidth = sizeof(mim4dd::Drawing) / sizeof(float);
  mim4dd::DrawCall call{};
  call.rows = uniform.dim() == 2 ? uniform.size(1) : -1;
  call.uniform = floats(uniform, kDrawn + 1, call.rows, "uniform must be contiguous float32 [12, rows]");
  require(table.is_cpu(), "table must be on the CPU");
  std::copy_n(floats(table, kDrawn, kWidth, "table must be contiguous float32 [11, 6]"), kDrawn * kWidth,
              &call.drawings[0].low);
  require(parts >= 1 && parts <= kDrawn && together >= 0, "parts must be from 1 to 11, together 0 or more");
  call.parts = static_cast<int>(parts);
  call.together = together;
  Tensor params = torch::stable::new_empty(uniform, {call.rows, mim4dd::kFields});
  call.params = static_cast<float*>(params.mutable_data_ptr());
#ifdef MIM4DD_CUDA
  if (call.rows > 0) {
    const torch::stable::accelerator::DeviceGuard guard(uniform.get_device_index());
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(uniform.get_device_index(), &stream));
    mim4dd::draw_cuda(call, stream);
  }
#else
  for (int64_t row = 0; row < call.rows; ++row) mim4dd::draw_row(call, row);
#endif
  return params;
}

}  // namespace

#ifdef MIM4DD_CUDA

STABLE_TORCH_LIBRARY_IMPL(mim4dd, CUDA, m) { m.impl("draw", TORCH_BOX(&draw)); }

#else

STABLE_TORCH_LIBRARY_FRAGMENT(mim4dd, m) {
  m.def("draw(Tensor uniform, Tensor table, int parts, int together) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mim4dd, CPU, m) { m.impl("draw", TORCH_BOX(&draw)); }

#endif
