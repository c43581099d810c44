// Plain C++ for any processor, and the definition of what the others compute.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "numbers.h"

namespace specmoe {
namespace {

struct V {
  float lane[16];
};
struct Pair {
  V first, second;
};
struct Table {
  float value[16];
};

template <class Of>
inline V each(Of of) {
  V v;
  for (int j = 0; j < 16; j++) v.lane[j] = of(j);
  return v;
}

inline V zero() { return V{}; }
inline V broadcast(float x) {
  return each([=](int) { return x; });
}
inline V halves(float a, float b) {
  return each([=](int j) { return j < 8 ? a : b; });
}
inline V load(const float* p) {
  V v;
  std::memcpy(v.lane, p, sizeof v.lane);
  return v;
}
inline void store(float* p, const V& v) { std::memcpy(p, v.lane, sizeof v.lane); }
inline float reduced(V v) {
  for (int step = 8; step > 0; step >>= 1)
    for (int j = 0; j < step; j++) v.lane[j] += v.lane[j + step];
  return v.lane[0];
}
inline void reduce4(const V& v0, const V& v1, const V& v2, const V& v3, float* out) {
  out[0] = reduced(v0);
  out[1] = reduced(v1);
  out[2] = reduced(v2);
  out[3] = reduced(v3);
}

inline V load_bf16(const uint16_t* p) {
  uint16_t bits[16];
  std::memcpy(bits, p, sizeof bits);
  return each([&](int j) { return from_bf16(bits[j]); });
}
inline V load_f16(const uint16_t* p) {
  uint16_t bits[16];
  std::memcpy(bits, p, sizeof bits);
  return each([&](int j) { return from_f16(bits[j]); });
}
inline V add(const V& a, const V& b) {
  return each([&](int j) { return a.lane[j] + b.lane[j]; });
}
inline V mul(const V& a, const V& b) {
  return each([&](int j) { return a.lane[j] * b.lane[j]; });
}
inline V fma(const V& a, const V& b, const V& c) {
  return each([&](int j) { return std::fmaf(a.lane[j], b.lane[j], c.lane[j]); });
}
inline Table load_table(const float* p) {
  Table t;
  std::memcpy(t.value, p, sizeof t.value);
  return t;
}
inline Pair lookup(const Table& t, const uint8_t* p) {
  return {each([&](int j) { return t.value[p[j] & 15]; }),
          each([&](int j) { return t.value[p[j] >> 4]; })};
}
inline V load_e4m3(const uint8_t* p) {
  return each([&](int j) { return from_e4m3(p[j]) * 0.00390625f; });
}
inline V load_e8m0(const uint8_t* p) {
  return each([&](int j) { return from_e8m0(p[j]); });
}
inline V load_int8(const uint8_t* p) {
  return each([&](int j) { return static_cast<float>(static_cast<int8_t>(p[j])); });
}

struct Bytes {
  uint8_t byte[64];
};
struct Bytes16 {
  uint8_t byte[16];
};
struct BytesPair {
  Bytes first, second;
};
struct Ints {
  int32_t lane[16];
};

template <class Byte>
inline Bytes each_byte(Byte byte) {
  Bytes v;
  for (int j = 0; j < 64; j++) v.byte[j] = byte(j);
  return v;
}
inline Bytes load_bytes(const void* p) {
  Bytes v;
  std::memcpy(v.byte, p, sizeof v.byte);
  return v;
}
inline Bytes16 load_table16(const uint8_t* p) {
  Bytes16 v;
  std::memcpy(v.byte, p, sizeof v.byte);
  return v;
}
inline Bytes at(const Bytes16& t, const Bytes& nibbles) {
  return each_byte([&](int j) { return t.byte[nibbles.byte[j]]; });
}
inline Bytes low_nibbles(const Bytes& v) {
  return each_byte([&](int j) { return static_cast<uint8_t>(v.byte[j] & 15); });
}
inline Bytes high_nibbles(const Bytes& v) {
  return each_byte([&](int j) { return static_cast<uint8_t>(v.byte[j] >> 4); });
}
inline Bytes each_is_one() {
  return each_byte([](int) { return static_cast<uint8_t>(1); });
}
inline Ints zero_ints() { return {}; }
inline void store_minus(int32_t* p, const Ints& v) {
  for (int j = 0; j < 16; j++) p[j] = -v.lane[j];
}
inline Ints load_ints(const int32_t* p) {
  Ints v;
  std::memcpy(v.lane, p, sizeof v.lane);
  return v;
}
template <int By>
inline Ints shifted(const Ints& v) {
  Ints out;
  for (int j = 0; j < 16; j++) out.lane[j] = v.lane[j] * (1 << By);
  return out;
}
inline V to_floats(const Ints& v) {
  return each([&](int j) { return static_cast<float>(v.lane[j]); });
}
template <class Weight>
inline Ints dot_as(Ints sum, const Bytes& w, const Bytes& x) {
  for (int i = 0; i < 64; i++)
    sum.lane[i / 4] += static_cast<Weight>(w.byte[i]) * static_cast<int8_t>(x.byte[i]);
  return sum;
}
inline Ints dot(const Ints& sum, const Bytes& w, const Bytes& x) {
  return dot_as<uint8_t>(sum, w, x);
}
inline Ints dot_signed(const Ints&, const Bytes& w, const Bytes& x) {
  return dot_as<int8_t>(Ints{}, w, x);
}
inline V spread4(const float* p) {
  return each([=](int j) { return p[j / 4]; });
}
inline V spread8(const float* p) {
  return each([=](int j) { return p[j / 2]; });
}

constexpr int ROWS1 = 4, ROWSN = 2, TOKENS = 2;

}  // namespace
}  // namespace specmoe

#define SPECMOE_VECTORS_ARE_LOOPS
#include "attend.h"
#include "inputs.h"
#include "rows.h"
#include "rows_int8.h"

namespace specmoe {

const Kernels& portable_kernels() {
  static const Kernels kernels{"portable",  any_rows, any_rows_int8, nullptr,
                               put_any, gate_any, round_any,     attend_any};
  return kernels;
}

}  // namespace specmoe
