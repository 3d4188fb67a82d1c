// The CUDA kernels: plain pointers, sizes and a stream. A thread makes one pixel of the result, all its channels.
//
// The adjoint of bilinear sampling gathers: a pixel looks through the few places of the gradient that may have
// sampled it, found by the inverse map, and asks each for its weight. No atomics, so equal bits every time.
#include <cuda_runtime.h>

#include <stdexcept>
#include <type_traits>

#include "kernels.h"

namespace mim4dd {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 4;  // channels a thread keeps in registers at once
// Up to this many values, a block that needs the mean of its image reads it all, which spares a launch. Above, the
// mean is summed in kSums parts, each by a block of its own.
constexpr int64_t kSmallImage = 16384;

struct Range {
  int begin, end;
};

// Reads the stored pixels of one image.
template <typename In, typename Acc>
struct Reader {
  const Call& call;
  const Transform<Acc>& t;
  const In* image;

  __device__ Acc operator()(int channel, int y, int x) const {
    const Strides& s = call.in_strides;
    return static_cast<Acc>(image[channel * s.channel + y * s.y + x * s.x]);
  }
  __device__ Affine<Acc> normal(int channel) const {
    return normalisation<Acc>(call, channel, std::is_same_v<In, uint8_t>);
  }
  __device__ bool inside(int y, int x) const { return y >= 0 && y < call.height && x >= 0 && x < call.width; }
};

// Channels first..first+3 at output pixel (y, x), sampled with zeros outside; returns the weight that was inside.
template <typename In, typename Acc>
__device__ Acc sample(const Reader<In, Acc>& read, int first, int y, int x, Acc (&values)[kLanes]) {
  const Point<Acc> source = read.t.source(y, x);
  const Taps<Acc> v = taps(source.y, read.call.height), h = taps(source.x, read.call.width);
  Acc total = 0;
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    const int down = corner / 2, right = corner % 2, from_y = v.low + down - 1, from_x = h.low + right - 1;
    const Acc weight = (down ? v.fraction : 1 - v.fraction) * (right ? h.fraction : 1 - h.fraction);
    if (weight == 0 || !read.inside(from_y, from_x)) continue;
    total += weight;
#pragma unroll
    for (int k = 0; k < kLanes; ++k)
      if (first + k < read.call.channels) values[k] += weight * read(first + k, from_y, from_x);
  }
#pragma unroll
  for (int k = 0; k < kLanes; ++k) {
    if (first + k >= read.call.channels) break;
    const Affine<Acc> n = read.normal(first + k);
    values[k] = values[k] * n.scale + n.shift * total;
  }
  return total;
}

// Where along one axis an output can lie that samples within a pixel of the centre; everywhere if that is unknown.
template <typename Acc>
__device__ Range candidates(Acc centre, Acc reach, int size) {
  const Acc low = ceil(centre - reach), high = floor(centre + reach);  // compared so that a NaN is everywhere
  return {low > 0 ? static_cast<int>(low < size ? low : size) : 0,
          high < size - 1 ? static_cast<int>(high > -1 ? high : -1) + 1 : size};
}

// The adjoint: what input pixel (y, x) gave to every output, weighted with the gradients there.
template <typename In, typename Acc>
__device__ Acc gather(const Reader<In, Acc>& read, int first, int y, int x, Acc (&values)[kLanes]) {
  const Transform<Acc>& t = read.t;
  const Acc inverse = 1 / (t.xx * t.yy - t.xy * t.yx);
  const Acc from_y = static_cast<Acc>(y) - t.centre_y - t.shift_y, from_x = static_cast<Acc>(x) - t.centre_x - t.shift_x;
  const Acc slack = 1 + static_cast<Acc>(1e-6) * (read.call.height + read.call.width);  // for rounding
  const Range rows = candidates((t.xx * from_y - t.yx * from_x) * inverse + t.centre_y,
                                (abs(t.xx) + abs(t.yx)) * abs(inverse) * slack, read.call.height);
  const Range columns = candidates((t.yy * from_x - t.xy * from_y) * inverse + t.centre_x,
                                   (abs(t.yy) + abs(t.xy)) * abs(inverse) * slack, read.call.width);
  for (int to_y = rows.begin; to_y < rows.end; ++to_y) {
    for (int to_x = columns.begin; to_x < columns.end; ++to_x) {
      const Point<Acc> source = t.source(to_y, to_x);
      const Acc weight_y = 1 - abs(source.y - y), weight_x = 1 - abs(source.x - x);
      if (!(weight_y > 0 && weight_x > 0) || t.cut(to_y, to_x)) continue;
#pragma unroll
      for (int k = 0; k < kLanes; ++k)
        if (first + k < read.call.channels) values[k] += weight_y * weight_x * read(first + k, to_y, to_x);
    }
  }
  return 1;
}

