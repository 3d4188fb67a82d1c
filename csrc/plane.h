// Bilinear sampling on the CPU, and its adjoint: an image as planes of four channels side by side with a border of
// zeros. A sample is then four short vector loads with no test for the edges, and the adjoint adds into the same
// four places. That needs no atomics, since an image belongs to one thread; an adjoint that gathers would visit
// nine candidates a pixel instead.
#pragma once

#include <vector>

#include "augment.h"

namespace mim4dd {

// Four numbers in vector registers of whatever width the target has (GCC and Clang).
template <typename Acc>
struct QuadOf {
  typedef Acc type __attribute__((vector_size(4 * sizeof(Acc))));
};

template <typename Acc>
class Plane {
  using Quad = typename QuadOf<Acc>::type;

 public:
  Plane(int channels, int height, int width)
      : groups_((channels + 3) / 4), height_(height), width_(width), taps_(width) {}

  // Rows go in and out as [padded_channels, width], `stride` apart.
  int padded_channels() const { return 4 * groups_; }

  // Room for an image, all zeros.
  void clear() { quads_.assign(size(), Quad{}); }

  // Room for an image whose every row will be set; the border is zeros and is never set.
  void make_room() { quads_.resize(size()); }

  void set_row(int y, const Acc* rows, int64_t stride) {
    for (int group = 0; group < groups_; ++group)
      interleave(rows + 4 * group * stride, stride, reinterpret_cast<Acc*>(at(group, y + 1, 1)));
  }

  void get_row(int y, Acc* rows, int64_t stride) {
    for (int group = 0; group < groups_; ++group)
      separate(reinterpret_cast<const Acc*>(at(group, y + 1, 1)), rows + 4 * group * stride, stride);
  }

  // Row y of the transformed image.
  void sample(const Transform<Acc>& t, int y, Acc* rows) {
    find_taps(t, y);
    for (int group = 0; group < groups_; ++group) {
      const Quad* image = at(group, 0, 0);
      for (int x = 0; x < width_; ++x) {
        const Quad *upper = image + taps_.offset[x], *lower = upper + stride();
        const Quad fx = splat(taps_.x[x]), fy = splat(taps_.y[x]);
        const Quad above = upper[0] + fx * (upper[1] - upper[0]), below = lower[0] + fx * (lower[1] - lower[0]);
        taps_.row[x] = above + fy * (below - above);
      }
      separate(reinterpret_cast<const Acc*>(taps_.row.data()), rows + size_t{4} * group * width_, width_);
    }
  }

  // The adjoint of `sample`: adds what row y of the gradient gives to the image.
  void scatter(const Transform<Acc>& t, int y, const Acc* rows) {
    find_taps(t, y);
    for (int group = 0; group < groups_; ++group) {
      Quad* image = at(group, 0, 0);
      interleave(rows + size_t{4} * group * width_, width_, reinterpret_cast<Acc*>(taps_.row.data()));
      // Neighbours add into the same place, and would wait for one another.
      for (int first = 0; first < kApart; ++first) {
        for (int x = first; x < width_; x += kApart) {
          Quad *upper = image + taps_.offset[x], *lower = upper + stride();
          const Quad fx = splat(taps_.x[x]), fy = splat(taps_.y[x]);
          const Quad below = fy * taps_.row[x], above = taps_.row[x] - below;
          const Quad above_right = fx * above, below_right = fx * below;
          upper[0] += above - above_right;
          upper[1] += above_right;
          lower[0] += below - below_right;
          lower[1] += below_right;
        }
      }
    }
  }

 private:
  static constexpr int kApart = 8;

  // One row of taps, see `taps`: where the upper left one lies, and the weights of the right and the lower ones.
  struct Row {
    explicit Row(int width) : offset(width), y(width), x(width), row(width) {}
    std::vector<int32_t> offset;
    std::vector<Acc> y, x;
    std::vector<Quad> row;  // the samples of one group, or their gradient
  };

  const int groups_, height_, width_;
  std::vector<Quad> quads_;  // [groups, height + 3, width + 3]
  Row taps_;

  static Quad splat(Acc value) { return Quad{value, value, value, value}; }

  int stride() const { return width_ + 3; }
  size_t size() const { return static_cast<size_t>(groups_) * (height_ + 3) * stride(); }
  Quad* at(int group, int y, int x) {
    return quads_.data() + (static_cast<size_t>(group) * (height_ + 3) + y) * stride() + x;
  }

  void find_taps(const Transform<Acc>& t, int y) {
    int32_t* __restrict offset = taps_.offset.data();
    Acc *__restrict fraction_y = taps_.y.data(), *__restrict fraction_x = taps_.x.data();
    const int stride = this->stride(), height = height_, width = width_;
    for (int x = 0; x < width; ++x) {
      const Point<Acc> source = t.source(y, x);
      const Taps<Acc> v = taps(source.y, height), h = taps(source.x, width);
      offset[x] = v.low * stride + h.low;
      fraction_y[x] = v.fraction;
      fraction_x[x] = h.fraction;
    }
  }

  void interleave(const Acc* from, int64_t stride, Acc* __restrict to) const {
    const Acc *a = from, *b = a + stride, *c = b + stride, *d = c + stride;
    for (int x = 0; x < width_; ++x) {
      to[4 * x] = a[x];
      to[4 * x + 1] = b[x];
      to[4 * x + 2] = c[x];
      to[4 * x + 3] = d[x];
    }
  }

  void separate(const Acc* from, Acc* to, int64_t stride) const {
    Acc *__restrict a = to, *__restrict b = a + stride, *__restrict c = b + stride, *__restrict d = c + stride;
    for (int x = 0; x < width_; ++x) {
      a[x] = from[4 * x];
      b[x] = from[4 * x + 1];
      c[x] = from[4 * x + 2];
      d[x] = from[4 * x + 3];
    }
  }
};

}  // namespace mim4dd
