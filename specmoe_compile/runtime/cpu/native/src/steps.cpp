#include "steps.h"

#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "numbers.h"

namespace specmoe {
namespace {

int64_t id_at(const StepCall& call, int64_t i) {
  if (call.id_bytes == 4) return static_cast<const int32_t*>(call.ids)[i];
  return static_cast<const int64_t*>(call.ids)[i];
}

float value_at(const void* values, int32_t dtype, int64_t i) {
  if (dtype == F32) return static_cast<const float*>(values)[i];
  const uint16_t bits = static_cast<const uint16_t*>(values)[i];
  return dtype == BF16 ? from_bf16(bits) : from_f16(bits);
}

void put(void* values, int32_t dtype, int64_t i, float value) {
  if (dtype == F32)
    static_cast<float*>(values)[i] = value;
  else
    static_cast<uint16_t*>(values)[i] = dtype == BF16 ? to_bf16(value) : to_f16(value);
}

float rounded_to(float value, int32_t dtype) {
  if (dtype == BF16) return from_bf16(to_bf16(value));
  if (dtype == F16) return from_f16(to_f16(value));
  return value;
}

// (y * weights).sum over K, in this order, as torch computes it: the products have the wider of
// the two dtypes, sums are float32 and start at zero.
void reduce(const float* y, const StepCall& call) {
  const int32_t product = call.x_dtype == call.weights_dtype ? call.x_dtype : F32;
  std::vector<float> sums(static_cast<size_t>(call.hidden));
  for (int64_t t = 0; t < call.tokens; t++) {
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int64_t k = 0; k < call.top_k; k++) {
      const float weight = value_at(call.weights, call.weights_dtype, t * call.top_k + k);
      const float* row = y + (t * call.top_k + k) * call.hidden;
      float* sum = sums.data();
      if (product == F32) {
        for (int64_t h = 0; h < call.hidden; h++) sum[h] += row[h] * weight;
      } else {
        for (int64_t h = 0; h < call.hidden; h++) sum[h] += rounded_to(row[h] * weight, product);
      }
    }
    for (int64_t h = 0; h < call.hidden; h++)
      put(call.out, call.x_dtype, t * call.hidden + h, sums[static_cast<size_t>(h)]);
  }
}

std::mutex table_mutex;
std::unordered_map<int64_t, std::shared_ptr<Steps>>& table() {
  static auto* entries = new std::unordered_map<int64_t, std::shared_ptr<Steps>>();
  return *entries;
}

}  // namespace

void enter_steps(int64_t handle, std::shared_ptr<Steps> steps) {
  const std::lock_guard<std::mutex> lock(table_mutex);
  table()[handle] = std::move(steps);
}

// Another session may have got the number meanwhile.
void leave_steps(int64_t handle, Steps* steps) {
  steps->close();
  const std::lock_guard<std::mutex> lock(table_mutex);
  const auto found = table().find(handle);
  if (found != table().end() && found->second.get() == steps) table().erase(found);
}

std::shared_ptr<Steps> steps_or_null(int64_t handle) {
  const std::lock_guard<std::mutex> lock(table_mutex);
  const auto found = table().find(handle);
  return found == table().end() ? nullptr : found->second;
}

Steps::Steps(Engine& engine, const StepLayer* layers, int64_t count, StepControl* control,
             int file, int readers, uint8_t* spare)
    : engine_(engine),
      layers_(layers, layers + count),
      control_(control),
      file_(file),
      reader_threads_(readers),
      spare_(spare),
      mutex_(std::make_unique<std::recursive_mutex>()) {}

Steps::~Steps() = default;

void Steps::renew_after_fork() {
  (void)mutex_.release();  // a thread of the parent's may have it
  mutex_ = std::make_unique<std::recursive_mutex>();
  if (readers_) busy_before_ns_ += readers_->busy_ns();
  (void)readers_.release();  // its threads are the parent's
}

void Steps::close() {
  const std::lock_guard<std::recursive_mutex> lock(*mutex_);
  is_closed_ = true;
  if (readers_) busy_before_ns_ += readers_->busy_ns();
  readers_.reset();
}

