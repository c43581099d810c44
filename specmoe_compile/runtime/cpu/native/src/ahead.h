// Asking for memory before it is read.
#pragma once

#include <cstdint>

namespace specmoe {
namespace {

constexpr int64_t kLine = 64;
// What the processor is told to bring ahead of one row, into its second cache; of rows that are read
// at once the next ones.
constexpr int64_t kAheadBytes = 8192;

// May be any address: what is not there is not brought.
inline void prefetch(const void* start, int64_t ahead) {
  const auto address = reinterpret_cast<uintptr_t>(start) + static_cast<uintptr_t>(ahead);
  __builtin_prefetch(reinterpret_cast<const void*>(address), 0, 2);
}

inline void prefetch_lines(const void* start, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += kLine) prefetch(start, line);
}

}  // namespace
}  // namespace specmoe
