// Bilinear sampling on the CPU, and its adjoint: an image as planes of four channels side by side with a border of
// zeros. A sample is then four short vector loads with no test for the edges, and the adjoint adds into the same
// four places. That needs no atomics, since an image belongs to one thread; an adjoint that gathers would visit
// nine candidates a pixel instead.
#pragma once

#include "buffer.h"

namespace mim4dd::MIM4DD_ISA {

// Four numbers in vector registers of whatever width the target has (GCC and Clang).
template <typename Acc>
struct QuadOf {
  typedef Acc type __attribute__((vector_size(4 * sizeof(Acc)), aligned(16)));
};

template <typename Acc>
class Plane {
  using Quad = typename QuadOf<Acc>::type;

 public:
  Plane(int channels, int height, int width)
      : channels_(channels),
        height_(height),
        width_(width),
        quads_(size_t{4} * groups() * (height + 3) * stride()),
        row_(size_t{4} * width),
        spare_(width),
        offset_(width),
        fraction_y_(width),
        fraction_x_(width) {}

  void clear() { quads_.clear(); }

  // Row y of the image, from and to rows of a channel each.
  void set_row(int y, const View<Acc>& image) {
    for (int group = 0; group < groups(); ++group) interleave(rows(image, y, group), at(group, y + 1, 1));
  }

  void get_row(int y, const View<Acc>& image) {
    for (int group = 0; group < groups(); ++group) separate(at(group, y + 1, 1), rows(image, y, group));
  }

  // Row y of the transformed image.
  void sample(const Transform<Acc>& t, int y, const View<Acc>& result) {
    find_taps(t, y);
    for (int group = 0; group < groups(); ++group) {
      sample_row(at(group, 0, 0), row());
      separate(row(), rows(result, y, group));
    }
  }

  // The adjoint of `sample`: adds what row y of the gradient gives to the image.
  void scatter(const Transform<Acc>& t, int y, const View<Acc>& gradient) {
    find_taps(t, y);
    for (int group = 0; group < groups(); ++group) {
      interleave(rows(gradient, y, group), row());
      scatter_row(row(), at(group, 0, 0));
    }
  }

 private:
  const int channels_, height_, width_;
  Buffer<Acc> quads_;  // [groups, height + 3, width + 3, 4]
  Buffer<Acc> row_;    // [width, 4], one row of one group
  Buffer<Acc> spare_;  // stands for the channels beyond the last: all zeros, and stays so
  // The taps of one row, see `taps`: where the upper left one lies, the weights of the lower and the right ones.
  Buffer<int32_t> offset_;
  Buffer<Acc> fraction_y_, fraction_x_;

  int groups() const { return (channels_ + 3) / 4; }
  int stride() const { return width_ + 3; }
  Quad* row() { return reinterpret_cast<Quad*>(row_.data()); }
  Quad* at(int group, int y, int x) {
    return reinterpret_cast<Quad*>(quads_.data()) + (size_t{1} * group * (height_ + 3) + y) * stride() + x;
  }

  void find_taps(const Transform<Acc>& t, int y) {
    int32_t* __restrict offset = offset_.data();
    Acc *__restrict fraction_y = fraction_y_.data(), *__restrict fraction_x = fraction_x_.data();
    const int height = height_, width = width_;
    for (int x = 0; x < width; ++x) {
      const Point<Acc> source = t.source(y, x);
      const Taps<Acc> v = taps(source.y, height), h = taps(source.x, width);
      offset[x] = v.low * (width + 3) + h.low;
      fraction_y[x] = v.fraction;
      fraction_x[x] = h.fraction;
    }
  }

  void sample_row(const Quad* image, Quad* __restrict result) const {
    const int32_t* offset = offset_.data();
    const Acc *fraction_y = fraction_y_.data(), *fraction_x = fraction_x_.data();
    const int64_t below = stride();
    for (int x = 0; x < width_; ++x) {
      const Quad *upper = image + offset[x], *lower = upper + below;
      const Acc fy = fraction_y[x], fx = fraction_x[x];
      const Quad top = upper[0] + fx * (upper[1] - upper[0]), bottom = lower[0] + fx * (lower[1] - lower[0]);
      result[x] = top + fy * (bottom - top);
    }
  }

  void scatter_row(const Quad* gradient, Quad* __restrict image) const {
    constexpr int kApart = 8;  // neighbours add into the same place, and would wait for one another
    const int32_t* offset = offset_.data();
    const Acc *fraction_y = fraction_y_.data(), *fraction_x = fraction_x_.data();
    const int64_t below = stride();
    for (int first = 0; first < kApart; ++first) {
      for (int x = first; x < width_; x += kApart) {
        Quad *upper = image + offset[x], *lower = upper + below;
        const Acc fy = fraction_y[x], fx = fraction_x[x];
        const Quad bottom = fy * gradient[x], top = gradient[x] - bottom;
        const Quad top_right = fx * top, bottom_right = fx * bottom;
        upper[0] += top - top_right;
        upper[1] += top_right;
        lower[0] += bottom - bottom_right;
        lower[1] += bottom_right;
      }
    }
  }

  struct Rows {
    Acc *a, *b, *c, *d;
  };

  Rows rows(const View<Acc>& image, int y, int group) {
    const auto row = [&](int c) { return c < channels_ ? image.row(c, y) : spare_.data(); };
    return {row(4 * group), row(4 * group + 1), row(4 * group + 2), row(4 * group + 3)};
  }

  void interleave(const Rows& from, Quad* quads) const {
    const Acc *a = from.a, *b = from.b, *c = from.c, *d = from.d;
    Acc* __restrict to = reinterpret_cast<Acc*>(quads);
    for (int x = 0; x < width_; ++x) {
      to[4 * x] = a[x];
      to[4 * x + 1] = b[x];
      to[4 * x + 2] = c[x];
      to[4 * x + 3] = d[x];
    }
  }

  void separate(const Quad* quads, const Rows& to) const {
    const Acc* from = reinterpret_cast<const Acc*>(quads);
    Acc *__restrict a = to.a, *__restrict b = to.b, *__restrict c = to.c, *__restrict d = to.d;
    for (int x = 0; x < width_; ++x) {
      a[x] = from[4 * x];
      b[x] = from[4 * x + 1];
      c[x] = from[4 * x + 2];
      d[x] = from[4 * x + 3];
    }
  }
};

}  // namespace mim4dd
