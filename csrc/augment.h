// The per-pixel maths of the augmentation: plain pointers and sizes, no torch, usable from host and device.
#pragma once

#include <cstdint>

namespace mim4dd {

// Colour of one image in [channels, pixels] layout: brightness is added, saturation scales about the pixel's
// mean over channels, contrast about the image's mean. Accumulates in Acc.
template <typename T, typename Acc>
void colour(const T* in, T* out, int64_t channels, int64_t pixels, Acc brightness, Acc saturation, Acc contrast) {
  // Saturation leaves the image's mean as it is, so the mean that contrast needs is known before any pixel
  // is written.
  double sum = 0;  // a float would lose digits over a large image
  for (int64_t i = 0; i < channels * pixels; ++i) sum += static_cast<double>(static_cast<Acc>(in[i]));
  const Acc mean = static_cast<Acc>(sum / static_cast<double>(channels * pixels)) + brightness;
  for (int64_t p = 0; p < pixels; ++p) {
    Acc grey = 0;
    for (int64_t c = 0; c < channels; ++c) grey += static_cast<Acc>(in[c * pixels + p]);
    grey = grey / static_cast<Acc>(channels) + brightness;
    for (int64_t c = 0; c < channels; ++c) {
      const Acc value = static_cast<Acc>(in[c * pixels + p]) + brightness;
      const Acc saturated = (value - grey) * saturation + grey;
      out[c * pixels + p] = static_cast<T>((saturated - mean) * contrast + mean);
    }
  }
}

}  // namespace mim4dd
