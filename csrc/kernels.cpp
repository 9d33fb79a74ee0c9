// The kernels, compiled once per instruction set (LTE_VARIANT is the namespace of this copy; see setup.py).
#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>

#include "lte.h"
#include "lowbit.h"
#include "threads.h"
#include "tiles.h"
#include "variant.h"

namespace LTE_VARIANT {

using lte::Queue;
using lte::Work;
using lte::parallel;

#include "team.h"
#include "linear.h"

// ---- feed-forward network -------------------------------------------------------------------------------------

constexpr int64_t FEW = 4;     // tokens up to which the down projection is read row by row
constexpr int64_t PARTS = 16;  // partial sums it then makes
constexpr int64_t LISTED = 256;  // small experts that a thread lists at a time

// What the threads share while one FFN runs. Neurons are worked on in groups: the active experts, each for its own
// tokens; or, where experts are smaller than the rows that are read side by side, the neurons of all active experts
// as one group, for all tokens (what a token does not use is multiplied by zero).
struct FfnWork {
  Buffer<float> scale;      // [tokens, n_experts], 0 where the expert does not run
  Buffer<float> hidden;     // per group: [its tokens, its neurons]
  Buffer<float> out;        // [tokens, out_stride], split order
  Buffer<int32_t> experts;  // active experts
  Buffer<int32_t> begin;    // [groups + 1], where a group's tokens begin in `tokens`
  Buffer<int32_t> tokens;
  Buffer<int32_t> neurons, found;  // of the one group; and what every block of experts found of them
  Buffer<int32_t> counts;
  Buffer<int8_t> rounded;  // hidden, for a down projection of few bits; and a scale and a sum for every chunk of it
  Buffer<float> scales;
  Buffer<int32_t> sums;
  int64_t n_groups = 0, group_size = 0, out_stride = 0;
  bool scattered = false;

