// Products of a matrix of a few bits per weight with inputs rounded to 8 bits: integers inside a group of neighbours,
// floats across groups. Sixteen rows are stored side by side and their products made at once, one row per lane of 32
// bits: four of its codes, times the same four inputs for all of them.
#pragma once
#include <algorithm>
#include <cmath>

#include "lte.h"
#include "simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace LTE_VARIANT {

constexpr int64_t TOGETHER = LTE_LOWBIT_ROWS, CHUNK = LTE_LOWBIT_CHUNK;  // rows of a block, columns of a chunk

// One token's inputs as integers: x ~ scales[g] * values. sums[g] = scales[g] * (sum of the group's values).
struct RoundedInputs {
  const int8_t* values;
  const float *scales, *sums;
};

INLINE vf round_even(vf x) { return (x + 12582912.0f) - 12582912.0f; }

// x: natural order. The last group is filled up with zeros.
static void round_inputs(const float* x, int64_t n, int64_t group, int8_t* values, float* scales, float* sums) {
  for (int64_t first = 0, g = 0; first < n; first += group, ++g) {
    const int64_t count = std::min(group, n - first);
    float largest = 0;
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::fabs(x[first + i]));
    const float scale = std::max(largest / 127.0f, 1e-30f);
    int32_t sum = 0;
    int64_t i = 0;
    for (; i + VL <= count; i += VL) {
      const vi whole = __builtin_convertvector(round_even(load(x + first + i) / splat(scale)), vi);
      for (int j = 0; j < VL; ++j) values[first + i + j] = int8_t(whole[j]), sum += whole[j];
    }
    for (; i < group; ++i) {
      const float value = i < count ? std::nearbyintf(x[first + i] / scale) : 0.0f;
      values[first + i] = int8_t(value);
      sum += int32_t(value);
    }
    scales[g] = scale;
    sums[g] = scale * float(sum);
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

// dots += codes, four to a lane, times four values.
INLINE vi add_products(vi dots, vcodes codes, const int8_t* values) {
  int32_t four;
  std::memcpy(&four, values, 4);
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpbusd_epi32((__m512i)dots, (__m512i)codes, _mm512_set1_epi32(four));
#elif defined(__AVX512BW__)
  return dots + (vi)_mm512_madd_epi16(_mm512_maddubs_epi16((__m512i)codes, _mm512_set1_epi32(four)), _mm512_set1_epi16(1));
#elif defined(__AVX2__)
  return dots + (vi)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)codes, _mm256_set1_epi32(four)), _mm256_set1_epi16(1));
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
constexpr int CHAINS = T == 1 ? 4 : T == 2 ? 2 : 1;

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
      sum = add_products(sum, codes, values[t] + 4 * STEP);
    }
    add_steps<BITS, T, STEP + 1>(dots, planes, values);
  }
}

// The rows of a block by T tokens: out[t * out_stride + row].
template <int BITS, int T>
static void lowbit_block(const lte_lowbit& matrix, int64_t block, const RoundedInputs* x, float* out, int64_t out_stride) {
  constexpr int64_t PLANE = TOGETHER * 4;  // bytes
  const int64_t groups = matrix.groups, chunks = matrix.group / CHUNK;
  const float middle = ((1 << BITS) - 1) / 2.0f;
  const uint8_t* planes = matrix.planes + block * groups * chunks * BITS * PLANE;
  const uint16_t* scales = matrix.scales + block * groups * TOGETHER;
#pragma GCC unroll 1
  for (int64_t part = 0; part < TOGETHER; part += VL) {
    vf total[T] = {};
    for (int64_t g = 0; g < groups; ++g) {
      const vf scale = [&] {
        const vu wide = __builtin_convertvector(*reinterpret_cast<const vhalf_any*>(scales + g * TOGETHER + part), vu) << 16;
        vf out;
        std::memcpy(&out, &wide, sizeof out);
        return out;
      }();
      vi dots[2 * CHAINS<T> * T] = {};
      for (int64_t c = 0; c < chunks; ++c) {
        vcodes here[BITS];
#pragma GCC unroll 4
        for (int b = 0; b < BITS; ++b)
          here[b] = *reinterpret_cast<const vcodes_any*>(planes + ((g * chunks + c) * BITS + b) * PLANE + 4 * part);
        const int8_t* values[T];
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) values[t] = x[t].values + g * matrix.group + c * CHUNK;
        add_steps<BITS, T, 0>(dots, here, values);
      }
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        vi whole = dots[t], stayed = dots[CHAINS<T> * T + t];
#pragma GCC unroll 4
        for (int i = 1; i < CHAINS<T>; ++i) whole += dots[i * T + t], stayed += dots[(CHAINS<T> + i) * T + t];
        if constexpr (IN_PLACE) whole += stayed >> BITS;
        const vf products = __builtin_convertvector(whole, vf) * x[t].scales[g] - splat(middle * x[t].sums[g]);
        total[t] += products * scale;
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) store(out + t * out_stride + part, total[t]);
  }
}

template <int BITS>
static void lowbit_blocks(const lte_lowbit& matrix, int64_t block, int64_t count, const RoundedInputs* x, int64_t tokens,
                          float* out, int64_t out_stride) {
  constexpr int MOST = VL == 16 ? 8 : 4;
  for (int64_t b = 0; b < count; ++b) {
    int64_t t = 0;
    for (; t + MOST <= tokens; t += MOST)
      lowbit_block<BITS, MOST>(matrix, block + b, x + t, out + t * out_stride + b * TOGETHER, out_stride);
    for (; t + 2 <= tokens; t += 2)
      lowbit_block<BITS, 2>(matrix, block + b, x + t, out + t * out_stride + b * TOGETHER, out_stride);
    for (; t < tokens; ++t)
      lowbit_block<BITS, 1>(matrix, block + b, x + t, out + t * out_stride + b * TOGETHER, out_stride);
  }
}

// Blocks of rows by every token: out[t * out_stride + row], row 0 being the first of the first block.
static void lowbit_blocks(const lte_lowbit& matrix, int64_t block, int64_t count, const RoundedInputs* x, int64_t tokens,
                          float* out, int64_t out_stride) {
  switch (matrix.bits) {
    case 1: return lowbit_blocks<1>(matrix, block, count, x, tokens, out, out_stride);
    case 2: return lowbit_blocks<2>(matrix, block, count, x, tokens, out, out_stride);
    case 3: return lowbit_blocks<3>(matrix, block, count, x, tokens, out, out_stride);
    default: return lowbit_blocks<4>(matrix, block, count, x, tokens, out, out_stride);
  }
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
