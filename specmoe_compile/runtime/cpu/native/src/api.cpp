// What Python calls by ctypes, which lets go of the interpreter's lock. Plain C types only.
#include <cstdint>
#include <cstring>
#include <exception>
#include <new>

#include "experts.h"

#define SPECMOE_API __attribute__((visibility("default")))

using namespace specmoe;

namespace {

const Kernels* kernels_or_null(const char* name) {
  if (name == nullptr || std::strcmp(name, "portable") == 0)
    return name == nullptr ? nullptr : &portable_kernels();
  if (std::strcmp(name, "avx2") == 0) return avx2_kernels_or_null();
  if (std::strcmp(name, "avx512") == 0) return avx512_kernels_or_null();
  return nullptr;
}

}  // namespace

extern "C" {

// Bytes of the structures that Python fills in, so that it can see that they are the same.
SPECMOE_API int64_t specmoe_struct_bytes(int32_t which) {
  switch (which) {
    case 0: return sizeof(WeightSpec);
    case 1: return sizeof(GateSpec);
    case 2: return sizeof(ExpertSpec);
    default: return sizeof(ExpertTask);
  }
}

// Null for an instruction set that this processor does not have; `name` null for the best one.
SPECMOE_API void* specmoe_engine_new(int32_t threads, const char* name) {
  const Kernels* kernels = kernels_or_null(name);
  if (name != nullptr && kernels == nullptr) return nullptr;
  return new (std::nothrow) Engine(threads, kernels);
}

SPECMOE_API void specmoe_engine_delete(void* engine) { delete static_cast<Engine*>(engine); }

SPECMOE_API void specmoe_engine_set_threads(void* engine, int32_t threads) {
  static_cast<Engine*>(engine)->set_threads(threads);
}

SPECMOE_API void specmoe_engine_settle(void* engine) { static_cast<Engine*>(engine)->settle(); }

SPECMOE_API const char* specmoe_engine_kernels(void* engine) {
  return static_cast<Engine*>(engine)->kernels().name;
}

// Returns 0, or 1 when memory or threads ran out.
SPECMOE_API int32_t specmoe_engine_run(void* engine, const ExpertSpec* spec, const ExpertTask* tasks,
                           int64_t count, const float* x, int64_t tokens, float* y) {
  try {
    static_cast<Engine*>(engine)->run(*spec, tasks, count, x, tokens, y);
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}

}  // extern "C"
