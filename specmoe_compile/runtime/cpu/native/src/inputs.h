// Inputs of products in the forms that the kernels read; included once per instruction set, after what
// rows_int8.h lists.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "numbers.h"
#include "weight.h"

namespace specmoe {
namespace {

constexpr int64_t kBlock = 32;   // columns that share a scale
constexpr int64_t kGroup = 128;  // columns that int8 kernels of 4-bit codes take at once

// Even columns first, then odd ones.
inline void split_block(const float* values, float* out) {
  for (int64_t i = 0; i < kBlock / 2; i++) out[i] = values[2 * i];
  for (int64_t i = 0; i < kBlock / 2; i++) out[kBlock / 2 + i] = values[2 * i + 1];
}

// Returns the scale of the block's codes; infinity or NaN, and codes of zero, where a value is such.
inline float quantise_block(const float* values, int8_t* codes) {
  uint32_t most = 0;  // sizes of floats have the order of their bits
  for (int64_t i = 0; i < kBlock; i++) {
    const uint32_t size = float_to_bits(values[i]) & 0x7fffffffu;
    most = size > most ? size : most;
  }
  const float largest = bits_to_float(most);
  const bool is_finite = most < 0x7f800000u;
  const float inverse = is_finite && largest > 0.0f ? 127.0f / largest : 0.0f;
  // Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits.
  for (int64_t i = 0; i < kBlock; i++)
    codes[i] = static_cast<int8_t>(float_to_bits(values[i] * inverse + 12582912.0f));
  if (!is_finite) std::memset(codes, 0, kBlock);
  return largest / 127.0f;
}

// 128 columns; see rows_int8.h for the order of the codes and of their sums.
inline void put_group(const InputRow& row, int64_t group, const float* values) {
  alignas(64) int8_t codes[kGroup];
  int8_t* out = row.codes + group * kGroup;
  for (int64_t b = 0; b < kGroup / kBlock; b++)
    row.scales[group * kGroup / kBlock + b] = quantise_block(values + b * kBlock,
                                                             codes + b * kBlock);
  const Bytes ones = each_is_one();
  if (row.form == FORM_INT8) {
    std::memcpy(out, codes, kGroup);
    int32_t* minus = row.minus_sums + group * kGroup / 4;
    store_minus(minus, dot(zero_ints(), ones, load_bytes(out)));
    return store_minus(minus + 16, dot(zero_ints(), ones, load_bytes(out + kGroup / 2)));
  }
  for (int64_t i = 0; i < kGroup / 2; i++) out[i] = codes[2 * i];
  for (int64_t i = 0; i < kGroup / 2; i++) out[kGroup / 2 + i] = codes[2 * i + 1];
  const Ints sums = dot(zero_ints(), ones, load_bytes(out));
  store_minus(row.minus_sums + group * kGroup / 8,
              dot(sums, ones, load_bytes(out + kGroup / 2)));
}

inline void put_block(const InputRow& row, int64_t block, const float* values) {
  const int64_t at = block * kBlock;
  if (row.form == FORM_SPLIT) return split_block(values, row.values + at);
  for (int64_t i = 0; i < kBlock; i++)
    row.bf16[at + i] = static_cast<uint16_t>(float_to_bits(values[i]) >> 16);
}

// `Step` columns at a time, the last ones filled up with zeros.
template <int64_t Step, class Put>
SPECMOE_INLINE void put_steps(int64_t begin, int64_t count, const float* values, Put put) {
  int64_t done = 0;
  for (; done + Step <= count; done += Step) put((begin + done) / Step, values + done);
  if (done == count) return;
  alignas(64) float tail[Step] = {};
  std::memcpy(tail, values + done, static_cast<size_t>(count - done) * sizeof(float));
  put((begin + done) / Step, tail);
}

void put_any(const InputRow& row, int64_t begin, int64_t count, const float* values) {
  if (row.form == FORM_PLAIN)
    std::memcpy(row.values + begin, values, static_cast<size_t>(count) * sizeof(float));
  else if (is_int8(row.form))
    put_steps<kGroup>(begin, count, values,
                      [&](int64_t g, const float* from) { put_group(row, g, from); });
  else
    put_steps<kBlock>(begin, count, values,
                      [&](int64_t b, const float* from) { put_block(row, b, from); });
}

}  // namespace
}  // namespace specmoe
