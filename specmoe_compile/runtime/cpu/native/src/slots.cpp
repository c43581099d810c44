#include "slots.h"

#include <algorithm>

namespace specmoe {
namespace {

constexpr size_t kStallsKept = 32;

bool holds(const std::vector<int64_t>& experts, int64_t expert) {
  return std::find(experts.begin(), experts.end(), expert) != experts.end();
}

double seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

}  // namespace

bool Slots::takes(int64_t number, const std::vector<int64_t>& wanted) const {
  const StepLayer& layer = layers_[number];
  const CacheTables& cache = layer.cache;
  if (cache.slots == 0) return true;
  int64_t missing = 0, usable = 0;
  for (const int64_t expert : wanted) {
    if (cache.slot_of[expert] != kNobody) continue;
    missing++;
    if (file_ < 0 || (layer.verified != nullptr && !layer.verified[expert])) return false;
  }
  if (missing == 0) return true;
  for (int64_t slot = 0; slot < cache.slots; slot++) usable += cache.expert_of[slot] < cache.experts;
  return usable >= static_cast<int64_t>(wanted.size());
}

std::vector<int64_t> Slots::pinned(int64_t number) const {
  std::vector<int64_t> slots;
  for (const ReadPointer& read : in_flight_[number]) slots.push_back(read->fill.slot);
  return slots;
}

// Slots that a plan may fill, less those that it needs.
int64_t Slots::spare_slots(int64_t number, const std::vector<int64_t>& wanted) const {
  const CacheTables& cache = layers_[number].cache;
  const std::vector<int64_t> kept = pinned(number);
  int64_t spare = 0;
  for (int64_t slot = 0; slot < cache.slots; slot++)
    spare += cache.expert_of[slot] < cache.experts && !holds(kept, slot) &&
             !holds(wanted, cache.expert_of[slot]);
  for (const int64_t expert : wanted) spare -= cache.slot_of[expert] == kNobody;
  return spare;
}

// Whether a step that wants the expert now reads nothing for it.
bool Slots::has(int64_t number, int64_t expert) const {
  return layers_[number].cache.slot_of[expert] != kNobody ||
         spare_.find(number, expert) != kNobody;
}

ReadPointer Slots::read_of(int64_t number, const Filled& fill, bool is_guess,
                           int64_t place) const {
  const StepLayer& layer = layers_[number];
  auto read = std::make_shared<RecordRead>();
  read->fill = fill;
  read->target = place == kNobody ? layer.memory + fill.slot * layer.record_bytes
                                  : spare_.record(place);
  read->offset = layer.file_offset + fill.expert * layer.record_bytes;
  read->bytes = layer.record_bytes;
  read->was_guess = is_guess;
  read->place = place;
  return read;
}

void Slots::start(int64_t number, bool is_guess, const std::vector<ReadPointer>& reads) {
  const StepLayer& layer = layers_[number];
  if (!readers_) readers_ = std::make_unique<Readers>(file_, threads_);
  readers_->start(reads);
  for (const ReadPointer& read : reads)
    (read->place == kNobody ? in_flight_[number] : bypassing_).push_back(read);
  const int64_t count = static_cast<int64_t>(reads.size());
  layer.counters[is_guess ? COUNT_SPECULATIVE_BYTES : COUNT_DEMAND_BYTES] +=
      count * layer.record_bytes;
  layer.counters[is_guess ? COUNT_PREFETCHES : COUNT_MISSES] += count;
}

void Slots::begin(int64_t number, const std::vector<int64_t>& wanted, StepReads& step) {
  const StepLayer& layer = layers_[number];
  std::vector<ReadPointer>& in_flight = in_flight_[number];
  step.ready.clear();
  step.waiting.clear();
  layer.counters[COUNT_STEPS]++;
  if (layer.cache.slots == 0) {
    for (const int64_t expert : wanted)
      step.ready.push_back({expert, layer.memory + expert * layer.record_bytes});
    layer.counters[COUNT_HITS] += static_cast<int64_t>(wanted.size());
    return;
  }
  if (!in_flight.empty()) settle(number, wanted);
  while (!in_flight.empty() && spare_slots(number, wanted) < 0) {
    readers_->wait_any(in_flight);  // useless guesses, too many to go round them
    settle(number, wanted);
  }
  const CachePlan& plan = planner_.plan(layer.cache, wanted, pinned(number));
  count_use(number, plan);
  for (const Placed& hit : plan.hits) {
    const auto found =
        std::find_if(in_flight.begin(), in_flight.end(),
                     [&](const ReadPointer& read) { return read->fill.slot == hit.slot; });
    if (found == in_flight.end()) {
      step.ready.push_back({hit.expert, layer.memory + hit.slot * layer.record_bytes});
      continue;
    }
    step.waiting.push_back(*found);
    layer.counters[COUNT_LATE] += (*found)->was_guess;
  }
  layer.counters[COUNT_HITS] += static_cast<int64_t>(plan.hits.size());
  if (plan.fills.empty() && plan.bypassed.empty()) return;
  std::vector<ReadPointer> reads;
  for (const Filled& fill : plan.fills) reads.push_back(read_of(number, fill, false));
  begin_bypassed(number, plan.bypassed, step, reads);
  if (reads.empty()) return;
  count_pushed_out(number, reads);
  start(number, false, reads);
  step.waiting.insert(step.waiting.end(), reads.begin(), reads.end());
}

// Makes those ready that a spare place holds from an earlier step; the others are to be read.
void Slots::begin_bypassed(int64_t number, const std::vector<int64_t>& experts, StepReads& step,
                           std::vector<ReadPointer>& reads) {
  if (experts.empty()) return;
  free_spare();
  std::vector<int64_t> used, missing;
  for (const int64_t expert : experts) {
    const int64_t place = spare_.find(number, expert);
    if (place == kNobody) {
      missing.push_back(expert);
      continue;
    }
    spare_.use(place);
    used.push_back(place);
    step.ready.push_back({expert, spare_.record(place)});
  }
  layers_[number].counters[COUNT_HITS] += static_cast<int64_t>(used.size());
  for (const int64_t expert : missing)
    reads.push_back(read_of(number, {{expert, kNobody}, kNobody, 0}, false,
                            spare_.take(number, expert)));
  // No step takes one before this one has computed from it, or is abandoned.
  for (const int64_t place : used) spare_.release(place);
}

ReadPointer Slots::next_or_null(int64_t number, StepReads& step, bool block) {
  if (step.waiting.empty()) return nullptr;
  ReadPointer read = readers_->final_or_null(step.waiting);
  if (!read && !block) return nullptr;
  const StepLayer& layer = layers_[number];
  if (!read) {
    const auto began = Clock::now();
    read = readers_->wait_any(step.waiting);
    const auto ended = Clock::now();
    layer.counters[COUNT_STALL_NS] +=
        std::chrono::duration_cast<std::chrono::nanoseconds>(ended - began).count();
    stalls_.emplace_back(began, ended);
    if (stalls_.size() > kStallsKept) stalls_.pop_front();
  }
  for (std::vector<ReadPointer>* reads : {&step.waiting, &in_flight_[number], &bypassing_})
    reads->erase(std::remove(reads->begin(), reads->end(), read), reads->end());
  if (read->place != kNobody) end_bypassing(*read);
  if (read->state == ReadState::done)
    count_stalled(number, *read);
  else
    forget(layer.cache, read->fill.expert);
  return read;
}

// Frees the place of a read that is final.
void Slots::end_bypassing(const RecordRead& read) {
  if (read.state != ReadState::done) spare_.forget(read.place);
  spare_.release(read.place);
}

// Waits until nothing that a step left behind is read into spare places.
void Slots::free_spare() {
  while (!bypassing_.empty()) {
    for (const ReadPointer& read : bypassing_) readers_->cancel(*read);
    const ReadPointer read = readers_->wait_any(bypassing_);
    end_bypassing(*read);
    bypassing_.erase(std::remove(bypassing_.begin(), bypassing_.end(), read), bypassing_.end());
  }
}

void Slots::settle(int64_t number, const std::vector<int64_t>& wanted) {
  std::vector<ReadPointer>& in_flight = in_flight_[number];
  std::vector<ReadPointer> kept;
  for (const ReadPointer& read : in_flight) {
    if (holds(wanted, read->fill.expert))
      readers_->promote(*read);
    else
      readers_->cancel(*read);
    const ReadState state = readers_->state(*read);
    if (state == ReadState::queued || state == ReadState::running)
      kept.push_back(read);
    else if (state != ReadState::done)
      drop(number, *read);
  }
  in_flight = std::move(kept);
}

// Forgets an expert whose read brought nothing, and takes its bytes off the books.
void Slots::drop(int64_t number, const RecordRead& read) {
  const StepLayer& layer = layers_[number];
  const int64_t expert = read.fill.expert;
  if (layer.cache.slot_of[expert] == read.fill.slot) {
    // A read that never began left the slot as it was.
    if (read.state == ReadState::cancelled && read.was_guess) {
      const int64_t previous = take_back(layer.cache, read.fill);
      if (previous != kNobody) layer.pushed_out[previous] = 0;
    } else {
      forget(layer.cache, expert);
    }
  }
  if (read.was_guess) {
    layer.unused[expert] = 0;
    layer.counters[COUNT_SPECULATIVE_BYTES] -= layer.record_bytes;
    layer.counters[COUNT_CANCELLED] += read.state == ReadState::cancelled;
  } else {
    layer.counters[COUNT_DEMAND_BYTES] -= layer.record_bytes;
  }
}

Issued Slots::prefetch(int64_t number, const std::vector<int64_t>& experts,
                       const std::vector<int64_t>& predicted, int64_t budget) {
  const StepLayer& layer = layers_[number];
  const CacheTables& cache = layer.cache;
  if (cache.slots == 0 || file_ < 0) return {};
  if (!in_flight_[number].empty()) settle(number, predicted);
  std::vector<int64_t> missing;
  for (const int64_t expert : experts) {
    if (budget >= 0 && static_cast<int64_t>(missing.size() + 1) * layer.record_bytes > budget)
      break;
    const bool is_known = layer.verified == nullptr || layer.verified[expert];
    if (!has(number, expert) && is_known) missing.push_back(expert);
  }
  if (missing.empty()) return {};
  // The predicted experts that are there must not make room for those that are not.
  std::vector<int64_t> kept = pinned(number);
  for (const int64_t expert : predicted)
    if (cache.slot_of[expert] != kNobody) kept.push_back(cache.slot_of[expert]);
  const CachePlan& plan = planner_.plan(cache, missing, kept, true);
  count_use(number, plan);
  Issued issued{{}, plan.evicted};
  if (plan.fills.empty()) return issued;
  for (const Filled& fill : plan.fills) {
    layer.unused[fill.expert] = 1;
    issued.reads.push_back(read_of(number, fill, true));
  }
  count_pushed_out(number, issued.reads);
  start(number, true, issued.reads);
  return issued;
}

bool Slots::has_begun(const RecordRead& read) {
  const ReadState state = readers_->state(read);
  return state == ReadState::running || state == ReadState::done;
}

void Slots::quiesce() {
  free_spare();
  for (size_t number = 0; number < in_flight_.size(); number++) {
    while (!in_flight_[number].empty()) {
      settle(static_cast<int64_t>(number), {});
      if (!in_flight_[number].empty()) readers_->wait_any(in_flight_[number]);
    }
  }
}

void Slots::forget_reads() {
  for (size_t number = 0; number < in_flight_.size(); number++) {
    for (const ReadPointer& read : in_flight_[number]) {
      forget(layers_[number].cache, read->fill.expert);
      layers_[number].unused[read->fill.expert] = 0;
    }
    // Their threads are the parent's, and so are the reads.
    (void)new std::vector<ReadPointer>(std::move(in_flight_[number]));
    in_flight_[number] = {};
  }
  for (const ReadPointer& read : bypassing_) {
    spare_.forget(read->place);
    spare_.release(read->place);
  }
  (void)new std::vector<ReadPointer>(std::move(bypassing_));
  bypassing_ = {};
  (void)readers_.release();
}

void Slots::close() {
  if (!readers_) return;
  quiesce();
  busy_before_ns_ += readers_->busy_ns();
  readers_.reset();
}

// Books guesses that a step uses, and those that lose their slot unused.
void Slots::count_use(int64_t number, const CachePlan& plan) {
  const StepLayer& layer = layers_[number];
  for (const Placed& hit : plan.hits) {
    if (!layer.unused[hit.expert]) continue;
    layer.unused[hit.expert] = 0;
    layer.counters[COUNT_USEFUL_BYTES] += layer.record_bytes;
  }
  for (const int64_t expert : plan.evicted) {
    if (!layer.unused[expert]) continue;
    layer.unused[expert] = 0;
    layer.counters[COUNT_WASTED_BYTES] += layer.record_bytes;
  }
}

// Books what is read now because useless guesses had pushed it out.
void Slots::count_pushed_out(int64_t number, const std::vector<ReadPointer>& reads) {
  const StepLayer& layer = layers_[number];
  for (const ReadPointer& read : reads) {
    const int64_t expert = read->fill.expert;
    if (!layer.pushed_out[expert]) continue;
    layer.pushed_out[expert] = 0;
    layer.counters[COUNT_PUSHED_OUT_BYTES] += layer.record_bytes;
  }
}

// Bytes of a read that came while the caller waited, as if it had run evenly.
void Slots::count_stalled(int64_t number, const RecordRead& read) {
  const double whole = seconds(read.ended - read.began);
  if (whole <= 0.0) return;
  double stalled = 0.0;
  for (const auto& [began, ended] : stalls_)
    stalled += std::max(0.0, seconds(std::min(ended, read.ended) - std::max(began, read.began)));
  layers_[number].counters[COUNT_STALL_BYTES] +=
      static_cast<int64_t>(static_cast<double>(read.bytes) * std::min(1.0, stalled / whole));
}

}  // namespace specmoe
