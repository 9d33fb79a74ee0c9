// Products of a matrix of a few bits per weight with inputs rounded to 8 bits: integers inside a group of neighbours,
// floats across groups. Sixteen rows are stored side by side and their products made at once, one row per lane of 32
// bits: four of its codes, times the same four inputs for all of them.
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "lte.h"
#include "simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace LTE_VARIANT {

constexpr int64_t TOGETHER = LTE_LOWBIT_ROWS, CHUNK = LTE_LOWBIT_CHUNK;  // rows of a block, columns of a chunk

// One token's inputs as integers: x ~ scales[g] * values. sums[g]: of the group's values.
struct RoundedInputs {
  const int8_t* values;
  const float* scales;
  const int32_t* sums;
};

INLINE vf round_even(vf x) { return (x + 12582912.0f) - 12582912.0f; }

typedef int8_t vbytes __attribute__((vector_size(VL)));

// x: natural order. The last group is filled up with zeros.
static void round_inputs(const float* x, int64_t n, int64_t group, int8_t* values, float* scales, int32_t* sums) {
  for (int64_t first = 0, g = 0; first < n; first += group, ++g) {
    const int64_t count = std::min(group, n - first);
    vf sizes = {};
    int64_t i = 0;
    for (; i + VL <= count; i += VL) {
      const vf value = load(x + first + i), size = value < 0.0f ? -value : value;
      sizes = size > sizes ? size : sizes;
    }
    float most = largest(sizes);
    for (; i < count; ++i) most = std::max(most, std::fabs(x[first + i]));
    const float scale = std::max(most / 127.0f, 1e-30f);
    vi total = {};
    for (i = 0; i + VL <= count; i += VL) {
      const vi whole = __builtin_convertvector(round_even(load(x + first + i) / splat(scale)), vi);
      const vbytes bytes = __builtin_convertvector(whole, vbytes);
      std::memcpy(values + first + i, &bytes, sizeof bytes);
      total += whole;
    }
    int32_t sum_of_rest = 0;
    for (; i < group; ++i) {
      const float value = i < count ? std::nearbyintf(x[first + i] / scale) : 0.0f;
      values[first + i] = int8_t(value);
      sum_of_rest += int32_t(value);
    }
    scales[g] = scale;
    sums[g] = int32_t(sum(__builtin_convertvector(total, vf))) + sum_of_rest;
  }
}

typedef uint16_t vcodes __attribute__((vector_size(VL * 4)));
typedef uint16_t vcodes_any __attribute__((vector_size(VL * 4), aligned(2), may_alias));
typedef uint16_t vhalf_any __attribute__((vector_size(VL * 2), aligned(2), may_alias));

// Where bit b of code `step` of eight lies: which plane's byte, and where in it. Fields come one after the other in every
// byte; codes for which no byte has room for a whole field are spread over the bits that are left.
struct Place {
  int plane, bit;
  bool whole;  // whether the code is a field of its own
};
constexpr Place place_of(int bits, int step, int b) {
  const int fields = 8 / bits;
  if (step >= fields * bits) return {b, step, false};
  return {step / fields, step % fields * bits + b, true};
}

// Codes STEP of eight, of four columns. A field that is second in its byte may stay there, times 2^BITS.
template <int BITS, int STEP, bool STAYS>
INLINE vcodes codes_at_step(const vcodes* planes) {
  constexpr Place at = place_of(BITS, STEP, 0);
  constexpr int mask = 0x0101 * ((1 << BITS) - 1);
  if constexpr (!at.whole) {
    vcodes codes = {};
#pragma GCC unroll 4
    for (int b = 0; b < BITS; ++b) codes |= planes[b] >> (STEP - b) & uint16_t(0x0101 << b);
    return codes;
  } else if constexpr (STAYS) {
    return planes[at.plane] & uint16_t(mask << at.bit);
  } else {
    return planes[at.plane] >> at.bit & uint16_t(mask);
  }
}

