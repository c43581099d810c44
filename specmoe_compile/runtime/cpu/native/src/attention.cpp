#include "attention.h"

#include <algorithm>
#include <limits>

#include "sums.h"

namespace specmoe {
namespace {

constexpr int64_t kPartBytes = 128 << 10;  // of keys and values
constexpr int64_t kLeastKeys = 64;
constexpr float kNothing = -std::numeric_limits<float>::infinity();

const uint8_t* at_bytes(const void* start, int64_t elements, int64_t element_bytes) {
  return static_cast<const uint8_t*>(start) + elements * element_bytes;
}

}  // namespace

void Attention::prepare(const Kernels& kernels, const AttentionCall& call) {
  kernels_ = &kernels;
  call_ = call;
  element_bytes_ = call.dtype == F32 ? 4 : 2;
  const int64_t key_bytes = 2 * call.head * element_bytes_;
  // Of the sizes alone, so that sums have one order whatever the number of threads.
  const int64_t keys = std::max(kLeastKeys, kPartBytes / key_bytes / kLeastKeys * kLeastKeys);
  parts_.clear();
  bytes_ = 0;
  for (int64_t b = 0; b < call.sequences; b++) {
    const int32_t* bounds = call.bounds + (call.bound_rows == 1 ? 0 : 2 * b);
    bytes_ += (bounds[1] - bounds[0]) * call.kv_heads * key_bytes;
    for (int64_t g = 0; g < call.kv_heads; g++)
      for (int64_t begin = bounds[0]; begin < bounds[1]; begin += keys)
        parts_.push_back({b, g, begin, std::min<int64_t>(begin + keys, bounds[1])});
  }
  results_.resize(parts_.size() * static_cast<size_t>(result_floats()));
  take_queries();
}

// In float32, rows in the order [B, N, Q].
void Attention::take_queries() {
  const int64_t count = call_.sequences * call_.heads * call_.queries;
  for (int64_t r = static_cast<int64_t>(rows_.size()); r < count; r++)
    rows_.push_back(static_cast<int32_t>(r));
  queries_.reset(count, call_.head, FORM_PLAIN);
  x_.resize(static_cast<size_t>(call_.head));
  for (int64_t r = 0; r < count; r++) {
    const int64_t b = r / call_.queries / call_.heads, n = r / call_.queries % call_.heads;
    const int64_t from = b * call_.q_strides[0] + n * call_.q_strides[1] +
                         r % call_.queries * call_.q_strides[2];
    for (int64_t d = 0; d < call_.head; d++)
      x_[static_cast<size_t>(d)] = value_at(call_.q, call_.dtype, from + d);
    queries_.put(*kernels_, r, 0, call_.head, x_.data());
  }
}

void Attention::compute(int64_t chunk, Scratch& scratch) const {
  const Part& of = parts_[static_cast<size_t>(chunk)];
  const int64_t repeats = call_.heads / call_.kv_heads, first = of.head * repeats;
  const auto place = [&](const int64_t* strides) {
    return of.sequence * strides[0] + of.head * strides[1] + of.begin * strides[2];
  };
  AttentionPart part{};
  part.keys = at_bytes(call_.k, place(call_.k_strides), element_bytes_);
  part.values = at_bytes(call_.v, place(call_.v_strides), element_bytes_);
  part.key_bytes = call_.k_strides[2] * element_bytes_;
  part.value_bytes = call_.v_strides[2] * element_bytes_;
  const int64_t mask_bytes = call_.mask_dtype == BOOL ? 1 : call_.mask_dtype == F32 ? 4 : 2;
  part.mask = at_bytes(call_.mask,
                       of.sequence * call_.mask_strides[0] + first * call_.mask_strides[1] +
                           of.begin,
                       mask_bytes);
  part.mask_head = call_.mask_strides[1];
  part.mask_query = call_.mask_strides[2];
  part.count = of.end - of.begin;
  part.queries = call_.queries;
  part.head = call_.head;
  part.dtype = call_.dtype;
  part.mask_dtype = call_.mask_dtype;
  part.scale = call_.scale;
  part.inputs = queries_.inputs(
      rows_.data() + (of.sequence * call_.heads + first) * call_.queries, rows());
  const size_t needed = static_cast<size_t>(result_floats() + rows() * part.count);
  if (scratch.floats.size() < needed) scratch.floats.resize(needed);
  kernels_->attend(part, scratch.floats.data() + result_floats(), scratch.floats.data());
}

void Attention::publish(int64_t chunk, const Scratch& scratch) {
  std::copy_n(scratch.floats.data(), result_floats(), results_.data() + chunk * result_floats());
}

void Attention::finish() {
  // Of a sequence that attends to nothing there is no part.
  const int64_t outs = call_.sequences * call_.queries * call_.heads * call_.head;
  if (parts_.size() < static_cast<size_t>(call_.sequences * call_.kv_heads))
    for (int64_t i = 0; i < outs; i++) put(call_.out, call_.dtype, i, 0.0f);
  for (size_t first = 0, last = 0; first < parts_.size(); first = last) {
    while (last < parts_.size() && parts_[last].sequence == parts_[first].sequence &&
           parts_[last].head == parts_[first].head)
      last++;
    merge(first, last);
  }
}

// Writes the rows of parts [first, last), all those of one head of keys: [B, Q, N, D].
void Attention::merge(size_t first, size_t last) {
  const int64_t size = result_floats(), head = call_.head;
  const int64_t repeats = call_.heads / call_.kv_heads;
  for (int64_t r = 0; r < rows(); r++) {
    const int64_t n = parts_[first].head * repeats + r / call_.queries;
    float largest = kNothing, total = 0.0f;
    if (call_.sinks != nullptr) largest = value_at(call_.sinks, call_.sinks_dtype, n);
    const auto result = [&](size_t part) { return results_.data() + part * size_t(size); };
    for (size_t part = first; part < last; part++)
      largest = std::max(largest, result(part)[rows() * head + r]);
    std::fill(x_.begin(), x_.end(), 0.0f);
    if (call_.sinks != nullptr)
      total = exponential(value_at(call_.sinks, call_.sinks_dtype, n) - largest);
    for (size_t part = first; part < last; part++) {
      const float* own = result(part);
      const float part_largest = own[rows() * head + r];
      const float factor = part_largest == kNothing ? 1.0f : exponential(part_largest - largest);
      total += factor * own[rows() * head + rows() + r];
      for (int64_t d = 0; d < head; d++) x_[size_t(d)] += factor * own[r * head + d];
    }
    const int64_t b = parts_[first].sequence;
    const int64_t to = ((b * call_.queries + r % call_.queries) * call_.heads + n) * head;
    for (int64_t d = 0; d < head; d++)
      put(call_.out, call_.dtype, to + d, total == 0.0f ? 0.0f : x_[size_t(d)] / total);
  }
}

}  // namespace specmoe
