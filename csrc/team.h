// What threads work with: buffers that are kept, a team that goes through phases, and what each thread has of its own.
// Part of kernels.cpp, in its namespace.

// A buffer that grows and is kept: the decode loop allocates nothing.
template <class T>
struct Buffer {
  T* data = nullptr;
  size_t capacity = 0;
  ~Buffer() { std::free(data); }
  T* get(size_t n) {
    if (n > capacity) {
      std::free(data);
      capacity = (n + 1024) / 64 * 64 + 64;
      data = static_cast<T*>(std::aligned_alloc(64, (capacity * sizeof(T) + 63) / 64 * 64));
      if (!data) throw std::bad_alloc();
    }
    return data;
  }
};

// What a phase rounds for the next one, for every token.
struct Rounded {
  Buffer<int8_t> values;
  Buffer<float> scales;
  Buffer<int32_t> sums;
  Buffer<RoundedInputs> inputs;

  void get(int64_t tokens, int64_t groups, int64_t group) {
    int8_t* its = values.get(tokens * groups * group);
    float* each = scales.get(tokens * groups);
    int32_t* of_each = sums.get(tokens * groups);
    RoundedInputs* all = inputs.get(tokens);
    for (int64_t t = 0; t < tokens; ++t)
      all[t] = {its + t * groups * group, each + t * groups, of_each + t * groups};
  }
};

// One team of threads going through phases that end in a barrier. Each phase hands out its work from a queue; there
// are four in rotation, and the one used two phases ago is known to be idle.
struct Team {
  int rank, size;
  Queue* queues;
  Rounded* rounded;
  int phase = 0;

  Work begin() {
    Queue& queue = queues[phase % 4];
    if (rank == 0) queues[(phase + 2) % 4].reset(size);
    ++phase;
    return {queue, rank, std::min(size, lte::STRETCHES)};
  }
  void end() const {
    if (size > 1) lte::team_barrier();
  }
};

template <class Body>
static void with_team(int threads, Body&& body) {
  static thread_local Rounded own;
  Rounded& rounded = own;
  Queue queues[4];
  parallel(threads, [&](int rank, int size) {
    Team team{rank, size, queues, &rounded};
    body(team);
  });
}

template <class W>
static void to_split(const W* x, int64_t n, float* out) {
  if constexpr (PAIRED<W>)
    std::memcpy(out, x, n * sizeof(W));
  else
    for (int64_t i = 0; i < n; ++i) put<W>(out, i, n, widen(x[i]));
}

struct Chosen;
struct ThreadScratch {
  Buffer<float> gate, up, linear, attention;
  Buffer<float*> rows;
  Buffer<const int8_t*> values;
  Buffer<RoundedInputs> inputs;
  Buffer<int32_t> neurons, factors;
  Buffer<Chosen> chosen;
};
static ThreadScratch& thread_scratch() {
  static thread_local ThreadScratch scratch;
  return scratch;
}