// Where the tiles and scales of a block of rows lie.
struct Tiles {
  const uint8_t* planes;
  const uint16_t* scales;
  int64_t chunk_bytes, group_scales;  // from one chunk, and one group, to the next

  Tiles(const lte_lowbit& matrix, int64_t block) {
    const int64_t tile = matrix.bits * TOGETHER * 4, blocks = (matrix.rows + TOGETHER - 1) / TOGETHER;
    const int64_t chunks = matrix.groups * (matrix.group / CHUNK);
    planes = matrix.planes + block * tile * (matrix.by_columns ? 1 : chunks);
    scales = matrix.scales + block * TOGETHER * (matrix.by_columns ? 1 : matrix.groups);
    chunk_bytes = tile * (matrix.by_columns ? blocks : 1);
    group_scales = TOGETHER * (matrix.by_columns ? blocks : 1);
  }
};
INLINE vf load_scales(const uint16_t* scales) {
#if defined(__AVX512BW__)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)scales)), 16);
#else
  const vu wide = __builtin_convertvector(*reinterpret_cast<const vhalf_any*>(scales), vu) << 16;
  vf out;
  std::memcpy(&out, &wide, sizeof out);
  return out;
#endif
}

// dots += codes, four to a lane, times four values.
template <int BITS>
INLINE vi add_products(vi dots, vcodes codes, const int8_t* values) {
  int32_t four;
  std::memcpy(&four, values, 4);
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpbusd_epi32((__m512i)dots, (__m512i)codes, _mm512_set1_epi32(four));
#elif defined(__AVX512BW__) || defined(__AVX2__)
  if constexpr (BITS == 8) {  // whose products the next instruction would not hold
    const vcodes low = codes & uint16_t(0x0f0f), high = codes >> 4 & uint16_t(0x0f0f);
    return add_products<4>(dots, low, values) + (add_products<4>(vi{}, high, values) << 4);
  }
#if defined(__AVX512BW__)
  return dots + (vi)_mm512_madd_epi16(_mm512_maddubs_epi16((__m512i)codes, _mm512_set1_epi32(four)), _mm512_set1_epi16(1));
#else
  return dots + (vi)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)codes, _mm256_set1_epi32(four)), _mm256_set1_epi16(1));
#endif
#else
  vu lanes;
  std::memcpy(&lanes, &codes, sizeof lanes);
  for (int i = 0; i < 4; ++i) dots += (vi)((lanes >> (8 * i)) & 255u) * int32_t(values[i]);
  return dots;
#endif
}

#if defined(__AVX512VNNI__)
constexpr bool IN_PLACE = true;  // the other instructions add in 16 bits, which larger products overflow
#else
constexpr bool IN_PLACE = false;
#endif

// Sums that are taken side by side for a token: each instruction waits for the one before it on the same sum.
template <int T>
constexpr int CHAINS = T <= 2 ? 2 : 1;

// dots: [CHAINS, T], and as many more for the codes that stay in place.
template <int BITS, int T, int STEP>
INLINE void add_steps(vi* dots, const vcodes* planes, const int8_t* const* values) {
  if constexpr (STEP < 8) {
    constexpr Place at = place_of(BITS, STEP, 0);
    constexpr bool stays = IN_PLACE && at.whole && at.bit == BITS;
    const vcodes codes = codes_at_step<BITS, STEP, stays>(planes);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      vi& sum = dots[((stays ? CHAINS<T> : 0) + STEP / 2 % CHAINS<T>) * T + t];
      sum = add_products<BITS>(sum, codes, values[t] + 4 * STEP);
    }
    add_steps<BITS, T, STEP + 1>(dots, planes, values);
  }
}

// How far before they are wanted weights are asked for, into the second cache: the processor by itself does not look
// far enough ahead for loops that are through with a line so soon.
constexpr int64_t AHEAD = 1024;

