// What torch's ops hand to the engine, and how they call it. Read by both, and so plain C only.
//
// Shape letters: T tokens, K top-k or guesses per token (of a product: inputs), H hidden,
// N outputs.
#pragma once

#include <cstdint>

namespace specmoe {

enum Dtype : int32_t { F32 = 0, BF16 = 1, F16 = 2, BOOL = 3 };

// Arguments of an op, contiguous; null for those that it does not have.
struct StepCall {
  const void* x;        // [T, H]
  const void* ids;      // [T, K]
  const void* weights;  // [T, K]
  void* out;            // in the dtype of x
  int64_t tokens, top_k, hidden;
  int32_t x_dtype, weights_dtype;
  int32_t id_bytes;
  int32_t unused;
};

// Products of one input with several weights, contiguous, all of one dtype.
struct ProductsCall {
  const void* x;               // [T, K]
  const void* const* weights;  // each [N, K]
  const void* const* biases;   // each [N]; null for none at all
  void* const* outs;           // each [T, N]
  const int64_t* outputs;      // N of each
  int64_t count, tokens, inputs;
  int32_t dtype;
  int32_t unused;
};

// Attention of new tokens over a static cache; B sequences, N heads, G heads of keys, Q new tokens,
// S keys, D head size. Strides in elements, of all dimensions but the last, which is contiguous.
struct AttentionCall {
  const void* q;          // [B, N, Q, D]
  const void* k;          // [B, G, S, D]
  const void* v;
  const void* mask;       // [1 or B, 1 or N, 1 or Q, S]; stride 0 where there is one for all
  const void* sinks;      // [N]; null for none
  const int32_t* bounds;  // [1 or B, 2], first and one past the last key that is attended to
  void* out;              // [B, Q, N, D], contiguous
  int64_t q_strides[3], k_strides[3], v_strides[3], mask_strides[3];
  int64_t sequences, heads, kv_heads, queries, head, bound_rows;
  int32_t dtype, mask_dtype, sinks_dtype;
  float scale;
};

// The bodies of the ops, by session and layer. Those that return 0 leave the op to Python.
struct StepFunctions {
  int32_t (*experts)(int64_t session, int64_t layer, const StepCall* call);  // out [T, H]
  int64_t (*start)(int64_t session, int64_t layer, const StepCall* call);    // the ticket
  int64_t (*settle)(int64_t session, int64_t layer, const StepCall* call,
                    int64_t ticket);  // the state
  int32_t (*run)(int64_t session, int64_t layer, const StepCall* call,
                 int64_t state);  // out [T, K, H]
  int32_t (*correct)(int64_t session, int64_t layer, const StepCall* call,
                     int64_t state);  // out [T, H]
  int32_t (*blend)(int64_t session, int64_t layer, const StepCall* call);  // out [T, H]
  // answers: [count], 0 or 1. edges: pairs.
  int32_t (*plan)(int64_t session, const int64_t* layers, int64_t count, const int64_t* edges,
                  int64_t edge_count, uint8_t* answers);
  int32_t (*products)(int64_t session, const ProductsCall* call);
  int32_t (*attend)(const AttentionCall* call);  // by whatever session is open
};

}  // namespace specmoe