template <bool adjoint, typename In, typename Acc>
__device__ Acc fetch(const Reader<In, Acc>& read, int first, int y, int x, Acc (&values)[kLanes]) {
  if constexpr (adjoint) return gather(read, first, y, x, values);
  else return sample(read, first, y, x, values);
}

// What pixel (y, x) adds to the sum over the image that contrast mixes in: in the adjoint, all it gives to inputs.
template <bool adjoint, typename In, typename Acc>
__device__ Acc contribution(const Reader<In, Acc>& read, int y, int x) {
  Acc weight = 1;
  if constexpr (adjoint) {
    if (read.t.cut(y, x)) return 0;
    const Point<Acc> source = read.t.source(y, x);
    const Taps<Acc> v = taps(source.y, read.call.height), h = taps(source.x, read.call.width);
    const auto inside = [](const Taps<Acc>& tap, int size) {
      return (tap.low >= 1 && tap.low <= size ? 1 - tap.fraction : 0) + (tap.low < size ? tap.fraction : 0);
    };
    weight = inside(v, read.call.height) * inside(h, read.call.width);
    if (weight == 0) return 0;
  }
  Acc sum = 0;
  for (int c = 0; c < read.call.channels; ++c) {
    const Affine<Acc> n = read.normal(c);
    sum += read(c, y, x) * n.scale + n.shift;
  }
  return weight * sum;
}

// Every thread of a block returns the sum over every `step`-th pixel of an image from `begin` on, added up in a fixed
// tree, so with equal bits every time.
template <bool adjoint, typename In, typename Acc>
__device__ Acc block_sum(const Reader<In, Acc>& read, int begin, int step) {
  __shared__ Acc partial[kThreads];
  Acc sum = 0;
  for (int p = begin + threadIdx.x; p < read.call.height * read.call.width; p += step)
    sum += contribution<adjoint>(read, p / read.call.width, p % read.call.width);
  partial[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
  }
  __syncthreads();
  return partial[0];
}

// What the parameters of `image` do, computed once for a block; false where they are invalid.
template <typename Acc>
__device__ bool load_transform(const Call& call, int64_t image, Transform<Acc>& shared) {
  __shared__ Acc fields[kFields];
  const int64_t row = call.row(image);
  if (row < 0 || row >= call.num_rows) return false;
  if (threadIdx.x < kFields) fields[threadIdx.x] = call.fields[threadIdx.x].at<Acc>(row);
  __syncthreads();
  if (threadIdx.x == 0) shared = Transform<Acc>(call, fields);
  __syncthreads();
  bool finite = true;
  for (int field = 0; field < kFields; ++field) finite = finite && isfinite(fields[field]);
  return finite;
}

template <typename In, typename Acc>
__device__ const In* image_of(const Call& call, int64_t image) {
  return static_cast<const In*>(call.in) + image * call.in_strides.batch;
}

