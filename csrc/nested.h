// A feed-forward network in two planes of bits: the upper bits of gate and up are multiplied for all neurons and say
// which are needed; the rows of the down projection, and all lower bits, are read for those alone. Part of kernels.cpp,
// in its namespace.

constexpr int64_t PIECE = 64;         // columns of a piece of a row of codes, 8 bytes for each of their bits
constexpr int64_t NESTED_UNIT = 64;   // neurons worked on at a time
constexpr int64_t ADDED = 8;          // rows of the down projection that are added at once
constexpr int FINE = 128, MOST = 8000;  // of a factor in whole numbers: its upper part counts FINE; and the largest half

#if defined(__AVX512BW__)
typedef __m512i vpiece;
// The codes of a piece, a byte each.
template <int BITS>
INLINE vpiece load_piece(const uint8_t* p) {
  if constexpr (BITS == 4) {
    const __m512i both = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)p));
    return _mm512_and_si512(_mm512_srlv_epi64(both, _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4)), _mm512_set1_epi8(15));
  } else if constexpr (BITS == 1) {
    int64_t word;
    std::memcpy(&word, p, 8);
    const __m512i all = _mm512_srlv_epi64(_mm512_set1_epi64(word), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
    return _mm512_and_si512(all, _mm512_set1_epi8(1));
  } else {
    const __m512i four = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
    const __m512i low = _mm512_srlv_epi64(four, _mm512_setr_epi64(0, 0, 2, 2, 4, 4, 6, 6));
    if constexpr (BITS == 2) return _mm512_and_si512(low, _mm512_set1_epi8(3));
    int64_t word;
    std::memcpy(&word, p + 16, 8);
    const __m512i third = _mm512_rorv_epi64(_mm512_set1_epi64(word), _mm512_setr_epi64(62, 63, 0, 1, 2, 3, 4, 5));
    const __m512i bits = _mm512_and_si512(third, _mm512_set1_epi8(4));
    return _mm512_ternarylogic_epi64(low, _mm512_set1_epi8(3), bits, 0xea);  // low & 3 | bits
  }
}
INLINE __m512i add_dots(__m512i sums, __m512i codes, __m512i values) {
#if defined(__AVX512VNNI__)
  return _mm512_dpbusd_epi32(sums, codes, values);
#else
  return _mm512_add_epi32(sums, _mm512_madd_epi16(_mm512_maddubs_epi16(codes, values), _mm512_set1_epi16(1)));
#endif
}
// Where column i of the outputs is kept: the dot products of four rows at a time leave them in another order.
static int64_t output_index(int64_t i) { return i / PIECE * PIECE + i % 16 / 4 * 16 + i % PIECE / 16 * 4 + i % 4; }
#else
struct vpiece {
  uint8_t codes[PIECE];
};
template <int BITS>
INLINE vpiece load_piece(const uint8_t* p) {
  constexpr int WIDE = BITS == 3 ? 2 : BITS;
  vpiece out;
  for (int i = 0; i < 8 / WIDE; ++i)
    for (int j = 0; j < 8 * WIDE; ++j) out.codes[8 * WIDE * i + j] = p[j] >> (WIDE * i) & ((1 << WIDE) - 1);
  if constexpr (BITS == 3)
    for (int i = 0; i < 8; ++i)
      for (int j = 0; j < 8; ++j) out.codes[8 * i + j] |= (p[16 + j] >> i & 1) << 2;
  return out;
}
static int64_t output_index(int64_t i) { return i; }
#endif

// A row by a token's rounded values; `next` is fetched meanwhile, since rows are short and lie apart. by[piece *
// TOGETHER]: scales of the row and of the token.
template <int BITS>
static float dot_codes(const uint8_t* row, const uint8_t* next, int64_t pieces, const int8_t* x, const float* by) {
#if defined(__AVX512BW__)
  __m512 total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  auto add = [&](int64_t piece, __m512& sum) {
    const __m512i values = _mm512_loadu_si512(x + piece * PIECE);
    const __m512i dots = add_dots(_mm512_setzero_si512(), load_piece<BITS>(row + piece * 8 * BITS), values);
    sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), _mm512_set1_ps(by[piece * TOGETHER]), sum);
  };
  int64_t piece = 0;
  for (; piece + 2 <= pieces; piece += 2) {
    add(piece, total[0]), add(piece + 1, total[1]);
    fetch(next + piece * 8 * BITS);
  }
  if (piece < pieces) add(piece, total[0]);
  return _mm512_reduce_add_ps(_mm512_add_ps(total[0], total[1]));
