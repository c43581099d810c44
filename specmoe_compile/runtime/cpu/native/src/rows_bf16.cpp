// Products of 4-bit codes with inputs in bfloat16, by the instruction that multiplies pairs of such;
// compiled with AVX-512 BF16 and VBMI, empty elsewhere.
//
// The same bits as the kernels of rows.h: a code has few enough bits that its product with a bfloat16
// number is exact, so that the sum of two products, columns 2j and 2j + 1 in lane j, is rounded once
// either way. Only numbers near the ends of float32's range differ, for which `any_rows` is taken.
#include "weight.h"

#if defined(__AVX512BF16__) && defined(__AVX512F__) && defined(__AVX512BW__) && \
    defined(__AVX512VL__) && defined(__AVX512VNNI__) && defined(__AVX512DQ__) && \
    defined(__AVX512VBMI__)
#include <cstring>
#include <vector>

#include "vectors_avx512.h"

#include "inputs.h"
#include "rows.h"

namespace specmoe {
namespace {

// By code, twice: what looks up takes 5 bits, of which the highest is another code's.
struct Halves32 {
  alignas(64) uint16_t value[32];
  explicit Halves32(const float* values) {
    for (int i = 0; i < 32; i++) value[i] = to_bf16(values[i & 15]);
  }
};

struct PairBook {
  __m512i table;
  explicit PairBook(const Halves32& halves) : table(_mm512_load_si512(halves.value)) {}

  // Words with a code in their low 5 bits -> values.
  __m512bh values(__m512i codes) const {
    return reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(codes, table));
  }
};

// From words of a byte twice: its low nibble, its high one.
inline __m512i nibbles(__m512i words) {
  return _mm512_srlv_epi16(words, _mm512_set1_epi32(0x00040000));
}

// Which bytes make words: byte j of one block, and of the next one, twice.
struct BlockBytes {
  alignas(64) uint8_t of[2][64];
  BlockBytes() {
    for (int pair = 0; pair < 2; pair++)
      for (int j = 0; j < 64; j++)
        of[pair][j] = static_cast<uint8_t>(32 * pair + 16 * (j & 1) + j / 4);
  }
};

// Where the inputs of N tokens begin.
template <int N>
struct HalfInputs {
  const uint16_t* of[N];
};

template <bool HasHalves, int R, int N>
struct PairSums {
  const PairBook& book;
  const HalfInputs<N>& x;
  V sum[R][N];

  // 32 columns of a row, and its scales.
  SPECMOE_INLINE void add_block(int r, int64_t b, __m512i codes, const float* of) {
    const V scale = HasHalves ? halves(of[2 * b], of[2 * b + 1]) : broadcast(of[b]);
    const __m512bh value = book.values(codes);
    SPECMOE_UNROLL
    for (int n = 0; n < N; n++) {
      const auto xs = reinterpret_cast<__m512bh>(_mm512_loadu_si512(x.of[n] + 32 * b));
      sum[r][n] = fma(_mm512_dpbf16_ps(zero(), value, xs), scale, sum[r][n]);
    }
  }
};

template <bool HasHalves>
struct PairBlock {
  static constexpr bool kOneByOne = false;
  static constexpr int64_t kBytes = 16, kLineBlocks = kLine / kBytes;  // of 32 codes

  const WeightView w;
  const Ahead ahead;
  const Inputs in;
  const int64_t out_stride;
  const PairBook book;
  Factors<ROWS1>& factors;
  const float middle;
  const __m512i first, second;  // BlockBytes
  // Copies, since whatever is written may change what lies in memory.
  const int64_t inputs = w.spec->inputs, row_bytes = w.spec->row_bytes;
  const uint8_t* const codes = w.row(0);

  int64_t rows_at_once() const { return factors.rows_at_once(*w.spec); }
  void prepare(int64_t row, int rows, int64_t end) {
    factors.decode(w, row, rows, end, 1.0f, middle);
  }

  template <int N>
  SPECMOE_INLINE HalfInputs<N> tokens(int64_t token) const {
    HalfInputs<N> x;
    SPECMOE_UNROLL
    for (int n = 0; n < N; n++) x.of[n] = in.bf16 + in.rows[token + n] * in.stride;
    return x;
  }