  int64_t neuron(int64_t group, int64_t i) const {
    return scattered ? neurons.data[i] : experts.data[group] * group_size + i;
  }
};

static void list_experts(const lte_ffn& ffn, int64_t tokens, FfnWork& work) {
  int64_t E = ffn.n_experts, found = 0, active = 0;
  const float* scale = work.scale.get(tokens * E);
  int32_t* experts = work.experts.get(E);
  int32_t* begin = work.begin.get(E + 1);
  int32_t* list = work.tokens.get(tokens * E);
  for (int64_t e = 0; e < E; ++e) {
    int64_t before = found;
    for (int64_t t = 0; t < tokens; ++t)
      if (scale[t * E + e] != 0.0f) list[found++] = int32_t(t);
    if (found == before) continue;
    experts[active] = int32_t(e);
    begin[active++] = int32_t(before);
  }
  begin[active] = int32_t(found);
  work.n_groups = active;
  work.group_size = ffn.d_ff / E;
  work.hidden.get(found * work.group_size + VL);
}

// The neurons of all experts that any token uses, in order: every block of experts lists its own, and they are then put
// side by side.
static void list_neurons(Team& team, const lte_ffn& ffn, int64_t tokens, FfnWork& work) {
  const int64_t E = ffn.n_experts, n = ffn.d_ff / E, blocks = (E + LISTED - 1) / LISTED;
  const float* scale = work.scale.data;
  int32_t *found = work.found.data, *counts = work.counts.data;
  {
    Work queue = team.begin();
    for (int64_t block; queue.take(blocks, block);) {
      int32_t* mine = found + block * LISTED * n;
      int64_t count = 0;
      for (int64_t e = block * LISTED; e < std::min(E, (block + 1) * LISTED); ++e) {
        bool used = false;
        for (int64_t t = 0; t < tokens; ++t) used |= scale[t * E + e] != 0.0f;
        for (int64_t i = 0; i < n; ++i) mine[count + i] = int32_t(e * n + i);
        count += used ? n : 0;
      }
      counts[block] = int32_t(count);
    }
    team.end();
  }
  Work queue = team.begin();
  for (int64_t block; queue.take(blocks, block);) {
    int64_t before = 0;
    for (int64_t other = 0; other < block; ++other) before += counts[other];
    std::memcpy(work.neurons.data + before, found + block * LISTED * n, counts[block] * sizeof(int32_t));
    if (block == blocks - 1) work.group_size = before + counts[block];
  }
  team.end();
}

static void list_groups(Team& team, const lte_ffn& ffn, int64_t tokens, FfnWork& work) {
  const int64_t E = ffn.n_experts;
  team.begin();
  if (team.rank == 0) {
    work.scattered = ffn.d_ff / E < ROWS && E > 1;
    constexpr int64_t whole = std::max<int64_t>(STEP, TOGETHER);  // what a vector, or a block of rows, writes
    work.out_stride = (ffn.d_model + whole - 1) / whole * whole;
    work.out.get((tokens <= FEW ? PARTS : 1) * tokens * work.out_stride);
    if (work.scattered) {
      // Blocks write whole experts before they know whether to keep them, hence the room behind the last.
      work.found.get(ffn.d_ff + LISTED * ROWS);
      work.neurons.get(ffn.d_ff);
      work.counts.get(E / LISTED + 1);
      work.hidden.get(tokens * ffn.d_ff + VL);
      work.n_groups = 1;
      int32_t *begin = work.begin.get(2), *list = work.tokens.get(tokens);
      begin[0] = 0, begin[1] = int32_t(tokens);
      for (int64_t t = 0; t < tokens; ++t) list[t] = int32_t(t);
    } else {
      list_experts(ffn, tokens, work);
    }
  }
  team.end();
  if (work.scattered) list_neurons(team, ffn, tokens, work);
}

// gate and up of some neurons of a group, for its tokens: hidden[t][row].
template <class W>
static void hidden_unit(const lte_ffn& ffn, const int64_t* neurons, int64_t count, const float* xs, int64_t xs_stride,
                        int64_t tokens, ThreadScratch& mine) {
  const bool gated = ffn.gate.weight;
  const lte_matrix& inner = gated ? ffn.gate : ffn.up;
  float* gate = mine.gate.get(count * tokens + VL);
  float* up = gated ? mine.up.get(count * tokens + VL) : nullptr;
  const W *gate_rows = static_cast<const W*>(inner.weight), *up_rows = static_cast<const W*>(ffn.up.weight);
  int64_t D = ffn.d_model, r = 0;
  if (tokens == 1 && neurons[count - 1] == neurons[0] + count - 1) {  // one matrix after the other
    for (; r < count; ++r) gate[r] = dot_row(gate_rows + neurons[r] * inner.stride, xs, D);
    for (int64_t i = 0; gated && i < count; ++i) up[i] = dot_row(up_rows + neurons[i] * ffn.up.stride, xs, D);
  }
  while (r < count) {
    constexpr int64_t R = ROWS / 2;
    const W* rows[ROWS];
    int64_t block = count - r >= R ? R : 1;
    for (int64_t i = 0; i < block; ++i) {
      rows[i] = gate_rows + neurons[r + i] * inner.stride;
      rows[block + i] = gated ? up_rows + neurons[r + i] * ffn.up.stride : nullptr;
    }
    if (block == R && gated && tokens == 1) {
      float out[ROWS];
      const W* next[ROWS];
      for (int64_t i = 0; i < R; ++i) {
        const int64_t neuron = neurons[std::min(r + R + i, count - 1)];
        next[i] = gate_rows + neuron * inner.stride, next[R + i] = up_rows + neuron * ffn.up.stride;
      }
      dot_tile<ROWS, 1>(rows, xs, xs_stride, D, out, 1, next);
      for (int64_t i = 0; i < R; ++i) gate[r + i] = out[i], up[r + i] = out[R + i];
    } else if (block == R) {
      dot_rows<R>(rows, xs, xs_stride, tokens, D, gate + r * tokens, tokens);
      if (gated) dot_rows<R>(rows + R, xs, xs_stride, tokens, D, up + r * tokens, tokens);
    } else {
      dot_rows<1>(rows, xs, xs_stride, tokens, D, gate + r * tokens, tokens);
      if (gated) dot_rows<1>(rows + 1, xs, xs_stride, tokens, D, up + r * tokens, tokens);
    }
    r += block;
  }
  auto add_bias = [&](const lte_matrix& matrix, float* values) {
    if (!matrix.bias) return;
    const W* bias = static_cast<const W*>(matrix.bias);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t t = 0; t < tokens; ++t) values[i * tokens + t] += widen(bias[neurons[i]]);
  };
  add_bias(inner, gate);
  if (gated) add_bias(ffn.up, up);
  activate_all(ffn.activation, gate, up, count * tokens);
}

