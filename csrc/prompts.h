// Many tokens at once. Experts take turns, each with its own tokens: some of its weights are put into a panel, which lies
// as products of them with one token after the other read it, and serves all of these. Part of kernels.cpp, in its
// namespace.

constexpr int64_t MANY = BF16_DOT ? 5 : 16;  // tokens from which it pays
constexpr int WIDE = VL == 16 ? 4 : 2;      // vectors of a tile: of neurons, or of columns of the output
constexpr int TALL = 6;                     // its tokens
constexpr int64_t HANDFUL = 64;             // tokens of an expert up to which its rows are read as they lie
constexpr int64_t DEPTH = 512;              // lanes of a panel, one after the other
template <class W>
constexpr int64_t LANE = PAIRED<W> ? 2 : 1;  // numbers of a row that a lane holds: two bf16, or a float

// Which networks go this way: those of floats, whose experts are not single neurons.
static bool fits_panels(const lte_ffn& ffn) {
  return !ffn.up.low.planes && !ffn.nested.down.codes && (ffn.n_experts == 1 || ffn.d_ff / ffn.n_experts >= ROWS);
}

// Rows of which a panel is made next: some of their columns are asked for while the panel at hand is multiplied. They lie
// so far apart that the processor does not see them coming.
template <class W>
struct Ahead {
  const W* const* rows = nullptr;
  int64_t count = 0, from = 0;

  void fetch(int64_t lane) const {
    for (int64_t i = lane * LANE<W>; i < std::min(count, (lane + 1) * LANE<W>); ++i)
      for (int64_t byte = 0; byte < WIDE * VL * int64_t(sizeof(W)); byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(rows[i] + from) + byte, 0, 2);
  }
};

// out[t][v] (+)= sum over lanes k of panel[k][v] * x[t][k], for T tokens and V vectors.
template <class W, int T, int V>
static void panel_tile(const float* panel, int64_t depth, const float* const* x, float* const* out, bool add,
                       const Ahead<W>& ahead = {}) {
  vf acc[T][V] = {};
  if (add)
    for (int t = 0; t < T; ++t)
      for (int v = 0; v < V; ++v) acc[t][v] = load(out[t] + v * VL);
  for (int64_t k = 0; k < depth; ++k, panel += V * VL) {
    if (ahead.count) ahead.fetch(k);
    vf weights[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) weights[v] = load(panel + v * VL);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      if constexpr (PAIRED<W>) {
        uint32_t pair;
        std::memcpy(&pair, x[t] + k, sizeof pair);
        const vu lanes = pair - vu{};
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[t][v] = dot_pairs(acc[t][v], (vu)weights[v], lanes);
      } else {
        const vf lanes = splat(x[t][k]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[t][v] += weights[v] * lanes;
      }
    }
  }
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < V; ++v) store(out[t] + v * VL, acc[t][v]);
}

template <class W, int V>
static void panel_tiles(const float* panel, int64_t depth, const float* const* x, float* const* out, int64_t tokens,
                        bool add, const Ahead<W>& ahead = {}) {
  int64_t t = 0;
  for (; t + TALL <= tokens; t += TALL) panel_tile<W, TALL, V>(panel, depth, x + t, out + t, add, t ? Ahead<W>() : ahead);
  const Ahead<W> rest = t ? Ahead<W>() : ahead;
  switch (tokens - t) {
    case 1: return panel_tile<W, 1, V>(panel, depth, x + t, out + t, add, rest);
    case 2: return panel_tile<W, 2, V>(panel, depth, x + t, out + t, add, rest);
    case 3: return panel_tile<W, 3, V>(panel, depth, x + t, out + t, add, rest);
    case 4: return panel_tile<W, 4, V>(panel, depth, x + t, out + t, add, rest);
    case 5: return panel_tile<W, 5, V>(panel, depth, x + t, out + t, add, rest);
  }
}

