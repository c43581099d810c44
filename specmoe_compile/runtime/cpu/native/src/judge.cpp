#include "judge.h"

#include <algorithm>
#include <map>

namespace specmoe {
namespace {

// See `policy/amount.py` for what these mean.
constexpr int64_t kTrialSteps = 16;
constexpr int64_t kOffSteps = 256;
constexpr int64_t kMaxOffSteps = 8192;

}  // namespace

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

void PrefetchJudge::measure(int64_t layer, const std::vector<std::pair<int64_t, bool>>& brought) {
  struct Count {
    int64_t right = 0, wrong = 0;
  };
  std::map<int64_t, Count> counts;
  for (const auto& [rank, is_wanted] : brought)
    (is_wanted ? counts[rank].right : counts[rank].wrong)++;
  for (const auto& [rank, count] : counts) ranks_[layer][rank].measure(count.right, count.wrong);
}

}  // namespace specmoe
