// What Python calls by ctypes, which lets go of the interpreter's lock. Plain C types only.
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <vector>

#include "alone.h"
#include "cache.h"
#include "experts.h"
#include "steps.h"

#define SPECMOE_API __attribute__((visibility("default")))

using namespace specmoe;

namespace {

const Kernels* kernels_or_null(const char* name) {
  if (name == nullptr || std::strcmp(name, "portable") == 0)
    return name == nullptr ? nullptr : &portable_kernels();
  if (std::strcmp(name, "avx2") == 0) return avx2_kernels_or_null();
  if (std::strcmp(name, "avx512") == 0) return avx512_kernels_or_null();
  if (std::strcmp(name, "avx512_bf16") == 0) return avx512_bf16_kernels_or_null();
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
    case 3: return sizeof(ExpertTask);
    case 4: return sizeof(CacheTables);
    case 5: return sizeof(StepLayer);
    case 6: return sizeof(StepControl);
    case 7: return sizeof(StepCall);
    case 8: return sizeof(SparePlaces);
    default: return sizeof(AttentionCall);
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

// Only tests call it by itself.
SPECMOE_API void specmoe_engine_attend(void* engine, const AttentionCall* call) {
  static_cast<Engine*>(engine)->attend(*call);
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

// Plans one step's experts, distinct; for tests, which compare it with Python's.
//   pinned: [pinned_count] slots. placed: [count, 2], expert and slot, hits first.
//   evicted: [count]. counts: [3], hits, fills and evicted ones.
SPECMOE_API void specmoe_cache_plan(const CacheTables* cache, const int64_t* experts,
                                    int64_t count, const int64_t* pinned, int64_t pinned_count,
                                    int32_t is_guess, int64_t* placed, int64_t* evicted,
                                    int64_t* counts) {
  CachePlanner planner;
  const CachePlan& plan =
      planner.plan(*cache, std::vector<int64_t>(experts, experts + count),
                   std::vector<int64_t>(pinned, pinned + pinned_count), is_guess != 0);
  std::vector<Placed> all = plan.hits;
  all.insert(all.end(), plan.fills.begin(), plan.fills.end());
  for (const Placed& entry : all) {
    *placed++ = entry.expert;
    *placed++ = entry.slot;
  }
  for (const int64_t expert : plan.evicted) *evicted++ = expert;
  counts[0] = static_cast<int64_t>(plan.hits.size());
  counts[1] = static_cast<int64_t>(plan.fills.size());
  counts[2] = static_cast<int64_t>(plan.evicted.size());
}

// `layers` and `spare` are copied; what they point to, `control` and the file stay Python's. Null:
// no memory.
SPECMOE_API void* specmoe_steps_new(void* engine, const StepLayer* layers, int64_t count,
                                    StepControl* control, int32_t file, int32_t readers,
                                    const SparePlaces* spare) {
  try {
    return new std::shared_ptr<Steps>(std::make_shared<Steps>(
        *static_cast<Engine*>(engine), layers, count, control, file, readers, *spare));
  } catch (const std::exception&) {
    return nullptr;
  }
}

SPECMOE_API void specmoe_steps_delete(void* steps) {
  delete static_cast<std::shared_ptr<Steps>*>(steps);
}

// What graphs call by `handle` from now on.
SPECMOE_API void specmoe_steps_enter(int64_t handle, void* steps) {
  enter_steps(handle, *static_cast<std::shared_ptr<Steps>*>(steps));
}

SPECMOE_API void specmoe_steps_leave(int64_t handle, void* steps) {
  leave_steps(handle, static_cast<std::shared_ptr<Steps>*>(steps)->get());
}

SPECMOE_API void specmoe_steps_lock(void* steps) {
  (*static_cast<std::shared_ptr<Steps>*>(steps))->mutex().lock();
}

SPECMOE_API void specmoe_steps_unlock(void* steps) {
  (*static_cast<std::shared_ptr<Steps>*>(steps))->mutex().unlock();
}

SPECMOE_API void specmoe_steps_renew(void* steps) {
  (*static_cast<std::shared_ptr<Steps>*>(steps))->renew_after_fork();
}

SPECMOE_API int64_t specmoe_steps_busy_ns(void* steps) {
  return (*static_cast<std::shared_ptr<Steps>*>(steps))->busy_ns();
}

// Ends what is under way, so that Python may take a step.
SPECMOE_API void specmoe_steps_quiesce(void* steps) {
  (*static_cast<std::shared_ptr<Steps>*>(steps))->quiesce();
}

// What torch's ops call.
SPECMOE_API const StepFunctions* specmoe_step_functions() { return &step_functions(); }

// The choice between all threads and one; for tests: a trial of its own, or an engine's.
SPECMOE_API void* specmoe_alone_new() { return new (std::nothrow) AloneTrial; }
SPECMOE_API void specmoe_alone_delete(void* trial) { delete static_cast<AloneTrial*>(trial); }
SPECMOE_API void* specmoe_alone_of(void* engine) { return &static_cast<Engine*>(engine)->trial(); }
SPECMOE_API int32_t specmoe_alone_is(void* trial) {
  return static_cast<AloneTrial*>(trial)->is_alone();
}
SPECMOE_API void specmoe_alone_end(void* trial, const RunTimes* run, int64_t tokens) {
  static_cast<AloneTrial*>(trial)->end(*run, tokens);
}

SPECMOE_API void specmoe_alone_ask(void* trial, AloneTrial::IdleClock idle_clock) {
  static_cast<AloneTrial*>(trial)->ask(idle_clock);
}
SPECMOE_API double specmoe_idle_ns() { return idle_ns(); }

// The judge alone; for tests, which compare it with Python's.
SPECMOE_API void* specmoe_judge_new(int64_t layers) {
  return new (std::nothrow) PrefetchJudge(layers);
}
SPECMOE_API void specmoe_judge_delete(void* judge) { delete static_cast<PrefetchJudge*>(judge); }
SPECMOE_API int32_t specmoe_judge_predicts(void* judge, int64_t layer) {
  return static_cast<PrefetchJudge*>(judge)->predicts(layer);
}
// guesses: [count, 3], expert, rank and whether it is read.
SPECMOE_API void specmoe_judge_admitted(void* judge, int64_t layer, const int64_t* experts,
                                        int64_t count, int64_t width, int64_t* guesses) {
  for (const RankedGuess& guess : static_cast<PrefetchJudge*>(judge)->admitted(
           layer, std::vector<int64_t>(experts, experts + count), width))
    for (const int64_t value : {guess.expert, guess.rank, int64_t{guess.is_admitted}})
      *guesses++ = value;
}
// brought: [count, 2], rank and whether it was wanted.
SPECMOE_API void specmoe_judge_measure(void* judge, int64_t layer, const int64_t* brought,
                                       int64_t count) {
  std::vector<std::pair<int64_t, bool>> pairs;
  for (int64_t i = 0; i < count; i++) pairs.emplace_back(brought[2 * i], brought[2 * i + 1] != 0);
  static_cast<PrefetchJudge*>(judge)->measure(layer, pairs);
}

}  // extern "C"
