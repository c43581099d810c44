// Threads that read records from the store's file into slots, in parts, so that one record alone
// keeps a disk busy. What a step needs goes before what is only guessed.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "cache.h"

namespace specmoe {

using Clock = std::chrono::steady_clock;

enum class ReadState { queued, running, done, failed, cancelled };

// One record. Who asks for it says what and where to; the rest is the readers', under their lock.
struct RecordRead {
  Filled fill;
  uint8_t* target;
  int64_t offset;  // in the file
  int64_t bytes;
  bool was_guess;  // when it was asked for
  int64_t place;   // of the target among the spare ones; -1: it is a slot

  bool is_guess = false;  // false once it is needed
  ReadState state = ReadState::queued;
  int64_t handed_out = 0;  // bytes that threads have taken on
  int64_t parts_running = 0;
  bool has_failed = false;
  Clock::time_point began{}, ended{};  // of the first part and the last
};

using ReadPointer = std::shared_ptr<RecordRead>;

class Readers {
 public:
  // Threads start now. `file` is read with pread; memory, offsets and sizes are multiples of 4096.
  Readers(int file, int threads);
  ~Readers();
  Readers(const Readers&) = delete;
  Readers& operator=(const Readers&) = delete;

  // Each is kept by the caller until it is final.
  void start(const std::vector<ReadPointer>& reads);
  // Makes a guess a needed one, whether it runs already or not.
  void promote(RecordRead& read);
  // Takes a read back; false if it began, which makes it final sooner or later.
  bool cancel(RecordRead& read);
  ReadState state(const RecordRead& read);
  // The first that is final, or null.
  ReadPointer final_or_null(const std::vector<ReadPointer>& reads);
  // Waits until one is final, awake at first; at least one has to be asked for.
  ReadPointer wait_any(const std::vector<ReadPointer>& reads);
  // Nanoseconds in which at least one read was in progress, up to the last time none was.
  int64_t busy_ns();

 private:
  RecordRead* next_or_null();
  void drop(RecordRead& read);
  void serve();
  bool read_part(const RecordRead& read, int64_t begin, int64_t end) const;

  const int file_;
  std::mutex mutex_;
  std::condition_variable work_, arrived_;
  std::atomic<int64_t> arrivals_{0};  // reads that became final in their threads
  std::deque<RecordRead*> needed_, guessed_;  // those with parts that nobody has taken on
  int64_t parts_running_ = 0, guesses_running_ = 0;
  Clock::time_point busy_since_{};
  int64_t busy_ns_ = 0;
  bool closing_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace specmoe
