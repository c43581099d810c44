#include "alone.h"

#include <algorithm>

namespace specmoe {
namespace {

// Long enough for the system to take a thread off its core a few times.
constexpr double kWindowNs = 16e6;
// Share of the chunks by share of the time: from here on one thread may be faster. It is 0.5 with
// two threads on two free cores.
constexpr double kCrowded = 0.8;
// Windows: crowded ones before a trial, since a single one is soon over; of a trial before it is
// judged; and from one trial to the next, twice as many each time.
constexpr int64_t kConfirming = 2;
constexpr int64_t kJudged = 4;
constexpr int64_t kFirstStay = 16, kMaxStay = 128;
// Cores that did nothing, on average over a stay alone, for another thread to be worth a look.
constexpr double kFreeCores = 0.2;

}  // namespace

void RunTimes::add(const RunTimes& other) {
  wall_ns += other.wall_ns;
  core_ns += other.core_ns;
  bytes += other.bytes;
  chunks += other.chunks;
  own += other.own;
}

void AloneTrial::end(const RunTimes& run, int64_t tokens) {
  if (tokens != tokens_) begin_anew();
  tokens_ = tokens;
  window_.add(run);
  if (window_.wall_ns < kWindowNs) return;
  windows_++;
  end_window();
  window_ = {};
}

void AloneTrial::end_window() {
  if (is_alone_) return end_alone_window();
  const bool is_crowded =
      window_.own * window_.wall_ns > kCrowded * window_.chunks * window_.core_ns;
  if (is_crowded) return end_crowded_window(window_.wall_ns / window_.bytes);
  begin_anew();
}

void AloneTrial::begin_anew() {
  AloneTrial fresh;
  fresh.ask(idle_clock_);
  fresh.tokens_ = tokens_;
  *this = fresh;
}

void AloneTrial::end_crowded_window(double cost) {
  shared_cost_ = shared_cost_ == 0.0 ? cost : (3.0 * shared_cost_ + cost) / 4.0;
  if (next_stay_ == 0) {
    next_stay_ = kFirstStay;
    until_ = kConfirming;
  }
  if (windows_ < until_) return;
  newly_idle_ns();  // counts from here on
  stay(true, next_stay_);
  next_stay_ = std::min(2 * next_stay_, kMaxStay);
}

void AloneTrial::end_alone_window() {
  alone_.add(window_);
  const bool is_slower = alone_.wall_ns > shared_cost_ * alone_.bytes;
  if (windows_ >= kJudged && is_slower) return stay(false, next_stay_);
  if (windows_ < until_) return;
  const double idle = newly_idle_ns();
  if (idle < 0.0 || idle >= kFreeCores * alone_.wall_ns)
    stay(false, 1);  // one look whether cores are free again
  else
    stay(true, until_);
}

double AloneTrial::newly_idle_ns() {
  if (idle_clock_ == nullptr) return -1.0;
  const double before = idle_ns_;
  idle_ns_ = idle_clock_();
  return before < 0.0 || idle_ns_ < 0.0 ? -1.0 : idle_ns_ - before;
}

void AloneTrial::stay(bool is_alone, int64_t windows) {
  is_alone_ = is_alone;
  windows_ = 0;
  until_ = windows;
  alone_ = {};
}

}  // namespace specmoe
