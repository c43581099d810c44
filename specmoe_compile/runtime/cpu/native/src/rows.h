// Products of a few tokens with rows of a weight, the same bits with every instruction set.
//
// Included by one file per instruction set, which defines before:
//   V           16 floats, and zero(), broadcast(x), halves(a, b) (8 of each), load(p),
//               load_bf16(p), load_f16(p), add(a, b), mul(a, b), fma(a, b, c)
//   reduced     the sum of the lanes, in the order below; reduce4 of 4 vectors
//   Table       16 values by code, and load_table(p)
//   lookup      Pair of V of 16 bytes: the low nibbles', the high nibbles'
//   load_e4m3   V of 16 codes without their factor 2^8; load_e8m0, load_int8 V of 16
//   ROWS1, ROWSN, TOKENS   rows at once for one token, for more, and tokens at once
//
// Order of sums. A dot has 16 partial sums: that of lane j takes columns j, j + 16, j + 32, ... in
// this order with fused multiply-adds. A coded weight takes 32 columns at once: lane j adds the
// products of the block's columns 2j and 2j + 1 (4 bit) or j and j + 16 (8 bit), unscaled, and adds
// that sum times the scale. At the end lane j takes up lane j + 8, then j + 4, j + 2, j + 1.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "ahead.h"
#include "factors.h"
#include "gate.h"
#include "numbers.h"
#include "weight.h"

// Before loops over what has to be in registers: compilers leave it in memory where they unroll late.
// Where vectors are loops themselves there are no such registers.
#if defined(SPECMOE_VECTORS_ARE_LOOPS)
#define SPECMOE_UNROLL
#elif defined(__clang__)
#define SPECMOE_UNROLL _Pragma("unroll")
#else
#define SPECMOE_UNROLL _Pragma("GCC unroll 16")
#endif

namespace specmoe {
namespace {

// Rows of so few bytes are read one after the other: hopping between lines of one page halves what
// the processor's prefetchers bring (17 to 9 GB/s on a Zen 4 core), between pages it does not. Not
// so with int8 activations, which ask for the next rows themselves, nor with rows of a line.
constexpr int64_t kShortRow = 2048;

struct PlainF32 {
  using Element = float;
  static V get(const float* p) { return load(p); }
};
struct PlainBF16 {
  using Element = uint16_t;
  static V get(const uint16_t* p) { return load_bf16(p); }
};
struct PlainF16 {
  using Element = uint16_t;
  static V get(const uint16_t* p) { return load_f16(p); }
};

// The sums of R rows and N tokens, each over its lanes.
template <int R, int N>
SPECMOE_INLINE void store_sums(const V (&sum)[R][N], float* out, int64_t out_stride) {
  SPECMOE_UNROLL
  for (int n = 0; n < N; n++) {
    float* of = out + n * out_stride;
    if constexpr (R == 4)
      reduce4(sum[0][n], sum[1][n], sum[2][n], sum[3][n], of);
    else
      for (int r = 0; r < R; r++) of[r] = reduced(sum[r][n]);
  }
}

inline Ahead ahead_of(const WeightView& w, int64_t end) { return {w.row(end), w.next.codes}; }

// Where the inputs of N tokens begin.
template <int N>
struct FloatInputs {
  const float* of[N];

