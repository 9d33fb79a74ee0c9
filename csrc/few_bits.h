// A feed-forward network whose weights are of few bits: gate and up lie row by row, down column by column, so that the
// weights of some neurons lie together in each. Part of kernels.cpp, in its namespace.

// A group of neighbouring neurons, as many as share scales of the down projection, for the tokens of its expert:
// rounded[i], scales[i], sums[i], by its tokens.
template <class W>
static void few_bits_unit(Team& team, const lte_ffn& ffn, int64_t first, const int32_t* who, int64_t its,
                          const float* by, int8_t* rounded, float* scales, int32_t* sums) {
  ThreadScratch& mine = thread_scratch();
  const int64_t group = ffn.down.low.group, last = std::min(ffn.d_ff, first + group);
  const int64_t blocks = (last - first + TOGETHER - 1) / TOGETHER;
  RoundedInputs* x = mine.inputs.get(its);
  for (int64_t i = 0; i < its; ++i) x[i] = team.rounded->inputs.data[who[i]];
  auto multiply = [&](const lte_matrix& matrix, float* out) {
    lowbit_blocks(matrix.low, first / TOGETHER, blocks, x, its, out, group);
    const W* bias = static_cast<const W*>(matrix.bias);
    for (int64_t i = 0; bias && i < its; ++i)
      for (int64_t n = first; n < last; ++n) out[i * group + n - first] += widen(bias[n]);
  };
  const bool gated = ffn.gate.low.planes;
  float *gate = mine.gate.get(its * group + VL), *up = gated ? mine.up.get(its * group + VL) : nullptr;
  multiply(gated ? ffn.gate : ffn.up, gate);
  if (gated) multiply(ffn.up, up);
  activate_all(ffn.activation, gate, up, its * group);
  const int64_t size = ffn.d_ff / ffn.n_experts;
  for (int64_t i = 0; i < its; ++i) {
    float* hidden = gate + i * group;
    const float factor = by[who[i] * ffn.n_experts + first / size];
    for (int64_t n = 0; n < group; ++n) hidden[n] = first + n < last ? hidden[n] * factor : 0.0f;
    round_inputs(hidden, group, group, rounded + i * group, scales + i, sums + i);
  }
}

template <class W, class Emit>
static void few_bits_phases(Team& team, const lte_ffn& ffn, const float* xs, int64_t xs_stride, int64_t tokens,
                            FfnWork& work, Emit&& emit) {
  const int64_t D = ffn.d_model, group = ffn.down.low.group, parts = tokens <= FEW ? PARTS : 4;
  list_groups(team, ffn, tokens, work);
  round_phase(team, ffn.up.low, tokens, [&](int64_t t, int64_t i) { return get<W>(xs + t * xs_stride, i, D); });
  const int64_t n = work.group_size, chunks = (n + group - 1) / group, stride = work.out_stride, size = tokens * stride;
  const int32_t *begin = work.begin.data, *list = work.tokens.data;
  team.begin();
  if (team.rank == 0) {
    const int64_t found = begin[work.n_groups] * chunks;
    work.rounded.get(found * group);
    work.scales.get(found);
    work.sums.get(found);
    work.out.get(parts * size);
  }
  team.end();
  {
    Work queue = team.begin();
    for (int64_t unit; queue.take(work.n_groups * chunks, unit);) {
      const int64_t a = unit / chunks, c = unit % chunks, its = begin[a + 1] - begin[a];
      const int64_t at = begin[a] * chunks + c * its;  // of a group: chunk by chunk, its tokens side by side
      few_bits_unit<W>(team, ffn, work.experts.data[a] * n + c * group, list + begin[a], its, work.scale.data,
                       work.rounded.data + at * group, work.scales.data + at, work.sums.data + at);
    }
    team.end();
  }
  {
    Work queue = team.begin();
    const int64_t total = work.n_groups * chunks;
    for (int64_t part; queue.take(parts, part);) {
      float* out = work.out.data + part * size;
      std::fill(out, out + size, 0.0f);
      ThreadScratch& mine = thread_scratch();
      for (int64_t unit = part * total / parts; unit < (part + 1) * total / parts; ++unit) {
        const int64_t a = unit / chunks, c = unit % chunks, its = begin[a + 1] - begin[a];
        const int64_t at = begin[a] * chunks + c * its;
        const int8_t** values = mine.values.get(its);
        float** y = mine.rows.get(its);
        for (int64_t i = 0; i < its; ++i)
          values[i] = work.rounded.data + (at + i) * group, y[i] = out + list[begin[a] + i] * stride;
        lowbit_columns(ffn.down.low, (work.experts.data[a] * n + c * group) / group, its, values, work.scales.data + at,
                       work.sums.data + at, y);
      }
    }
    team.end();
  }
  add_parts(team, D, parts, tokens, work, emit, [](int64_t i) { return i; });
}
