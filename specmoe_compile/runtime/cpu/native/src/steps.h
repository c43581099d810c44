// One layer step of decode as one call: look-up and plan, reads as they arrive, experts, the sum.
//
// What it does not do it leaves to Python, before it has changed anything: prefill, guesses, steps
// whose experts do not all get a slot, records that nobody has verified yet, observers. Tables and
// slots are the same memory.
//
// Shape letters: T tokens, E experts, K top-k, L MoE layers, H hidden.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "cache.h"
#include "experts.h"
#include "readers.h"
#include "step_call.h"

namespace specmoe {

constexpr int64_t kMaxTokens = 16;
// Torch adds more than 16 numbers in another order, and more than 4 in columns that are left over
// when it has taken 4 vectors at a time.
constexpr int64_t kMaxTopK = 16;
constexpr int64_t kAnyWidthTopK = 4;
constexpr int64_t kVectors = 64;

// Counters of one layer, added to and emptied by Python.
enum Counter : int32_t {
  COUNT_STEPS = 0,
  COUNT_HITS = 1,
  COUNT_MISSES = 2,
  COUNT_STALL_NS = 3,
  COUNT_STALL_BYTES = 4,
  COUNTERS = 5,
};

// What a layer's steps need; filled in by Python, whose memory it points to.
struct StepLayer {
  const ExpertSpec* expert;  // null where torch computes
  CacheTables cache;
  uint8_t* memory;          // slots, or all experts in place: [S or E, record_bytes]
  int64_t record_bytes;
  int64_t file_offset;      // of expert 0's record
  const uint8_t* verified;  // [E], whether a record's checksum was seen to match; null: no check
  int64_t* counters;        // [COUNTERS]
  int64_t* is_busy;         // [1], whether guesses or reads of this layer are Python's business
  int64_t is_slice;         // the id E stands for experts of other ranks, whose outputs are zero
};

// Set by Python between steps.
struct StepControl {
  int64_t is_off;         // all steps are Python's
  int64_t learns;         // whether steps learn default vectors, one of several in turn
  int64_t learning_turn;  // steps until then
  int64_t is_timed;       // the last layer is Python's, who takes the time
};

class Steps {
 public:
  Steps(Engine& engine, const StepLayer* layers, int64_t count, StepControl* control, int file,
        int readers, uint8_t* spare);
  ~Steps();

  // One caller at a time, Python's path included; may be taken again by who has it.
  std::recursive_mutex& mutex() { return *mutex_; }
  // In a forked process, where no thread of the parent's is.
  void renew_after_fork();
  // Leaves everything to Python from now on: its memory goes away.
  void close();
  // Returns whether it was done; else nothing has changed but what a failed read left out of cache.
  bool experts(int64_t layer, const StepCall& call);
  int64_t busy_ns() const { return busy_before_ns_ + (readers_ ? readers_->busy_ns() : 0); }

 private:
  struct Task {
    int64_t expert;
    size_t first, count;  // in tokens_ and places_
  };
  using Stalls = std::vector<std::pair<Clock::time_point, Clock::time_point>>;

  bool is_pythons(int64_t layer, const StepCall& call) const;
  bool group(const StepLayer& layer, const StepCall& call);
  bool fits(const StepLayer& layer) const;
  void start_reads(const StepLayer& layer);
  bool take_arrivals(const StepLayer& layer, const float* x, int64_t tokens);
  ExpertTask task_of(int64_t expert, const uint8_t* record) const;
  void compute(const StepLayer& layer, const std::vector<ExpertTask>& tasks, const float* x,
               int64_t tokens);
  void count_stalls(const StepLayer& layer, const Stalls& stalls) const;

  Engine& engine_;
  std::vector<StepLayer> layers_;
  StepControl* control_;
  const int file_;
  const int reader_threads_;
  uint8_t* const spare_;  // room for the records that a layer's plan bypasses
  std::unique_ptr<std::recursive_mutex> mutex_;
  std::unique_ptr<Readers> readers_;
  int64_t busy_before_ns_ = 0;
  bool is_closed_ = false;
  CachePlanner planner_;
  const CachePlan* plan_ = nullptr;
  std::vector<int64_t> wanted_;
  std::vector<Task> tasks_;
  std::vector<int32_t> tokens_, places_;
  std::vector<RecordRead> reads_;
  std::vector<ExpertTask> ready_;
  std::vector<float> x_, y_;
};

// Steps by the number that graphs call a session by.
void enter_steps(int64_t handle, std::shared_ptr<Steps> steps);
void leave_steps(int64_t handle, Steps* steps);
std::shared_ptr<Steps> steps_or_null(int64_t handle);

}  // namespace specmoe
