// Attention of a decode step over the keys that its mask lets through, split over the pool.
//
// Shape letters: B sequences, N query heads, G heads of keys, Q new tokens, S keys, D head size,
// R = N / G * Q.
#pragma once

#include <cstdint>
#include <vector>

#include "experts.h"
#include "shared_work.h"
#include "step_call.h"

namespace specmoe {

class Attention final : public SharedWork {
 public:
  // Copies the queries; keys, values and mask must stay until `run` returns.
  void prepare(const Kernels& kernels, const AttentionCall& call);
  // After `run`: puts the parts together, in order, whoever computed them.
  void finish();

  void compute(int64_t chunk, Scratch& scratch) const override;
  void publish(int64_t chunk, const Scratch& scratch) override;

 private:
  // Keys [begin, end) of one head of a sequence.
  struct Part {
    int64_t sequence, head, begin, end;
  };

  int64_t chunks() const override { return static_cast<int64_t>(parts_.size()); }
  int64_t rows() const { return call_.heads / call_.kv_heads * call_.queries; }
  // Floats of a part's result: sums [R, D], largest scores [R], sums of exponentials [R].
  int64_t result_floats() const { return rows() * (call_.head + 2); }
  void take_queries();
  void merge(size_t first, size_t last);

  const Kernels* kernels_ = nullptr;
  AttentionCall call_{};
  int64_t element_bytes_ = 4;
  std::vector<Part> parts_;
  std::vector<float> results_;
  std::vector<int32_t> rows_;
  std::vector<float> x_;
  Activations queries_;
};

}  // namespace specmoe