// The products of VL rows of a block, and of the chunks of a group, with T tokens' values.
template <int BITS, int T>
INLINE void add_chunks(vf* total, const uint8_t* planes, int64_t chunk_bytes, int64_t chunks, vf scale,
                       const int8_t* const* values, const float* scales, const int32_t* sums) {
  // A code counts from the middle of its range, which lies between two: sums are doubled, or more where fields stay.
  constexpr bool STAYED = IN_PLACE && BITS <= 4;
  constexpr int SHIFT = STAYED ? BITS : 1;
  constexpr int32_t MIDDLE = ((1 << BITS) - 1) << (SHIFT - 1);
  vi dots[2 * CHAINS<T> * T] = {};
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) dots[CHAINS<T> * T + t] -= MIDDLE * sums[t];
  for (int64_t c = 0; c < chunks; ++c) {
    vcodes here[BITS];
#pragma GCC unroll 8
    for (int b = 0; b < BITS; ++b) {
      here[b] = *reinterpret_cast<const vcodes_any*>(planes + c * chunk_bytes + b * TOGETHER * 4);
      fetch(planes + c * chunk_bytes + b * TOGETHER * 4 + AHEAD);
#if defined(__AVX512BW__)
      if constexpr (BITS <= 4) asm("" : "+v"(here[b]));  // or it is read again for every field
#endif
    }
    const int8_t* its[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) its[t] = values[t] + c * CHUNK;
    add_steps<BITS, T, 0>(dots, here, its);
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    vi whole = dots[t], stayed = dots[CHAINS<T> * T + t];
#pragma GCC unroll 4
    for (int i = 1; i < CHAINS<T>; ++i) whole += dots[i * T + t], stayed += dots[(CHAINS<T> + i) * T + t];
    const vf products = __builtin_convertvector((whole << SHIFT) + stayed, vf);
    total[t] += products * (scale * (scales[t] / float(1 << SHIFT)));
  }
}

// The rows of a block by T tokens: out[t * out_stride + row].
template <int BITS, int T>
static void lowbit_block(const lte_lowbit& matrix, int64_t block, const RoundedInputs* x, float* out, int64_t out_stride) {
  const int64_t groups = matrix.groups, chunks = matrix.group / CHUNK;
  const Tiles tiles(matrix, block);
#pragma GCC unroll 1
  for (int64_t part = 0; part < TOGETHER; part += VL) {
    vf total[T] = {};
    for (int64_t g = 0; g < groups; ++g) {
      const int8_t* values[T];
      float scales[T];
      int32_t sums[T];
      fetch(tiles.scales + g * tiles.group_scales + AHEAD / 16);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t)
        values[t] = x[t].values + g * matrix.group, scales[t] = x[t].scales[g], sums[t] = x[t].sums[g];
      add_chunks<BITS, T>(total, tiles.planes + g * chunks * tiles.chunk_bytes + 4 * part, tiles.chunk_bytes, chunks,
                          load_scales(tiles.scales + g * tiles.group_scales + part), values, scales, sums);
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) store(out + t * out_stride + part, total[t]);
  }
}

// T tokens' values of one group of columns, added to all rows: y[t][row] += ... A matrix that lies column by column.
template <int BITS, int T>
static void lowbit_columns(const lte_lowbit& matrix, int64_t g, const int8_t* const* values, const float* scales,
                           const int32_t* sums, float* const* y) {
  const int64_t blocks = (matrix.rows + TOGETHER - 1) / TOGETHER, chunks = matrix.group / CHUNK;
  const Tiles tiles(matrix, 0);
  const uint8_t* planes = tiles.planes + g * chunks * tiles.chunk_bytes;
  const uint16_t* of_group = tiles.scales + g * tiles.group_scales;
  for (int64_t block = 0; block < blocks; ++block)
#pragma GCC unroll 1
    for (int64_t part = 0; part < TOGETHER; part += VL) {
      const int64_t row = block * TOGETHER + part;
      vf total[T];
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) total[t] = load(y[t] + row);
      add_chunks<BITS, T>(total, planes + block * BITS * TOGETHER * 4 + 4 * part, tiles.chunk_bytes, chunks,
                          load_scales(of_group + row), values, scales, sums);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) store(y[t] + row, total[t]);
    }
}

