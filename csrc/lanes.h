// Vectors of floats and the product that stays in their registers, for what is compiled once per instruction set.
#pragma once

#include <cstdint>

namespace mim4dd::MIM4DD_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64, kRows = 8;
#elif defined(__AVX__)
constexpr int kBytes = 32, kRows = 4;
#else
constexpr int kBytes = 16, kRows = 4;
#endif
constexpr int kLanes = kBytes / 4;
constexpr int64_t kPanel = 2 * kLanes;  // columns of a product that stay in registers
typedef float Lane __attribute__((vector_size(kBytes)));

inline Lane load(const float* from) {
  Lane lane;
  __builtin_memcpy(&lane, from, sizeof(lane));
  return lane;
}
inline void store(float* to, const Lane& lane) { __builtin_memcpy(to, &lane, sizeof(lane)); }

// c[Rows, kPanel] (+)= a[Rows, depth] b[depth, kPanel], with a(row, k), and the rows of b and c so far apart.
template <int Rows, bool Add, typename A>
inline __attribute__((always_inline)) void product(int64_t depth, const A& a, const float* b, int64_t b_row, float* c,
                                                   int64_t c_row) {
  Lane sum[Rows][2];
  for (int row = 0; row < Rows; ++row) sum[row][0] = sum[row][1] = Lane{};
  for (int64_t k = 0; k < depth; ++k) {
    const Lane left = load(b + k * b_row), right = load(b + k * b_row + kLanes);
#pragma GCC unroll 16
    for (int row = 0; row < Rows; ++row) {
      const float factor = a(row, k);
      sum[row][0] += factor * left;
      sum[row][1] += factor * right;
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < Rows; ++row)
    for (int half = 0; half < 2; ++half) {
      float* to = c + row * c_row + half * kLanes;
      store(to, Add ? load(to) + sum[row][half] : sum[row][half]);
    }
}

}  // namespace
}  // namespace mim4dd::MIM4DD_ISA
