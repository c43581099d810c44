// Products with int8 activations: exact sums of a lane's products, scaled per 32 columns.
//
// Included after rows.h by files that also define:
//   Bytes        64 bytes, and load_bytes(p)
//   Bytes16      a table of 16 bytes below 32, load_table16(p), and at(table, nibbles)
//   low_nibbles, high_nibbles   of Bytes; each_is_one()
//   Ints         16 int32, zero_ints(), load_ints(p), store_minus(p, v), shifted<n>(v), to_floats(v)
//   dot          Ints, Bytes of weights below 32 and of activations (int8, |x| <= 127) -> Ints: lane
//                j adds the products of bytes 4j to 4j + 3
//   dot_signed   sums of Bytes of weights (int8) with activations, of which the first argument has
//                the sums, negative and times 128
//   spread4      V of 4 floats, each in 4 lanes; spread8 of 8, each in 2
//
// A group's codes are 64 bytes: 128 columns of 4 bits, 64 of 8. Lane j of 16 partial sums takes the
// products of bytes 4j to 4j + 3, of all nibbles, as integers, and adds them times (scale of the
// weights * scale of the activations), group by group. At the end lane j takes up j + 8, j + 4,
// j + 2, j + 1.
#pragma once

#include "inputs.h"
#include "rows.h"

namespace specmoe {
namespace {

// Codes as numbers that have no sign: weight + 2^kShift.
struct Int4Bytes {
  static constexpr int kShift = 3;
  BytesPair get(const Bytes& codes) const { return {low_nibbles(codes), high_nibbles(codes)}; }
};
struct E2M1Bytes {
  static constexpr int kShift = 4;
  Bytes16 table;
  BytesPair get(const Bytes& codes) const {
    return {at(table, low_nibbles(codes)), at(table, high_nibbles(codes))};
  }
};

template <class Codes>
struct Nibbles8 {
  Codes codes;
  static constexpr int64_t kColumns = 128;  // of a group
  static constexpr bool kFourBit = true;
  Ints dot_group(const Bytes& bytes, const int8_t* x, const Ints& minus) const {
    const BytesPair value = codes.get(bytes);
    const Ints sum = dot(shifted<Codes::kShift>(minus), value.first, load_bytes(x));
    return dot(sum, value.second, load_bytes(x + 64));
  }
};
struct Plain8 {
  static constexpr int64_t kColumns = 64;
  static constexpr bool kFourBit = false;
  Ints dot_group(const Bytes& bytes, const int8_t* x, const Ints& minus) const {
    return dot_signed(shifted<7>(minus), bytes, load_bytes(x));
  }
};

// Of a group's scales (or zeros) that of each lane.
template <class Book, bool Halves>
SPECMOE_INLINE V by_lane(const float* p) {
  if constexpr (!Book::kFourBit) return halves(p[0], p[1]);
  return Halves ? spread8(p) : spread4(p);
}

// Where the inputs of N tokens begin.
template <int N>
struct Int8Inputs {
  const int8_t* x[N];
  const float* scale[N];
  const int32_t* minus[N];
};

template <class Book, bool Halves, bool Zeros, int R, int N>
struct Int8Sums {
  static constexpr int64_t kBlocks = Book::kColumns / 32;  // of a group
  static constexpr int64_t kFactors = kBlocks * (Halves ? 2 : 1);

  const Book& book;
  const Int8Inputs<N>& in;
  V sum[R][N];

  SPECMOE_INLINE void add_group(int r, int64_t g, const uint8_t* codes, const float* scales,
                                const float* zeros) {
    const Bytes bytes = load_bytes(codes);
    const V scale = by_lane<Book, Halves>(scales);
    SPECMOE_UNROLL
    for (int n = 0; n < N; n++) {
      const Ints minus_sums = load_ints(in.minus[n] + 16 * g);
      V dots = to_floats(book.dot_group(bytes, in.x[n] + Book::kColumns * g, minus_sums));
      if (Zeros)
        dots = fma(mul(to_floats(minus_sums), broadcast(-1.0f)), by_lane<Book, Halves>(zeros),
                   dots);
      const V scale_x = by_lane<Book, false>(in.scale[n] + kBlocks * g);
      sum[r][n] = fma(dots, mul(scale, scale_x), sum[r][n]);
    }
  }
};

template <class Book, bool Halves, bool Zeros>
struct Int8Block {
  static constexpr bool kOneByOne = false;

  const WeightView w;
  const Ahead ahead;
  const Inputs in;
  const int64_t out_stride;
  const Book book;
  Factors<ROWS1>& factors;
  const float factor;
  const float middle;
  // Copies, since whatever is written may change what lies in memory.
  const int64_t inputs = w.spec->inputs, row_bytes = w.spec->row_bytes;
  const uint8_t* const codes = w.row(0);

