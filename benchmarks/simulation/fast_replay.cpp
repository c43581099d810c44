// Whole streams of steps through the runtime's cache policy, and through Belady's algorithm.
//
// Shape letters: E experts, S slots, N steps. Step n asks for experts[ends[n - 1] .. ends[n]).
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "cache.h"

using specmoe::CachePlanner;
using specmoe::CacheTables;

extern "C" {

// `tables`: changed in place. `hits`: [N], of each step.
void replay_policy(const CacheTables* tables, const int64_t* asked, const int64_t* ends,
                   int64_t steps, int64_t* hits) {
  CachePlanner planner;
  const int64_t* first = asked;
  for (int64_t n = 0; n < steps; n++) {
    const std::vector<int64_t> wanted(first, asked + ends[n]);
    first = asked + ends[n];
    hits[n] = static_cast<int64_t>(planner.plan(*tables, wanted).hits.size());
  }
}

// `belady_hits` of the package, in total.
int64_t replay_belady(int64_t experts, int64_t slots, int32_t may_bypass, const int64_t* asked,
                      const int64_t* ends, int64_t steps) {
  const auto e = static_cast<size_t>(experts);
  const int64_t total = steps > 0 ? ends[steps - 1] : 0;
  std::vector<int64_t> next_of(static_cast<size_t>(total)), next(e, steps);
  for (int64_t n = steps - 1, i = total - 1; n >= 0; n--)
    for (const int64_t begin = n > 0 ? ends[n - 1] : 0; i >= begin; i--) {
      next_of[static_cast<size_t>(i)] = next[static_cast<size_t>(asked[i])];
      next[static_cast<size_t>(asked[i])] = n;
    }
  std::vector<uint8_t> held(e), wanted(e);
  int64_t count = 0, hits = 0;
  const auto leaves = [&](bool spares_wanted) {
    int64_t found = -1;
    for (size_t x = 0; x < e; x++)
      if (held[x] && !(spares_wanted && wanted[x]) &&
          (found < 0 || next[x] >= next[static_cast<size_t>(found)]))
        found = static_cast<int64_t>(x);
    return found;
  };
  for (int64_t n = 0, begin = 0; n < steps; begin = ends[n++]) {
    for (int64_t i = begin; i < ends[n]; i++) {
      const auto x = static_cast<size_t>(asked[i]);
      hits += held[x];
      wanted[x] = 1;
      next[x] = next_of[static_cast<size_t>(i)];
    }
    for (int64_t i = begin; i < ends[n]; i++) {
      const auto x = static_cast<size_t>(asked[i]);
      if (held[x]) continue;
      if (!may_bypass && count >= slots) {
        const int64_t out = leaves(true);
        if (out < 0) continue;
        held[static_cast<size_t>(out)] = 0;
        count--;
      }
      held[x] = 1;
      count++;
    }
    for (; may_bypass && count > slots; count--) held[static_cast<size_t>(leaves(false))] = 0;
    for (int64_t i = begin; i < ends[n]; i++) wanted[static_cast<size_t>(asked[i])] = 0;
  }
  return hits;
}

}  // extern "C"
