// Predictions of a layer's routing, and which of their experts are worth fetching.
//
// Shape letters: T tokens, P guesses per token.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "slots.h"
#include "step_call.h"

namespace specmoe {

// What `start` was told about a layer.
struct Prediction {
  int64_t number = 0;  // 0: there is none
  int64_t tokens = 0, width = 0;
  std::vector<int64_t> ids;  // [T, P]
  Issued issued;
  std::vector<std::pair<int64_t, int64_t>> ranks;  // of guessed experts; empty if nobody judges
};

// Distinct guesses, most wanted (by weight over all tokens) first: `MissPolicy.worth_fetching`.
//   width: guesses of a token that count, -1 for all.
//   threshold: a guess that is lighter for every token would not be fetched; negative: none.
//   experts: E; ids outside are none.
std::vector<int64_t> worth_fetching(const StepCall& call, int64_t width, double threshold,
                                    int64_t experts);

// Adds needed, predicted and recalled guesses to a layer's counters.
//   ids: [T, K], the router's.
void count_recall(const Prediction& prediction, const std::vector<int64_t>& ids, int64_t top_k,
                  int64_t* counters);

}  // namespace specmoe