bool Steps::is_pythons(int64_t layer, const StepCall& call) const {
  const int64_t count = static_cast<int64_t>(layers_.size());
  if (control_->is_off || layer < 0 || layer >= count) return true;
  if (control_->learns && control_->learning_turn <= 0) return true;
  if (control_->is_timed && layer == count - 1) return true;
  const StepLayer& own = layers_[static_cast<size_t>(layer)];
  if (own.expert == nullptr || *own.is_busy) return true;
  if (call.top_k > kAnyWidthTopK && call.hidden % kVectors != 0) return true;
  const bool mixes = call.x_dtype != F32 && call.weights_dtype != F32;
  return call.tokens < 1 || call.tokens > kMaxTokens || call.top_k < 1 || call.top_k > kMaxTopK ||
         call.hidden != own.expert->down.outputs || call.x_dtype != own.expert->gate.dtype ||
         (mixes && call.x_dtype != call.weights_dtype);
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
    if (std::find(wanted_.begin(), wanted_.end(), id) == wanted_.end()) wanted_.push_back(id);
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

// Whether every expert is there or gets a slot, and may be read without Python.
bool Steps::fits(const StepLayer& layer) const {
  const CacheTables& cache = layer.cache;
  if (cache.slots == 0) return true;
  int64_t missing = 0, usable = 0;
  for (const int64_t expert : wanted_) {
    if (cache.slot_of[expert] != kNobody) continue;
    missing++;
    if (file_ < 0 || (layer.verified != nullptr && !layer.verified[expert])) return false;
  }
  if (missing == 0) return true;
  for (int64_t slot = 0; slot < cache.slots; slot++) usable += cache.expert_of[slot] < cache.experts;
  return usable >= static_cast<int64_t>(wanted_.size());
}

ExpertTask Steps::task_of(int64_t expert, const uint8_t* record) const {
  for (const Task& task : tasks_)
    if (task.expert == expert)
      return {record, tokens_.data() + task.first, places_.data() + task.first,
              static_cast<int64_t>(task.count)};
  return {};
}

void Steps::compute(const StepLayer& layer, const std::vector<ExpertTask>& tasks, const float* x,
                    int64_t tokens) {
  engine_.run(*layer.expert, tasks.data(), static_cast<int64_t>(tasks.size()), x, tokens,
              y_.data());
}

void Steps::start_reads(const StepLayer& layer) {
  reads_.clear();
  const int64_t bytes = layer.record_bytes;
  for (const Placed& fill : plan_->fills)
    reads_.push_back(
        {layer.memory + fill.slot * bytes, layer.file_offset + fill.expert * bytes, bytes});
  uint8_t* place = spare_;
  for (const int64_t expert : plan_->bypassed) {
    reads_.push_back({place, layer.file_offset + expert * bytes, bytes});
    place += bytes;
  }
  if (reads_.empty()) return;
  if (!readers_) readers_ = std::make_unique<Readers>(file_, reader_threads_);
  readers_->start(reads_);
}

// Computes what was read, as it arrives. False if a read failed; none is under way then.
bool Steps::take_arrivals(const StepLayer& layer, const float* x, int64_t tokens) {
  Stalls stalls;
  bool is_good = true;
  for (size_t left = reads_.size(); left > 0; left--) {
    const bool waits = !readers_->has_arrived();
    const auto began = Clock::now();
    const size_t arrived = readers_->wait();
    if (waits) stalls.emplace_back(began, Clock::now());
    const size_t fills = plan_->fills.size();
    const int64_t expert = arrived < fills ? plan_->fills[arrived].expert
                                           : plan_->bypassed[arrived - fills];
    if (reads_[arrived].failed) {
      forget(layer.cache, expert);
      is_good = false;
    } else if (is_good) {
      ready_.assign(1, task_of(expert, reads_[arrived].target));
      compute(layer, ready_, x, tokens);
    }
  }
  if (is_good) count_stalls(layer, stalls);
  return is_good;
}

// Time that the caller waited, and of each read the bytes that came in it, as if it ran evenly.
void Steps::count_stalls(const StepLayer& layer, const Stalls& stalls) const {
  using std::chrono::duration;
  for (const auto& [began, ended] : stalls)
    layer.counters[COUNT_STALL_NS] +=
        std::chrono::duration_cast<std::chrono::nanoseconds>(ended - began).count();
  for (const RecordRead& read : reads_) {
    double stalled = 0.0;
    for (const auto& [began, ended] : stalls)
      stalled += std::max(0.0, duration<double>(std::min(ended, read.ended) -
                                                std::max(began, read.began)).count());
    const double whole = duration<double>(read.ended - read.began).count();
    if (whole > 0.0)
      layer.counters[COUNT_STALL_BYTES] +=
          static_cast<int64_t>(static_cast<double>(read.bytes) * std::min(1.0, stalled / whole));
  }
}

bool Steps::experts(int64_t number, const StepCall& call) {
  const std::lock_guard<std::recursive_mutex> lock(*mutex_);
  if (is_closed_ || is_pythons(number, call)) return false;
  const StepLayer& layer = layers_[static_cast<size_t>(number)];
  if (!group(layer, call) || !fits(layer)) return false;
  y_.resize(static_cast<size_t>(call.tokens * call.top_k * call.hidden));
  if (layer.is_slice) std::fill(y_.begin(), y_.end(), 0.0f);
  const float* x = static_cast<const float*>(call.x);
  if (call.x_dtype != F32) {
    x_.resize(static_cast<size_t>(call.tokens * call.hidden));
    for (size_t i = 0; i < x_.size(); i++)
      x_[i] = value_at(call.x, call.x_dtype, static_cast<int64_t>(i));
    x = x_.data();
  }
  ready_.clear();
  reads_.clear();
  if (layer.cache.slots == 0) {
    for (const int64_t expert : wanted_)
      ready_.push_back(task_of(expert, layer.memory + expert * layer.record_bytes));
  } else {
    plan_ = &planner_.plan(layer.cache, wanted_);
    start_reads(layer);
    for (const Placed& hit : plan_->hits)
      ready_.push_back(task_of(hit.expert, layer.memory + hit.slot * layer.record_bytes));
  }
  const size_t hits = ready_.size();
  if (hits > 0) compute(layer, ready_, x, call.tokens);
  if (!take_arrivals(layer, x, call.tokens)) return false;
  reduce(y_.data(), call);
  layer.counters[COUNT_STEPS]++;
  layer.counters[COUNT_HITS] += static_cast<int64_t>(hits);
  layer.counters[COUNT_MISSES] += static_cast<int64_t>(reads_.size());
  if (control_->learns) control_->learning_turn--;
  return true;
}

}  // namespace specmoe
