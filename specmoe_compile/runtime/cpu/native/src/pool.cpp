#include "pool.h"

#include <chrono>
#include <system_error>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#endif

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace specmoe {
namespace {

using Clock = std::chrono::steady_clock;

// A worker looks for more work for so long before it is parked: longer than from one layer's experts
// to the next one's, since one that has to be woken comes too late for a tenth of a layer.
constexpr auto kSpin = std::chrono::microseconds(300);
// A chunk takes a few microseconds; who is that late has lost the core.
constexpr auto kLate = std::chrono::microseconds(40);

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Returns whether `done()` became true within `limit`.
template <class Done>
bool spin_until(Done done, Clock::duration limit) {
  const auto end = Clock::now() + limit;
  do {
    for (int i = 0; i < 32; i++) {
      if (done()) return true;
      relax();
    }
  } while (Clock::now() < end);
  return done();
}

}  // namespace

#if defined(__linux__)

void Parking::sleep(uint32_t ticket) {
  sleepers_.fetch_add(1);
  syscall(SYS_futex, &count_, FUTEX_WAIT_PRIVATE, ticket, nullptr, nullptr, 0);
  sleepers_.fetch_sub(1);
}

void Parking::wake() {
  count_.fetch_add(1);
  if (sleepers_.load() > 0) syscall(SYS_futex, &count_, FUTEX_WAKE_PRIVATE, INT_MAX);
}

#else

void Parking::sleep(uint32_t ticket) {
  std::unique_lock<std::mutex> lock(mutex_);
  sleepers_.fetch_add(1);
  changed_.wait(lock, [&] { return count_.load() != ticket; });
  sleepers_.fetch_sub(1);
}

void Parking::wake() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    count_.fetch_add(1);
  }
  if (sleepers_.load() > 0) changed_.notify_all();
}

#endif

void Offer::reset(Work* work, int64_t chunks, int64_t threads) {
  if (chunks > capacity_) {
    states_ = std::make_unique<std::atomic<uint8_t>[]>(static_cast<size_t>(chunks));
    capacity_ = chunks;
  }
  for (int64_t i = 0; i < chunks; i++) states_[i].store(0, std::memory_order_relaxed);
  work_ = work;
  chunks_ = chunks;
  threads_ = threads;
  next_.store(0, std::memory_order_relaxed);
}

void Offer::run_chunk(int64_t chunk, int64_t next, Scratch& scratch) {
  scratch.next = next;
  work_->compute(chunk, scratch);
  scratch.computed++;
  uint8_t open = 0;
  if (!states_[chunk].compare_exchange_strong(open, 1)) return;
  work_->publish(chunk, scratch);
  states_[chunk].store(2, std::memory_order_release);
}

// Waits for chunks, and computes those that are late.
void Offer::await(int64_t first, int64_t second, Scratch& scratch) {
  for (int64_t chunk = first; chunk < second; chunk++) {
    while (!is_done(chunk)) {
      if (spin_until([&] { return is_done(chunk); }, kLate)) break;
      if (states_[chunk].load() == 0)
        run_chunk(chunk, chunks_, scratch);
      else
        std::this_thread::yield();  // whoever publishes it has lost the core: a rare case
    }
  }
}

void Offer::take_part(Scratch& scratch) {
  while (true) {
    const int64_t chunk = next_.fetch_add(1);
    if (chunk >= chunks_) return;
    int64_t first = 0, second = 0;
    work_->needs(chunk, &first, &second);
    await(first, second, scratch);
    // Chunks take about as long as each other, so that threads take them in turns.
    if (!is_done(chunk)) run_chunk(chunk, chunk + threads_, scratch);
  }
}

void Offer::finish(Scratch& scratch) { await(0, chunks_, scratch); }

Pool::Pool(int threads) {
  workers_.reserve(static_cast<size_t>(threads));
  try {
    for (int i = 1; i < threads; i++) workers_.emplace_back([this] { serve(); });
  } catch (const std::system_error&) {
    // The system has no more threads: those that there are do the work, the caller alone if need be.
  }
}

Pool::~Pool() {
  closing_.store(true);
  parking_.wake();
  for (std::thread& worker : workers_) worker.join();
}

void Pool::run(Offer& offer, Work& work, int64_t chunks, bool alone) {
  const bool is_single = workers_.empty() || alone || chunks < 2;
  offer.reset(&work, chunks, is_single ? 1 : threads());
  if (is_single) {
    offer.take_part(scratch_);
    return;
  }
  open_.store(&offer);
  parking_.wake();
  offer.take_part(scratch_);
  offer.finish(scratch_);
  open_.store(nullptr);
}

Offer* Pool::wait_for_offer_or_null() {
  Offer* offer = nullptr;
  const auto found = [&] { return (offer = open_.load()) != nullptr || closing_.load(); };
  if (spin_until(found, kSpin)) return offer;
  const uint32_t ticket = parking_.ticket();
  if (!found()) parking_.sleep(ticket);
  return offer;
}

void Pool::serve() {
  Scratch scratch;
  while (!closing_.load()) {
    Offer* offer = wait_for_offer_or_null();
    if (offer == nullptr) continue;
    offer->users_.fetch_add(1);
    // It may have been closed, and even been filled anew, in between.
    const bool is_open = open_.load() == offer;
    if (is_open) offer->take_part(scratch);
    offer->users_.fetch_sub(1);
    if (is_open) spin_until([&] { return open_.load() != offer; }, kSpin);
  }
}

}  // namespace specmoe