// VL vectors become their own columns.
INLINE void transpose(vu* rows) {
#pragma GCC unroll 4
  for (int step = 1; step < VL; step *= 2) {
    vu low, high;
    for (int j = 0; j < VL; ++j) low[j] = j & step ? VL + j - step : j, high[j] = j & step ? VL + j : j + step;
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i) {
      if (i & step) continue;
      const vu a = rows[i], b = rows[i + step];
#if defined(__clang__)
      for (int j = 0; j < VL; ++j) {
        rows[i][j] = j & step ? b[j - step] : a[j];
        rows[i + step][j] = j & step ? b[j] : a[j + step];
      }
#else
      rows[i] = __builtin_shuffle(a, b, low), rows[i + step] = __builtin_shuffle(a, b, high);
#endif
    }
  }
}

// Lane k of a row of weights, as a panel has it; of bf16 the second number is 0 where the row has ended.
template <class W>
INLINE uint32_t lane_of(const W* row, int64_t k, int64_t n) {
  uint32_t bits = 0;
  if constexpr (PAIRED<W>) {
    std::memcpy(&bits, row + 2 * k, std::min<int64_t>(n - 2 * k, 2) * sizeof(W));
  } else {
    const float value = widen(row[k]);
    std::memcpy(&bits, &value, sizeof bits);
  }
  return bits;
}

// Rows as the vectors of a panel: panel[k][i] = rows[i][from + k], 0 for rows that are none.
template <class W>
static void pack_rows(const W* const* rows, int64_t n, int64_t from, int64_t depth, int vectors, float* panel) {
  for (int v = 0; v < vectors; ++v) {
    for (int64_t k = 0; k < depth; k += VL) {
      const int64_t count = std::min<int64_t>(VL, depth - k);
      vu lanes[VL];
      for (int i = 0; i < VL; ++i) {
        const W* row = rows[v * VL + i];
        lanes[i] = vu{};
        if (!row) continue;
        if (count == VL && (from + k + VL) * LANE<W> <= n && (PAIRED<W> || std::is_same_v<W, float>)) {
          lanes[i] = *reinterpret_cast<const vu_any*>(row + (from + k) * LANE<W>);
        } else {
          for (int64_t j = 0; j < count; ++j) lanes[i][j] = lane_of(row, from + k + j, n);
        }
      }
      transpose(lanes);
      for (int64_t j = 0; j < count; ++j) store(panel + ((k + j) * vectors + v) * VL, (vf)lanes[j]);
    }
  }
}

// Columns [from, from + WIDE * VL) of some rows as the vectors of a panel: lane k holds row k, or rows 2 k and 2 k + 1.
template <class W>
static void pack_columns(const W* const* rows, int64_t count, int64_t from, int64_t to, float* panel) {
  constexpr int64_t width = WIDE * VL;
  for (int64_t k = 0; k * LANE<W> < count; ++k, panel += width) {
    const W* first = rows[k * LANE<W>] + from;
    const W* second = k * LANE<W> + 1 < count ? rows[k * LANE<W> + 1] + from : nullptr;
    for (int64_t i = 0; i < to - from; ++i) {
      if constexpr (PAIRED<W>) {
        const uint32_t bits = uint32_t(first[i]) | (second ? uint32_t(second[i]) << 16 : 0);
        std::memcpy(panel + i, &bits, sizeof bits);
      } else {
        panel[i] = widen(first[i]);
      }
    }
    std::fill(panel + to - from, panel + width, 0.0f);
  }
}

// y[t][i] += sum over pairs p of rows of (rows[2 p][i], rows[2 p + 1][i]) * x[t][p], for i in [from, to), from a multiple
// of STEP; y is in split order: of two words of 32 bits the lower halves are one pair's columns, the upper ones the next's.
template <int P>
static void scale_pairs(const bf16* const* rows, bool odd, const float* const* x, int64_t tokens, int64_t from, int64_t to,
                        float* const* y) {
  int64_t k = from;
  for (; k + STEP <= to; k += STEP) {
    vu low[P], high[P];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      const vu a = *reinterpret_cast<const vu_any*>(rows[2 * p] + k);
      const vu b = odd && p == P - 1 ? vu{} : *reinterpret_cast<const vu_any*>(rows[2 * p + 1] + k);
      low[p] = (a & 0xffff) | (b << 16), high[p] = (a >> 16) | (b & 0xffff0000u);
    }
    for (int64_t t = 0; t < tokens; ++t) {
      vf even = load(y[t] + k), other = load(y[t] + k + VL);
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        uint32_t pair;
        std::memcpy(&pair, x[t] + p, sizeof pair);
        const vu lanes = pair - vu{};
        even = dot_pairs(even, low[p], lanes), other = dot_pairs(other, high[p], lanes);
      }
      store(y[t] + k, even), store(y[t] + k + VL, other);
    }
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int r = 0; r < 2 * P - odd; ++r)
      for (int64_t i = k; i < to; ++i) y[t][i] += widen(reinterpret_cast<const bf16*>(x[t])[r]) * widen(rows[r][i]);
}

