// Asking for memory before it is read.
#pragma once

#include <cstdint>

namespace specmoe {
namespace {

constexpr int64_t kLine = 64;
// What the processor is told to bring ahead of the rows that are read, into its second cache.
constexpr int64_t kAheadBytes = 8192;

// May be any address: what is not there is not brought.
inline void prefetch(const void* start, int64_t ahead) {
  const auto address = reinterpret_cast<uintptr_t>(start) + static_cast<uintptr_t>(ahead);
  __builtin_prefetch(reinterpret_cast<const void*>(address), 0, 2);
}

inline void prefetch_lines(const void* start, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += kLine) prefetch(start, line);
}

// How far ahead of rows of a weight memory is asked for. Past the last of them that is what the
// thread reads next, or nothing: what lies behind them is for another thread, or for none.
class Ahead {
 public:
  // `next` is null where it is not known.
  Ahead(const uint8_t* end, const uint8_t* next) : end_(address(end)), next_(address(next)) {}

  // From `start`, where so many bytes are read before it is asked again.
  int64_t of(const uint8_t* start, int64_t bytes) const {
    const int64_t ahead = bytes > kAheadBytes ? bytes : kAheadBytes;
    if (address(start) + static_cast<uintptr_t>(ahead) < end_) return ahead;
    return next_ == 0 ? 0 : ahead + static_cast<int64_t>(next_ - end_);
  }

 private:
  static uintptr_t address(const uint8_t* of) { return reinterpret_cast<uintptr_t>(of); }

  uintptr_t end_, next_;
};

}  // namespace
}  // namespace specmoe
