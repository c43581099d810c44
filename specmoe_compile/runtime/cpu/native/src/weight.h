// What an expert looks like to the kernels: plain numbers only, filled in by Python.
//
// Shape letters: N outputs, K inputs, H hidden, I expert intermediate, T tokens.
#pragma once

#include <cstdint>

#include "step_call.h"

namespace specmoe {

// What one code is worth; the first three are floats as they are.
enum Book : int32_t {
  BOOK_F32 = 0,
  BOOK_BF16 = 1,
  BOOK_F16 = 2,
  BOOK_E2M1 = 3,
  BOOK_INT4 = 4,
  BOOK_NF4 = 5,
  BOOK_E4M3 = 6,
  BOOK_INT8 = 7,
};

enum Scale : int32_t {
  SCALE_NONE = 0,
  SCALE_E8M0 = 1,
  SCALE_E4M3 = 2,
  SCALE_F32 = 3,
  SCALE_BF16 = 4,
  SCALE_F16 = 5,
};

enum Activation : int32_t {
  ACT_SILU = 0,
  ACT_GELU = 1,
  ACT_GELU_TANH = 2,
  ACT_RELU = 3,
  ACT_RELU2 = 4,
  ACT_SWIGLU_OAI = 5,
};

inline bool is_plain(int32_t book) { return book <= BOOK_F16; }
inline bool is_four_bit(int32_t book) { return book >= BOOK_E2M1 && book <= BOOK_NF4; }
// Codes whose values are integers, times a factor, that fit in 8 bits.
inline bool has_int8(int32_t book) {
  return book == BOOK_E2M1 || book == BOOK_INT4 || book == BOOK_INT8;
}

// Bytes of one scale.
inline int64_t scale_bytes(int32_t scale) {
  if (scale == SCALE_F32) return 4;
  return scale == SCALE_E8M0 || scale == SCALE_E4M3 ? 1 : 2;
}

// One weight [N, K] in a record, row-major: value = (code - zero) * scale * global.
// Offsets are bytes from the record's start, -1 for a plane that is not there.
struct WeightSpec {
  int64_t outputs;        // N
  int64_t inputs;         // K
  int64_t row_bytes;      // of the code plane
  int64_t block_rows;     // rows that share a scale
  int64_t block_columns;  // columns that share a scale
  int64_t scale_columns;  // scales per row of the scale plane
  int64_t codes;
  int64_t scales;
  int64_t zeros;
  int64_t globals;
  int64_t bias;  // [N]
  int32_t book;
  int32_t scale;
  int32_t bias_dtype;
  int32_t unused;  // a multiple of 8 bytes
};

// Whether all values are bfloat16 numbers, of so few bits that the product with another is exact.
inline bool takes_bf16(const WeightSpec& spec) {
  return (spec.book == BOOK_E2M1 || spec.book == BOOK_INT4) && spec.zeros < 0;
}

// Where the rows begin that a thread reads after those of a call, null where it is not known.
struct NextRows {
  const uint8_t* codes = nullptr;
  const uint8_t* scales = nullptr;
};

// One weight of one expert, with pointers instead of offsets.
struct WeightView {
  const WeightSpec* spec;
  const uint8_t* record;
  NextRows next = {};

  const uint8_t* row(int64_t n) const { return record + spec->codes + n * spec->row_bytes; }
};

// How the inputs of a product lie, by what the kernels multiply them with.
enum InputForm : int32_t {
  FORM_PLAIN = 0,       // float32 in their own order
  FORM_SPLIT = 1,       // float32; each block of 32 has its 16 even columns first, then its odd ones
  FORM_BF16 = 2,        // bfloat16 in their own order
  FORM_INT8 = 3,        // int8 codes and a scale per block
  FORM_INT8_SPLIT = 4,  // the same; each 128 columns have the even ones of 4 blocks first
};

inline bool is_int8(InputForm form) { return form >= FORM_INT8; }

// Inputs of a product, in one form; zeros up to a multiple of 32 columns, of 128 in int8.
struct Inputs {
  InputForm form;
  const float* values;    // [.., stride]
  const uint16_t* bf16;   // [.., stride]
  const int8_t* codes;    // [.., stride]
  const float* scales;    // [.., stride / 32]
  // [.., stride / 8 or 4], of the codes that one lane of 16 multiplies: 8 of 4 bits, split, or 4 of 8
  const int32_t* minus_sums;
  const int32_t* rows;    // [T], the row of each token
  int64_t stride;         // a multiple of 32
  int64_t tokens;         // T
};

// A row of inputs while it is filled, in one of the forms.
struct InputRow {
  InputForm form;
  float* values;
  uint16_t* bf16;
  int8_t* codes;
  float* scales;
  int32_t* minus_sums;
};

// The kernels of one instruction set.
struct Kernels {
  const char* name;
  // out[t * out_stride + n - begin] = sum over k of weight[n, k] * x[rows[t], k], for
  // begin <= n < end.
  void (*rows)(const WeightView&, int64_t begin, int64_t end, const Inputs&, float* out,
               int64_t out_stride);
  // The same with int8 activations; only where `has_int8`.
  void (*rows_int8)(const WeightView&, int64_t begin, int64_t end, const Inputs&, float* out,
                    int64_t out_stride);
  // The same bits from inputs in bfloat16, only where `takes_bf16`; null without such products.
  void (*rows_bf16)(const WeightView&, int64_t begin, int64_t end, const Inputs&, float* out,
                    int64_t out_stride);
  // Takes in columns [begin, begin + count) of a row; `begin` is a multiple of 32, in int8 of 128,
  // unless the form is plain, and so is `count` but at the row's end.
  void (*put)(const InputRow&, int64_t begin, int64_t count, const float* values);
  // Activation and gate in place: [count] pairs -> gate[count], see gate.h.
  void (*gate)(float* gate, const float* up, int64_t count, const struct GateSpec&);
  // Rounds to a dtype in place.
  void (*round)(float* values, int64_t count, int32_t dtype);
  // scores: [R, C] to work in. out: sums [R, D], not divided yet; the largest score [R]; and the
  // sum of exponentials [R].
  void (*attend)(const struct AttentionPart&, float* scores, float* out);
};

struct GateSpec {
  int32_t activation;
  int32_t dtype;  // every step is rounded to it
  int32_t has_gate;
  int32_t limit_after;
  float alpha;
  float limit;  // infinity for none
};

// Keys [C, D] of one head, and the queries [R, D] that share it: R = heads * queries.
struct AttentionPart {
  const uint8_t* keys;    // the first one
  const uint8_t* values;
  const void* mask;       // of the first head, query and key
  int64_t key_bytes;      // from one key to the next
  int64_t value_bytes;
  int64_t mask_head;      // elements from one head to the next
  int64_t mask_query;
  int64_t count;          // C
  int64_t queries;        // of a head
  int64_t head;           // D
  int32_t dtype;
  int32_t mask_dtype;     // or BOOL
  float scale;
  Inputs inputs;          // the queries
};

const Kernels& portable_kernels();
const Kernels* avx2_kernels_or_null();
const Kernels* avx512_kernels_or_null();
const Kernels* avx512_bf16_kernels_or_null();

}  // namespace specmoe
