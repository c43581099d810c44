// Threads that read records from the store's file into slots, in parts, so that one record alone
// keeps a disk busy.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

namespace specmoe {

using Clock = std::chrono::steady_clock;

// One record of a step; its times are those of the first part's begin and the last part's end.
struct RecordRead {
  uint8_t* target;
  int64_t offset;  // in the file
  int64_t bytes;
  int64_t parts_left = 0;
  bool has_begun = false;
  bool failed = false;
  Clock::time_point began{}, ended{};
};

class Readers {
 public:
  // Threads start now. `file` is read with pread; memory, offsets and sizes are multiples of 4096.
  Readers(int file, int threads);
  ~Readers();
  Readers(const Readers&) = delete;
  Readers& operator=(const Readers&) = delete;

  // The reads stay where they are until each was returned by `wait`.
  void start(std::vector<RecordRead>& reads);
  // Blocks until one of those that were started is complete, and not returned yet: its index.
  size_t wait();
  // Whether `wait` would return at once.
  bool has_arrived();
  // Nanoseconds in which at least one read was in progress, up to the last `start` to be complete.
  int64_t busy_ns() const { return busy_ns_; }

 private:
  struct Part {
    size_t read;
    int64_t begin, end;
  };
  void serve();
  bool read_part(const RecordRead& read, int64_t begin, int64_t end) const;

  const int file_;
  std::mutex mutex_;
  std::condition_variable work_, arrived_;
  std::deque<Part> parts_;
  std::deque<size_t> done_;
  std::vector<RecordRead>* reads_ = nullptr;
  int64_t parts_left_ = 0;
  Clock::time_point busy_since_{};
  int64_t busy_ns_ = 0;
  bool closing_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace specmoe
