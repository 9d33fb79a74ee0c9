// The inner loops everything is made of: dot products of weight rows with token vectors, and sums of weight rows
// scaled per token. For one token, rows that lie one after the other are read so: of short rows, a half more a second.
// Others are read eight side by side: one token vector then serves eight loads, eight rows begin at once, and the loop
// stays short enough for the processor to run ahead into memory. The eight that come next are fetched meanwhile, into the
// second cache: in the first, rows of a page or half a one fall on the same few places.
#pragma once
#include <type_traits>

#include "simd.h"

namespace LTE_VARIANT {

#if defined(__AVX512BF16__) || defined(LTE_EMULATE_AVX512)
constexpr bool BF16_DOT = true;  // the instruction multiplies 32 pairs of bf16 at once
#else
constexpr bool BF16_DOT = false;
#endif
template <class W>
constexpr bool PAIRED = BF16_DOT && std::is_same_v<W, bf16>;

// acc += products of neighbouring bf16 pairs, one of each lane.
INLINE vf dot_pairs(vf acc, vu weights, vu x) {
#if defined(__AVX512BF16__)
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)weights, (__m512bh)x);
#else
  vu parts[4] = {weights << 16, weights & 0xffff0000u, x << 16, x & 0xffff0000u};
  vf values[4];
  std::memcpy(values, parts, sizeof parts);
  return acc + values[1] * values[3] + values[0] * values[2];
#endif
}
INLINE vf dot_pairs(vf acc, const bf16* weights, const bf16* x) {
  return dot_pairs(acc, *reinterpret_cast<const vu_any*>(weights), *reinterpret_cast<const vu_any*>(x));
}

// A token vector is kept as the dot product wants it: float in split order, or bf16 in natural order in the same place.
template <class W>
INLINE void put(float* x, int64_t i, int64_t n, float value) {
  if constexpr (PAIRED<W>)
    narrow(value, reinterpret_cast<bf16*>(x) + i);
  else
    x[split_index(i, n, (const W*)nullptr)] = value;
}
template <class W>
INLINE float get(const float* x, int64_t i, int64_t n) {
  if constexpr (PAIRED<W>) return widen(reinterpret_cast<const bf16*>(x)[i]);
  return x[split_index(i, n, (const W*)nullptr)];
}
template <class W>
INLINE float tail(const float* x, int64_t i) {
  if constexpr (PAIRED<W>) return widen(reinterpret_cast<const bf16*>(x)[i]);
  return x[i];
}

// One row by one token; four sums keep the processor busy.
template <class W>
INLINE float dot_row(const W* row, const float* x, int64_t n) {
  constexpr int SUMS = 4;
  vf acc[SUMS] = {};
  int64_t k = 0;
  auto step = [&](vf& sum, int64_t k) {
    if constexpr (PAIRED<W>) {
      sum = dot_pairs(sum, row + k, reinterpret_cast<const bf16*>(x) + k);
    } else {
      vf a, b;
      load_pair(row + k, a, b);
      sum += a * load(x + k);
      sum += b * load(x + k + VL);
    }
  };
  for (; k + SUMS * STEP <= n; k += SUMS * STEP)
#pragma GCC unroll 4
    for (int i = 0; i < SUMS; ++i) step(acc[i], k + i * STEP);
  for (; k + STEP <= n; k += STEP) step(acc[0], k);
  float total = sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
  for (int64_t i = k; i < n; ++i) total += widen(row[i]) * tail<W>(x, i);
  return total;
}

// out[r * out_stride + t] = dot(rows[r], x + t * x_stride), R rows by T tokens; next: R rows to fetch, or null.
template <int R, int T, class W>
INLINE void dot_tile(const W* const* rows, const float* x, int64_t x_stride, int64_t n, float* out, int64_t out_stride,
                     const W* const* next = nullptr) {
  vf acc[R][T] = {};
  int64_t k = 0;
  for (; k + STEP <= n; k += STEP) {
    if (next)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) fetch(next[r] + k);
    if constexpr (PAIRED<W>) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t)
          acc[r][t] = dot_pairs(acc[r][t], rows[r] + k, reinterpret_cast<const bf16*>(x + t * x_stride) + k);
    } else {
      vf xa[T], xb[T];
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        xa[t] = load(x + t * x_stride + k);
        xb[t] = load(x + t * x_stride + k + VL);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        vf a, b;
        load_pair(rows[r] + k, a, b);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          acc[r][t] += a * xa[t];
          acc[r][t] += b * xb[t];
        }
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) {
      float total = sum(acc[r][t]);
      for (int64_t i = k; i < n; ++i) total += widen(rows[r][i]) * tail<W>(x + t * x_stride, i);
      out[r * out_stride + t] = total;
    }
}

// The same for any number of tokens.
template <int R, class W>
static void dot_rows(const W* const* rows, const float* x, int64_t x_stride, int64_t tokens, int64_t n, float* out,
                     int64_t out_stride) {
  constexpr int T = VL == 16 ? 4 : 2;
  int64_t t = 0;
  for (; t + T <= tokens; t += T) dot_tile<R, T>(rows, x + t * x_stride, x_stride, n, out + t, out_stride);
  for (; t < tokens; ++t) dot_tile<R, 1>(rows, x + t * x_stride, x_stride, n, out + t, out_stride);
}

// y[i] += sum_r h[r] * rows[r][i] for i in [from, to), from a multiple of STEP. y is in split order; next is fetched.
template <int R, class W>
INLINE void scale_rows(const W* const* rows, const W* const* next, const float* h, int64_t from, int64_t to, float* y) {
  vf scale[R];
  for (int r = 0; r < R; ++r) scale[r] = splat(h[r]);
  int64_t k = from;
  for (; k + STEP <= to; k += STEP) {
    vf ya = load(y + k), yb = load(y + k + VL);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      vf a, b;
      load_pair(rows[r] + k, a, b);
      fetch(next[r] + k);
      ya += scale[r] * a;
      yb += scale[r] * b;
    }
    store(y + k, ya);
    store(y + k + VL, yb);
  }
  for (int r = 0; r < R; ++r)
    for (int64_t i = k; i < to; ++i) y[i] += h[r] * widen(rows[r][i]);
}

// The same for several tokens: y[t][i] += sum_r h[t * h_stride + r] * rows[r][i].
template <int R, class W>
INLINE void scale_tile(const W* const* rows, const float* h, int64_t h_stride, int64_t tokens, int64_t from, int64_t to,
                       float* const* y) {
  int64_t k = from;
  for (; k + STEP <= to; k += STEP) {
    vf a[R], b[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) load_pair(rows[r] + k, a[r], b[r]);
    for (int64_t t = 0; t < tokens; ++t) {
      vf ya = load(y[t] + k), yb = load(y[t] + k + VL);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        vf scale = splat(h[t * h_stride + r]);
        ya += scale * a[r];
        yb += scale * b[r];
      }
      store(y[t] + k, ya);
      store(y[t] + k + VL, yb);
    }
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int r = 0; r < R; ++r)
      for (int64_t i = k; i < to; ++i) y[t][i] += h[t * h_stride + r] * widen(rows[r][i]);
}

}  // namespace LTE_VARIANT
