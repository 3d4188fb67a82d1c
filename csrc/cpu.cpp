// The CPU kernel: images in parallel, each worked on row by row by one thread, whose buffers stay in its cache.
//
// Where pixels only move by whole steps a row goes straight from the input to the output. Otherwise the image is
// kept as planes of four channels side by side with a border of zeros: a bilinear sample is then four short
// vector loads with no test for the edges, and its adjoint adds into the same four places. That needs no atomics,
// since an image belongs to one thread; an adjoint that gathers would visit nine candidates a pixel instead.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "kernels.h"

namespace mim4dd {
namespace {

// Columns begin..end-1.
struct Range {
  int begin, end;
};

// Reads pixel x of a row at offset + step * x, step 1 or -1.
struct Walk {
  int offset, step;

  Range inside(int width) const {
    const int begin = step > 0 ? -offset : offset - width + 1;
    return {std::clamp(begin, 0, width), std::clamp(begin + width, 0, width)};
  }
};

constexpr Walk kForward{0, 1};

// Four numbers in vector registers of whatever width the target has (GCC and Clang).
template <typename Acc>
struct QuadOf {
  typedef Acc type __attribute__((vector_size(4 * sizeof(Acc))));
};

// Eight sums side by side, which the compiler may keep in a vector; the order never depends on threads.
template <typename Acc>
Acc sum(const Acc* values, int count) {
  Acc partial[8] = {};
  int i = 0;
  for (; i + 8 <= count; i += 8)
    for (int k = 0; k < 8; ++k) partial[k] += values[i + k];
  for (; i < count; ++i) partial[0] += values[i];
  for (int k = 1; k < 8; ++k) partial[0] += partial[k];
  return partial[0];
}

template <typename In, typename Out, typename Acc>
class Worker {
  using Quad = typename QuadOf<Acc>::type;

 public:
  explicit Worker(const Call& call)
      : call_(call),
        channels_(call.channels),
        groups_((call.channels + 3) / 4),
        height_(call.height),
        width_(call.width),
        rows_(static_cast<size_t>(groups_) * 4 * width_),
        grey_(width_),
        quads_(width_),
        offsets_(width_),
        corners_(width_) {
    for (int c = 0; c < channels_; ++c)
      normalisation_.push_back(normalisation<Acc>(call, c, std::is_same_v<In, uint8_t>));
  }

  void run(int64_t image) {
    Acc fields[kFields];
    for (int field = 0; field < kFields; ++field) fields[field] = call_.fields[field].template at<Acc>(call_.row(image));
    const Transform<Acc> t(call_, fields);
    in_ = static_cast<const In*>(call_.in) + image * call_.in_strides.batch;
    out_ = static_cast<Out*>(call_.out) + image * call_.out_strides.batch;
    if (t.moves_whole_pixels())
      call_.adjoint ? move_back(t) : move(t);
    else
      call_.adjoint ? resample_back(t) : resample(t);
  }

 private:
  const Call& call_;
  const int channels_, groups_, height_, width_;
  std::vector<Affine<Acc>> normalisation_;
  std::vector<Acc> rows_;  // one row of every channel; channels beyond the last stay zero
  std::vector<Acc> grey_;
  std::vector<Quad> plane_;  // [groups, height + 3, width + 3], see `taps`
  std::vector<Quad> quads_;  // one row of one group
  std::vector<int32_t> offsets_;
  std::vector<Quad> corners_;  // weights of the pixel at the offset, its right, lower and lower right neighbour
  const In* in_ = nullptr;
  Out* out_ = nullptr;

  Acc* row(int channel) { return rows_.data() + static_cast<size_t>(channel) * width_; }
  size_t stride() const { return static_cast<size_t>(width_) + 3; }
  Quad* plane(int group) { return plane_.data() + group * stride() * (height_ + 3); }
  Quad* plane_row(int group, int y) { return plane(group) + (y + 1) * stride() + 1; }

  // ------------------------------------------------------------------------------------------ the four paths

  void move(const Transform<Acc>& t) {
    const int shift_y = whole(t.shift_y, height_), shift_x = whole(t.shift_x, width_);
    const Walk walk = t.xx < 0 ? Walk{width_ - 1 + shift_x, -1} : Walk{shift_x, 1};
    const Range box{t.left, t.right + 1};
    if (copies(t)) return copy(t, shift_y, walk, box);
    const Acc mean = image_mean(t, [&](int y) { load(y, kForward); });
    for (int y = 0; y < height_; ++y) {
      load(y + shift_y, walk);
      colour(t, mean, y + shift_y >= 0 && y + shift_y < height_ ? walk.inside(width_) : Range{0, 0});
      cut(t, y, box);
      store(y);
    }
  }

