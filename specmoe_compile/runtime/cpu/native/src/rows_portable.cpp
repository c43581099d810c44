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
  int8_t byte[64];
};
struct Bytes16 {
  int8_t byte[16];
};
struct BytesPair {
  Bytes first, second;
};
using Acts = Bytes;

inline Bytes load_bytes(const void* p) {
  Bytes v;
  std::memcpy(v.byte, p, sizeof v.byte);
  return v;
}
inline Acts load_acts(const int8_t* p) { return load_bytes(p); }
inline Bytes16 load_table16(const int8_t* p) {
  Bytes16 v;
  std::memcpy(v.byte, p, sizeof v.byte);
  return v;
}
inline BytesPair nibbles(const Bytes16& t, const uint8_t* p) {
  BytesPair v;
  for (int j = 0; j < 64; j++) {
    v.first.byte[j] = t.byte[p[j] & 15];
    v.second.byte[j] = t.byte[p[j] >> 4];
  }
  return v;
}
inline V dots(const Bytes& w, const Acts& x) {
  return each([&](int j) {
    int32_t sum = 0;
    for (int i = 4 * j; i < 4 * j + 4; i++) sum += w.byte[i] * x.byte[i];
    return static_cast<float>(sum);
  });
}
inline V sums(const Acts& x) {
  return each([&](int j) {
    int32_t sum = 0;
    for (int i = 4 * j; i < 4 * j + 4; i++) sum += x.byte[i];
    return static_cast<float>(sum);
  });
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
