// The CPU kernel: images in parallel.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "kernels.h"
#include "worker.h"

namespace mim4dd {

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
