// An FFN's own coarse copy: what it says of a token, and how it is made. Part of kernels.cpp, in its namespace.
// What the copy says: xs as for the router.
template <class W>
static void copy_phase(Team& team, const lte_ffn& ffn, const float* xs, int64_t xs_stride, int64_t tokens, FfnWork& work) {
  constexpr int64_t BLOCK = 64;
  const lte_lowbit& up = ffn.copy.up;
  const int64_t E = ffn.n_experts, F = ffn.d_ff, n = F / E, width = up.groups * up.group;
  team.begin();
  if (team.rank == 0) {
    work.scale.get(tokens * E);
    int8_t* values = work.rounded.get(tokens * width);
    float* scales = work.input_scales.get(2 * tokens * up.groups);
    RoundedInputs* inputs = work.inputs.get(tokens);
    for (int64_t t = 0; t < tokens; ++t)
      inputs[t] = {values + t * width, scales + 2 * t * up.groups, scales + (2 * t + 1) * up.groups};
  }
  team.end();
  const RoundedInputs* inputs = work.inputs.data;
  {
    Queue& queue = team.begin();
    for (int64_t t; queue.take(tokens, t);)
      round_inputs(xs + t * xs_stride, ffn.d_model, up.group, const_cast<int8_t*>(inputs[t].values),
                   const_cast<float*>(inputs[t].scales), const_cast<float*>(inputs[t].sums));
    team.end();
  }
  Queue& queue = team.begin();
  ThreadScratch& mine = thread_scratch();
  const bool gated = ffn.copy.gate.planes;
  const int64_t experts = std::max<int64_t>(1, BLOCK / n);  // of a block
  float* gate = mine.gate.get(experts * n * tokens + VL);
  float* hidden = gated ? mine.up.get(experts * n * tokens + VL) : nullptr;
  auto add_bias = [&](const lte_matrix& matrix, int64_t first, int64_t count, float* values) {
    if (!matrix.bias) return;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t t = 0; t < tokens; ++t) values[i * tokens + t] += widen(static_cast<const W*>(matrix.bias)[first + i]);
  };
  for (int64_t block; queue.take((E + experts - 1) / experts, block);) {
    const int64_t from = block * experts, to = std::min(E, from + experts), first = from * n, count = (to - from) * n;
    lowbit_rows(gated ? ffn.copy.gate : up, first, count, inputs, tokens, gate, tokens);
    add_bias(gated ? ffn.gate : ffn.up, first, count, gate);
    if (gated) {
      lowbit_rows(up, first, count, inputs, tokens, hidden, tokens);
      add_bias(ffn.up, first, count, hidden);
    }
    activate_all(ffn.activation, gate, hidden, count * tokens);
    const float* norms = ffn.copy.norms + first;
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t e = from; e < to; ++e) {
        float squares = 0;
        for (int64_t i = (e - from) * n; i < (e - from + 1) * n; ++i) {
          const float score = gate[i * tokens + t] * norms[i];
          squares += score * score;
        }
        work.scale.data[t * E + e] = squares > ffn.copy.cut * ffn.copy.cut ? 1.0f : 0.0f;
      }
  }
  team.end();
}

template <class W>
static void quantize(const lte_matrix& matrix, const lte_lowbit& made, const float* importance, int tries, int threads) {
  const int64_t group = made.group, padded = (group + VL - 1) / VL * VL, bytes = made.bits * group / 8;
  with_team(threads, [&](Team& team) {
    Queue& queue = team.begin();
    std::unique_ptr<float[]> x(new float[padded]), weights(new float[padded]);
    for (int64_t row; queue.take(made.rows, row);) {
      const W* values = static_cast<const W*>(matrix.weight) + row * matrix.stride;
      for (int64_t g = 0; g < made.groups; ++g) {
        for (int64_t i = 0; i < padded; ++i) {
          const int64_t column = g * group + i;
          const bool inside = i < group && column < made.cols;
          x[i] = inside ? widen(values[column]) : 0.0f;
          weights[i] = !inside ? 0.0f : importance ? importance[column] : 1.0f;
        }
        const int64_t at = row * made.groups + g;
        const_cast<uint16_t*>(made.scales)[at] = quantize_group(x.get(), weights.get(), group, padded, made.bits, tries,
                                                                const_cast<uint8_t*>(made.planes) + at * bytes);
      }
    }
    team.end();
  });
}
