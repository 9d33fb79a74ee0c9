// A feed-forward network in two planes of bits: the upper bits of gate and up are multiplied for all neurons and say
// which are needed; the rows of the down projection, and all lower bits, are read for those alone. Part of kernels.cpp,
// in its namespace.

constexpr int64_t PIECE_LANES = 8, PIECE = 64, CODES = PIECE / PIECE_LANES;  // of a piece of a row; codes of a lane
constexpr int64_t NESTED_UNIT = 64;                                          // neurons worked on at a time

// What is multiplied with a row lies as its codes do: [vector, code, VL lanes], where the lanes of all pieces follow each
// other.
static int64_t ordered_width(int64_t n) {
  const int64_t lanes = (n + PIECE - 1) / PIECE * PIECE_LANES;
  return (lanes + VL - 1) / VL * VL * CODES;
}
static int64_t ordered_index(int64_t i) {
  const int64_t lane = i / PIECE * PIECE_LANES + i % PIECE_LANES;
  return (lane / VL * CODES + i % PIECE / PIECE_LANES) * VL + lane % VL;
}

template <int BITS>
INLINE vu load_lanes(const uint8_t* low, const uint8_t* high) {
  typedef uint8_t vbytes_any __attribute__((vector_size(VL), aligned(1), may_alias));
  if constexpr (BITS == 4) return *reinterpret_cast<const vu_any*>(low);
#if defined(__AVX512BW__)
  if constexpr (BITS == 1) return (vu)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)low));
  vu lanes = (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)low));
  if constexpr (BITS == 3) lanes |= (vu)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)high)) << 16;
#else
  if constexpr (BITS == 1) return __builtin_convertvector(*reinterpret_cast<const vbytes_any*>(low), vu);
  vu lanes = __builtin_convertvector(*reinterpret_cast<const vhalf_any*>(low), vu);
  if constexpr (BITS == 3) lanes |= __builtin_convertvector(*reinterpret_cast<const vbytes_any*>(high), vu) << 16;
#endif
  return lanes;
}

// Vector v of a row of codes. Where the last one is half a piece too long, it must not be read past the end.
template <int BITS>
struct CodeRow {
  static constexpr int FIRST = BITS == 3 ? 2 : BITS;  // bytes of a lane that lie together
  const uint8_t* codes;

  static int64_t bytes(int64_t pieces) { return pieces * PIECE_LANES * BITS; }
  vu whole(int64_t v, int64_t pieces) const {
    return load_lanes<BITS>(codes + v * VL * FIRST, codes + pieces * PIECE_LANES * 2 + v * VL);
  }
  vu half(int64_t v, int64_t pieces) const {
    uint8_t first[VL * FIRST] = {}, last[VL] = {};
    std::memcpy(first, codes + v * VL * FIRST, PIECE_LANES * FIRST);
    if constexpr (BITS == 3) std::memcpy(last, codes + pieces * PIECE_LANES * 2 + v * VL, PIECE_LANES);
    return load_lanes<BITS>(first, last);
  }
};

// What codes mean, counted from the middle of their range; bits above them are ignored.
template <int BITS>
INLINE vf levels(vu codes) {
  constexpr float middle = ((1 << BITS) - 1) / 2.0f;
#if defined(__AVX512F__)
  const __m512i each = _mm512_and_si512(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                        _mm512_set1_epi32((1 << BITS) - 1));
  const __m512 table = _mm512_sub_ps(_mm512_cvtepi32_ps(each), _mm512_set1_ps(middle));
  return (vf)_mm512_permutexvar_ps((__m512i)codes, table);
#else
  return __builtin_convertvector((vi)(codes & uint32_t((1 << BITS) - 1)), vf) - middle;
#endif
}

// by[piece] for the lanes of a vector; by has one entry more than there are pieces.
INLINE vf of_lanes(const float* by, int64_t v) {
  const float* its = by + v * VL / PIECE_LANES;
  if constexpr (VL <= PIECE_LANES) return splat(its[0]);
  vi lane;
  for (int i = 0; i < VL; ++i) lane[i] = i;
  return lane < int(PIECE_LANES) ? splat(its[0]) : splat(its[1]);
}

// by[piece] = factor * the scale of its group; scales: those of a row, `step` apart.
static void spread_scales(const uint16_t* scales, int64_t step, int64_t of_group, int64_t pieces, float factor, float* by) {
  for (int64_t piece = 0; piece < pieces; scales += step)
    for (int64_t i = 0; i < of_group && piece < pieces; ++i) by[piece++] = widen(bf16(*scales)) * factor;
  by[pieces] = 0;
}

// body(v, the lanes of vector v of every row).
template <int BITS, int R, class Body>
INLINE void each_vector(const CodeRow<BITS>* rows, int64_t pieces, Body&& body) {
  const int64_t lanes = pieces * PIECE_LANES;
  vu here[R];
  int64_t v = 0;
  for (; (v + 1) * VL <= lanes; ++v) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) here[r] = rows[r].whole(v, pieces);
    body(v, here);
  }
  if (v * VL == lanes) return;
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) here[r] = rows[r].half(v, pieces);
  body(v, here);
}

