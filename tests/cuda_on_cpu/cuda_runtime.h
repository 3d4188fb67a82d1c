// Stands in for CUDA's header on a machine without a GPU: blocks run in turn, and so do the threads of a block, each
// up to where it waits for the others, first to last and then last to first.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __builtin_assume(...)

using std::abs, std::ceil, std::floor, std::isfinite, std::min;

struct dim3 {
  unsigned x = 1;
  dim3() = default;
  explicit dim3(unsigned x) : x(x) {}
};
inline dim3 threadIdx, blockIdx;

struct Thread {
  ucontext_t here;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool ended;
};
inline std::vector<Thread> threads;
inline ucontext_t waiting_for_all;
inline std::function<void()> work;

inline void run_thread() {
  work();
  threads[threadIdx.x].ended = true;
}

inline void run_block(unsigned size) {
  threads.resize(size);
  for (Thread& thread : threads) {
    getcontext(&thread.here);
    thread.here.uc_stack.ss_sp = thread.stack.data();
    thread.here.uc_stack.ss_size = thread.stack.size();
    thread.here.uc_link = &waiting_for_all;
    makecontext(&thread.here, run_thread, 0);
    thread.ended = false;
  }
  const auto count_ended = [] { return std::count_if(threads.begin(), threads.end(), std::mem_fn(&Thread::ended)); };
  for (bool backwards = false; count_ended() < size; backwards = !backwards)
    for (unsigned k = 0; k < size; ++k) {
      threadIdx.x = backwards ? size - 1 - k : k;
      if (threads[threadIdx.x].ended) std::abort();  // others wait for it for ever
      swapcontext(&waiting_for_all, &threads[threadIdx.x].here);
    }
}

inline void __syncthreads() { swapcontext(&threads[threadIdx.x].here, &waiting_for_all); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  static T values[1024];
  values[threadIdx.x] = value;
  __syncthreads();
  const T other = values[threadIdx.x ^ lanes];
  __syncthreads();
  return other;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  work = [=] { kernel(arguments...); };
  for (blockIdx.x = 0; blockIdx.x < config->gridDim.x; ++blockIdx.x) run_block(config->blockDim.x);
  return cudaSuccess;
}
