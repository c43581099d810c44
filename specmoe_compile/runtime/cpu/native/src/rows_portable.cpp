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

struct I {
  int32_t lane[8];
};
struct F8 {
  float lane[8];
};
struct Bytes {
  int8_t byte[32];
};
struct Bytes16 {
  int8_t byte[16];
};

template <class Of>
inline F8 each8(Of of) {
  F8 v;
  for (int j = 0; j < 8; j++) v.lane[j] = of(j);
  return v;
}
inline F8 zero8() { return F8{}; }
inline F8 broadcast8(float x) {
  return each8([=](int) { return x; });
}
inline F8 quarters(float a, float b) {
  return each8([=](int j) { return (j & 2) ? b : a; });
}
inline F8 to_f8(const I& v) {
  return each8([&](int j) { return static_cast<float>(v.lane[j]); });
}
inline F8 fma8(const F8& a, const F8& b, const F8& c) {
  return each8([&](int j) { return std::fmaf(a.lane[j], b.lane[j], c.lane[j]); });
}
inline F8 mul8(const F8& a, const F8& b) {
  return each8([&](int j) { return a.lane[j] * b.lane[j]; });
}
inline float reduced8(F8 v) {
  for (int step = 4; step > 0; step >>= 1)
    for (int j = 0; j < step; j++) v.lane[j] += v.lane[j + step];
  return v.lane[0];
}
inline Bytes load_bytes(const void* p) {
  Bytes v;
  std::memcpy(v.byte, p, sizeof v.byte);
  return v;
}
inline Bytes16 load_bytes16(const int8_t* p) {
  Bytes16 v;
  std::memcpy(v.byte, p, sizeof v.byte);
  return v;
}
inline Bytes bytes_of(int8_t x) {
  Bytes v;
  std::memset(v.byte, x, sizeof v.byte);
  return v;
}
inline Bytes nibbles_int8(const Bytes16& t, const uint8_t* p) {
  Bytes v;
  for (int j = 0; j < 16; j++) {
    v.byte[j] = t.byte[p[j] & 15];
    v.byte[j + 16] = t.byte[p[j] >> 4];
  }
  return v;
}
inline I dot4(const Bytes& w, const Bytes& x) {
  I v;
  for (int j = 0; j < 8; j++) {
    v.lane[j] = 0;
    for (int i = 0; i < 4; i++) v.lane[j] += w.byte[4 * j + i] * x.byte[4 * j + i];
  }
  return v;
}

constexpr int ROWS1 = 4, ROWSN = 2, TOKENS = 2;

}  // namespace
}  // namespace specmoe

#include "attend.h"
#include "rows.h"
#include "rows_int8.h"

namespace specmoe {

const Kernels& portable_kernels() {
  static const Kernels kernels{"portable", any_rows,  any_rows_int8,
                               gate_any,   round_any, attend_any};
  return kernels;
}

}  // namespace specmoe
