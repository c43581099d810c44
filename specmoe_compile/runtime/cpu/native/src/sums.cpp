#include "sums.h"

#include <algorithm>
#include <vector>

namespace specmoe {

void reduce_experts(const float* y, const StepCall& call) {
  const int32_t product = call.x_dtype == call.weights_dtype ? call.x_dtype : F32;
  std::vector<float> sums(static_cast<size_t>(call.hidden));
  for (int64_t t = 0; t < call.tokens; t++) {
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int64_t k = 0; k < call.top_k; k++) {
      const float weight = value_at(call.weights, call.weights_dtype, t * call.top_k + k);
      const float* row = y + (t * call.top_k + k) * call.hidden;
      float* sum = sums.data();
      if (product == F32) {
        for (int64_t h = 0; h < call.hidden; h++) sum[h] += row[h] * weight;
      } else {
        for (int64_t h = 0; h < call.hidden; h++) sum[h] += rounded_to(row[h] * weight, product);
      }
    }
    for (int64_t h = 0; h < call.hidden; h++)
      put(call.out, call.x_dtype, t * call.hidden + h, sums[static_cast<size_t>(h)]);
  }
}

}  // namespace specmoe
