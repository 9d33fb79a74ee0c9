// Dot products of rows of a few bits per weight with inputs rounded to 8 bits: integers inside a group of neighbours,
// floats across groups.
#pragma once
#include <algorithm>
#include <cmath>

#include "lte.h"
#include "simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace LTE_VARIANT {

// One token's inputs as integers: x ~ scales[g] * values. sums[g] = scales[g] * (sum of the group's values).
struct RoundedInputs {
  const int8_t* values;
  const float *scales, *sums;
};

// x: natural order. The last group is filled up with zeros.
static void round_inputs(const float* x, int64_t n, int64_t group, int8_t* values, float* scales, float* sums) {
  for (int64_t first = 0, g = 0; first < n; first += group, ++g) {
    const int64_t count = std::min(group, n - first);
    float largest = 0;
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::fabs(x[first + i]));
    const float scale = std::max(largest / 127.0f, 1e-30f);
    int32_t sum = 0;
    for (int64_t i = 0; i < group; ++i) {
      const float value = i < count ? std::nearbyintf(x[first + i] / scale) : 0.0f;
      values[first + i] = int8_t(value);
      sum += int32_t(value);
    }
    scales[g] = scale;
    sums[g] = scale * float(sum);
  }
}

// A byte's bits as the lowest bits of eight bytes.
INLINE uint64_t spread(uint8_t bits) {
  const uint64_t low = (bits & 0x7fu) * 0x02040810204081ull & 0x0001010101010101ull;
  return low | uint64_t(bits >> 7) << 56;
}

// Codes of eight neighbours; the planes of a group are `plane` bytes apart.
template <int BITS>
INLINE uint64_t codes_of(const uint8_t* planes, int64_t plane) {
  uint64_t codes = spread(planes[0]);
  if constexpr (BITS > 1) codes |= spread(planes[plane]) << 1;
  if constexpr (BITS > 2) codes |= spread(planes[2 * plane]) << 2;
  if constexpr (BITS > 3) codes |= spread(planes[3 * plane]) << 3;
  return codes;
}

// Products of the codes of a group with each token's values, summed: out[t].
template <int BITS, int T>
INLINE void group_dots(const uint8_t* planes, int64_t group, const int8_t* const* values, int32_t* out) {
  const int64_t plane = group / 8;
  int32_t total[T] = {};
  for (int64_t i = 0; i < plane; ++i) {
    uint8_t codes[8];
    const uint64_t packed = codes_of<BITS>(planes + i, plane);
    std::memcpy(codes, &packed, 8);
    for (int t = 0; t < T; ++t)
      for (int j = 0; j < 8; ++j) total[t] += int32_t(codes[j]) * values[t][8 * i + j];
  }
  for (int t = 0; t < T; ++t) out[t] = total[t];
}

#if defined(__AVX512BW__)
template <int BITS>
INLINE __m512i unpack(const uint8_t* planes) {
  uint64_t masks[BITS];
  std::memcpy(masks, planes, sizeof masks);
  __m512i codes = _mm512_maskz_set1_epi8(masks[0], 1);
  if constexpr (BITS > 1) codes = _mm512_mask_add_epi8(codes, masks[1], codes, _mm512_set1_epi8(2));
  if constexpr (BITS > 2) codes = _mm512_mask_add_epi8(codes, masks[2], codes, _mm512_set1_epi8(4));
  if constexpr (BITS > 3) codes = _mm512_mask_add_epi8(codes, masks[3], codes, _mm512_set1_epi8(8));
  return codes;
}
INLINE __m512i dot_bytes(__m512i codes, __m512i values) {
#if defined(__AVX512VNNI__)
  return _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, values);
#else
  return _mm512_madd_epi16(_mm512_maddubs_epi16(codes, values), _mm512_set1_epi16(1));
