// What cpu_images.cpp is compiled to, once for each instruction set.
#pragma once

#include "augment.h"

namespace mim4dd {

// Augments images begin..end-1 of a call.
namespace baseline {
template <typename In, typename Out, typename Acc>
void augment_images(const Call& call, int64_t begin, int64_t end);
}

namespace avx2 {
template <typename In, typename Out, typename Acc>
void augment_images(const Call& call, int64_t begin, int64_t end);
}

}  // namespace mim4dd
