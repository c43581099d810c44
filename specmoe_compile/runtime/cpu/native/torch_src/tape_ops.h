// Ops that record a step for `Tape`, and run it. Included by ops.cpp, whose ops they repeat.
#pragma once

#include <ATen/ops/topk.h>

#include <memory>
#include <mutex>
#include <stdexcept>
#include <unordered_map>
#include <utility>
#include <vector>

#include "tape.h"

namespace {

using specmoe::put_result;
using specmoe::Tape;

class Tapes {
 public:
  int64_t enter(std::shared_ptr<Tape> tape) {
    const std::lock_guard<std::mutex> lock(mutex_);
    entries_[++count_] = std::move(tape);
    return count_;
  }
  void leave(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    entries_.erase(number);
  }
  std::shared_ptr<Tape> at(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return entries_.at(number);
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<Tape>> entries_;
  int64_t count_ = 0;
};

Tapes& tapes() {
  static auto* all = new Tapes();
  return *all;
}

int64_t tape_new(const at::Tensor& tokens, at::TensorList inputs, int64_t threads) {
  return tapes().enter(
      std::make_shared<Tape>(tokens, inputs.vec(), static_cast<int>(threads)));
}

void tape_delete(int64_t tape) { tapes().leave(tape); }

bool tape_run(int64_t tape, const at::Tensor& tokens) { return tapes().at(tape)->run(tokens); }

// `arguments`: addresses in `keep`, and integers.
void tape_loop(int64_t tape, int64_t function, at::IntArrayRef arguments, at::TensorList keep) {
  static constexpr auto loops =
      specmoe::loops_of(std::make_index_sequence<specmoe::kMaxArguments + 1>());
  if (arguments.size() > specmoe::kMaxArguments)
    throw std::runtime_error("a loop has too many arguments");
  tapes().at(tape)->add([given = arguments.vec(), kept = keep.vec(), loop = loops[arguments.size()],
                         address = reinterpret_cast<void*>(function)] {
    loop(address, given.data());
  });
}

void tape_top_k(int64_t tape, const at::Tensor& scores, int64_t k, int64_t dim, bool largest,
                bool sorted, at::TensorList outs) {
  tapes().at(tape)->add([=, to = outs.vec()] {
    const auto [values, ids] = at::topk(scores, k, dim, largest, sorted);
    put_result(to[0], values);
    put_result(to[1], ids);
  });
}

void tape_experts(int64_t tape, const Tensor& x, const Tensor& ids, const Tensor& weights,
                  int64_t session, int64_t layer, at::TensorList outs) {
  tapes().at(tape)->add([=, to = outs.vec()] {
    put_result(to[0], experts(x, ids, weights, session, layer));
  });
}

void tape_products(int64_t tape, const Tensor& x, at::TensorList weights, at::TensorList biases,
                   int64_t session, at::TensorList outs) {
  tapes().at(tape)->add(
      [=, all = weights.vec(), added = biases.vec(), to = outs.vec()] {
        const std::vector<Tensor> results = products(x, all, added, session);
        for (size_t i = 0; i < to.size(); i++) put_result(to[i], results[i]);
      });
}

void tape_attended_range(int64_t tape, const Tensor& mask, at::TensorList outs) {
  tapes().at(tape)->add(
      [=, to = outs.vec()] { put_result(to[0], attended_range(mask)); });
}

void tape_decode_attention(int64_t tape, const Tensor& q, const Tensor& k, const Tensor& v,
                           const Tensor& mask, const Tensor& bounds,
                           const std::optional<Tensor>& sinks, double scale,
                           at::TensorList outs) {
  tapes().at(tape)->add([=, to = outs.vec()] {
    put_result(to[0], decode_attention(q, k, v, mask, bounds, sinks, scale));
  });
}

}  // namespace

// Each `tape_NAME` records a call of NAME; the results of the call that Python made are the last.
TORCH_LIBRARY_FRAGMENT(specmoe, library) {
  library.def("tape_new(Tensor tokens, Tensor[] inputs, int threads) -> int", tape_new);
  library.def("tape_delete(int tape) -> ()", tape_delete);
  library.def("tape_run(int tape, Tensor tokens) -> bool", tape_run);
  library.def("tape_loop(int tape, int function, int[] arguments, Tensor[] keep) -> ()",
              tape_loop);
  library.def(
      "tape_topk(int tape, Tensor scores, int k, int dim, bool largest, bool sorted,"
      " Tensor[] outs) -> ()",
      tape_top_k);
  library.def(
      "tape_experts(int tape, Tensor x, Tensor ids, Tensor weights, int session, int layer,"
      " Tensor[] outs) -> ()",
      tape_experts);
  library.def(
      "tape_products(int tape, Tensor x, Tensor[] weights, Tensor[] biases, int session,"
      " Tensor[] outs) -> ()",
      tape_products);
  library.def("tape_attended_range(int tape, Tensor mask, Tensor[] outs) -> ()",
              tape_attended_range);
  library.def(
      "tape_decode_attention(int tape, Tensor q, Tensor k, Tensor v, Tensor mask, Tensor bounds,"
      " Tensor? sinks, float scale, Tensor[] outs) -> ()",
      tape_decode_attention);
}
