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

// A thread's pixels of a part of an image: every kThreads-th. Counted on, for a division takes longer than a load.
struct Walk {
  int left, y, x, width, down, across;

  __device__ Walk(const Call& call, int begin, int end)
      : left(end - begin - static_cast<int>(threadIdx.x)), width(call.width), down(kThreads / width),
        across(kThreads % width) {
    const int first = begin + threadIdx.x;
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

// Reads the stored pixels of one image, `lanes` channels at once: all there are, or if `more`, some of them.
template <int lanes, bool more, typename In, typename Acc>
struct Reader {
  const Call& call;
  const Transform<Acc> t;
  const In* const image;
  Affine<Acc> first_normal[lanes];

  __device__ Reader(const Call& call, const Transform<Acc>& t, int64_t image)
      : call(call), t(t), image(static_cast<const In*>(call.in) + image * call.in_strides.batch) {
#pragma unroll
    for (int k = 0; k < lanes; ++k) first_normal[k] = has(k) ? normalised(k) : Affine<Acc>{};
  }
  __device__ int channels() const { return more ? call.channels : lanes; }
  __device__ bool has(int channel) const { return !more || channel < call.channels; }

  __device__ const In* at(int channel, int y, int x) const {
    const Strides& s = call.in_strides;
    return image + (channel * s.channel + y * s.y + x * s.x);
  }
  // The channels from `first` on, whose first value is at `from`.
  __device__ void load(const In* from, int first, Acc (&values)[lanes]) const {
#pragma unroll
    for (int k = 0; k < lanes; ++k) {
      if (has(first + k)) values[k] = static_cast<Acc>(*from);
      from += call.in_strides.channel;
    }
  }
  // Adds them with a weight; reads nothing where that is 0.
  __device__ void add(Acc weight, const In* from, int first, Acc (&values)[lanes]) const {
    Acc loaded[lanes] = {};
    if (weight != 0) load(from, first, loaded);
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
  if (!(adjoint && t.cut(from_y, from_x))) read.load(read.at(first, from_y, from_x), first, values);
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
  const In* corner = read.at(first, v.low - 1, h.low - 1);
  const int64_t down = read.call.in_strides.y, across = read.call.in_strides.x;
  read.add(rows.low * columns.low, corner, first, values);
  read.add(rows.low * columns.high, corner + across, first, values);
  read.add(rows.high * columns.low, corner + down, first, values);
  read.add(rows.high * columns.high, corner + down + across, first, values);
  return rows.sum() * columns.sum();
}

struct Range {
  int begin, end;
};

// Where along one axis an output can lie that samples within a pixel of the centre; everywhere if that is unknown.
template <typename Acc>
__device__ Range candidates(Acc centre, Acc reach, int size) {
  const Acc low = ceil(centre - reach), high = floor(centre + reach);  // compared so that a NaN is everywhere
  return {low > 0 ? static_cast<int>(low < size ? low : size) : 0,
          high < size - 1 ? static_cast<int>(high > -1 ? high : -1) + 1 : size};
}

// The adjoint of `sample`: what input pixel (y, x) gave to every output, weighted with the gradients there.
template <int lanes, bool more, typename In, typename Acc>
__device__ Acc gather(const Reader<lanes, more, In, Acc>& read, int first, int y, int x, Acc (&values)[lanes]) {
  const Transform<Acc>& t = read.t;
  const Acc inverse = 1 / (t.xx * t.yy - t.xy * t.yx);
  const Acc from_y = static_cast<Acc>(y) - t.centre_y - t.shift_y, from_x = static_cast<Acc>(x) - t.centre_x - t.shift_x;
  const Acc slack = 1 + static_cast<Acc>(1e-6) * (read.call.height + read.call.width);  // for rounding
  const Range rows = candidates((t.xx * from_y - t.yx * from_x) * inverse + t.centre_y,
                                (abs(t.xx) + abs(t.yx)) * abs(inverse) * slack, read.call.height);
  const Range columns = candidates((t.yy * from_x - t.xy * from_y) * inverse + t.centre_x,
                                   (abs(t.yy) + abs(t.xy)) * abs(inverse) * slack, read.call.width);
  for (int to_y = rows.begin; to_y < rows.end; ++to_y) {
    const In* from = read.at(first, to_y, columns.begin);
    for (int to_x = columns.begin; to_x < columns.end; ++to_x) {
      const Point<Acc> source = t.source(to_y, to_x);
      const Acc weight_y = 1 - abs(source.y - y), weight_x = 1 - abs(source.x - x);
      const bool sampled = weight_y > 0 && weight_x > 0 && !t.cut(to_y, to_x);
      read.add(sampled ? weight_y * weight_x : 0, from, first, values);
      from += read.call.in_strides.x;
    }
  }
  return 1;
}

// Sets `values`, which are 0, to those at pixel (y, x), not normalised yet; returns the weight that was inside.
template <bool adjoint, bool whole, int lanes, bool more, typename In, typename Acc>
__device__ Acc fetch(const Reader<lanes, more, In, Acc>& read, int first, int y, int x, Acc (&values)[lanes]) {
  if constexpr (whole) return copy<adjoint>(read, first, y, x, values);
  else if constexpr (adjoint) return gather(read, first, y, x, values);
  else return sample(read, first, y, x, values);
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
    read.add(weight, read.at(first, y, x), first, values);
    if constexpr (!adjoint) read.normalise(first, 1, values);
#pragma unroll
    for (int k = 0; k < lanes; ++k) sum += values[k];
  }
  return sum;
}

}  // namespace
}  // namespace mim4dd
