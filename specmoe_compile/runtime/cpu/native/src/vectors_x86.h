// What AVX2 and AVX-512 have in common; included by files that are compiled with AVX2 and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace specmoe {
namespace {

inline __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline float reduced8(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
// 16 numbers in e4m3 as float16, each a 256th of its value.
inline __m256i halves_of_e4m3(const uint8_t* p) {
  const __m256i code = _mm256_cvtepu8_epi16(load16(p));
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(code, _mm256_set1_epi16(0x80)), 8);
  const __m256i rest = _mm256_and_si256(code, _mm256_set1_epi16(0x7f));
  const __m256i nan = _mm256_cmpeq_epi16(rest, _mm256_set1_epi16(0x7f));
  return _mm256_or_si256(_mm256_or_si256(sign, _mm256_slli_epi16(rest, 7)),
                         _mm256_and_si256(nan, _mm256_set1_epi16(0x7e00)));
}

}  // namespace
}  // namespace specmoe