// Rows first .. first + count of a group's down projection, added to the outputs of its tokens.
template <class W>
static void add_rows(const lte_ffn& ffn, const FfnWork& work, int64_t group, int64_t first, int64_t count, const float* h,
                     int64_t h_stride, int64_t tokens, int64_t from, int64_t to, float* const* y) {
  const W* down = static_cast<const W*>(ffn.down.weight);
  const W *rows[ROWS], *next[ROWS];
  int64_t r = 0;
  auto row = [&](int64_t i) {
    return down + work.neuron(group, std::min(first + i, work.group_size - 1)) * ffn.down.stride;
  };
  auto point = [&](int64_t block) {
    for (int64_t i = 0; i < block; ++i) rows[i] = row(r + i);
  };
  if (tokens == 1)
    for (; r + ROWS <= count; r += ROWS) {
      point(ROWS);
      for (int64_t i = 0; i < ROWS; ++i) next[i] = row(r + ROWS + i);
      scale_rows<ROWS>(rows, next, h + r, from, to, y[0]);
    }
  constexpr int64_t R = ROWS / 2;
  for (; r + R <= count; r += R) point(R), scale_tile<R>(rows, h + r, h_stride, tokens, from, to, y);
  for (; r < count; ++r) point(1), scale_tile<1>(rows, h + r, h_stride, tokens, from, to, y);
}

// Partial sums, [parts, tokens, out_stride], added up in order; at(i): where column i of the output is kept.
template <class Emit, class At>
static void add_parts(Team& team, int64_t D, int64_t parts, int64_t tokens, FfnWork& work, Emit&& emit, At&& at) {
  const int64_t stride = work.out_stride, size = tokens * stride;
  Work queue = team.begin();
  const int64_t width = ((D + team.size - 1) / team.size + STEP - 1) / STEP * STEP;
  for (int64_t slice; queue.take((D + width - 1) / width, slice);) {
    const int64_t from = slice * width, to = std::min(D, from + width);
    for (int64_t t = 0; t < tokens; ++t) {
      float* out = work.out.data + t * stride;
      for (int64_t part = 1; part < parts; ++part)
        for (int64_t i = from; i < to; ++i) out[i] += out[part * size + i];
      for (int64_t i = from; i < to; ++i) emit(t, i, out[at(i)]);
    }
  }
  team.end();
}

// Few tokens: whole rows are read, in order, into one of PARTS partial sums, which are then added up in order. The
// parts do not depend on the number of threads, so neither does the result.
template <class W, class Emit>
static void down_by_rows(Team& team, const lte_ffn& ffn, int64_t tokens, FfnWork& work, Emit&& emit) {
  const int64_t n = work.group_size, D = ffn.d_model, stride = work.out_stride, size = tokens * stride;
  const int32_t *begin = work.begin.data, *list = work.tokens.data;
  const int64_t blocks = (n + ROWS - 1) / ROWS, total = work.n_groups * blocks;
  {
    Work queue = team.begin();
    for (int64_t part; queue.take(PARTS, part);) {
      float* out = work.out.data + part * size;
      std::fill(out, out + size, 0.0f);
      for (int64_t unit = part * total / PARTS; unit < (part + 1) * total / PARTS; ++unit) {
        const int64_t a = unit / blocks, first = unit % blocks * ROWS, its = begin[a + 1] - begin[a];
        float* y[FEW];
        for (int64_t i = 0; i < its; ++i) y[i] = out + list[begin[a] + i] * stride;
        add_rows<W>(ffn, work, a, first, std::min(ROWS, n - first), work.hidden.data + begin[a] * n + first, n, its, 0, D,
                    y);
      }
    }
    team.end();
  }
  add_parts(team, D, PARTS, tokens, work, emit, [&](int64_t i) { return split_index(i, D, (const W*)nullptr); });
}