  int64_t rows_at_once() const { return factors.rows_at_once(*w.spec); }
  void prepare(int64_t row, int rows, int64_t end) {
    factors.decode(w, row, rows, end, factor, middle);
  }

  template <int N>
  SPECMOE_INLINE Int8Inputs<N> tokens(int64_t token) const {
    constexpr int64_t kLane = Book::kColumns / 16;  // columns of one
    Int8Inputs<N> of;
    SPECMOE_UNROLL
    for (int n = 0; n < N; n++) {
      const int64_t from = in.rows[token + n] * in.stride;
      of.x[n] = in.codes + from;
      of.scale[n] = in.scales + from / 32;
      of.minus[n] = in.minus_sums + from / kLane;
    }
    return of;
  }

  template <int R, int N>
  SPECMOE_INLINE void run(const Int8Inputs<N>& of, int64_t row, float* out, int nth = 0) const {
    using Sums = Int8Sums<Book, Halves, Zeros, R, N>;
    const RowFactors* f = factors.of + nth;
    Sums sums{book, of, {}};
    SPECMOE_UNROLL
    for (int r = 0; r < R; r++) {
      SPECMOE_UNROLL
      for (int n = 0; n < N; n++) sums.sum[r][n] = zero();
    }
    const int64_t groups = inputs / Book::kColumns;
    const uint8_t* first = codes + row * row_bytes;
    const int64_t to = ahead.of(first, R * row_bytes);
    for (int64_t g = 0; g < groups; g++) {
      SPECMOE_UNROLL
      for (int r = 0; r < R; r++) {
        const uint8_t* line = first + r * row_bytes + g * kLine;
        prefetch(line, to);
        sums.add_group(r, g, line, f[r].scale + g * Sums::kFactors,
                       Zeros ? f[r].zero + g * Sums::kFactors : nullptr);
      }
    }
    if (groups * Book::kColumns < inputs) add_rest(sums, f, first, groups);
    store_sums(sums.sum, out, out_stride);
  }

 private:
  // What follows a row, or its scales, is another's.
  template <int R, int N>
  SPECMOE_INLINE void add_rest(Int8Sums<Book, Halves, Zeros, R, N>& sums, const RowFactors* f,
                               const uint8_t* first, int64_t groups) const {
    constexpr int64_t kFactors = Int8Sums<Book, Halves, Zeros, R, N>::kFactors;
    const int64_t left = inputs - groups * Book::kColumns;
    const size_t bytes = sizeof(float) * static_cast<size_t>((left + 31) / 32 * (Halves ? 2 : 1));
    SPECMOE_UNROLL
    for (int r = 0; r < R; r++) {
      alignas(64) uint8_t line[kLine] = {};
      float scales[kFactors] = {}, zeros[kFactors] = {};
      std::memcpy(line, first + r * row_bytes + groups * kLine,
                  static_cast<size_t>(row_bytes - groups * kLine));
      std::memcpy(scales, f[r].scale + groups * kFactors, bytes);
      if (Zeros) std::memcpy(zeros, f[r].zero + groups * kFactors, bytes);
      sums.add_group(r, groups, line, scales, zeros);
    }
  }
};

template <class Book>
void int8_rows(const Book& book, float factor, float middle, const WeightView& w, int64_t begin,
               int64_t end, const Inputs& in, float* out, int64_t out_stride) {
  static thread_local Factors<ROWS1> factors;
  with_cases<Book::kFourBit>(*w.spec, [&](auto halves, auto zeros) {
    using Block = Int8Block<Book, decltype(halves)::value, decltype(zeros)::value>;
    cover(Block{w, ahead_of(w, end), in, out_stride, book, factors, factor, middle}, begin, end,
          in.tokens, out);
  });
  apply_globals(w, begin, end, in.tokens, out, out_stride);
}

// Twice the value, and 16.
constexpr uint8_t kE2M1Doubled[16] = {16, 17, 18, 19, 20, 22, 24, 28, 16, 15, 14, 13, 12, 10, 8, 4};

void any_rows_int8(const WeightView& w, int64_t begin, int64_t end, const Inputs& in, float* out,
                   int64_t out_stride) {
  switch (w.spec->book) {
    case BOOK_E2M1:
      return int8_rows(Nibbles8<E2M1Bytes>{{load_table16(kE2M1Doubled)}}, 0.5f, 0.0f, w, begin, end, in, out,
                       out_stride);
    case BOOK_INT4:
      return int8_rows(Nibbles8<Int4Bytes>{}, 1.0f, 8.0f, w, begin, end, in, out, out_stride);
    default:
      return int8_rows(Plain8{}, 1.0f, 0.0f, w, begin, end, in, out, out_stride);
  }
}

}  // namespace
}  // namespace specmoe
