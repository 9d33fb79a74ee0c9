// An FFN's own coarse copy: what it says of a token, and how it is made. Part of kernels.cpp, in its namespace.
// What the copy says of every expert: emit(t, expert, square of its score). xs as for the router.
template <class W, class Emit>
static void copy_phase(Team& team, const lte_ffn& ffn, const float* xs, int64_t xs_stride, int64_t tokens, Emit&& emit) {
  constexpr int64_t BLOCK = 64;
  const lte_lowbit& up = ffn.copy.up;
  const int64_t E = ffn.n_experts, F = ffn.d_ff, n = F / E;
  round_phase(team, up, tokens, [&](int64_t t, int64_t i) { return xs[t * xs_stride + i]; });
  const RoundedInputs* inputs = team.rounded->inputs.data;
  Work queue = team.begin();
  ThreadScratch& mine = thread_scratch();
  const bool gated = ffn.copy.gate.planes;
  const int64_t experts = std::max<int64_t>(1, BLOCK / n);  // at a time
  // Rows come in blocks, which the experts need not begin or end with.
  const int64_t stride = (experts * n + 2 * TOGETHER) / TOGETHER * TOGETHER;
  float* gate = mine.gate.get(tokens * stride);
  float* hidden = gated ? mine.up.get(tokens * stride) : nullptr;
  for (int64_t unit; queue.take((E + experts - 1) / experts, unit);) {
    const int64_t from = unit * experts, to = std::min(E, from + experts);
    const int64_t block = from * n / TOGETHER, row = block * TOGETHER, end = std::min(F, (to * n + TOGETHER - 1) / TOGETHER * TOGETHER);
    auto multiply = [&](const lte_lowbit& matrix, const void* bias, float* out) {
      lowbit_blocks(matrix, block, (end - row + TOGETHER - 1) / TOGETHER, inputs, tokens, out, stride);
      if (!bias) return;
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = row; i < end; ++i) out[t * stride + i - row] += widen(static_cast<const W*>(bias)[i]);
    };
    multiply(gated ? ffn.copy.gate : up, gated ? ffn.gate.bias : ffn.up.bias, gate);
    if (gated) multiply(up, ffn.up.bias, hidden);
    activate_all(ffn.activation, gate, hidden, tokens * stride);
    const float* norms = ffn.copy.norms + row;
    for (int64_t t = 0; t < tokens; ++t) {
      const float* scores = gate + t * stride;
      for (int64_t e = from; e < to; ++e) {
        float squares = 0;
        for (int64_t i = e * n - row; i < (e + 1) * n - row; ++i) squares += scores[i] * norms[i] * (scores[i] * norms[i]);
        emit(t, e, squares);
      }
    }
  }
  team.end();
}

template <class W>
static void copy_scores(const lte_ffn& ffn, const void* x, int64_t tokens, float* scores, int threads) {
  static thread_local Buffer<float> widened;
  const int64_t size = tokens * ffn.d_model;
  float* xs = widened.get(size);
  for (int64_t i = 0; i < size; ++i) xs[i] = widen(static_cast<const W*>(x)[i]);
  with_team(threads, [&](Team& team) {
    copy_phase<W>(team, ffn, xs, ffn.d_model, tokens, [&](int64_t t, int64_t expert, float squares) {
      scores[t * ffn.n_experts + expert] = std::sqrt(squares);
    });
  });
}

