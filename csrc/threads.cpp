#include "threads.h"

#include <dlfcn.h>

namespace lte {

static struct {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  void (*barrier)();
  int (*rank)();
  int (*size)();
} pool;

template <class F>
static void find(F& function, const char* name) {
  function = reinterpret_cast<F>(dlsym(RTLD_DEFAULT, name));
}

bool find_pool() {
  static const bool found = [] {
    find(pool.parallel, "GOMP_parallel");
    find(pool.barrier, "GOMP_barrier");
    find(pool.rank, "omp_get_thread_num");
    find(pool.size, "omp_get_num_threads");
    return pool.parallel && pool.barrier && pool.rank && pool.size;
  }();
  return found;
}

int run_team(int threads, void (*body)(void*), void* context) {
  pool.parallel(body, context, unsigned(threads), 0);
  return 0;
}
int team_size() { return pool.size(); }
int team_rank() { return pool.rank(); }
void team_barrier() { pool.barrier(); }

}  // namespace lte
