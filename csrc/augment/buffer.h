// Memory of the CPU kernel. Everything here and in the headers above it lies in a namespace of the instruction set
// it is compiled for, and no function of the standard library is used: of an inline function that several sources
// share, the linker keeps one copy, which might be one that an older machine cannot run.
#pragma once

#include <cstdlib>
#include <new>

#include "augment.h"

namespace mim4dd::MIM4DD_ISA {

// Some plain numbers, zeros at first; memory is taken when it is first asked for.
template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t size) : size_(size) {}
  Buffer(const Buffer&) = delete;
  ~Buffer() { free(data_); }

  T* data() const {
    if (!data_) data_ = static_cast<T*>(calloc(size_, sizeof(T)));
    if (!data_) throw std::bad_alloc();
    return data_;
  }

 private:
  const size_t size_;
  mutable T* data_ = nullptr;
};

// One image, or the buffer of one: pointer and strides.
template <typename T>
struct View {
  T* data;
  int64_t channel, y, x;

  T* row(int c, int at_y) const { return data + c * channel + at_y * y; }
  View from(int first) const { return {row(0, first), channel, y, x}; }  // without the rows before
};

// Numbers begin..end-1, of the rows or of the columns.
struct Range {
  int begin, end;

  Range within(const Range& r) const { return {clamp(begin, r.begin, r.end), clamp(end, r.begin, r.end)}; }
  Range within(int size) const { return within(Range{0, size}); }
  int size() const { return end - begin; }
};

}  // namespace mim4dd
