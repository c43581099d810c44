// Getting a layer's experts into its slots: what is there, on its way, or missing.
//
// `runtime/cpu/cached_residency.py` in C++, for steps of decode whose experts all get a slot.
//
// Shape letters: E experts, L MoE layers, S slots per layer.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

#include "cache.h"
#include "experts.h"
#include "readers.h"
#include "spare.h"

namespace specmoe {

// Counters of one layer, added to and emptied by Python.
enum Counter : int32_t {
  COUNT_STEPS,
  COUNT_HITS,
  COUNT_MISSES,
  COUNT_DEMAND_BYTES,
  COUNT_SPECULATIVE_BYTES,
  COUNT_USEFUL_BYTES,
  COUNT_WASTED_BYTES,
  COUNT_PUSHED_OUT_BYTES,
  COUNT_STALL_NS,
  COUNT_STALL_BYTES,
  COUNT_PREDICTED,
  COUNT_NEEDED,
  COUNT_RECALLED,
  COUNT_PREFETCHES,
  COUNT_LATE,
  COUNT_CANCELLED,
  COUNT_SKIPPED,
  COUNTERS,
};

// What a layer's steps need; filled in by Python, whose memory it points to.
struct StepLayer {
  const ExpertSpec* expert;  // null where torch computes
  CacheTables cache;
  uint8_t* memory;          // slots, or all experts in place: [S or E, record_bytes]
  int64_t record_bytes;
  int64_t file_offset;      // of expert 0's record
  const uint8_t* verified;  // [E], whether a record's checksum was seen to match; null: no check
  uint8_t* unused;          // [E], guesses that were read and that no step has used yet
  uint8_t* pushed_out;      // [E], what useless guesses pushed out, until it is read again
  int64_t* counters;        // [COUNTERS]
  int64_t* flags;           // [2]: reads or steps of Python's are under way; is never guessed
  float* vectors;           // [E, H], default vectors
  int64_t* samples;         // [E], samples in each
  int64_t is_slice;         // the id E stands for experts of other ranks, whose outputs are zero
};

enum StepFlag : int32_t { FLAG_BUSY = 0, FLAG_SKIPPED = 1 };

struct Ready {
  int64_t expert;
  const uint8_t* record;
};

// Experts of one step, from `begin` on.
struct StepReads {
  std::vector<Ready> ready;          // there
  std::vector<ReadPointer> waiting;  // on their way
};

// What one prediction has read.
struct Issued {
  std::vector<ReadPointer> reads;
  std::vector<int64_t> evicted;
};

class Slots {
 public:
  // `spare`: for the records that a layer's plan bypasses.
  Slots(const std::vector<StepLayer>& layers, int file, int threads, const SparePlaces& spare)
      : layers_(layers),
        file_(file),
        threads_(threads),
        spare_(spare),
        in_flight_(layers.size()) {}

  // Whether all of these are there or get a slot, and may be read without Python.
  bool takes(int64_t number, const std::vector<int64_t>& wanted) const;
  // Starts a step that needs `wanted`, which `takes` took.
  void begin(int64_t number, const std::vector<int64_t>& wanted, StepReads& step);
  // The next that arrived; null when none is left or, without `block`, none has arrived. One that
  // failed is out of the cache.
  ReadPointer next_or_null(int64_t number, StepReads& step, bool block);
  // Makes reads follow what is wanted: promotes those, cancels the others.
  void settle(int64_t number, const std::vector<int64_t>& wanted);
  // Reads ahead what is not there, in order, up to `budget` bytes if that is not negative.
  // What is `predicted` does not make room for it.
  Issued prefetch(int64_t number, const std::vector<int64_t>& experts,
                  const std::vector<int64_t>& predicted, int64_t budget);
  // Whether a read of a prediction cost anything.
  bool has_begun(const RecordRead& read);
  // Waits until no read is in progress; those that have not begun are taken back.
  void quiesce();
  // In a forked process: nothing that was in progress is.
  void forget_reads();
  void close();

  int64_t busy_ns() const { return busy_before_ns_ + (readers_ ? readers_->busy_ns() : 0); }

 private:
  std::vector<int64_t> pinned(int64_t number) const;
  int64_t spare_slots(int64_t number, const std::vector<int64_t>& wanted) const;
  ReadPointer read_of(int64_t number, const Filled& fill, bool is_guess,
                      int64_t place = kNobody) const;
  void begin_bypassed(int64_t number, const std::vector<int64_t>& experts, StepReads& step,
                      std::vector<ReadPointer>& reads);
  bool has(int64_t number, int64_t expert) const;
  void start(int64_t number, bool is_guess, const std::vector<ReadPointer>& reads);
  void end_bypassing(const RecordRead& read);
  void free_spare();
  void drop(int64_t number, const RecordRead& read);
  void count_use(int64_t number, const CachePlan& plan);
  void count_pushed_out(int64_t number, const std::vector<ReadPointer>& reads);
  void count_stalled(int64_t number, const RecordRead& read);

  const std::vector<StepLayer>& layers_;
  const int file_;
  const int threads_;
  const SparePlaces spare_;
  std::unique_ptr<Readers> readers_;
  int64_t busy_before_ns_ = 0;
  CachePlanner planner_;
  std::vector<std::vector<ReadPointer>> in_flight_;  // into slots, nobody has waited for them yet
  std::vector<ReadPointer> bypassing_;  // into spare places, nobody has waited for them yet
  // The last waits, as far back as a guess may have begun.
  std::deque<std::pair<Clock::time_point, Clock::time_point>> stalls_;
};

}  // namespace specmoe