// A row by a token; scales: [pieces + 1].
template <int BITS>
static float dot_codes(const uint8_t* codes, int64_t pieces, const float* x, const float* scales) {
  const CodeRow<BITS> row{codes};
  vf total = {};
  each_vector<BITS, 1>(&row, pieces, [&](int64_t v, const vu* lanes) {
    vf sums[2] = {};
    const float* here = x + v * CODES * VL;
#pragma GCC unroll 8
    for (int k = 0; k < CODES; ++k) sums[k % 2] += levels<BITS>(lanes[0] >> (BITS * k)) * load(here + k * VL);
    total += (sums[0] + sums[1]) * of_lanes(scales, v);
  });
  return sum(total);
}

// y += the numbers of R rows; by: [R, pieces + 1], their scales times what they are multiplied with.
template <int BITS, int R>
static void add_codes(const CodeRow<BITS>* rows, int64_t pieces, const float* by, float* y) {
  CodeRow<BITS> its[R];
  std::copy_n(rows, R, its);
  each_vector<BITS, R>(its, pieces, [&](int64_t v, const vu* lanes) {
    vf factors[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) factors[r] = of_lanes(by + r * (pieces + 1), v);
    float* here = y + v * CODES * VL;
#pragma GCC unroll 8
    for (int k = 0; k < CODES; ++k) {
      vf sum = load(here + k * VL);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum += levels<BITS>(lanes[r] >> (BITS * k)) * factors[r];
      store(here + k * VL, sum);
    }
  });
}

template <class Body>
INLINE void with_code_bits(int bits, Body&& body) {
  switch (bits) {
    case 1: return body(std::integral_constant<int, 1>());
    case 2: return body(std::integral_constant<int, 2>());
    case 3: return body(std::integral_constant<int, 3>());
    default: return body(std::integral_constant<int, 4>());
  }
}

// Some neurons of a token: how many, which, and their hidden values.
struct Chosen {
  int64_t count = 0;
  int32_t* neurons;
  float* hidden;

  void add(int64_t neuron, float value) { neurons[count] = int32_t(neuron), hidden[count++] = value; }
};

// Rows of the down projection that some neurons of a token need, of one plane; `factor` is of its scales.
static void add_plane(const lte_nested& nested, const lte_rows& plane, float factor, const Chosen& chosen, int64_t pieces,
                      float* y) {
  constexpr int R = 4;
  const int64_t of_group = nested.down_group / PIECE;
  float* by = thread_scratch().attention.get(R * (pieces + 1));
  with_code_bits(plane.bits, [&](auto bits) {
    CodeRow<bits()> rows[R];
    for (int64_t n = 0; n < chosen.count;) {
      const int64_t count = chosen.count - n >= R ? R : 1;
      for (int64_t r = 0; r < count; ++r) {
        const int64_t neuron = chosen.neurons[n + r];
        rows[r].codes = plane.codes + neuron * CodeRow<bits()>::bytes(pieces);
        spread_scales(nested.down_scales + neuron * nested.down_groups, 1, of_group, pieces, chosen.hidden[n + r] * factor,
                      by + r * (pieces + 1));
      }
      if (count == R)
        add_codes<bits(), R>(rows, pieces, by, y);
      else
        add_codes<bits(), 1>(rows, pieces, by, y);
      n += count;
    }
  });
}

// By how much all bits change the products of a row of gate or up.
static float lower_dot(const lte_lowbit& upper, const lte_rows& lower, int64_t row, const float* x) {
  const int64_t pieces = (upper.cols + PIECE - 1) / PIECE;
  const uint16_t* scales = upper.scales + row / TOGETHER * upper.groups * TOGETHER + row % TOGETHER;
  float* by = thread_scratch().attention.get(pieces + 1);
  spread_scales(scales, TOGETHER, upper.group / PIECE, pieces, 1.0f / float(1 << lower.bits), by);
  float out = 0;
  with_code_bits(lower.bits, [&](auto bits) {
    out = dot_codes<bits()>(lower.codes + row * CodeRow<bits()>::bytes(pieces), pieces, x, by);
  });
  return out;
}

