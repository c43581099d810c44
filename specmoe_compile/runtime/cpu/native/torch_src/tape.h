// A step of a compiled graph without Python: the same calls in the same order, on the same memory.
//
// What Python records while it runs a step once: loops that Inductor compiled, by their address and
// arguments, and ops, whose results go where they went then. All memory stays as long as the tape.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <utility>
#include <vector>

namespace specmoe {
namespace {

// A loop of Inductor's takes pointers and 64-bit integers, and returns nothing.
constexpr size_t kMaxArguments = 64;
using Loop = void (*)(void* function, const int64_t* arguments);

template <size_t... I>
void call_with(void* function, const int64_t* arguments, std::index_sequence<I...>) {
  reinterpret_cast<void (*)(decltype(static_cast<void>(I), int64_t{})...)>(function)(
      arguments[I]...);
}

template <size_t N>
void call_loop(void* function, const int64_t* arguments) {
  call_with(function, arguments, std::make_index_sequence<N>());
}

template <size_t... N>
constexpr std::array<Loop, sizeof...(N)> loops_of(std::index_sequence<N...>) {
  return {call_loop<N>...};
}

// Where a result went when it was recorded.
void put_result(const at::Tensor& out, const at::Tensor& result) {
  if (result.sizes() == out.sizes() && result.strides() == out.strides() &&
      result.scalar_type() == out.scalar_type() && out.is_non_overlapping_and_dense())
    std::memcpy(out.mutable_data_ptr(), result.const_data_ptr(), out.nbytes());
  else
    throw std::runtime_error("a result of a recorded step has another form than before");
}

class Tape {
 public:
  // `inputs` are the step's: where their memory is another one, nothing of the tape holds.
  // `threads`: OpenMP's, as they were.
  Tape(const at::Tensor& tokens, std::vector<at::Tensor> inputs, int threads)
      : tokens_(tokens), inputs_(std::move(inputs)), threads_(threads) {
    for (const at::Tensor& input : inputs_) places_.push_back(input.const_data_ptr());
  }

  void add(std::function<void()> call) { calls_.push_back(std::move(call)); }

  // Runs all of it for other tokens; false, before anything has run, where it does not hold.
  bool run(const at::Tensor& tokens) {
    for (size_t i = 0; i < inputs_.size(); i++)
      if (inputs_[i].const_data_ptr() != places_[i]) return false;
    put_result(tokens_, tokens);
    const int threads = at::get_num_threads();
    if (threads != threads_) at::set_num_threads(threads_);
    try {
      for (const std::function<void()>& call : calls_) call();
    } catch (...) {
      if (threads != threads_) at::set_num_threads(threads);
      throw;
    }
    if (threads != threads_) at::set_num_threads(threads);
    return true;
  }

 private:
  at::Tensor tokens_;
  std::vector<at::Tensor> inputs_;
  std::vector<const void*> places_;
  std::vector<std::function<void()>> calls_;
  int threads_;
};

}  // namespace
}  // namespace specmoe
