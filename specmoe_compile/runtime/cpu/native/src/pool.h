// Threads of our own that share work in small chunks, and are parked when there is none.
//
// A chunk is computed into memory of the thread that took it and then published by the first who
// has it. So a thread that the system takes off its core delays nobody: who finds no more chunks
// computes those that are late a second time, and what the late thread brings is dropped.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace specmoe {

// Where threads sleep until something changes. Whoever wakes them holds no lock: a thread that is
// taken off its core right after it woke up must not keep others from going on.
class Parking {
 public:
  // Sleeps until `wake` is called after `ticket` was read, or returns early.
  void sleep(uint32_t ticket);
  uint32_t ticket() const { return count_.load(); }
  void wake();

 private:
  std::atomic<uint32_t> count_{0};
  std::atomic<int> sleepers_{0};
#if !defined(__linux__)
  std::mutex mutex_;
  std::condition_variable changed_;
#endif
};

// Memory of one thread, kept from chunk to chunk.
struct Scratch {
  std::vector<float> floats;
  int64_t computed = 0;  // chunks
  int64_t next = 0;      // the chunk that comes next, most likely; may be past the last one
};

class Work {
 public:
  virtual ~Work() = default;
  // Chunks that have to be published before this one may be computed: [first, second).
  virtual void needs(int64_t chunk, int64_t* first, int64_t* second) const = 0;
  // Computes into the scratch; may run twice at once, and after the work is over.
  virtual void compute(int64_t chunk, Scratch& scratch) const = 0;
  // Makes the result known to others; runs once.
  virtual void publish(int64_t chunk, const Scratch& scratch) = 0;
};

// Work that is offered to the threads. It may be changed only while nobody holds it.
class Offer {
 public:
  // Whether no thread, late or not, still looks at the work.
  bool is_free() const { return users_.load() == 0; }

 private:
  friend class Pool;

  void reset(Work* work, int64_t chunks, int64_t threads);
  void take_part(Scratch& scratch);
  void finish(Scratch& scratch);
  void run_chunk(int64_t chunk, int64_t next, Scratch& scratch);
  void await(int64_t first, int64_t second, Scratch& scratch);
  bool is_done(int64_t chunk) const { return states_[chunk].load(std::memory_order_acquire) == 2; }

  Work* work_ = nullptr;
  int64_t chunks_ = 0;
  int64_t threads_ = 1;  // that take chunks
  int64_t capacity_ = 0;
  std::atomic<int64_t> next_{0};
  std::atomic<int> users_{0};
  std::unique_ptr<std::atomic<uint8_t>[]> states_;  // 0 open, 1 being published, 2 done
};

class Pool {
 public:
  // `threads` counts the caller of `run`.
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }
  // Runs chunks 0 to count - 1; the caller takes part, or does it alone. One caller at a time.
  void run(Offer& offer, Work& work, int64_t chunks, bool alone = false);
  // Chunks that callers of `run` have computed.
  int64_t callers_chunks() const { return scratch_.computed; }

 private:
  void serve();
  Offer* wait_for_offer_or_null();

  Scratch scratch_;
  std::atomic<Offer*> open_{nullptr};
  std::atomic<bool> closing_{false};
  Parking parking_;
  std::vector<std::thread> workers_;
};

}  // namespace specmoe
