#include "experts.h"

#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention.h"
#include "numbers.h"
#include "products.h"

namespace specmoe {
namespace {

// Of weights: each chunk costs a start, and a thread whose last one is longer keeps the others
// waiting, so that many threads have smaller ones. 256 KiB take 15 microseconds of one core.
constexpr int64_t kMaxChunkBytes = 256 << 10, kMinChunkBytes = 128 << 10;
constexpr int64_t kChunksPerThread = 4;
constexpr int64_t kRowStep = 8;             // rows that a kernel computes at once
constexpr int64_t kBlock = 32, kGroup = 128;  // inputs that are taken in at once, in int8
// Steps of more are prefill, of which no two take the same time.
constexpr int64_t kMaxMeasuredTokens = 16;

// Rows per chunk, where a row of the chunk has so many bytes of weights.
int64_t chunk_rows(int64_t chunk_bytes, int64_t row_bytes, int64_t step) {
  return std::max(step, chunk_bytes / std::max<int64_t>(1, row_bytes) / step * step);
}

float bias_at(const uint8_t* record, const WeightSpec& spec, int64_t row) {
  const uint8_t* plane = record + spec.bias;
  if (spec.bias_dtype == F32) {
    float value;
    std::memcpy(&value, plane + 4 * row, 4);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, plane + 2 * row, 2);
  return spec.bias_dtype == BF16 ? from_bf16(bits) : from_f16(bits);
}

NextRows rows_from(const WeightSpec& spec, const uint8_t* record, int64_t row) {
  NextRows rows{WeightView{&spec, record}.row(row), nullptr};
  if (spec.scales < 0 || spec.block_rows != 1) return rows;
  rows.scales = record + spec.scales + row * spec.scale_columns * scale_bytes(spec.scale);
  return rows;
}

double now_ns(clockid_t clock) {
  timespec time{};
  clock_gettime(clock, &time);
  return 1e9 * static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec);
}

// Adds the bias and rounds to the dtype. The product of a plain weight is rounded by itself first,
// as torch does, that of a coded one is float32 until then.
void end_product(const Kernels& kernels, float* values, int64_t count, const uint8_t* record,
                 const WeightSpec& spec, int32_t dtype, int64_t first_row) {
  if (is_plain(spec.book)) kernels.round(values, count, dtype);
  if (spec.bias >= 0)
    for (int64_t i = 0; i < count; i++) values[i] += bias_at(record, spec, first_row + i);
  if (spec.bias >= 0 || !is_plain(spec.book)) kernels.round(values, count, dtype);
}

// Rows of the intermediate that a chunk may end with.
int64_t row_step(InputForm form) {
  return form == FORM_PLAIN ? kRowStep : is_int8(form) ? kGroup : kBlock;
}

InputForm input_form(const Kernels& kernels, const ExpertSpec& spec, const WeightSpec& weight) {
  const bool four_bit = is_four_bit(weight.book);
  if (spec.int8 && has_int8(weight.book)) return four_bit ? FORM_INT8_SPLIT : FORM_INT8;
  if (kernels.rows_bf16 != nullptr && spec.gate.dtype == BF16 && takes_bf16(weight))
    return FORM_BF16;
  return four_bit ? FORM_SPLIT : FORM_PLAIN;
}

}  // namespace

// One `run`: chunks of up projections with their gates, then chunks of down projections.
class Engine::Step final : public Work {
 public:
  Offer offer;

  void prepare(const Kernels& kernels, const ExpertSpec& spec, const ExpertTask* tasks,
               int64_t count, const float* x, int64_t tokens, float* y, int64_t threads);
  int64_t chunks() const { return up_chunks_ * count() + down_chunks_ * count(); }
  int64_t bytes() const { return bytes_; }
  void needs(int64_t chunk, int64_t* first, int64_t* second) const override;
  void compute(int64_t chunk, Scratch& scratch) const override;
  void publish(int64_t chunk, const Scratch& scratch) override;

 private:
  struct Task {
    const uint8_t* record;
    int64_t first;  // in tokens_, places_ and the rows of hidden_
    int64_t count;
  };

  int64_t count() const { return static_cast<int64_t>(tasks_.size()); }
  bool is_up(int64_t chunk) const { return chunk < up_chunks_ * count(); }
  const Task& task_of(int64_t chunk) const {
    const int64_t first = up_chunks_ * count();
    return tasks_[static_cast<size_t>(chunk < first ? chunk / up_chunks_
                                                    : (chunk - first) / down_chunks_)];
  }
  // Rows of the intermediate (up) or the output (down) that a chunk computes: [begin, end).
  void span(int64_t chunk, int64_t* begin, int64_t* end) const;
  // Where a chunk's rows begin; nothing where there is no such chunk.
  NextRows rows_of(int64_t chunk) const;
  // `next`: what is read after it.
  void product(const WeightSpec& weight, const uint8_t* record, int64_t begin, int64_t end,
               const Inputs& inputs, NextRows next, float* out) const;
  void compute_up(const Task& task, int64_t begin, int64_t end, Scratch& scratch) const;

