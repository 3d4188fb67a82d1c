// Asks the processor once.
#include "isa.h"

#include <cstdlib>
#include <string_view>

namespace mim4dd {
namespace {

Isa best() {
#ifdef MIM4DD_X86
  const char* given = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view most = given ? given : "";
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (most == "default") return Isa::kBaseline;
  if (avx512 && most != "avx2") return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

}  // namespace

Isa isa() {
  static const Isa chosen = best();
  return chosen;
}

}  // namespace mim4dd
