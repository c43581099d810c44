// Places besides the slots, for experts that get none: `runtime/cache/spare_places.py` in C++.
//
// Shape letters: P places.
#pragma once

#include <cstdint>

#include "cache.h"

namespace specmoe {

// Memory and tables that Python owns.
struct SparePlaces {
  int64_t places;        // P
  int64_t stride_bytes;  // from one place to the next
  uint8_t* memory;
  int64_t* layer_of;   // [P]
  int64_t* expert_of;  // [P]
  int64_t* last_use;   // [P]
  int64_t* is_busy;    // [P]
  int64_t* clock;      // [1]

  uint8_t* record(int64_t place) const { return memory + place * stride_bytes; }

  // The place of a record that may be computed from, or -1.
  int64_t find(int64_t layer, int64_t expert) const {
    for (int64_t place = 0; place < places; place++)
      if (!is_busy[place] && layer_of[place] == layer && expert_of[place] == expert) return place;
    return kNobody;
  }

  // Counts a use of a place, and keeps it until `release`.
  void use(int64_t place) const {
    last_use[place] = ++*clock;
    is_busy[place] = 1;
  }

  // Gives the free place that was used longest ago to a record; -1 if none is free.
  int64_t take(int64_t layer, int64_t expert) const {
    int64_t oldest = kNobody;
    for (int64_t place = 0; place < places; place++)
      if (!is_busy[place] && (oldest == kNobody || last_use[place] < last_use[oldest]))
        oldest = place;
    if (oldest == kNobody) return kNobody;
    layer_of[oldest] = layer;
    expert_of[oldest] = expert;
    use(oldest);
    return oldest;
  }

  void release(int64_t place) const { is_busy[place] = 0; }
  void forget(int64_t place) const { layer_of[place] = expert_of[place] = kNobody; }
};

}  // namespace specmoe
