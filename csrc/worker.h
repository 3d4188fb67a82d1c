// One thread's work on the CPU: images one after another, each in buffers that stay in the thread's cache.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "plane.h"

namespace mim4dd {

// Columns begin..end-1.
struct Range {
  int begin, end;

  Range within(int width) const { return {std::clamp(begin, 0, width), std::clamp(end, 0, width)}; }
};

// A whole step: pixel (y, x) of the result is the one at y + shift_y and offset + step * x, step 1 or -1.
struct Move {
  int shift_y, offset, step;

  Range inside(int width) const {
    const int begin = step > 0 ? -offset : offset - width + 1;
    return Range{begin, begin + width}.within(width);
  }
};

// One image, or the buffer of one.
template <typename T>
struct View {
  T* data;
  int64_t channel, y, x;  // strides

  T* row(int c, int at_y) const { return data + c * channel + at_y * y; }
};

template <typename In, typename Out, typename Acc>
class Worker {
 public:
  explicit Worker(const Call& call)
      : call_(call),
        channels_(call.channels),
        height_(call.height),
        width_(call.width),
        plane_(call.channels, call.height, call.width),
        image_(static_cast<size_t>(plane_.padded_channels()) * pixels()),
        rows_(static_cast<size_t>(plane_.padded_channels()) * width_),
        buffer_{image_.data(), pixels(), width_, 1} {
    for (int c = 0; c < channels_; ++c)
      normalisation_.push_back(normalisation<Acc>(call, c, std::is_same_v<In, uint8_t>));
  }

  void run(int64_t image) {
    Acc fields[kFields];
    for (int field = 0; field < kFields; ++field) fields[field] = call_.fields[field].template at<Acc>(call_.row(image));
    const Transform<Acc> t(call_, fields);
    const Strides &in = call_.in_strides, &out = call_.out_strides;
    in_ = {static_cast<const In*>(call_.in) + image * in.batch, in.channel, in.y, in.x};
    out_ = {static_cast<Out*>(call_.out) + image * out.batch, out.channel, out.y, out.x};
    call_.adjoint ? backward(t) : forward(t);
  }

 private:
  const Call& call_;
  const int channels_, height_, width_;
  std::vector<Affine<Acc>> normalisation_;
  Plane<Acc> plane_;
  std::vector<Acc> image_;  // [padded_channels, height, width]
  std::vector<Acc> rows_;   // [padded_channels, width], one row of the image
  const View<Acc> buffer_;  // the image in image_
  View<const In> in_{};
  View<Out> out_{};

  int64_t pixels() const { return int64_t{1} * height_ * width_; }
  View<Acc> rows() { return {rows_.data(), width_, 0, 1}; }

  void forward(const Transform<Acc>& t) {
    const Range hole = Range{t.left, t.right + 1}.within(width_);
    if (keeps_values(t)) return move(t, in_, out_);
    load(in_, buffer_, 0, height_);
    colour(t);
    if (t.moves_whole_pixels()) return move(t, buffer_, out_);
    plane_.make_room();
    for (int y = 0; y < height_; ++y) plane_.set_row(y, buffer_.row(0, y), buffer_.channel);
    for (int y = 0; y < height_; ++y) {
      plane_.sample(t, y, rows_.data());
      if (y >= t.top && y <= t.bottom)
        for (int c = 0; c < channels_; ++c) zero(rows().row(c, 0), hole);
      store(rows(), y, y + 1);
    }
  }

  void backward(const Transform<Acc>& t) {
    const Range hole = Range{t.left, t.right + 1}.within(width_);
    if (keeps_values(t)) return move(t, in_, out_);
    if (t.moves_whole_pixels()) {
      move(t, in_, buffer_);
    } else {
      plane_.clear();
      for (int y = 0; y < height_; ++y) {
        load(in_, rows(), y, y + 1);
        if (y >= t.top && y <= t.bottom)
          for (int c = 0; c < channels_; ++c) zero(rows().row(c, 0), hole);
        plane_.scatter(t, y, rows_.data());
      }
      for (int y = 0; y < height_; ++y) plane_.get_row(y, buffer_.row(0, y), buffer_.channel);
    }
    colour(t);
    store(buffer_, 0, height_);
  }

  // Nothing but whole steps and the hole: values go straight from the input to the output.
  bool keeps_values(const Transform<Acc>& t) const {
    return std::is_same_v<In, Out> && !call_.mean && t.keeps_colour() && t.moves_whole_pixels();
  }

  static void zero(auto* to, const Range& range) {
    for (int x = range.begin; x < range.end; ++x) to[x] = 0;
  }

