#include "readers.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

namespace specmoe {
namespace {

constexpr int64_t kPartBytes = 1 << 20;
// Parts of guesses in progress at once: a few MiB keep any disk busy, and a needed record has to
// share it with them.
constexpr int64_t kGuessedParts = 4;
// Needed parts in progress beside which a guess may go on: the last one alone seldom keeps a disk
// busy.
constexpr int64_t kNeededBesideGuess = 1;
// Who waits stays awake for so long, about what a record of a few MiB takes: a core that went to
// sleep comes back late, and computes slowly at first. Others have the core meanwhile if they ask.
constexpr auto kAwake = std::chrono::milliseconds(2);

bool is_final(const RecordRead& read) {
  return read.state != ReadState::queued && read.state != ReadState::running;
}

}  // namespace

Readers::Readers(int file, int threads) : file_(file) {
  threads_.reserve(static_cast<size_t>(threads));
  try {
    for (int i = 0; i < threads; i++) threads_.emplace_back([this] { serve(); });
  } catch (const std::system_error&) {
    if (threads_.empty()) throw;  // one of them is enough
  }
}

Readers::~Readers() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
  }
  work_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Readers::start(const std::vector<ReadPointer>& reads) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const ReadPointer& read : reads) {
      read->is_guess = read->was_guess;
      (read->is_guess ? guessed_ : needed_).push_back(read.get());
    }
  }
  work_.notify_all();
}

void Readers::drop(RecordRead& read) {
  std::deque<RecordRead*>& queue = read.is_guess ? guessed_ : needed_;
  queue.erase(std::remove(queue.begin(), queue.end(), &read), queue.end());
}

void Readers::promote(RecordRead& read) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!read.is_guess || is_final(read)) return;
    drop(read);
    read.is_guess = false;
    guesses_running_ -= read.parts_running;
    if (read.handed_out < read.bytes) needed_.push_back(&read);
  }
  work_.notify_all();
}

bool Readers::cancel(RecordRead& read) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (read.state != ReadState::queued) return false;
  drop(read);
  read.state = ReadState::cancelled;
  return true;
}

ReadState Readers::state(const RecordRead& read) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return read.state;
}

ReadPointer Readers::final_or_null(const std::vector<ReadPointer>& reads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const ReadPointer& read : reads)
    if (is_final(*read)) return read;
  return nullptr;
}

ReadPointer Readers::wait_any(const std::vector<ReadPointer>& reads) {
  const auto until = Clock::now() + kAwake;
  do {
    const int64_t seen = arrivals_.load();
    if (ReadPointer read = final_or_null(reads)) return read;
    while (arrivals_.load() == seen && Clock::now() < until) std::this_thread::yield();
  } while (Clock::now() < until);
  std::unique_lock<std::mutex> lock(mutex_);
  ReadPointer first;
  arrived_.wait(lock, [&] {
    const auto found = std::find_if(reads.begin(), reads.end(),
                                    [](const ReadPointer& read) { return is_final(*read); });
    if (found != reads.end()) first = *found;
    return first != nullptr;
  });
  return first;
}

int64_t Readers::busy_ns() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return busy_ns_;
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

// The read whose next part is to be taken on.
RecordRead* Readers::next_or_null() {
  if (!needed_.empty()) return needed_.front();
  const bool is_busy = parts_running_ - guesses_running_ > kNeededBesideGuess;
  if (guessed_.empty() || is_busy || guesses_running_ >= kGuessedParts) return nullptr;
  return guessed_.front();
}

void Readers::serve() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    RecordRead* read = nullptr;
    work_.wait(lock, [&] { return closing_ || (read = next_or_null()) != nullptr; });
    if (closing_) return;
    const int64_t begin = read->handed_out, end = std::min(begin + kPartBytes, read->bytes);
    read->handed_out = end;
    if (end == read->bytes) (read->is_guess ? guessed_ : needed_).pop_front();
    if (read->state == ReadState::queued) {
      read->state = ReadState::running;
      read->began = Clock::now();
    }
    if (parts_running_++ == 0) busy_since_ = Clock::now();
    read->parts_running++;
    guesses_running_ += read->is_guess;
    lock.unlock();
    const bool is_there = read_part(*read, begin, end);
    lock.lock();
    if (!is_there) read->has_failed = true;
    read->parts_running--;
    guesses_running_ -= read->is_guess;
    if (--parts_running_ == 0)
      busy_ns_ +=
          std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - busy_since_).count();
    if (!guessed_.empty()) work_.notify_all();
    if (read->handed_out < read->bytes || read->parts_running > 0) continue;
    read->ended = Clock::now();
    read->state = read->has_failed ? ReadState::failed : ReadState::done;
    arrivals_++;
    arrived_.notify_all();
  }
}

}  // namespace specmoe
