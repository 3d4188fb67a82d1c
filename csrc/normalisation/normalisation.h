// Instance normalisation, then ReLU, then average pooling by two, of images with their channels last.
#pragma once

#include <cstdint>

namespace mim4dd {

// One pass over a batch [batch, height, width, channels]. Numbers are kept in "accumulator" type: double for
// images of doubles, float for floats and bfloat16. Everything per image and channel is [batch, channels].
struct NormCall {
  enum Pass { kForward, kBackward, kBackwardTwice } pass;
  enum Type { kFloat, kDouble, kBFloat16 } type;  // of x and out and their gradients
  int64_t batch, channels, height, width;
  int pool;  // 1 or 2; a last odd row or column is normalised but not pooled
  bool relu;
  double eps;
  const void *x, *weight, *bias;
  void *mean, *rstd;  // per image and channel: written forward, read backward

  void* out;  // forward

  const void* grad_out;                    // backward and twice: [batch, height / pool, width / pool, channels]
  void *grad_x, *grad_weight, *grad_bias;  // backward, the latter two per image and channel; twice, but the bias

  const void *grad_grad_x, *grad_grad_weight, *grad_grad_bias;  // twice: gradients of what backward returned
  void* grad_grad_out;                                          // twice
};

// Works on one image. The same code compiled for three instruction sets; ops.cpp picks at run time.
namespace baseline { void norm_image(const NormCall& call, int64_t image); }
namespace avx2 { void norm_image(const NormCall& call, int64_t image); }
namespace avx512 { void norm_image(const NormCall& call, int64_t image); }

}  // namespace mim4dd
