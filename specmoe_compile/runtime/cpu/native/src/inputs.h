// Inputs of products in the forms that the kernels read; included once per instruction set.
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

// Rounds |value| < 2^22 to the nearest integer, ties to even, without a call.
SPECMOE_INLINE float to_nearest(float value) { return (value + 12582912.0f) - 12582912.0f; }

// Returns the scale of the block's codes; NaN where a value is.
inline float quantise_block(const float* values, int8_t* codes) {
  uint32_t most = 0;  // sizes of floats have the order of their bits
  for (int64_t i = 0; i < kBlock; i++) {
    const uint32_t size = float_to_bits(values[i]) & 0x7fffffffu;
    most = size > most ? size : most;
  }
  const float largest = bits_to_float(most);
  const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
  for (int64_t i = 0; i < kBlock; i++) {
    const float code = to_nearest(values[i] * inverse);
    const float least = code >= -127.0f ? code : -127.0f;  // of NaN, too
    codes[i] = static_cast<int8_t>(static_cast<int32_t>(least > 127.0f ? 127.0f : least));
  }
  return largest / 127.0f;
}

// out[i] = minus the sum of codes 4i to 4i + 3.
template <int64_t Count>
inline void subtract_fours(const int8_t* codes, int32_t* out) {
  for (int64_t i = 0; i < Count; i++)
    out[i] -= codes[4 * i] + codes[4 * i + 1] + codes[4 * i + 2] + codes[4 * i + 3];
}

inline void put_block(const InputRow& row, int64_t block, const float* values) {
  const int64_t at = block * kBlock;
  switch (row.form) {
    case FORM_PLAIN: break;  // not by blocks
    case FORM_SPLIT: return split_block(values, row.values + at);
    case FORM_BF16:
      for (int64_t i = 0; i < kBlock; i++)
        row.bf16[at + i] = static_cast<uint16_t>(float_to_bits(values[i]) >> 16);
      return;
    case FORM_INT8:
      row.scales[block] = quantise_block(values, row.codes + at);
      std::memset(row.minus_sums + at / 4, 0, kBlock / 4 * sizeof(int32_t));
      return subtract_fours<kBlock / 4>(row.codes + at, row.minus_sums + at / 4);
    case FORM_INT8_SPLIT: {
      alignas(64) float split[kBlock];
      alignas(64) int8_t codes[kBlock];
      split_block(values, split);
      row.scales[block] = quantise_block(split, codes);
      int8_t* out = row.codes + at / kGroup * kGroup + at % kGroup / 2;
      std::memcpy(out, codes, kBlock / 2);
      std::memcpy(out + kGroup / 2, codes + kBlock / 2, kBlock / 2);
      int32_t* minus = row.minus_sums + at / 8;
      std::memset(minus, 0, kBlock / 8 * sizeof(int32_t));
      subtract_fours<kBlock / 8>(codes, minus);
      subtract_fours<kBlock / 8>(codes + kBlock / 2, minus);
    }
  }
}

void put_any(const InputRow& row, int64_t begin, int64_t count, const float* values) {
  if (row.form == FORM_PLAIN) {
    std::memcpy(row.values + begin, values, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  int64_t done = 0;
  for (; done + kBlock <= count; done += kBlock)
    put_block(row, (begin + done) / kBlock, values + done);
  if (done == count) return;
  alignas(64) float tail[kBlock] = {};
  std::memcpy(tail, values + done, static_cast<size_t>(count - done) * sizeof(float));
  put_block(row, (begin + done) / kBlock, tail);
}

}  // namespace
}  // namespace specmoe
