// Vectors of four and of eight numbers, in registers of whatever width the target has (GCC and Clang).
#pragma once

#include <cstdint>
#include <type_traits>

namespace mim4dd::MIM4DD_ISA {

// The compiler must see that a count is four, to keep the vectors in registers.
#define MIM4DD_ALWAYS __attribute__((always_inline))
#define MIM4DD_INLINE inline MIM4DD_ALWAYS

// Before version 12, GCC shuffles by another name, and only between vectors of one length.
#if defined(__clang__) || __GNUC__ >= 12
#define MIM4DD_SHUFFLES 1
#else
#define MIM4DD_SHUFFLES 0
#endif

template <typename Acc>
struct Vectors {
  typedef Acc Quad __attribute__((vector_size(4 * sizeof(Acc)), aligned(sizeof(Acc)), may_alias));
  typedef Acc Pair __attribute__((vector_size(8 * sizeof(Acc)), aligned(sizeof(Acc)), may_alias));
  typedef std::conditional_t<sizeof(Acc) == 4, int32_t, int64_t> Indices __attribute__((vector_size(4 * sizeof(Acc))));
};

// Four by four numbers: the four channels of four pixels, or its transpose, four pixels of each of four channels.
template <typename Acc>
struct Square {
  using Quad = typename Vectors<Acc>::Quad;
  using Pair = typename Vectors<Acc>::Pair;
  Quad row[4];

  MIM4DD_INLINE Square transposed() const {
    Quad a = low(row[0], row[2]), b = low(row[1], row[3]), c = high(row[0], row[2]), d = high(row[1], row[3]);
    return {{low(a, b), high(a, b), low(c, d), high(c, d)}};
  }

  MIM4DD_INLINE static Pair twice(const Quad& q) {
#if MIM4DD_SHUFFLES
    return __builtin_shufflevector(q, q, 0, 1, 2, 3, 0, 1, 2, 3);
#else
    return Pair{q[0], q[1], q[2], q[3], q[0], q[1], q[2], q[3]};
#endif
  }

 private:
  // The lower, the upper halves of two vectors in turns.
#if MIM4DD_SHUFFLES
  MIM4DD_INLINE static Quad low(const Quad& p, const Quad& q) { return __builtin_shufflevector(p, q, 0, 4, 1, 5); }
  MIM4DD_INLINE static Quad high(const Quad& p, const Quad& q) { return __builtin_shufflevector(p, q, 2, 6, 3, 7); }
#else
  using Indices = typename Vectors<Acc>::Indices;
  MIM4DD_INLINE static Quad low(const Quad& p, const Quad& q) { return __builtin_shuffle(p, q, Indices{0, 4, 1, 5}); }
  MIM4DD_INLINE static Quad high(const Quad& p, const Quad& q) { return __builtin_shuffle(p, q, Indices{2, 6, 3, 7}); }
#endif
};

// step(i, 4) for every four of `count`, and step(i, few) for those that are left.
template <typename Step>
MIM4DD_INLINE void by_fours(int count, const Step& step) {
  int i = 0;
  for (; i + 4 <= count; i += 4) step(i, 4);
  if (i < count) step(i, count - i);
}

}  // namespace mim4dd