#else
  float total = 0;
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const vpiece its = load_piece<BITS>(row + piece * 8 * BITS);
    fetch(next + piece * 8 * BITS);
    int32_t dot = 0;
    for (int i = 0; i < PIECE; ++i) dot += int32_t(its.codes[i]) * x[piece * PIECE + i];
    total += float(dot) * by[piece * TOGETHER];
  }
  return total;
#endif
}

// What some rows of codes are multiplied with before they are added up, for every group of columns: whole numbers, cut
// in two, times a common scale.
struct Factors {
  int32_t *upper[2], *lower[2];  // [groups], of four rows each, a byte for each
  int32_t* start;                // what the middle of the codes' range comes to, taken off
  float* scale;

  Factors(Buffer<int32_t>& buffer, int64_t groups) {
    const int64_t size = (groups + VL - 1) / VL * VL;
    int32_t* all = buffer.get(6 * size);
    for (int half = 0; half < 2; ++half) upper[half] = all + half * size, lower[half] = all + (2 + half) * size;
    start = all + 4 * size;
    scale = reinterpret_cast<float*>(all + 5 * size);
  }

  // Of values[r] times the scales of row r, [groups].
  void set(const uint16_t* const* scales, const float* values, int64_t groups, int bits) {
    for (int64_t g = 0; g < groups; g += VL) {
      vf exact[ADDED], largest = splat(1e-30f);
#pragma GCC unroll 8
      for (int r = 0; r < ADDED; ++r) {
        uint16_t here[VL] = {};
        const bool whole = g + VL <= groups;
        if (!whole) std::memcpy(here, scales[r] + g, (groups - g) * sizeof *here);
        exact[r] = load_scales(whole ? scales[r] + g : here) * values[r];
        const vf size = exact[r] < 0.0f ? -exact[r] : exact[r];
        largest = size > largest ? size : largest;
      }
      // Halves, so that the middle of the codes' range, which lies between two, is a whole number of them.
      const vf by = float(MOST) / largest;
      vi sum = {}, uppers[2] = {}, lowers[2] = {};
#pragma GCC unroll 8
      for (int r = 0; r < ADDED; ++r) {
        const vi half = __builtin_convertvector(round_even(exact[r] * by), vi), high = (2 * half + FINE / 2) >> 7;
        uppers[r / 4] |= (high & 255) << (8 * (r % 4));
        lowers[r / 4] |= ((2 * half - high * FINE) & 255) << (8 * (r % 4));
        sum += half;
      }
      const vi off = -((1 << bits) - 1) * sum;
      for (int half = 0; half < 2; ++half) {
        std::memcpy(upper[half] + g, uppers + half, sizeof(vi));
        std::memcpy(lower[half] + g, lowers + half, sizeof(vi));
      }
      std::memcpy(start + g, &off, sizeof off);
      store(scale + g, largest / float(2 * MOST));
    }
  }
};

// y += rows of codes, each times its factors, while as many others are fetched. Those of all groups of columns, of
// `of_group` pieces.
template <int BITS>
static void add_codes(const uint8_t* const* rows, const uint8_t* const* next, int64_t pieces, int64_t of_group,
                      const Factors& factors, float* y) {
  for (int64_t piece = 0, g = 0; piece < pieces; ++g)
    for (const int64_t end = std::min(pieces, piece + of_group); piece < end; ++piece) {
#if defined(__AVX512BW__)
      __m512i upper[4], lower[4];
      for (int m = 0; m < 4; ++m) upper[m] = _mm512_setzero_si512(), lower[m] = _mm512_set1_epi32(factors.start[g]);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m512i by_upper = _mm512_set1_epi32(factors.upper[half][g]);
        const __m512i by_lower = _mm512_set1_epi32(factors.lower[half][g]);
        __m512i codes[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          codes[r] = load_piece<BITS>(rows[4 * half + r] + piece * 8 * BITS);
          fetch(next[4 * half + r] + piece * 8 * BITS);
        }
        const __m512i a = _mm512_unpacklo_epi8(codes[0], codes[1]), b = _mm512_unpackhi_epi8(codes[0], codes[1]);
        const __m512i c = _mm512_unpacklo_epi8(codes[2], codes[3]), d = _mm512_unpackhi_epi8(codes[2], codes[3]);
        const __m512i of_four[4] = {_mm512_unpacklo_epi16(a, c), _mm512_unpackhi_epi16(a, c), _mm512_unpacklo_epi16(b, d),
                                    _mm512_unpackhi_epi16(b, d)};
#pragma GCC unroll 4
        for (int m = 0; m < 4; ++m) {
          upper[m] = add_dots(upper[m], of_four[m], by_upper);
          lower[m] = add_dots(lower[m], of_four[m], by_lower);
        }
      }
      float* here = y + piece * PIECE;
#pragma GCC unroll 4
      for (int m = 0; m < 4; ++m) {
        const __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(upper[m], 7), lower[m]);
        const __m512 sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), _mm512_set1_ps(factors.scale[g]),
                                           _mm512_loadu_ps(here + 16 * m));
        _mm512_storeu_ps(here + 16 * m, sum);
      }
