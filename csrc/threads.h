// Runs work on the OpenMP pool that torch already has: the pool is looked up at run time, never linked, so there is
// no second one to spin against it.
#pragma once
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

// Hands out [0, total) in pieces; whoever is free takes the next, so that a disturbed core does not hold the others up.
struct Queue {
  std::atomic<int64_t> next{0};
  bool take(int64_t total, int64_t& item) {
    item = next.fetch_add(1, std::memory_order_relaxed);
    return item < total;
  }
};

}  // namespace lte
