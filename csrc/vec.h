// Neighbouring channels, of any dtype in memory, as a vector, for what is compiled once per instruction set.
#pragma once

#include <cstdint>

namespace mim4dd::MIM4DD_ISA {
namespace {

typedef uint16_t Bits16 __attribute__((vector_size(32)));
typedef uint32_t Bits32 __attribute__((vector_size(64)));

struct BFloat16 {
  uint16_t bits;
};

// 64 bytes of accumulators, in registers of whatever width there is.
template <typename Acc>
struct Lanes {
  typedef Acc type __attribute__((vector_size(64)));
  static constexpr int count = 64 / sizeof(Acc);
};

template <typename T, typename V>
inline void load(V& to, const T* from) {
  __builtin_memcpy(&to, from, sizeof(V));
}

inline void load(Lanes<float>::type& to, const BFloat16* from) {
  Bits16 bits;
  __builtin_memcpy(&bits, from, sizeof(bits));
  to = (Lanes<float>::type)(__builtin_convertvector(bits, Bits32) << 16);
}

template <typename T, typename V>
inline void store(T* to, const V& from) {
  __builtin_memcpy(to, &from, sizeof(V));
}

inline void store(BFloat16* to, const Lanes<float>::type& from) {
  const Bits32 bits = (Bits32)from;
  const Bits32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const Bits32 result = from == from ? rounded : Bits32{} + 0x7fc0;
  const Bits16 narrow = __builtin_convertvector(result, Bits16);
  __builtin_memcpy(to, &narrow, sizeof(narrow));
}

// `Groups` times 64 bytes of neighbouring channels; of a single group, only the first `count` may be in memory.
template <typename Acc, int Groups>
struct Vec {
  using Lane = typename Lanes<Acc>::type;
  static constexpr int kLanes = Lanes<Acc>::count;
  Lane lane[Groups];

  Vec() = default;
  Vec(Acc value) {
    for (int g = 0; g < Groups; ++g) lane[g] = Lane{} + value;
  }

  template <typename T>
  static Vec read(const T* from, int count) {
    Vec result;
    if (Groups == 1 && count < kLanes) {
      T padded[kLanes] = {};
      for (int i = 0; i < count; ++i) padded[i] = from[i];
      load(result.lane[0], padded);
    } else {
      for (int g = 0; g < Groups; ++g) load(result.lane[g], from + g * kLanes);
    }
    return result;
  }

  template <typename T>
  void write(T* to, int count) const {
    if (Groups == 1 && count < kLanes) {
      T padded[kLanes];
      store(padded, lane[0]);
      for (int i = 0; i < count; ++i) to[i] = padded[i];
    } else {
      for (int g = 0; g < Groups; ++g) store(to + g * kLanes, lane[g]);
    }
  }

  // Not-a-number passes, as in torch's ReLU.
  Vec keep_unless_negative(const Vec& sign) const {
    Vec result;
    for (int g = 0; g < Groups; ++g) result.lane[g] = sign.lane[g] <= Lane{} ? Lane{} : lane[g];
    return result;
  }

  Vec inverse_root() const {
    Vec result;
    for (int g = 0; g < Groups; ++g)
      for (int i = 0; i < kLanes; ++i)
        result.lane[g][i] = 1 / (sizeof(Acc) == 8 ? __builtin_sqrt(lane[g][i]) : __builtin_sqrtf(lane[g][i]));
    return result;
  }

#define MIM4DD_OPERATOR(op)                                                           \
  friend Vec operator op(const Vec& a, const Vec& b) {                                \
    Vec result;                                                                       \
    for (int g = 0; g < Groups; ++g) result.lane[g] = a.lane[g] op b.lane[g];         \
    return result;                                                                    \
  }
  MIM4DD_OPERATOR(+)
  MIM4DD_OPERATOR(-)
  MIM4DD_OPERATOR(*)
#undef MIM4DD_OPERATOR
  void operator+=(const Vec& other) { *this = *this + other; }
};

}  // namespace
}  // namespace mim4dd::MIM4DD_ISA