  void move_back(const Transform<Acc>& t) {
    const int shift_y = whole(t.shift_y, height_), shift_x = whole(t.shift_x, width_);
    const Walk walk = t.xx < 0 ? Walk{width_ - 1 + shift_x, -1} : Walk{-shift_x, 1};
    const Range box = walk.step > 0 ? Range{t.left - walk.offset, t.right + 1 - walk.offset}
                                    : Range{walk.offset - t.right, walk.offset - t.left + 1};
    if (copies(t)) return copy(t, -shift_y, walk, box);
    finish(t, [&](int y) {
      load(y - shift_y, walk);
      cut(t, y - shift_y, box);
    });
  }

  // Pixels that keep their colour and type need no buffer.
  bool copies(const Transform<Acc>& t) const {
    return std::is_same_v<In, Out> && !call_.mean && t.keeps_colour() && call_.in_strides.x == 1 &&
           call_.out_strides.x == 1;
  }

  void copy(const Transform<Acc>& t, int shift_y, const Walk& walk, const Range& box) {
    for (int y = 0; y < height_; ++y) {
      const int from_y = y + shift_y, cut_y = call_.adjoint ? from_y : y;
      const Range inside = from_y >= 0 && from_y < height_ ? walk.inside(width_) : Range{0, 0};
      const bool holed = cut_y >= t.top && cut_y <= t.bottom;
      const Range hole{std::clamp(holed ? box.begin : 0, 0, width_), std::clamp(holed ? box.end : 0, 0, width_)};
      for (int c = 0; c < channels_; ++c) {
        const In* from = in_ + c * call_.in_strides.channel + from_y * call_.in_strides.y + walk.offset;
        Out* __restrict to = out_ + c * call_.out_strides.channel + y * call_.out_strides.y;
        std::fill(to, to + inside.begin, Out(0));
        if (walk.step > 0)
          for (int x = inside.begin; x < inside.end; ++x) to[x] = static_cast<Out>(from[x]);
        else
          for (int x = inside.begin; x < inside.end; ++x) to[x] = static_cast<Out>(from[-x]);
        std::fill(to + inside.end, to + width_, Out(0));
        if (hole.begin < hole.end) std::fill(to + hole.begin, to + hole.end, Out(0));
      }
    }
  }

  void resample(const Transform<Acc>& t) {
    const Acc mean = image_mean(t, [&](int y) { load(y, kForward); });
    plane_.resize(groups_ * stride() * (height_ + 3));  // zeros at first; the border is never written here
    for (int y = 0; y < height_; ++y) {
      load(y, kForward);
      colour(t, mean, {0, width_});
      for (int group = 0; group < groups_; ++group) pack(group, plane_row(group, y));
    }
    for (int y = 0; y < height_; ++y) {
      find_corners(t, y);
      for (int group = 0; group < groups_; ++group) {
        sample(plane(group));
        unpack(group, quads_.data());
      }
      cut(t, y, {t.left, t.right + 1});
      store(y);
    }
  }

  void resample_back(const Transform<Acc>& t) {
    plane_.assign(groups_ * stride() * (height_ + 3), Quad{});
    for (int y = 0; y < height_; ++y) {
      load(y, kForward);
      cut(t, y, {t.left, t.right + 1});
      find_corners(t, y);
      for (int group = 0; group < groups_; ++group) {
        pack(group, quads_.data());
        scatter(plane(group));
      }
    }
    finish(t, [&](int y) {
      for (int group = 0; group < groups_; ++group) unpack(group, plane_row(group, y));
    });
  }

  template <typename Fetch>
  void finish(const Transform<Acc>& t, const Fetch& fetch) {
    const Acc mean = image_mean(t, fetch);
    for (int y = 0; y < height_; ++y) {
      fetch(y);
      colour(t, mean, {0, width_});
      store(y);
    }
  }

  // ---------------------------------------------------------------------------------------- steps on one row

  static int whole(Acc shift, int side) { return static_cast<int>(clamp<Acc>(shift, -side, side)); }

  template <typename Fetch>
  Acc image_mean(const Transform<Acc>& t, const Fetch& fetch) {
    if (t.level == 0) return 0;
    double total = 0;  // a float would lose digits over a large image
    for (int y = 0; y < height_; ++y) {
      fetch(y);
      total += static_cast<double>(sum(rows_.data(), channels_ * width_));
    }
    return static_cast<Acc>(total / (static_cast<double>(height_) * width_ * channels_));
  }

  void load(int y, const Walk& walk) {
    const Range inside = y >= 0 && y < height_ ? walk.inside(width_) : Range{0, 0};
    const int64_t step = walk.step * call_.in_strides.x;
    for (int c = 0; c < channels_; ++c) {
      const In* from = in_ + c * call_.in_strides.channel + y * call_.in_strides.y + walk.offset * call_.in_strides.x;
      const Affine<Acc> n = normalisation_[c];
      Acc* __restrict to = row(c);
      std::fill(to, to + inside.begin, Acc(0));
      if (step == 1)
        for (int x = inside.begin; x < inside.end; ++x) to[x] = static_cast<Acc>(from[x]) * n.scale + n.shift;
      else
        for (int x = inside.begin; x < inside.end; ++x) to[x] = static_cast<Acc>(from[x * step]) * n.scale + n.shift;
      std::fill(to + inside.end, to + width_, Acc(0));
    }
  }

