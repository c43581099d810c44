// Who is in which cache slot and who has to leave: `runtime/cache` in C++, the same integers.
//
// Only what a step of decode does: `ExpertCache.plan` of experts that a routing asked for, or that
// are guessed. Prefill is planned by Python, in the same memory.
//
// Shape letters: E experts, S slots, D decays.
#pragma once

#include <cstdint>
#include <vector>

namespace specmoe {

constexpr int64_t kNobody = -1;

enum CachePolicy : int32_t { POLICY_LRU = 0, POLICY_LFU = 1, POLICY_ADAPTIVE = 2 };

// Tables of one layer, in memory that Python owns.
struct CacheTables {
  int64_t experts;     // E
  int64_t slots;       // S; 0 where experts are computed in place
  int64_t* slot_of;    // [E]
  int64_t* expert_of;  // [S]
  int64_t* last_use;   // [S]
  int64_t* clock;      // [1]
  int64_t* scores;     // [D + 1, E]
  int64_t* regret;     // [D + 2]
  int32_t policy;
  int32_t spare;  // places besides the slots
};

struct Placed {
  int64_t expert;
  int64_t slot;
};

// A slot that gets an expert now: who had it before, -1 for nobody, and when it was used last.
struct Filled : Placed {
  int64_t previous;
  int64_t previous_use;
};

// What a plan decided; the tables say so already. Kept from step to step, as is its memory.
struct CachePlan {
  std::vector<Placed> hits;
  std::vector<Filled> fills;
  std::vector<int64_t> bypassed;  // the first of them have the spare places
  std::vector<int64_t> evicted;
};

class CachePlanner {
 public:
  // Finds or gives slots.
  //   wanted: distinct experts in order of preference.
  //   pinned: slots that must keep their experts.
  //   is_guess: hits are not counted as uses.
  const CachePlan& plan(const CacheTables& cache, const std::vector<int64_t>& wanted,
                        const std::vector<int64_t>& pinned = {}, bool is_guess = false);

 private:
  void note(const CacheTables& cache, const std::vector<int64_t>& wanted, int64_t now);
  void judge(const CacheTables& cache, const std::vector<int64_t>& wanted);
  int64_t lacked(const CacheTables& cache, const std::vector<int64_t>& wanted);
  void order_fillable(const CacheTables& cache);

  struct Place {
    bool is_held;
    int64_t worth;
    int64_t slot;
  };
  bool is_bypassed(const CacheTables& cache, int64_t expert, const Place& place) const;
  CachePlan plan_;
  std::vector<int64_t> missing_, keys_, low_, wanted_keys_;
  std::vector<uint8_t> taken_;
  std::vector<Place> places_;
};

// Frees an expert's slot, after a read that failed.
void forget(const CacheTables& cache, int64_t expert);
// Undoes the fill of a guess that nothing was read for: whoever has its slot again, or -1.
int64_t take_back(const CacheTables& cache, const Filled& fill);

}  // namespace specmoe