// One token's share of some neurons: those that run are added to `on`, and to `fine` where all their bits count.
// gate, up: products of the upper bits, biases included; up is null without a gate.
static void choose(const lte_ffn& ffn, float cut, int64_t first, int64_t count, const float* gate, const float* up,
                   const float* x, Chosen& on, Chosen& fine) {
  float hidden[NESTED_UNIT + VL], gates[NESTED_UNIT + VL], ups[NESTED_UNIT + VL];
  int32_t needed[NESTED_UNIT];
  const lte_nested& nested = ffn.nested;
  std::copy_n(gate, count, hidden);
  activate_all(ffn.activation, hidden, up, count);
  int64_t more = 0;
  const bool lower = nested.up.codes;
  for (int64_t i = 0; i < count; ++i) {
    const float score = std::fabs(hidden[i]) * ffn.copy.norms[first + i];
    if (!(score > cut)) continue;
    if (!lower || !(score > nested.fine_cut)) {
      on.add(first + i, hidden[i]);
      continue;
    }
    gates[more] = gate[i] + lower_dot(up ? ffn.copy.gate : ffn.copy.up, up ? nested.gate : nested.up, first + i, x);
    if (up) ups[more] = up[i] + lower_dot(ffn.copy.up, nested.up, first + i, x);
    needed[more++] = int32_t(first + i);
  }
  std::fill_n(gates + more, VL, 0.0f), std::fill_n(ups + more, VL, 0.0f);
  activate_all(ffn.activation, gates, up ? ups : nullptr, more);
  for (int64_t i = 0; i < more; ++i) on.add(needed[i], gates[i]), fine.add(needed[i], gates[i]);
}

// Tokens xs (as `put` has them) through the neurons whose score is above the cut; emit as of ffn_phases.
template <class W, class Emit>
static void nested_phases(Team& team, const lte_ffn& ffn, float cut, const float* xs, int64_t xs_stride, int64_t tokens,
                          FfnWork& work, Emit&& emit) {
  const lte_nested& nested = ffn.nested;
  const int64_t D = ffn.d_model, F = ffn.d_ff, width = ordered_width(D), size = tokens * width;
  const int64_t pieces = (D + PIECE - 1) / PIECE, units = (F + NESTED_UNIT - 1) / NESTED_UNIT;
  const int64_t parts = std::min(PARTS, units), most = (units / parts + 1) * NESTED_UNIT;
  round_phase(team, ffn.copy.up, tokens, [&](int64_t t, int64_t i) { return get<W>(xs + t * xs_stride, i, D); });
  team.begin();
  if (team.rank == 0) {
    work.out.get(parts * size);
    float* ordered = work.hidden.get(size);
    std::fill_n(ordered, size, 0.0f);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < D; ++i) ordered[t * width + ordered_index(i)] = get<W>(xs + t * xs_stride, i, D);
  }
  team.end();
  {
    Queue& queue = team.begin();
    ThreadScratch& mine = thread_scratch();
    const bool gated = ffn.copy.gate.planes;
    float* gate = mine.gate.get(tokens * NESTED_UNIT + VL);
    float* up = gated ? mine.up.get(tokens * NESTED_UNIT + VL) : nullptr;
    float* values = mine.linear.get(2 * tokens * most);
    int32_t* neurons = mine.neurons.get(2 * tokens * most);
    Chosen* chosen = mine.chosen.get(2 * tokens);
    for (int64_t part; queue.take(parts, part);) {
      for (int64_t i = 0; i < 2 * tokens; ++i) chosen[i] = {0, neurons + i * most, values + i * most};
      for (int64_t unit = part * units / parts; unit < (part + 1) * units / parts; ++unit) {
        const int64_t first = unit * NESTED_UNIT, count = std::min(NESTED_UNIT, F - first);
        auto multiply = [&](const lte_lowbit& matrix, const void* bias, float* out) {
          lowbit_blocks(matrix, first / TOGETHER, (count + TOGETHER - 1) / TOGETHER, team.rounded->inputs.data, tokens, out,
                        NESTED_UNIT);
          for (int64_t t = 0; bias && t < tokens; ++t)
            for (int64_t i = 0; i < count; ++i)
              out[t * NESTED_UNIT + i] += widen(static_cast<const W*>(bias)[first + i]);
        };
        multiply(gated ? ffn.copy.gate : ffn.copy.up, gated ? ffn.gate.bias : ffn.up.bias, gate);
        if (gated) multiply(ffn.copy.up, ffn.up.bias, up);
        for (int64_t t = 0; t < tokens; ++t)
          choose(ffn, cut, first, count, gate + t * NESTED_UNIT, gated ? up + t * NESTED_UNIT : nullptr,
                 work.hidden.data + t * width, chosen[2 * t], chosen[2 * t + 1]);
      }
      float* out = work.out.data + part * size;
      std::fill_n(out, size, 0.0f);
      for (int64_t t = 0; t < tokens; ++t) {
        add_plane(nested, nested.down, 1.0f, chosen[2 * t], pieces, out + t * width);
        if (nested.down_lower.codes)
          add_plane(nested, nested.down_lower, 1.0f / float(1 << nested.down_lower.bits), chosen[2 * t + 1], pieces,
                    out + t * width);
      }
    }
    team.end();
  }
  Queue& queue = team.begin();
  const int64_t slice = (D + team.size - 1) / team.size;
  for (int64_t s; queue.take((D + slice - 1) / slice, s);)
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = s * slice; i < std::min(D, (s + 1) * slice); ++i) {
        const float* its = work.out.data + t * width + ordered_index(i);
        float sum = 0;
        for (int64_t part = 0; part < parts; ++part) sum += its[part * size];
        emit(t, i, sum);
      }
  team.end();
}
