// The CUDA kernels: plain pointers, sizes and a stream. A thread makes pixels of the result, all their channels.
#include <cuda_runtime.h>

#include <limits>
#include <stdexcept>
#include <type_traits>

#include "kernels.h"
#include "pixels.cuh"

namespace mim4dd {
namespace {

constexpr int kPart = 8 * kThreads;  // pixels of a large image that a block makes: neighbours, for the cache's sake
// Up to this many values, a block that needs the mean of its image reads it all, which spares a launch. Above, the
// mean is summed in kSums parts, each by a block of its own.
constexpr int64_t kSmallImage = 16384;

// Every thread of a block returns the sum over a part of an image, added up in a fixed tree, so with equal bits every
// time.
template <bool adjoint, int lanes, bool more, typename In, typename Acc>
__device__ Acc block_sum(const Reader<lanes, more, In, Acc>& read, Range part) {
  __shared__ Acc of_warps[kThreads / 32];
  Acc sum = 0;
#pragma unroll 4
  for (Walk at(read.call.width, part); !at.done(); at.next()) sum += contribution<adjoint>(read, at.y, at.x);
#pragma unroll
  for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffff, sum, other);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0;
#pragma unroll
  for (int warp = 0; warp < kThreads / 32; ++warp) sum += of_warps[warp];
  return sum;
}

// What the parameters of `image` do, computed once for a block; false where they are invalid.
template <typename Acc>
__device__ bool load_transform(const Call& call, int64_t image, Transform<Acc>& shared) {
  __shared__ Acc fields[kFields];
  const int64_t row = call.row(image);
  if (row < 0 || row >= call.num_rows) return false;
  // Threads of a warp load different dtypes one after the other, so at most two fields a warp.
  const int field = threadIdx.x / 16;
  if (threadIdx.x % 16 == 0 && field < kFields) fields[field] = call.fields[field].at<Acc>(row);
  __syncthreads();
  if (threadIdx.x == 0) shared = Transform<Acc>(call, fields);
  bool finite = true;
  for (int field = 0; field < kFields; ++field) finite = finite && isfinite(fields[field]);
  __syncthreads();
  return finite;
}

// On a multiprocessor at once, at least. More would need registers that the adjoint has better uses for.
constexpr int blocks_of(bool adjoint, size_t size) { return size > 4 ? 2 : adjoint ? 3 : 4; }

template <bool adjoint, int lanes, bool more, typename In, typename Acc>
__global__ void __launch_bounds__(kThreads, blocks_of(adjoint, sizeof(Acc)))
    sums_kernel(const __grid_constant__ Call call, Acc* sums) {
  __shared__ Transform<Acc> t;
  const int64_t image = blockIdx.x / kSums;
  if (!load_transform(call, image, t) || t.level == 0) return;
  const Reader<lanes, more, In, Acc> read(call, t, image);
  const Acc sum = block_sum<adjoint>(read, part_of(call.height * call.width, kSums, blockIdx.x % kSums));
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// Writes a part of an image, with the mean that contrast mixes in. A thread makes some pixels below one another at
// once: they share arithmetic and what they read, and one alone would wait for memory.
template <bool adjoint, bool whole, typename Out, int lanes, bool more, typename In, typename Acc>
__device__ void write(const Reader<lanes, more, In, Acc>& read, Out* out, int parts, int part, Acc mean) {
  using Offset = typename Reader<lanes, more, In, Acc>::Offset;
  constexpr int tall = more ? 1 : whole ? 4 : 2;
  const Strides& s = read.call.out_strides;
  const Transform<Acc>& t = read.t;
  const Acc grey = t.grey / read.channels(), constant = t.offset + t.level * mean;
  const int height = read.call.height, width = read.call.width;
  for (Walk at(width, part_of(((height - 1) / tall + 1) * width, parts, part)); !at.done(); at.next()) {
    const int y = at.y * tall, x = at.x;
    bool cut[tall], wanted[tall];
#pragma unroll
    for (int k = 0; k < tall; ++k) {
      cut[k] = !adjoint && t.cut(y + k, x);
      wanted[k] = y + k < height && !cut[k];
    }
    Acc of_channels = 0;
    if (more && grey != 0 && !cut[0]) {  // otherwise the lanes hold all it takes
#pragma unroll 1
      for (int first = 0; first < read.channels(); first += lanes) {
        Acc values[tall][lanes] = {}, inside[tall] = {};
        fetch<adjoint, whole>(read, first, y, x, wanted, values, inside);
        if constexpr (!adjoint) read.normalise(first, inside[0], values[0]);
#pragma unroll
        for (int c = 0; c < lanes; ++c) of_channels += values[0][c];
      }
    }
#pragma unroll 1
    for (int first = 0; first < read.channels(); first += lanes) {
      Acc values[tall][lanes] = {}, inside[tall] = {};
      fetch<adjoint, whole>(read, first, y, x, wanted, values, inside);
#pragma unroll
      for (int k = 0; k < tall; ++k) {
        if (y + k >= height) break;
        if constexpr (!adjoint) read.normalise(first, inside[k], values[k]);
        if constexpr (!more) {
          of_channels = 0;
#pragma unroll
          for (int c = 0; c < lanes; ++c) of_channels += values[k][c];
        }
        const Acc offset = grey * of_channels + constant * (adjoint ? 1 : inside[k]);
        const Offset pixel = offset_of<Offset>(s, y + k, x);
#pragma unroll
        for (int c = 0; c < lanes; ++c)
          if (read.has(first + c))
            (out + (first + c) * s.channel)[pixel] = static_cast<Out>(cut[k] ? 0 : t.gain * values[k][c] + offset);
      }
    }
  }
}

// `sums` is null for small images. Every block makes one of `parts` parts of an image.
template <bool adjoint, int lanes, bool more, typename In, typename Out, typename Acc>
__global__ void __launch_bounds__(kThreads, blocks_of(adjoint, sizeof(Acc)))
    augment_kernel(const __grid_constant__ Call call, const Acc* sums, int parts) {
  __shared__ Transform<Acc> t;
  const int64_t image = call.batch - 1 - blockIdx.x / parts;  // those summed last are in the cache
  const int part = blockIdx.x % parts, pixels = call.height * call.width;
  Out* out = static_cast<Out*>(call.out) + image * call.out_strides.batch;
  if (!load_transform(call, image, t)) {
    const Strides& s = call.out_strides;
    for (Walk at(call.width, part_of(pixels, parts, part)); !at.done(); at.next())
      for (int channel = 0; channel < call.channels; ++channel)
        out[channel * s.channel + at.y * s.y + at.x * s.x] = static_cast<Out>(static_cast<Acc>(NAN));
    return;
  }
  const Reader<lanes, more, In, Acc> read(call, t, image);
  Acc mean = 0;
  if (t.level != 0) {
    if (sums)
      for (int k = 0; k < kSums; ++k) mean += sums[image * kSums + k];
    else
      mean = block_sum<adjoint>(read, {0, pixels});
    mean /= static_cast<Acc>(pixels) * call.channels;
  }
  if (t.moves_whole_pixels()) write<adjoint, true>(read, out, parts, part, mean);
  else write<adjoint, false>(read, out, parts, part, mean);
}

template <typename... Parameters, typename... Arguments>
void start(void (*kernel)(Parameters...), int64_t blocks, cudaStream_t stream, Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

template <bool adjoint, int lanes, bool more, typename In, typename Out, typename Acc>
void launch(const Call& call, Acc* sums, cudaStream_t stream) {
  const int pixels = call.height * call.width;
  const bool small = int64_t{1} * pixels * call.channels <= kSmallImage;
  // A small image is one block's, whose second reading comes from the cache.
  const int parts = small ? 1 : (pixels - 1) / kPart + 1;
  if (small) sums = nullptr;
  else start(sums_kernel<adjoint, lanes, more, In, Acc>, call.batch * kSums, stream, call, sums);
  start(augment_kernel<adjoint, lanes, more, In, Out, Acc>, call.batch * parts, stream, call, sums, parts);
}

// Whether an int holds the offset of every pixel within a channel, and of those next to them.
bool lies_close(const Call& call, const Strides& strides) {
  constexpr int64_t half = std::numeric_limits<int>::max() / 2;
  return strides.y <= half / (call.height + 2) && strides.x <= half / (call.width + 2);
}

}  // namespace

void augment_cuda(const Call& call, torch::headeronly::ScalarType dtype, void* sums, void* stream) {
  dispatch(dtype, [&]<typename In, typename Out, typename Acc>(Types<In, Out, Acc>) {
    const auto launch_for = [&]<bool adjoint>(std::bool_constant<adjoint>) {
      auto* launcher = launch<adjoint, 4, true, In, Out, Acc>;
      const bool close = lies_close(call, call.in_strides) && lies_close(call, call.out_strides);
      if (close && call.channels == 1) launcher = launch<adjoint, 1, false, In, Out, Acc>;
      if (close && call.channels == 3) launcher = launch<adjoint, 3, false, In, Out, Acc>;
      launcher(call, static_cast<Acc*>(sums), static_cast<cudaStream_t>(stream));
    };
    if constexpr (std::is_same_v<In, Out>)  // bytes have no gradient
      if (call.adjoint) return launch_for(std::true_type{});
    launch_for(std::false_type{});
  });
}

}  // namespace mim4dd
