// The augmentation's maths, once, for host and device: what one row of parameters does to an image.
//
// An image is linear in its pixels all the way (brightness apart), so its gradient is the adjoint of the same
// three steps in reverse: cutout masks, bilinear sampling gathers, colour mixes a pixel with its two means.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define MIM4DD_HOST_DEVICE __host__ __device__
#else
// Never a function of its own, since sources are compiled for several instruction sets, see buffer.h.
#define MIM4DD_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace mim4dd {

// The columns of AugmentParams in its order; cutout counts for four.
enum Field {
  kBrightness, kSaturation, kContrast, kShiftY, kShiftX, kTop, kBottom, kLeft, kRight, kFlip, kScaleX, kScaleY,
  kDegrees, kFields
};

enum class Kind : int8_t { kBool, kInt32, kInt64, kFloat, kDouble };

// One number per row, at any stride, so that expanded and sliced parameters need no copy.
struct Column {
  const void* data;
  int64_t stride;
  Kind kind;

  template <typename Acc>
  MIM4DD_HOST_DEVICE Acc at(int64_t row) const {
    const int64_t i = row * stride;
    switch (kind) {
      case Kind::kBool: return static_cast<Acc>(static_cast<const bool*>(data)[i]);
      case Kind::kInt32: return static_cast<Acc>(static_cast<const int32_t*>(data)[i]);
      case Kind::kInt64: return static_cast<Acc>(static_cast<const int64_t*>(data)[i]);
      case Kind::kFloat: return static_cast<Acc>(static_cast<const float*>(data)[i]);
      default: return static_cast<Acc>(static_cast<const double*>(data)[i]);
    }
  }
};

// [batch, channels, height, width] at any strides.
struct Strides {
  int64_t batch, channel, y, x;
};

// One call of the operator: plain pointers and sizes, checked by ops.cpp.
struct Call {
  const void* in;
  void* out;
  Strides in_strides, out_strides;
  int64_t batch;
  int channels, height, width;
  Column fields[kFields];
  const int64_t* rows;  // parameter row of each image; null: row i for image i
  int64_t rows_stride, num_rows;
  const float *mean, *std;  // of each channel's pixels in [0, 1]; null: images are used as they are
  bool align_corners, adjoint;

  MIM4DD_HOST_DEVICE int64_t row(int64_t image) const { return rows ? rows[image * rows_stride] : image; }
};

// The largest side: float32 still tells half a pixel from the next there, and offsets fit into 32 bits.
constexpr int64_t kMaxSide = 16384;

template <typename Acc>
MIM4DD_HOST_DEVICE Acc clamp(Acc value, Acc low, Acc high) {
  value = value > low ? value : low;  // in this order a NaN becomes `low`
  return value < high ? value : high;
}

// Normalisation of one channel: value * scale + shift; a byte is a fraction of 255.
template <typename Acc>
struct Affine {
  Acc scale, shift;
};

template <typename Acc>
MIM4DD_HOST_DEVICE Affine<Acc> normalisation(const Call& call, int channel, bool bytes) {
  const Acc unit = bytes ? 255 : 1;
  if (!call.mean) return {1 / unit, 0};
  const Acc std = static_cast<Acc>(call.std[channel]);
  return {1 / (unit * std), -static_cast<Acc>(call.mean[channel]) / std};
}

template <typename Acc>
struct Point {
  Acc y, x;
};

// The bilinear taps of a coordinate along one axis, counted in an image with a border of zeros, one pixel before
// and two after: `low` with weight 1 - fraction and `low + 1` with weight fraction.
template <typename Acc>
struct Taps {
  int low;
  Acc fraction;
};

template <typename Acc>
MIM4DD_HOST_DEVICE Taps<Acc> taps(Acc coordinate, int size) {
  const Acc bordered = clamp<Acc>(coordinate + 1, 0, static_cast<Acc>(size + 1));
  const int low = static_cast<int>(bordered);  // rounds down, as no number here is negative
  return {low, bordered - static_cast<Acc>(low)};
}

// What one row of parameters does to an image of a given size.
template <typename Acc>
struct Transform {
  // Colour: gain * value + grey * (mean over channels) + offset + level * (mean over the image).
  Acc gain, grey, offset, level;
  // Resampling: pixel p of the output is the input at matrix * (p - centre) + centre + shift.
  Acc yy, yx, xy, xx, shift_y, shift_x, centre_y, centre_x;
  // Cutout: rows top..bottom and columns left..right, inclusive; top > bottom: none.
  int top, bottom, left, right;

  Transform() = default;  // unset, as shared memory needs it

  // Saturation s about the pixel's mean, then contrast c about the image's mean, written as one combination:
  // saturation leaves the image's mean as it is, and brightness shifts a value and both its means alike.
  // `f` is one row of the parameters, in the order of Field.
  MIM4DD_HOST_DEVICE Transform(const Call& call, const Acc* f) {
    gain = f[kContrast] * f[kSaturation];
    grey = f[kContrast] * (1 - f[kSaturation]);
    offset = call.adjoint ? 0 : f[kBrightness];
    level = 1 - f[kContrast];

    const int height = call.height, width = call.width;
    // A rotation acts on normalised coordinates: pixels over half the side, whose ends align_corners defines.
    const Acc aspect = call.align_corners
                           ? static_cast<Acc>(width > 1 ? width - 1 : 1) / static_cast<Acc>(height > 1 ? height - 1 : 1)
                           : static_cast<Acc>(width) / static_cast<Acc>(height);
#ifdef __CUDA_ARCH__
    const Acc cosine = cospi(f[kDegrees] / 180), sine = sinpi(f[kDegrees] / 180);  // needs no stack, unlike cos
#else
    const Acc angle = f[kDegrees] * static_cast<Acc>(3.14159265358979323846 / 180);
    const Acc cosine = std::cos(angle), sine = std::sin(angle);
#endif
    const Acc scale_y = f[kScaleY], scale_x = f[kFlip] != 0 ? -f[kScaleX] : f[kScaleX];
    yy = cosine * scale_y;
    yx = sine / aspect * scale_y;
    xy = -sine * aspect * scale_x;
    xx = cosine * scale_x;
    centre_y = static_cast<Acc>(height - 1) / 2;
    centre_x = static_cast<Acc>(width - 1) / 2;
    shift_y = f[kShiftY];
    shift_x = f[kShiftX];

    top = static_cast<int>(clamp<Acc>(f[kTop], 0, height));
    bottom = static_cast<int>(clamp<Acc>(f[kBottom], -1, height - 1));
    left = static_cast<int>(clamp<Acc>(f[kLeft], 0, width));
    right = static_cast<int>(clamp<Acc>(f[kRight], -1, width - 1));
  }

  MIM4DD_HOST_DEVICE Point<Acc> source(int y, int x) const {
    const Acc from_y = static_cast<Acc>(y) - centre_y, from_x = static_cast<Acc>(x) - centre_x;
    return {yy * from_y + yx * from_x + (centre_y + shift_y), xy * from_y + xx * from_x + (centre_x + shift_x)};
  }

  MIM4DD_HOST_DEVICE bool keeps_colour() const { return gain == 1 && grey == 0 && offset == 0 && level == 0; }

  // Whether pixels only move by whole steps, mirrored or not.
  MIM4DD_HOST_DEVICE bool moves_whole_pixels() const {
    return yy == 1 && yx == 0 && xy == 0 && (xx == 1 || xx == -1);
  }

  MIM4DD_HOST_DEVICE bool cut(int y, int x) const { return y >= top && y <= bottom && x >= left && x <= right; }
};

}  // namespace mim4dd
