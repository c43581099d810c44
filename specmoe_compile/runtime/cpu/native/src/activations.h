// Activations as the kernels read them: padded, in another order or another type.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#include "weight.h"

namespace specmoe {

// Memory whose first element begins a line of the cache: vectors of half a line each are read as
// fast as they can be only there.
template <class Value>
struct LineAllocator {
  using value_type = Value;
  static constexpr std::align_val_t kLineBytes{64};

  LineAllocator() = default;
  template <class Other>
  LineAllocator(const LineAllocator<Other>&) {}
  Value* allocate(size_t count) {
    return static_cast<Value*>(::operator new(count * sizeof(Value), kLineBytes));
  }
  void deallocate(Value* memory, size_t) { ::operator delete(memory, kLineBytes); }
  bool operator==(const LineAllocator&) const { return true; }
  bool operator!=(const LineAllocator&) const { return false; }
};

template <class Value>
using Lines = std::vector<Value, LineAllocator<Value>>;

class Activations {
 public:
  // Makes room for [rows, width]; `put` has to fill all of it.
  void reset(int64_t rows, int64_t width, InputForm form);
  // Takes in `count` values of a row from column `begin`, see `Kernels::put`.
  void put(const Kernels& kernels, int64_t row, int64_t begin, int64_t count,
           const float* values);
  Inputs inputs(const int32_t* rows, int64_t tokens) const;

 private:
  int64_t stride_ = 0;
  InputForm form_ = FORM_PLAIN;
  Lines<float> values_;
  Lines<uint16_t> bf16_;
  Lines<int8_t> codes_;
  Lines<float> scales_;
  int64_t lane_ = 8;  // columns per sum
  Lines<int32_t> minus_sums_;
};

}  // namespace specmoe