  template <int R, int N>
  SPECMOE_INLINE void run(const HalfInputs<N>& x, int64_t row, float* out, int nth = 0) const {
    const RowFactors* factor = factors.of + nth;
    PairSums<HasHalves, R, N> sums{book, x, {}};
    SPECMOE_UNROLL
    for (int r = 0; r < R; r++) {
      SPECMOE_UNROLL
      for (int n = 0; n < N; n++) sums.sum[r][n] = zero();
    }
    const int64_t whole = inputs / 32;
    const uint8_t* rows = codes + row * row_bytes;
    const int64_t to = ahead.of(rows, R * row_bytes);
    int64_t b = 0;
    for (; b + kLineBlocks <= whole; b += kLineBlocks) {
      SPECMOE_UNROLL
      for (int r = 0; r < R; r++) {
        const uint8_t* line = rows + r * row_bytes + b * kBytes;
        const float* scale = factor[r].scale;
        prefetch(line, to);
        const __m512i all = _mm512_loadu_si512(line);
        const __m512i one = nibbles(_mm512_permutexvar_epi8(first, all));
        const __m512i other = nibbles(_mm512_permutexvar_epi8(second, all));
        sums.add_block(r, b, one, scale);
        sums.add_block(r, b + 1, _mm512_srli_epi16(one, 8), scale);
        sums.add_block(r, b + 2, other, scale);
        sums.add_block(r, b + 3, _mm512_srli_epi16(other, 8), scale);
      }
    }
    for (; b < (inputs + 31) / 32; b++) {
      SPECMOE_UNROLL
      for (int r = 0; r < R; r++) {
        alignas(64) uint8_t part[kLine] = {};  // what follows a row is another's
        const int64_t left = row_bytes - b * kBytes;
        std::memcpy(part, rows + r * row_bytes + b * kBytes,
                    static_cast<size_t>(left < kBytes ? left : kBytes));
        sums.add_block(r, b, nibbles(_mm512_permutexvar_epi8(first, _mm512_load_si512(part))),
                       factor[r].scale);
      }
    }
    store_sums(sums.sum, out, out_stride);
  }
};

// Whether each input is zero or so far from the ends of float32's range that no product, and no sum
// of two, leaves it: the instruction takes what is below it for zero.
bool are_ordinary(const Inputs& in) {
  constexpr uint16_t kLeast = 27 << 7, kMost = 227 << 7;  // 2^-100 and 2^100
  __mmask32 odd = 0;
  for (int64_t t = 0; t < in.tokens; t++) {
    const uint16_t* x = in.bf16 + in.rows[t] * in.stride;
    for (int64_t k = 0; k < in.stride; k += 32) {
      const __m512i size = _mm512_and_si512(_mm512_loadu_si512(x + k), _mm512_set1_epi16(0x7fff));
      const __m512i above = _mm512_sub_epi16(size, _mm512_set1_epi16(kLeast));
      odd |= _mm512_test_epi16_mask(size, size) &
             _mm512_cmpgt_epu16_mask(above, _mm512_set1_epi16(kMost - kLeast));
    }
  }
  return odd == 0;
}

// The same by the kernels for float32.
void rows_of_floats(const WeightView& w, int64_t begin, int64_t end, const Inputs& in, float* out,
                    int64_t out_stride) {
  static thread_local std::vector<float> values;
  static thread_local std::vector<int32_t> rows;
  values.resize(static_cast<size_t>(in.tokens * in.stride));
  rows.resize(static_cast<size_t>(in.tokens));
  for (int64_t t = 0; t < in.tokens; t++) {
    const uint16_t* from = in.bf16 + in.rows[t] * in.stride;
    float* to = values.data() + t * in.stride;
    for (int64_t k = 0; k < in.stride; k += kBlock) {
      float block[kBlock];
      for (int64_t i = 0; i < kBlock; i++) block[i] = from_bf16(from[k + i]);
      split_block(block, to + k);
    }
    rows[static_cast<size_t>(t)] = static_cast<int32_t>(t);
  }
  Inputs floats = in;
  floats.form = FORM_SPLIT;
  floats.values = values.data();
  floats.rows = rows.data();
  avx512_kernels_or_null()->rows(w, begin, end, floats, out, out_stride);
}

void rows_of_pairs(const WeightView& w, int64_t begin, int64_t end, const Inputs& in, float* out,
                   int64_t out_stride) {
  if (!are_ordinary(in)) return rows_of_floats(w, begin, end, in, out, out_stride);
  static const Halves32 e2m1(kE2M1), int4(kInt4);
  static thread_local Factors<ROWS1> factors;
  const bool is_int4 = w.spec->book == BOOK_INT4;
  const PairBook book(is_int4 ? int4 : e2m1);
  const float middle = is_int4 ? 8.0f : 0.0f;
  static const BlockBytes bytes;
  const __m512i first = _mm512_load_si512(bytes.of[0]), second = _mm512_load_si512(bytes.of[1]);
  const auto go = [&](auto halves) {
    using Block = PairBlock<decltype(halves)::value>;
    cover(Block{w, ahead_of(w, end), in, out_stride, book, factors, middle, first, second}, begin,
          end, in.tokens, out);
  };
  w.spec->block_columns == 16 ? go(std::true_type()) : go(std::false_type());
  apply_globals(w, begin, end, in.tokens, out, out_stride);
}

}  // namespace

const Kernels* avx512_bf16_kernels_or_null() {
  const Kernels* plain = avx512_kernels_or_null();
  if (plain == nullptr) return nullptr;
  if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vbmi"))
    return nullptr;
  static const Kernels kernels = [&] {
    Kernels with = *plain;
    with.name = "avx512_bf16";
    with.rows_bf16 = rows_of_pairs;
    return with;
  }();
  return &kernels;
}

}  // namespace specmoe

#else

namespace specmoe {
const Kernels* avx512_bf16_kernels_or_null() { return nullptr; }
}  // namespace specmoe

#endif
