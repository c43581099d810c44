// Whether a caller computes faster alone than with the other threads.
//
// Beside processes that keep every core busy, each thread more takes a part of what the others get,
// and the caller waits for all of them: one thread alone can be faster. Nobody tells, so this tries
// it, but only where something was seen: that the caller computed a larger share of the chunks than
// the share of the time that it had a core. Where cores are free the first is 1 / threads and the
// second 1, and nothing is ever tried. The other way back is tried where cores did nothing for a
// while, and not while all of them are in use: trying it costs.
#pragma once

#include <cstdint>

#include "idle.h"

namespace specmoe {

// What some runs took, by what the caller saw.
struct RunTimes {
  double wall_ns = 0.0;
  double core_ns = 0.0;  // in which the caller had a core
  double bytes = 0.0;    // that all threads read
  double chunks = 0.0;
  double own = 0.0;  // of them the caller's

  void add(const RunTimes& other);
};

class AloneTrial {
 public:
  // Whom to ask how long cores did nothing; null for nobody, and they may be free then.
  using IdleClock = double (*)();
  void ask(IdleClock idle_clock) { idle_clock_ = idle_clock; }

  // Whether the caller is to do the next run alone.
  bool is_alone() const { return is_alone_; }
  // Takes in a run that went as `is_alone` said. With another number of tokens it begins anew.
  void end(const RunTimes& run, int64_t tokens);
  void begin_anew();

 private:
  void end_window();
  void end_crowded_window(double cost);
  void end_alone_window();
  void stay(bool is_alone, int64_t windows);
  // How long cores did nothing since this was last asked; negative where nobody says.
  double newly_idle_ns();

  IdleClock idle_clock_ = &idle_ns;
  bool is_alone_ = false;
  int64_t tokens_ = 0;
  RunTimes window_;
  RunTimes alone_;             // since the last change
  double shared_cost_ = 0.0;  // nanoseconds per byte with all threads, recently; 0: not known
  int64_t windows_ = 0;       // since the last change
  int64_t until_ = 0;         // so many there are before the other way has its turn
  int64_t next_stay_ = 0;     // windows; 0: nothing was seen
  double idle_ns_ = 0.0;      // of the clock when it was last read
};

}  // namespace specmoe