template <class W>
static void quantize(const lte_matrix& matrix, const lte_lowbit& made, const float* importance, int tries, int threads) {
  const int64_t group = made.group, bits = made.bits, blocks = (made.rows + TOGETHER - 1) / TOGETHER;
  with_team(threads, [&](Team& team) {
    Work queue = team.begin();
    std::unique_ptr<float[]> x(new float[group]), weights(new float[group]), codes(new float[group]);
    for (int64_t block; queue.take(blocks, block);)
      for (int64_t g = 0; g < made.groups; ++g) {
        const Tiles tiles(made, block);
        uint8_t* planes = const_cast<uint8_t*>(tiles.planes) + g * (group / CHUNK) * tiles.chunk_bytes;
        for (int64_t c = 0; c < group / CHUNK; ++c) std::memset(planes + c * tiles.chunk_bytes, 0, bits * 4 * TOGETHER);
        for (int64_t r = 0; r < TOGETHER; ++r) {
          const int64_t row = block * TOGETHER + r;
          uint16_t& scale = const_cast<uint16_t*>(tiles.scales)[g * tiles.group_scales + r];
          if (row >= made.rows) {
            scale = 0;
            continue;
          }
          const W* values = static_cast<const W*>(matrix.weight) + row * matrix.stride;
          for (int64_t i = 0; i < group; ++i) {
            const int64_t column = g * group + i;
            const bool inside = column < made.cols;
            x[i] = inside ? widen(values[column]) : 0.0f;
            weights[i] = !inside ? 0.0f : importance ? importance[column] : 1.0f;
          }
          scale = best_scale(x.get(), weights.get(), group, int(bits), tries);
          quantize_group(x.get(), group, int(bits), scale, codes.get());
          for (int64_t i = 0; i < group; ++i)
            for (int b = 0; b < bits; ++b) {
              const Place at = place_of(int(bits), int(i % CHUNK / 4), b);
              planes[i / CHUNK * tiles.chunk_bytes + at.plane * 4 * TOGETHER + 4 * r + i % 4] |= ((int(codes[i]) >> b) & 1)
                                                                                                   << at.bit;
            }
        }
      }
    team.end();
  });
}

// The numbers that a matrix means, row by row.
template <int BITS, class W>
static void dequantize(const lte_lowbit& matrix, W* out, int threads) {
  const int64_t chunks = matrix.group / CHUNK, blocks = (matrix.rows + TOGETHER - 1) / TOGETHER;
  constexpr float middle = ((1 << BITS) - 1) / 2.0f;
  with_team(threads, [&](Team& team) {
    Work queue = team.begin();
    for (int64_t block; queue.take(blocks, block);) {
      const Tiles tiles(matrix, block);
      const int64_t rows = std::min(TOGETHER, matrix.rows - block * TOGETHER);
      for (int64_t chunk = 0; chunk < matrix.groups * chunks; ++chunk) {
        const uint8_t* planes = tiles.planes + chunk * tiles.chunk_bytes;
        uint8_t codes[CHUNK / 4][4 * TOGETHER] = {};
#pragma GCC unroll 8
        for (int step = 0; step < CHUNK / 4; ++step)
#pragma GCC unroll 8
          for (int b = 0; b < BITS; ++b) {
            const Place at = place_of(BITS, step, b);
            for (int64_t i = 0; i < 4 * TOGETHER; ++i)
              codes[step][i] |= uint8_t((planes[at.plane * 4 * TOGETHER + i] >> at.bit & 1) << b);
          }
        const int64_t first = chunk * CHUNK, count = std::clamp<int64_t>(matrix.cols - first, 0, CHUNK);
        for (int64_t r = 0; r < rows; ++r) {
          const float scale = widen(tiles.scales[chunk / chunks * tiles.group_scales + r]);
          float values[CHUNK];
          uint8_t of_row[CHUNK];
          W made[CHUNK];
          for (int step = 0; step < CHUNK / 4; ++step) std::memcpy(of_row + 4 * step, codes[step] + 4 * r, 4);
          for (int i = 0; i < CHUNK; ++i) values[i] = (float(of_row[i]) - middle) * scale;
          for (int i = 0; i < CHUNK; ++i) narrow(values[i], made + i);
          std::memcpy(out + (block * TOGETHER + r) * matrix.cols + first, made, size_t(count) * sizeof(W));
        }
      }
    }
    team.end();
  });
}
