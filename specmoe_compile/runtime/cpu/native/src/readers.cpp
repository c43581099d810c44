#include "readers.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>

namespace specmoe {
namespace {

constexpr int64_t kPartBytes = 1 << 20;

}  // namespace

Readers::Readers(int file, int threads) : file_(file) {
  for (int i = 0; i < threads; i++) threads_.emplace_back([this] { serve(); });
}

Readers::~Readers() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
  }
  work_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Readers::start(std::vector<RecordRead>& reads) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    reads_ = &reads;
    done_.clear();
    parts_left_ = 0;
    for (size_t i = 0; i < reads.size(); i++) {
      RecordRead& read = reads[i];
      for (int64_t begin = 0; begin < read.bytes; begin += kPartBytes) {
        parts_.push_back({i, begin, std::min(begin + kPartBytes, read.bytes)});
        read.parts_left++;
        parts_left_++;
      }
    }
    busy_since_ = Clock::now();
  }
  work_.notify_all();
}

size_t Readers::wait() {
  std::unique_lock<std::mutex> lock(mutex_);
  arrived_.wait(lock, [&] { return !done_.empty(); });
  const size_t first = done_.front();
  done_.pop_front();
  return first;
}

bool Readers::has_arrived() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return !done_.empty();
}

bool Readers::read_part(const RecordRead& read, int64_t begin, int64_t end) const {
  int64_t at = begin;
  while (at < end) {
    const ssize_t count = pread(file_, read.target + at, static_cast<size_t>(end - at),
                                static_cast<off_t>(read.offset + at));
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    at += count;
    if (at < end) at -= at % 4096;  // O_DIRECT goes on only at an aligned place
  }
  return true;
}

void Readers::serve() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    work_.wait(lock, [&] { return closing_ || !parts_.empty(); });
    if (closing_) return;
    const Part part = parts_.front();
    parts_.pop_front();
    RecordRead& read = (*reads_)[part.read];
    if (!read.has_begun) {
      read.has_begun = true;
      read.began = Clock::now();
    }
    lock.unlock();
    const bool is_there = read_part(read, part.begin, part.end);
    lock.lock();
    if (!is_there) read.failed = true;
    if (--parts_left_ == 0)
      busy_ns_ +=
          std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - busy_since_).count();
    if (--read.parts_left > 0) continue;
    read.ended = Clock::now();
    done_.push_back(part.read);
    arrived_.notify_all();
  }
}

}  // namespace specmoe
