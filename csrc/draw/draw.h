// What the uniform numbers of one row become: parameters of an augmentation, for host and device.
#pragma once

#include <cstdint>

#include "../augment/augment.h"

namespace mim4dd {

// What is drawn, in this order: numbers, then whole ones. One more uniform number picks a part of the strategy.
// Of a cutout's box its first row and column are.
enum Drawn {
  kDrawnBrightness, kDrawnSaturation, kDrawnContrast, kDrawnScaleX, kDrawnScaleY, kDrawnDegrees, kNumbers,
  kDrawnFlip = kNumbers, kDrawnShiftY, kDrawnShiftX, kDrawnCutY, kDrawnCutX, kDrawn
};

// A row of the table: a number is low + u * span, a whole one low + floor(u * span).
struct Drawing {
  float low, span;
  float extent;    // of a box: from its first pixel to its last
  float last;      // pixel of the image, where the box ends at the latest
  float part;      // of the strategy that draws it; -1: none does
  float identity;  // its value without
};

struct DrawCall {
  const float* uniform;  // [kDrawn + 1, rows]
  int64_t rows;
  int64_t together;  // so many rows after one another have one part of the strategy; 0: every row has all of them
  int parts;
  Drawing drawings[kDrawn];
  float* params;  // [rows, kFields]
};

MIM4DD_HOST_DEVICE void draw_row(const DrawCall& call, int64_t row) {
  constexpr Field fields[kDrawn]{kBrightness, kSaturation, kContrast, kScaleX, kScaleY, kDegrees,
                                 kFlip,       kShiftY,     kShiftX,   kTop,    kLeft};
  const auto uniform = [&](int what, int64_t at) { return call.uniform[what * call.rows + at]; };
  const bool all = call.together == 0;
  const int part = all ? 0 : static_cast<int>(uniform(kDrawn, row - row % call.together) * call.parts);
  for (int what = 0; what < kDrawn; ++what) {
    const Drawing& of = call.drawings[what];
    const bool drawn = of.part >= 0 && (all || static_cast<int>(of.part) == part);
#ifdef __CUDA_ARCH__
    const float product = __fmul_rn(uniform(what, row), of.span);  // rounded before it is added to, as on a CPU
#else
    const float product = uniform(what, row) * of.span;
#endif
    // It rounds to less than the span, as numbers below 1 do, so its floor is one of the span's values.
    const float step = what < kNumbers ? product : static_cast<float>(static_cast<int>(product));
    float* param = call.params + row * kFields + fields[what];
    const float value = of.low + step;
    *param = drawn ? value : of.identity;
    if (what < kDrawnCutY) continue;
    const float end = value + of.extent;
    param[0] = drawn ? (value > 0 ? value : 0.f) : of.identity;
    param[1] = drawn ? (end < of.last ? end : of.last) : of.identity;
  }
}

#ifdef MIM4DD_CUDA
// Launches on `stream` and returns.
void draw_cuda(const DrawCall& call, void* stream);
#endif

}  // namespace mim4dd
