// The two kernels behind the operator, and the dtypes they are compiled for.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <stdexcept>

#include "augment.h"

namespace mim4dd {

void augment_cpu(const Call& call, torch::headeronly::ScalarType dtype);

// `sums` has room for kSums floats (doubles where the images are) per image. Launches on `stream` and returns.
constexpr int kSums = 16;
void augment_cuda(const Call& call, torch::headeronly::ScalarType dtype, void* sums, void* stream);

template <typename In, typename Out, typename Acc>
struct Types {};

// Calls `kernel` with the dtypes for images of `dtype`: read, written, and accumulated in.
template <typename Kernel>
void dispatch(torch::headeronly::ScalarType dtype, const Kernel& kernel) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float: return kernel(Types<float, float, float>{});
    case ScalarType::Double: return kernel(Types<double, double, double>{});
    case ScalarType::Half: return kernel(Types<c10::Half, c10::Half, float>{});
    case ScalarType::BFloat16: return kernel(Types<c10::BFloat16, c10::BFloat16, float>{});
    case ScalarType::Byte: return kernel(Types<uint8_t, float, float>{});
    default: throw std::invalid_argument("mim4dd.augment.apply: images is of an unsupported dtype");
  }
}

}  // namespace mim4dd
