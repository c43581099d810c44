// Layer steps of decode without Python, whole or in parts: guess, reads, experts, the sum.
//
// A layer runs by `experts`, or by `start` some layers earlier, then `settle`, `run` and `correct`:
// `runtime/cpu/speculator.py` in C++. Whatever was guessed, policy exact gives the same numbers.
//
// What it does not do it leaves to Python, before it has changed anything: prefill, policy commit,
// steps whose experts do not all get a slot, records that nobody has verified yet, observers.
// Tables and slots are the same memory. Python calls `quiesce` before it takes a step.
//
// Shape letters: T tokens, E experts, K top-k, P guesses per token, L MoE layers, H hidden.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "experts.h"
#include "guesses.h"
#include "judge.h"
#include "slots.h"
#include "step_call.h"

namespace specmoe {

// Set by Python between steps.
struct StepControl {
  int64_t is_off;          // all steps are Python's
  int64_t guesses;         // whether steps in parts are done here; else Python does them
  int64_t is_judged;       // guesses that do not pay are turned off
  int64_t budget_bytes;    // most that a prediction reads; -1: no limit
  int64_t width;           // guesses of a token that count; -1: all
  int64_t learns;          // whether steps learn default vectors, one of several in turn
  int64_t learning_turn;   // steps until then
  int64_t max_samples;     // that decoding adds to a default vector
  const int64_t* is_frozen;  // [1], whether default vectors stay as they are
  double threshold;        // router weight below which a miss gets its default vector; -1: none does
};

class Steps {
 public:
  Steps(Engine& engine, const StepLayer* layers, int64_t count, StepControl* control, int file,
        int readers, const SparePlaces& spare);

  // One caller at a time, Python's path included; may be taken again by who has it.
  std::recursive_mutex& mutex() { return *mutex_; }
  // In a forked process, where no thread of the parent's is.
  void renew_after_fork();
  // Leaves everything to Python from now on: its memory goes away.
  void close();
  // Ends what is under way, so that Python may take a step.
  void quiesce();
  int64_t busy_ns() const { return slots_.busy_ns(); }

  // See `StepFunctions`.
  bool experts(int64_t number, const StepCall& call);
  bool plan(const int64_t* layers, int64_t count, const int64_t* edges, int64_t edge_count,
            uint8_t* answers);
  int64_t start(int64_t number, const StepCall& call);
  int64_t settle(int64_t number, const StepCall& call, int64_t ticket);
  bool run(int64_t number, const StepCall& call, int64_t state);
  bool correct(int64_t number, const StepCall& call, int64_t state);
  bool blend(int64_t number, const StepCall& call);
  bool products(const ProductsCall& call);
  void attend(const AttentionCall& call) { engine_.attend(call); }  // takes no lock either

 private:
  struct Task {
    int64_t expert;
    size_t first, count;  // in tokens_ and places_
  };
  // A step between `settle` and `correct`.
  struct Live {
    int64_t state = 0;  // its number; 0: there is none
    int64_t layer = 0;
    bool has_begun = false, has_run = false;
    std::vector<int64_t> ids;     // [T * K]
    std::vector<int64_t> filled;  // experts whose rows are default vectors
  };

  const StepLayer* layer_or_null(int64_t number) const;
  bool is_pythons(const StepLayer& layer, const StepCall& call) const;
  bool fits(const StepLayer& layer, const StepCall& call) const;
  bool needs_weights(const StepLayer& layer) const;
  bool group(const StepLayer& layer, const StepCall& call);
  bool is_live(int64_t number, const StepCall& call, int64_t state) const;
  void abandon() { live_.state = 0; }
  std::vector<int64_t> fill_weak(const StepLayer& layer, const StepCall& call);
  void take_input(const StepCall& call);
  void compute_ready(int64_t number, const StepCall& call);
  bool compute_arrivals(int64_t number, const StepCall& call, bool block);
  void compute(const StepLayer& layer, const StepCall& call);
  ExpertTask task_of(int64_t expert, const uint8_t* record) const;
  void end_step(int64_t number, const StepCall& call, int64_t rest);
  void learn(const StepLayer& layer, const StepCall& call, int64_t rest);
  void meet_guess(int64_t number, int64_t ticket, const StepCall& call);
  bool guesses(int64_t number);

  Engine& engine_;
  std::vector<StepLayer> layers_;
  StepControl* control_;
  std::unique_ptr<std::recursive_mutex> mutex_;
  bool is_closed_ = false;
  Slots slots_;
  PrefetchJudge judge_;
  std::vector<Prediction> predictions_;  // [L], the last of each layer
  std::vector<int8_t> asked_;            // [L], whether `plan` wants a guess; -1: nobody asked
  int64_t numbers_ = int64_t{1} << 40;   // Python's begin at 1

  Live live_;
  StepReads reads_;
  std::vector<int64_t> wanted_;
  std::vector<Task> tasks_;
  std::vector<int32_t> tokens_, places_;
  std::vector<ExpertTask> ready_;
  std::vector<float> x_, y_;
  const float* input_ = nullptr;
};

// Steps by the number that graphs call a session by.
void enter_steps(int64_t handle, std::shared_ptr<Steps> steps);
void leave_steps(int64_t handle, Steps* steps);
const StepFunctions& step_functions();

}  // namespace specmoe
