// Bilinear sampling on the CPU, and its adjoint, of an image as planes of four channels side by side with a border
// of zeros, so that a tap is one short vector and needs no test for the edges. A strip of rows is worked on at a
// time: long enough for the loops to run at speed, short enough for the cache.
#pragma once

#include <cstring>

#include "buffer.h"
#include "quads.h"

namespace mim4dd::MIM4DD_ISA {

template <typename Acc>
class Plane {
  using Quad = typename Vectors<Acc>::Quad;
  using Pair = typename Vectors<Acc>::Pair;

  // Rows of four channels that lie apart.
  template <typename T>
  struct Rows {
    T* channel[4];

    // Up to four pixels of each.
    MIM4DD_INLINE Square<Acc> load(int x, int count) const {
      Square<Acc> block;
      for (int c = 0; c < 4; ++c) {
        if (count == 4)
          block.row[c] = *reinterpret_cast<const Quad*>(channel[c] + x);
        else
          memcpy(&block.row[c], channel[c] + x, count * sizeof(Acc));
      }
      return block;
    }

    MIM4DD_INLINE void store(const Square<Acc>& block, int x, int count) const {
      for (int c = 0; c < 4; ++c) {
        if (count == 4)
          *reinterpret_cast<Quad*>(channel[c] + x) = block.row[c];
        else
          memcpy(channel[c] + x, &block.row[c], count * sizeof(Acc));
      }
    }
  };

 public:
  // Rows of a strip.
  static int strip(int height, int width) { return clamp(1024 / width, 1, height); }

  Plane(int channels, int height, int width, bool adjoint)
      : channels_(channels),
        height_(height),
        width_(width),
        place_(adjoint ? 8 : 4),
        places_(size_t{1} * place_ * groups() * (height + 3) * stride()),
        spare_(size_t{1} * strip(height, width) * width),
        offset_(size_t{1} * strip(height, width) * width),
        fraction_y_(size_t{1} * strip(height, width) * width),
        fraction_x_(size_t{1} * strip(height, width) * width) {}

  // The image to sample. The rows of a channel follow one another in memory, in all images here.
  void set(const View<const Acc>& image) {
    for (int group = 0; group < groups(); ++group) {
      for (int y = 0; y < height_; ++y) {
        const Rows<const Acc> from = rows(image, y, group);
        Quad* to = reinterpret_cast<Quad*>(at(group, y + 1, 1));
        by_fours(width_, [=](int x, int count) MIM4DD_ALWAYS {
          const Square<Acc> pixels = from.load(x, count).transposed();
          for (int k = 0; k < count; ++k) to[x + k] = pixels.row[k];
        });
      }
    }
  }

  // Some rows of the transformed image.
  void sample(const Transform<Acc>& t, const Range& strip, const View<Acc>& result) {
    find_taps(t, strip);
    for (int group = 0; group < groups(); ++group) sample(at(group, 0, 0), strip.size() * width_, rows(result, 0, group));
  }

  // The adjoint of `sample`: adds what some rows of the gradient give to the image.
  void scatter(const Transform<Acc>& t, const Range& strip, const View<const Acc>& gradient) {
    find_taps(t, strip);
    for (int group = 0; group < groups(); ++group)
      scatter(at(group, 0, 0), strip.size() * width_, rows(gradient, 0, group));
  }

  // Moves what was added since the last call to the image. The border keeps its part, which is never read.
  void take(const View<Acc>& image) {
    for (int group = 0; group < groups(); ++group) {
      for (int y = 0; y < height_; ++y) {
        Quad* left = reinterpret_cast<Quad*>(at(group, y + 1, 1));
        Quad* right = reinterpret_cast<Quad*>(at(group, y + 1, 0)) + 1;
        const Rows<Acc> to = rows(image, y, group);
        by_fours(width_, [=](int x, int count) MIM4DD_ALWAYS {
          Square<Acc> pixels;
          for (int k = 0; k < count; ++k) {
            pixels.row[k] = left[2 * (x + k)] + right[2 * (x + k)];
            left[2 * (x + k)] = right[2 * (x + k)] = Quad{};
          }
          to.store(pixels.transposed(), x, count);
        });
      }
    }
  }

