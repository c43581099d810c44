#include "steps.h"

#include <algorithm>
#include <cstring>

#include "sums.h"

namespace specmoe {
namespace {

constexpr int64_t kMaxTokens = 16;
// Torch adds more than 16 numbers in another order, and more than 4 in columns that are left over
// when it has taken 4 vectors at a time.
constexpr int64_t kMaxTopK = 16;
constexpr int64_t kAnyWidthTopK = 4;
constexpr int64_t kVectors = 64;
// Steps per one that learns default vectors, where nothing is guessed from them now.
constexpr int64_t kRest = 4;

using Lock = std::lock_guard<std::recursive_mutex>;

bool holds(const std::vector<int64_t>& experts, int64_t expert) {
  return std::find(experts.begin(), experts.end(), expert) != experts.end();
}

}  // namespace

Steps::Steps(Engine& engine, const StepLayer* layers, int64_t count, StepControl* control,
             int file, int readers, const SparePlaces& spare)
    : engine_(engine),
      layers_(layers, layers + count),
      control_(control),
      mutex_(std::make_unique<std::recursive_mutex>()),
      slots_(layers_, file, readers, spare),
      judge_(count),
      predictions_(static_cast<size_t>(count)),
      asked_(static_cast<size_t>(count), -1) {}

void Steps::renew_after_fork() {
  (void)mutex_.release();  // a thread of the parent's may have it
  mutex_ = std::make_unique<std::recursive_mutex>();
  abandon();
  reads_ = {};
  for (Prediction& prediction : predictions_) prediction = {};
  slots_.forget_reads();
}

void Steps::close() {
  const Lock lock(*mutex_);
  is_closed_ = true;
  abandon();
  slots_.close();
}

void Steps::quiesce() {
  const Lock lock(*mutex_);
  abandon();
  for (Prediction& prediction : predictions_) prediction = {};
  slots_.quiesce();
}

// Null where Python has to take the step, whatever its arguments are.
const StepLayer* Steps::layer_or_null(int64_t number) const {
  const int64_t count = static_cast<int64_t>(layers_.size());
  if (is_closed_ || control_->is_off || number < 0 || number >= count) return nullptr;
  const StepLayer& layer = layers_[static_cast<size_t>(number)];
  return layer.expert == nullptr || layer.flags[FLAG_BUSY] ? nullptr : &layer;
}

bool Steps::is_pythons(const StepLayer& layer, const StepCall& call) const {
  if (call.tokens < 1 || call.tokens > kMaxTokens || call.top_k < 1 || call.top_k > kMaxTopK)
    return true;
  if (call.top_k > kAnyWidthTopK && layer.expert->down.outputs % kVectors != 0) return true;
  return control_->learns && control_->learning_turn <= 0 && call.tokens > 1;
}

// Whether the sum is torch's, and the input is what the experts take.
bool Steps::fits(const StepLayer& layer, const StepCall& call) const {
  const bool mixes = call.x_dtype != F32 && call.weights_dtype != F32;
  return call.hidden == layer.expert->down.outputs && call.x_dtype == layer.expert->gate.dtype &&
         !(mixes && call.x_dtype != call.weights_dtype);
}

bool Steps::needs_weights(const StepLayer& layer) const {
  return control_->threshold >= 0.0 && !layer.flags[FLAG_SKIPPED];
}

// Groups choices by expert: one token's in its own order, else ascending. False: an id is none.
bool Steps::group(const StepLayer& layer, const StepCall& call) {
  const int64_t choices = call.tokens * call.top_k;
  int64_t own = 0;
  wanted_.clear();
  for (int64_t i = 0; i < choices; i++) {
    const int64_t id = id_at(call, i);
    if (layer.is_slice && id == layer.cache.experts) continue;
    own++;
    if (id < 0 || id >= layer.cache.experts) return false;
    if (!holds(wanted_, id)) wanted_.push_back(id);
  }
  if (static_cast<int64_t>(wanted_.size()) < own || call.tokens > 1)
    std::sort(wanted_.begin(), wanted_.end());
  tasks_.clear();
  tokens_.clear();
  places_.clear();
  for (const int64_t expert : wanted_) {
    const size_t first = tokens_.size();
    for (int64_t i = 0; i < choices; i++) {
      if (id_at(call, i) != expert) continue;
      tokens_.push_back(static_cast<int32_t>(i / call.top_k));
      places_.push_back(static_cast<int32_t>(i));
    }
    tasks_.push_back({expert, first, tokens_.size() - first});
  }
  return true;
}

ExpertTask Steps::task_of(int64_t expert, const uint8_t* record) const {
  for (const Task& task : tasks_)
    if (task.expert == expert)
      return {record, tokens_.data() + task.first, places_.data() + task.first,
              static_cast<int64_t>(task.count)};
  return {};
}

// Makes room for outputs, and float32 of the input.
void Steps::take_input(const StepCall& call) {
  y_.resize(static_cast<size_t>(call.tokens * call.top_k * call.hidden));
  input_ = static_cast<const float*>(call.x);
  if (call.x_dtype == F32) return;
  x_.resize(static_cast<size_t>(call.tokens * call.hidden));
  for (size_t i = 0; i < x_.size(); i++)
    x_[i] = value_at(call.x, call.x_dtype, static_cast<int64_t>(i));
  input_ = x_.data();
}

void Steps::compute(const StepLayer& layer, const StepCall& call) {
  if (!ready_.empty())
    engine_.run(*layer.expert, ready_.data(), static_cast<int64_t>(ready_.size()), input_,
                call.tokens, y_.data());
}

void Steps::compute_ready(int64_t number, const StepCall& call) {
  const StepLayer& layer = layers_[static_cast<size_t>(number)];
  ready_.clear();
  for (const Ready& ready : reads_.ready) ready_.push_back(task_of(ready.expert, ready.record));
  reads_.ready.clear();
  compute(layer, call);
}

// Computes what arrives; with `block` all of it. False if a read failed.
bool Steps::compute_arrivals(int64_t number, const StepCall& call, bool block) {
  const StepLayer& layer = layers_[static_cast<size_t>(number)];
  bool is_good = true;
  while (const ReadPointer read = slots_.next_or_null(number, reads_, block)) {
    if (read->state != ReadState::done) is_good = false;
    if (!is_good) continue;
    ready_.assign(1, task_of(read->fill.expert, read->target));
    compute(layer, call);
  }
  return is_good;
}

bool Steps::experts(int64_t number, const StepCall& call) {
  const Lock lock(*mutex_);
  const StepLayer* layer = layer_or_null(number);
  if (layer == nullptr || is_pythons(*layer, call) || !fits(*layer, call)) return false;
  if (!group(*layer, call) || !slots_.takes(number, wanted_)) return false;
  abandon();
  live_.filled.clear();
  take_input(call);
  if (layer->is_slice) std::fill(y_.begin(), y_.end(), 0.0f);
  slots_.begin(number, wanted_, reads_);
  compute_ready(number, call);
  if (!compute_arrivals(number, call, true)) return false;
  end_step(number, call, kRest);
  return true;
}

int64_t Steps::settle(int64_t number, const StepCall& call, int64_t ticket) {
  const Lock lock(*mutex_);
  const StepLayer* layer = layer_or_null(number);
  if (layer == nullptr || !control_->guesses || is_pythons(*layer, call)) return 0;
  if (!group(*layer, call)) return 0;
  const bool is_known_now = !needs_weights(*layer);
  if (is_known_now && !slots_.takes(number, wanted_)) return 0;
  abandon();
  live_.ids.clear();
  for (int64_t i = 0; i < call.tokens * call.top_k; i++) live_.ids.push_back(id_at(call, i));
  live_.filled.clear();
  meet_guess(number, ticket, call);
  if (is_known_now)
    slots_.begin(number, wanted_, reads_);
  else
    slots_.settle(number, wanted_);
  live_.has_begun = is_known_now;
  live_.has_run = false;
  live_.layer = number;
  return live_.state = ++numbers_;
}

bool Steps::is_live(int64_t number, const StepCall& call, int64_t state) const {
  if (live_.state == 0 || live_.state != state || live_.layer != number) return false;
  const int64_t choices = call.tokens * call.top_k;
  if (choices != static_cast<int64_t>(live_.ids.size())) return false;
  for (int64_t i = 0; i < choices; i++)
    if (id_at(call, i) != live_.ids[static_cast<size_t>(i)]) return false;
  return true;
}

// Gives misses that are light for each of their tokens their default vectors; returns the others.
std::vector<int64_t> Steps::fill_weak(const StepLayer& layer, const StepCall& call) {
  std::vector<int64_t> kept;
  for (const Task& task : tasks_) {
    double heaviest = 0.0;
    for (size_t i = task.first; i < task.first + task.count; i++)
      heaviest = std::max(heaviest, static_cast<double>(value_at(call.weights, call.weights_dtype,
                                                                 places_[i])));
    const bool is_there =
        layer.cache.slots == 0 || layer.cache.slot_of[task.expert] != kNobody;
    if (is_there || heaviest >= control_->threshold) {
      kept.push_back(task.expert);
      continue;
    }
    live_.filled.push_back(task.expert);
    const float* vector = layer.vectors + task.expert * call.hidden;
    for (size_t i = task.first; i < task.first + task.count; i++)
      for (int64_t h = 0; h < call.hidden; h++)
        y_[static_cast<size_t>(places_[i] * call.hidden + h)] =
            rounded_to(vector[h], call.x_dtype);
  }
  return kept;
}

bool Steps::run(int64_t number, const StepCall& call, int64_t state) {
  const Lock lock(*mutex_);
  const StepLayer* layer = layer_or_null(number);
  if (layer == nullptr || !is_live(number, call, state) || live_.has_run) return false;
  if (!fits(*layer, call) || !group(*layer, call)) return false;
  take_input(call);
  if (!live_.has_begun) {
    const std::vector<int64_t> needed = fill_weak(*layer, call);
    if (!slots_.takes(number, needed)) return false;
    layer->counters[COUNT_SKIPPED] += static_cast<int64_t>(live_.filled.size());
    slots_.begin(number, needed, reads_);
    live_.has_begun = true;
  }
  live_.has_run = true;
  compute_ready(number, call);
  if (!compute_arrivals(number, call, false)) return false;
  if (call.x_dtype == F32)
    std::memcpy(call.out, y_.data(), y_.size() * sizeof(float));
  else
    for (size_t i = 0; i < y_.size(); i++)
      put(call.out, call.x_dtype, static_cast<int64_t>(i), y_[i]);
  return true;
}

bool Steps::correct(int64_t number, const StepCall& call, int64_t state) {
  const Lock lock(*mutex_);
  const StepLayer* layer = layer_or_null(number);
  if (layer == nullptr || !is_live(number, call, state) || !live_.has_run) return false;
  // `start` of another layer may have come between, but no step: the groups are still this one's.
  take_input(call);
  const bool is_good = compute_arrivals(number, call, true);
  abandon();
  if (!is_good) return false;
  end_step(number, call, 1);
  return true;
}

void Steps::end_step(int64_t number, const StepCall& call, int64_t rest) {
  const StepLayer& layer = layers_[static_cast<size_t>(number)];
  learn(layer, call, rest);
  reduce_experts(y_.data(), call);
}

// Counts one token's outputs in, one layer per step in turn (or per `rest` steps).
void Steps::learn(const StepLayer& layer, const StepCall& call, int64_t rest) {
  if (!control_->learns || call.tokens > 1) return;
  if (--control_->learning_turn >= 0) return;
  control_->learning_turn = rest * static_cast<int64_t>(layers_.size());
  if (*control_->is_frozen || tasks_.size() < places_.size()) return;
  for (const Task& task : tasks_) {
    int64_t& samples = layer.samples[task.expert];
    if (samples >= control_->max_samples || holds(live_.filled, task.expert)) continue;
    samples++;
    const float share = 1.0f / static_cast<float>(samples);
    float* mean = layer.vectors + task.expert * call.hidden;
    const float* row = y_.data() + places_[task.first] * call.hidden;
    for (int64_t h = 0; h < call.hidden; h++) mean[h] += share * (row[h] - mean[h]);
  }
}

bool Steps::guesses(int64_t number) {
  if (layers_[static_cast<size_t>(number)].flags[FLAG_SKIPPED]) return false;
  return !control_->is_judged || judge_.predicts(number);
}

bool Steps::plan(const int64_t* layers, int64_t count, const int64_t* edges, int64_t edge_count,
                 uint8_t* answers) {
  const Lock lock(*mutex_);
  if (is_closed_ || control_->is_off || !control_->guesses) return false;
  for (int64_t i = 0; i < count; i++)
    if (layers[i] < 0 || layers[i] >= static_cast<int64_t>(layers_.size()) ||
        layers_[static_cast<size_t>(layers[i])].expert == nullptr)
      return false;
  for (int64_t i = 1; i < edge_count; i += 2) asked_[static_cast<size_t>(edges[i])] = -1;
  std::vector<uint8_t> is_busy(layers_.size(), 0);
  for (int64_t i = 1; i < edge_count; i += 2) {
    int8_t& asked = asked_[static_cast<size_t>(edges[i])];
    if (asked < 0) asked = guesses(edges[i]);
    if (asked)
      for (const int64_t layer : {edges[i - 1], edges[i]})
        is_busy[static_cast<size_t>(layer)] = 1;
  }
  for (int64_t i = 0; i < count; i++) answers[i] = is_busy[static_cast<size_t>(layers[i])];
  return true;
}

int64_t Steps::start(int64_t number, const StepCall& call) {
  const Lock lock(*mutex_);
  const StepLayer* layer = layer_or_null(number);
  if (layer == nullptr || !control_->guesses || call.tokens < 1 || call.tokens > kMaxTokens)
    return 0;
  Prediction& prediction = predictions_[static_cast<size_t>(number)];
  prediction = {};
  const int8_t asked = asked_[static_cast<size_t>(number)];
  asked_[static_cast<size_t>(number)] = -1;
  const int64_t ticket = ++numbers_;
  if (!(asked < 0 ? guesses(number) : asked == 1)) return ticket;
  prediction.number = ticket;
  prediction.tokens = call.tokens;
  prediction.width = call.top_k;
  for (int64_t i = 0; i < call.tokens * call.top_k; i++)
    prediction.ids.push_back(id_at(call, i));
  const std::vector<int64_t> experts = worth_fetching(
      call, control_->width, control_->threshold, layer->cache.experts);
  std::vector<int64_t> admitted = experts;
  if (control_->is_judged) {
    admitted.clear();
    for (const RankedGuess& guess : judge_.admitted(number, experts, call.top_k)) {
      prediction.ranks.emplace_back(guess.expert, guess.rank);
      if (guess.is_admitted) admitted.push_back(guess.expert);
    }
  }
  prediction.issued = slots_.prefetch(number, admitted, experts, control_->budget_bytes);
  return ticket;
}

// Tells recall and the judge what a prediction was worth, if this is the one that was made.
void Steps::meet_guess(int64_t number, int64_t ticket, const StepCall& call) {
  Prediction prediction;
  std::swap(prediction, predictions_[static_cast<size_t>(number)]);
  if (prediction.number == 0 || prediction.number != ticket || prediction.tokens != call.tokens)
    return;
  const StepLayer& layer = layers_[static_cast<size_t>(number)];
  count_recall(prediction, live_.ids, call.top_k, layer.counters);
  if (prediction.ranks.empty()) return;
  size_t useful = 0;
  std::vector<std::pair<int64_t, bool>> brought;
  for (const ReadPointer& read : prediction.issued.reads) {
    const bool is_wanted = holds(wanted_, read->fill.expert);
    useful += is_wanted;
    if (!slots_.has_begun(*read)) continue;  // it cost nothing, and said nothing
    for (const auto& [expert, rank] : prediction.ranks)
      if (expert == read->fill.expert) brought.emplace_back(rank, is_wanted);
  }
  judge_.measure(number, brought);
  // Useful guesses would have pushed out the first ones anyway.
  for (size_t i = useful; i < prediction.issued.evicted.size(); i++)
    layer.pushed_out[prediction.issued.evicted[i]] = 1;
}

// Touches nothing of the session's, and so takes no lock of it.
bool Steps::products(const ProductsCall& call) {
  if (call.tokens < 1 || call.tokens > kMaxTokens) return false;
  engine_.products(call);
  return true;
}

// Weighted sum of default vectors over K.
bool Steps::blend(int64_t number, const StepCall& call) {
  const Lock lock(*mutex_);
  const StepLayer* layer = layer_or_null(number);
  if (layer == nullptr || call.tokens < 1 || call.tokens > kMaxTokens) return false;
  if (call.hidden != layer->expert->down.outputs) return false;
  std::vector<float> sums(static_cast<size_t>(call.hidden));
  for (int64_t t = 0; t < call.tokens; t++) {
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int64_t k = 0; k < call.top_k; k++) {
      const int64_t i = t * call.top_k + k, expert = id_at(call, i);
      if (expert < 0 || expert >= layer->cache.experts) return false;
      const float weight = value_at(call.weights, call.weights_dtype, i);
      const float* vector = layer->vectors + expert * call.hidden;
      for (int64_t h = 0; h < call.hidden; h++)
        sums[static_cast<size_t>(h)] += weight * vector[h];
    }
    for (int64_t h = 0; h < call.hidden; h++)
      put(call.out, call.x_dtype, t * call.hidden + h, sums[static_cast<size_t>(h)]);
  }
  return true;
}

}  // namespace specmoe
