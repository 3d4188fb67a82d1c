// The instruction sets that CPU kernels are compiled for, and the choice of the one that runs.
#pragma once

namespace mim4dd {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// The best of the processor, or less where ATEN_CPU_CAPABILITY=default|avx2 says so, as it does for torch.
Isa isa();

}  // namespace mim4dd

// The version of a function for isa().
#ifdef MIM4DD_X86
#define MIM4DD_BEST(function)                                      \
  (mim4dd::isa() == mim4dd::Isa::kAvx512 ? mim4dd::avx512::function \
   : mim4dd::isa() == mim4dd::Isa::kAvx2 ? mim4dd::avx2::function   \
                                         : mim4dd::baseline::function)
#else
#define MIM4DD_BEST(function) mim4dd::baseline::function
#endif
