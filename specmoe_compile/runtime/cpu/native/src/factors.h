// Scales and zeros of a coded weight's rows as floats: all rows of a block at once where they lie one
// after the other, since calls and divisions take as long as a short row's products.
//
// Included by rows.h, after the vector operations that it lists.
#pragma once

#include <cstdint>
#include <cstring>

#include "ahead.h"
#include "numbers.h"
#include "weight.h"

namespace specmoe {
namespace {

constexpr int64_t kMaxBlocks = 4096;  // of 32 columns: what a row's scales are decoded for
// Rows, and factors, that are decoded at once where rows are short: decoding a few takes as long as
// many, but of long rows many are read in one go while no codes are.
constexpr int64_t kManyRows = 64;
constexpr int64_t kManyFactors = 1024;

// Scales (or zeros) of one row, one float per 32 columns, or two where 16 columns share one.
struct RowFactors {
  const float* scale;
  const float* zero;  // anything where there are none
};

inline float scale_at(const uint8_t* plane, int32_t kind, int64_t index) {
  switch (kind) {
    case SCALE_E8M0: return from_e8m0(plane[index]);
    case SCALE_E4M3: return from_e4m3(plane[index]);
    case SCALE_F32: {
      float value;
      std::memcpy(&value, plane + 4 * index, 4);
      return value;
    }
    default: {
      uint16_t bits;
      std::memcpy(&bits, plane + 2 * index, 2);
      return kind == SCALE_BF16 ? from_bf16(bits) : from_f16(bits);
    }
  }
}

// Spreads a row of `columns` scales over the blocks of 32 columns (16 with `halves`).
template <class At>
inline void spread(At at, int64_t first, const WeightSpec& spec, bool halves, float* out) {
  const int64_t count = (spec.inputs + 31) / 32 * (halves ? 2 : 1);
  // A division takes as long as a short row.
  const int64_t per = spec.block_columns >> (halves ? 4 : 5);
  if (per == 1) {
    for (int64_t i = 0; i < spec.scale_columns; i++) out[i] = at(first + i);
    for (int64_t i = spec.scale_columns; i < count; i++) out[i] = 0.0f;
    return;
  }
  int64_t i = 0;
  for (int64_t column = 0; column < spec.scale_columns; column++) {
    const float value = at(first + column);
    const int64_t end = column + 1 == spec.scale_columns ? count : (column + 1) * per;
    for (; i < end; i++) out[i] = value;
  }
}

// Factors of up to R rows, or kManyRows short ones; a scale row that the previous one used, too, is
// not decoded again.
template <int R>
class Factors {
 public:
  RowFactors of[kManyRows];
  static_assert(R <= kManyRows && kManyFactors <= R * kMaxBlocks, "they fit");

  static int64_t rows_at_once(const WeightSpec& spec) {
    const int64_t rows = kManyFactors / blocks_of(spec) / R * R;
    return rows < R ? R : rows < kManyRows ? rows : kManyRows;
  }

  // `end`: of all rows that are read.
  void decode(const WeightView& w, int64_t row, int rows, int64_t end, float factor,
              float middle) {
    const WeightSpec& spec = *w.spec;
    const bool halves = spec.block_columns == 16;
    const int64_t count = blocks_of(spec);
    const bool is_even = spec.scale_columns == count || !halves;
    if (spec.block_rows == 1 && is_even && spec.scale != SCALE_F32)
      decode_together(w, row, rows, end, factor, middle, count);
    else
      decode_each(w, row, rows, factor, middle, halves);
  }

 private:
  // Factors that a row has.
  static int64_t blocks_of(const WeightSpec& spec) {
    return (spec.inputs + 31) / 32 * (spec.block_columns == 16 ? 2 : 1);
  }