  void store(int y) {
    const int64_t step = call_.out_strides.x;
    for (int c = 0; c < channels_; ++c) {
      Out* __restrict to = out_ + c * call_.out_strides.channel + y * call_.out_strides.y;
      const Acc* from = row(c);
      if (step == 1)
        for (int x = 0; x < width_; ++x) to[x] = static_cast<Out>(from[x]);
      else
        for (int x = 0; x < width_; ++x) to[x * step] = static_cast<Out>(from[x]);
    }
  }

  void colour(const Transform<Acc>& t, Acc mean, const Range& range) {
    if (t.keeps_colour()) return;
    Acc* __restrict grey = grey_.data();
    std::fill(grey, grey + width_, Acc(0));
    if (t.grey != 0)
      for (int c = 0; c < channels_; ++c)
        for (int x = 0; x < width_; ++x) grey[x] += row(c)[x] / static_cast<Acc>(channels_);
    for (int c = 0; c < channels_; ++c) {
      Acc* __restrict values = row(c);
      for (int x = range.begin; x < range.end; ++x) values[x] = t.colour(values[x], grey[x], mean, 1);
    }
  }

  void cut(const Transform<Acc>& t, int y, const Range& columns) {
    const int begin = std::max(columns.begin, 0), end = std::min(columns.end, width_);
    if (y < t.top || y > t.bottom || begin >= end) return;
    for (int c = 0; c < channels_; ++c) std::fill(row(c) + begin, row(c) + end, Acc(0));
  }

  void find_corners(const Transform<Acc>& t, int y) {
    int32_t* __restrict offsets = offsets_.data();
    Quad* __restrict corners = corners_.data();
    const int stride = width_ + 3;
    for (int x = 0; x < width_; ++x) {
      const Point<Acc> source = t.source(y, x);
      const Taps<Acc> v = taps(source.y, height_), h = taps(source.x, width_);
      offsets[x] = v.low * stride + h.low;
      corners[x] = Quad{(1 - v.fraction) * (1 - h.fraction), (1 - v.fraction) * h.fraction,
                        v.fraction * (1 - h.fraction), v.fraction * h.fraction};
    }
  }

  void sample(const Quad* plane) {
    Quad* __restrict to = quads_.data();
    const int32_t* offsets = offsets_.data();
    const Quad* corners = corners_.data();
    const size_t below = stride();
    for (int x = 0; x < width_; ++x) {
      const Quad *upper = plane + offsets[x], *lower = upper + below, w = corners[x];
      to[x] = w[0] * upper[0] + w[1] * upper[1] + w[2] * lower[0] + w[3] * lower[1];
    }
  }

  void scatter(Quad* __restrict plane) {
    const Quad* from = quads_.data();
    const int32_t* offsets = offsets_.data();
    const Quad* corners = corners_.data();
    const size_t below = stride();
    for (int x = 0; x < width_; ++x) {
      Quad *upper = plane + offsets[x], *lower = upper + below;
      const Quad w = corners[x], value = from[x];
      upper[0] += w[0] * value;
      upper[1] += w[1] * value;
      lower[0] += w[2] * value;
      lower[1] += w[3] * value;
    }
  }

  // Four rows of channels side by side, and back.
  void pack(int group, Quad* __restrict to) {
    const Acc *a = row(4 * group), *b = a + width_, *c = b + width_, *d = c + width_;
    for (int x = 0; x < width_; ++x) to[x] = Quad{a[x], b[x], c[x], d[x]};
  }

  void unpack(int group, const Quad* __restrict from) {
    Acc *a = row(4 * group), *b = a + width_, *c = b + width_, *d = c + width_;
    for (int x = 0; x < width_; ++x) {
      const Quad value = from[x];
      a[x] = value[0];
      b[x] = value[1];
      c[x] = value[2];
      d[x] = value[3];
    }
  }
};

}  // namespace

void augment_cpu(const Call& call, torch::headeronly::ScalarType dtype) {
  dispatch(dtype, [&]<typename In, typename Out, typename Acc>(Types<In, Out, Acc>) {
    // A thread is worth waking for some 32k values.
    const int64_t values = int64_t{1} * call.channels * call.height * call.width;
    torch::stable::parallel_for(0, call.batch, std::max<int64_t>(1, 32768 / values), [&](int64_t begin, int64_t end) {
      Worker<In, Out, Acc> worker(call);
      for (int64_t image = begin; image < end; ++image) worker.run(image);
    });
  });
}

}  // namespace mim4dd