template <bool adjoint, typename In, typename Acc>
__global__ void __launch_bounds__(kThreads, 1) sums_kernel(const __grid_constant__ Call call, Acc* sums) {
  __shared__ Transform<Acc> t;
  const int64_t image = blockIdx.x / kSums;
  if (!load_transform(call, image, t) || t.level == 0) return;
  const Reader<In, Acc> read{call, t, image_of<In, Acc>(call, image)};
  const Acc sum = block_sum<adjoint>(read, (blockIdx.x % kSums) * kThreads, kSums * kThreads);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// `sums` is null for small images. The blocks of an image share its pixels out.
template <bool adjoint, typename In, typename Out, typename Acc>
__global__ void __launch_bounds__(kThreads, 1)
    augment_kernel(const __grid_constant__ Call call, const Acc* sums, int blocks_per_image) {
  __shared__ Transform<Acc> t;
  const int64_t image = blockIdx.x / blocks_per_image;
  const bool valid = load_transform(call, image, t);
  const Reader<In, Acc> read{call, t, image_of<In, Acc>(call, image)};
  Acc mean = 0;
  if (valid && t.level != 0) {
    if (sums)
      for (int part = 0; part < kSums; ++part) mean += sums[image * kSums + part];
    else
      mean = block_sum<adjoint>(read, 0, kThreads);
    mean /= static_cast<Acc>(call.height) * call.width * call.channels;
  }

  const Strides& s = call.out_strides;
  const int pixels = call.height * call.width, step = blocks_per_image * kThreads;
  for (int p = (blockIdx.x % blocks_per_image) * kThreads + threadIdx.x; p < pixels; p += step) {
    const int y = p / call.width, x = p % call.width;
    Out* out = static_cast<Out*>(call.out) + image * s.batch + y * s.y + x * s.x;
    const bool cut = !adjoint && valid && t.cut(y, x);
    Acc grey = 0;
    if (valid && !cut && t.grey != 0 && call.channels > kLanes) {  // otherwise the lanes hold all it takes
      for (int first = 0; first < call.channels; first += kLanes) {
        Acc values[kLanes] = {};
        fetch<adjoint>(read, first, y, x, values);
        grey += values[0] + values[1] + values[2] + values[3];
      }
    }
    for (int first = 0; first < call.channels; first += kLanes) {
      Acc values[kLanes] = {};
      Acc inside = 0;
      if (valid && !cut) inside = fetch<adjoint>(read, first, y, x, values);
      if (call.channels <= kLanes) grey = values[0] + values[1] + values[2] + values[3];
#pragma unroll
      for (int k = 0; k < kLanes; ++k) {
        if (first + k >= call.channels) break;
        const Acc coloured = cut ? 0 : t.colour(values[k], grey / call.channels, mean, inside);
        out[(first + k) * s.channel] = static_cast<Out>(valid ? coloured : static_cast<Acc>(NAN));
      }
    }
  }
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

template <bool adjoint, typename In, typename Out, typename Acc>
void launch(const Call& call, Acc* sums, cudaStream_t stream) {
  const int64_t pixels = int64_t{1} * call.height * call.width;
  const bool small = pixels * call.channels <= kSmallImage;
  // A small image is one block's, whose second reading comes from the cache; a large one is spread over many.
  const int64_t blocks = small ? 1 : (pixels + 4 * kThreads - 1) / (4 * kThreads);
  if (!small) {
    sums_kernel<adjoint, In, Acc><<<static_cast<unsigned>(call.batch * kSums), kThreads, 0, stream>>>(call, sums);
    check(cudaGetLastError());
  }
  augment_kernel<adjoint, In, Out, Acc><<<static_cast<unsigned>(call.batch * blocks), kThreads, 0, stream>>>(
      call, small ? nullptr : sums, static_cast<int>(blocks));
  check(cudaGetLastError());
}

}  // namespace

void augment_cuda(const Call& call, torch::headeronly::ScalarType dtype, void* sums, void* stream) {
  dispatch(dtype, [&]<typename In, typename Out, typename Acc>(Types<In, Out, Acc>) {
    auto* launcher = launch<false, In, Out, Acc>;
    if constexpr (std::is_same_v<In, Out>)  // bytes have no gradient
      if (call.adjoint) launcher = launch<true, In, Out, Acc>;
    launcher(call, static_cast<Acc*>(sums), static_cast<cudaStream_t>(stream));
  });
}

}  // namespace mim4dd
