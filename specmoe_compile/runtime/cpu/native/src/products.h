// Products of a few tokens with weights outside of the experts: projections of attention, routers,
// the last layer. What is small is computed by the caller alone; the pool shares the rest.
//
// Shape letters: T tokens, N outputs, K inputs.
#pragma once

#include <cstdint>
#include <vector>

#include "experts.h"
#include "shared_work.h"
#include "step_call.h"

namespace specmoe {

class Products final : public SharedWork {
 public:
  // Copies the input; weights and biases must stay until `run` returns.
  void prepare(const Kernels& kernels, const ProductsCall& call);
  void compute(int64_t chunk, Scratch& scratch) const override;
  void publish(int64_t chunk, const Scratch& scratch) override;

 private:
  int64_t chunks() const override { return static_cast<int64_t>(parts_.size()); }

  // Rows [begin, end) of one weight.
  struct Part {
    int64_t weight, begin, end;
  };
  struct Weight {
    WeightSpec spec;
    const uint8_t* values;
    const void* bias;  // null for none
    void* out;
  };

  const Kernels* kernels_ = nullptr;
  int32_t dtype_ = F32;
  int64_t tokens_ = 0;
  std::vector<Weight> weights_;
  std::vector<Part> parts_;
  std::vector<int32_t> rows_;
  std::vector<float> x_;
  Activations inputs_;
};

}  // namespace specmoe
