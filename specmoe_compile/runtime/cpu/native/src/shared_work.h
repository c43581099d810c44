// Work that reads memory of the caller's: shared by the pool, or done by the caller alone.
#pragma once

#include <cstdint>

#include "pool.h"

namespace specmoe {

// Bytes that one core reads in the time that waking another takes, and more.
constexpr int64_t kAloneBytes = 512 << 10;

class SharedWork : public Work {
 public:
  // Runs all chunks; returns when no thread looks at the caller's memory any more.
  void run(Pool& pool, bool alone) {
    if (bytes_ <= kAloneBytes) {
      for (int64_t chunk = 0; chunk < chunks(); chunk++) {
        compute(chunk, scratch_);
        publish(chunk, scratch_);
      }
      return;
    }
    pool.run(offer_, *this, chunks(), alone);
    while (!offer_.is_free()) std::this_thread::yield();
  }

  void needs(int64_t, int64_t* first, int64_t* second) const override { *first = *second = 0; }

 protected:
  virtual int64_t chunks() const = 0;

  int64_t bytes_ = 0;  // that all chunks read

 private:
  Offer offer_;
  Scratch scratch_;
};

}  // namespace specmoe