// More tokens: every thread owns columns of the output.
template <class W, class Emit>
static void down_by_columns(Team& team, const lte_ffn& ffn, int64_t tokens, FfnWork& work, Emit&& emit) {
  const int64_t n = work.group_size, D = ffn.d_model, stride = work.out_stride;
  const int32_t *begin = work.begin.data, *list = work.tokens.data;
  Work queue = team.begin();
  const int64_t slices = std::max<int64_t>(1, std::min<int64_t>(team.size, D / 256));
  const int64_t width = ((D + slices - 1) / slices + STEP - 1) / STEP * STEP;
  float** y = thread_scratch().rows.get(tokens);
  for (int64_t slice; queue.take((D + width - 1) / width, slice);) {
    const int64_t from = slice * width, to = std::min(D, from + width);
    float* out = work.out.data;
    for (int64_t t = 0; t < tokens; ++t) std::fill(out + t * stride + from, out + t * stride + to, 0.0f);
    for (int64_t a = 0; a < work.n_groups; ++a) {
      const int64_t its = begin[a + 1] - begin[a];
      for (int64_t i = 0; i < its; ++i) y[i] = out + list[begin[a] + i] * stride;
      add_rows<W>(ffn, work, a, 0, n, work.hidden.data + begin[a] * n, n, its, from, to, y);
    }
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = from; i < to; ++i) emit(t, i, out[t * stride + split_index(i, D, (const W*)nullptr)]);
  }
  team.end();
}

// 1 where an expert's logit is above the router's threshold.
static float runs(const lte_ffn& ffn, float logit) {
  return 1.0f / (1.0f + std::exp(-logit)) > ffn.threshold ? 1.0f : 0.0f;
}

#include "few_bits.h"
#include "prompts.h"

// Tokens xs (as `put` has them) through the active experts; emit(t, i, value) hands out y, biases not yet added.
// work.scale is filled by the caller, behind a barrier.
template <class W, class Emit>
static void ffn_phases(Team& team, const lte_ffn& ffn, const float* xs, int64_t xs_stride, int64_t tokens, FfnWork& work,
                       Emit&& emit) {
  if (ffn.up.low.planes) return few_bits_phases<W>(team, ffn, xs, xs_stride, tokens, work, emit);
  ThreadScratch& mine = thread_scratch();
  list_groups(team, ffn, tokens, work);

  const int64_t E = ffn.n_experts, size = ffn.d_ff / E, n = work.group_size, D = ffn.d_model;
  const float* scale = work.scale.data;
  const int32_t *begin = work.begin.data, *list = work.tokens.data;
  float* hidden = work.hidden.data;
  const int64_t chunk = std::min<int64_t>(std::max<int64_t>(n, 1), 16), chunks = (n + chunk - 1) / chunk;
  {
    Work queue = team.begin();
    for (int64_t unit; queue.take(work.n_groups * chunks, unit);) {
      const int64_t a = unit / chunks, first = unit % chunks * chunk, count = std::min(chunk, n - first);
      const int64_t its = begin[a + 1] - begin[a];
      int64_t neurons[16];
      for (int64_t r = 0; r < count; ++r) neurons[r] = work.neuron(a, first + r);
      const int32_t* who = list + begin[a];
      const float* x = xs + who[0] * xs_stride;
      int64_t stride = xs_stride;
      if (its > 1 && who[its - 1] - who[0] != its - 1) {  // its tokens, side by side
        stride = (D + STEP - 1) / STEP * STEP;
        float* gathered = mine.attention.get(its * stride);
        for (int64_t i = 0; i < its; ++i) std::memcpy(gathered + i * stride, xs + who[i] * xs_stride, D * sizeof(float));
        x = gathered;
      }
      hidden_unit<W>(ffn, neurons, count, x, stride, its, mine);
      for (int64_t i = 0; i < its; ++i)
        for (int64_t r = 0; r < count; ++r) {
          const float by = scale[who[i] * E + neurons[r] / size];
          hidden[(begin[a] + i) * n + first + r] = by != 0.0f ? mine.gate.data[r * its + i] * by : 0.0f;
        }
    }
    team.end();
  }

  if (tokens <= FEW)
    down_by_rows<W>(team, ffn, tokens, work, emit);
  else
    down_by_columns<W>(team, ffn, tokens, work, emit);
}

