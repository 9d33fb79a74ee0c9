// Runs work on the OpenMP pool that torch already has: the pool is looked up at run time, never linked, so there is
// no second one to spin against it.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>

namespace lte {

bool find_pool();  // true when torch's OpenMP runtime is in the process
int run_team(int threads, void (*body)(void*), void* context);
int team_size();
int team_rank();
void team_barrier();

// body(rank, size) on every thread of a team of at most `threads`; ends with all of them.
template <class Body>
void parallel(int threads, Body&& body) {
  if (threads <= 1 || !find_pool()) {
    body(0, 1);
    return;
  }
  run_team(
      threads, [](void* context) { (*static_cast<std::remove_reference_t<Body>*>(context))(team_rank(), team_size()); },
      &body);
}

// Hands out [0, total) in pieces. A thread goes through a stretch of its own in order, because what it reads is then one
// stream that the processor and the kernels fetch ahead of; one that is through takes over what is left of others'
// stretches, so that a disturbed core does not hold the others up.
constexpr int STRETCHES = 16;  // at most; with more threads, some share theirs
struct Queue {
  struct alignas(64) Counter {
    std::atomic<int64_t> next{0};
  };
  Counter counters[STRETCHES];

  void reset(int size) {
    for (int i = 0; i < std::min(size, STRETCHES); ++i) counters[i].next.store(0, std::memory_order_relaxed);
  }
};
struct Work {
  Queue& queue;
  int rank, stretches;

  bool take(int64_t total, int64_t& item) {
    for (int tries = 0; tries < stretches; ++tries) {
      const int mine = (rank + tries) % stretches;
      const int64_t first = mine * total / stretches, count = (mine + 1) * total / stretches - first;
      std::atomic<int64_t>& next = queue.counters[mine].next;
      if (next.load(std::memory_order_relaxed) >= count) continue;
      item = next.fetch_add(1, std::memory_order_relaxed);
      if (item >= count) continue;
      item += first;
      return true;
    }
    return false;
  }
};

}  // namespace lte
