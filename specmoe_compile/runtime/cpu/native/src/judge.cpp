#include "judge.h"

#include <algorithm>

namespace specmoe {
namespace {

// See `policy/amount.py` for what these mean.
constexpr int64_t kTrialSteps = 16;
constexpr int64_t kOffSteps = 256;
constexpr int64_t kMaxOffSteps = 8192;

}  // namespace

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

void PrefetchJudge::measure(int64_t layer, const std::vector<std::pair<int64_t, bool>>& brought) {
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
    PrefetchGate& gate = ranks_[layer][count.rank];
    // A layer does not answer for ranks on trial: those that err will be turned off alone.
    if (gate.is_tried()) certain += count.wrong;
    right += count.right;
    gate.measure(count.right, count.wrong);
  }
  layers_[layer].measure(right, certain);
}

}  // namespace specmoe
