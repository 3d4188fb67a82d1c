// What a thread of the CUDA kernels does: walk over pixels, and read what they are made of.
//
// The adjoint of bilinear sampling gathers: a pixel looks through the few places of the gradient that may have
// sampled it, found by the inverse map, and asks each for its weight. No atomics, so equal bits every time.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "augment.h"

namespace mim4dd {
namespace {

constexpr int kThreads = 256;

struct Range {
  int begin, end;
};

// The k-th of as many parts of `size` places, in whole warps.
__device__ inline Range part_of(int size, int parts, int k) {
  const int each = ((size - 1) / parts / 32 + 1) * 32, begin = min(k * each, size);
  return {begin, min(begin + each, size)};
}

// A thread's places in a part of rows of `width`: every kThreads-th. Counted on, for a division takes longer than a
// load.
struct Walk {
  int left, y, x, width, down, across;

  __device__ Walk(int width, Range part)
      : left(part.end - part.begin - static_cast<int>(threadIdx.x)), width(width), down(kThreads / width),
        across(kThreads % width) {
    const int first = part.begin + threadIdx.x;
    y = first / width;
    x = first % width;
  }
  __device__ bool done() const { return left <= 0; }
  __device__ void next() {
    left -= kThreads;
    y += down;
    x += across;
    if (x >= width) {
      x -= width;
      ++y;
    }
  }
};

// Where pixel (y, x) lies within a channel. `Offset` is int where that is known to do, see `lies_close`.
template <typename Offset>
__device__ Offset offset_of(const Strides& strides, int y, int x) {
  return y * static_cast<Offset>(strides.y) + x * static_cast<Offset>(strides.x);
}

// Reads the stored pixels of one image, `lanes` channels at once: all there are, or if `more`, some of them.
template <int lanes, bool more, typename In, typename Acc>
struct Reader {
  using Offset = std::conditional_t<more, int64_t, int>;

  const Call& call;
  const Transform<Acc> t;
  const In* channel[lanes];  // the first ones
  Affine<Acc> first_normal[lanes];

  __device__ Reader(const Call& call, const Transform<Acc>& t, int64_t image) : call(call), t(t) {
    // Through shared memory, or the compiler works them out again for each pixel.
    __shared__ const In* starts[lanes];
    if (threadIdx.x < lanes)
      starts[threadIdx.x] = static_cast<const In*>(call.in) +
                            (image * call.in_strides.batch + threadIdx.x * call.in_strides.channel);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < lanes; ++k) {
      channel[k] = starts[k];
      __builtin_assume(__isGlobal(channel[k]));
      first_normal[k] = has(k) ? normalised(k) : Affine<Acc>{};
    }
  }
  __device__ int channels() const { return more ? call.channels : lanes; }
  __device__ bool has(int channel) const { return !more || channel < call.channels; }

  __device__ Offset at(int y, int x) const { return offset_of<Offset>(call.in_strides, y, x); }
  // The channels from `first` on of a pixel.
  __device__ void load(Offset pixel, int first, Acc (&values)[lanes]) const {
    if constexpr (more) pixel += first * call.in_strides.channel;
#pragma unroll
    for (int k = 0; k < lanes; ++k)
      if (has(first + k)) values[k] = static_cast<Acc>(channel[k][pixel]);
  }
  // Adds them with a weight; reads nothing where that is 0.
  __device__ void add(Acc weight, Offset pixel, int first, Acc (&values)[lanes]) const {
    Acc loaded[lanes] = {};
    if (weight != 0) load(pixel, first, loaded);
#pragma unroll
    for (int k = 0; k < lanes; ++k) values[k] += weight * loaded[k];
  }
  __device__ Affine<Acc> normalised(int channel) const {
    return normalisation<Acc>(call, channel, std::is_same_v<In, uint8_t>);
  }
  // Values that were weighted; their weights' sum is `inside`.
  __device__ void normalise(int first, Acc inside, Acc (&values)[lanes]) const {
#pragma unroll
    for (int k = 0; k < lanes; ++k) {
      if (!has(first + k)) break;
      const Affine<Acc> normal = first == 0 ? first_normal[k] : normalised(first + k);
      values[k] = values[k] * normal.scale + normal.shift * inside;
    }
  }
  __device__ bool inside(const Point<Acc>& p) const {
    return p.y >= 0 && p.y < call.height && p.x >= 0 && p.x < call.width;
  }
};

// Where pixels move by whole steps: what output pixel (y, x) is a copy of, or in the adjoint the reverse of that.
// Returns the weight that was inside.
template <bool adjoint, int lanes, bool more, typename In, typename Acc>
__device__ Acc copy(const Reader<lanes, more, In, Acc>& read, int first, int y, int x, Acc (&values)[lanes]) {
  const Transform<Acc>& t = read.t;
  const Point<Acc> from = adjoint ? Point<Acc>{static_cast<Acc>(y) - t.shift_y,
                                               t.xx * (static_cast<Acc>(x) - t.centre_x - t.shift_x) + t.centre_x}
                                  : t.source(y, x);
  if (!read.inside(from)) return 0;
  const int from_y = static_cast<int>(from.y), from_x = static_cast<int>(from.x);
  if (!(adjoint && t.cut(from_y, from_x))) read.load(read.at(from_y, from_x), first, values);
  return 1;
}

// The weights of the two taps of a coordinate, where they lie inside.
template <typename Acc>
struct Inside {
  Acc low, high;

