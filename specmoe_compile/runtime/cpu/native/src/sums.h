// Numbers of any dtype of an op's arguments, and the weighted sum that ends a layer step.
//
// Shape letters: T tokens, K top-k, H hidden.
#pragma once

#include <cstdint>

#include "numbers.h"
#include "step_call.h"

namespace specmoe {

inline int64_t id_at(const StepCall& call, int64_t i) {
  if (call.id_bytes == 4) return static_cast<const int32_t*>(call.ids)[i];
  return static_cast<const int64_t*>(call.ids)[i];
}

inline float value_at(const void* values, int32_t dtype, int64_t i) {
  if (dtype == F32) return static_cast<const float*>(values)[i];
  const uint16_t bits = static_cast<const uint16_t*>(values)[i];
  return dtype == BF16 ? from_bf16(bits) : from_f16(bits);
}

inline void put(void* values, int32_t dtype, int64_t i, float value) {
  if (dtype == F32)
    static_cast<float*>(values)[i] = value;
  else
    static_cast<uint16_t*>(values)[i] = dtype == BF16 ? to_bf16(value) : to_f16(value);
}

inline float rounded_to(float value, int32_t dtype) {
  if (dtype == BF16) return from_bf16(to_bf16(value));
  if (dtype == F16) return from_f16(to_f16(value));
  return value;
}

// call.out = (y * weights).sum over K, in this order, as torch computes it: the products have the
// wider of the two dtypes, sums are float32 and start at zero.
//   y: [T, K, H] float32.
void reduce_experts(const float* y, const StepCall& call);

}  // namespace specmoe
