// The CUDA kernel: a thread draws a row.
#include <cuda_runtime.h>

#include <stdexcept>

#include "draw.h"

namespace mim4dd {
namespace {

constexpr int kThreads = 128;

__global__ void draw_kernel(const __grid_constant__ DrawCall call) {
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row < call.rows) draw_row(call, row);
}

}  // namespace

void draw_cuda(const DrawCall& call, void* stream) {
  const auto blocks = static_cast<unsigned>((call.rows + kThreads - 1) / kThreads);
  draw_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(call);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess)
    throw std::runtime_error(cudaGetErrorString(error));
}

}  // namespace mim4dd
