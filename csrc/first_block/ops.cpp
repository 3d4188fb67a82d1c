// The block's operators on torch's stable ABI: schema, checks, and images in parallel on the CPU.
#include "first_block.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../isa.h"

namespace {

constexpr size_t kKeptScratch = 1 << 24;  // floats that a thread keeps from one call to the next, 64 MiB

using mim4dd::BlockCall;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void require(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(std::string("mim4dd.networks: first block: ") + message);
}

// [taps, out] to [out, kTurnedRow].
std::vector<float> turn(const float* weight, int64_t taps, int64_t out) {
  std::vector<float> turned(out * mim4dd::kTurnedRow);
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t channel = 0; channel < out; ++channel)
      turned[channel * mim4dd::kTurnedRow + tap] = weight[tap * out + channel];
  return turned;
}

// What all three operators have in common; keeps the tensors that the call points into.
class Block {
 public:
  BlockCall call{};

  Block(BlockCall::Pass pass, const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& bias,
        int64_t padding, bool relu, int64_t pool) {
    require(x.dim() == 4 && weight.dim() == 2 && weight.size(0) == 9 * x.size(1) && x.size(1) > 0 &&
                weight.size(0) <= mim4dd::kMostTaps,
            "x must be [batch, in, height, width] with 1 to 4 channels, weight [9 in, out]");
    call.pass = pass;
    call.batch = x.size(0), call.in = x.size(1), call.height = x.size(2), call.width = x.size(3);
    call.padding = padding;
    call.taps = weight.size(0), call.out = weight.size(1);
    call.group = call.out % 64 == 0 ? 64 : 32;
    call.down = call.height + 2 * padding - 2, call.across = call.width + 2 * padding - 2;
    require(call.out > 0 && call.out % 32 == 0, "output channels must be a multiple of 32");
    require(padding >= 0 && call.down > 0 && call.across >= 8, "the output must be at least 8 pixels across");
    require(pool == 1 || pool == 2, "pool must be 1 or 2");
    call.pool = static_cast<int>(pool);
    call.relu = relu;
    call.x = read(x, {call.batch, call.in, call.height, call.width});
    call.weight = read(weight, {call.taps, call.out});
    call.scale = read(scale, {call.out});
    call.bias = read(bias, {call.out});
  }

  // Contiguous float32 of these sizes, with the channels last where that is asked for.
  const float* read(const Tensor& t, const std::initializer_list<int64_t>& sizes, bool channels_last = false) {
    bool fits = t.dim() == static_cast<int64_t>(sizes.size()) && t.scalar_type() == ScalarType::Float;
    for (int64_t d = 0; fits && d < t.dim(); ++d) fits = t.size(d) == sizes.begin()[d];
    require(fits, "everything must be float32 and of the shape that belongs to x and weight");
    kept_.push_back(torch::stable::contiguous(t, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous));
    return static_cast<const float*>(kept_.back().const_data_ptr());
  }
  const float* read_y(const Tensor& t) {
    return read(t, {call.batch, call.out, call.down / call.pool, call.across / call.pool}, true);
  }
  void read_statistics(const Tensor& mean, const Tensor& rstd) {
    call.mean = const_cast<float*>(read(mean, {call.batch, call.out}));
    call.rstd = const_cast<float*>(read(rstd, {call.batch, call.out}));
  }