 private:
  const int channels_, height_, width_, place_;
  // [groups, height + 3, width + 3, place]: a place holds the four channels of a pixel. In the adjoint it holds them
  // twice: what was added to the left taps that lie here, and to the right taps beside them. So neighbours, which
  // share a tap, never wait for one another's addition to the same memory.
  Buffer<Acc> places_;
  Buffer<Acc> spare_;  // stands for the channels beyond the last: all zeros where it is read
  // The taps of a strip, see `taps`: where the upper left one lies, the weights of the lower and the right ones.
  Buffer<int32_t> offset_;
  Buffer<Acc> fraction_y_, fraction_x_;

  int groups() const { return (channels_ + 3) / 4; }
  int stride() const { return width_ + 3; }
  Acc* at(int group, int y, int x) const {
    return places_.data() + place_ * ((size_t{1} * group * (height_ + 3) + y) * stride() + x);
  }

  template <typename T>
  Rows<T> rows(const View<T>& image, int y, int group) const {
    const auto row = [&](int c) { return c < channels_ ? image.row(c, y) : spare_.data(); };
    return {{row(4 * group), row(4 * group + 1), row(4 * group + 2), row(4 * group + 3)}};
  }

  // The taps of the cutout lie in the border, where zeros are read, and where what is added is never read.
  void find_taps(const Transform<Acc>& t, const Range& strip) {
    const int height = height_, width = width_;
    for (int y = strip.begin; y < strip.end; ++y) {
      const int first = (y - strip.begin) * width;
      int32_t* __restrict offset = offset_.data() + first;
      Acc *__restrict fraction_y = fraction_y_.data() + first, *__restrict fraction_x = fraction_x_.data() + first;
      for (int x = 0; x < width; ++x) {
        const Point<Acc> source = t.source(y, x);
        const Taps<Acc> v = taps(source.y, height), h = taps(source.x, width);
        offset[x] = v.low * (width + 3) + h.low;
        fraction_y[x] = v.fraction;
        fraction_x[x] = h.fraction;
      }
      if (y >= t.top && y <= t.bottom)
        for (int x = t.left; x <= t.right; ++x) offset[x] = (height + 1) * (width + 3);
    }
  }

  void sample(const Acc* image, int count, const Rows<Acc>& result) const {
    const int32_t* offset = offset_.data();
    const Acc *fraction_y = fraction_y_.data(), *fraction_x = fraction_x_.data();
    const int64_t below = 4 * stride();
    by_fours(count, [=](int i, int few) MIM4DD_ALWAYS {
      Square<Acc> pixels;
      for (int k = 0; k < few; ++k) {
        const Acc* tap = image + int64_t{4} * offset[i + k];
        const Pair upper = *reinterpret_cast<const Pair*>(tap), lower = *reinterpret_cast<const Pair*>(tap + below);
        const Pair mixed = upper + fraction_y[i + k] * (lower - upper);
        const Quad left{mixed[0], mixed[1], mixed[2], mixed[3]}, right{mixed[4], mixed[5], mixed[6], mixed[7]};
        pixels.row[k] = left + fraction_x[i + k] * (right - left);
      }
      result.store(pixels.transposed(), i, few);
    });
  }

  void scatter(Acc* image, int count, const Rows<const Acc>& gradient) const {
    const int32_t* offset = offset_.data();
    const Acc *fraction_y = fraction_y_.data(), *fraction_x = fraction_x_.data();
    const int64_t below = 8 * stride();
    const Pair left{1, 1, 1, 1}, to_the_right{-1, -1, -1, -1, 1, 1, 1, 1};
    by_fours(count, [=](int i, int few) MIM4DD_ALWAYS {
      const Square<Acc> pixels = gradient.load(i, few).transposed();
      for (int k = 0; k < few; ++k) {
        Acc* tap = image + int64_t{8} * offset[i + k];
        const Pair mixed = Square<Acc>::twice(pixels.row[k]) * (left + fraction_x[i + k] * to_the_right);
        const Pair lower = fraction_y[i + k] * mixed;
        *reinterpret_cast<Pair*>(tap) += mixed - lower;
        *reinterpret_cast<Pair*>(tap + below) += lower;
      }
    });
  }
};

}  // namespace mim4dd