#else
      int32_t sums[PIECE];
      std::fill_n(sums, PIECE, factors.start[g]);
      for (int r = 0; r < ADDED; ++r) {
        const vpiece its = load_piece<BITS>(rows[r] + piece * 8 * BITS);
        fetch(next[r] + piece * 8 * BITS);
        const int32_t upper = int8_t(factors.upper[r / 4][g] >> (8 * (r % 4)));
        const int32_t by = upper * FINE + int8_t(factors.lower[r / 4][g] >> (8 * (r % 4)));
        for (int i = 0; i < PIECE; ++i) sums[i] += by * int32_t(its.codes[i]);
      }
      for (int i = 0; i < PIECE; ++i) y[piece * PIECE + i] += float(sums[i]) * factors.scale[g];
#endif
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
  Factors factors(thread_scratch().factors, nested.down_groups);
  with_bits<4>(plane.bits, [&](auto bits) {
    const uint8_t *rows[ADDED], *next[ADDED];
    const uint16_t* scales[ADDED];
    float values[ADDED];
    const int64_t size = pieces * 8 * bits(), groups = nested.down_groups;
    auto neuron = [&](int64_t i) -> int64_t { return chosen.neurons[std::min(i, chosen.count - 1)]; };
    for (int64_t n = 0; n < chosen.count; n += ADDED) {
      for (int64_t r = 0; r < ADDED; ++r) {
        const int64_t now = neuron(n + r), soon = neuron(n + r + ADDED);
        rows[r] = plane.codes + now * size, next[r] = plane.codes + soon * size;
        scales[r] = nested.down_scales + now * groups;
        for (int64_t g = 0; g < groups; g += 32) fetch(nested.down_scales + soon * groups + g);
        values[r] = n + r < chosen.count ? chosen.hidden[n + r] * factor : 0.0f;
      }
      factors.set(scales, values, groups, bits());
      add_codes<bits()>(rows, next, pieces, nested.down_group / PIECE, factors, y);
    }
  });
}

// By how much all bits change the products of a block of rows of gate or up with a token.
struct LowerDots {
  const lte_lowbit& upper;
  const lte_rows& lower;
  const RoundedInputs& x;
  float *by, middle[TOGETHER];  // [pieces, TOGETHER]: scales of rows and token
  int64_t block = -1;

  int64_t pieces() const { return (upper.cols + PIECE - 1) / PIECE; }
  void enter(int64_t its) {
    if (its == block) return;
    block = its;
    const float factor = 1.0f / float(1 << lower.bits), range = float((1 << lower.bits) - 1) / 2;
    const int64_t of_group = upper.group / PIECE;
    for (int64_t part = 0; part < TOGETHER; part += VL) {
      vf offs = {};
      for (int64_t g = 0, piece = 0; g < upper.groups; ++g) {
        const uint16_t* scales = upper.scales + (block * upper.groups + g) * TOGETHER + part;
        const vf here = load_scales(scales) * (x.scales[g] * factor);
        offs += here * (range * float(x.sums[g]));
        for (int64_t i = 0; i < of_group && piece < pieces(); ++i, ++piece) store(by + piece * TOGETHER + part, here);
      }
      store(middle + part, offs);
    }
  }
  float of(int64_t row, int64_t next) {
    enter(row / TOGETHER);
    float out = 0;
    with_bits<4>(lower.bits, [&](auto bits) {
      const int64_t size = pieces() * 8 * bits();
      out = dot_codes<bits()>(lower.codes + row * size, lower.codes + next * size, pieces(), x.values, by + row % TOGETHER);
    });
    return out - middle[row % TOGETHER];
  }
};

// Where the hidden value of a neuron whose row is exact is put; null for others, whose scales are not 0.
static float* exact_value(const lte_nested& nested, int64_t neuron, float* exact) {
  if (nested.down_scales[neuron * nested.down_groups]) return nullptr;
  const int32_t *end = nested.exact + nested.n_exact, *its = std::lower_bound(nested.exact, end, int32_t(neuron));
  return its != end && *its == neuron ? exact + (its - nested.exact) : nullptr;
}

