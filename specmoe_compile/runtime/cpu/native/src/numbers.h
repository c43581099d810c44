// Small floats, and the exponential: the same bits with every instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// For what loops over numbers call: a call that is left in one keeps it from becoming vectors, and
// compilers leave some in where a file is large.
#define SPECMOE_INLINE __attribute__((always_inline)) inline

namespace specmoe {
namespace {

SPECMOE_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

SPECMOE_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

SPECMOE_INLINE float from_bf16(uint16_t bits) { return bits_to_float(static_cast<uint32_t>(bits) << 16); }

SPECMOE_INLINE uint16_t to_bf16(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;  // NaN
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float from_f16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(half & 0x7fffu) << 13;
  if (rest >= 0x0f800000u) return bits_to_float(sign | (rest + 0x70000000u));  // infinity, NaN
  // Exact for normal and subnormal numbers: the exponent's bias differs by 112.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest) * 0x1p112f));
}

inline uint16_t to_f16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 rounds at the right bit
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

// The byte's value as float16 bits, 2^8 times too small.
inline float from_e4m3(uint8_t code) {
  if ((code & 0x7fu) == 0x7fu) return bits_to_float(0x7fc00000u);
  const uint16_t half = static_cast<uint16_t>(((code & 0x80u) << 8) | ((code & 0x7fu) << 7));
  return from_f16(half) * 256.0f;
}

inline float from_e8m0(uint8_t code) {
  if (code == 255) return bits_to_float(0x7fc00000u);
  return bits_to_float(code == 0 ? 0x00400000u : static_cast<uint32_t>(code) << 23);
}

// e^x within 1.2 units in the last place. No branch on the value, so that loops become vectors.
SPECMOE_INLINE float exponential(float x) {
  const float bounded = x > 89.0f ? 89.0f : (x < -104.0f ? -104.0f : x);  // NaN stays
  const float shifted = std::fmaf(bounded, 1.44269504088896341f, 12582912.0f);
  const float n = shifted - 12582912.0f;
  float r = std::fmaf(n, -0.693145751953125f, bounded);
  r = std::fmaf(n, -1.42860682030941723212e-6f, r);
  float p = 1.98412698412698413e-4f;
  p = std::fmaf(p, r, 1.38888888888888889e-3f);
  p = std::fmaf(p, r, 8.33333333333333333e-3f);
  p = std::fmaf(p, r, 4.16666666666666667e-2f);
  p = std::fmaf(p, r, 1.66666666666666667e-1f);
  p = std::fmaf(p, r, 0.5f);
  p = std::fmaf(p, r, 1.0f);
  p = std::fmaf(p, r, 1.0f);
  // 2^n in two factors, since n reaches from -150 to 128.
  const int32_t whole = static_cast<int32_t>(float_to_bits(shifted) - 0x4b400000u);
  const int32_t half = whole >> 1;
  const float first = bits_to_float(static_cast<uint32_t>(half + 127) << 23);
  const float second = bits_to_float(static_cast<uint32_t>(whole - half + 127) << 23);
  return p * first * second;
}

}  // namespace
}  // namespace specmoe
