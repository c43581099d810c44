// AVX2 with FMA and F16C; compiled with -mavx2 -mfma -mf16c, empty elsewhere.
#include "weight.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

#include <cstdint>

#include "vectors_x86.h"

namespace specmoe {
namespace {

struct V {
  __m256 low, high;
};
struct Pair {
  V first, second;
};
struct Table {
  __m256 low, high;  // of codes 0 to 7, 8 to 15
};

inline V zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline V broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline V halves(float a, float b) { return {_mm256_set1_ps(a), _mm256_set1_ps(b)}; }
inline V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, const V& v) {
  _mm256_storeu_ps(p, v.low);
  _mm256_storeu_ps(p + 8, v.high);
}
inline float reduced(const V& v) { return reduced8(_mm256_add_ps(v.low, v.high)); }
inline __m256 wide_bf16(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline void reduce4(const V& v0, const V& v1, const V& v2, const V& v3, float* out) {
  const auto halved = [](const V& a, const V& b) {  // lanes j + 4: 4 sums of each
    const __m256 x = _mm256_add_ps(a.low, a.high), y = _mm256_add_ps(b.low, b.high);
    return _mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
  };
  const __m256 a = halved(v0, v2), b = halved(v1, v3);
  // Of each half 4 lanes of one row: 0 and 1 in the low halves, 2 and 3 in the high ones.
  const __m256 two = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
  const __m256 one = _mm256_add_ps(two, _mm256_permute_ps(two, 0xb1));
  const __m256 sums = _mm256_permutevar8x32_ps(one, _mm256_setr_epi32(0, 2, 4, 6, 0, 0, 0, 0));
  _mm_storeu_ps(out, _mm256_castps256_ps128(sums));
}

inline V load_bf16(const uint16_t* p) { return {wide_bf16(load16(p)), wide_bf16(load16(p + 8))}; }
inline V load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(load16(p)), _mm256_cvtph_ps(load16(p + 8))};
}
inline V add(const V& a, const V& b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
inline V mul(const V& a, const V& b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
inline V fma(const V& a, const V& b, const V& c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Table load_table(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline __m256 lookup8(const Table& t, __m256i code) {
  const __m256 low = _mm256_permutevar8x32_ps(t.low, code);  // takes the low 3 bits
  const __m256 high = _mm256_permutevar8x32_ps(t.high, code);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
}
inline Pair lookup(const Table& t, const uint8_t* p) {
  const __m128i bytes = load16(p);
  const __m256i a = _mm256_cvtepu8_epi32(bytes);
  const __m256i b = _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8));
  return {{lookup8(t, a), lookup8(t, b)},
          {lookup8(t, _mm256_srli_epi32(a, 4)), lookup8(t, _mm256_srli_epi32(b, 4))}};
}
inline V load_e4m3(const uint8_t* p) {
  const __m256i half = halves_of_e4m3(p);
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(half)),
          _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1))};
}
inline __m256 wide_e8m0(__m256i code) {
  const __m256i least = _mm256_and_si256(_mm256_cmpeq_epi32(code, _mm256_setzero_si256()),
                                         _mm256_set1_epi32(0x00400000));
  const __m256i nan = _mm256_and_si256(_mm256_cmpeq_epi32(code, _mm256_set1_epi32(255)),
                                       _mm256_set1_epi32(0x7fc00000));
  return _mm256_castsi256_ps(
      _mm256_or_si256(_mm256_slli_epi32(code, 23), _mm256_or_si256(least, nan)));
}
inline V load_e8m0(const uint8_t* p) {
  const __m128i bytes = load16(p);
  return {wide_e8m0(_mm256_cvtepu8_epi32(bytes)),
          wide_e8m0(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
}
inline V load_int8(const uint8_t* p) {
  const __m128i bytes = load16(p);
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}

struct Bytes {
  __m256i low, high;
};
using Bytes16 = __m256i;
using Ints = Bytes;
struct BytesPair {
  Bytes first, second;
};

inline __m256i load32(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
inline Bytes load_bytes(const void* p) {
  const auto* bytes = static_cast<const uint8_t*>(p);
  return {load32(bytes), load32(bytes + 32)};
}
inline Bytes16 load_table16(const uint8_t* p) { return _mm256_broadcastsi128_si256(load16(p)); }
inline Bytes at(Bytes16 t, const Bytes& nibbles) {
  return {_mm256_shuffle_epi8(t, nibbles.low), _mm256_shuffle_epi8(t, nibbles.high)};
}
inline Bytes low_nibbles(const Bytes& v) {
  const __m256i low = _mm256_set1_epi8(15);
  return {_mm256_and_si256(v.low, low), _mm256_and_si256(v.high, low)};
}
inline Bytes high_nibbles(const Bytes& v) {
  return low_nibbles({_mm256_srli_epi16(v.low, 4), _mm256_srli_epi16(v.high, 4)});
}
inline Bytes each_is_one() { return {_mm256_set1_epi8(1), _mm256_set1_epi8(1)}; }
inline Ints zero_ints() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline void store_minus(int32_t* p, const Ints& v) {
  const __m256i zero = _mm256_setzero_si256();
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_sub_epi32(zero, v.low));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), _mm256_sub_epi32(zero, v.high));
}
inline Ints load_ints(const int32_t* p) { return load_bytes(p); }
template <int By>
inline Ints shifted(const Ints& v) {
  return {_mm256_slli_epi32(v.low, By), _mm256_slli_epi32(v.high, By)};
}
inline V to_floats(const Ints& v) {
  return {_mm256_cvtepi32_ps(v.low), _mm256_cvtepi32_ps(v.high)};
}
// Of weights without a sign. Two products are at most 32512, so that no sum saturates.
inline __m256i dots8(__m256i w, __m256i x) {
  return _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1));
}
inline Ints dot(const Ints& sum, const Bytes& w, const Bytes& x) {
  return {_mm256_add_epi32(sum.low, dots8(w.low, x.low)),
          _mm256_add_epi32(sum.high, dots8(w.high, x.high))};
}
inline Ints dot_signed(const Ints&, const Bytes& w, const Bytes& x) {
  return {dots8(_mm256_abs_epi8(w.low), _mm256_sign_epi8(x.low, w.low)),
          dots8(_mm256_abs_epi8(w.high), _mm256_sign_epi8(x.high, w.high))};
}
inline V spread4(const float* p) {
  return {_mm256_set_m128(_mm_set1_ps(p[1]), _mm_set1_ps(p[0])),
          _mm256_set_m128(_mm_set1_ps(p[3]), _mm_set1_ps(p[2]))};
}
inline __m256 twice(const float* p) {
  return _mm256_setr_ps(p[0], p[0], p[1], p[1], p[2], p[2], p[3], p[3]);
}
inline V spread8(const float* p) { return {twice(p), twice(p + 4)}; }

constexpr int ROWS1 = 4, ROWSN = 2, TOKENS = 2;

}  // namespace
}  // namespace specmoe

#include "attend.h"
#include "inputs.h"
#include "rows.h"
#include "rows_int8.h"

namespace specmoe {

const Kernels* avx2_kernels_or_null() {
  static const Kernels kernels{"avx2",  any_rows, any_rows_int8, nullptr,
                               put_any, gate_any, round_any,     attend_any};
  const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                   __builtin_cpu_supports("f16c");
  return has ? &kernels : nullptr;
}

}  // namespace specmoe

#else

namespace specmoe {
const Kernels* avx2_kernels_or_null() { return nullptr; }
}  // namespace specmoe

#endif