  const Kernels* kernels_ = nullptr;
  ExpertSpec spec_{};
  int64_t intermediate_ = 0;
  int64_t up_rows_ = 0, up_chunks_ = 0;
  int64_t down_rows_ = 0, down_chunks_ = 0;
  int64_t bytes_ = 0;  // of weights
  std::vector<Task> tasks_;
  std::vector<int32_t> tokens_, places_, identity_;
  Activations x_, hidden_;
  float* y_ = nullptr;
};

void Engine::Step::prepare(const Kernels& kernels, const ExpertSpec& spec, const ExpertTask* tasks,
                           int64_t count, const float* x, int64_t tokens, float* y,
                           int64_t threads) {
  kernels_ = &kernels;
  spec_ = spec;
  y_ = y;
  intermediate_ = spec.down.inputs;
  tasks_.clear();
  tokens_.clear();
  places_.clear();
  for (int64_t i = 0; i < count; i++) {
    tasks_.push_back({tasks[i].record, static_cast<int64_t>(tokens_.size()), tasks[i].count});
    tokens_.insert(tokens_.end(), tasks[i].tokens, tasks[i].tokens + tasks[i].count);
    places_.insert(places_.end(), tasks[i].places, tasks[i].places + tasks[i].count);
  }
  const int64_t rows = static_cast<int64_t>(tokens_.size());
  for (int64_t i = static_cast<int64_t>(identity_.size()); i < rows; i++)
    identity_.push_back(static_cast<int32_t>(i));
  x_.reset(tokens, spec.up.inputs, input_form(kernels, spec, spec.up));
  for (int64_t t = 0; t < tokens; t++)
    x_.put(kernels, t, 0, spec.up.inputs, x + t * spec.up.inputs);
  const InputForm down_form = input_form(kernels, spec, spec.down);
  hidden_.reset(rows, intermediate_, down_form);
  const int64_t up_bytes = spec.up.row_bytes * (spec.gate.has_gate ? 2 : 1);
  bytes_ = count * (intermediate_ * up_bytes + spec.down.outputs * spec.down.row_bytes);
  const int64_t chunk_bytes =
      std::clamp(bytes_ / (threads * kChunksPerThread), kMinChunkBytes, kMaxChunkBytes);
  up_rows_ = chunk_rows(chunk_bytes, up_bytes, row_step(down_form));
  up_chunks_ = (intermediate_ + up_rows_ - 1) / up_rows_;
  down_rows_ = chunk_rows(chunk_bytes, spec.down.row_bytes, kRowStep);
  down_chunks_ = (spec.down.outputs + down_rows_ - 1) / down_rows_;
}

void Engine::Step::needs(int64_t chunk, int64_t* first, int64_t* second) const {
  *first = *second = 0;
  if (is_up(chunk)) return;
  const int64_t expert = (chunk - up_chunks_ * count()) / down_chunks_;
  *first = expert * up_chunks_;
  *second = *first + up_chunks_;
}

void Engine::Step::span(int64_t chunk, int64_t* begin, int64_t* end) const {
  const bool up = is_up(chunk);
  const int64_t part = up ? chunk % up_chunks_ : (chunk - up_chunks_ * count()) % down_chunks_;
  const int64_t rows = up ? up_rows_ : down_rows_;
  *begin = part * rows;
  *end = std::min(*begin + rows, up ? intermediate_ : spec_.down.outputs);
}

NextRows Engine::Step::rows_of(int64_t chunk) const {
  if (chunk >= chunks()) return {};
  int64_t begin = 0, end = 0;
  span(chunk, &begin, &end);
  if (!is_up(chunk)) return rows_from(spec_.down, task_of(chunk).record, begin);
  return rows_from(spec_.up, task_of(chunk).record, spec_.interleaved ? 2 * begin : begin);
}

void Engine::Step::product(const WeightSpec& weight, const uint8_t* record, int64_t begin,
                           int64_t end, const Inputs& inputs, NextRows next, float* out) const {
  const WeightView view{&weight, record, next};
  const auto rows = is_int8(inputs.form)         ? kernels_->rows_int8
                    : inputs.form == FORM_BF16 ? kernels_->rows_bf16
                                               : kernels_->rows;
  rows(view, begin, end, inputs, out, end - begin);
  for (int64_t t = 0; t < inputs.tokens; t++)
    end_product(*kernels_, out + t * (end - begin), end - begin, record, weight, spec_.gate.dtype,
                begin);
}

void Engine::Step::compute_up(const Task& task, int64_t begin, int64_t end,
                              Scratch& scratch) const {
  const Inputs inputs = x_.inputs(tokens_.data() + task.first, task.count);
  const int64_t size = (end - begin) * task.count;
  float* gate = scratch.floats.data();
  float* up = gate + size;
  const NextRows next = rows_of(scratch.next);
  if (!spec_.gate.has_gate) {
    product(spec_.up, task.record, begin, end, inputs, next, gate);
  } else if (!spec_.interleaved) {
    product(spec_.up, task.record, begin, end, inputs,
            rows_from(spec_.up, task.record, intermediate_ + begin), gate);
    product(spec_.up, task.record, intermediate_ + begin, intermediate_ + end, inputs, next, up);
  } else {
    float* both = up + size;
    product(spec_.up, task.record, 2 * begin, 2 * end, inputs, next, both);
    for (int64_t i = 0; i < size; i++) {
      gate[i] = both[2 * i];
      up[i] = both[2 * i + 1];
    }
  }
  kernels_->gate(gate, up, size, spec_.gate);
}

