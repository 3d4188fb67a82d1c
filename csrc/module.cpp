// The Python modules whose import registers the operators: mim4dd._C and, with MIM4DD_CUDA, mim4dd._C_cuda.
#include <pybind11/pybind11.h>

#ifdef MIM4DD_CUDA

PYBIND11_MODULE(_C_cuda, m) { m.doc() = "CUDA kernels of torch.ops.mim4dd.*; importing it registers them"; }

#else

#include <array>

#include "isa.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "torch.ops.mim4dd.* and their CPU kernels; importing it registers them";
  m.def("isa", [] { return std::array{"baseline", "avx2", "avx512"}[static_cast<size_t>(mim4dd::isa())]; },
        "The instruction set that the CPU kernels use.");
}

#endif
