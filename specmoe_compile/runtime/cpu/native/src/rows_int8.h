// Products with int8 activations: exact sums of 4 products, scaled per 32 columns.
//
// Included after rows.h by files that also define:
//   Bytes        64 weights (int8, |w| <= 128), and load_bytes(p)
//   Bytes16      a table of 16 int8, and load_table16(p)
//   nibbles      BytesPair of 64 bytes by a table: of the low nibbles, of the high ones
//   Acts         64 activations (int8, |x| <= 127), and load_acts(p)
//   dots         V of weights and activations: lane j sums the products of bytes 4j to 4j + 3
//   sums         the same with all weights 1
//   spread4      V of 4 floats, each in 4 lanes; spread8 of 8, each in 2
//
// 128 columns at a time make two vectors of 64 weights: the low and the high nibbles of 64 bytes, or
// 64 bytes and the next 64. So there are 32 partial sums, 16 lanes twice: each adds its sum times
// (scale of the weights * scale of the activations), group by group. At the end the second vector is
// added to the first one, and then lane j takes up j + 8, j + 4, j + 2, j + 1.
#pragma once

#include "rows.h"

namespace specmoe {
namespace {

constexpr int64_t kGroup = 128;  // columns
constexpr int64_t kGroupBlocks = kGroup / 32;

struct Nibbles8 {
  Bytes16 table;
  static constexpr int64_t kBytes = 64;  // of a group
  static constexpr bool kFourBit = true;
  BytesPair get(const uint8_t* codes) const { return nibbles(table, codes); }
};
struct Plain8 {
  static constexpr int64_t kBytes = 128;
  static constexpr bool kFourBit = false;
  BytesPair get(const uint8_t* codes) const { return {load_bytes(codes), load_bytes(codes + 64)}; }
};

// Of a group's scales (or zeros) those of each lane of the first vector, or of the second one.
template <class Book, bool Halves, bool Second>
inline V by_lane(const float* p) {
  if constexpr (!Book::kFourBit) return Second ? halves(p[2], p[3]) : halves(p[0], p[1]);
  return Halves ? spread8(p) : spread4(p);
}

template <class Book, bool Halves, bool Zeros, int R, int N>
inline void int8_block(const WeightView& w, const Book& book, const RowFactors* factors,
                       int64_t row, const Inputs& in, int64_t token, float* out,
                       int64_t out_stride) {
  constexpr int64_t kFactors = kGroupBlocks * (Halves ? 2 : 1);
  const uint8_t* rows[R];
  const int8_t* x[N];
  const float* x_scale[N];
  V first_sum[R][N], second_sum[R][N];
  for (int r = 0; r < R; r++) rows[r] = w.row(row + r);
  for (int n = 0; n < N; n++) {
    x[n] = in.codes + in.rows[token + n] * in.stride;
    x_scale[n] = in.scales + in.rows[token + n] * (in.stride / 32);
  }
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) first_sum[r][n] = second_sum[r][n] = zero();
  const int64_t inputs = w.spec->inputs;
  for (int64_t g = 0; g * kGroup < inputs; g++) {
    Acts first_x[N], second_x[N];
    V first_scale_x[N], second_scale_x[N];
    for (int n = 0; n < N; n++) {
      first_x[n] = load_acts(x[n] + g * kGroup);
      second_x[n] = load_acts(x[n] + g * kGroup + 64);
      first_scale_x[n] = by_lane<Book, false, false>(x_scale[n] + g * kGroupBlocks);
      second_scale_x[n] = by_lane<Book, false, true>(x_scale[n] + g * kGroupBlocks);
    }
    const bool is_tail = (g + 1) * kGroup > inputs;
    for (int r = 0; r < R; r++) {
      const uint8_t* codes = rows[r] + g * Book::kBytes;
      for (int64_t line = 0; line < Book::kBytes; line += kLine)
        prefetch(codes, R * w.spec->row_bytes + line);
      const float* scales = factors[r].scale + g * kFactors;
      const float* zeros = Zeros ? factors[r].zero + g * kFactors : nullptr;
      // What follows a row, or its scales, is another's.
      alignas(64) uint8_t tail[Book::kBytes] = {};
      float tail_scales[kFactors] = {}, tail_zeros[kFactors] = {};
      if (is_tail) {
        const int64_t blocks = (inputs - g * kGroup + 31) / 32;
        const size_t bytes = sizeof(float) * static_cast<size_t>(blocks * kFactors / kGroupBlocks);
        std::memcpy(tail, codes, static_cast<size_t>(w.spec->row_bytes - g * Book::kBytes));
        std::memcpy(tail_scales, scales, bytes);
        if (Zeros) std::memcpy(tail_zeros, zeros, bytes);
        codes = tail;
        scales = tail_scales;
        zeros = tail_zeros;
      }
      const BytesPair value = book.get(codes);
      const V first_scale = by_lane<Book, Halves, false>(scales);
      const V second_scale = by_lane<Book, Halves, true>(scales);
      for (int n = 0; n < N; n++) {
        V first = dots(value.first, first_x[n]), second = dots(value.second, second_x[n]);
        if (Zeros) {
          first = fma(sums(first_x[n]), by_lane<Book, Halves, false>(zeros), first);
          second = fma(sums(second_x[n]), by_lane<Book, Halves, true>(zeros), second);
        }
        first_sum[r][n] = fma(first, mul(first_scale, first_scale_x[n]), first_sum[r][n]);
        second_sum[r][n] = fma(second, mul(second_scale, second_scale_x[n]), second_sum[r][n]);
      }
    }
  }
  for (int n = 0; n < N; n++) {
    const auto both = [&](int r) { return add(first_sum[r][n], second_sum[r][n]); };
    float* of = out + (token + n) * out_stride;
    if constexpr (R == 4)
      reduce4(both(0), both(1), both(2), both(3), of);
    else
      for (int r = 0; r < R; r++) of[r] = reduced(both(r));
  }
}

template <class Book>
struct Int8Block {
  const WeightView& w;
  const Inputs& in;
  int64_t out_stride;
  const Book& book;
  Factors<ROWS1>& factors;
  float factor;
  float middle;
  static constexpr bool kOneByOne = false;
  int64_t rows_at_once() const { return factors.rows_at_once(*w.spec); }
  void prepare(int64_t row, int rows) { factors.decode(w, row, rows, factor, middle); }
  template <int R, int N>
  void run(int64_t row, int64_t token, float* out, int nth = 0) const {
    const RowFactors* of = factors.of + nth;
    const bool halves = Book::kFourBit && w.spec->block_columns == 16;
    const bool zeros = Book::kFourBit && w.spec->zeros >= 0;
    constexpr bool may = Book::kFourBit;  // else fewer cases to compile
    if (halves && zeros)
      int8_block<Book, may, may, R, N>(w, book, of, row, in, token, out, out_stride);
    else if (halves)
      int8_block<Book, may, false, R, N>(w, book, of, row, in, token, out, out_stride);
    else if (zeros)
      int8_block<Book, false, may, R, N>(w, book, of, row, in, token, out, out_stride);
    else
      int8_block<Book, false, false, R, N>(w, book, of, row, in, token, out, out_stride);
  }
};

template <class Book>
void int8_rows(const Book& book, float factor, float middle, const WeightView& w, int64_t begin,
               int64_t end, const Inputs& in, float* out, int64_t out_stride) {
  static thread_local Factors<ROWS1> factors;
  cover(Int8Block<Book>{w, in, out_stride, book, factors, factor, middle}, begin, end, in.tokens,
        out);
  apply_globals(w, begin, end, in.tokens, out, out_stride);
}

constexpr int8_t kE2M1Doubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
constexpr int8_t kInt4Bytes[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

void any_rows_int8(const WeightView& w, int64_t begin, int64_t end, const Inputs& in, float* out,
                   int64_t out_stride) {
  switch (w.spec->book) {
    case BOOK_E2M1:
      return int8_rows(Nibbles8{load_table16(kE2M1Doubled)}, 0.5f, 0.0f, w, begin, end, in, out,
                       out_stride);
    case BOOK_INT4:
      return int8_rows(Nibbles8{load_table16(kInt4Bytes)}, 1.0f, 8.0f, w, begin, end, in, out,
                       out_stride);
    default:
      return int8_rows(Plain8{}, 1.0f, 0.0f, w, begin, end, in, out, out_stride);
  }
}

}  // namespace
}  // namespace specmoe
