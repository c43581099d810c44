#include "trial.h"

#include <algorithm>
#include <cmath>

namespace specmoe {
namespace {

// See `policy/step_trial.py` and `policy/amount.py` for what these mean.
constexpr int64_t kBlockSteps = 2;
constexpr int64_t kMaxComparedSteps = 320;
constexpr double kClear = 2.0;
constexpr double kWorth = 0.01;
constexpr int64_t kFirstHoldSteps = 512;
constexpr int64_t kMaxHoldSteps = 8192;
constexpr int64_t kBetweenLooks = 32;
constexpr bool kEven[] = {false, true, true, false};
constexpr bool kLeaning[] = {true, true, true, false, false, true, true, true};
constexpr double kMadToSigma = 1.4826;
constexpr double kMedianError = 1.2533;
constexpr int64_t kTrialSteps = 16;
constexpr int64_t kOffSteps = 256;
constexpr int64_t kMaxOffSteps = 8192;

// Reorders `values`.
double median(std::vector<double>& values) {
  const size_t half = values.size() / 2;
  const auto middle = values.begin() + static_cast<int64_t>(half);
  std::nth_element(values.begin(), middle, values.end());
  if (values.size() % 2) return *middle;
  return (*std::max_element(values.begin(), middle) + *middle) / 2;
}

}  // namespace

bool StepTrial::begin() {
  if (!is_trying_ && begun_ >= hold_steps_) restart();
  way_ = is_trying_ ? begun_ < warm_ || tried_way() : guesses_;
  begun_++;
  return way_;
}

void StepTrial::end(double ms, int64_t lacked_bytes, int64_t pushed_out_bytes) {
  if (!is_trying_ || begun_ <= warm_) return;
  steps_[way_].emplace_back(lacked_bytes, ms);
  pushed_out_bytes_ += pushed_out_bytes;
  const int64_t compared = static_cast<int64_t>(steps_[0].size() + steps_[1].size());
  if (compared >= compare_at_ && !steps_[0].empty() && !steps_[1].empty()) {
    compare_at_ = compared + kBetweenLooks;
    decide(compared >= kMaxComparedSteps);
  }
}

bool StepTrial::tried_way() const {
  const int64_t block = (begun_ - warm_) / kBlockSteps;
  if (leads_ < 0) return kEven[block % 4];
  return (leads_ == 1) == kLeaning[block % 8];
}

void StepTrial::decide(bool is_last) {
  const double per_byte = slope(steps_);
  std::vector<double> without;
  for (const auto& step : steps_[0]) without.push_back(step.second);
  const double worth_ms = kWorth * median(without);
  const double pushed_out_ms =
      per_byte * static_cast<double>(pushed_out_bytes_) / static_cast<double>(steps_[1].size());
  const auto [rest, error] = rest_ms(steps_[0], per_byte);
  const auto [guessing, other_error] = rest_ms(steps_[1], per_byte);
  const double gain_ms = rest - guessing - pushed_out_ms - worth_ms;
  const bool decision = gain_ms > 0.0;
  if (!is_last && std::fabs(gain_ms) < kClear * std::hypot(error, other_error)) {
    leads_ = decision;
    return;
  }
  const bool is_same = hold_steps_ > 0 && decision == guesses_;
  hold_steps_ = is_same ? std::min(kMaxHoldSteps, 2 * hold_steps_) : kFirstHoldSteps;
  guesses_ = decision;
  is_trying_ = false;
  begun_ = 0;
}

void StepTrial::restart() {
  is_trying_ = true;
  begun_ = warm_ = pushed_out_bytes_ = 0;
  steps_ = {};
  compare_at_ = kComparedSteps;
  leads_ = -1;
}

// Milliseconds per byte: the median slope of all pairs within a group (Theil and Sen).
double StepTrial::slope(const std::array<Steps, 2>& groups) {
  std::vector<double> slopes;
  for (const Steps& group : groups)
    for (size_t i = 0; i < group.size(); i++)
      for (size_t j = i + 1; j < group.size(); j++)
        if (group[i].first != group[j].first)
          slopes.push_back((group[i].second - group[j].second) /
                           static_cast<double>(group[i].first - group[j].first));
  return slopes.empty() ? 0.0 : median(slopes);
}

// Median of what steps took beyond reading what they lacked, and its standard error.
std::pair<double, double> StepTrial::rest_ms(const Steps& steps, double slope) {
  std::vector<double> rest;
  for (const auto& [lacked, ms] : steps) rest.push_back(ms - slope * static_cast<double>(lacked));
  const double middle = median(rest);
  for (double& value : rest) value = std::fabs(value - middle);
  const double scatter = kMadToSigma * median(rest);
  return {middle, kMedianError * scatter / std::sqrt(static_cast<double>(steps.size()))};
}

bool PrefetchGate::is_tried() const { return steps_ >= kTrialSteps; }

bool PrefetchGate::admits() {
  if (off_for_ == 0) return true;
  off_for_--;
  return false;
}

void PrefetchGate::measure(int64_t useful, int64_t useless) {
  steps_++;
  const double rate = std::max(1.0 / kTrialSteps, 1.0 / static_cast<double>(steps_));
  useful_ += rate * (static_cast<double>(useful) - useful_);
  useless_ += rate * (static_cast<double>(useless) - useless_);
  if (steps_ < kTrialSteps) return;
  if (useful_ >= useless_) {
    off_next_ = kOffSteps;
    return;
  }
  off_for_ = off_next_;
  off_next_ = std::min(kMaxOffSteps, 2 * off_next_);
  steps_ = 0;
  useful_ = useless_ = 0.0;
}

bool PrefetchJudge::predicts(int64_t layer) {
  if (!layers_[layer].admits()) return false;
  std::vector<PrefetchGate>& ranks = ranks_[layer];
  if (ranks.empty()) return true;
  for (const PrefetchGate& gate : ranks)
    if (gate.is_open()) return true;
  for (PrefetchGate& gate : ranks) gate.admits();  // the step counts for them
  return false;
}

std::vector<RankedGuess> PrefetchJudge::admitted(int64_t layer,
                                                 const std::vector<int64_t>& experts,
                                                 int64_t width) {
  std::vector<PrefetchGate>& gates = ranks_[layer];
  if (static_cast<int64_t>(gates.size()) < width) gates.resize(width);
  std::vector<bool> is_open;
  for (int64_t rank = 0; rank < width; rank++) is_open.push_back(gates[rank].admits());
  // A batch has more guesses than a token has: its ranks are those of one token, stretched.
  const int64_t most = std::max<int64_t>(width, static_cast<int64_t>(experts.size()));
  std::vector<RankedGuess> guesses;
  for (size_t place = 0; place < experts.size(); place++) {
    const int64_t rank = static_cast<int64_t>(place) * width / most;
    guesses.push_back({experts[place], rank, is_open[rank]});
  }
  return guesses;
}

void PrefetchJudge::measure(int64_t layer, const std::vector<std::pair<int64_t, bool>>& brought,
                            bool by_ranks) {
  struct Count {
    int64_t rank, right, wrong;
  };
  std::vector<Count> counts;
  for (const auto& [rank, is_wanted] : brought) {
    auto found = std::find_if(counts.begin(), counts.end(),
                              [rank = rank](const Count& count) { return count.rank == rank; });
    if (found == counts.end()) found = counts.insert(counts.end(), {rank, 0, 0});
    (is_wanted ? found->right : found->wrong)++;
  }
  if (counts.empty()) return;
  int64_t certain = 0, right = 0;
  for (const Count& count : counts) {
    right += count.right;
    if (!by_ranks) {
      certain += count.wrong;
      continue;
    }
    PrefetchGate& gate = ranks_[layer][count.rank];
    // A layer does not answer for ranks on trial: those that err will be turned off alone.
    if (gate.is_tried()) certain += count.wrong;
    gate.measure(count.right, count.wrong);
  }
  layers_[layer].measure(right, certain);
}

}  // namespace specmoe
