// The block's operators on torch's stable ABI: schema, checks, and images in parallel on the CPU.
#include "first_block.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <tuple>
#include <vector>

#include "../channels_last.h"
#include "../isa.h"
#include "../require.h"
#include "../scratch.h"

namespace {

constexpr size_t kKeptScratch = 1 << 24;  // floats that a thread keeps from one call to the next, 64 MiB
constexpr int64_t kMostPadding = 1 << 20;  // every size still fits into 64 bits

using mim4dd::BlockCall;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr mim4dd::Require require{"mim4dd.networks: first block"};

// What all three operators have in common; keeps the tensors that the call points into.
class Block {
 public:
  BlockCall call{};

  Block(BlockCall::Pass pass, const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& bias,
        int64_t padding, bool relu, int64_t pool) {
    require(x.dim() == 4 && weight.dim() == 2 && weight.size(0) == 9 * x.size(1) && x.size(1) > 0 &&
                weight.size(0) <= mim4dd::kMostTaps,
            "x must have the channels that the weight is for, 1 to 4: [batch, in, height, width] and [9 in, out]");
    require(padding >= 0 && padding <= kMostPadding, "padding must be from 0 to ", kMostPadding);
    dtype_ = x.scalar_type();
    require(dtype_ == ScalarType::Float || dtype_ == ScalarType::BFloat16, "x must be float32 or bfloat16");
    call.half = dtype_ == ScalarType::BFloat16;
    call.pass = pass;
    call.batch = x.size(0), call.in = x.size(1), call.height = x.size(2), call.width = x.size(3);
    call.padding = padding;
    call.taps = weight.size(0), call.out = weight.size(1);
    call.group = call.out % 64 == 0 ? 64 : 32;
    call.down = call.height + 2 * padding - 2, call.across = call.width + 2 * padding - 2;
    require(call.out > 0 && call.out % 32 == 0, "output channels must be a multiple of 32");
    require(call.down > 0 && call.across >= 8, "the output must be at least 8 pixels across");
    require(pool == 1 || pool == 2, "pool must be 1 or 2");
    call.pool = static_cast<int>(pool);
    call.relu = relu;
    call.x = read_x(x);
    call.weight = read(weight, {call.taps, call.out});
    call.scale = read(scale, {call.out});
    call.bias = read(bias, {call.out});
  }

  // Contiguous float32 of these sizes.
  const float* read(const Tensor& t, const std::initializer_list<int64_t>& sizes) {
    return static_cast<const float*>(keep(t, sizes, ScalarType::Float, MemoryFormat::Contiguous));
  }
  // Images, or gradients of gradients of them, in float32: few numbers beside those of y.
  const float* read_x(const Tensor& t) {
    keep(t, {call.batch, call.in, call.height, call.width}, dtype_, MemoryFormat::Contiguous);
    kept_.push_back(torch::stable::to(kept_.back(), ScalarType::Float));
    return static_cast<const float*>(kept_.back().const_data_ptr());
  }
  const void* read_y(const Tensor& t) {
    return keep(t, {call.batch, call.out, call.down / call.pool, call.across / call.pool}, dtype_,
                MemoryFormat::ChannelsLast);
  }
  void read_statistics(const Tensor& mean, const Tensor& rstd) {
    call.mean = const_cast<float*>(read(mean, {call.batch, call.out}));
    call.rstd = const_cast<float*>(read(rstd, {call.batch, call.out}));
  }

  static Tensor empty(const std::initializer_list<int64_t>& sizes) {
    return torch::stable::empty(sizes, ScalarType::Float);
  }
  Tensor like_y() const {
    return mim4dd::empty_channels_last({call.batch, call.out, call.down / call.pool, call.across / call.pool},
                                       dtype_);
  }
  Tensor like_x() const { return empty({call.batch, call.in, call.height, call.width}); }
  Tensor in_dtype_of_x(const Tensor& t) const { return torch::stable::to(t, dtype_); }
  Tensor per_image(int64_t rows) const { return empty({call.batch, rows, call.out}); }

  void run() {
    std::vector<float> turned, grad_grad_turned;
    if (call.grad_x) call.turned = (turned = turn(call.weight)).data();
    if (call.grad_grad_weight) call.grad_grad_turned = (grad_grad_turned = turn(call.grad_grad_weight)).data();
    const auto image = MIM4DD_BEST(block_image);
    torch::stable::parallel_for(0, call.batch, 1, [&](int64_t begin, int64_t end) {
      thread_local std::vector<float> memory;
      float* scratch = mim4dd::kept(memory, mim4dd::block_scratch(call));
      for (int64_t i = begin; i < end; ++i) image(call, i, scratch);
      if (memory.size() > kKeptScratch) std::vector<float>().swap(memory);  // `= {}` would free nothing
    });
  }

 private:
  ScalarType dtype_;  // of x and y
  std::vector<Tensor> kept_;