#endif
}
#elif defined(__AVX2__)
INLINE __m256i dot_bytes(__m256i codes, __m256i values) {
  return _mm256_madd_epi16(_mm256_maddubs_epi16(codes, values), _mm256_set1_epi16(1));
}
// Byte i of the result is bit i of the mask.
INLINE __m256i spread32(uint32_t mask) {
  const __m256i which = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x(int64_t(0x8040201008040201ull));
  const __m256i bytes = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(int32_t(mask)), which), bit);
  return _mm256_and_si256(_mm256_cmpeq_epi8(bytes, bit), _mm256_set1_epi8(1));
}
template <int BITS>
INLINE __m256i unpack(const uint8_t* planes, int64_t plane) {
  __m256i codes = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int b = BITS - 1; b >= 0; --b) {
    uint32_t mask;
    std::memcpy(&mask, planes + b * plane, 4);
    codes = _mm256_add_epi8(_mm256_add_epi8(codes, codes), spread32(mask));
  }
  return codes;
}
#endif

// out[r * out_stride + t] for R neighbouring rows and T tokens.
template <int BITS, int R, int T>
static void lowbit_tile(const lte_lowbit& matrix, int64_t row, const RoundedInputs* x, float* out, int64_t out_stride) {
  const int64_t groups = matrix.groups, group = matrix.group, bytes = BITS * group / 8;
  const float middle = ((1 << BITS) - 1) / 2.0f;
  const uint8_t* planes[R];
  const uint16_t* scales[R];
  for (int r = 0; r < R; ++r) {
    planes[r] = matrix.planes + (row + r) * groups * bytes;
    scales[r] = matrix.scales + (row + r) * groups;
  }
  float total[R][T] = {};
#if defined(__AVX512BW__)
  if (group == 64) {
    __m512 acc[R][T];
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) acc[r][t] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; ++g) {
      __m512i values[T];
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) values[t] = _mm512_loadu_si512(x[t].values + 64 * g);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512i codes = unpack<BITS>(planes[r] + g * bytes);
        const float scale = widen(scales[r][g]);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
          const __m512 dots = _mm512_cvtepi32_ps(dot_bytes(codes, values[t]));
          acc[r][t] = _mm512_fmadd_ps(dots, _mm512_set1_ps(scale * x[t].scales[g]), acc[r][t]);
          total[r][t] -= scale * x[t].sums[g];
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) out[r * out_stride + t] = total[r][t] * middle + _mm512_reduce_add_ps(acc[r][t]);
    return;
  }
#elif defined(__AVX2__)
  if (group % 32 == 0) {
    for (int r = 0; r < R; ++r) {
      __m256 acc[T];
      for (int t = 0; t < T; ++t) acc[t] = _mm256_setzero_ps();
      for (int64_t g = 0; g < groups; ++g) {
        const float scale = widen(scales[r][g]);
        for (int64_t i = 0; i < group / 32; ++i) {
          const __m256i codes = unpack<BITS>(planes[r] + g * bytes + 4 * i, group / 8);
          for (int t = 0; t < T; ++t) {
            const __m256i values = _mm256_loadu_si256((const __m256i*)(x[t].values + group * g + 32 * i));
            const __m256 dots = _mm256_cvtepi32_ps(dot_bytes(codes, values));
            acc[t] = _mm256_fmadd_ps(dots, _mm256_set1_ps(scale * x[t].scales[g]), acc[t]);
          }
        }
        for (int t = 0; t < T; ++t) total[r][t] -= scale * x[t].sums[g];
      }
      for (int t = 0; t < T; ++t) {
        vf lanes;
        std::memcpy(&lanes, &acc[t], sizeof lanes);
        out[r * out_stride + t] = total[r][t] * middle + sum(lanes);
      }
    }
    return;
  }
#endif
  for (int r = 0; r < R; ++r) {
    for (int64_t g = 0; g < groups; ++g) {
      const float scale = widen(scales[r][g]);
      const int8_t* values[T];
      int32_t dots[T];
      for (int t = 0; t < T; ++t) values[t] = x[t].values + group * g;
      group_dots<BITS, T>(planes[r] + g * bytes, group, values, dots);
      for (int t = 0; t < T; ++t) total[r][t] += scale * (x[t].scales[g] * float(dots[t]) - middle * x[t].sums[g]);
    }
    for (int t = 0; t < T; ++t) out[r * out_stride + t] = total[r][t];
  }
}

