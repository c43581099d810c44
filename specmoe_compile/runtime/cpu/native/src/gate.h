// Activation and gate of experts, rounded to the model's dtype after every step as torch does.
#pragma once

#include "numbers.h"
#include "weight.h"

namespace specmoe {
namespace {

template <int32_t D>
SPECMOE_INLINE float rounded(float value) {
  if (D == BF16) return from_bf16(to_bf16(value));
  if (D == F16) return from_f16(to_f16(value));
  return value;
}

template <int32_t A>
SPECMOE_INLINE float activated(float x) {
  if (A == ACT_SILU) return x / (1.0f + exponential(-x));
  if (A == ACT_GELU) return x * 0.5f * (1.0f + std::erf(x * 0.70710678118654752440f));
  if (A == ACT_GELU_TANH) {
    const float inner = 0.79788456080286535588f * (x + 0.044715f * x * x * x);
    return 0.5f * x * (1.0f + std::tanh(inner));
  }
  return x > 0.0f ? x : (x < 0.0f ? 0.0f : x);  // NaN stays, as does a zero
}

template <int32_t D, int32_t A>
SPECMOE_INLINE float activated_rounded(float x) {
  const float value = rounded<D>(activated<A>(x));
  return A == ACT_RELU2 ? rounded<D>(value * value) : value;
}

template <int32_t D, int32_t A>
SPECMOE_INLINE float gated(float g, float up, const GateSpec& spec) {
  const float limit = spec.limit;
  const float u = up > limit ? limit : (up < -limit ? -limit : up);
  const float bounded = g > limit ? limit : g;
  const float x = spec.limit_after ? g : bounded;
  if (A == ACT_SWIGLU_OAI) {
    const float inner = rounded<D>(x * spec.alpha);
    const float sigmoid = rounded<D>(1.0f / (1.0f + exponential(-inner)));
    return rounded<D>(rounded<D>(u + 1.0f) * rounded<D>(x * sigmoid));
  }
  const float value = activated_rounded<D, A>(x);
  const float after = value > limit ? limit : value;
  return rounded<D>((spec.limit_after ? after : value) * u);
}

// One loop each, without branches and of values that nothing in it can change: else compilers take
// one number at a time, which costs more than a third of reading the expert does.
template <int32_t D, int32_t A>
void gate_rows(float* gate, const float* up, int64_t count, const GateSpec& given) {
  const GateSpec spec = given;
  if (spec.has_gate)
    for (int64_t i = 0; i < count; i++) gate[i] = gated<D, A>(gate[i], up[i], spec);
  else
    for (int64_t i = 0; i < count; i++) gate[i] = activated_rounded<D, A>(gate[i]);
}

template <int32_t D>
void gate_dtype(float* gate, const float* up, int64_t count, const GateSpec& spec) {
  switch (spec.activation) {
    case ACT_SILU: return gate_rows<D, ACT_SILU>(gate, up, count, spec);
    case ACT_GELU: return gate_rows<D, ACT_GELU>(gate, up, count, spec);
    case ACT_GELU_TANH: return gate_rows<D, ACT_GELU_TANH>(gate, up, count, spec);
    case ACT_RELU: return gate_rows<D, ACT_RELU>(gate, up, count, spec);
    case ACT_RELU2: return gate_rows<D, ACT_RELU2>(gate, up, count, spec);
    default: return gate_rows<D, ACT_SWIGLU_OAI>(gate, up, count, spec);
  }
}

inline void gate_any(float* gate, const float* up, int64_t count, const GateSpec& spec) {
  switch (spec.dtype) {
    case BF16: return gate_dtype<BF16>(gate, up, count, spec);
    case F16: return gate_dtype<F16>(gate, up, count, spec);
    default: return gate_dtype<F32>(gate, up, count, spec);
  }
}

template <int32_t D>
void round_rows(float* values, int64_t count) {
  for (int64_t i = 0; i < count; i++) values[i] = rounded<D>(values[i]);
}

inline void round_any(float* values, int64_t count, int32_t dtype) {
  if (dtype == BF16) round_rows<BF16>(values, count);
  if (dtype == F16) round_rows<F16>(values, count);
}

}  // namespace
}  // namespace specmoe
