// Activation and gate of experts, rounded to the model's dtype after every step as torch does.
#pragma once

#include "numbers.h"
#include "weight.h"

namespace specmoe {
namespace {

template <int32_t D>
inline float rounded(float value) {
  if (D == BF16) return from_bf16(to_bf16(value));
  if (D == F16) return from_f16(to_f16(value));
  return value;
}

template <int32_t A>
inline float activated(float x) {
  if (A == ACT_SILU) return x / (1.0f + exponential(-x));
  if (A == ACT_GELU) return x * 0.5f * (1.0f + std::erf(x * 0.70710678118654752440f));
  if (A == ACT_GELU_TANH) {
    const float inner = 0.79788456080286535588f * (x + 0.044715f * x * x * x);
    return 0.5f * x * (1.0f + std::tanh(inner));
  }
  return x > 0.0f ? x : (x < 0.0f ? 0.0f : x);  // NaN stays, as does a zero
}

template <int32_t D, int32_t A>
void gate_rows(float* gate, const float* up, int64_t count, const GateSpec& spec) {
  const float limit = spec.limit;
  for (int64_t i = 0; i < count; i++) {
    float g = gate[i];
    if (!spec.has_gate) {
      g = rounded<D>(activated<A>(g));
      if (A == ACT_RELU2) g = rounded<D>(g * g);
      gate[i] = g;
      continue;
    }
    float u = up[i];
    u = u > limit ? limit : (u < -limit ? -limit : u);
    const float bounded = g > limit ? limit : g;
    g = spec.limit_after ? g : bounded;
    if (A == ACT_SWIGLU_OAI) {
      const float inner = rounded<D>(g * spec.alpha);
      const float sigmoid = rounded<D>(1.0f / (1.0f + exponential(-inner)));
      gate[i] = rounded<D>(rounded<D>(u + 1.0f) * rounded<D>(g * sigmoid));
      continue;
    }
    g = rounded<D>(activated<A>(g));
    if (A == ACT_RELU2) g = rounded<D>(g * g);
    const float after = g > limit ? limit : g;
    gate[i] = rounded<D>((spec.limit_after ? after : g) * u);
  }
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

}  // namespace
}  // namespace specmoe
