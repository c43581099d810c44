// Whether guessing makes steps faster, and which guesses are worth a read: `policy/step_trial.py`,
// `policy/amount.py` and `policy/prefetch_judge.py` in C++, the same decisions.
#pragma once

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

namespace specmoe {

// Steps with guesses against steps without, in turn.
class StepTrial {
 public:
  // Whether the step that begins may guess.
  bool begin();
  // Takes in the step that began last: its time, what it lacked, and what of that useless guesses
  // had pushed out.
  void end(double ms, int64_t lacked_bytes, int64_t pushed_out_bytes);
  bool is_trying() const { return is_trying_; }
  bool guesses() const { return guesses_; }

 private:
  using Steps = std::vector<std::pair<int64_t, double>>;  // bytes lacked, ms
  bool tried_way() const;
  void decide(bool is_last);
  void restart();
  static double slope(const std::array<Steps, 2>& groups);
  static std::pair<double, double> rest_ms(const Steps& steps, double slope);

  static constexpr int64_t kWarmSteps = 32;
  static constexpr int64_t kComparedSteps = 64;
  bool guesses_ = true, is_trying_ = true;
  int64_t hold_steps_ = 0, begun_ = 0, warm_ = kWarmSteps;
  std::array<Steps, 2> steps_;  // without, with
  int64_t pushed_out_bytes_ = 0, compare_at_ = kComparedSteps;
  int leads_ = -1;  // which way looked better: 0 without, 1 with; -1 before the first look
  bool way_ = true;
};

// Turns one kind of guess off while more of its reads are useless than useful.
class PrefetchGate {
 public:
  bool is_open() const { return off_for_ == 0; }
  bool is_tried() const;
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

// What decides; a session has all of them, or none (`auto_off`).
enum JudgedBy : int64_t { BY_LAYERS = 1, BY_RANKS = 2, BY_TRIAL = 4 };

// Gates of every layer.
class PrefetchJudge {
 public:
  explicit PrefetchJudge(int64_t layers) : layers_(layers), ranks_(layers) {}
  // Whether a layer is guessed in this step; asked once per step.
  bool predicts(int64_t layer);
  // `experts`: distinct, most wanted first; `width`: guesses per token.
  std::vector<RankedGuess> admitted(int64_t layer, const std::vector<int64_t>& experts,
                                    int64_t width);
  // `brought`: of each read that began its rank, and whether it was wanted; ranks in the order of
  // their first read. Without `by_ranks` a layer answers for all of them.
  void measure(int64_t layer, const std::vector<std::pair<int64_t, bool>>& brought,
               bool by_ranks = true);

 private:
  std::vector<PrefetchGate> layers_;
  std::vector<std::vector<PrefetchGate>> ranks_;
};

}  // namespace specmoe