  template <typename From, typename To>
  void move(const Transform<Acc>& t, const View<From>& from, const View<To>& to) {
    const int shift_y = static_cast<int>(clamp<Acc>(t.shift_y, -height_, height_));
    const int shift_x = static_cast<int>(clamp<Acc>(t.shift_x, -width_, width_));
    Move move = t.xx < 0 ? Move{shift_y, width_ - 1 + shift_x, -1} : Move{shift_y, shift_x, 1};
    Range hole{t.left, t.right + 1};
    int top = t.top, bottom = t.bottom;
    if (call_.adjoint) {  // the inverse; a mirror is its own
      move = {-shift_y, t.xx < 0 ? move.offset : -shift_x, move.step};
      hole = t.xx < 0 ? Range{move.offset - t.right, move.offset - t.left + 1}
                      : Range{t.left + shift_x, t.right + 1 + shift_x};
      top += shift_y;
      bottom += shift_y;
    }
    hole = hole.within(width_);
    const Range inside = move.inside(width_);
    const int64_t step = move.step * from.x;
    for (int c = 0; c < channels_; ++c) {
      for (int y = 0; y < height_; ++y) {
        To* target = to.row(c, y);
        const int from_y = y + move.shift_y;
        const bool empty = from_y < 0 || from_y >= height_;
        const Range range = empty ? Range{0, 0} : inside;
        const From* source = from.row(c, empty ? 0 : from_y) + move.offset * from.x;
        if (step == 1 && to.x == 1)
          copy<1, 1>(source, target, range);
        else if (step == -1 && to.x == 1)
          copy<-1, 1>(source, target, range);
        else
          for (int x = range.begin; x < range.end; ++x) target[x * to.x] = static_cast<To>(source[x * step]);
        for (int x = 0; x < range.begin; ++x) target[x * to.x] = 0;
        for (int x = range.end; x < width_; ++x) target[x * to.x] = 0;
        if (y >= top && y <= bottom)
          for (int x = hole.begin; x < hole.end; ++x) target[x * to.x] = 0;
      }
    }
  }

  template <int from_step, int to_step, typename From, typename To>
  static void copy(const From* source, To* __restrict target, const Range& range) {
    for (int x = range.begin; x < range.end; ++x) target[x * to_step] = static_cast<To>(source[x * from_step]);
  }

  void load(const View<const In>& from, const View<Acc>& to, int begin, int end) {
    for (int c = 0; c < channels_; ++c) {
      const Affine<Acc> n = normalisation_[c];
      rows_of(from, to, begin, end, c, [n](In value) { return static_cast<Acc>(value) * n.scale + n.shift; });
    }
  }

  void store(const View<Acc>& from, int begin, int end) {
    for (int c = 0; c < channels_; ++c)
      rows_of(from, out_, begin, end, c, [](Acc value) { return static_cast<Out>(value); });
  }

  // Channel c of some rows, as one long row where both lie so.
  template <typename From, typename To, typename Function>
  void rows_of(const View<From>& from, const View<To>& to, int begin, int end, int c, const Function& function) {
    const bool dense = from.x == 1 && to.x == 1;
    const bool joined = dense && from.y == width_ && to.y == width_;
    const int64_t width = joined ? int64_t{1} * width_ * (end - begin) : width_;
    for (int y = begin; y < (joined ? begin + 1 : end); ++y) {
      const From* source = from.row(c, y);
      To* __restrict target = to.row(c, y);
      if (dense)
        for (int64_t x = 0; x < width; ++x) target[x] = function(source[x]);
      else
        for (int64_t x = 0; x < width; ++x) target[x * to.x] = function(source[x * from.x]);
    }
  }

  void colour(const Transform<Acc>& t) {
    if (t.keeps_colour()) return;
    constexpr int kChunk = 1024;
    const Acc constant = t.colour(0, 0, mean(t), 1), grey = t.grey / static_cast<Acc>(channels_);
    Acc mixed[kChunk];
    for (int64_t first = 0; first < pixels(); first += kChunk) {
      const int count = static_cast<int>(std::min<int64_t>(kChunk, pixels() - first));
      for (int x = 0; x < count; ++x) mixed[x] = constant;
      for (int c = 0; c < channels_ && grey != 0; ++c) {
        const Acc* values = buffer_.row(c, 0) + first;
        for (int x = 0; x < count; ++x) mixed[x] += grey * values[x];
      }
      for (int c = 0; c < channels_; ++c) {
        Acc* __restrict values = buffer_.row(c, 0) + first;
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
      total += static_cast<double>(sum(image_.data() + first, std::min(kChunk, values - first)));
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