  // Rows whose scales lie one after the other, one per block or for several.
  void decode_together(const WeightView& w, int64_t row, int rows, int64_t end, float factor,
                       float middle, int64_t count) {
    const WeightSpec& spec = *w.spec;
    const int64_t first = row * spec.scale_columns;
    const uint8_t* plane = w.record + spec.scales;
    const int64_t all = rows * spec.scale_columns;
    const int64_t element = scale_bytes(spec.scale);
    const uint8_t* after = row + rows < end ? plane + (first + all) * element : w.next.scales;
    if (after != nullptr) prefetch_lines(after, all * element);
    const bool is_spread = spec.scale_columns != count;
    float* scales = is_spread ? compact_ : scale_[0];
    if (spec.scale == SCALE_E8M0)
      by_sixteen<uint8_t>(plane + first, all, scales, [=](const uint8_t* p) {
        return mul(load_e8m0(p), broadcast(factor));
      });
    else if (spec.scale == SCALE_E4M3)
      by_sixteen<uint8_t>(plane + first, all, scales, [=](const uint8_t* p) {
        return mul(load_e4m3(p), broadcast(256.0f * factor));
      });
    else if (spec.scale == SCALE_BF16)
      by_sixteen<uint16_t>(plane + 2 * first, all, scales, [=](const uint16_t* p) {
        return mul(load_bf16(p), broadcast(factor));
      });
    else
      by_sixteen<uint16_t>(plane + 2 * first, all, scales, [=](const uint16_t* p) {
        return mul(load_f16(p), broadcast(factor));
      });
    if (is_spread) spread_rows(spec, rows, count, scale_[0]);
    if (spec.zeros >= 0) {  // no code is above 127, which would be read as negative
      by_sixteen<uint8_t>(w.record + spec.zeros + first, all, is_spread ? compact_ : zero_[0],
                          [=](const uint8_t* p) {
                            return fma(load_int8(p), broadcast(-1.0f), broadcast(middle));
                          });
      if (is_spread) spread_rows(spec, rows, count, zero_[0]);
    }
    if (count == together_) return;
    together_ = count;
    for (int64_t r = 0; r < rows_at_once(spec); r++)
      of[r] = {scale_[0] + r * count, zero_[0] + r * count};
  }

  // compact_ [rows, columns] -> out [rows, count], each value for the blocks that share it.
  void spread_rows(const WeightSpec& spec, int rows, int64_t count, float* out) const {
    const int64_t per = spec.block_columns / 32, columns = spec.scale_columns;
    if (per == 4 && count == 4 * columns) {  // groups of 128: a length that is known takes no loop
      for (int64_t i = 0; i < rows * columns; i++)
        for (int64_t j = 0; j < 4; j++) out[4 * i + j] = compact_[i];
      return;
    }
    const float* from = compact_;
    for (int r = 0; r < rows; r++)
      for (int64_t column = 0, block = 0; column < columns; column++, from++) {
        const int64_t end = column + 1 == columns ? count : (column + 1) * per;
        for (; block < end; block++) *out++ = *from;
      }
  }

  template <class Element, class Convert>
  static void by_sixteen(const uint8_t* from, int64_t count, float* out, Convert convert) {
    constexpr int64_t kElement = sizeof(Element);
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
      store(out + i, convert(reinterpret_cast<const Element*>(from + i * kElement)));
    }
    if (i == count) return;
    // A length that is not known takes a call: one for all that is left.
    alignas(64) Element part[16] = {};
    std::memcpy(part, from + i * kElement, static_cast<size_t>((count - i) * kElement));
    const V value = convert(part);
    std::memcpy(out + i, &value, static_cast<size_t>(count - i) * sizeof(float));
  }

  void decode_each(const WeightView& w, int64_t row, int rows, float factor, float middle,
                   bool halves) {
    const WeightSpec& spec = *w.spec;
    const int64_t count = blocks_of(spec);
    int64_t before = -1;
    together_ = 0;
    for (int r = 0; r < rows; r++) {
      float* scales = scale_[0] + r * count;
      const int64_t scale_row = spec.block_rows == 1 ? row + r : (row + r) / spec.block_rows;
      if (scale_row == before) {
        of[r] = of[r - 1];
        continue;
      }
      before = scale_row;
      const int64_t first = scale_row * spec.scale_columns;
      const uint8_t* plane = w.record + spec.scales;
      const int32_t kind = spec.scale;
      if (kind == SCALE_E8M0)
        spread([=](int64_t i) { return from_e8m0(plane[i]) * factor; }, first, spec, halves,
               scales);
      else if (kind == SCALE_E4M3)
        spread([=](int64_t i) { return from_e4m3(plane[i]) * factor; }, first, spec, halves,
               scales);
      else
        spread([=](int64_t i) { return scale_at(plane, kind, i) * factor; }, first, spec, halves,
               scales);
      of[r].scale = scales;
      of[r].zero = nullptr;
      if (spec.zeros >= 0) {
        const uint8_t* zeros = w.record + spec.zeros;
        spread([=](int64_t i) { return middle - static_cast<float>(zeros[i]); }, first, spec,
               halves, zero_[0] + r * count);
        of[r].zero = zero_[0] + r * count;
      }
    }
  }

  alignas(64) float scale_[R][kMaxBlocks];
  alignas(64) float zero_[R][kMaxBlocks];
  alignas(64) float compact_[R * kMaxBlocks];
  int64_t together_ = 0;  // factors per row, where `of` says that rows lie one after the other
};

}  // namespace
}  // namespace specmoe
