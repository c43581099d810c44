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

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "../src/step_call.h"
#include "../src/sums.h"

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

bool is_float(const Tensor& tensor) { return dtype_or_negative(tensor) >= 0; }

// Whether rows of the last of four dimensions lie as the engine reads them.
bool has_rows(const Tensor& tensor) {
  return tensor.dim() == 4 && tensor.layout() == at::kStrided && tensor.numel() > 0 &&
         (tensor.stride(3) == 1 || tensor.size(3) == 1);
}

// The range of one row of a mask: nothing is attended to where both are 0.
struct Range {
  int64_t first = 0, last = 0;
};

Range range_of(const Tensor& mask, int64_t at) {
  const int64_t length = mask.size(3);
  Range range;
  if (mask.scalar_type() == at::kBool) {
    const auto* row = static_cast<const uint8_t*>(mask.const_data_ptr()) + at;
    const void* first = std::memchr(row, 1, static_cast<size_t>(length));
    if (first == nullptr) return range;
    range.first = static_cast<const uint8_t*>(first) - row;
    for (range.last = length; row[range.last - 1] == 0;) range.last--;
    return range;
  }
  const int32_t dtype = dtype_or_negative(mask);
  const float lowest = dtype == specmoe::F32    ? -0x1.fffffep127f
                       : dtype == specmoe::BF16 ? -0x1.fep127f
                                                : -65504.0f;
  bool is_empty = true;
  for (int64_t i = 0; i < length; i++) {
    if (!(specmoe::value_at(mask.const_data_ptr(), dtype, at + i) > lowest)) continue;
    if (is_empty) range.first = i;
    is_empty = false;
    range.last = i + 1;
  }
  // A query that attends to nothing averages over all keys.
  return is_empty ? Range{0, length} : range;
}

Tensor attended_range(const Tensor& mask) {
  if (!has_rows(mask) || !(is_float(mask) || mask.scalar_type() == at::kBool))
    return python(attended_range, "specmoe_kernels::attended_range_python", mask);
  Tensor bounds = at::empty({mask.size(0), 2}, at::TensorOptions(at::kInt));
  auto* out = static_cast<int32_t*>(bounds.mutable_data_ptr());
  for (int64_t b = 0; b < mask.size(0); b++) {
    Range all{mask.size(3), 0};
    for (int64_t n = 0; n < mask.size(1); n++)
      for (int64_t q = 0; q < mask.size(2); q++) {
        const Range own =
            range_of(mask, b * mask.stride(0) + n * mask.stride(1) + q * mask.stride(2));
        if (own.last == 0) continue;
        all = {std::min(all.first, own.first), std::max(all.last, own.last)};
      }
    out[2 * b] = static_cast<int32_t>(std::min(all.first, all.last));
    out[2 * b + 1] = static_cast<int32_t>(all.last);
  }
  return bounds;
}

constexpr int64_t kMaxQueries = 16, kMaxHead = 256, kMaxRowsF32 = 16, kMaxRows = 64;

bool fits_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask,
                    const Tensor& bounds, const std::optional<Tensor>& sinks) {
  if (!is_on() || !has_rows(q) || !has_rows(k) || !has_rows(v) || !has_rows(mask)) return false;
  if (!is_float(q) || k.scalar_type() != q.scalar_type() || v.scalar_type() != q.scalar_type())
    return false;
  const int64_t heads = q.size(1), queries = q.size(2), kv_heads = k.size(1);
  if (k.sizes() != v.sizes() || k.size(0) != q.size(0) || k.size(3) != q.size(3)) return false;
  if (heads % kv_heads != 0 || queries > kMaxQueries || q.size(3) > kMaxHead) return false;
  if (heads / kv_heads * queries > (q.scalar_type() == at::kFloat ? kMaxRowsF32 : kMaxRows))
    return false;
  for (int64_t i = 0; i < 3; i++)
    if (mask.size(i) != 1 && mask.size(i) != q.size(i)) return false;
  if (mask.size(3) != k.size(2) || !(is_float(mask) || mask.scalar_type() == at::kBool))
    return false;
  if (bounds.scalar_type() != at::kInt || bounds.dim() != 2 || !bounds.is_contiguous() ||
      bounds.size(0) != mask.size(0) || bounds.size(1) != 2)
    return false;
  const auto* range = static_cast<const int32_t*>(bounds.const_data_ptr());
  for (int64_t i = 0; i < bounds.size(0); i++, range += 2)
    if (range[0] < 0 || range[0] > range[1] || range[1] > k.size(2)) return false;
  return !sinks || (sinks->dim() == 1 && sinks->size(0) == heads && sinks->is_contiguous() &&
                    is_float(*sinks));
}

Tensor decode_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask,
                        const Tensor& bounds, const std::optional<Tensor>& sinks, double scale) {
  if (fits_attention(q, k, v, mask, bounds, sinks)) {
    specmoe::AttentionCall call{};
    Tensor out = at::empty({q.size(0), q.size(2), q.size(1), q.size(3)}, q.options());
    call.q = q.const_data_ptr();
    call.k = k.const_data_ptr();
    call.v = v.const_data_ptr();
    call.mask = mask.const_data_ptr();
    call.sinks = sinks ? sinks->const_data_ptr() : nullptr;
    call.bounds = static_cast<const int32_t*>(bounds.const_data_ptr());
    call.out = out.mutable_data_ptr();
    for (int i = 0; i < 3; i++) {
      call.q_strides[i] = q.stride(i);
      call.k_strides[i] = k.stride(i);
      call.v_strides[i] = v.stride(i);
      call.mask_strides[i] = mask.size(i) == 1 ? 0 : mask.stride(i);
    }
    call.sequences = q.size(0);
    call.heads = q.size(1);
    call.kv_heads = k.size(1);
    call.queries = q.size(2);
    call.head = q.size(3);
    call.bound_rows = bounds.size(0);
    call.dtype = dtype_or_negative(q);
    call.mask_dtype =
        mask.scalar_type() == at::kBool ? specmoe::BOOL : dtype_or_negative(mask);
    call.sinks_dtype = sinks ? dtype_or_negative(*sinks) : specmoe::F32;
    call.scale = static_cast<float>(scale);
    if (engine->attend(&call)) return out.transpose(1, 2);
  }
  return python(decode_attention, "specmoe_kernels::decode_attention_python", q, k, v, mask,
                bounds, sinks, scale);
}

}  // namespace

TORCH_LIBRARY_IMPL(specmoe_kernels, CPU, library) {
  library.impl("attended_range", attended_range);
  library.impl("decode_attention", decode_attention);
}

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

#include "tape_ops.h"

extern "C" __attribute__((visibility("default"))) void specmoe_ops_use(
    const specmoe::StepFunctions* functions) {
  engine = functions;
}