  const void* keep(const Tensor& t, const std::initializer_list<int64_t>& sizes, ScalarType dtype,
                   MemoryFormat layout) {
    bool fits = t.dim() == static_cast<int64_t>(sizes.size()) && t.scalar_type() == dtype;
    for (int64_t d = 0; fits && d < t.dim(); ++d) fits = t.size(d) == sizes.begin()[d];
    require(fits, "gradients must have the dtype of x, all else float32, and the shape that belongs to x and weight");
    kept_.push_back(torch::stable::contiguous(t, layout));
    return kept_.back().const_data_ptr();
  }

  // [taps, out] to [out, kTurnedRow].
  std::vector<float> turn(const float* weight) const {
    std::vector<float> turned(call.out * mim4dd::kTurnedRow);
    for (int64_t tap = 0; tap < call.taps; ++tap)
      for (int64_t channel = 0; channel < call.out; ++channel)
        turned[channel * mim4dd::kTurnedRow + tap] = weight[tap * call.out + channel];
    return turned;
  }
};

float* data(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Three forward(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& bias, double eps,
              int64_t padding, bool relu, int64_t pool) {
  Block block(BlockCall::kForward, x, weight, scale, bias, padding, relu, pool);
  const Tensor y = block.like_y(), mean = block.empty({block.call.batch, block.call.out});
  const Tensor rstd = block.empty({block.call.batch, block.call.out});
  block.call.eps = eps;
  block.call.y = y.mutable_data_ptr(), block.call.mean = data(mean), block.call.rstd = data(rstd);
  block.run();
  return {y, mean, rstd};
}

Four backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& bias,
              const Tensor& mean, const Tensor& rstd, int64_t padding, bool relu, int64_t pool, bool want_x,
              bool want_weight) {
  Block block(BlockCall::kBackward, x, weight, scale, bias, padding, relu, pool);
  block.read_statistics(mean, rstd);
  block.call.grad_y = block.read_y(grad_y);
  const Tensor grad_x = want_x ? block.like_x() : block.empty({0});
  const Tensor grad_weight = want_weight ? block.per_image(block.call.taps) : block.empty({0});
  const Tensor grad_scale = block.empty({block.call.batch, block.call.out});
  const Tensor grad_bias = block.empty({block.call.batch, block.call.out});
  block.call.grad_x = want_x ? data(grad_x) : nullptr;
  block.call.grad_weight = want_weight ? data(grad_weight) : nullptr;
  block.call.grad_scale = data(grad_scale), block.call.grad_bias = data(grad_bias);
  block.run();
  return {block.in_dtype_of_x(grad_x), grad_weight, grad_scale, grad_bias};
}

Four backward_twice(const Tensor& grad_grad_x, const Tensor& grad_grad_weight, const Tensor& grad_grad_scale,
                    const Tensor& grad_grad_bias, const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                    const Tensor& scale, const Tensor& bias, const Tensor& mean, const Tensor& rstd, int64_t padding,
                    bool relu, int64_t pool) {
  Block block(BlockCall::kBackwardTwice, x, weight, scale, bias, padding, relu, pool);
  BlockCall& call = block.call;
  block.read_statistics(mean, rstd);
  call.grad_y = block.read_y(grad_y);
  if (grad_grad_x.numel() > 0) call.grad_grad_x = block.read_x(grad_grad_x);
  call.grad_grad_weight = block.read(grad_grad_weight, {call.taps, call.out});
  call.grad_grad_scale = block.read(grad_grad_scale, {call.out});
  call.grad_grad_bias = block.read(grad_grad_bias, {call.out});
  const Tensor grad_grad_y = block.like_y(), grad_x = block.like_x(), grad_weight = block.per_image(call.taps);
  const Tensor grad_scale = block.empty({call.batch, call.out});
  call.grad_grad_y = grad_grad_y.mutable_data_ptr(), call.grad_x = data(grad_x), call.grad_weight = data(grad_weight);
  call.grad_scale = data(grad_scale);
  block.run();
  return {grad_grad_y, block.in_dtype_of_x(grad_x), grad_weight, grad_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mim4dd, m) {
  m.def(
      "first_block(Tensor x, Tensor weight, Tensor scale, Tensor bias, float eps, int padding, bool relu, int pool) "
      "-> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "first_block_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor scale, Tensor bias, Tensor mean, "
      "Tensor rstd, int padding, bool relu, int pool, bool want_x, bool want_weight) "
      "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_scale, Tensor grad_bias)");
  m.def(
      "first_block_backward_twice(Tensor grad_grad_x, Tensor grad_grad_weight, Tensor grad_grad_scale, "
      "Tensor grad_grad_bias, Tensor grad_y, Tensor x, Tensor weight, Tensor scale, Tensor bias, Tensor mean, "
      "Tensor rstd, int padding, bool relu, int pool) "
      "-> (Tensor grad_grad_y, Tensor grad_x, Tensor grad_weight, Tensor grad_scale)");
}

STABLE_TORCH_LIBRARY_IMPL(mim4dd, CPU, m) {
  m.impl("first_block", TORCH_BOX(&forward));
  m.impl("first_block_backward", TORCH_BOX(&backward));
  m.impl("first_block_backward_twice", TORCH_BOX(&backward_twice));
}