struct Panels {
  Buffer<float> panel, sums;
  Buffer<const float*> x;
  Buffer<float*> out;
};

// Products of V * VL rows of n numbers, of which some may be none, with some tokens, which stay in mine.out: [its][V * VL].
template <class W, int V>
static void panel_products(const W* const* rows, int64_t n, const float* xs, int64_t xs_stride, const int32_t* who,
                           int64_t its, Panels& mine) {
  const int64_t lanes = (n + LANE<W> - 1) / LANE<W>;
  float* panel = mine.panel.get(DEPTH * V * VL);
  float* sums = mine.sums.get(its * V * VL);
  const float** x = mine.x.get(its);
  float** out = mine.out.get(its);
  for (int64_t i = 0; i < its; ++i) out[i] = sums + i * V * VL;
  for (int64_t from = 0; from < lanes; from += DEPTH) {
    const int64_t depth = std::min(DEPTH, lanes - from);
    pack_rows(rows, n, from, depth, V, panel);
    for (int64_t i = 0; i < its; ++i) x[i] = xs + (who ? who[i] : i) * xs_stride + from;
    panel_tiles<W, V>(panel, depth, x, out, its, from > 0);
  }
}

// The same for some tokens, from the rows as they lie: panels pay later.
template <class W, int V>
static void row_products(const W* const* rows, int64_t n, const float* xs, int64_t xs_stride, const int32_t* who,
                         int64_t its, Panels& mine) {
  constexpr int R = 4;
  const int64_t stride = (n + STEP - 1) / STEP * STEP;
  float* x = mine.panel.get(its * stride);
  float* sums = mine.sums.get(its * V * VL);
  float** out = mine.out.get(its);
  for (int64_t i = 0; i < its; ++i) {
    std::memcpy(x + i * stride, xs + who[i] * xs_stride, n * sizeof(W));
    out[i] = sums + i * V * VL;
  }
  for (int64_t r = 0; r < V * VL; r += R) {
    float found[R * HANDFUL] = {};
    if (rows[r + R - 1])
      dot_rows<R>(rows + r, x, stride, its, n, found, its);
    else
      for (int64_t i = 0; i < R && rows[r + i]; ++i) dot_rows<1>(rows + r + i, x, stride, its, n, found + i * its, its);
    for (int64_t i = 0; i < R; ++i)
      for (int64_t t = 0; t < its; ++t) out[t][r + i] = found[i * its + t];
  }
}

// gate and up of neurons first .. first + count of an expert, for its tokens; hidden: [its, stride] numbers as x has them.
template <class W, int V>
static void prompt_unit(const lte_ffn& ffn, int64_t first, int64_t count, const float* xs, int64_t xs_stride,
                        const int32_t* who, int64_t its, const float* by, Panels& mine, float* hidden, int64_t stride) {
  const bool gated = ffn.gate.weight;
  const int64_t half = gated ? V / 2 * VL : 0;
  const W* rows[V * VL] = {};
  auto point = [&](const lte_matrix& matrix, int64_t at) {
    for (int64_t i = 0; i < count; ++i) rows[at + i] = static_cast<const W*>(matrix.weight) + (first + i) * matrix.stride;
  };
  if (gated) point(ffn.gate, 0);
  point(ffn.up, half);
  if (its <= HANDFUL && (PAIRED<W> || std::is_same_v<W, float>))
    row_products<W, V>(rows, ffn.d_model, xs, xs_stride, who, its, mine);
  else
    panel_products<W, V>(rows, ffn.d_model, xs, xs_stride, who, its, mine);
  const W *gate_bias = static_cast<const W*>(ffn.gate.bias), *up_bias = static_cast<const W*>(ffn.up.bias);
  for (int64_t t = 0; t < its; ++t) {
    float* values = mine.out.data[t];
    for (int64_t i = 0; gated && gate_bias && i < count; ++i) values[i] += widen(gate_bias[first + i]);
    for (int64_t i = 0; up_bias && i < count; ++i) values[half + i] += widen(up_bias[first + i]);
    activate_all(ffn.activation, values, gated ? values + half : nullptr, gated ? half : V * VL);
    const float factor = by[who[t] * ffn.n_experts];
    for (int64_t i = 0; i < count; ++i) {
      if constexpr (PAIRED<W>)
        narrow(values[i] * factor, reinterpret_cast<bf16*>(hidden + t * stride) + i);
      else
        hidden[t * stride + i] = values[i] * factor;
    }
  }
}

