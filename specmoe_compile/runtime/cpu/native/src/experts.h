// The experts of one layer step, computed by the pool.
//
// Shape letters: T tokens, K top-k, N tokens of one expert, H hidden, I expert intermediate.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "activations.h"
#include "alone.h"
#include "pool.h"
#include "weight.h"

namespace specmoe {

// How the experts of a layer are computed.
struct ExpertSpec {
  WeightSpec up;    // [2I or I, H]
  WeightSpec down;  // [H, I]
  GateSpec gate;
  int32_t interleaved;  // rows alternate gate, up; else all gates come first
  int32_t int8;         // int8 activations where the codes allow it
};

// One expert of a step: its record, its tokens, and where their outputs go.
struct ExpertTask {
  const uint8_t* record;
  const int32_t* tokens;  // [N], rows of x
  const int32_t* places;  // [N], rows of y
  int64_t count;          // N
};

class Attention;
class Products;

// A process has one of these, since it has one set of cores.
class Engine {
 public:
  // `kernels` is null for the best that the processor has.
  Engine(int threads, const Kernels* kernels);
  ~Engine();

  // y[places[n]] = expert(x[tokens[n]]) of every task, float32 rounded to the experts' dtype.
  //   x: [T, H] float32, values of the experts' dtype. y: [T * K, H] float32.
  void run(const ExpertSpec& spec, const ExpertTask* tasks, int64_t count, const float* x,
           int64_t tokens, float* y);
  // The products of a call, float32 rounded to its dtype once, bias included.
  void products(const ProductsCall& call);
  // Attention in float32, rounded to the dtype once.
  void attend(const AttentionCall& call);
  void set_threads(int threads);
  // Returns once no late thread reads a record any more; call it before records go away.
  void settle();
  const Kernels& kernels() const { return *kernels_; }
  // Whether it computes alone; only tests ask.
  AloneTrial& trial() { return trial_; }
  int threads() const { return pool_ ? pool_->threads() : threads_; }

 private:
  class Step;
  Step& free_step();
  void start_threads();
  void run_measured(Step& step, int64_t tokens);

  const Kernels* kernels_;
  int threads_;
  std::mutex mutex_;
  std::unique_ptr<Pool> pool_;
  AloneTrial trial_;
  int64_t process_ = 0;
  std::vector<std::unique_ptr<Step>> steps_;
  std::unique_ptr<Products> products_;
  std::unique_ptr<Attention> attention_;
};

}  // namespace specmoe
