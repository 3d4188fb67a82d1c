// The CPU kernel: images in parallel, by the best instruction set that the machine has.
#include "cpu_images.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <type_traits>

#include "../isa.h"
#include "kernels.h"

namespace mim4dd {
namespace {

template <typename In, typename Out, typename Acc>
auto* best() {
#ifdef MIM4DD_X86
  // Not for the short floats: their conversions are inline functions of torch, see buffer.h.
  if constexpr (!std::is_same_v<In, c10::Half> && !std::is_same_v<In, c10::BFloat16>)
    if (isa() != Isa::kBaseline) return avx2::augment_images<In, Out, Acc>;
#endif
  return baseline::augment_images<In, Out, Acc>;
}

}  // namespace

void augment_cpu(const Call& call, torch::headeronly::ScalarType dtype) {
  dispatch(dtype, [&]<typename In, typename Out, typename Acc>(Types<In, Out, Acc>) {
    // A thread is worth waking for some 32k values.
    const int64_t values = int64_t{1} * call.channels * call.height * call.width;
    torch::stable::parallel_for(0, call.batch, std::max<int64_t>(1, 32768 / values), [&](int64_t begin, int64_t end) {
      best<In, Out, Acc>()(call, begin, end);
    });
  });
}

}  // namespace mim4dd
