// The work of one thread on the CPU, compiled once for each instruction set: MIM4DD_ISA names its namespace.
#ifndef MIM4DD_ISA
#define MIM4DD_ISA baseline
#define MIM4DD_SHORT_FLOATS  // whose conversions are inline functions of torch, see buffer.h
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#endif

#include "cpu_images.h"
#include "worker.h"

namespace mim4dd::MIM4DD_ISA {

template <typename In, typename Out, typename Acc>
void augment_images(const Call& call, int64_t begin, int64_t end) {
  Worker<In, Out, Acc> worker(call);
  for (int64_t image = begin; image < end; ++image) worker.run(image);
}

template void augment_images<float, float, float>(const Call&, int64_t, int64_t);
template void augment_images<double, double, double>(const Call&, int64_t, int64_t);
template void augment_images<uint8_t, float, float>(const Call&, int64_t, int64_t);

#ifdef MIM4DD_SHORT_FLOATS
template void augment_images<c10::Half, c10::Half, float>(const Call&, int64_t, int64_t);
template void augment_images<c10::BFloat16, c10::BFloat16, float>(const Call&, int64_t, int64_t);
#endif

}  // namespace mim4dd
