// Linear layers: inputs rounded where weights are of few bits, and the products. Part of kernels.cpp, in its namespace.

constexpr int64_t ROWS = 8;       // rows read side by side
constexpr int64_t UNIT_ROWS = 32;  // rows handed to a thread at a time

// read(t, i): element i of a token's inputs.
template <class Read>
static void round_phase(Team& team, const lte_lowbit& matrix, int64_t tokens, Read&& read) {
  team.begin();
  if (team.rank == 0) team.rounded->get(tokens, matrix.groups, matrix.group);
  team.end();
  Work queue = team.begin();
  Buffer<float>& natural = thread_scratch().attention;
  for (int64_t t; queue.take(tokens, t);) {
    float* x = natural.get(matrix.cols + VL);
    for (int64_t i = 0; i < matrix.cols; ++i) x[i] = read(t, i);
    const RoundedInputs& its = team.rounded->inputs.data[t];
    round_inputs(x, matrix.cols, matrix.group, const_cast<int8_t*>(its.values), const_cast<float*>(its.scales),
                 const_cast<int32_t*>(its.sums));
  }
  team.end();
}

// emit(t, row, value) for every row of the matrices, which are all of few bits or none is, and every token.
template <class W, class Emit>
static void linear_phase(Team& team, const lte_matrix* matrices, int n_matrices, const float* xs, int64_t xs_stride,
                         int64_t tokens, Buffer<float>& scratch, Emit&& emit) {
  const bool few_bits = matrices->low.planes;
  if (few_bits)
    round_phase(team, matrices->low, tokens,
                [&](int64_t t, int64_t i) { return get<W>(xs + t * xs_stride, i, matrices->cols); });
  Work queue = team.begin();
  float* out = scratch.get((few_bits ? UNIT_ROWS : ROWS) * tokens + VL);
  int64_t units = 0;
  for (int m = 0; m < n_matrices; ++m) units += (matrices[m].rows + UNIT_ROWS - 1) / UNIT_ROWS;
  for (int64_t unit; queue.take(units, unit);) {
    int64_t first_row = 0;  // of the matrix, among the rows of all
    const lte_matrix* matrix = matrices;
    for (;; ++matrix) {
      int64_t its_units = (matrix->rows + UNIT_ROWS - 1) / UNIT_ROWS;
      if (unit < its_units) break;
      unit -= its_units;
      first_row += matrix->rows;
    }
    const W* weight = static_cast<const W*>(matrix->weight);
    const W* bias = static_cast<const W*>(matrix->bias);
    int64_t row = unit * UNIT_ROWS, last = std::min(matrix->rows, row + UNIT_ROWS);
    if (few_bits) {
      lowbit_blocks(matrix->low, row / TOGETHER, (last - row + TOGETHER - 1) / TOGETHER, team.rounded->inputs.data, tokens,
                    out, UNIT_ROWS);
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = row; i < last; ++i)
          emit(t, first_row + i, out[t * UNIT_ROWS + i - row] + (bias ? widen(bias[i]) : 0.0f));
      continue;
    }
    while (row < last) {
      const W* rows[ROWS];
      int64_t count = last - row >= ROWS ? ROWS : 1;
      for (int64_t r = 0; r < count; ++r) rows[r] = weight + (row + r) * matrix->stride;
      if (count == ROWS) {
        if (tokens == 1)
          for (int64_t r = 0; r < ROWS; ++r) out[r] = dot_row(rows[r], xs, matrix->cols);
        else
          for (int half = 0; half < 2; ++half)
            dot_rows<ROWS / 2>(rows + half * ROWS / 2, xs, xs_stride, tokens, matrix->cols,
                               out + half * (ROWS / 2) * tokens, tokens);
      } else {
        dot_rows<1>(rows, xs, xs_stride, tokens, matrix->cols, out, tokens);
      }
      for (int64_t r = 0; r < count; ++r)
        for (int64_t t = 0; t < tokens; ++t)
          emit(t, first_row + row + r, out[r * tokens + t] + (bias ? widen(bias[row + r]) : 0.0f));
      row += count;
    }
  }
  team.end();
}
