// The operators: schemas, checks and dispatch on torch's stable ABI, and the Python module that loads them.
#include <pybind11/pybind11.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

#include "augment.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const float* row_values(const Tensor& field, const char* name, int64_t batch) {
  STD_TORCH_CHECK(field.dim() == 1 && field.size(0) == batch, "mim4dd::colour: ", name, " must have one value per image (",
                  batch, ")");
  STD_TORCH_CHECK(field.scalar_type() == ScalarType::Float, "mim4dd::colour: ", name, " must be float32");
  return static_cast<const float*>(field.const_data_ptr());
}

template <typename T, typename Acc>
void colour_batch(const Tensor& images, Tensor& out, const float* brightness, const float* saturation,
                  const float* contrast) {
  const int64_t channels = images.size(1), pixels = images.size(2) * images.size(3), image = channels * pixels;
  const T* in = static_cast<const T*>(images.const_data_ptr());
  T* to = static_cast<T*>(out.mutable_data_ptr());
  // A thread is worth waking for some 32k values.
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, image));
  torch::stable::parallel_for(0, images.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      mim4dd::colour<T, Acc>(in + b * image, to + b * image, channels, pixels, brightness[b], saturation[b], contrast[b]);
  });
}

Tensor colour(const Tensor& images, const Tensor& brightness, const Tensor& saturation, const Tensor& contrast) {
  STD_TORCH_CHECK(images.dim() == 4, "mim4dd::colour: images must be [batch, channels, height, width], got ",
                  images.dim(), " dimensions");
  const int64_t batch = images.size(0);
  const Tensor in = torch::stable::contiguous(images);
  const Tensor b = torch::stable::contiguous(brightness), s = torch::stable::contiguous(saturation),
               c = torch::stable::contiguous(contrast);
  Tensor out = torch::stable::empty_like(in);
  const float *pb = row_values(b, "brightness", batch), *ps = row_values(s, "saturation", batch),
              *pc = row_values(c, "contrast", batch);
  switch (images.scalar_type()) {
    case ScalarType::Float:
      colour_batch<float, float>(in, out, pb, ps, pc);
      break;
    case ScalarType::Double:
      colour_batch<double, double>(in, out, pb, ps, pc);
      break;
    case ScalarType::Half:
      colour_batch<torch::headeronly::Half, float>(in, out, pb, ps, pc);
      break;
    case ScalarType::BFloat16:
      colour_batch<torch::headeronly::BFloat16, float>(in, out, pb, ps, pc);
      break;
    default:
      STD_TORCH_CHECK(false, "mim4dd::colour: images must be of a floating dtype");
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(mim4dd, m) {
  m.def("colour(Tensor images, Tensor brightness, Tensor saturation, Tensor contrast) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mim4dd, CPU, m) { m.impl("colour", TORCH_BOX(&colour)); }

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operators of mim4dd; importing it registers them as torch.ops.mim4dd.*";
  m.attr("compiler") = __VERSION__;
}
