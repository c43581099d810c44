// Products with int8 activations: exact sums of 4 products in 8 lanes, scaled per 32 columns.
//
// Included after rows.h by files that also define:
//   I            8 lanes of int32
//   dot4         I of 32 weights (int8, |w| <= 128) and 32 activations (int8, |x| <= 127): lane j
//                sums the products of bytes 4j to 4j + 3
//   nibbles_int8 32 bytes of 16 bytes of nibbles by a table: low ones first; load_bytes 32 bytes
//   F8           8 floats, and zero8(), broadcast8(x), quarters(a, b) (a a b b a a b b), to_f8(I),
//                fma8(a, b, c), mul8(a, b), reduced8(v)
//
// Lane j of 8 adds its sum times (scale of the weights * scale of the activations) block by block;
// at the end lane j takes up lane j + 4, then j + 2, j + 1.
#pragma once

#include "rows.h"

namespace specmoe {
namespace {

struct Nibbles8 {
  Bytes16 table;
  static constexpr int64_t kBytes = 16;
  static constexpr bool kFourBit = true;
  Bytes get(const uint8_t* codes) const { return nibbles_int8(table, codes); }
};
struct Plain8 {
  static constexpr int64_t kBytes = 32;
  static constexpr bool kFourBit = false;
  Bytes get(const uint8_t* codes) const { return load_bytes(codes); }
};

template <class Book, bool Halves, bool Zeros, int R, int N>
inline void int8_block(const WeightView& w, const Book& book, const RowFactors* factors,
                       int64_t row, const Inputs& in, int64_t token, float* out,
                       int64_t out_stride) {
  const uint8_t* rows[R];
  const int8_t* x[N];
  const float* x_scale[N];
  F8 sum[R][N];
  for (int r = 0; r < R; r++) rows[r] = w.row(row + r);
  for (int n = 0; n < N; n++) {
    x[n] = in.codes + in.rows[token + n] * in.stride;
    x_scale[n] = in.scales + in.rows[token + n] * (in.stride / 32);
  }
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) sum[r][n] = zero8();
  const int64_t inputs = w.spec->inputs;
  const int64_t blocks = (inputs + 31) / 32;
  const int64_t row_bytes = w.spec->row_bytes;
  const Bytes ones = bytes_of(1);
  for (int64_t b = 0; b < blocks; b++) {
    Bytes activations[N];
    for (int n = 0; n < N; n++) activations[n] = load_bytes(x[n] + 32 * b);
    const bool is_tail = (b + 1) * 32 > inputs;
    for (int r = 0; r < R; r++) {
      const uint8_t* codes = rows[r] + b * Book::kBytes;
      alignas(64) uint8_t tail[Book::kBytes] = {};
      if (is_tail) {
        std::memcpy(tail, codes, static_cast<size_t>(row_bytes - b * Book::kBytes));
        codes = tail;
      }
      const Bytes value = book.get(codes);
      const RowFactors& f = factors[r];
      for (int n = 0; n < N; n++) {
        F8 products = to_f8(dot4(value, activations[n]));
        if (Zeros) {
          const F8 shift = Halves ? quarters(f.zero[2 * b], f.zero[2 * b + 1])
                                  : broadcast8(f.zero[b]);
          products = fma8(to_f8(dot4(ones, activations[n])), shift, products);
        }
        const F8 scale = Halves ? mul8(quarters(f.scale[2 * b], f.scale[2 * b + 1]),
                                       broadcast8(x_scale[n][b]))
                                : broadcast8(f.scale[b] * x_scale[n][b]);
        sum[r][n] = fma8(products, scale, sum[r][n]);
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) out[(token + n) * out_stride + r] = reduced8(sum[r][n]);
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
      return int8_rows(Nibbles8{load_bytes16(kE2M1Doubled)}, 0.5f, 0.0f, w, begin, end, in, out,
                       out_stride);
    case BOOK_INT4:
      return int8_rows(Nibbles8{load_bytes16(kInt4Bytes)}, 1.0f, 8.0f, w, begin, end, in, out,
                       out_stride);
    default:
      return int8_rows(Plain8{}, 1.0f, 0.0f, w, begin, end, in, out, out_stride);
  }
}

}  // namespace
}  // namespace specmoe