// xs: float32 in natural order: routers are float32 beside weights of any type.
static void router_phase(Team& team, const lte_ffn& ffn, const float* xs, int64_t xs_stride, int64_t tokens,
                         FfnWork& work) {
  if (team.rank == 0) work.scale.get(tokens * ffn.n_experts);
  team.begin();
  team.end();
  float* scale = work.scale.data;
  linear_phase<float>(team, &ffn.router, 1, xs, xs_stride, tokens, thread_scratch().linear,
                  [&](int64_t t, int64_t e, float logit) { scale[t * ffn.n_experts + e] = runs(ffn, logit); });
}

#include "copies.h"
#include "nested.h"

static void run_all(Team& team, const lte_ffn& ffn, int64_t tokens, FfnWork& work) {
  team.begin();
  if (team.rank == 0) std::fill_n(work.scale.get(tokens * ffn.n_experts), tokens * ffn.n_experts, 1.0f);
  team.end();
}

// The experts that run, from whatever of the FFN decides.
template <class W>
static void decide_phase(Team& team, const lte_ffn& ffn, const float* xs, int64_t xs_stride, int64_t tokens,
                         FfnWork& work) {
  if (!ffn.copy.up.planes)
    return tokens >= MANY && fits_panels(ffn) ? prompt_router(team, ffn, xs, xs_stride, tokens, work)
                                              : router_phase(team, ffn, xs, xs_stride, tokens, work);
  if (ffn.copy.cut < 0) return run_all(team, ffn, tokens, work);
  if (team.rank == 0) work.scale.get(tokens * ffn.n_experts);
  const float cut = ffn.copy.cut * ffn.copy.cut;
  copy_phase<W>(team, ffn, xs, xs_stride, tokens, [&](int64_t t, int64_t expert, float squares) {
    work.scale.data[t * ffn.n_experts + expert] = squares > cut ? 1.0f : 0.0f;
  });
}

template <class W>
static void sparse_ffn(const lte_ffn& ffn, const void* x, int64_t tokens, const uint8_t* mask, const float* given, void* y,
                       int threads) {
  static thread_local FfnWork work;
  static thread_local Buffer<float> split, widened;
  FfnWork& shared = work;
  const int64_t D = ffn.d_model, E = ffn.n_experts, stride = (D + STEP - 1) / STEP * STEP;
  const bool routed = !mask && !given && (ffn.router.weight || ffn.copy.up.planes);
  const bool many = tokens >= MANY && fits_panels(ffn);
  float* xs = split.get(tokens * stride);
  float* plain = xs;  // in natural order, whatever the weights are
  if (!std::is_same_v<W, float> && (routed || (many && !PAIRED<W>))) plain = widened.get(tokens * stride);
  auto take_over = [&](int64_t t) {
    const W* from = static_cast<const W*>(x) + t * D;
    to_split(from, D, xs + t * stride);
    if (PAIRED<W> && D % 2) reinterpret_cast<bf16*>(xs + t * stride)[D] = 0;  // what a last pair ends with
    for (int64_t i = 0; plain != xs && i < D; ++i) plain[t * stride + i] = widen(from[i]);
  };
  if (!many)
    for (int64_t t = 0; t < tokens; ++t) take_over(t);
  if (!routed) {
    float* scale = work.scale.get(tokens * E);
    for (int64_t i = 0; i < tokens * E; ++i) scale[i] = given ? given[i] : mask ? float(mask[i] != 0) : 1.0f;
  }
  const W* bias = static_cast<const W*>(ffn.down.bias);
  W* out = static_cast<W*>(y);
  auto emit = [&](int64_t t, int64_t i, float value) {
    narrow(value + (bias ? widen(bias[i]) : 0.0f), out + t * D + i);
  };
  with_team(threads, [&](Team& team) {
    if (many) {
      Work queue = team.begin();
      for (int64_t t; queue.take(tokens, t);) take_over(t);
      team.end();
    }
    if (ffn.nested.down.codes) return nested_phases<W>(team, ffn, ffn.copy.cut, xs, stride, tokens, shared, emit);
    if (routed) decide_phase<W>(team, ffn, plain, stride, tokens, shared);
    if (many) return prompt_phases<W>(team, ffn, PAIRED<W> ? xs : plain, stride, tokens, shared, emit);
    ffn_phases<W>(team, ffn, xs, stride, tokens, shared, emit);
  });
}

