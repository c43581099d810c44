#include "cache.h"

#include <algorithm>
#include <tuple>

namespace specmoe {
namespace {

// See `runtime/cache/eviction.py` for what these mean.
constexpr int64_t kDecays[] = {5, 7, 9};
constexpr int64_t kRecency = 3;
constexpr int64_t kCandidates = 4;
constexpr int64_t kLfu = 1;
constexpr int64_t kUnit = int64_t{1} << 14;
constexpr int64_t kJudgedBits = 6;
constexpr int64_t kWindow = 6;
constexpr int64_t kMiss = int64_t{1} << 16;
constexpr int64_t kStay = 7;
constexpr int64_t kSeenBits = 29;
constexpr int64_t kIndexBits = 9;

// The part of a key that all candidates share: the step of the last use, and the expert's number.
int64_t low_key(int64_t seen, int64_t expert) {
  return ((seen & ((int64_t{1} << kSeenBits) - 1)) << kIndexBits) | expert;
}

// What an expert is worth to a candidate; all of a layer's are different.
int64_t key_of(const CacheTables& cache, int64_t candidate, int64_t expert) {
  const int64_t key = low_key(cache.scores[kRecency * cache.experts + expert], expert);
  if (candidate == kRecency) return key;
  return key | (cache.scores[candidate * cache.experts + expert] << (kSeenBits + kIndexBits));
}

// The candidate that decides.
int64_t followed(const CacheTables& cache) {
  return cache.policy == POLICY_ADAPTIVE ? cache.regret[kCandidates] : kLfu;
}

}  // namespace

// How many of the wanted experts a candidate would not have among its S best: those before which
// fewer than E - S come. In order of their keys, so that a few counts find the first that it has.
int64_t CachePlanner::lacked(const CacheTables& cache, const std::vector<int64_t>& wanted) {
  const int64_t others = cache.experts - cache.slots;
  wanted_keys_.clear();
  for (const int64_t expert : wanted) wanted_keys_.push_back(keys_[static_cast<size_t>(expert)]);
  std::sort(wanted_keys_.begin(), wanted_keys_.end());
  const auto is_lacked = [&](int64_t key) {
    uint64_t before = 0;
    for (const int64_t other : keys_) before += static_cast<uint64_t>(other - key) >> 63;
    return static_cast<int64_t>(before) < others;
  };
  return std::partition_point(wanted_keys_.begin(), wanted_keys_.end(), is_lacked) -
         wanted_keys_.begin();
}

void CachePlanner::judge(const CacheTables& cache, const std::vector<int64_t>& wanted) {
  int64_t* misses = cache.regret;
  const size_t experts = static_cast<size_t>(cache.experts);
  keys_.resize(experts);
  low_.resize(experts);
  for (int64_t candidate = kRecency; candidate >= 0; candidate--) {
    int64_t count = 0;
    if (cache.slots < cache.experts) {
      const int64_t* row = cache.scores + candidate * cache.experts;
      if (candidate == kRecency)
        for (size_t e = 0; e < experts; e++)
          keys_[e] = low_[e] = low_key(row[e], static_cast<int64_t>(e));
      else
        for (size_t e = 0; e < experts; e++)
          keys_[e] = low_[e] | (row[e] << (kSeenBits + kIndexBits));
      count = lacked(cache, wanted);
    }
    misses[candidate] += count * kMiss - (misses[candidate] >> kWindow);
  }
  const int64_t best = std::min_element(misses, misses + kCandidates) - misses;
  int64_t& candidate = cache.regret[kCandidates];
  if (misses[best] + (misses[best] >> kStay) < misses[candidate]) candidate = best;
}

void CachePlanner::note(const CacheTables& cache, const std::vector<int64_t>& wanted,
                        int64_t now) {
  if (cache.policy == POLICY_ADAPTIVE && (now & kJudgedBits) == 0) judge(cache, wanted);
  const auto forget_some = [&](int64_t candidate, auto decay) {
    int64_t* row = cache.scores + candidate * cache.experts;
    for (int64_t e = 0; e < cache.experts; e++)
      row[e] -= static_cast<int64_t>(static_cast<uint64_t>(row[e]) >> decay());  // never negative
    for (const int64_t expert : wanted) row[expert] += kUnit;
  };
  forget_some(0, [] { return kDecays[0]; });
  forget_some(1, [] { return kDecays[1]; });
  forget_some(2, [] { return kDecays[2]; });
  for (const int64_t expert : wanted) cache.scores[kRecency * cache.experts + expert] = now;
}

// Slots that may be filled, those to be given up first in front.
void CachePlanner::order_fillable(const CacheTables& cache) {
  const int64_t candidate = followed(cache);
  places_.clear();
  for (int64_t slot = 0; slot < cache.slots; slot++) {
    const int64_t held = cache.expert_of[slot];
    if (taken_[static_cast<size_t>(slot)] || held >= cache.experts) continue;
    int64_t worth = cache.last_use[slot];
    if (cache.policy != POLICY_LRU) worth = held == kNobody ? 0 : key_of(cache, candidate, held);
    places_.push_back({held != kNobody, worth, slot});
  }
  std::sort(places_.begin(), places_.end(), [](const Place& a, const Place& b) {
    return std::tie(a.is_held, a.worth, a.slot) < std::tie(b.is_held, b.worth, b.slot);
  });
}

// Whether a missing expert is worth less than what would leave for it, and has a spare place.
bool CachePlanner::is_bypassed(const CacheTables& cache, int64_t expert,
                               const Place& place) const {
  return cache.policy == POLICY_ADAPTIVE && place.is_held &&
         static_cast<int64_t>(plan_.bypassed.size()) < cache.spare &&
         key_of(cache, followed(cache), expert) < place.worth;
}

const CachePlan& CachePlanner::plan(const CacheTables& cache, const std::vector<int64_t>& wanted,
                                    const std::vector<int64_t>& pinned, bool is_guess) {
  plan_.hits.clear();
  plan_.fills.clear();
  plan_.bypassed.clear();
  plan_.evicted.clear();
  missing_.clear();
  taken_.assign(static_cast<size_t>(cache.slots), 0);
  for (const int64_t slot : pinned) taken_[static_cast<size_t>(slot)] = 1;
  const int64_t now = ++*cache.clock;
  if (cache.policy != POLICY_LRU && !is_guess) note(cache, wanted, now);
  for (const int64_t expert : wanted) {
    const int64_t slot = cache.slot_of[expert];
    if (slot == kNobody) {
      missing_.push_back(expert);
      continue;
    }
    plan_.hits.push_back({expert, slot});
    taken_[static_cast<size_t>(slot)] = 1;
    if (!is_guess) cache.last_use[slot] = now;
  }
  if (missing_.empty()) return plan_;
  order_fillable(cache);
  size_t next = 0;
  for (const int64_t expert : missing_) {
    if (next == places_.size() || (!is_guess && is_bypassed(cache, expert, places_[next]))) {
      plan_.bypassed.push_back(expert);
      continue;
    }
    const int64_t slot = places_[next++].slot, previous = cache.expert_of[slot];
    plan_.fills.push_back({{expert, slot}, previous, cache.last_use[slot]});
    if (previous != kNobody) {
      cache.slot_of[previous] = kNobody;
      plan_.evicted.push_back(previous);
    }
    cache.expert_of[slot] = expert;
    cache.slot_of[expert] = slot;
    cache.last_use[slot] = now;
  }
  return plan_;
}

void forget(const CacheTables& cache, int64_t expert) {
  const int64_t slot = cache.slot_of[expert];
  if (slot == kNobody) return;
  cache.slot_of[expert] = kNobody;
  cache.expert_of[slot] = kNobody;
  cache.last_use[slot] = 0;
}

int64_t take_back(const CacheTables& cache, const Filled& fill) {
  forget(cache, fill.expert);
  if (fill.previous == kNobody || cache.slot_of[fill.previous] != kNobody) return kNobody;
  cache.slot_of[fill.previous] = fill.slot;
  cache.expert_of[fill.slot] = fill.previous;
  cache.last_use[fill.slot] = fill.previous_use;
  return fill.previous;
}

}  // namespace specmoe
