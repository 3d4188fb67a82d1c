// One thread's work on the CPU: images one after another, each in buffers that stay in the thread's cache.
#pragma once

#include <cstring>
#include <type_traits>

#include "plane.h"

namespace mim4dd::MIM4DD_ISA {

template <typename In, typename Out, typename Acc>
class Worker {
 public:
  explicit Worker(const Call& call)
      : call_(call),
        channels_(call.channels),
        height_(call.height),
        width_(call.width),
        strip_(Plane<Acc>::strip(call.height, call.width)),
        plane_(call.channels, call.height, call.width, call.adjoint),
        image_(static_cast<size_t>(call.channels * pixels())),
        rows_(size_t{1} * call.channels * strip_ * call.width) {}

  void run(int64_t image) {
    Acc fields[kFields];
    for (int field = 0; field < kFields; ++field) fields[field] = call_.fields[field].template at<Acc>(call_.row(image));
    const Transform<Acc> t(call_, fields);
    const Strides &in = call_.in_strides, &out = call_.out_strides;
    in_ = {static_cast<const In*>(call_.in) + image * in.batch, in.channel, in.y, in.x};
    out_ = {static_cast<Out*>(call_.out) + image * out.batch, out.channel, out.y, out.x};
    if (std::is_same_v<In, Out> && !call_.mean && t.keeps_colour() && t.moves_whole_pixels())
      move(t, in_, out_);
    else
      call_.adjoint ? backward(t) : forward(t);
  }

 private:
  const Call& call_;
  const int channels_, height_, width_, strip_;
  Plane<Acc> plane_;
  Buffer<Acc> image_, rows_;  // all of an image, and a strip of it
  View<const In> in_{};
  View<Out> out_{};

  int64_t pixels() const { return int64_t{1} * height_ * width_; }

  View<Acc> buffer() const { return {image_.data(), pixels(), width_, 1}; }
  View<Acc> some_rows() const { return {rows_.data(), int64_t{1} * strip_ * width_, width_, 1}; }

  void forward(const Transform<Acc>& t) {
    View<const Acc> image{};
    if (call_.mean || !t.keeps_colour() || !in_place(in_, &image)) {
      load(in_, height_, buffer());
      colour(t);
      if (t.moves_whole_pixels()) return move(t, buffer(), out_);
      image = constant(buffer());
    }
    plane_.set(image);
    for (int y = 0; y < height_; y += strip_) {
      const Range rows = Range{y, y + strip_}.within(height_);
      const View<Out> target = out_.from(y);
      View<Acc> result{};
      const bool directly = in_place(target, &result);
      if (!directly) result = some_rows();
      plane_.sample(t, rows, result);
      if (!directly) store(result, rows.size(), target);
    }
  }

  void backward(const Transform<Acc>& t) {
    View<Acc> image{};
    const bool directly = t.keeps_colour() && in_place(out_, &image);
    if (!directly) image = buffer();
    if (t.moves_whole_pixels()) {
      move(t, in_, image);
    } else {
      for (int y = 0; y < height_; y += strip_) {
        const Range rows = Range{y, y + strip_}.within(height_);
        const View<const In> source = in_.from(y);
        View<const Acc> gradient{};
        if (!in_place(source, &gradient)) {
          load(source, rows.size(), some_rows());
          gradient = constant(some_rows());
        }
        plane_.scatter(t, rows, gradient);
      }
      plane_.take(image);
    }
    if (directly) return;
    colour(t);
    store(image, height_, out_);
  }

  static View<const Acc> constant(const View<Acc>& view) { return {view.data, view.channel, view.y, view.x}; }

  // Whether rows can be worked on where they lie.
  template <typename T, typename Value>
  bool in_place(const View<T>& view, View<Value>* result) const {
    if constexpr (std::is_same_v<T, Value>) *result = view;
    return std::is_same_v<T, Value> && view.x == 1 && view.y == width_;
  }