template <int BITS>
static void lowbit_rows(const lte_lowbit& matrix, int64_t row, int64_t count, const RoundedInputs* x, int64_t tokens,
                        float* out, int64_t out_stride) {
  for (int64_t r = 0; r < count;) {
    const bool four = count - r >= 4;
    int64_t t = 0;
    float* its = out + r * out_stride;
    for (; t + 4 <= tokens; t += 4)
      (four ? lowbit_tile<BITS, 4, 4> : lowbit_tile<BITS, 1, 4>)(matrix, row + r, x + t, its + t, out_stride);
    for (; t < tokens; ++t)
      (four ? lowbit_tile<BITS, 4, 1> : lowbit_tile<BITS, 1, 1>)(matrix, row + r, x + t, its + t, out_stride);
    r += four ? 4 : 1;
  }
}

// Rows row .. row + count by every token: out[r * out_stride + t].
static void lowbit_rows(const lte_lowbit& matrix, int64_t row, int64_t count, const RoundedInputs* x, int64_t tokens,
                        float* out, int64_t out_stride) {
  switch (matrix.bits) {
    case 1: return lowbit_rows<1>(matrix, row, count, x, tokens, out, out_stride);
    case 2: return lowbit_rows<2>(matrix, row, count, x, tokens, out, out_stride);
    case 3: return lowbit_rows<3>(matrix, row, count, x, tokens, out, out_stride);
    default: return lowbit_rows<4>(matrix, row, count, x, tokens, out, out_stride);
  }
}

// ---- making them ----------------------------------------------------------------------------------------------

INLINE vf round_even(vf x) { return (x + 12582912.0f) - 12582912.0f; }

// Codes of a group with this scale: whole numbers from 0 to 2 * middle.
INLINE vf codes_at(vf x, float scale, float middle) {
  vf code = round_even(x / splat(scale) + middle);
  code = code < 0.0f ? splat(0.0f) : code;
  return code > 2 * middle ? splat(2 * middle) : code;
}

// One group of `count` numbers, `padded` with zeros to a multiple of VL: its scale, of some that are tried the one with
// the smallest weighted squared error, and its bit planes.
static uint16_t quantize_group(const float* x, const float* importance, int64_t group, int64_t padded, int bits,
                               int tries, uint8_t* planes) {
  const float middle = ((1 << bits) - 1) / 2.0f;
  float largest = 0, best = 0, least = 0;
  for (int64_t i = 0; i < padded; ++i) largest = std::max(largest, std::fabs(x[i]));
  for (int step = 0; step < tries; ++step) {
    bf16 rounded;
    narrow(largest * (1 - 0.05f * float(step)) / middle, &rounded);
    const float scale = std::max(widen(rounded), 5.421010862427522e-20f);  // 2^-64
    vf error = {};
    for (int64_t i = 0; i < padded; i += VL) {
      const vf value = load(x + i), off = (codes_at(value, scale, middle) - middle) * scale - value;
      error += off * off * load(importance + i);
    }
    const float total = sum(error);
    if (step == 0 || total < least) least = total, best = scale;
  }
  for (int64_t i = 0; i < padded; i += VL) {
    float codes[VL];
    store(codes, codes_at(load(x + i), best, middle));
    for (int64_t j = 0; j < VL && i + j < group; ++j)
      for (int b = 0; b < bits; ++b) {
        uint8_t& byte = planes[b * (group / 8) + (i + j) / 8];
        const int at = (i + j) % 8;
        byte = uint8_t(at ? byte : 0) | uint8_t(((int(codes[j]) >> b) & 1) << at);
      }
  }
  bf16 stored;
  narrow(best, &stored);
  return stored;
}

}  // namespace LTE_VARIANT