constexpr int MOST_TOKENS = VL == 16 ? 8 : 4;  // at a time

// Calls body with the width, up to WIDEST, as a constant.
template <int WIDEST = 8, class Body>
INLINE void with_bits(int bits, Body&& body) {
  if constexpr (WIDEST > 1)
    if (bits < WIDEST) return with_bits<WIDEST - 1>(bits, body);
  body(std::integral_constant<int, WIDEST>());
}
// Calls body(first, count), count a constant, for pieces of so many tokens.
template <class Body>
INLINE void in_pieces(int64_t tokens, Body&& body) {
  int64_t t = 0;
  for (; t + MOST_TOKENS <= tokens; t += MOST_TOKENS) body(t, std::integral_constant<int, MOST_TOKENS>());
  for (; t + 2 <= tokens; t += 2) body(t, std::integral_constant<int, 2>());
  for (; t < tokens; ++t) body(t, std::integral_constant<int, 1>());
}

// Blocks of rows by every token: out[t * out_stride + row], row 0 being the first of the first block.
static void lowbit_blocks(const lte_lowbit& matrix, int64_t block, int64_t count, const RoundedInputs* x, int64_t tokens,
                          float* out, int64_t out_stride) {
  with_bits(matrix.bits, [&](auto bits) {
    for (int64_t b = 0; b < count; ++b)
      in_pieces(tokens, [&](int64_t t, auto piece) {
        lowbit_block<bits(), piece()>(matrix, block + b, x + t, out + t * out_stride + b * TOGETHER, out_stride);
      });
  });
}

// One group of columns by every token.
static void lowbit_columns(const lte_lowbit& matrix, int64_t g, int64_t tokens, const int8_t* const* values,
                           const float* scales, const int32_t* sums, float* const* y) {
  with_bits(matrix.bits, [&](auto bits) {
    in_pieces(tokens, [&](int64_t t, auto piece) {
      lowbit_columns<bits(), piece()>(matrix, g, values + t, scales + t, sums + t, y + t);
    });
  });
}

// ---- making them ----------------------------------------------------------------------------------------------

// Codes of a group with this scale: whole numbers from 0 to 2 * middle.
INLINE vf codes_at(vf x, float scale, float middle) {
  vf code = round_even(x / splat(scale) + middle);
  code = code < 0.0f ? splat(0.0f) : code;
  return code > 2 * middle ? splat(2 * middle) : code;
}

// Of a group of numbers: the scale, of some that are tried, with the smallest weighted squared error.
static uint16_t best_scale(const float* x, const float* importance, int64_t group, int bits, int tries) {
  const float middle = ((1 << bits) - 1) / 2.0f;
  float largest = 0, best = 0, least = 0;
  for (int64_t i = 0; i < group; ++i) largest = std::max(largest, std::fabs(x[i]));
  for (int step = 0; step < tries; ++step) {
    bf16 rounded;
    narrow(largest * (1 - 0.05f * float(step)) / middle, &rounded);
    const float scale = std::max(widen(rounded), 5.421010862427522e-20f);  // 2^-64
    vf error = {};
    for (int64_t i = 0; i < group; i += VL) {
      const vf value = load(x + i), off = (codes_at(value, scale, middle) - middle) * scale - value;
      error += off * off * load(importance + i);
    }
    const float total = sum(error);
    if (step == 0 || total < least) least = total, best = scale;
  }
  bf16 stored;
  narrow(best, &stored);
  return stored;
}

static void quantize_group(const float* x, int64_t group, int bits, uint16_t scale, float* codes) {
  for (int64_t i = 0; i < group; i += VL)
    store(codes + i, codes_at(load(x + i), widen(scale), ((1 << bits) - 1) / 2.0f));
}

}  // namespace LTE_VARIANT
