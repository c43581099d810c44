#include "products.h"

#include <algorithm>

#include "sums.h"

namespace specmoe {
namespace {

constexpr int64_t kChunkBytes = 128 << 10;
constexpr int64_t kRowStep = 8;

}  // namespace

void Products::prepare(const Kernels& kernels, const ProductsCall& call) {
  kernels_ = &kernels;
  dtype_ = call.dtype;
  tokens_ = call.tokens;
  const int64_t row_bytes = call.inputs * (call.dtype == F32 ? 4 : 2);
  int64_t outputs = 0;
  for (int64_t i = 0; i < call.count; i++) outputs += call.outputs[i];
  bytes_ = outputs * row_bytes;
  const int64_t rows = std::max(kRowStep, kChunkBytes / std::max<int64_t>(1, row_bytes) /
                                              kRowStep * kRowStep);
  weights_.clear();
  parts_.clear();
  for (int64_t i = 0; i < call.count; i++) {
    WeightSpec spec{};
    spec.outputs = call.outputs[i];
    spec.inputs = call.inputs;
    spec.row_bytes = row_bytes;
    spec.scales = spec.zeros = spec.globals = spec.bias = -1;
    spec.book = call.dtype;  // BOOK_F32, BOOK_BF16 and BOOK_F16 have the numbers of the dtypes
    weights_.push_back({spec, static_cast<const uint8_t*>(call.weights[i]),
                        call.biases == nullptr ? nullptr : call.biases[i], call.outs[i]});
    const int64_t step = bytes_ <= kAloneBytes ? spec.outputs : rows;
    for (int64_t begin = 0; begin < spec.outputs; begin += step)
      parts_.push_back({i, begin, std::min(begin + step, spec.outputs)});
  }
  for (int64_t t = static_cast<int64_t>(rows_.size()); t < tokens_; t++)
    rows_.push_back(static_cast<int32_t>(t));
  inputs_.reset(tokens_, call.inputs, FORM_PLAIN);
  x_.resize(static_cast<size_t>(call.inputs));
  for (int64_t t = 0; t < tokens_; t++) {
    for (int64_t k = 0; k < call.inputs; k++)
      x_[static_cast<size_t>(k)] = value_at(call.x, call.dtype, t * call.inputs + k);
    inputs_.put(kernels, t, 0, call.inputs, x_.data());
  }
}

void Products::compute(int64_t chunk, Scratch& scratch) const {
  const Part& part = parts_[static_cast<size_t>(chunk)];
  const Weight& weight = weights_[static_cast<size_t>(part.weight)];
  const int64_t count = part.end - part.begin;
  const size_t needed = static_cast<size_t>(count * tokens_);
  if (scratch.floats.size() < needed) scratch.floats.resize(needed);
  const WeightView view{&weight.spec, weight.values};
  kernels_->rows(view, part.begin, part.end, inputs_.inputs(rows_.data(), tokens_),
                 scratch.floats.data(), count);
}

void Products::publish(int64_t chunk, const Scratch& scratch) {
  const Part& part = parts_[static_cast<size_t>(chunk)];
  const Weight& weight = weights_[static_cast<size_t>(part.weight)];
  const int64_t count = part.end - part.begin;
  for (int64_t t = 0; t < tokens_; t++)
    for (int64_t i = 0; i < count; i++) {
      const int64_t n = part.begin + i;
      float value = scratch.floats[static_cast<size_t>(t * count + i)];
      if (weight.bias != nullptr) value += value_at(weight.bias, dtype_, n);
      put(weight.out, dtype_, t * weight.spec.outputs + n, value);
    }
}

}  // namespace specmoe
