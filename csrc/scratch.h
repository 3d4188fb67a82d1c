// Memory that a thread keeps from call to call: fresh pages cost as much as the work on them.
#pragma once

#include <cstdint>
#include <vector>

namespace mim4dd {

// Room for so many numbers, which are those that an earlier call left there.
inline float* kept(std::vector<float>& memory, int64_t numbers) {
  if (static_cast<int64_t>(memory.size()) < numbers) memory.resize(numbers);
  return memory.data();
}

}  // namespace mim4dd