  FloatInputs(const Inputs& in, int64_t token) {
    SPECMOE_UNROLL
    for (int n = 0; n < N; n++) of[n] = in.values + in.rows[token + n] * in.stride;
  }
};

template <class Type, int R, int N>
inline void plain_block(const WeightView& w, const Ahead& to, int64_t row,
                        const FloatInputs<N>& x, float* out, int64_t out_stride) {
  using Element = typename Type::Element;
  const Element* rows[R];
  V sum[R][N];
  for (int r = 0; r < R; r++) rows[r] = reinterpret_cast<const Element*>(w.row(row + r));
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) sum[r][n] = zero();
  const int64_t inputs = w.spec->inputs;
  const int64_t whole = inputs & ~int64_t{15};
  const int64_t ahead = to.of(w.row(row), R * w.spec->row_bytes);
  for (int64_t k = 0; k < whole; k += 16) {
    V xs[N];
    for (int n = 0; n < N; n++) xs[n] = load(x.of[n] + k);
    for (int r = 0; r < R; r++) {
      prefetch(rows[r] + k, ahead);
      const V value = Type::get(rows[r] + k);
      for (int n = 0; n < N; n++) sum[r][n] = fma(value, xs[n], sum[r][n]);
    }
  }
  if (whole < inputs) {  // what follows a row is another's: it must not be read
    for (int r = 0; r < R; r++) {
      alignas(64) Element tail[16] = {};
      std::memcpy(tail, rows[r] + whole, static_cast<size_t>(inputs - whole) * sizeof(Element));
      const V value = Type::get(tail);
      for (int n = 0; n < N; n++) sum[r][n] = fma(value, load(x.of[n] + whole), sum[r][n]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) out[n * out_stride + r] = reduced(sum[r][n]);
}

struct NibbleBook {
  Table table;
  static constexpr int64_t kBytes = 16;  // of 32 codes
  static constexpr bool kFourBit = true;  // only such have zeros, or 16 columns per scale
  explicit NibbleBook(const float* values) : table(load_table(values)) {}
  Pair get(const uint8_t* codes) const { return lookup(table, codes); }
};
struct E4M3Book {
  static constexpr int64_t kBytes = 32;
  static constexpr bool kFourBit = false;
  Pair get(const uint8_t* codes) const { return {load_e4m3(codes), load_e4m3(codes + 16)}; }
};
struct Int8Book {
  static constexpr int64_t kBytes = 32;
  static constexpr bool kFourBit = false;
  Pair get(const uint8_t* codes) const { return {load_int8(codes), load_int8(codes + 16)}; }
};

template <class Book, bool Halves, bool Zeros, int R, int N>
inline void coded_block(const WeightView& w, const Ahead& to, const Book& book,
                        const RowFactors* factors, int64_t row, const FloatInputs<N>& x,
                        float* out, int64_t out_stride) {
  V sum[R][N];
  SPECMOE_UNROLL
  for (int r = 0; r < R; r++) {
    SPECMOE_UNROLL
    for (int n = 0; n < N; n++) sum[r][n] = zero();
  }
  const auto add_block = [&](int r, int64_t b, const uint8_t* codes) {
    Pair value = book.get(codes);
    const RowFactors& f = factors[r];
    if (Zeros) {
      const V shift = Halves ? halves(f.zero[2 * b], f.zero[2 * b + 1]) : broadcast(f.zero[b]);
      value.first = add(value.first, shift);
      value.second = add(value.second, shift);
    }
    const V scale = Halves ? halves(f.scale[2 * b], f.scale[2 * b + 1]) : broadcast(f.scale[b]);
    SPECMOE_UNROLL
    for (int n = 0; n < N; n++) {
      const float* of = x.of[n] + 32 * b;
      const V product = fma(value.second, load(of + 16), mul(value.first, load(of)));
      sum[r][n] = fma(product, scale, sum[r][n]);
    }
  };
  const int64_t whole = w.spec->inputs / 32, row_bytes = w.spec->row_bytes;
  const uint8_t* rows = w.row(row);
  const int64_t ahead = to.of(rows, R * row_bytes);
  for (int64_t b = 0; b < whole; b++) {
    SPECMOE_UNROLL
    for (int r = 0; r < R; r++) {
      const uint8_t* codes = rows + r * row_bytes + b * Book::kBytes;
      if (b * Book::kBytes % kLine == 0) prefetch(codes, ahead);
      add_block(r, b, codes);
    }
  }
  if (whole * 32 < w.spec->inputs) {  // what follows a row is another's
    SPECMOE_UNROLL
    for (int r = 0; r < R; r++) {
      alignas(64) uint8_t tail[Book::kBytes] = {};
      std::memcpy(tail, rows + r * row_bytes + whole * Book::kBytes,
                  static_cast<size_t>(row_bytes - whole * Book::kBytes));
      add_block(r, whole, tail);
    }
  }
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) out[n * out_stride + r] = reduced(sum[r][n]);
}

inline void apply_globals(const WeightView& w, int64_t begin, int64_t end, int64_t tokens,
                          float* out, int64_t out_stride) {
  if (w.spec->globals < 0) return;
  const uint8_t* plane = w.record + w.spec->globals;
  for (int64_t n = begin; n < end; n++)
    for (int64_t t = 0; t < tokens; t++)
      out[t * out_stride + n - begin] *= scale_at(plane, SCALE_F32, n);
}

// Not a part of its callers: of many tokens a call is a small part.
template <int R, int N, class Block>
__attribute__((noinline)) void run_apart(const Block& block, int64_t row, int64_t token,
                                         float* out) {
  block.template run<R, N>(block.template tokens<N>(token), row, out + token * block.out_stride);
}

// Calls block.run<R, N>(its tokens<N>(token), row, out) so that all rows and tokens are covered.
template <int R, int N, class Block>
inline void cover_tokens(const Block& block, int64_t row, int64_t tokens, float* out) {
  int64_t t = 0;
  for (; t + N <= tokens; t += N) run_apart<R, N>(block, row, t, out);
  for (; t < tokens; t++) run_apart<R, 1>(block, row, t, out);
}

template <class Block>
inline void cover_one_token(Block block, int64_t begin, int64_t end, float* out) {
  const auto token = block.template tokens<1>(0);
  const int64_t row_bytes = block.w.spec->row_bytes;
  const bool one_by_one = Block::kOneByOne && row_bytes > kLine && row_bytes <= kShortRow;
  const int64_t most = block.rows_at_once();
  for (int64_t row = begin; row < end; row += most) {
    const int rows = static_cast<int>(end - row < most ? end - row : most);
    block.prepare(row, rows, end);
    int r = 0;
    if (!one_by_one)
      for (; r + ROWS1 <= rows; r += ROWS1)
        block.template run<ROWS1, 1>(token, row + r, out + row + r - begin, r);
    for (; r < rows; r++) block.template run<1, 1>(token, row + r, out + row + r - begin, r);
  }
}

template <class Block>
inline void cover(Block block, int64_t begin, int64_t end, int64_t tokens, float* out) {
  if (tokens == 1) return cover_one_token(block, begin, end, out);
  int64_t row = begin;
  for (; row + ROWSN <= end; row += ROWSN) {
    block.prepare(row, ROWSN, end);
    cover_tokens<ROWSN, TOKENS>(block, row, tokens, out + row - begin);
  }
  for (; row < end; row++) {
    block.prepare(row, 1, end);
    cover_tokens<1, TOKENS>(block, row, tokens, out + row - begin);
  }
}

template <class Type>
struct PlainBlock {
  const WeightView w;
  const Ahead ahead;
  const Inputs in;
  const int64_t out_stride;
  static constexpr bool kOneByOne = true;
  int64_t rows_at_once() const { return kManyRows; }
  void prepare(int64_t, int, int64_t) {}
  template <int N>
  FloatInputs<N> tokens(int64_t token) const {
    return {in, token};
  }
  template <int R, int N>
  void run(const FloatInputs<N>& x, int64_t row, float* out, int = 0) const {
    plain_block<Type, R, N>(w, ahead, row, x, out, out_stride);
  }
};

template <class Book, bool Halves, bool Zeros>
struct CodedBlock {
  const WeightView w;
  const Ahead ahead;
  const Inputs in;
  const int64_t out_stride;
  const Book book;
  Factors<ROWS1>& factors;
  const float factor;
  const float middle;
  static constexpr bool kOneByOne = true;
  int64_t rows_at_once() const { return factors.rows_at_once(*w.spec); }
  void prepare(int64_t row, int rows, int64_t end) {
    factors.decode(w, row, rows, end, factor, middle);
  }
  template <int N>
  FloatInputs<N> tokens(int64_t token) const {
    return {in, token};
  }
  // `nth`: of the rows that were prepared, the first one.
  template <int R, int N>
  void run(const FloatInputs<N>& x, int64_t row, float* out, int nth = 0) const {
    coded_block<Book, Halves, Zeros, R, N>(w, ahead, book, factors.of + nth, row, x, out,
                                              out_stride);
  }
};

// Calls `go` with what a weight of 4 bits has as types: a scale per 16 columns, and zeros. Codes of
// 8 bits have neither, which is fewer cases to compile.
template <bool IsFourBit, class Go>
inline void with_cases(const WeightSpec& spec, const Go& go) {
  using No = std::false_type;
  using May = std::bool_constant<IsFourBit>;
  const bool halves = IsFourBit && spec.block_columns == 16, zeros = IsFourBit && spec.zeros >= 0;
  if (halves && zeros) return go(May(), May());
  if (halves) return go(May(), No());
  return zeros ? go(No(), May()) : go(No(), No());
}

template <class Book>
void coded_rows(const Book& book, float factor, float middle, const WeightView& w, int64_t begin,
                int64_t end, const Inputs& in, float* out, int64_t out_stride) {
  static thread_local Factors<ROWS1> factors;
  with_cases<Book::kFourBit>(*w.spec, [&](auto halves, auto zeros) {
    using Block = CodedBlock<Book, decltype(halves)::value, decltype(zeros)::value>;
    cover(Block{w, ahead_of(w, end), in, out_stride, book, factors, factor, middle}, begin, end,
          in.tokens, out);
  });
  apply_globals(w, begin, end, in.tokens, out, out_stride);
}

constexpr float kE2M1[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                             -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
constexpr float kInt4[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
// "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314, appendix E.
constexpr float kNF4[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

void any_rows(const WeightView& w, int64_t begin, int64_t end, const Inputs& in, float* out,
              int64_t out_stride) {
  const Ahead ahead = ahead_of(w, end);
  switch (w.spec->book) {
    case BOOK_F32:
      return cover(PlainBlock<PlainF32>{w, ahead, in, out_stride}, begin, end, in.tokens, out);
    case BOOK_BF16:
      return cover(PlainBlock<PlainBF16>{w, ahead, in, out_stride}, begin, end, in.tokens, out);
    case BOOK_F16:
      return cover(PlainBlock<PlainF16>{w, ahead, in, out_stride}, begin, end, in.tokens, out);
    case BOOK_E2M1:
      return coded_rows(NibbleBook(kE2M1), 1.0f, 0.0f, w, begin, end, in, out, out_stride);
    case BOOK_INT4:
      return coded_rows(NibbleBook(kInt4), 1.0f, 8.0f, w, begin, end, in, out, out_stride);
    case BOOK_NF4:
      return coded_rows(NibbleBook(kNF4), 1.0f, 0.0f, w, begin, end, in, out, out_stride);
    case BOOK_E4M3:
      return coded_rows(E4M3Book(), 256.0f, 0.0f, w, begin, end, in, out, out_stride);
    default: return coded_rows(Int8Book(), 1.0f, 0.0f, w, begin, end, in, out, out_stride);
  }
}

}  // namespace
}  // namespace specmoe