  // ------------------------------------------------------------------------------------------------ whole steps

  // Whole steps, a mirror and the hole, or the inverse of these.
  template <typename From, typename To>
  void move(const Transform<Acc>& t, const View<From>& from, const View<To>& to) {
    const bool mirrored = t.xx < 0;
    int shift_y = static_cast<int>(clamp<Acc>(t.shift_y, -height_, height_));
    int shift_x = static_cast<int>(clamp<Acc>(t.shift_x, -width_, width_));
    Range hole_y{t.top, t.bottom + 1}, hole_x{t.left, t.right + 1};
    if (call_.adjoint) {  // the hole lies in `from`
      const int mirror = width_ - 1 + shift_x;
      hole_y = {hole_y.begin + shift_y, hole_y.end + shift_y};
      hole_x = mirrored ? Range{mirror - t.right, mirror - t.left + 1}
                        : Range{hole_x.begin + shift_x, hole_x.end + shift_x};
      shift_y = -shift_y;
      if (!mirrored) shift_x = -shift_x;  // a mirror is its own inverse
    }
    const Range rows = Range{-shift_y, height_ - shift_y}.within(height_);
    const Range columns = (mirrored ? Range{shift_x, width_ + shift_x} : Range{-shift_x, width_ - shift_x}).within(width_);
    if (!mirrored && dense(from) && dense(to)) {  // as one long row; what runs over at its ends is blanked below
      const int64_t shift = int64_t{1} * shift_y * width_ + shift_x, values = pixels() * channels_;
      const int64_t begin = clamp<int64_t>(-shift, 0, values), end = clamp<int64_t>(values - shift, 0, values);
      if (begin < end) copy(from.data + begin + shift, 1, to.data + begin, 1, end - begin);
    } else if (columns.begin < columns.end) {
      const int first = mirrored ? width_ - 1 + shift_x - columns.begin : columns.begin + shift_x;
      for (int c = 0; c < channels_; ++c)
        for (int y = rows.begin; y < rows.end; ++y)
          copy(from.row(c, y + shift_y) + first * from.x, mirrored ? -from.x : from.x,
               to.row(c, y) + columns.begin * to.x, to.x, columns.end - columns.begin);
    }
    blank(to, {0, rows.begin}, {0, width_});
    blank(to, {rows.end, height_}, {0, width_});
    blank(to, rows, {0, columns.begin});
    blank(to, rows, {columns.end, width_});
    blank(to, hole_y, hole_x);
  }

  template <typename T>
  bool dense(const View<T>& view) const {
    return view.x == 1 && view.y == width_ && view.channel == pixels();
  }

  template <typename From, typename To>
  static void copy(const From* from, int64_t from_step, To* __restrict to, int64_t to_step, int64_t count) {
    if (from_step == 1 && to_step == 1) {
      if constexpr (std::is_same_v<const From, const To>)
        memcpy(to, from, count * sizeof(To));
      else
        for (int64_t x = 0; x < count; ++x) to[x] = static_cast<To>(from[x]);
    } else if (from_step == -1 && to_step == 1) {
      for (int64_t x = 0; x < count; ++x) to[x] = static_cast<To>(from[-x]);
    } else {
      for (int64_t x = 0; x < count; ++x) to[x * to_step] = static_cast<To>(from[x * from_step]);
    }
  }

  template <typename To>
  void blank(const View<To>& to, const Range& rows, const Range& columns) {
    const Range ys = rows.within(height_), xs = columns.within(width_);
    if (xs.begin >= xs.end) return;
    for (int c = 0; c < channels_; ++c) {
      for (int y = ys.begin; y < ys.end; ++y) {
        To* row = to.row(c, y);
        if (to.x == 1)
          zero(row + xs.begin, xs.size());
        else
          for (int x = xs.begin; x < xs.end; ++x) row[x * to.x] = 0;
      }
    }
  }

