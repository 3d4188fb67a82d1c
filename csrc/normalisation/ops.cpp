// The normalisation's operators on torch's stable ABI: schema, checks, and images in parallel on the CPU.
#include "normalisation.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "../channels_last.h"
#include "../isa.h"
#include "../require.h"

namespace {

using mim4dd::channels_last;
using mim4dd::NormCall;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr mim4dd::Require require{"mim4dd.networks: instance_norm"};

NormCall::Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return NormCall::kFloat;
    case ScalarType::Double: return NormCall::kDouble;
    case ScalarType::BFloat16: return NormCall::kBFloat16;
    default: require(false, "x must be float32, float64 or bfloat16");
  }
  return NormCall::kFloat;
}

// What all three operators have in common; keeps the tensors that the call points into.
class Norm {
 public:
  Norm(NormCall::Pass pass, const Tensor& x, const Tensor& weight, const Tensor& bias, bool relu, int64_t pool)
      : x_(channels_last(checked(x))) {
    require(pool == 1 || pool == 2, "pool must be 1 or 2");
    call_.pass = pass;
    call_.type = type_of(x);
    call_.batch = x.size(0), call_.channels = x.size(1), call_.height = x.size(2), call_.width = x.size(3);
    call_.pool = static_cast<int>(pool);
    call_.relu = relu;
    call_.x = x_.const_data_ptr();
    call_.weight = per_channel(weight);
    call_.bias = per_channel(bias);
  }

  NormCall& call() { return call_; }

  Tensor like_x() const { return empty({call_.batch, call_.channels, call_.height, call_.width}); }
  Tensor like_out() const {
    return empty({call_.batch, call_.channels, call_.height / call_.pool, call_.width / call_.pool});
  }
  Tensor per_image() const { return torch::stable::new_empty(x_, {call_.batch, call_.channels}, sums()); }

  static const Tensor& checked(const Tensor& x) {
    require(x.dim() == 4 && x.size(2) > 0 && x.size(3) > 0,
            "x must be [batch, channels, height, width], at least one pixel high and wide");
    return x;
  }

  // A gradient of x, or of the output, which is smaller by `pool`.
  const void* read(const Tensor& t, int64_t pool) {
    require(t.dim() == 4 && t.scalar_type() == x_.scalar_type() && t.size(0) == call_.batch &&
                t.size(1) == call_.channels && t.size(2) == call_.height / pool && t.size(3) == call_.width / pool,
            "a gradient must have the dtype of x and its own shape");
    return keep(channels_last(t));
  }

  const void* per_image(const Tensor& t) {
    require(t.dim() == 2 && t.size(0) == call_.batch && t.size(1) == call_.channels && t.scalar_type() == sums(),
            "statistics must be [batch, channels], float64 where x is, else float32");
    return keep(torch::stable::contiguous(t));
  }

  void run() const {
    const auto image = MIM4DD_BEST(norm_image);
    const int64_t values = std::max<int64_t>(1, call_.channels * call_.height * call_.width);
    torch::stable::parallel_for(0, call_.batch, std::max<int64_t>(1, 32768 / values),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t i = begin; i < end; ++i) image(call_, i);
                                });
  }

 private:
  NormCall call_{};
  Tensor x_;
  std::vector<Tensor> kept_;

  ScalarType sums() const { return x_.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

  Tensor empty(const std::initializer_list<int64_t>& sizes) const {
    return mim4dd::empty_channels_last(sizes, x_.scalar_type());
  }

  const void* per_channel(const Tensor& t) {
    require(t.dim() == 1 && t.size(0) == call_.channels && t.scalar_type() == sums(),
            "weight and bias must be [channels], float64 where x is, else float32");
    return keep(torch::stable::contiguous(t));
  }

  const void* keep(Tensor t) {
    kept_.push_back(std::move(t));
    return kept_.back().const_data_ptr();
  }
};

using Three = std::tuple<Tensor, Tensor, Tensor>;

Three forward(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps, bool relu, int64_t pool) {
  Norm norm(NormCall::kForward, x, weight, bias, relu, pool);
  Tensor out = norm.like_out(), mean = norm.per_image(), rstd = norm.per_image();
  norm.call().eps = eps;
  norm.call().out = out.mutable_data_ptr();
  norm.call().mean = mean.mutable_data_ptr();
  norm.call().rstd = rstd.mutable_data_ptr();
  norm.run();
  return {out, mean, rstd};
}

Three backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
               const Tensor& rstd, bool relu, int64_t pool) {
  Norm norm(NormCall::kBackward, x, weight, bias, relu, pool);
  Tensor grad_x = norm.like_x(), grad_weight = norm.per_image(), grad_bias = norm.per_image();
  norm.call().mean = const_cast<void*>(norm.per_image(mean));
  norm.call().rstd = const_cast<void*>(norm.per_image(rstd));
  norm.call().grad_out = norm.read(grad_out, pool);
  norm.call().grad_x = grad_x.mutable_data_ptr();
  norm.call().grad_weight = grad_weight.mutable_data_ptr();
  norm.call().grad_bias = grad_bias.mutable_data_ptr();
  norm.run();
  return {grad_x, grad_weight, grad_bias};
}

Three backward_twice(const Tensor& grad_grad_x, const Tensor& grad_grad_weight, const Tensor& grad_grad_bias,
                     const Tensor& grad_out, const Tensor& x, const Tensor& weight, const Tensor& bias,
                     const Tensor& mean, const Tensor& rstd, bool relu, int64_t pool) {
  Norm norm(NormCall::kBackwardTwice, x, weight, bias, relu, pool);
  Tensor grad_grad_out = norm.like_out(), grad_x = norm.like_x(), grad_weight = norm.per_image();
  norm.call().mean = const_cast<void*>(norm.per_image(mean));
  norm.call().rstd = const_cast<void*>(norm.per_image(rstd));
  norm.call().grad_out = norm.read(grad_out, pool);
  norm.call().grad_grad_x = norm.read(grad_grad_x, 1);
  norm.call().grad_grad_weight = norm.per_image(grad_grad_weight);
  norm.call().grad_grad_bias = norm.per_image(grad_grad_bias);
  norm.call().grad_grad_out = grad_grad_out.mutable_data_ptr();
  norm.call().grad_x = grad_x.mutable_data_ptr();
  norm.call().grad_weight = grad_weight.mutable_data_ptr();
  norm.run();
  return {grad_grad_out, grad_x, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mim4dd, m) {
  m.def(
      "instance_norm(Tensor x, Tensor weight, Tensor bias, float eps, bool relu, int pool) "
      "-> (Tensor out, Tensor mean, Tensor rstd)");
  m.def(
      "instance_norm_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, "
      "bool relu, int pool) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "instance_norm_backward_twice(Tensor grad_grad_x, Tensor grad_grad_weight, Tensor grad_grad_bias, "
      "Tensor grad_out, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, bool relu, int pool) "
      "-> (Tensor grad_grad_out, Tensor grad_x, Tensor grad_weight)");
}

STABLE_TORCH_LIBRARY_IMPL(mim4dd, CPU, m) {
  m.impl("instance_norm", TORCH_BOX(&forward));
  m.impl("instance_norm_backward", TORCH_BOX(&backward));
  m.impl("instance_norm_backward_twice", TORCH_BOX(&backward_twice));
}