// One token's share of some neurons: those that run are added to `on`, and to `fine` where all their bits count; of
// those whose rows are exact, hidden values are put into `exact`. gate, up: products of the upper bits, biases
// included; up is null without a gate.
static void choose(const lte_ffn& ffn, float cut, int64_t first, int64_t count, const float* gate, const float* up,
                   const RoundedInputs& x, Chosen& on, Chosen& fine, float* exact) {
  float hidden[NESTED_UNIT + VL], gates[NESTED_UNIT + VL], ups[NESTED_UNIT + VL];
  int32_t needed[NESTED_UNIT];
  const lte_nested& nested = ffn.nested;
  std::copy_n(gate, count, hidden);
  activate_all(ffn.activation, hidden, up, count);
  int64_t more = 0;
  const bool lower = nested.up.codes;
  const int64_t size = (ffn.d_model + PIECE - 1) / PIECE * TOGETHER;
  float* by = thread_scratch().attention.get(2 * size);
  LowerDots first_dots{up ? ffn.copy.gate : ffn.copy.up, up ? nested.gate : nested.up, x, by};
  LowerDots up_dots{ffn.copy.up, nested.up, x, by + size};
  for (int64_t i = 0; i < count; ++i) {
    const float score = std::fabs(hidden[i]) * ffn.copy.norms[first + i];
    if (!(score > cut)) continue;
    if (!lower || !(score > nested.fine_cut)) {
      if (float* its = exact_value(nested, first + i, exact))
        *its = hidden[i];
      else
        on.add(first + i, hidden[i]);
      continue;
    }
    needed[more++] = int32_t(first + i);
  }
  for (int64_t i = 0; i < more; ++i) {
    const int64_t next = needed[std::min(i + 1, more - 1)];
    gates[i] = gate[needed[i] - first] + first_dots.of(needed[i], next);
    if (up) ups[i] = up[needed[i] - first] + up_dots.of(needed[i], next);
  }
  std::fill_n(gates + more, VL, 0.0f), std::fill_n(ups + more, VL, 0.0f);
  activate_all(ffn.activation, gates, up ? ups : nullptr, more);
  for (int64_t i = 0; i < more; ++i)
    if (float* its = exact_value(nested, needed[i], exact))
      *its = gates[i];
    else
      on.add(needed[i], gates[i]), fine.add(needed[i], gates[i]);
}

// Tokens xs (as `put` has them) through the neurons whose score is above the cut; emit as of ffn_phases.
template <class W, class Emit>
static void nested_phases(Team& team, const lte_ffn& ffn, float cut, const float* xs, int64_t xs_stride, int64_t tokens,
                          FfnWork& work, Emit&& emit) {
  const lte_nested& nested = ffn.nested;
  const int64_t D = ffn.d_model, F = ffn.d_ff, width = (D + PIECE - 1) / PIECE * PIECE, size = tokens * width;
  const int64_t pieces = (D + PIECE - 1) / PIECE, units = (F + NESTED_UNIT - 1) / NESTED_UNIT;
  const int64_t parts = std::min(PARTS, units), most = (units / parts + 1) * NESTED_UNIT;
  round_phase(team, ffn.copy.up, tokens, [&](int64_t t, int64_t i) { return get<W>(xs + t * xs_stride, i, D); });
  team.begin();
  if (team.rank == 0) {
    work.out.get(parts * size);
    std::fill_n(work.hidden.get(tokens * nested.n_exact + 1), tokens * nested.n_exact, 0.0f);
  }
  team.end();
  {
    Work queue = team.begin();
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
                 team.rounded->inputs.data[t], chosen[2 * t], chosen[2 * t + 1],
                 work.hidden.data + t * nested.n_exact);
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
  Work queue = team.begin();
  const int64_t slice = (D + team.size - 1) / team.size;
  float* sums = thread_scratch().linear.get(slice);
  for (int64_t s; queue.take((D + slice - 1) / slice, s);)
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t from = s * slice, count = std::min(D, from + slice) - from;
      for (int64_t i = 0; i < count; ++i) {
        const float* its = work.out.data + t * width + output_index(from + i);
        sums[i] = 0;
        for (int64_t part = 0; part < parts; ++part) sums[i] += its[part * size];
      }
      for (int64_t k = 0; k < nested.n_exact; ++k) {
        const float hidden = work.hidden.data[t * nested.n_exact + k];
        const bf16* row = nested.exact_rows + k * D + from;
        for (int64_t i = 0; hidden != 0.0f && i < count; ++i) sums[i] += hidden * widen(row[i]);
      }
      for (int64_t i = 0; i < count; ++i) emit(t, from + i, sums[i]);
    }
  team.end();
}
