// Which guesses are worth a read: `policy/amount.py` and `policy/prefetch_judge.py` in C++, the same
// decisions.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace specmoe {

// Turns one kind of guess off while more of its reads are useless than useful.
class PrefetchGate {
 public:
  bool is_open() const { return off_for_ == 0; }
  // Whether it is on in this step; counts the step if not.
  bool admits();
  void measure(int64_t useful, int64_t useless);

 private:
  int64_t steps_ = 0, off_for_ = 0, off_next_ = 256;
  double useful_ = 0.0, useless_ = 0.0;
};

// A guess, its place among a token's guesses, and whether it is read.
struct RankedGuess {
  int64_t expert;
  int64_t rank;
  bool is_admitted;
};

// Gates of the ranks of every layer.
class PrefetchJudge {
 public:
  explicit PrefetchJudge(int64_t layers) : ranks_(layers) {}
  // Whether a layer is guessed in this step; asked once per step.
  bool predicts(int64_t layer);
  // `experts`: distinct, most wanted first; `width`: guesses per token.
  std::vector<RankedGuess> admitted(int64_t layer, const std::vector<int64_t>& experts,
                                    int64_t width);
  // `brought`: of each read that began its rank, and whether it was wanted.
  void measure(int64_t layer, const std::vector<std::pair<int64_t, bool>>& brought);

 private:
  std::vector<std::vector<PrefetchGate>> ranks_;
};

}  // namespace specmoe
