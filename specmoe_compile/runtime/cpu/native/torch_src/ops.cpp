// The ops of a CPU session without Python: arguments as plain numbers to the engine's library.
//
// The only file that is compiled against torch, so that the engine itself fits any torch. What the
// engine leaves alone goes to `specmoe::NAME_python`, which has the schema of `specmoe::NAME`.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/record_function.h>
#include <torch/library.h>

#include <cstdint>
#include <vector>

#include "../src/step_call.h"

namespace {

using at::Tensor;

const specmoe::StepFunctions* engine = nullptr;

// A profiler wants the ranges that Python marks.
bool is_on() { return engine != nullptr && !at::hasCallbacks(); }

// Calls an op of the same signature that Python has registered.
template <typename Result, typename... Parameters, typename... Arguments>
Result python(Result (*)(Parameters...), const char* name, const Arguments&... arguments) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow(name, "")
      .template typed<Result(Parameters...)>()
      .call(arguments...);
}

int32_t dtype_or_negative(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return specmoe::F32;
    case at::kBFloat16: return specmoe::BF16;
    case at::kHalf: return specmoe::F16;
    default: return -1;
  }
}

// Each fills in its part of a call; false for what the engine does not take.
bool add_ids(specmoe::StepCall& call, const Tensor& ids) {
  const auto kind = ids.scalar_type();
  if (ids.dim() != 2 || !ids.is_contiguous() || (kind != at::kLong && kind != at::kInt))
    return false;
  call.ids = ids.const_data_ptr();
  call.id_bytes = kind == at::kLong ? 8 : 4;
  call.tokens = ids.size(0);
  call.top_k = ids.size(1);
  return true;
}

bool add_routing(specmoe::StepCall& call, const Tensor& ids, const Tensor& weights) {
  if (!add_ids(call, ids) || weights.sizes() != ids.sizes() || !weights.is_contiguous())
    return false;
  call.weights = weights.const_data_ptr();
  call.weights_dtype = dtype_or_negative(weights);
  return call.weights_dtype >= 0;
}

bool add_all(specmoe::StepCall& call, const Tensor& x, const Tensor& ids, const Tensor& weights) {
  if (x.dim() != 2 || !x.is_contiguous() || !add_routing(call, ids, weights)) return false;
  call.x = x.const_data_ptr();
  call.x_dtype = dtype_or_negative(x);
  call.hidden = x.size(1);
  return call.x_dtype >= 0 && x.size(0) == ids.size(0);
}

// The tensor that carries a number through the graph.
Tensor token(int64_t number) { return at::full({1}, number, at::TensorOptions(at::kLong)); }

bool is_token(const Tensor& tensor) {
  return tensor.scalar_type() == at::kLong && tensor.numel() == 1;
}

int64_t number(const Tensor& tensor) { return *tensor.const_data_ptr<int64_t>(); }

Tensor experts(const Tensor& x, const Tensor& ids, const Tensor& weights, int64_t session,
               int64_t layer) {
  specmoe::StepCall call{};
  if (is_on() && add_all(call, x, ids, weights)) {
    Tensor out = at::empty_like(x);
    call.out = out.mutable_data_ptr();
    if (engine->experts(session, layer, &call)) return out;
  }
  return python(experts, "specmoe::experts_python", x, ids, weights, session, layer);
}

Tensor blend(const Tensor& ids, const Tensor& weights, const Tensor& like, int64_t session,
             int64_t layer) {
  specmoe::StepCall call{};
  if (is_on() && add_routing(call, ids, weights) && like.dim() == 2 &&
      like.size(0) == ids.size(0) && (call.x_dtype = dtype_or_negative(like)) >= 0) {
    Tensor out = at::empty(like.sizes(), like.options());
    call.out = out.mutable_data_ptr();
    call.hidden = like.size(1);
    if (engine->blend(session, layer, &call)) return out;
  }
  return python(blend, "specmoe::blend_default_vectors_python", ids, weights, like, session,
                        layer);
}

Tensor plan(const Tensor& ids, int64_t session, at::IntArrayRef layers, at::IntArrayRef edges) {
  if (is_on()) {
    Tensor out = at::empty({static_cast<int64_t>(layers.size())}, at::TensorOptions(at::kBool));
    if (engine->plan(session, layers.data(), static_cast<int64_t>(layers.size()), edges.data(),
                     static_cast<int64_t>(edges.size()),
                     static_cast<uint8_t*>(out.mutable_data_ptr())))
      return out;
  }
  return python(plan, "specmoe::plan_step_python", ids, session, layers, edges);
}