  __device__ Inside(const Taps<Acc>& tap, int size)
      : low(tap.low >= 1 && tap.low <= size ? 1 - tap.fraction : 0), high(tap.low < size ? tap.fraction : 0) {}
  __device__ Acc sum() const { return low + high; }
};

// The channels from `first` on at output pixel (y, x), sampled with zeros outside; returns the weight that was inside.
template <int lanes, bool more, typename In, typename Acc>
__device__ Acc sample(const Reader<lanes, more, In, Acc>& read, int first, int y, int x, Acc (&values)[lanes]) {
  const Point<Acc> source = read.t.source(y, x);
  const Taps<Acc> v = taps(source.y, read.call.height), h = taps(source.x, read.call.width);
  const Inside<Acc> rows(v, read.call.height), columns(h, read.call.width);
  const auto corner = read.at(v.low - 1, h.low - 1), down = read.at(1, 0), across = read.at(0, 1);
  read.add(rows.low * columns.low, corner, first, values);
  read.add(rows.low * columns.high, corner + across, first, values);
  read.add(rows.high * columns.low, corner + down, first, values);
  read.add(rows.high * columns.high, corner + down + across, first, values);
  return rows.sum() * columns.sum();
}

// Where along one axis an output can lie that samples within `reach` of the centre; everywhere if that is unknown.
template <typename Acc>
__device__ Range candidates(Acc centre, Acc reach, int size) {
  const Acc low = clamp<Acc>(centre - reach, 0, size), minus_high = clamp<Acc>(-(centre + reach), 1 - size, 1);
  return {static_cast<int>(ceil(low)), static_cast<int>(floor(-minus_high)) + 1};  // a NaN was clamped to the ends
}

// The weight of a tap at a distance.
template <typename Acc>
__device__ Acc tent(Acc distance) {
  const Acc weight = 1 - abs(distance);
  return weight > 0 ? weight : 0;
}

// The adjoint of `sample` for `tall` input pixels from (y, x) down: what they gave to every output, weighted with the
// gradients there.
template <int tall, int lanes, bool more, typename In, typename Acc>
__device__ void gather(const Reader<lanes, more, In, Acc>& read, int first, int y, int x, Acc (&values)[tall][lanes]) {
  constexpr int at_once = 3;  // columns, as there are at most when images are hardly shrunk
  const Transform<Acc>& t = read.t;
  const Acc inverse = 1 / (t.xx * t.yy - t.xy * t.yx);
  const Acc reach = static_cast<Acc>(tall + 1) / 2, middle = static_cast<Acc>(y) + static_cast<Acc>(tall - 1) / 2;
  const Acc from_y = middle - t.centre_y - t.shift_y, from_x = static_cast<Acc>(x) - t.centre_x - t.shift_x;
  const Acc slack = 1 + static_cast<Acc>(1e-6) * (read.call.height + read.call.width);  // for rounding
  const Range rows = candidates((t.xx * from_y - t.yx * from_x) * inverse + t.centre_y,
                                (abs(t.xx) * reach + abs(t.yx)) * abs(inverse) * slack, read.call.height);
  const Range columns = candidates((t.yy * from_x - t.xy * from_y) * inverse + t.centre_x,
                                   (abs(t.yy) + abs(t.xy) * reach) * abs(inverse) * slack, read.call.width);
  // What is sampled at the centre of the outputs, as seen from (y, x).
  const Acc centre_y = t.centre_y + t.shift_y - y, centre_x = t.centre_x + t.shift_x - x;
  for (int to_y = rows.begin; to_y < rows.end; ++to_y) {
    const Acc down = static_cast<Acc>(to_y) - t.centre_y;
    const Acc row_y = t.yy * down + centre_y, row_x = t.xy * down + centre_x;
    const int cut = to_y >= t.top && to_y <= t.bottom ? t.left : read.call.width;  // from there to `right`
    auto pixel = read.at(to_y, columns.begin);
    for (int begin = columns.begin; begin < columns.end; begin += at_once) {
      Acc weights[at_once][tall], loaded[at_once][lanes];  // what has no weight is not loaded
#pragma unroll
      for (int k = 0; k < at_once; ++k, pixel += read.at(0, 1)) {
        const int to_x = begin + k;
        const Acc across = static_cast<Acc>(begin) - t.centre_x + k;
        const Acc source_y = t.yx * across + row_y, source_x = t.xx * across + row_x;
        const bool given = (to_x < columns.end) & ((to_x < cut) | (to_x > t.right));  // no branches
        const Acc weight_x = given ? tent(source_x) : 0;
        if (weight_x > 0) read.load(pixel, first, loaded[k]);
#pragma unroll
        for (int i = 0; i < tall; ++i) weights[k][i] = tent(source_y - i) * weight_x;
      }
#pragma unroll
      for (int k = 0; k < at_once; ++k)
#pragma unroll
        for (int i = 0; i < tall; ++i)
#pragma unroll
          for (int c = 0; c < lanes; ++c)
            if (weights[k][i] > 0 && read.has(first + c)) values[i][c] += weights[k][i] * loaded[k][c];
    }
  }
}

// Sets `values`, which are 0, to those of the wanted pixels from (y, x) down, not normalised yet, and `inside` to the
// weights that were inside.
template <bool adjoint, bool whole, int tall, int lanes, bool more, typename In, typename Acc>
__device__ void fetch(const Reader<lanes, more, In, Acc>& read, int first, int y, int x, const bool (&wanted)[tall],
                      Acc (&values)[tall][lanes], Acc (&inside)[tall]) {
  if constexpr (adjoint && !whole) {
    gather(read, first, y, x, values);
  } else {
#pragma unroll
    for (int k = 0; k < tall; ++k) {
      if (!wanted[k]) continue;
      if constexpr (whole) inside[k] = copy<adjoint>(read, first, y + k, x, values[k]);
      else inside[k] = sample(read, first, y + k, x, values[k]);
    }
  }
}

// What pixel (y, x) adds to the sum over the image that contrast mixes in: in the adjoint, all it gives to inputs.
template <bool adjoint, int lanes, bool more, typename In, typename Acc>
__device__ Acc contribution(const Reader<lanes, more, In, Acc>& read, int y, int x) {
  Acc weight = 1;
  if constexpr (adjoint) {
    const Point<Acc> source = read.t.source(y, x);
    const int height = read.call.height, width = read.call.width;
    const Inside<Acc> rows(taps(source.y, height), height), columns(taps(source.x, width), width);
    weight = read.t.cut(y, x) ? 0 : rows.sum() * columns.sum();
  }
  Acc sum = 0;
#pragma unroll 1
  for (int first = 0; first < read.channels(); first += lanes) {
    Acc values[lanes] = {};
    read.add(weight, read.at(y, x), first, values);
    if constexpr (!adjoint) read.normalise(first, 1, values);
#pragma unroll
    for (int k = 0; k < lanes; ++k) sum += values[k];
  }
  return sum;
}

}  // namespace
}  // namespace mim4dd
