// Convolution 3x3 with padding 1 of images with their channels last, by Winograd's F(4x4, 3x3).
#pragma once

#include <cstdint>

namespace mim4dd {

// A tile is 4x4 numbers of the map of outputs, and the 6x6 of the map of inputs that they depend on. Both maps are
// [batch, height, width, channels]; what a tile has outside of them is read as 0, and not written.
struct ConvCall {
  int64_t batch, height, width;
  int64_t in, out;  // channels, multiples of 32
  int64_t tiles_down, tiles_across, tiles;
  const float* x;
  const float* weight;  // forward
  int64_t weight_in, weight_out, weight_down, weight_across;  // its strides; negative: turned round
  float* plane;  // forward: the transformed weight. For grad_weight: the sum of the products, [36, out, in]
  float* y;      // forward

  const float* grad_y;      // these are for grad_weight
  float *inputs, *outputs;  // transformed tiles of a block, [36, kBlock, in] and [36, kBlock, out]
  float* grad_weight;       // [out, 3, 3, in]
};

constexpr int64_t kPoints = 36;  // of a transformed tile
constexpr int64_t kTiles = 32;   // of one thread at a time, forward
constexpr int64_t kBlock = 96;   // of all threads at a time, for grad_weight
constexpr int64_t kPad = 16;     // numbers between the points, whose maps would else fall into one set of the cache

// Not inline but static: the linker keeps one copy of an inline function for all instruction sets.
static constexpr int64_t tile_stride(int64_t tiles, int64_t channels) { return tiles * channels + kPad; }
// Floats that a thread needs forward.
static constexpr int64_t forward_scratch(int64_t in) {
  return kPoints * (tile_stride(kTiles, in) + tile_stride(kTiles, 32));
}

// The same code compiled for three instruction sets; ops.cpp picks at run time. What is done for one range of rows,
// tiles or points does not depend on the others.
#define MIM4DD_CONV_FUNCTIONS                                                             \
  void transform_weight(const ConvCall& call, int64_t begin, int64_t end);  /* rows in */ \
  void convolve(const ConvCall& call, int64_t begin, int64_t end, float* scratch);        \
  void transform_block(const ConvCall& call, int64_t first, int64_t begin, int64_t end);  \
  void multiply_block(const ConvCall& call, int64_t first, int64_t begin, int64_t end);   \
  void finish_weight(const ConvCall& call, int64_t begin, int64_t end);  /* rows out */
namespace baseline { MIM4DD_CONV_FUNCTIONS }
namespace avx2 { MIM4DD_CONV_FUNCTIONS }
namespace avx512 { MIM4DD_CONV_FUNCTIONS }

}  // namespace mim4dd