Tensor start(const Tensor& ids, const Tensor& weights, int64_t session, int64_t layer,
             at::TensorList after) {
  specmoe::StepCall call{};
  if (is_on() && add_routing(call, ids, weights))
    if (const int64_t ticket = engine->start(session, layer, &call)) return token(ticket);
  return python(start, "specmoe::start_prefetch_python", ids, weights, session, layer, after);
}

Tensor settle(const Tensor& ticket, const Tensor& ids, int64_t session, int64_t layer) {
  specmoe::StepCall call{};
  if (is_on() && is_token(ticket) && add_ids(call, ids))
    if (const int64_t state = engine->settle(session, layer, &call, number(ticket)))
      return token(state);
  return python(settle, "specmoe::wait_prefetch_python", ticket, ids, session, layer);
}

Tensor run(const Tensor& x, const Tensor& ids, const Tensor& weights, const Tensor& state,
           int64_t session, int64_t layer, at::TensorList after) {
  specmoe::StepCall call{};
  if (is_on() && is_token(state) && add_all(call, x, ids, weights)) {
    Tensor out = at::empty({call.tokens, call.top_k, call.hidden}, x.options());
    call.out = out.mutable_data_ptr();
    if (engine->run(session, layer, &call, number(state))) return out;
  }
  return python(run, "specmoe::run_resident_experts_python", x, ids, weights, state, session,
                        layer, after);
}

Tensor correct(const Tensor& partial, const Tensor& x, const Tensor& ids, const Tensor& weights,
               const Tensor& state, int64_t session, int64_t layer) {
  specmoe::StepCall call{};
  if (is_on() && is_token(state) && add_all(call, x, ids, weights)) {
    Tensor out = at::empty_like(x);
    call.out = out.mutable_data_ptr();
    if (engine->correct(session, layer, &call, number(state))) return out;
  }
  return python(correct, "specmoe::correct_experts_python", partial, x, ids, weights, state, session,
                        layer);
}

// Whether a product's operand is as the engine reads it.
bool is_plain(const Tensor& tensor, const Tensor& x, int64_t dimensions) {
  return tensor.dim() == dimensions && tensor.scalar_type() == x.scalar_type() &&
         tensor.is_contiguous() && tensor.layout() == at::kStrided;
}

std::vector<Tensor> products(const Tensor& x, at::TensorList weights, at::TensorList biases,
                             int64_t session) {
  specmoe::ProductsCall call{};
  call.dtype = dtype_or_negative(x);
  bool is_ours = is_on() && call.dtype >= 0 && is_plain(x, x, 2);
  for (const Tensor& weight : weights)
    is_ours = is_ours && is_plain(weight, x, 2) && weight.size(1) == x.size(1);
  for (size_t i = 0; i < biases.size(); i++)
    is_ours = is_ours && is_plain(biases[i], x, 1) && biases[i].size(0) == weights[i].size(0);
  if (is_ours) {
    std::vector<Tensor> outs;
    std::vector<const void*> values, added;
    std::vector<void*> places;
    std::vector<int64_t> outputs;
    for (const Tensor& weight : weights) {
      outputs.push_back(weight.size(0));
      outs.push_back(at::empty({x.size(0), weight.size(0)}, x.options()));
      values.push_back(weight.const_data_ptr());
      places.push_back(outs.back().mutable_data_ptr());
    }
    for (const Tensor& bias : biases) added.push_back(bias.const_data_ptr());
    call.x = x.const_data_ptr();
    call.weights = values.data();
    call.biases = added.empty() ? nullptr : added.data();
    call.outs = places.data();
    call.outputs = outputs.data();
    call.count = static_cast<int64_t>(outputs.size());
    call.tokens = x.size(0);
    call.inputs = x.size(1);
    if (engine->products(session, &call)) return outs;
  }
  return python(products, "specmoe::products_python", x, weights, biases, session);
}

}  // namespace

TORCH_LIBRARY_IMPL(specmoe, CPU, library) {
  library.impl("experts", experts);
  library.impl("blend_default_vectors", blend);
  library.impl("plan_step", plan);
  library.impl("start_prefetch", start);
  library.impl("wait_prefetch", settle);
  library.impl("run_resident_experts", run);
  library.impl("correct_experts", correct);
  library.impl("products", products);
}

extern "C" __attribute__((visibility("default"))) void specmoe_ops_use(
    const specmoe::StepFunctions* functions) {
  engine = functions;
}
