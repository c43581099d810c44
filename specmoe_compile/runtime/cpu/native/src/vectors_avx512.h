// Vectors of rows.h and rows_int8.h in AVX-512 F, BW, DQ, VL and VNNI; included by files that are
// compiled with these.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "vectors_x86.h"

namespace specmoe {
namespace {

using V = __m512;
using Table = __m512;
struct Pair {
  V first, second;
};

inline V zero() { return _mm512_setzero_ps(); }
inline V broadcast(float x) { return _mm512_set1_ps(x); }
inline V halves(float a, float b) {
  return _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(a), _mm512_set1_ps(b));
}
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
inline float reduced(V v) {
  return reduced8(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)));
}
inline __m256i load32(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
inline void reduce4(V v0, V v1, V v2, V v3, float* out) {
  const auto halved = [](V a, V b) {  // lanes j + 8: 8 sums of each
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  };
  const V a = halved(v0, v1), b = halved(v2, v3);
  V sums = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  sums = _mm512_add_ps(sums, _mm512_permute_ps(sums, 0x4e));
  sums = _mm512_add_ps(sums, _mm512_permute_ps(sums, 0xb1));
  const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, sums)));
}

inline V load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load32(p)), 16));
}
inline V load_f16(const uint16_t* p) { return _mm512_cvtph_ps(load32(p)); }
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline Table load_table(const float* p) { return load(p); }
inline Pair lookup(Table t, const uint8_t* p) {
  const __m512i codes = _mm512_cvtepu8_epi32(load16(p));  // the look-up takes the low 4 bits
  return {_mm512_permutexvar_ps(codes, t), _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), t)};
}
inline V load_e4m3(const uint8_t* p) {
  return _mm512_cvtph_ps(halves_of_e4m3(p));
}
inline V load_e8m0(const uint8_t* p) {
  const __m512i code = _mm512_cvtepu8_epi32(load16(p));
  __m512i bits = _mm512_slli_epi32(code, 23);
  bits = _mm512_mask_set1_epi32(bits, _mm512_testn_epi32_mask(code, code), 0x00400000);
  return _mm512_castsi512_ps(_mm512_mask_set1_epi32(
      bits, _mm512_cmpeq_epi32_mask(code, _mm512_set1_epi32(255)), 0x7fc00000));
}
inline V load_int8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load16(p)));
}

using Bytes = __m512i;
using Bytes16 = __m512i;
using Ints = __m512i;
struct BytesPair {
  Bytes first, second;
};

inline Bytes load_bytes(const void* p) { return _mm512_loadu_si512(p); }
inline Bytes16 load_table16(const uint8_t* p) { return _mm512_broadcast_i32x4(load16(p)); }
inline Bytes at(Bytes16 t, Bytes nibbles) { return _mm512_shuffle_epi8(t, nibbles); }
inline Bytes low_nibbles(Bytes v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes v) { return low_nibbles(_mm512_srli_epi16(v, 4)); }
inline Bytes each_is_one() { return _mm512_set1_epi8(1); }
inline Ints zero_ints() { return _mm512_setzero_si512(); }
inline void store_minus(int32_t* p, Ints v) {
  _mm512_storeu_si512(p, _mm512_sub_epi32(zero_ints(), v));
}
inline Ints load_ints(const int32_t* p) { return _mm512_loadu_si512(p); }
template <int By>
inline Ints shifted(Ints v) {
  return _mm512_slli_epi32(v, By);
}
inline V to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
inline Ints dot(Ints sum, Bytes w, Bytes x) { return _mm512_dpbusd_epi32(sum, w, x); }
// What one instruction multiplies has no sign: 128 is added, and its part is in `minus` already.
inline Ints dot_signed(Ints minus, Bytes w, Bytes x) {
  return dot(minus, _mm512_xor_si512(w, _mm512_set1_epi8(-128)), x);
}
inline V spread4(const float* p) {
  const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(p)), lanes);
}
inline V spread8(const float* p) {
  const __m512i lanes = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  return _mm512_permutexvar_ps(lanes, _mm512_castps256_ps512(_mm256_loadu_ps(p)));
}

constexpr int ROWS1 = 4, ROWSN = 4, TOKENS = 4;

}  // namespace
}  // namespace specmoe
