// What torch's op hands to the engine. Read by both, and so plain numbers only.
//
// Shape letters: T tokens, K top-k, H hidden.
#pragma once

#include <cstdint>

namespace specmoe {

enum Dtype : int32_t { F32 = 0, BF16 = 1, F16 = 2 };

// Arguments of `specmoe::experts`, contiguous.
struct StepCall {
  const void* x;        // [T, H]
  const void* ids;      // [T, K]
  const void* weights;  // [T, K]
  void* out;            // [T, H], in the dtype of x
  int64_t tokens, top_k, hidden;
  int32_t x_dtype, weights_dtype;
  int32_t id_bytes;
  int32_t unused;
};

}  // namespace specmoe
