// `specmoe::experts` on the CPU without Python: arguments as plain numbers to the engine's library.
//
// The only file that is compiled against torch, so that the engine itself fits any torch. What the
// engine leaves alone goes to `specmoe::experts_python`, which has the same schema.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_like.h>
#include <ATen/record_function.h>
#include <torch/library.h>

#include <cstdint>

#include "../src/step_call.h"

namespace {

using Run = int32_t (*)(int64_t session, int64_t layer, const specmoe::StepCall* call);
Run run = nullptr;

int32_t dtype_or_negative(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return specmoe::F32;
    case at::kBFloat16: return specmoe::BF16;
    case at::kHalf: return specmoe::F16;
    default: return -1;
  }
}

// Fills in the call; false for what the engine does not take.
bool describe(const at::Tensor& x, const at::Tensor& ids, const at::Tensor& weights,
              specmoe::StepCall& call) {
  if (x.dim() != 2 || ids.dim() != 2 || weights.sizes() != ids.sizes() ||
      x.size(0) != ids.size(0) || x.size(0) == 0)
    return false;
  if (!x.is_contiguous() || !ids.is_contiguous() || !weights.is_contiguous()) return false;
  const auto kind = ids.scalar_type();
  if (kind != at::kLong && kind != at::kInt) return false;
  call.x_dtype = dtype_or_negative(x);
  call.weights_dtype = dtype_or_negative(weights);
  if (call.x_dtype < 0 || call.weights_dtype < 0) return false;
  call.x = x.const_data_ptr();
  call.ids = ids.const_data_ptr();
  call.weights = weights.const_data_ptr();
  call.tokens = x.size(0);
  call.top_k = ids.size(1);
  call.hidden = x.size(1);
  call.id_bytes = kind == at::kLong ? 8 : 4;
  return true;
}

at::Tensor experts(const at::Tensor& x, const at::Tensor& ids, const at::Tensor& weights,
                   int64_t session, int64_t layer) {
  specmoe::StepCall call{};
  // A profiler wants the ranges that Python marks.
  if (run != nullptr && !at::hasCallbacks() && describe(x, ids, weights, call)) {
    at::Tensor out = at::empty_like(x);
    call.out = out.mutable_data_ptr();
    if (run(session, layer, &call)) return out;
  }
  static const auto python =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("specmoe::experts_python", "")
          .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t,
                            int64_t)>();
  return python.call(x, ids, weights, session, layer);
}

}  // namespace

TORCH_LIBRARY_IMPL(specmoe, CPU, library) { library.impl("experts", experts); }

extern "C" __attribute__((visibility("default"))) void specmoe_ops_use(Run function) {
  run = function;
}
