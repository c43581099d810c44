// A part of decode attention, the same bits with every instruction set; included after rows.h.
//
// Shape letters: R queries that share a head of keys, C keys of the part, D head size.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "rows.h"
#include "sums.h"

namespace specmoe {
namespace {

constexpr float kNothing = -std::numeric_limits<float>::infinity();

// Scales scores [C] of one query, and takes out those of keys that it does not attend to.
inline void mask_scores(const AttentionPart& part, int64_t row, float* scores) {
  const int64_t first = row / part.queries * part.mask_head + row % part.queries * part.mask_query;
  if (part.mask_dtype == BOOL) {
    const uint8_t* mask = static_cast<const uint8_t*>(part.mask) + first;
    for (int64_t i = 0; i < part.count; i++)
      scores[i] = mask[i] ? scores[i] * part.scale : kNothing;
    return;
  }
  for (int64_t i = 0; i < part.count; i++)
    scores[i] = scores[i] * part.scale + value_at(part.mask, part.mask_dtype, first + i);
}

// Largest of [C]; kNothing for NaN alone.
inline float largest_of(const float* scores, int64_t count) {
  float lanes[16];
  for (int j = 0; j < 16; j++) lanes[j] = kNothing;
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    for (int j = 0; j < 16; j++) lanes[j] = scores[i + j] > lanes[j] ? scores[i + j] : lanes[j];
  float largest = kNothing;
  for (; i < count; i++) largest = scores[i] > largest ? scores[i] : largest;
  for (int j = 0; j < 16; j++) largest = lanes[j] > largest ? lanes[j] : largest;
  return largest;
}

// scores[i] = e^(scores[i] - largest), 0 for kNothing; returns the sum.
inline float exponentials(float* scores, int64_t count, float largest) {
  const float shift = largest == kNothing ? 0.0f : largest;
  for (int64_t i = 0; i < count; i++) {
    const float power = exponential(scores[i] - shift);
    scores[i] = scores[i] == kNothing ? 0.0f : power;
  }
  V sum = zero();
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) sum = add(sum, load(scores + i));
  alignas(64) float tail[16] = {};
  std::memcpy(tail, scores + i, static_cast<size_t>(count - i) * sizeof(float));
  return reduced(add(sum, load(tail)));
}

// out[r, d .. d + width] = sum over keys of scores[r, i] * values[i, d ..], keys in order.
template <class Type, int R>
inline void weigh_block(const AttentionPart& part, const float* scores, int64_t row, int64_t d,
                        int64_t width, float* out) {
  using Element = typename Type::Element;
  V sum[R];
  for (int r = 0; r < R; r++) sum[r] = zero();
  const float* weights = scores + row * part.count;
  for (int64_t i = 0; i < part.count; i++) {
    const Element* value =
        reinterpret_cast<const Element*>(part.values + i * part.value_bytes) + d;
    alignas(64) Element tail[16] = {};
    if (width < 16) {  // what follows a row is another's: it must not be read
      std::memcpy(tail, value, static_cast<size_t>(width) * sizeof(Element));
      value = tail;
    }
    const V v = Type::get(value);
    for (int r = 0; r < R; r++) sum[r] = fma(broadcast(weights[r * part.count + i]), v, sum[r]);
  }
  for (int r = 0; r < R; r++) {
    alignas(64) float whole[16];
    store(whole, sum[r]);
    std::memcpy(out + (row + r) * part.head + d, whole, static_cast<size_t>(width) * sizeof(float));
  }
}

template <class Type>
void weigh(const AttentionPart& part, const float* scores, float* out) {
  const int64_t rows = part.inputs.tokens;
  for (int64_t d = 0; d < part.head; d += 16) {
    const int64_t width = part.head - d < 16 ? part.head - d : 16;
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) weigh_block<Type, 4>(part, scores, r, d, width, out);
    for (; r < rows; r++) weigh_block<Type, 1>(part, scores, r, d, width, out);
  }
}

void attend_any(const AttentionPart& part, float* scores, float* out) {
  WeightSpec spec{};
  spec.outputs = part.count;
  spec.inputs = part.head;
  spec.row_bytes = part.key_bytes;
  spec.scales = spec.zeros = spec.globals = spec.bias = -1;
  spec.book = part.dtype;  // BOOK_F32, BOOK_BF16 and BOOK_F16 have the numbers of the dtypes
  any_rows(WeightView{&spec, part.keys}, 0, part.count, part.inputs, scores, part.count);
  const int64_t rows = part.inputs.tokens;
  float* largest = out + rows * part.head;
  for (int64_t r = 0; r < rows; r++) {
    float* own = scores + r * part.count;
    mask_scores(part, r, own);
    largest[r] = largest_of(own, part.count);
    largest[rows + r] = exponentials(own, part.count, largest[r]);
  }
  if (part.dtype == F32) return weigh<PlainF32>(part, scores, out);
  if (part.dtype == BF16) return weigh<PlainBF16>(part, scores, out);
  weigh<PlainF16>(part, scores, out);
}

}  // namespace
}  // namespace specmoe
