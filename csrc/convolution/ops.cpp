// The convolution's operators on torch's stable ABI: schema, checks, and tiles in parallel on the CPU.
#include "convolution.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "../channels_last.h"
#include "../isa.h"
#include "../require.h"
#include "../scratch.h"

namespace {

using mim4dd::channels_last;
using mim4dd::ConvCall;
using mim4dd::empty_channels_last;
using mim4dd::kBlock;
using mim4dd::kept;
using mim4dd::kPoints;
using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

constexpr mim4dd::Require require{"mim4dd.networks: convolution"};

ConvCall call_for(const Tensor& x, int64_t in, int64_t out) {
  ConvCall call{};
  call.batch = x.size(0), call.height = x.size(2), call.width = x.size(3);
  call.in = in, call.out = out;
  require(in > 0 && out > 0 && in % 32 == 0 && out % 32 == 0, "channels must be multiples of 32");
  call.tiles_down = (call.height + 3) / 4, call.tiles_across = (call.width + 3) / 4;
  call.tiles = call.batch * call.tiles_down * call.tiles_across;
  return call;
}

// y of x [batch, in, height, width]. With `turned`, grad_x of grad_y [batch, out, height, width], which is given as x.
Tensor convolve(const Tensor& x, const Tensor& weight, bool turned, int64_t groups) {
  require(groups == 1, "groups must be 1 on a CPU");
  require(x.dim() == 4 && x.scalar_type() == ScalarType::Float && weight.dim() == 4 &&
              weight.scalar_type() == ScalarType::Float && weight.size(2) == 3 && weight.size(3) == 3 &&
              x.size(1) == weight.size(turned ? 0 : 1),
          "x must be float32 [batch, in, height, width], weight [out, in, 3, 3]");
  const Tensor images = channels_last(x);
  ConvCall call = call_for(x, x.size(1), weight.size(turned ? 1 : 0));
  const float* first = static_cast<const float*>(weight.const_data_ptr());
  call.x = static_cast<const float*>(images.const_data_ptr());
  call.weight_out = weight.stride(turned ? 1 : 0), call.weight_in = weight.stride(turned ? 0 : 1);
  call.weight_down = turned ? -weight.stride(2) : weight.stride(2);
  call.weight_across = turned ? -weight.stride(3) : weight.stride(3);
  call.weight = turned ? first + 2 * (weight.stride(2) + weight.stride(3)) : first;
  Tensor y = empty_channels_last({call.batch, call.out, call.height, call.width}, ScalarType::Float);
  call.y = static_cast<float*>(y.mutable_data_ptr());
  thread_local std::vector<float> plane;
  call.plane = kept(plane, kPoints * call.in * call.out);
  parallel_for(0, call.in, 8, [&](int64_t begin, int64_t end) { MIM4DD_BEST(transform_weight)(call, begin, end); });
  parallel_for(0, call.tiles, 8, [&](int64_t begin, int64_t end) {
    thread_local std::vector<float> scratch;
    MIM4DD_BEST(convolve)(call, begin, end, kept(scratch, mim4dd::forward_scratch(call.in)));
  });
  return y;
}

// Tiles are added up in their order, whatever the number of threads.
Tensor grad_weight(const Tensor& grad_y, const Tensor& x, int64_t groups) {
  require(groups == 1, "groups must be 1 on a CPU");
  require(x.dim() == 4 && x.scalar_type() == ScalarType::Float && grad_y.dim() == 4 &&
              grad_y.scalar_type() == ScalarType::Float && x.size(0) == grad_y.size(0) &&
              x.size(2) == grad_y.size(2) && x.size(3) == grad_y.size(3),
          "x must be float32 [batch, in, height, width], the gradient [batch, out, height, width]");
  const Tensor images = channels_last(x), gradients = channels_last(grad_y);
  ConvCall call = call_for(x, x.size(1), grad_y.size(1));
  call.x = static_cast<const float*>(images.const_data_ptr());
  call.grad_y = static_cast<const float*>(gradients.const_data_ptr());
  Tensor result = empty_channels_last({call.out, call.in, 3, 3}, ScalarType::Float);
  call.grad_weight = static_cast<float*>(result.mutable_data_ptr());
  if (call.tiles == 0) {
    std::fill_n(call.grad_weight, call.out * call.in * 9, 0.0f);
    return result;
  }
  thread_local std::vector<float> plane, inputs, outputs;
  call.plane = kept(plane, kPoints * call.in * call.out);
  call.inputs = kept(inputs, kPoints * mim4dd::tile_stride(kBlock, call.in));
  call.outputs = kept(outputs, kPoints * mim4dd::tile_stride(kBlock, call.out));
  for (int64_t first = 0; first < call.tiles; first += kBlock) {
    parallel_for(0, std::min(kBlock, call.tiles - first), 4,
                 [&](int64_t begin, int64_t end) { MIM4DD_BEST(transform_block)(call, first, begin, end); });
    parallel_for(0, kPoints, 1,
                 [&](int64_t begin, int64_t end) { MIM4DD_BEST(multiply_block)(call, first, begin, end); });
  }
  parallel_for(0, call.out, 8, [&](int64_t begin, int64_t end) { MIM4DD_BEST(finish_weight)(call, begin, end); });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mim4dd, m) {
  m.def("convolve(Tensor x, Tensor weight, bool turned, int groups=1) -> Tensor");
  m.def("convolve_grad_weight(Tensor grad_y, Tensor x, int groups=1) -> Tensor");
  // Their kernels, which depend on device and dtype, are registered from Python: on a CPU in float32 these.
  m.def("winograd(Tensor x, Tensor weight, bool turned, int groups=1) -> Tensor");
  m.def("winograd_grad_weight(Tensor grad_y, Tensor x, int groups=1) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mim4dd, CPU, m) {
  m.impl("winograd", TORCH_BOX(&convolve));
  m.impl("winograd_grad_weight", TORCH_BOX(&grad_weight));
}
