// Vectors of VL floats through the compiler's vector extension: one source for every instruction set. Each variant
// is this same code compiled with other flags, in a namespace of its own.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) || defined(LTE_EMULATE_AVX512)
#define VL 16
#elif defined(__AVX2__)
#define VL 8
#else
#define VL 4
#endif
#define INLINE static inline __attribute__((always_inline))

namespace LTE_VARIANT {

typedef float vf __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef float vf_any __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(VL * 4), aligned(2), may_alias));

INLINE vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
INLINE void store(float* p, vf v) { *reinterpret_cast<vf_any*>(p) = v; }
INLINE vf splat(float x) { return x - vf{}; }
// Halves are put together until one lane is left. Written out as types, because a loop over lanes goes through memory.
template <int N>
struct Lanes {
  typedef float type __attribute__((vector_size(N * 4)));
};
template <int N, class Combine>
INLINE float reduce(typename Lanes<N>::type v, Combine&& combine) {
  typename Lanes<N / 2>::type low, high;
  std::memcpy(&low, &v, sizeof low);
  std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
  if constexpr (N == 2)
    return combine(low, high)[0];
  else
    return reduce<N / 2>(combine(low, high), combine);
}
INLINE float sum(vf v) {
  return reduce<VL>(v, [](auto a, auto b) { return a + b; });
}
INLINE float largest(vf v) {
  return reduce<VL>(v, [](auto a, auto b) { return a > b ? a : b; });
}

typedef uint16_t bf16;
INLINE float widen(float x) { return x; }
INLINE float widen(bf16 x) {
  uint32_t bits = uint32_t(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
INLINE void narrow(float x, float* out) { *out = x; }
INLINE void narrow(float x, bf16* out) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  *out = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// A step covers 2 * VL weights of a row, as two vectors. A bf16 word of 32 bits holds two neighbours, and splitting it
// costs one shift and one mask; so the two vectors of a bf16 step are its even and its odd elements, and what is
// multiplied with them is kept in that "split" order too.
constexpr int STEP = 2 * VL;
INLINE void load_pair(const float* p, vf& a, vf& b) {
  a = load(p);
  b = load(p + VL);
}
INLINE void load_pair(const bf16* p, vf& a, vf& b) {
  vu raw = *reinterpret_cast<const vu_any*>(p);
  vu low = raw << 16, high = raw & 0xffff0000u;
  std::memcpy(&a, &low, sizeof a);
  std::memcpy(&b, &high, sizeof b);
}
// Where element i of a row is found in split order, for rows of weights of type W.
INLINE int64_t split_index(int64_t i, int64_t n, const float*) { return i; }
INLINE int64_t split_index(int64_t i, int64_t n, const bf16*) {
  if (i >= n / STEP * STEP) return i;
  int64_t within = i % STEP;
  return i - within + (within & 1) * VL + within / 2;
}

INLINE vf vexp(vf x) {  // |relative error| < 3e-7; saturates, NaN stays NaN
  x = x > 88.0f ? splat(88.0f) : x;
  x = x < -87.0f ? splat(-87.0f) : x;
  vf n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
  vf r = x - n * 0.693145751953125f;
  r = r - n * 1.428606820309417232e-6f;
  vf p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  vi exponent = (__builtin_convertvector(n, vi) + 127) << 23;
  vf scale;
  std::memcpy(&scale, &exponent, sizeof scale);
  return p * scale;
}

template <int ACT>
INLINE vf activate(vf x) {
  if constexpr (ACT == 0) return x < 0.0f ? splat(0.0f) : x;
  if constexpr (ACT == 4) return x;
  if constexpr (ACT == 2) {
    vf inner = 1.5957691216057308f * (x + 0.044715f * x * x * x);  // 2 sqrt(2 / pi) (...)
    return x - x / (vexp(inner) + 1.0f);
  }
  if constexpr (ACT == 3) return x / (1.0f + vexp(-x));
  if constexpr (ACT == 1) {
    float lanes[VL];
    std::memcpy(lanes, &x, sizeof x);
    for (int i = 0; i < VL; ++i) lanes[i] = 0.5f * lanes[i] * (1.0f + std::erf(lanes[i] * 0.70710678118654752f));
    return load(lanes);
  }
}

// values[i] = act(values[i]) [* other[i]], over n rounded up to VL: buffers are padded.
template <int ACT>
static void activate_all(float* values, const float* other, int64_t n) {
  for (int64_t i = 0; i < n; i += VL) {
    vf v = activate<ACT>(load(values + i));
    store(values + i, other ? v * load(other + i) : v);
  }
}
static inline void activate_all(int activation, float* values, const float* other, int64_t n) {
  switch (activation) {
    case 0: return activate_all<0>(values, other, n);
    case 1: return activate_all<1>(values, other, n);
    case 2: return activate_all<2>(values, other, n);
    case 4: return activate_all<4>(values, other, n);
    default: return activate_all<3>(values, other, n);
  }
}

// Ask for what the kernels will read soon, into the second cache.
INLINE void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace LTE_VARIANT
