// Which `Steps` a graph means by its session's number, and the bodies of the ops.
#include <exception>
#include <mutex>
#include <unordered_map>

#include "steps.h"

namespace specmoe {
namespace {

std::mutex table_mutex;
std::unordered_map<int64_t, std::shared_ptr<Steps>>& table() {
  static auto* entries = new std::unordered_map<int64_t, std::shared_ptr<Steps>>();
  return *entries;
}

std::shared_ptr<Steps> steps_or_null(int64_t handle) {
  const std::lock_guard<std::mutex> lock(table_mutex);
  const auto found = table().find(handle);
  return found == table().end() ? nullptr : found->second;
}

// Those of any session: a process has one engine.
std::shared_ptr<Steps> any_steps_or_null() {
  const std::lock_guard<std::mutex> lock(table_mutex);
  return table().empty() ? nullptr : table().begin()->second;
}

// What a session's steps return; 0, which means Python, without any, or where memory ran out.
template <typename Result, typename Body>
Result of_session(int64_t handle, Body body) {
  try {
    const std::shared_ptr<Steps> steps = steps_or_null(handle);
    return steps ? static_cast<Result>(body(*steps)) : 0;
  } catch (const std::exception&) {
    return 0;
  }
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

const StepFunctions& step_functions() {
  static const StepFunctions functions = {
      [](int64_t session, int64_t layer, const StepCall* call) {
        return of_session<int32_t>(session, [&](Steps& s) { return s.experts(layer, *call); });
      },
      [](int64_t session, int64_t layer, const StepCall* call) {
        return of_session<int64_t>(session, [&](Steps& s) { return s.start(layer, *call); });
      },
      [](int64_t session, int64_t layer, const StepCall* call, int64_t ticket) {
        return of_session<int64_t>(session,
                                   [&](Steps& s) { return s.settle(layer, *call, ticket); });
      },
      [](int64_t session, int64_t layer, const StepCall* call, int64_t state) {
        return of_session<int32_t>(session, [&](Steps& s) { return s.run(layer, *call, state); });
      },
      [](int64_t session, int64_t layer, const StepCall* call, int64_t state) {
        return of_session<int32_t>(session,
                                   [&](Steps& s) { return s.correct(layer, *call, state); });
      },
      [](int64_t session, int64_t layer, const StepCall* call) {
        return of_session<int32_t>(session, [&](Steps& s) { return s.blend(layer, *call); });
      },
      [](int64_t session, const int64_t* layers, int64_t count, const int64_t* edges,
         int64_t edge_count, uint8_t* answers) {
        return of_session<int32_t>(
            session, [&](Steps& s) { return s.plan(layers, count, edges, edge_count, answers); });
      },
      [](int64_t session, const ProductsCall* call) {
        return of_session<int32_t>(session, [&](Steps& s) { return s.products(*call); });
      },
      [](const AttentionCall* call) {
        try {
          const std::shared_ptr<Steps> steps = any_steps_or_null();
          if (steps) steps->attend(*call);
          return static_cast<int32_t>(steps != nullptr);
        } catch (const std::exception&) {
          return 0;
        }
      },
  };
  return functions;
}

}  // namespace specmoe