template <class W>
static void linear(const lte_matrix& matrix, const void* x, int64_t tokens, void* y, int threads) {
  static thread_local Buffer<float> split;
  const int64_t stride = (matrix.cols + STEP - 1) / STEP * STEP;
  float* xs = split.get(tokens * stride);
  for (int64_t t = 0; t < tokens; ++t) to_split(static_cast<const W*>(x) + t * matrix.cols, matrix.cols, xs + t * stride);
  W* out = static_cast<W*>(y);
  with_team(threads, [&](Team& team) {
    linear_phase<W>(team, &matrix, 1, xs, stride, tokens, thread_scratch().linear,
                    [&](int64_t t, int64_t row, float value) { narrow(value, out + t * matrix.rows + row); });
  });
}

#include "decode.h"

static void run_sparse_ffn(const lte_ffn* ffn, const void* x, int64_t tokens, const uint8_t* mask, const float* scale,
                           void* y, int32_t threads) {
  (ffn->dtype == LTE_BF16 ? sparse_ffn<bf16> : sparse_ffn<float>)(*ffn, x, tokens, mask, scale, y, threads);
}
static void run_copy_scores(const lte_ffn* ffn, const void* x, int64_t tokens, float* scores, int32_t threads) {
  (ffn->dtype == LTE_BF16 ? copy_scores<bf16> : copy_scores<float>)(*ffn, x, tokens, scores, threads);
}
static void run_linear(const lte_matrix* matrix, int32_t dtype, const void* x, int64_t tokens, void* y, int32_t threads) {
  (dtype == LTE_BF16 ? linear<bf16> : linear<float>)(*matrix, x, tokens, y, threads);
}
static void run_decode(const lte_decoder* decoder, const lte_step* step, int32_t threads) {
  (decoder->dtype == LTE_BF16 ? decode<bf16> : decode<float>)(*decoder, *step, threads);
}
static void run_quantize(const lte_matrix* matrix, int32_t dtype, const lte_lowbit* made, const float* importance,
                         int32_t tries, int32_t threads) {
  (dtype == LTE_BF16 ? quantize<bf16> : quantize<float>)(*matrix, *made, importance, tries, threads);
}
template <class W>
static void dequantize(const lte_lowbit& matrix, void* out, int threads) {
  with_bits(matrix.bits, [&](auto bits) { dequantize<bits(), W>(matrix, static_cast<W*>(out), threads); });
}
static void run_dequantize(const lte_lowbit* matrix, int32_t dtype, void* out, int32_t threads) {
  (dtype == LTE_BF16 ? dequantize<bf16> : dequantize<float>)(*matrix, out, threads);
}
static float run_read(const void* data, int64_t bytes, int32_t threads) {
  constexpr int64_t block = 256 << 10;
  std::atomic<float> total{0};
  with_team(threads, [&](Team& team) {
    Work queue = team.begin();
    vu acc[8] = {};
    for (int64_t unit; queue.take(bytes / block, unit);) {
      const char* p = static_cast<const char*>(data) + unit * block;
      for (int64_t i = 0; i < block; i += int64_t(8 * sizeof(vu))) {
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) acc[j] ^= *reinterpret_cast<const vu_any*>(p + i + j * sizeof(vu));
      }
    }
    vu all = acc[0] ^ acc[1] ^ acc[2] ^ acc[3] ^ acc[4] ^ acc[5] ^ acc[6] ^ acc[7];
    uint32_t lanes[VL];
    std::memcpy(lanes, &all, sizeof all);
    total.store(float(lanes[0] ^ lanes[VL - 1]), std::memory_order_relaxed);
    team.end();
  });
  return total.load();
}

extern const lte::Variant variant{run_sparse_ffn, run_copy_scores, run_linear, run_decode, run_quantize, run_dequantize,
                                  run_read};

}  // namespace LTE_VARIANT