void Engine::Step::compute(int64_t chunk, Scratch& scratch) const {
  const Task& task = task_of(chunk);
  int64_t begin = 0, end = 0;
  span(chunk, &begin, &end);
  const size_t needed = static_cast<size_t>(4 * (end - begin) * task.count);
  if (scratch.floats.size() < needed) scratch.floats.resize(needed);
  if (is_up(chunk)) return compute_up(task, begin, end, scratch);
  const Inputs inputs = hidden_.inputs(identity_.data() + task.first, task.count);
  product(spec_.down, task.record, begin, end, inputs, rows_of(scratch.next),
          scratch.floats.data());
}

void Engine::Step::publish(int64_t chunk, const Scratch& scratch) {
  const Task& task = task_of(chunk);
  int64_t begin = 0, end = 0;
  span(chunk, &begin, &end);
  const float* from = scratch.floats.data();
  for (int64_t n = 0; n < task.count; n++, from += end - begin) {
    if (is_up(chunk)) {
      hidden_.put(*kernels_, task.first + n, begin, end - begin, from);
      continue;
    }
    const int64_t place = places_[static_cast<size_t>(task.first + n)];
    std::memcpy(y_ + place * spec_.down.outputs + begin, from,
                static_cast<size_t>(end - begin) * sizeof(float));
  }
}

Engine::Engine(int threads, const Kernels* kernels) : kernels_(kernels), threads_(threads) {
  if (kernels_ == nullptr) kernels_ = avx512_bf16_kernels_or_null();
  if (kernels_ == nullptr) kernels_ = avx512_kernels_or_null();
  if (kernels_ == nullptr) kernels_ = avx2_kernels_or_null();
  if (kernels_ == nullptr) kernels_ = &portable_kernels();
}

Engine::~Engine() {
  if (process_ != getpid()) (void)pool_.release();  // its threads are another process's
  pool_.reset();  // before the steps, at which late threads still look
}

void Engine::set_threads(int threads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (threads == threads_) return;
  threads_ = threads;
  trial_.begin_anew();
  if (process_ == getpid()) pool_.reset();
  process_ = 0;
}

void Engine::settle() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (process_ != getpid()) return;
  for (const auto& step : steps_)
    while (!step->offer.is_free()) std::this_thread::yield();
}

Engine::Step& Engine::free_step() {
  for (const auto& step : steps_)
    if (step->offer.is_free()) return *step;
  steps_.push_back(std::make_unique<Step>());
  return *steps_.back();
}

// Before the first run, and the first one after a fork.
void Engine::start_threads() {
  if (process_ == getpid()) return;
  (void)pool_.release();
  steps_.clear();
  products_.reset();
  attention_.reset();
  pool_ = std::make_unique<Pool>(threads_);
  process_ = getpid();
}

void Engine::run_measured(Step& step, int64_t tokens) {
  if (pool_->threads() < 2 || step.chunks() < 2 || tokens > kMaxMeasuredTokens) {
    pool_->run(step.offer, step, step.chunks());
    return;
  }
  const double began = now_ns(CLOCK_MONOTONIC), on_core = now_ns(CLOCK_THREAD_CPUTIME_ID);
  const int64_t own = pool_->callers_chunks();
  pool_->run(step.offer, step, step.chunks(), trial_.is_alone());
  RunTimes run;
  run.core_ns = now_ns(CLOCK_THREAD_CPUTIME_ID) - on_core;
  run.wall_ns = now_ns(CLOCK_MONOTONIC) - began;
  run.bytes = static_cast<double>(step.bytes());
  run.chunks = static_cast<double>(step.chunks());
  run.own = static_cast<double>(pool_->callers_chunks() - own);
  trial_.end(run, tokens);
}

void Engine::products(const ProductsCall& call) {
  const std::lock_guard<std::mutex> lock(mutex_);
  start_threads();
  if (!products_) products_ = std::make_unique<Products>();
  products_->prepare(*kernels_, call);
  products_->run(*pool_, trial_.is_alone());
}

void Engine::attend(const AttentionCall& call) {
  const std::lock_guard<std::mutex> lock(mutex_);
  start_threads();
  if (!attention_) attention_ = std::make_unique<Attention>();
  attention_->prepare(*kernels_, call);
  attention_->run(*pool_, trial_.is_alone());
  attention_->finish();
}

void Engine::run(const ExpertSpec& spec, const ExpertTask* tasks, int64_t count, const float* x,
                 int64_t tokens, float* y) {
  if (count == 0) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  start_threads();
  Step& step = free_step();
  step.prepare(*kernels_, spec, tasks, count, x, tokens, y, pool_->threads());
  run_measured(step, tokens);
}

}  // namespace specmoe
