// Convolution 3x3 of few channels, instance normalisation, ReLU and average pooling in one pass over each image.
#pragma once

#include <cstdint>

namespace mim4dd {

// The convolution's output, which is four times as large as the block's, is computed again for every pass and
// never leaves the cache. A tap is an input channel's row and column of the weight: [in, 3, 3] flattened.
struct BlockCall {
  enum Pass { kForward, kBackward, kBackwardTwice } pass;
  int64_t batch, in, height, width, padding;  // of x
  int64_t out, taps, group;                   // channels, 9 * in, and how many channels are worked on at once
  int64_t down, across;                       // of the convolution's output, at least 8 across
  int pool;
  bool relu;
  bool half;  // y and its gradients are bfloat16, else float; all else is float
  double eps;
  const float *x, *weight, *turned;  // [batch, in, height, width], [taps, out], [out, kTurnedRow]
  const float *scale, *bias;         // [out], the normalisation's
  float *mean, *rstd;                // [batch, out], written forward, read backward
  void* y;                           // forward: [batch, down / pool, across / pool, out]

  const void* grad_y;             // backward and twice
  float *grad_x, *grad_weight;    // like x, [batch, taps, out]; where not wanted, null
  float *grad_scale, *grad_bias;  // [batch, out]; the latter null in twice

  // Twice: the gradients of what backward returned, that of the weight turned as well.
  const float *grad_grad_x, *grad_grad_weight, *grad_grad_turned, *grad_grad_scale, *grad_grad_bias;
  void* grad_grad_y;
};

constexpr int64_t kTurnedRow = 64;  // at least the taps
constexpr int64_t kMostTaps = 36;

// Not inline but static: the linker keeps one copy of an inline function for all instruction sets.
static constexpr int64_t padded(const BlockCall& call) {
  return call.in * (call.height + 2 * call.padding) * (call.width + 2 * call.padding);
}
// And those by which the last rows of a product may exceed the map.
static constexpr int64_t pixels(const BlockCall& call) { return call.down * call.across + 8; }
static constexpr int64_t cells(const BlockCall& call) { return (call.down / call.pool) * (call.across / call.pool); }

// Floats that the work on one image needs.
static constexpr int64_t block_scratch(const BlockCall& call) {
  return 3 * padded(call) + pixels(call) * kTurnedRow + call.group * (4 * pixels(call) + 2 * cells(call)) +
         2 * kMostTaps * call.group;
}

// The same code compiled for three instruction sets; ops.cpp picks at run time.
namespace baseline { void block_image(const BlockCall& call, int64_t image, float* scratch); }
namespace avx2 { void block_image(const BlockCall& call, int64_t image, float* scratch); }
namespace avx512 { void block_image(const BlockCall& call, int64_t image, float* scratch); }

}  // namespace mim4dd
