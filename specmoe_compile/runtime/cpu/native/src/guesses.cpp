#include "guesses.h"

#include <algorithm>

#include "sums.h"

namespace specmoe {

std::vector<int64_t> worth_fetching(const StepCall& call, int64_t width, double threshold,
                                    int64_t experts) {
  struct Guess {
    int64_t expert;
    double total, heaviest;
  };
  std::vector<Guess> guesses;
  std::vector<std::pair<double, int64_t>> row;
  const int64_t taken = width < 0 ? call.top_k : std::min(width, call.top_k);
  for (int64_t t = 0; t < call.tokens; t++) {
    row.clear();
    for (int64_t p = 0; p < call.top_k; p++) {
      const int64_t i = t * call.top_k + p;
      row.emplace_back(static_cast<double>(value_at(call.weights, call.weights_dtype, i)),
                       id_at(call, i));
    }
    std::stable_sort(row.begin(), row.end(),
                     [](const auto& a, const auto& b) { return a.first > b.first; });
    for (int64_t p = 0; p < taken; p++) {
      const auto& [share, expert] = row[static_cast<size_t>(p)];
      const auto found =
          std::find_if(guesses.begin(), guesses.end(),
                       [expert = expert](const Guess& guess) { return guess.expert == expert; });
      if (found == guesses.end()) {
        guesses.push_back({expert, share, share});
      } else {
        found->total += share;
        found->heaviest = std::max(found->heaviest, share);
      }
    }
  }
  std::stable_sort(guesses.begin(), guesses.end(),
                   [](const Guess& a, const Guess& b) { return a.total > b.total; });
  std::vector<int64_t> chosen;
  for (const Guess& guess : guesses)
    if (guess.expert >= 0 && guess.expert < experts &&
        (threshold < 0.0 || guess.heaviest >= threshold))
      chosen.push_back(guess.expert);
  return chosen;
}

void count_recall(const Prediction& prediction, const std::vector<int64_t>& ids, int64_t top_k,
                  int64_t* counters) {
  for (int64_t t = 0; t < prediction.tokens; t++) {
    const auto guessed = prediction.ids.begin() + t * prediction.width;
    std::vector<int64_t> own(ids.begin() + t * top_k, ids.begin() + (t + 1) * top_k);
    std::sort(own.begin(), own.end());
    own.erase(std::unique(own.begin(), own.end()), own.end());
    counters[COUNT_NEEDED] += top_k;
    counters[COUNT_PREDICTED] += prediction.width;
    for (const int64_t expert : own)
      counters[COUNT_RECALLED] +=
          std::find(guessed, guessed + prediction.width, expert) != guessed + prediction.width;
  }
}

}  // namespace specmoe