  Tensor empty(const std::initializer_list<int64_t>& sizes, bool channels_last = false) const {
    return torch::stable::empty(sizes, ScalarType::Float, std::nullopt, std::nullopt, std::nullopt,
                                channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  }
  Tensor like_y() const {
    return empty({call.batch, call.out, call.down / call.pool, call.across / call.pool}, true);
  }
  Tensor like_x() const { return empty({call.batch, call.in, call.height, call.width}); }
  Tensor per_image(int64_t rows) const { return empty({call.batch, rows, call.out}); }

  void run() {
    std::vector<float> turned, of_turned;
    if (call.by_x) call.turned = (turned = turn(call.weight, call.taps, call.out)).data();
    if (call.of_weight) call.of_turned = (of_turned = turn(call.of_weight, call.taps, call.out)).data();
    const auto image = MIM4DD_BEST(block_image);
    torch::stable::parallel_for(0, call.batch, 1, [&](int64_t begin, int64_t end) {
      thread_local std::vector<float> scratch;  // fresh pages would cost as much as the work on them
      if (const size_t size = mim4dd::block_scratch(call); scratch.size() < size) scratch.resize(size);
      for (int64_t i = begin; i < end; ++i) image(call, i, scratch.data());
      if (scratch.size() > kKeptScratch) scratch = {};
    });
  }

 private:
  std::vector<Tensor> kept_;
};

float* data(const Tensor& t) { return static_cast<float*>(const_cast<Tensor&>(t).mutable_data_ptr()); }

using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Three forward(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& bias, double eps,
              int64_t padding, bool relu, int64_t pool) {
  Block block(BlockCall::kForward, x, weight, scale, bias, padding, relu, pool);
  const Tensor y = block.like_y(), mean = block.empty({block.call.batch, block.call.out});
  const Tensor rstd = block.empty({block.call.batch, block.call.out});
  block.call.eps = eps;
  block.call.y = data(y), block.call.mean = data(mean), block.call.rstd = data(rstd);
  block.run();
  return {y, mean, rstd};
}

Four backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& bias,
              const Tensor& mean, const Tensor& rstd, int64_t padding, bool relu, int64_t pool, bool want_x,
              bool want_weight) {
  Block block(BlockCall::kBackward, x, weight, scale, bias, padding, relu, pool);
  block.read_statistics(mean, rstd);
  block.call.grad_y = block.read_y(grad);
  const Tensor by_x = want_x ? block.like_x() : block.empty({0});
  const Tensor by_weight = want_weight ? block.per_image(block.call.taps) : block.empty({0});
  const Tensor by_scale = block.empty({block.call.batch, block.call.out});
  const Tensor by_bias = block.empty({block.call.batch, block.call.out});
  block.call.by_x = want_x ? data(by_x) : nullptr;
  block.call.by_weight = want_weight ? data(by_weight) : nullptr;
  block.call.by_scale = data(by_scale), block.call.by_bias = data(by_bias);
  block.run();
  return {by_x, by_weight, by_scale, by_bias};
}

Four backward_twice(const Tensor& of_x, const Tensor& of_weight, const Tensor& of_scale, const Tensor& of_bias,
                    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& bias,
                    const Tensor& mean, const Tensor& rstd, int64_t padding, bool relu, int64_t pool) {
  Block block(BlockCall::kBackwardTwice, x, weight, scale, bias, padding, relu, pool);
  BlockCall& call = block.call;
  block.read_statistics(mean, rstd);
  call.grad_y = block.read_y(grad);
  if (of_x.numel() > 0) call.of_x = block.read(of_x, {call.batch, call.in, call.height, call.width});
  call.of_weight = block.read(of_weight, {call.taps, call.out});
  call.of_scale = block.read(of_scale, {call.out});
  call.of_bias = block.read(of_bias, {call.out});
  const Tensor by_grad = block.like_y(), by_x = block.like_x(), by_weight = block.per_image(call.taps);
  const Tensor by_scale = block.empty({call.batch, call.out});
  call.by_grad_y = data(by_grad), call.by_x = data(by_x), call.by_weight = data(by_weight);
  call.by_scale = data(by_scale);
  block.run();
  return {by_grad, by_x, by_weight, by_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mim4dd, m) {
  m.def(
      "first_block(Tensor x, Tensor weight, Tensor scale, Tensor bias, float eps, int padding, bool relu, int pool) "
      "-> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "first_block_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale, Tensor bias, Tensor mean, "
      "Tensor rstd, int padding, bool relu, int pool, bool want_x, bool want_weight) "
      "-> (Tensor by_x, Tensor by_weight, Tensor by_scale, Tensor by_bias)");
  m.def(
      "first_block_backward_twice(Tensor of_x, Tensor of_weight, Tensor of_scale, Tensor of_bias, Tensor grad, "
      "Tensor x, Tensor weight, Tensor scale, Tensor bias, Tensor mean, Tensor rstd, int padding, bool relu, int pool) "
      "-> (Tensor by_grad, Tensor by_x, Tensor by_weight, Tensor by_scale)");
}

STABLE_TORCH_LIBRARY_IMPL(mim4dd, CPU, m) {
  m.impl("first_block", TORCH_BOX(&forward));
  m.impl("first_block_backward", TORCH_BOX(&backward));
  m.impl("first_block_backward_twice", TORCH_BOX(&backward_twice));
}