static Panels& panels() {
  static thread_local Panels mine;
  return mine;
}

// The experts that a linear router has above its threshold; x: [tokens, stride] float32.
static void prompt_router(Team& team, const lte_ffn& ffn, const float* x, int64_t stride, int64_t tokens, FfnWork& work) {
  constexpr int64_t width = WIDE * VL;
  team.begin();
  if (team.rank == 0) work.scale.get(tokens * ffn.n_experts);
  team.end();
  Work queue = team.begin();
  const float* bias = static_cast<const float*>(ffn.router.bias);
  for (int64_t unit; queue.take((ffn.n_experts + width - 1) / width, unit);) {
    const float* rows[width] = {};
    const int64_t first = unit * width, count = std::min(width, ffn.n_experts - first);
    for (int64_t i = 0; i < count; ++i) rows[i] = static_cast<const float*>(ffn.router.weight) + (first + i) * ffn.router.stride;
    panel_products<float, WIDE>(rows, ffn.d_model, x, stride, nullptr, tokens, panels());
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < count; ++i) {
        const float logit = panels().out.data[t][i] + (bias ? bias[first + i] : 0.0f);
        work.scale.data[t * ffn.n_experts + first + i] = runs(ffn, logit);
      }
  }
  team.end();
}

// The down projection of a handful of tokens: every thread reads its columns of the rows as they lie, 16 rows at a time.
template <class Emit>
static void down_by_pairs(Team& team, const lte_ffn& ffn, const float* hidden, int64_t stride, int64_t tokens,
                          FfnWork& work, Emit&& emit) {
  constexpr int PAIRS = 8;
  constexpr int64_t widest = 2048;
  const int64_t D = ffn.d_model, n = ffn.d_ff / ffn.n_experts, slices = std::max<int64_t>(team.size, (D + widest - 1) / widest);
  const int64_t width = ((D + slices - 1) / slices + STEP - 1) / STEP * STEP;
  const int64_t room = width + VL;  // rows of sums a power of two apart would share the same lines of the cache
  const int32_t *begin = work.begin.data, *list = work.tokens.data;
  Panels& mine = panels();
  Work queue = team.begin();
  for (int64_t slice; queue.take((D + width - 1) / width, slice);) {
    const int64_t from = slice * width, to = std::min(D, from + width);
    float* sums = mine.sums.get(tokens * room);
    std::fill(sums, sums + tokens * room, 0.0f);
    for (int64_t a = 0; a < work.n_groups; ++a) {
      const int64_t its = begin[a + 1] - begin[a];
      const float** x = mine.x.get(its);
      float** y = mine.out.get(its);
      for (int64_t i = 0; i < its; ++i) y[i] = sums + list[begin[a] + i] * room - from;
      for (int64_t r = 0; r < n;) {
        const int64_t count = n - r >= 2 * PAIRS ? 2 * PAIRS : std::min<int64_t>(2, n - r);
        const bf16* rows[2 * PAIRS];
        for (int64_t i = 0; i < count; ++i)
          rows[i] = static_cast<const bf16*>(ffn.down.weight) + (work.experts.data[a] * n + r + i) * ffn.down.stride;
        for (int64_t i = 0; i < its; ++i) x[i] = hidden + (begin[a] + i) * stride + r / 2;
        if (count == 2 * PAIRS)
          scale_pairs<PAIRS>(rows, false, x, its, from, to, y);
        else
          scale_pairs<1>(rows, count == 1, x, its, from, to, y);
        r += count;
      }
    }
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = from; i < to; ++i) emit(t, i, sums[t * room + split_index(i, D, (const bf16*)nullptr) - from]);
  }
  team.end();
}

