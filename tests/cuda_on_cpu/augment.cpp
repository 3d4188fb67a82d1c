// The augmentation's CUDA kernels in the place of those for a CPU.
#include <limits>

#include "../../csrc/augment/cuda.cu"

namespace mim4dd {

void augment_cpu(const Call& call, torch::headeronly::ScalarType dtype) {
  // As new memory on a GPU may be: what was not written must not be read.
  std::vector<double> sums(call.batch * kSums, std::numeric_limits<double>::quiet_NaN());
  augment_cuda(call, dtype, sums.data(), nullptr);
}

}  // namespace mim4dd