  // By blocks of one store each, the last of which overlaps: a call of memset takes longer than a short row.
  template <typename To>
  static void zero(To* row, int count) {
    constexpr int kBlock = 32 / sizeof(To);
    if (count < kBlock) {
      for (int x = 0; x < count; ++x) row[x] = 0;
      return;
    }
    for (int x = 0; x < count - kBlock; x += kBlock) memset(row + x, 0, 32);
    memset(row + count - kBlock, 0, 32);
  }

  // ------------------------------------------------------------------------------- in and out of the buffers

  // The first rows of some input, normalised.
  void load(const View<const In>& from, int rows, const View<Acc>& to) {
    for (int c = 0; c < channels_; ++c) {
      const Affine<Acc> n = normalisation<Acc>(call_, c, std::is_same_v<In, uint8_t>);
      convert(from, to, rows, c, [n](In value) { return static_cast<Acc>(value) * n.scale + n.shift; });
    }
  }

  void store(const View<Acc>& from, int rows, const View<Out>& to) {
    for (int c = 0; c < channels_; ++c)
      convert(from, to, rows, c, [](Acc value) { return static_cast<Out>(value); });
  }

  // Channel c, as one long row where it lies so.
  template <typename From, typename To, typename Function>
  void convert(const View<From>& from, const View<To>& to, int rows, int c, const Function& function) {
    const bool dense = from.x == 1 && to.x == 1, joined = dense && from.y == width_ && to.y == width_;
    const int64_t width = joined ? int64_t{1} * width_ * rows : width_;
    for (int y = 0; y < (joined ? 1 : rows); ++y) {
      const From* source = from.row(c, y);
      To* __restrict target = to.row(c, y);
      if (dense)
        for (int64_t x = 0; x < width; ++x) target[x] = function(source[x]);
      else
        for (int64_t x = 0; x < width; ++x) target[x * to.x] = function(source[x * from.x]);
    }
  }

  // ------------------------------------------------------------------------------------- colour, in the buffer

  void colour(const Transform<Acc>& t) {
    if (t.keeps_colour()) return;
    constexpr int kChunk = 1024;
    const Acc constant = t.offset + t.level * mean(t), grey = t.grey / static_cast<Acc>(channels_);
    Acc mixed[kChunk];
    for (int64_t first = 0; first < pixels(); first += kChunk) {
      const int count = static_cast<int>(pixels() - first < kChunk ? pixels() - first : kChunk);
      for (int x = 0; x < count; ++x) mixed[x] = constant;
      for (int c = 0; c < channels_ && grey != 0; ++c) {
        const Acc* values = buffer().row(c, 0) + first;
        for (int x = 0; x < count; ++x) mixed[x] += grey * values[x];
      }
      for (int c = 0; c < channels_; ++c) {
        Acc* __restrict values = buffer().row(c, 0) + first;
        for (int x = 0; x < count; ++x) values[x] = t.gain * values[x] + mixed[x];
      }
    }
  }

  // Of the buffer, where contrast mixes it in.
  Acc mean(const Transform<Acc>& t) const {
    if (t.level == 0) return 0;
    constexpr int64_t kChunk = 4096;
    const int64_t values = pixels() * channels_;
    double total = 0;  // a float would lose digits over a large image
    for (int64_t first = 0; first < values; first += kChunk)
      total += static_cast<double>(sum(image_.data() + first, values - first < kChunk ? values - first : kChunk));
    return static_cast<Acc>(total / static_cast<double>(values));
  }

  // Sixteen sums side by side, which the compiler keeps in vectors; the order never depends on threads.
  static Acc sum(const Acc* values, int64_t count) {
    constexpr int kLanes = 16;
    Acc partial[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
      for (int k = 0; k < kLanes; ++k) partial[k] += values[i + k];
    for (int k = 0; i < count; ++i, ++k) partial[k] += values[i];
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int k = 0; k < half; ++k) partial[k] += partial[k + half];
    return partial[0];
  }
};

}  // namespace mim4dd