template <class W, class Emit>
static void prompt_phases(Team& team, const lte_ffn& ffn, const float* xs, int64_t xs_stride, int64_t tokens,
                          FfnWork& work, Emit&& emit) {
  Panels& mine = panels();
  const int64_t E = ffn.n_experts, D = ffn.d_model, n = ffn.d_ff / E;
  const int64_t stride = (n + LANE<W> - 1) / LANE<W>;  // of a token's hidden numbers, in lanes
  team.begin();
  if (team.rank == 0) {
    list_experts(ffn, tokens, work);
    const int64_t found = work.begin.data[work.n_groups] * stride;
    float* hidden = work.hidden.get(found + VL);
    if (n % LANE<W>) std::fill(hidden, hidden + found, 0.0f);  // the second half of a last pair
  }
  team.end();
  const int32_t *begin = work.begin.data, *list = work.tokens.data;
  float* hidden = work.hidden.data;
  {
    Work queue = team.begin();
    const int64_t most = (ffn.gate.weight ? WIDE / 2 : WIDE) * VL, blocks = (n + most - 1) / most;
    for (int64_t unit; queue.take(work.n_groups * blocks, unit);) {
      const int64_t a = unit / blocks, at = unit % blocks * most, count = std::min(most, n - at);
      const int64_t e = work.experts.data[a], its = begin[a + 1] - begin[a];
      auto run = count * 2 <= most ? prompt_unit<W, WIDE / 2 < 2 ? 2 : WIDE / 2> : prompt_unit<W, WIDE>;
      run(ffn, e * n + at, count, xs, xs_stride, list + begin[a], its, work.scale.data + e, mine,
          hidden + begin[a] * stride + at / LANE<W>, stride);
    }
    team.end();
  }
  if constexpr (PAIRED<W>)
    if (tokens <= HANDFUL) return down_by_pairs(team, ffn, hidden, stride, tokens, work, emit);
  constexpr int64_t width = WIDE * VL;
  const int64_t slices = (D + width - 1) / width;
  Work queue = team.begin();
  for (int64_t slice; queue.take(slices, slice);) {
    const int64_t from = slice * width, to = std::min(D, from + width);
    float* sums = mine.sums.get(tokens * width);
    float* panel = mine.panel.get(DEPTH * width);
    std::fill(sums, sums + tokens * width, 0.0f);
    const W *both[2][DEPTH], **rows = both[0], **next = both[1];
    auto point = [&](int64_t a, int64_t at, const W** to) {
      const int64_t count = a < work.n_groups ? std::min(DEPTH, n - at) : 0;
      const W* first = static_cast<const W*>(ffn.down.weight);
      for (int64_t i = 0; i < count; ++i) to[i] = first + (work.experts.data[a] * n + at + i) * ffn.down.stride;
      return count;
    };
    for (int64_t a = 0, at = 0, count = point(a, at, rows); count;) {
      const bool last = at + DEPTH >= n;
      const int64_t its = begin[a + 1] - begin[a], next_at = last ? 0 : at + DEPTH;
      const Ahead<W> ahead{next, point(a + last, next_at, next), from};
      const float** x = mine.x.get(its);
      float** out = mine.out.get(its);
      for (int64_t i = 0; i < its; ++i) {
        x[i] = hidden + (begin[a] + i) * stride + at / LANE<W>;
        out[i] = sums + list[begin[a] + i] * width;
      }
      pack_columns(rows, count, from, to, panel);
      panel_tiles<W, WIDE>(panel, (count + LANE<W> - 1) / LANE<W>, x, out, its, true, ahead);
      a += last, at = next_at, count = ahead.count;
      std::swap(rows, next);
    }
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = from; i < to; ++i) emit(t, i, sums[t * width + i - from]);
  }
  team.end();
}
