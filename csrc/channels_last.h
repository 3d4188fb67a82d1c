// Tensors of the CPU with their channels last in memory, as the layers work on them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>

namespace mim4dd {

// A copy, unless they lie like that already.
inline torch::stable::Tensor channels_last(const torch::stable::Tensor& t) {
  return torch::stable::contiguous(t, torch::headeronly::MemoryFormat::ChannelsLast);
}

inline torch::stable::Tensor empty_channels_last(const std::initializer_list<int64_t>& sizes,
                                                 torch::headeronly::ScalarType dtype) {
  return torch::stable::empty(sizes, dtype, std::nullopt, std::nullopt, std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

}  // namespace mim4dd
